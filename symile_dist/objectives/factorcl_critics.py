"""The critic of FactorCL (arXiv 2306.05268) on all pairs of a batch, with its two estimates of mutual information.

f([x; y]) is a network of two hidden ReLU layers, wanted for every row x_i and every column y_j:

    NCE      = E[f(x, y) - log mean_j exp f(x, y_j)]     a lower bound of I(X; Y), at most log N
    NCE-CLUB = E_joint f - E_marginals f                 an upper bound where f is optimal under NCE

The time goes into N^2 pairs times a (hidden x hidden) matrix. Three things keep it small, and are exact:

- The first layer is split over its two inputs, W [x; y] = W_x x + W_y y: there, a pair costs one addition.
- Both bounds are sums over rows whose weights are known beforehand. So their gradients are taken while a tile of pairs
  is at hand, and the backward pass only scales them: no pair is kept in memory or computed again.
- With respect to what goes into a pair's hidden layer, the gradients of both bounds are one vector times two numbers: a
  critic of which both are wanted needs one pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAIRS = {"cpu": 2**12, "cuda": 2**18}
"""Pairs at once, at most."""


class Pairs(NamedTuple):
    """Which columns a row is contrasted with, for n rows and K columns."""

    positive: Tensor
    """(n,) int64: the column that belongs to a row."""
    weights: Tensor
    """(n,): of a row's term in the sum over rows; zero where the row does not count."""
    copies: Tensor
    """(n, K) or (1, K): how many samples a column stands for, of those that the row is contrasted with (itself among
    them); zero where the column does not count."""

    @classmethod
    def all_of(cls, size: int, like: Tensor) -> Pairs:
        """Row i with column i of a whole batch of `size` samples."""
        positive = torch.arange(size, device=like.device)
        return cls(positive, like.new_full((size,), 1 / size), like.new_ones((1, size)))

    def rows(self, rows: slice) -> Pairs:
        copies = self.copies if len(self.copies) == 1 else self.copies[rows]
        return Pairs(self.positive[rows], self.weights[rows], copies)


class PairCritic(nn.Module):
    """f([x; y]) -> a score. Without a bias at the end: both bounds are differences of scores.

    All parameters are its own, not those of submodules: ZeRO-3 gathers those of the module that is called.
    """

    def __init__(self, x_dim: int, y_dim: int, hidden: int = 512) -> None:
        super().__init__()
        self.weight_x = nn.Parameter(torch.empty(hidden, x_dim))
        self.weight_y = nn.Parameter(torch.empty(hidden, y_dim))
        self.bias = nn.Parameter(torch.empty(hidden))
        self.hidden_weight = nn.Parameter(torch.empty(hidden, hidden))
        self.hidden_bias = nn.Parameter(torch.empty(hidden))
        self.out_weight = nn.Parameter(torch.empty(hidden))
        first = [self.weight_x, self.weight_y, self.bias]
        for parameter in self.parameters():  # as three layers of nn.Linear would be
            bound = 1 / math.sqrt(x_dim + y_dim if any(parameter is one for one in first) else hidden)
            nn.init.uniform_(parameter, -bound, bound)

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, Dx), (K, Dy) -> (n, K) as the definition has it, with all pairs in memory; `forward` is tested by it."""
        pairs = torch.cat([x[:, None].expand(-1, len(y), -1), y[None].expand(len(x), -1, -1)], dim=-1)
        first = F.linear(pairs, torch.cat([self.weight_x, self.weight_y], dim=1), self.bias).relu()
        return F.linear(first, self.hidden_weight, self.hidden_bias).relu() @ self.out_weight

    def forward(self, x: Tensor, y: Tensor, pairs: Pairs) -> Tensor:
        """Minus NCE: (n, Dx), (K, Dy) -> a scalar, float64.

        sum_i weight_i (log sum_j copies_ij exp f(x_i, y_j) - log sum_j copies_ij - f(x_i, y_positive(i)))
        """
        inputs, hidden = self._first_layer(x, y), self._hidden_layer(x)
        found = _sweep(*inputs, hidden, pairs, club=False, gradients=torch.is_grad_enabled())
        return _Known.apply(found.nce, [*found.of_inputs[0], *found.of_hidden], *inputs, *hidden)

    def upper_bound(self, x: Tensor, y: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """NCE-CLUB, whose gradient reaches x and y alone, and minus NCE, whose gradient reaches the critic alone.

        Scalars, float64; the second as in `forward`, the first
        sum_i weight_i (f(x_i, y_positive(i)) - sum_j copies_ij f(x_i, y_j) / sum_j copies_ij)
        """
        hidden, inputs = self._hidden_layer(x), self._first_layer(x, y, frozen=True)
        found = _sweep(*inputs, hidden, pairs, club=True, gradients=torch.is_grad_enabled())
        club = _Known.apply(found.club, [*found.of_inputs[1]], *inputs)
        inputs = self._first_layer(x.detach(), y.detach())
        return club, _Known.apply(found.nce, [*found.of_inputs[0], *found.of_hidden], *inputs, *hidden)

    def _first_layer(self, x: Tensor, y: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """(n, Dx), (K, Dy) -> (n, H), (K, H), float32 or more: the first layer of a pair is the ReLU of their sum."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight_x, weight_y, bias = (
            (parameter.detach() if frozen else parameter).to(dtype)
            for parameter in (self.weight_x, self.weight_y, self.bias)
        )
        return F.linear(x.to(dtype), weight_x, bias), F.linear(y.to(dtype), weight_y)

    def _hidden_layer(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return self.hidden_weight.to(dtype), self.hidden_bias.to(dtype), self.out_weight.to(dtype)


class _Swept(NamedTuple):
    """What one pass over all pairs gives; the gradients are empty where none were asked for."""

    nce: Tensor
    club: Tensor
    of_inputs: list[tuple[Tensor, Tensor]]
    """Gradients of NCE and of NCE-CLUB with respect to what comes from x and from y."""
    of_hidden: tuple[Tensor, ...]
    """Gradients of NCE with respect to the hidden layer's weight and bias, and the last layer's weight."""


class _Known(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * incoming[0].to(gradient.dtype) for gradient in ctx.gradients)


@torch.no_grad()
def _sweep(
    a: Tensor, b: Tensor, hidden: tuple[Tensor, Tensor, Tensor], pairs: Pairs, *, club: bool, gradients: bool
) -> _Swept:
    """One pass over all pairs: (n, H), (K, H) -> values and gradients."""
    weight, bias, out = hidden
    losses = [_nce_rows, _club_rows] if club else [_nce_rows]
    values = a.new_zeros((2,), dtype=torch.float64)
    of_inputs = [(torch.zeros_like(a), torch.zeros_like(b)) for _ in losses] if gradients else [(a, b)] * 2
    of_hidden = tuple(torch.zeros_like(tensor) for tensor in hidden)
    with torch.autocast(a.device.type, enabled=False):
        for rows, columns in _tiles(len(a), len(b), a.device.type):
            tile = None
            scores = a.new_empty((rows.stop - rows.start, len(b)))
            for part in columns:
                tile = _hidden_layers(a[rows], b[part], weight, bias)
                scores[:, part] = (tile[1] @ out).view(-1, part.stop - part.start)
            found = [loss(scores, pairs.rows(rows)) for loss in losses]
            for number, (value, _) in enumerate(found):
                values[number] += value
            if not gradients:
                continue
            of_scores = torch.stack([gradient for _, gradient in found])  # (L, R, K)
            for part in columns:
                if len(columns) > 1:
                    tile = _hidden_layers(a[rows], b[part], weight, bias)
                assert tile is not None
                _add_gradients(of_scores[..., part], tile, hidden, of_inputs, of_hidden, rows, part)
    return _Swept(values[0], values[1], of_inputs, of_hidden)


def _tiles(n: int, k: int, device: str) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of rows, each with all columns: in one part, or in several where a row alone is more than a tile."""
    at_once = PAIRS.get(device, PAIRS["cuda"])
    width, height = min(k, at_once), max(1, at_once // k)
    columns = [slice(first, min(k, first + width)) for first in range(0, k, width)]
    for first in range(0, n, height):
        yield slice(first, min(n, first + height)), columns


def _hidden_layers(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(R, H), (C, H) -> both hidden layers of all pairs, (R * C, H)."""
    first = (a[:, None] + b).relu_().flatten(0, 1)
    return first, _product(first, weight.T).add_(bias).relu_()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, of bfloat16 where torch.set_float32_matmul_precision("medium") allows it and the CPU multiplies it.

    torch alone does so on CPUs with AMX only, though AVX-512's products of bfloat16, too, are faster than float32's.
    """
    medium = left.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    if medium and left.device.type == "cpu" and _multiplies_bfloat16():
        return (left.bfloat16() @ right.bfloat16()).float()
    return left @ right


@functools.cache
def _multiplies_bfloat16() -> bool:
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def _add_gradients(
    of_scores: Tensor,
    tile: tuple[Tensor, Tensor],
    hidden: tuple[Tensor, Tensor, Tensor],
    of_inputs: list[tuple[Tensor, Tensor]],
    of_hidden: tuple[Tensor, ...],
    rows: slice,
    columns: slice,
) -> None:
    """Back-propagates (L, R, C), the gradients of L losses by their scores, through one tile, which is used up."""
    (first, second), (weight, _, out), (of_weight, of_bias, of_out) = tile, hidden, of_hidden
    nce = of_scores[0].reshape(-1, 1)
    of_out += (second.T @ nce)[:, 0]
    # The sign is the ReLU's slope; torch.where would take ten times as long on a CPU.
    slope = second.sign_().mul_(out)  # of a score, with respect to what goes into the second ReLU
    through = _product(slope, weight).mul_(first.sign()).view(*of_scores.shape[1:], -1)
    for (of_a, of_b), gradient in zip(of_inputs, of_scores, strict=True):
        of_a[rows] += torch.einsum("rc,rch->rh", gradient, through)
        of_b[columns] += torch.einsum("rc,rch->ch", gradient, through)
    slope *= nce
    of_bias += slope.sum(dim=0)
    of_weight += _product(slope.T, first)


def _nce_rows(scores: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(R, K) -> minus NCE, summed over rows with their weights in float64, and its gradient (R, K).

    As log(1 + exp(z - p)), where the log-sum-exp z leaves a sample's own pair p out: where p is far above z, float32
    would lose the difference in exp(p) / (exp(p) + exp(z)).
    """
    positive, weights, copies = pairs.positive[:, None], pairs.weights, pairs.copies.expand_as(scores)
    others = copies.scatter_add(1, positive, -torch.ones_like(scores[:, :1])).clamp_(min=0)
    others = scores + others.log()
    total = others.logsumexp(dim=1)
    total = torch.where(total == -torch.inf, torch.finfo(total.dtype).min / 2, total)
    difference = total - scores.gather(1, positive)[:, 0]
    losses = F.softplus(difference.double(), threshold=40) - copies.sum(dim=1, dtype=torch.float64).clamp(min=1).log()
    share = difference.sigmoid() * weights
    gradient = (others - total[:, None]).exp_().mul_(share[:, None]).scatter_add_(1, positive, -share[:, None])
    return _weighted_sum(losses, weights), gradient


def _club_rows(scores: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(R, K) -> NCE-CLUB, summed over rows with their weights in float64, and its gradient (R, K)."""
    positive, weights = pairs.positive[:, None], pairs.weights
    fractions = pairs.copies / pairs.copies.sum(dim=1, keepdim=True).clamp(min=1)
    marginal = (scores * fractions).sum(dim=1, dtype=torch.float64)
    losses = scores.gather(1, positive)[:, 0].double() - marginal
    gradient = (fractions * -weights[:, None]).scatter_add_(1, positive, weights[:, None])
    return _weighted_sum(losses, weights), gradient


def _weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * torch.where(weights > 0, weights, 0.0)).sum()
