"""The pairwise sigmoid loss on the global batch (SigLIP, arXiv 2303.15343), summed over pairs of modalities."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symile_dist.distributed import Group
from symile_dist.objectives.contrast import as_scale, in_compute_precision, scale_problem
from symile_dist.objectives.cube import matmul
from symile_dist.objectives.health import contrastive_health
from symile_dist.objectives.negatives import GlobalBatch
from symile_dist.similarity import SumSimilarity
from symile_dist.types import Batch, Outputs, StepReport

LOGITS = {"cpu": 2**21, "cuda": 2**25}
"""Logits at once, at most, unless one row has more."""


class PairwiseSigmoidLoss:
    """The sum over pairs of modalities of SigLIP's loss (arXiv 2303.15343, section 3.2):

        -(1 / N) sum_ij log sigmoid(z_ij (logit_scale x_i . y_j + logit_bias)), z = 1 where i = j, else -1.

    Logits are computed some rows at a time: beside the gathered representations, no memory grows with the number of
    ranks.

    Args:
        group: the ranks that form the global batch; None is all of them.
        normalize: L2-normalise the representations first, as SigLIP does.
    """

    def __init__(self, group: Group = None, *, normalize: bool = False) -> None:
        self.group, self.normalize = group, normalize

    def __call__(
        self,
        representations: list[Tensor],
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        *,
        step: int | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The global loss, the same on every rank; its gradient is exact once averaged over the ranks.

        bfloat16 is multiplied as it is on CUDA, halves else in float32, under autocast too; sums over the batch are
        float64.

        Args:
            representations: M tensors (n, D), this rank's rows; the same n on every rank.
            logit_scale: scalar multiplier of the logits, already exp-ed.
            logit_bias: scalar, added to the logits.
            step: not used: every other row of the batch is a negative.
            valid: (n,) bool; rows that are in no pair where False. N is the global number of valid rows.

        Raises ValueError, on all ranks alike, for arguments that do not fit each other or those of other ranks.
        """
        bias_problem = (scale_problem(logit_bias) or "").replace("logit_scale", "logit_bias")
        batch = GlobalBatch(
            representations,
            valid,
            self.group,
            description=f"pairwise sigmoid, normalize={self.normalize}",
            problem=scale_problem(logit_scale) or bias_problem or None,
            normalize=self.normalize,
        )
        scale, bias = as_scale(logit_scale, batch.own), as_scale(logit_bias, batch.own)
        # This rank's rows of the first of each pair, all rows of the second: modality 0 is never needed whole.
        own = [batch.own, *(other[batch.rows] for other in batch.others[:-1])]
        losses = [
            _Losses.apply(batch.valid, batch.offset, scale, bias, own[first], batch.others[second - 1])
            for first, second in combinations(range(len(batch.others) + 1), 2)
        ]
        return (batch.mean(torch.stack(losses), batch.local_valid) * len(losses)).to(scale.dtype)


class PairwiseSigmoidObjective(nn.Module):
    """`PairwiseSigmoidLoss` as the trainer calls it, with the learned bias of the logits.

    Args:
        normalize: as in the loss.
        logit_bias_init: what the bias starts from; SigLIP has -10, with a logit scale of 10: `logit_scale_init: 2.3`.
            Most pairs are negatives: without it the first steps would do nothing but push everything apart.
    """

    def __init__(self, normalize: bool = True, logit_bias_init: float = -10.0) -> None:
        super().__init__()
        self.similarity = SumSimilarity(normalize)
        self.loss = PairwiseSigmoidLoss(normalize=normalize)
        # One element, not zero dimensions: DeepSpeed cannot broadcast a scalar parameter.
        self.logit_bias = nn.Parameter(torch.full((1,), float(logit_bias_init)))

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        representations = list(outputs.representations.values())
        loss = self.loss(representations, outputs.logit_scale, self.logit_bias.float(), valid=batch.valid)
        return StepReport(loss, contrastive_health(representations, batch.valid))


class _Losses(torch.autograd.Function):
    """(n, D) own rows of one modality, (N, D) of another -> (n,) float64: own rows' terms of the loss, summed."""

    @staticmethod
    def forward(
        ctx: Any, valid: Tensor | None, offset: int, scale: Tensor, bias: Tensor, own: Tensor, other: Tensor
    ) -> Tensor:
        ctx.valid, ctx.offset = valid, offset
        ctx.save_for_backward(scale, bias, own, other)
        own_in, other_in = in_compute_precision(own), in_compute_precision(other)
        losses = own.new_empty((len(own),), dtype=torch.float64)
        # The threshold from which softplus is the identity: its default of 20 would cost float64 its last digits.
        with torch.autocast(own.device.type, enabled=False):  # the precision of each product is chosen here
            for rows, logits in _tiles(own_in, other_in, scale, bias, valid, offset):
                losses[rows] = F.softplus(logits, threshold=40).sum(dim=1, dtype=torch.float64)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        scale, bias, own, other = ctx.saved_tensors
        own_in, other_in = in_compute_precision(own), in_compute_precision(other)
        kind = scale.dtype
        weights = incoming[0].to(kind)
        grad_scale, grad_bias = (scale.new_zeros((), dtype=torch.float64) for _ in range(2))
        grad_own, grad_other = torch.empty_like(own, dtype=kind), torch.zeros_like(other, dtype=kind)
        with torch.autocast(own.device.type, enabled=False):
            for rows, logits in _tiles(own_in, other_in, scale, bias, ctx.valid, ctx.offset):
                gradient = logits.sigmoid_().mul_(weights[rows, None])
                gradient.diagonal(ctx.offset + rows.start).neg_()
                grad_bias += gradient.sum(dtype=torch.float64)
                gradient = gradient.to(own_in.dtype)
                grad_own[rows] = matmul(gradient, other_in)
                grad_other += matmul(gradient.T, own_in[rows])
                # The logits but for the bias are linear in own rows: Euler's theorem on homogeneous functions.
                grad_scale += (grad_own[rows] * own_in[rows]).sum(dtype=torch.float64)
        gradients = [grad.mul_(scale).to(own.dtype) for grad in (grad_own, grad_other)]
        return None, None, grad_scale.to(kind), grad_bias.to(kind), *gradients


def _tiles(
    own: Tensor, other: Tensor, scale: Tensor, bias: Tensor, valid: Tensor | None, offset: int
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, -z_ij (logits) of those rows, -inf in columns of invalid rows), some rows at a time.

    An invalid row of `own` is not looked after here: nobody counts its losses.
    """
    height = max(1, LOGITS.get(own.device.type, LOGITS["cuda"]) // len(other))
    for first in range(0, len(own), height):
        rows = slice(first, min(len(own), first + height))
        logits = matmul(own[rows], other.T).mul_(scale).add_(bias)
        logits.diagonal(offset + first).neg_()
        yield rows, logits if valid is None else logits.masked_fill_(~valid, -torch.inf)
