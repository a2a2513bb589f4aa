"""N negatives per anchor: each anchor with as many combinations of the others as the global batch has samples.

For anchor m, combination j is the product of the other modalities' rows p_{m,k}(j), with one permutation p_{m,k} of the
global batch per anchor and other modality (Symile, arXiv 2411.01053, algorithm 1). Anchor 0 is partitioned over the
ranks by rows, the others by columns: a rank takes the combinations whose factor of modality 0 is one of its rows. So
modality 0 is not gathered, and every rank does 1 / world_size of the work.

About one combination per anchor and batch is by accident the positive of some row, and counts among its negatives
(as in the paper's code). Its gradient is then the positive's with the other sign; as a difference of two float32
numbers it would drown what is left. So it is kept out of the sums as the positive is, and counted (`copies`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from symile_dist.objectives.cube import matmul
from symile_dist.objectives.exponentials import Weight, log_sum_exp, rounded
from symile_dist.similarity import elementwise_product

COLUMNS = 4096
"""Combinations at once."""
LOGITS = {"cpu": 2**21, "cuda": 2**25}
"""Logits at once, at most."""


@dataclass
class Permuted:
    """The negatives of every anchor, by permutations; arguments of its methods as in `contrast.Negatives`."""

    offset: int
    """Number of this rank's first row in the global batch."""
    valid: Tensor | None
    """(N,) bool: which combinations are negatives; the permutations keep the valid among themselves. None: all."""
    permutations: Tensor
    """(M, M, N) int64, of `negatives.draw_permutations`."""

    def copies(self) -> Tensor:
        """(M, N) float64: 1 where an anchor has its positive among its negatives. More than once it cannot be there."""
        size = self.permutations.shape[2]
        rows = torch.arange(size, device=self.permutations.device)
        found = []
        for anchor in range(len(self.permutations)):
            # The only combination with the row of the first of the other modalities.
            columns = torch.argsort(self.permutations[anchor, 1 if anchor == 0 else 0])
            # On its own column the row's positive stands anyway.
            found.append((self._positive_of(anchor, columns) == rows) & (columns != rows))
        return torch.stack(found).double()

    def _positive_of(self, anchor: int, columns: Tensor) -> Tensor:
        """(C,) the row whose positive a combination is, or -1."""
        number = len(self.permutations)
        rows = torch.stack([self.permutations[anchor, m, columns] for m in range(number) if m != anchor])
        same = (rows == rows[0]).all(dim=0)
        if self.valid is not None:
            same = same & self.valid[columns]
        return torch.where(same, rows[0], -1)

    def log_sum_exp(self, own: Tensor, others: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for anchor in range(len(others) + 1):
            rows, first_row = (own, self.offset) if anchor == 0 else (others[anchor - 1], 0)
            sums = rows.new_full((len(rows),), -torch.inf, dtype=torch.float64)
            for columns in self._columns(anchor, len(own), len(others[0])):
                of_positives = self._positive_of(anchor, columns)
                products = elementwise_product([t[r] for t, r in self._factors(anchor, columns, own, others)]) * scale
                for at in self._row_blocks(rows, len(columns)):
                    logits = self._logits(rows[at], products, columns, of_positives, at, first_row)
                    sums[at] = torch.logaddexp(sums[at], log_sum_exp(logits, dim=1))
            found.append(sums)
        return found[0], torch.stack(found[1:])

    def gradients(
        self, own: Tensor, others: list[Tensor], scale: Tensor, weights: list[Weight]
    ) -> tuple[Tensor, list[Tensor]]:
        kind = torch.promote_types(own.dtype, torch.float32)
        grad_own, *grad_others = (torch.zeros_like(tensor, dtype=kind) for tensor in (own, *others))
        for anchor, weight in enumerate(weights):
            rows, first_row = (own, self.offset) if anchor == 0 else (others[anchor - 1], 0)
            grad_rows = grad_own if anchor == 0 else grad_others[anchor - 1]
            factor, of = rounded(weight, kind)
            for columns in self._columns(anchor, len(own), len(others[0])):
                of_positives = self._positive_of(anchor, columns)
                factors = self._factors(anchor, columns, own, others)
                values = [tensor[at] for tensor, at in factors]
                products = elementwise_product(values)
                scaled = products * scale
                grad_products = torch.zeros_like(products, dtype=kind)
                for at in self._row_blocks(rows, len(columns)):
                    logits = self._logits(rows[at], scaled, columns, of_positives, at, first_row)
                    gradient = logits.sub_(of[at, None]).exp_().mul_(factor[at, None]).to(rows.dtype)
                    grad_rows[at] += matmul(gradient, products)
                    grad_products += matmul(gradient.T, rows[at])
                others_of_anchor = [m for m in range(len(weights)) if m != anchor]
                for number, (m, (_, at_rows)) in enumerate(zip(others_of_anchor, factors, strict=True)):
                    rest = values[:number] + values[number + 1 :]
                    into = grad_own if m == 0 else grad_others[m - 1]
                    # No row comes twice in one permutation, so nothing is lost here and nothing depends on an order.
                    into[at_rows] += elementwise_product([grad_products, *rest])
        return grad_own, grad_others

    def _columns(self, anchor: int, n: int, size: int) -> Iterator[Tensor]:
        """The combinations that this rank is to contrast the anchor with, some at a time: their numbers."""
        if anchor == 0:
            mine = torch.arange(size, device=self.permutations.device)
        else:
            mine = torch.argsort(self.permutations[anchor, 0])[self.offset : self.offset + n]
        yield from mine.split(COLUMNS)

    def _factors(self, anchor: int, columns: Tensor, own: Tensor, others: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of each modality but the anchor: the tensor, and which of its rows go into the combinations."""
        tensors = [own, *others]
        found = []
        for m in range(len(tensors)):
            if m != anchor:
                rows = self.permutations[anchor, m, columns]
                found.append((tensors[m], rows - self.offset if m == 0 else rows))
        return found

    def _row_blocks(self, rows: Tensor, columns: int) -> list[slice]:
        limit = LOGITS.get(rows.device.type, LOGITS["cuda"])
        height = max(1, limit // columns)
        return [slice(first, min(len(rows), first + height)) for first in range(0, len(rows), height)]

    def _logits(
        self, rows: Tensor, products: Tensor, columns: Tensor, of_positives: Tensor, at: slice, first_row: int
    ) -> Tensor:
        """(R, D) rows, (C, D) scaled products -> (R, C) logits, -inf for positives, their copies and invalid slots."""
        logits = matmul(rows, products.T)
        numbers = torch.arange(first_row + at.start, first_row + at.stop, device=rows.device)[:, None]
        hidden = (numbers == columns) | (numbers == of_positives)
        if self.valid is not None:
            hidden |= ~self.valid[columns]
        return logits.masked_fill_(hidden, -torch.inf)
