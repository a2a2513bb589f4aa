"""From negatives to the loss: what every strategy of negative sampling shares.

An anchor's cross-entropy with its positive p and the log-sum-exp z of its negatives is log(1 + exp(z - p)). The
positive never enters z: so where the model has learned, and z - p is far below zero, loss and gradient keep all their
digits, which exp(p) / (exp(p) + exp(z)) in float32 does not (facts and figures: docs/objective.md).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from symile_dist.distributed import Group, all_gather, all_reduce_max, all_reduce_sum
from symile_dist.objectives.cube import Cube
from symile_dist.objectives.exponentials import Weight, is_bounded, largest_logit
from symile_dist.objectives.negatives import GlobalBatch
from symile_dist.similarity import elementwise_product

POSITIVE_ROWS = 4096
"""Rows whose positives are computed at once, in float64."""


class Negatives(Protocol):
    """A strategy of negative sampling: pure arithmetic on one rank's share, without communication or autograd.

    Every logit that a rank sums over has exactly one row of `own` as a factor.
    """

    def log_sum_exp(self, own: Tensor, others: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) own rows of modality 0, M - 1 tensors (N, D) -> (n,) and (M - 1, N) float64: the log-sum-exps of the
        scaled logits of own anchors, and of this rank's share of the other modalities' anchors."""
        ...

    def gradients(
        self, own: Tensor, others: list[Tensor], scale: Tensor, weights: list[Weight]
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradients of the loss with respect to `own` and `others`, divided by the scale; M weights."""
        ...


def contrastive_losses(
    own: Tensor,
    others: list[Tensor],
    rows: slice,
    group: Group,
    negatives: Negatives,
    scale: Tensor,
    copies: Tensor | None = None,
) -> Tensor:
    """(M, n) float64: each anchor's loss for this rank's samples.

    Args:
        own: (n, D), this rank's rows of modality 0.
        others: M - 1 tensors (N, D).
        rows: this rank's rows of those.
        scale: scalar, what logits are multiplied with.
        copies: (M, N) how often each anchor's positive is among its negatives, which leave it out; None: never.
    """
    positive, of_own, share = _Logits.apply(negatives, rows, scale, own, *others)
    of_others = SumOverRanks.apply(share, rows, group)
    difference = torch.cat([of_own[None], of_others]) - positive
    # With c copies log(1 + c + exp(z - p)), where z leaves them out. The threshold is that from which softplus is the
    # identity: its default of 20 would cost float64 its last digits.
    counted_twice = 0.0 if copies is None else copies[:, rows].log1p()
    return F.softplus(difference - counted_twice, threshold=40) + counted_twice


def scale_problem(logit_scale: object) -> str | None:
    """What is wrong with a multiplier of the logits, or None."""
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() == 1 and logit_scale.is_floating_point():
            return None
        return f"logit_scale should be one number, is {logit_scale.dtype} of shape {tuple(logit_scale.shape)}"
    if isinstance(logit_scale, float | int):
        return None
    return f"logit_scale should be a number or a tensor of one, is a {type(logit_scale).__name__}"


def as_scale(logit_scale: Tensor | float, representations: Tensor) -> Tensor:
    """The multiplier as a scalar tensor beside the representations, float32 or more."""
    kind = torch.promote_types(representations.dtype, torch.float32)
    if isinstance(logit_scale, Tensor):
        return logit_scale.to(representations.device, kind).reshape(())
    return torch.full((), float(logit_scale), dtype=kind, device=representations.device)


def counted(valid: Tensor | None, present: Tensor | None) -> Tensor | None:
    """(n,) and (n, M) flags -> which losses count, (M, n) or (n,); None: all."""
    if present is None or valid is None:
        return valid if present is None else present.T
    return present.T & valid


def make_cube(batch: GlobalBatch, representations: list[Tensor], scale: Tensor) -> Cube:
    """The full cube of some modalities of the batch: this rank's rows of the first, all rows of the others."""
    with torch.no_grad():
        bound = all_reduce_max(largest_logit(representations, scale), batch.group)  # all ranks go the same way
        negatives = batch.size ** (len(representations) - 1)
        return Cube(batch.offset, batch.valid, is_bounded(bound, negatives, representations[0].dtype))


class _Logits(torch.autograd.Function):
    """Positives' logits and negatives' log-sum-exps of one rank's share, and their gradients, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any, negatives: Negatives, rows: slice, scale: Tensor, own: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        own_in, others_in = in_compute_precision(own), [in_compute_precision(other) for other in others]
        scale_in = scale.to(torch.promote_types(own_in.dtype, torch.float32))
        with torch.autocast(own.device.type, enabled=False):  # the precision of each product is chosen here
            positive = _positives(own_in, [other[rows] for other in others_in]) * scale.double()
            of_own, of_others = negatives.log_sum_exp(own_in, others_in, scale_in)
        ctx.negatives, ctx.rows = negatives, rows
        ctx.save_for_backward(scale, own, of_own, of_others, *others)
        return positive, of_own, of_others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        of_positive, *of_sums = incoming
        scale, own, of_own, of_others, *others = ctx.saved_tensors
        own_in, others_in = in_compute_precision(own), [in_compute_precision(other) for other in others]
        scale_in = scale.to(torch.promote_types(own_in.dtype, torch.float32))
        weights = [Weight(of_sums[0], of_own), *map(Weight, of_sums[1], of_others)]
        with torch.autocast(own.device.type, enabled=False):
            grad_own, grad_others = ctx.negatives.gradients(own_in, others_in, scale_in, weights)
        grad_own_rows = [grad_own, *(grad[ctx.rows] for grad in grad_others)]
        _add_gradient_of_positives(own_in, [other[ctx.rows] for other in others_in], of_positive, grad_own_rows)
        # All logits of this rank are linear in its own rows, so their gradients' sum over logits, which is what the
        # scale gets, is an inner product with what those rows got (Euler's theorem on homogeneous functions).
        grad_scale = _inner_product(own_in, grad_own).to(scale.dtype)
        gradients = [
            grad.mul_(scale_in).to(tensor.dtype)
            for grad, tensor in zip([grad_own, *grad_others], [own, *others], strict=True)
        ]
        return None, None, grad_scale, *gradients


def in_compute_precision(tensor: Tensor) -> Tensor:
    """bf16 as it is on CUDA, which multiplies it fast; else float32 or more (fp16 cannot hold what is near 1 / N^2)."""
    fast = tensor.dtype == torch.bfloat16 and tensor.device.type == "cuda"
    return tensor if fast or tensor.dtype.itemsize >= 4 else tensor.float()


def _row_blocks(n: int) -> list[slice]:
    return [slice(first, first + POSITIVE_ROWS) for first in range(0, n, POSITIVE_ROWS)]


def _positives(own: Tensor, others: list[Tensor]) -> Tensor:
    """M tensors (n, D) -> their MIPs (n,), in float64."""
    blocks = _row_blocks(len(own))
    return torch.cat([elementwise_product([t[rows].double() for t in (own, *others)]).sum(dim=1) for rows in blocks])


def _add_gradient_of_positives(own: Tensor, others: list[Tensor], of_positive: Tensor, grads: list[Tensor]) -> None:
    """Adds to `grads`, M tensors (n, D), `of_positive` (n,) times the product of the other modalities."""
    tensors = [own, *others]
    for rows in _row_blocks(len(own)):
        weight = of_positive[rows, None].to(grads[0].dtype)
        for m, grad in enumerate(grads):
            rest = [t[rows].to(weight.dtype) for k, t in enumerate(tensors) if k != m]
            grad[rows] += weight * elementwise_product(rest)


def _inner_product(left: Tensor, right: Tensor) -> Tensor:
    """In float64."""
    return sum(
        ((left[rows].double() * right[rows].double()).sum() for rows in _row_blocks(len(left))),
        start=left.new_zeros((), dtype=torch.float64),
    )


class SumOverRanks(torch.autograd.Function):
    """The ranks' shares of log-sum-exps -> this rank's samples' log-sum-exps over all ranks.

    O(N) numbers over the network: two all-reduces forward, one all-gather backward.
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor, rows: slice, group: Group) -> Tensor:
        """(A, N) -> (A, n)."""
        maximum = all_reduce_max(share, group)
        maximum = torch.where(maximum == -torch.inf, 0.0, maximum)
        total = all_reduce_sum((share - maximum).exp(), group).log() + maximum
        ctx.group = group
        ctx.save_for_backward(share, total)
        return total[:, rows].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor, None, None]:
        share, total = ctx.saved_tensors
        everyones = all_gather(incoming[0].T, ctx.group).T
        fraction = torch.where(total == -torch.inf, 0.0, (share - total).exp())
        return everyones * fraction, None, None
