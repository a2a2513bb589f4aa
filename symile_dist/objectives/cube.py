"""The cube of logits by planes: every anchor's negatives from one pass, and no more than a tile of them in memory.

For three modalities a, b, c of N samples each, the logits of all combinations are one cube

    L[i, j, k] = logit_scale * sum_d a[i, d] b[j, d] c[k, d],

and the three anchors' logits are its slices: the sums of exp(L) over (j, k), (i, k) and (i, j) give the negatives of
anchors a, b and c; the positives (i, i, i) are left out. The cube is cut into planes over (i, k), each one matrix
product (a * rows of b) @ c.T, whose row sums serve a and b and whose column sums serve c:

    slab j    holds the combinations with that j; all slabs are the cube
    sheet t   holds those with j = i + t (mod N); all sheets are the cube, and some of them, weighted, estimate the
              sums of all, for every combination of two rows is in exactly one (`draw_sheets`)

Two modalities are one plane; M modalities have N^(M - 2), for the M - 2 middle ones. docs/objective.md derives it all.

A rank owns n rows of the first modality, hence n rows of every plane; what it returns for the other modalities is its
share of their sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from symile_dist.objectives.exponentials import OnlineGradient, OnlineSums, PlainGradient, PlainSums, Weight
from symile_dist.seeding import permutation
from symile_dist.similarity import elementwise_product

TILE_ROWS = {"cpu": 1024, "cuda": 8192}
"""Rows of a tile: enough for a matrix product at full speed, and few enough for a tile to stay in a CPU's cache."""
TILE_LOGITS = {"cpu": 2**20, "cuda": 2**24}
"""Logits of a tile at most (rows times N)."""
MAX_NEGATIVES = 2**33
"""Negatives per anchor beyond which the full cube is refused: the work is 8 D times N times this."""


class Tile(NamedTuple):
    """Some rows of some planes."""

    rows: slice
    """Of this rank's rows: those of every plane in the tile."""
    first_row: int
    """The number of the first of them in the global batch."""
    planes: list[tuple[int, ...]]
    """One per plane: the row of each middle modality that the first of `rows` meets."""
    slabs: bool
    """Whether the other rows meet the same ones (slabs), or the next ones (sheets)."""
    weight: float = 1.0
    """How often each combination counts."""

    @property
    def height(self) -> int:
        return self.rows.stop - self.rows.start

    def parts(self) -> Iterator[tuple[slice, list[slice]]]:
        """For each plane: its rows in the tile, and the rows of each middle modality that they meet, or the one row."""
        met = 1 if self.slabs else self.height
        for number, starts in enumerate(self.planes):
            at = slice(number * self.height, (number + 1) * self.height)
            yield at, [slice(start, start + met) for start in starts]

    def positives(self, logits: Tensor) -> Iterator[Tensor]:
        """Views of the positives among the tile's logits."""
        for number, starts in enumerate(self.planes):
            plane = logits[number * self.height : (number + 1) * self.height]
            if len(set(starts)) > 1:
                continue
            if not self.slabs and (not starts or starts[0] == self.first_row):
                yield plane.diagonal(self.first_row)
            elif self.slabs and 0 <= starts[0] - self.first_row < self.height:
                yield plane[starts[0] - self.first_row, starts[0]]


def sheets_problem(number: int, size: int, num_modalities: int) -> str | None:
    """Why `number` sheets cannot be drawn, or None."""
    total = size ** (num_modalities - 2)
    if not 2 <= number <= total:
        hint = f"choose 2 to {total}" if total >= 2 else "use negative_sampling='n_squared'"
        return f"sheets = {number}, but a global batch of {size} with {num_modalities} modalities has {total}: {hint}"
    if total > MAX_NEGATIVES:
        return (
            f"a global batch of {size} with {num_modalities} modalities has {total:.1e} sheets, too many to draw from; "
            "use negative_sampling='n'"
        )
    return None


def draw_sheets(number: int, size: int, num_modalities: int, seed: int, step: int) -> tuple[list[int], float]:
    """`number` of the cube's N^(M - 2) sheets, and the weight of each but the first.

    Sheet 0, which holds the positives and the negatives nearest to them (those that differ in the last modality only),
    is always among them. The others are drawn without replacement from (seed, step) alone. With the weight
    (N^(M - 2) - 1) / (number - 1) every anchor's sum of exponentials is unbiased (its logarithm and the gradient are
    not); all sheets together are the exact cube.

    There have to be so many (`sheets_problem`).
    """
    total = size ** (num_modalities - 2)
    drawn = sample_without_replacement(total - 1, number - 1, seed, step)
    return [0, *(1 + sheet for sheet in drawn)], (total - 1) / (number - 1)


def sample_without_replacement(population: int, number: int, seed: int, step: int) -> list[int]:
    """`number` of range(population), a pure function of its arguments."""
    if population <= 2**20:
        return permutation(population, "sheets", seed, step)[:number].tolist()
    # Too many to shuffle: digits of two permutations of a square that holds the population, the rest passed over.
    side = int(population**0.5) + 1
    found: dict[int, None] = {}
    draw = 0
    while len(found) < number:
        high, low = (permutation(side, "sheets", seed, step, draw, digit) for digit in ("high", "low"))
        draw += 1
        found.update((pair, None) for pair in (high * side + low).tolist() if pair < population)
    return list(found)[:number]


class Workspace:
    """Matrices that are used anew for every tile: to a CPU, fresh memory costs as much as what is written there."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.matrices: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int) -> Tensor:
        """(rows, columns), not initialised; what the name held before is lost."""
        if name not in self.matrices or len(self.matrices[name]) < rows:
            self.matrices[name] = self.like.new_empty((rows, columns))
        return self.matrices[name][:rows]

    def matmul(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """The matrix product, in a matrix of this name."""
        if left.dtype.itemsize < 4:
            return matmul(left, right)
        return torch.mm(left, right, out=self.get(name, left.shape[0], right.shape[1]))


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product, of halves too in float32."""
    if left.dtype.itemsize < 4:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


def tile_products(tile: Tile, own: Tensor, middle: list[Tensor], workspace: Workspace) -> Tensor:
    """The left factor of the tile's logits: own rows times the middle modalities' rows that they meet."""
    rows = own[tile.rows]
    if not middle:
        return rows
    products = workspace.get("products", tile.height * len(tile.planes), rows.shape[1])
    for at, partners in tile.parts():
        torch.mul(rows, _met(middle, partners), out=products[at])
    return products


def _met(tensors: list[Tensor], rows: list[slice]) -> Tensor:
    """The product of the given rows of the given tensors."""
    return elementwise_product([tensor[met] for tensor, met in zip(tensors, rows, strict=True)])


@dataclass
class Cube:
    """The negatives of every anchor, by planes of the cube.

    `own` is this rank's (n, D) rows of the first modality, `others` are the M - 1 other modalities (N, D); invalid
    rows are zero vectors. float32 and float64, on CUDA also bfloat16, whose products are summed in float32.
    """

    offset: int
    """Number of this rank's first row in the global batch."""
    valid: Tensor | None
    """(N,) bool: which rows are negatives; None: all."""
    bounded: Tensor
    """Scalar bool: float32 holds the exponential of every logit, and their sums (`exponentials.is_bounded`)."""
    drawn: list[int] | None = None
    """Numbers of the sheets to sum over, 0 being the first; None: the whole cube, by slabs."""
    weight: float = 1.0
    """Of every sheet but the first."""

    def tiles(self, own: Tensor, others: list[Tensor]) -> Iterator[Tile]:
        """This rank's rows of all planes."""
        n, size, middle = own.shape[0], others[0].shape[0], len(others) - 1
        most_rows, most_logits = (limit.get(own.device.type, limit["cuda"]) for limit in (TILE_ROWS, TILE_LOGITS))
        height = max(1, min(n, most_rows, most_logits // size))
        together = max(1, min(most_rows, most_logits // size) // height)
        planes: range | list[int] = range(size**middle) if self.drawn is None else self.drawn
        slabs = self.drawn is None and middle > 0
        # Sheet 0 goes alone where the others weigh more.
        starts = [0, *range(1, len(planes), together)] if self.weight != 1 else [*range(0, len(planes), together)]
        for start, stop in zip(starts, [*starts[1:], len(planes)], strict=True):
            digits = [tuple(plane // size**m % size for m in range(middle)) for plane in planes[start:stop]]
            for first in range(0, n, height):
                row = self.offset + first
                met = digits if slabs else [tuple((row + shift) % size for shift in shifts) for shifts in digits]
                rows = slice(first, min(n, first + height))
                yield Tile(rows, row, met, slabs, self.weight if start else 1.0)

    def wrap(self, tensor: Tensor, n: int) -> Tensor:
        """(N, ...) with its first n rows once more at the end, so that the n rows from any one on lie side by side."""
        return tensor if self.drawn is None else torch.cat([tensor, tensor[:n]])

    def log_sum_exp(self, own: Tensor, others: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) log-sum-exps of this rank's anchors, (M - 1, N) of its share of the others'; float64."""
        *middle, last = others
        middle = [self.wrap(tensor, len(own)) for tensor in middle]
        sums = (PlainSums if self.is_plain else OnlineSums)(self.valid, own, middle, last)
        scaled, workspace = _Scaled(last, scale), Workspace(own)
        for tile in self.tiles(own, others):
            sums.add(tile, scaled.logits(tile_products(tile, own, middle, workspace), workspace))
        return sums.result()

    def gradients(
        self, own: Tensor, others: list[Tensor], scale: Tensor, weights: list[Weight]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss's gradients with respect to `own` and `others`, in float32 or more, **divided by the scale**.

        With G the loss's gradient with respect to the logits: for own a, middle b and last c,

            M = G c,    da = sum over planes of b * M,    db = sum over planes of a * M,    dc = G^T (a * b).

        Args:
            weights: one per modality.
        """
        *middle, last = others
        n, size, dimension = len(own), *last.shape
        middle = [self.wrap(tensor, n) for tensor in middle]
        of_logits = (PlainGradient if self.is_plain else OnlineGradient)(self.valid, own, weights)
        scaled, workspace = _Scaled(last, scale), Workspace(own)
        kind = torch.promote_types(own.dtype, torch.float32)
        grad_own = own.new_zeros((n, dimension), dtype=kind)
        grad_middle = [torch.zeros_like(tensor, dtype=kind) for tensor in middle]
        grad_last = own.new_zeros((size, dimension), dtype=kind)
        for tile in self.tiles(own, others):
            products = tile_products(tile, own, middle, workspace)
            gradient = of_logits(tile, scaled.logits(products, workspace)).to(own.dtype)
            if kind == own.dtype:
                grad_last.addmm_(gradient.T, products)
            else:
                grad_last += matmul(gradient.T, products)
            back = workspace.matmul("back", gradient, last)
            for at, partners in tile.parts():
                if not middle:
                    grad_own[tile.rows].add_(back[at])
                    continue
                grad_own[tile.rows].addcmul_(back[at], _met(middle, partners))
                of_middle = back[at].mul_(own[tile.rows])
                if tile.slabs:
                    of_middle = of_middle.sum(dim=0, keepdim=True)
                for m, met in enumerate(partners):
                    rest = middle[:m] + middle[m + 1 :]
                    if rest:
                        grad_middle[m][met].addcmul_(of_middle, _met(rest, partners[:m] + partners[m + 1 :]))
                    else:
                        grad_middle[m][met].add_(of_middle)
        for tensor in grad_middle:
            tensor[: len(tensor) - size] += tensor[size:]
        grad_others = [*(tensor[:size] for tensor in grad_middle), grad_last]
        for tensor in (grad_own, *grad_others):
            tensor *= of_logits.factor
        return grad_own, grad_others

    @cached_property
    def is_plain(self) -> bool:
        """Whether plain sums will do."""
        # On CUDA this waits for the device, once for each cube. What would read nothing, OnlineSums for every input,
        # takes longer than the wait by far; the Triton kernels leave the choice to the device.
        return bool(self.bounded)


class _Scaled:
    """The last modality as the right factor of the logits."""

    def __init__(self, last: Tensor, scale: Tensor) -> None:
        self.scale = scale
        self.in_product = last.dtype.itemsize >= 4  # halves would be rounded once more
        self.right = (last * scale).T.contiguous() if self.in_product else last.T

    def logits(self, products: Tensor, workspace: Workspace) -> Tensor:
        logits = workspace.matmul("logits", products, self.right)
        return logits if self.in_product else logits.mul_(self.scale)
