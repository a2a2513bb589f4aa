"""Scores of all candidates for all queries, tile by tile: no (queries x candidates) matrix ever exists.

Of a query only this is kept: how many candidates score above its positive and how many the same, and its best
candidates. Any figure of retrieval follows from these, the bootstrap's too.

Candidates that are equal are scored once: they tie whatever the rounding, and a test set that repeats its images costs
only what its distinct images cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from symile_dist.distributed import all_reduce_sum, host_group, rank, world_size
from symile_dist.similarity import Similarity

TILE = {"cpu": (256, 8192), "cuda": (4096, 16384)}
"""Queries and candidates scored at once, by type of device. It must not depend on the number of ranks: products of
other shapes round otherwise."""
KEPT = 32
"""Best candidates kept per query where there is a bootstrap: a resample lacks all of them with probability e^-32."""


class Distinct(NamedTuple):
    rows: Tensor
    """(U,) int64: the first of each group of equal rows, in order"""
    group: Tensor
    """(K,) int64: to which of them each row is equal"""


def distinct_rows(vectors: Tensor) -> Distinct:
    """Groups the equal rows of (K, D). (By digests of 128 bits; zeros of either sign are not told apart.)"""
    numbers: dict[bytes, int] = {}
    groups: list[int] = []
    firsts: list[int] = []
    for start in range(0, len(vectors), 4096):
        rows = vectors[start : start + 4096].cpu()
        # numpy knows no bfloat16, and adding zero turns -0.0 into 0.0.
        for row in (rows.to(torch.promote_types(rows.dtype, torch.float32)) + 0.0).contiguous().numpy():
            digest = hashlib.blake2b(row.data, digest_size=16).digest()
            number = numbers.setdefault(digest, len(numbers))
            if number == len(firsts):
                firsts.append(len(groups))
            groups.append(number)
    return Distinct(torch.tensor(firsts, dtype=torch.int64), torch.tensor(groups, dtype=torch.int64))


class Best(NamedTuple):
    """The best candidates of some queries."""

    rows: Tensor
    """(q,) int64: which queries"""
    scores: Tensor
    """(q, L) in descending order"""
    candidates: Tensor
    """(q, L) int32, as all queries' best are in memory"""
    pairs: Tensor
    """(q, L) int32: numbers of the pairs of candidate and query's class, see `Search._pairs_of`"""


class Search:
    """Retrieval of Q queries among K candidates: first `places`, then `hits` with any sets of the candidates.

    Args:
        similarity: see `Similarity`; called on `device`.
        candidates: (K, D)
        queries: one or more (Q, D)
        positives: (Q,) int64: which candidate is the query's own.
        classes: (Q,) and (K,) int64, of queries and of candidates.
        across_ranks: all ranks call this with the same arguments and share the queries. They call the similarity
            equally often: it may be a module that ZeRO-3 partitions.
        several: more candidates are kept per query, for sets that lack the best ones.
    """

    def __init__(
        self,
        similarity: Similarity,
        candidates: Tensor,
        queries: Sequence[Tensor],
        positives: Tensor,
        classes: tuple[Tensor, Tensor],
        device: torch.device,
        across_ranks: bool = False,
        several: bool = False,
    ) -> None:
        self.similarity, self.queries, self.device, self.across_ranks = similarity, list(queries), device, across_ranks
        self.height, self.width = TILE[device.type]
        self.dtype = torch.promote_types(candidates.dtype, torch.float32)
        distinct = distinct_rows(candidates)
        self.candidates = candidates if len(distinct.rows) == len(candidates) else candidates[distinct.rows]
        if device.type == "cuda" and self.candidates.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.candidates = self.candidates.to(device)
        self.positives = distinct.group[positives]
        self.query_classes, candidate_classes = classes
        self.group = distinct.group
        # Of each distinct candidate; as numbers, which are exact: a tile holds less than 2^24 candidates.
        self.copies = distinct.group.bincount().to(device, torch.float32)
        self.number_of_classes = 1 + int(max(self.query_classes.max(), candidate_classes.max()))
        # Equal candidates may be of several classes: pairs of both, and a last number for those that do not occur.
        keys = distinct.group * self.number_of_classes + candidate_classes
        self.pairs, self.pair = keys.unique(return_inverse=True)
        self.kept = min(KEPT if several else 4, len(self.candidates))
        self.best: list[Best] = []

    def places(self, report: Callable[[int], None] | None = None) -> tuple[Tensor, Tensor]:
        """(Q,) int64, (Q,) int64: how many candidates score above the positive, and how many others the same.

        The best candidates are kept for `hits`: of a query a few hundred bytes.
        """
        found = torch.zeros((2, len(self.positives)), dtype=torch.float64)
        for rows, counts in self._shares(torch.arange(len(self.positives))):
            if report is not None:
                report(int(rows[0]))
            block, best = self._block(rows)
            if counts:
                found[:, rows] = block
                self.best.append(best)
        self._add_up(found)
        above, tied = found.long()
        return above, tied

    def hits(self, times: Tensor, wanted: Tensor) -> Tensor:
        """(S, Q) float64: of each set of candidates, which share of the best-scoring ones is of the query's class.

        1 or 0 but for ties, of which one is taken at random: this is the expectation.

        Args:
            times: (S, K) int64: sets of candidates, as how often each is in it.
            wanted: (S, Q) bool: the queries that matter with each set; of the others the share may be wrong.
        """
        sets, queries = wanted.shape
        # How often each distinct candidate is in a set, and with each of its classes.
        weights = torch.zeros((sets, len(self.candidates)), dtype=torch.int64).index_add_(1, self.group, times)
        pair_weights = torch.zeros((sets, len(self.pairs) + 1), dtype=torch.int64).index_add_(1, self.pair, times)
        # Hits, and whether they are settled.
        found = torch.zeros((2 * sets, queries), dtype=torch.float64)
        for best in self.best:
            found[:, best.rows] = self._hits(best, weights, pair_weights)
        self._add_up(found)
        hits, settled = found[:sets], found[sets:] > 0
        for number in range(sets):
            open_rows = (wanted[number] & ~settled[number]).nonzero().squeeze(1)
            late = torch.zeros(queries, dtype=torch.float64)
            for rows, counts in self._shares(open_rows):
                block = self._settle(rows, weights[number], pair_weights[number])
                if counts:
                    late[rows] = block
            if len(open_rows):
                self._add_up(late)
                hits[number, open_rows] = late[open_rows]
        return hits

    def _add_up(self, values: Tensor) -> None:
        """Each rank has filled in its own queries."""
        if self.across_ranks and world_size() > 1:
            values.copy_(all_reduce_sum(values, host_group()))

    def _shares(self, rows: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """This rank's blocks of rows, equally many on every rank: one that repeats another's does not count."""
        blocks = rows.split(self.height) if len(rows) else ()
        ranks, own = (world_size(), rank()) if self.across_ranks else (1, 0)
        for first in range(0, len(blocks), ranks):
            number = min(first + own, len(blocks) - 1)
            yield blocks[number], number == first + own

    def _tiles(self, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first candidate, (q, k) scores, (q,) score of the positive), tile by tile; NaN is below everything."""
        queries = [query[rows].to(self.device) for query in self.queries]
        positives = self.positives[rows]
        own = self.similarity(self.candidates[positives].to(self.device), queries).diagonal().clone()
        own = own.masked_fill(own.isnan(), -torch.inf)
        positives = positives.to(self.device)
        for start in range(0, len(self.candidates), self.width):
            tile = self.candidates[start : start + self.width].to(self.device)
            scores = self.similarity(tile, queries)
            assert scores.shape == (len(rows), len(tile)), f"the similarity gives {tuple(scores.shape)}"
            if scores.amax().isnan():
                scores = scores.masked_fill(scores.isnan(), -torch.inf)
            # A product of another shape may round otherwise: one score for the positive, wherever it is looked at.
            inside = ((positives >= start) & (positives < start + len(tile))).nonzero().squeeze(1)
            scores[inside, positives[inside] - start] = own[inside]
            yield start, scores, own

    def _block(self, rows: Tensor) -> tuple[Tensor, Best]:
        """(2, q) how many candidates score above the positive, and the same; and the best ones."""
        kept = self.kept
        best = torch.full((len(rows), kept), -torch.inf, dtype=self.dtype, device=self.device)
        best_of = torch.zeros((len(rows), kept), dtype=torch.int64, device=self.device)
        above = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        not_below = above.clone()
        for start, scores, own in self._tiles(rows):
            of_tile = self.copies[start : start + scores.shape[1]]
            flags = torch.empty(scores.shape, device=self.device)  # as numbers: five times as fast as converting them
            above += torch.gt(scores, own[:, None], out=flags) @ of_tile
            not_below += torch.ge(scores, own[:, None], out=flags) @ of_tile
            values, places = scores.to(self.dtype).topk(min(kept, scores.shape[1]), dim=1)
            best, order = torch.cat([best, values], dim=1).topk(kept, dim=1)
            best_of = torch.cat([best_of, places + start], dim=1).gather(1, order)
        tied = not_below - above - 1
        best_of = best_of.cpu()
        pairs = self._pairs_of(best_of, self.query_classes[rows][:, None])
        return torch.stack([above, tied]).cpu(), Best(rows, best.cpu(), best_of.int(), pairs.int())

    def _hits(self, best: Best, weights: Tensor, pair_weights: Tensor) -> Tensor:
        """(2 S, q): hits with each set, and whether they follow from the best candidates."""
        whole = best.scores.shape[1] == len(self.candidates)
        hits, settled = [], []
        for of_set, pairs_of_set in zip(weights, pair_weights, strict=True):
            there = of_set[best.candidates]
            top = best.scores.masked_fill(there == 0, -torch.inf).amax(dim=1, keepdim=True)
            tied = (best.scores == top) & (there > 0)
            total, own = (there * tied).sum(dim=1), (pairs_of_set[best.pairs] * tied).sum(dim=1)
            hits.append(own.double() / total.clamp(min=1))
            # Candidates that score as the last one kept may have been left out.
            settled.append((top[:, 0] > -torch.inf) & (whole | (top[:, 0] > best.scores[:, -1])))
        return torch.cat([torch.stack(hits), torch.stack(settled).double()])

    def _pairs_of(self, candidates: Tensor, classes: Tensor) -> Tensor:
        """Number of the pair (candidate, class) in `pairs`; of one that does not occur, the last."""
        wanted = candidates * self.number_of_classes + classes
        place = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        return torch.where(self.pairs[place] == wanted, place, len(self.pairs))

    def _settle(self, rows: Tensor, weights: Tensor, pair_weights: Tensor) -> Tensor:
        """(q,) hits with one set, by looking at all candidates again."""
        top = torch.full((len(rows),), -torch.inf, dtype=self.dtype)
        total, own = torch.zeros((2, len(rows)), dtype=torch.int64)
        classes = self.query_classes[rows]
        for start, scores, _ in self._tiles(rows):
            scores = scores.to(self.dtype).cpu()
            there = weights[start : start + scores.shape[1]] > 0
            of_tile = scores.masked_fill(~there, -torch.inf).amax(dim=1)
            total[of_tile > top] = 0
            own[of_tile > top] = 0
            top = torch.maximum(top, of_tile)
            query, candidate = ((scores == top[:, None]) & there).nonzero(as_tuple=True)
            total.index_add_(0, query, weights[candidate + start])
            pairs = self._pairs_of(candidate + start, classes[query])
            own.index_add_(0, query, pair_weights[pairs])
        return own.double() / total.clamp(min=1)
