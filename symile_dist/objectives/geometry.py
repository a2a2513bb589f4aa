"""Objectives of geometry on the global batch: GRAM (ICLR 2025, arXiv 2412.11959) and TRIANGLE (NeurIPS 2025).

One modality is the anchor; the rows of one number of all the others are a tuple. The logit of anchor i and tuple j is
minus a distance among their L2-normalised vectors: the volume that they span, or the area between them. The loss is
the mean of two cross-entropies: each anchor among all tuples, and each tuple among all anchors.

Each rank takes the rows of the N x N logits that belong to its own anchors, so the anchor modality is not gathered, and
computes them some rows at a time, in the backward pass once more. Logits of positives are computed apart, in float64:
the vectors of a positive become equal as the model learns, and the distance is then a small difference of large
numbers, of which float32 leaves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from symile_dist.distributed import Group
from symile_dist.objectives.contrast import POSITIVE_ROWS, SumOverRanks, as_scale, scale_problem
from symile_dist.objectives.exponentials import Weight, log_sum_exp, rounded
from symile_dist.objectives.health import contrastive_health
from symile_dist.objectives.negatives import GlobalBatch, find_problem
from symile_dist.registry import suggestion
from symile_dist.similarity import AreaSimilarity, GeometricSimilarity, VolumeSimilarity, unit_rows
from symile_dist.types import Batch, Outputs, StepReport

LOGITS = {"cpu": 2**20, "cuda": 2**24}
"""Logits at once, at most, unless one row has more. Some M + 12 times as many numbers exist at a time."""


class _GeometricLoss:
    """What the two losses share."""

    name: str
    similarity: GeometricSimilarity

    def __init__(self, group: Group = None, *, anchor: int = 0, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing = {label_smoothing} should be 0 or more, and less than 1")
        self.group, self.anchor, self.label_smoothing = group, anchor, label_smoothing

    def __call__(
        self,
        representations: list[Tensor],
        logit_scale: Tensor | float,
        *,
        step: int | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The global loss, the same on every rank; its gradient is exact once averaged over the ranks.

        Halves are computed in float32, under autocast too; sums over the batch and logits of positives are float64.

        Args:
            representations: M tensors (n, D), this rank's rows, normalised here; the same n on every rank.
            logit_scale: scalar multiplier of the logits, already exp-ed: 1 / tau.
            step: not used: every other row of the batch is a negative.
            valid: (n,) bool; rows that are neither anchor nor negative where False. The normaliser is the global
                number of valid rows.

        Raises ValueError, on all ranks alike, for arguments that do not fit each other or those of other ranks.
        """
        problem = (
            find_problem(representations, valid)
            or scale_problem(logit_scale)
            or self._problem(number=len(representations))
        )
        if not problem:
            others = [tensor for m, tensor in enumerate(representations) if m != self.anchor]
            representations = [representations[self.anchor], *others]
        batch = GlobalBatch(
            representations,
            valid,
            self.group,
            description=f"{self.name}, anchor={self.anchor}, label_smoothing={self.label_smoothing}",
            problem=problem,
        )
        scale = as_scale(logit_scale, batch.own)
        own, others = unit_rows(batch.own), [unit_rows(other) for other in batch.others]
        tuples = self.similarity.of_tuples(others)
        positive = -scale.double() * _of_rows(self.similarity, [own, *(other[batch.rows] for other in others)])
        of_own, share, sums = _Logits.apply(self.similarity, batch.valid, batch.offset, scale, own, *tuples)
        of_tuples = SumOverRanks.apply(share[None], batch.rows, batch.group)
        # The threshold from which softplus is the identity: its default of 20 would cost float64 its last digits.
        losses = F.softplus(torch.cat([of_own[None], of_tuples]) - positive, threshold=40)
        if self.label_smoothing:
            # Smoothed targets add positive - mean of the logits, of an anchor's row or of a tuple's column. Summed over
            # the batch, rows and columns come to the same.
            count = batch.size if batch.valid is None else batch.valid.sum().clamp(min=1)
            losses = losses + self.label_smoothing * (positive - sums / count)
        return batch.mean(losses, batch.local_valid).to(scale.dtype)

    def _problem(self, number: int) -> str | None:
        """What is wrong with the options, given the number of modalities, or None."""
        if isinstance(self.anchor, bool) or not isinstance(self.anchor, int) or not 0 <= self.anchor < number:
            return f"anchor = {self.anchor!r:.50} should be the number of a modality, 0 to {number - 1}"
        return None


class GramLoss(_GeometricLoss):
    """Symmetric cross-entropy of `-logit_scale * volume` (GRAM, ICLR 2025, arXiv 2412.11959), of any M >= 2.

    The volume is that of the parallelotope which the unit vectors of anchor i and tuple j span, sqrt(det) of their Gram
    matrix, clamped to 1e-6 (`similarity.SMALLEST_DETERMINANT`).

    Args:
        group: the ranks that form the global batch; None is all of them.
        anchor: number of the modality (GRAM: text) that is contrasted with the tuples of the others.
        label_smoothing: of both cross-entropies; GRAM's code has 0.1.

    Raises ValueError for a label_smoothing outside [0, 1).
    """

    name = "GRAM"
    similarity = VolumeSimilarity()


class TriangleLoss(_GeometricLoss):
    """Symmetric cross-entropy of `-logit_scale * area` (TRIANGLE, NeurIPS 2025), of exactly three modalities.

    The area measure (`AreaSimilarity`) is that of the triangle whose corners are the unit vectors of anchor i and tuple
    j. Args and errors as in `GramLoss`.
    """

    name = "TRIANGLE"
    similarity = AreaSimilarity()

    def _problem(self, number: int) -> str | None:
        if number != 3:
            return f"TRIANGLE is for three modalities, got {number}; GRAM takes any number"
        return super()._problem(number)


class _Logits(torch.autograd.Function):
    """Log-sum-exps of the negatives in this rank's rows of the logits, a tile of some rows at a time.

    (n, D) own and what `GeometricSimilarity.of_tuples` gave -> all float64: (n,) of own anchors; (N,) this rank's share
    of the tuples'; (n,) the sums of own anchors' logits, the positive's included.
    """

    @staticmethod
    def forward(
        ctx: Any,
        similarity: GeometricSimilarity,
        valid: Tensor | None,
        offset: int,
        scale: Tensor,
        own: Tensor,
        *tuples: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_own = own.new_empty((len(own),), dtype=torch.float64)
        of_tuples = own.new_full((len(tuples[0]),), -torch.inf, dtype=torch.float64)
        sums = torch.empty_like(of_own)
        flags = _flags(valid, tuples[0])
        with torch.autocast(own.device.type, enabled=False):  # of a determinant bfloat16 leaves nothing
            for rows in _tiles(own, tuples[0]):
                logits = similarity.between(own[rows], list(tuples)) * -scale
                sums[rows] = torch.mv(logits, flags).double()
                _hide(logits, valid, offset + rows.start)
                of_own[rows] = log_sum_exp(logits, dim=1)
                of_tuples = torch.logaddexp(of_tuples, log_sum_exp(logits, dim=0))
        ctx.similarity, ctx.valid, ctx.offset = similarity, valid, offset
        ctx.save_for_backward(scale, own, of_own, of_tuples, *tuples)
        return of_own, of_tuples, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        scale, own, of_own, of_tuples, *tuples = ctx.saved_tensors
        weight_own, of_own = rounded(Weight(incoming[0], of_own), own.dtype)
        weight_tuples, of_tuples = rounded(Weight(incoming[1], of_tuples), own.dtype)
        weight_sums, flags = incoming[2].to(own.dtype), _flags(ctx.valid, tuples[0])
        grad_scale = scale.new_zeros((), dtype=torch.float64)
        grad_own, grad_tuples = torch.empty_like(own), [torch.zeros_like(tensor) for tensor in tuples]
        with torch.autocast(own.device.type, enabled=False):
            for rows in _tiles(own, tuples[0]):
                leaves = [tensor.detach().requires_grad_() for tensor in (own[rows], *tuples)]
                with torch.enable_grad():
                    distances = ctx.similarity.between(leaves[0], leaves[1:])
                logits = distances.detach() * -scale
                _hide(logits, ctx.valid, ctx.offset + rows.start)
                gradient = (logits - of_own[rows, None]).exp_().mul_(weight_own[rows, None])
                gradient += logits.sub_(of_tuples).exp_().mul_(weight_tuples)
                gradient += torch.outer(weight_sums[rows], flags)
                grad_scale -= (gradient * distances.detach()).sum(dtype=torch.float64)
                grad_own[rows], *found = torch.autograd.grad(distances, leaves, gradient.mul_(-scale))
                for grad, of_tile in zip(grad_tuples, found, strict=True):
                    grad += of_tile
        return None, None, None, grad_scale.to(scale.dtype), grad_own, *grad_tuples


def _tiles(own: Tensor, others: Tensor) -> Iterator[slice]:
    """Rows of `own`, so many at a time as make a tile of logits."""
    height = max(1, LOGITS.get(own.device.type, LOGITS["cuda"]) // len(others))
    for first in range(0, len(own), height):
        yield slice(first, min(len(own), first + height))


def _flags(valid: Tensor | None, like: Tensor) -> Tensor:
    """(N,): one where a row is valid, else zero."""
    return torch.ones_like(like[:, 0]) if valid is None else valid.to(like.dtype)


def _hide(logits: Tensor, valid: Tensor | None, first: int) -> None:
    """Sets positives, and logits of invalid rows, to -inf; the logits' first row is the batch's row `first`."""
    logits.diagonal(first).fill_(-torch.inf)
    if valid is not None:
        logits.masked_fill_(~valid, -torch.inf)
        logits.masked_fill_(~valid[first : first + len(logits), None], -torch.inf)


def _of_rows(similarity: GeometricSimilarity, vectors: list[Tensor]) -> Tensor:
    """M tensors (n, D) -> (n,) in float64, without (n, D) tensors in float64, in the backward pass neither."""

    def of_block(*blocks: Tensor) -> Tensor:
        return similarity.of_rows([block.double() for block in blocks])

    blocks = zip(*(tensor.split(POSITIVE_ROWS) for tensor in vectors), strict=True)
    return torch.cat([checkpoint(of_block, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks])


class _GeometricObjective(nn.Module):
    """What the two objectives share."""

    def __init__(self, loss: type[_GeometricLoss], modalities: list[str], anchor: str | None, smoothing: float) -> None:
        super().__init__()
        if anchor is not None and anchor not in modalities:
            raise ValueError(f"anchor = '{anchor}' is none of the modalities{suggestion(str(anchor), modalities)}")
        number = 0 if anchor is None else modalities.index(anchor)
        self.loss = loss(anchor=number, label_smoothing=smoothing)
        self.similarity = self.loss.similarity

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        representations = list(outputs.representations.values())
        loss = self.loss(representations, outputs.logit_scale, valid=batch.valid)
        return StepReport(loss, contrastive_health(representations, batch.valid))


class GramObjective(_GeometricObjective):
    """`GramLoss` as the trainer calls it. GRAM's logit scale starts at 1 / 0.07: `logit_scale_init: 2.66`.

    Args:
        modalities: their names, in order.
        anchor: name of the modality that is contrasted with the tuples of the others; None is the first.
        label_smoothing: as in `GramLoss`.

    Raises ValueError for an anchor that is no modality.
    """

    def __init__(self, modalities: list[str], anchor: str | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__(GramLoss, modalities, anchor, label_smoothing)


class TriangleObjective(_GeometricObjective):
    """`TriangleLoss` as the trainer calls it. TRIANGLE's logit scale is 1 / 0.07: `logit_scale_init: 2.66`.

    Args as in `GramObjective`. Raises ValueError for an anchor that is no modality, and unless there are three.
    """

    def __init__(self, modalities: list[str], anchor: str | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__(TriangleLoss, modalities, anchor, label_smoothing)
        if problem := self.loss._problem(len(modalities)):
            raise ValueError(problem)
