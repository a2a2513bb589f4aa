"""Sums of exponentials over tiles of logits, and their gradients: what every anchor's negatives come to.

Two ways. Where no logit is so large that its exponential overflows (`is_bounded`), sums are plain: one exponential per
logit serves all anchors. Else each anchor keeps a log-sum-exp of its own, and every logit is exponentiated once per
anchor. Both are exact; they differ in cost.

What is one number per sample is kept in float64, which costs nothing here: an fp32 log-sum-exp of 30 is already off by
1e-6, and with it every probability.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from symile_dist.objectives.cube import Tile


class Weight(NamedTuple):
    """What a backward pass needs of one modality's log-sum-exps: float64, one value per row."""

    gradient: Tensor
    """Of the loss with respect to the log-sum-exp."""
    log_sum_exp: Tensor


def largest_logit(representations: list[Tensor], scale: Tensor) -> Tensor:
    """A bound on |logit| over all combinations of rows: Hoelder's inequality with the exponents M.

        |sum_d prod_m r_m[d]| <= prod_m |r_m|_M

    It costs O(N D), and is far tighter than the product of Euclidean norms for three or more modalities.
    """
    bound = scale.abs().double()
    for tensor in representations:
        wide = tensor if tensor.dtype.itemsize >= 4 else tensor.float()
        bound = bound * torch.linalg.vector_norm(wide, ord=len(representations), dim=1).amax()
    return bound


def is_bounded(bound: Tensor, negatives: int, dtype: torch.dtype) -> Tensor:
    """Whether sums of `negatives` exponentials of numbers up to +-bound, and their inverses, stay in range.

    With 8 e-foldings to spare, for a gradient that is that small is still to be exact. NaN gives False.
    """
    largest = math.log(torch.finfo(torch.promote_types(dtype, torch.float32)).max) - 8
    return bound + math.log(max(1, negatives)) <= largest


class PlainSums:
    """Sums of exponentials, for bounded logits."""

    def __init__(self, valid: Tensor | None, own: Tensor, middle: list[Tensor], last: Tensor) -> None:
        """`middle` may have rows beyond N, which repeat the first ones."""
        self.own = own.new_zeros(len(own), dtype=torch.float64)
        self.middle = [tensor.new_zeros(len(tensor), dtype=torch.float64) for tensor in middle]
        self.last = own.new_zeros(len(last), dtype=torch.float64)
        self.flags = None
        if valid is not None:
            self.flags = torch.cat([valid, valid]).to(torch.promote_types(own.dtype, torch.float32))

    def add(self, tile: Tile, logits: Tensor) -> None:
        """Adds a tile's; `logits` is used as working space."""
        exponentials = logits.exp_()
        for positives in tile.positives(exponentials):
            positives.zero_()
        if self.flags is None:
            counts = None
            of_rows = exponentials.sum(dim=1).double()
            of_columns = exponentials.sum(dim=0)
        else:
            counts = self.flags[tile.first_row : tile.first_row + tile.height].repeat(len(tile.planes))
            for at, partners in tile.parts():
                for met in partners:
                    counts[at] *= self.flags[met]
            of_rows = torch.mv(exponentials, self.flags[: len(self.last)]).double() * counts
            of_columns = torch.mv(exponentials.T, counts)
        self.last += of_columns.double() * tile.weight
        of_rows *= tile.weight
        for at, partners in tile.parts():
            self.own[tile.rows] += of_rows[at]
            for sums, met in zip(self.middle, partners, strict=True):
                sums[met] += of_rows[at].sum() if tile.slabs else of_rows[at]

    def result(self) -> tuple[Tensor, Tensor]:
        """(n,) of own rows, (M - 1, N) of the other modalities; -inf where there is nothing to sum."""
        size = len(self.last)
        for sums in self.middle:
            sums[: len(sums) - size] += sums[size:]
        return self.own.log(), torch.stack([*(sums[:size] for sums in self.middle), self.last]).log()


class OnlineSums:
    """The same for logits of any size: log-sum-exps, each with a maximum of its own."""

    def __init__(self, valid: Tensor | None, own: Tensor, middle: list[Tensor], last: Tensor) -> None:
        self.valid = valid
        self.own, *self.middle, self.last = (
            tensor.new_full((len(tensor),), -torch.inf, dtype=torch.float64) for tensor in (own, *middle, last)
        )

    def add(self, tile: Tile, logits: Tensor) -> None:
        """Adds a tile's; `logits` is used as working space."""
        hide(tile, logits, self.valid)
        of_rows = log_sum_exp(logits, dim=1) + math.log(tile.weight)
        for at, partners in tile.parts():
            self.own[tile.rows] = torch.logaddexp(self.own[tile.rows], of_rows[at])
            for sums, met in zip(self.middle, partners, strict=True):
                sums[met] = torch.logaddexp(sums[met], of_rows[at].logsumexp(0) if tile.slabs else of_rows[at])
        self.last = torch.logaddexp(self.last, log_sum_exp(logits, dim=0) + math.log(tile.weight))

    def result(self) -> tuple[Tensor, Tensor]:
        """As `PlainSums.result`."""
        size = len(self.last)
        for sums in self.middle:
            again = len(sums) - size
            sums[:again] = torch.logaddexp(sums[:again], sums[size:])
        return self.own, torch.stack([*(sums[:size] for sums in self.middle), self.last])


def hide(tile: Tile, logits: Tensor, valid: Tensor | None) -> None:
    """Sets the tile's positives, and logits of invalid rows, to -inf."""
    for positives in tile.positives(logits):
        positives.fill_(-torch.inf)
    if valid is None:
        return
    logits.masked_fill_(~valid, -torch.inf)
    rows = valid[tile.first_row : tile.first_row + tile.height].repeat(len(tile.planes))
    twice = torch.cat([valid, valid])
    for at, partners in tile.parts():
        for met in partners:
            rows[at] &= twice[met]
    logits.masked_fill_(~rows[:, None], -torch.inf)


def log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """The log-sum-exp in float64 of logits in less; -inf where all are."""
    maximum = logits.amax(dim=dim, keepdim=True)
    maximum = torch.where(maximum == -torch.inf, 0.0, maximum)
    return (logits - maximum).exp_().sum(dim=dim).double().log() + maximum.squeeze(dim)


def _largest(weights: list[Weight]) -> Tensor:
    """The largest gradient, by which all are divided before they become fp32; 1 if they are all zero."""
    largest = torch.stack([weight.gradient.abs().amax() for weight in weights]).amax()
    return torch.where(largest == 0, 1.0, largest)


class PlainGradient:
    """exp(L) (u_own + sum of u_middle + u_last), the loss's gradient with respect to bounded logits.

    Where u is an anchor's gradient over its sum of exponentials.
    """

    def __init__(self, valid: Tensor | None, own: Tensor, weights: list[Weight]) -> None:
        """`valid` is not needed: an invalid row is a zero vector, which hands nothing on, and gets zero afterwards."""
        largest = _largest(weights)
        self.factor = largest.to(torch.promote_types(own.dtype, torch.float32))
        """What the result is to be multiplied with."""
        per_sum = []
        for gradient, of in weights:
            inverse = torch.where(of == -torch.inf, 0.0, (-of).exp())
            per_sum.append((gradient / largest * inverse).to(self.factor.dtype))
        self.own, *middle, self.last = per_sum
        self.middle = [torch.cat([u, u]) for u in middle]
        self.sums: Tensor | None = None  # working space

    def __call__(self, tile: Tile, logits: Tensor) -> Tensor:
        """The gradient, divided by `factor`, in place of the logits."""
        rows = (self.own[tile.rows] * tile.weight).repeat(len(tile.planes))
        for at, partners in tile.parts():
            for u, met in zip(self.middle, partners, strict=True):
                rows[at].add_(u[met], alpha=tile.weight)
        last = self.last if tile.weight == 1 else self.last * tile.weight
        if self.sums is None or len(self.sums) < len(logits):
            self.sums = torch.empty_like(logits)
        gradient = logits.exp_().mul_(torch.add(rows[:, None], last, out=self.sums[: len(logits)]))
        for positives in tile.positives(gradient):
            positives.zero_()
        return gradient


class OnlineGradient:
    """sum over anchors of g exp(L - log-sum-exp), for logits of any size."""

    def __init__(self, valid: Tensor | None, own: Tensor, weights: list[Weight]) -> None:
        self.valid = valid
        largest = _largest(weights)
        self.factor = largest.to(torch.promote_types(own.dtype, torch.float32))
        """What the result is to be multiplied with."""
        self.own, *middle, self.last = (
            rounded(Weight(weight.gradient / largest, weight.log_sum_exp), self.factor.dtype) for weight in weights
        )
        self.middle = [Weight(torch.cat([g, g]), torch.cat([of, of])) for g, of in middle]

    def __call__(self, tile: Tile, logits: Tensor) -> Tensor:
        """The gradient, divided by `factor`."""
        hide(tile, logits, self.valid)
        gradient = (logits - self.last.log_sum_exp).exp_().mul_(self.last.gradient)
        for at, partners in tile.parts():
            for (g, of), rows in zip((self.own, *self.middle), (tile.rows, *partners), strict=True):
                gradient[at].addcmul_((logits[at] - of[rows, None]).exp_(), g[rows, None])
        return gradient.mul_(tile.weight)


def rounded(weight: Weight, kind: torch.dtype) -> Weight:
    """The weight in less than float64: what rounding takes from the log-sum-exp goes into the gradient.

    Where there is nothing to sum the log-sum-exp becomes +inf, for exp(L - inf) = 0.
    """
    of = weight.log_sum_exp
    nothing = of == -torch.inf
    nearest = torch.where(nothing, torch.inf, of.to(kind))
    lost = torch.where(nothing, 0.0, nearest.double() - of)
    return Weight((weight.gradient * lost.exp()).to(kind), nearest)
