"""Has a node's cache hold what the next batches read, and fetch ahead what comes after.

Every loader process knows from the order what it will read, so it says so before it does: nothing is fetched twice,
and what could be known in advance is there in time. With local shards there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symile_dist.data.cache import Piece, ShardCache
from symile_dist.data.index import UNREADABLE
from symile_dist.data.order import Order, Stretch
from symile_dist.data.population import Population
from symile_dist.data.shards import CachedShards
from symile_dist.errors import StorageError

Unreachable = dict[tuple[int, int], str]
"""(dataset, shard) -> why its bytes could not be fetched."""


class Holder:
    """What one loader process has the cache hold, of the batches before `stop_step`."""

    def __init__(self, populations: Sequence[Population], order: Order, cache: ShardCache, stop_step: int) -> None:
        self.populations, self.order, self.cache, self.stop_step = populations, order, cache, stop_step
        self._wanted: tuple[list[Stretch], list[Stretch]] = ([], [])
        self._pieces: list[Piece] = []
        self._unreachable: Unreachable = {}
        self._remote = any(isinstance(population.shards, CachedShards) for population in populations)

    def __getstate__(self) -> dict[str, Any]:
        # Another process holds for itself.
        return {**self.__dict__, "_wanted": ([], []), "_pieces": [], "_unreachable": {}}

    def hold(self, step: int, low: int, high: int) -> Unreachable:
        """Waits until what these slots of a step read is local; what comes next is fetched in the background.

        Raises ValueError when it cannot fit into the cache.
        """
        if not self._remote:
            return {}
        wanted = self.order.stretches(step, low, high, self.stop_step)
        if wanted != self._wanted or self._unreachable:  # what could not be fetched is asked for again
            self._wanted = wanted
            self.hold_again()
        return self._unreachable

    def counters(self) -> dict[str, int]:
        """What the node's fetcher has done; empty where there is nothing to fetch."""
        return self.cache.counters() if self._remote else {}

    def hold_again(self) -> Unreachable:
        """The same once more, for what has been dropped."""
        now, soon = (list(self._cached(stretches)) for stretches in self._wanted)
        # The indices first, all at once: they tell which bytes the stretches are.
        indices = {(s.dataset, s.shard): shards.index_piece(s.shard) for s, shards in [*now, *soon]}
        failed = self.cache.hold([*self._pieces, *indices.values()])
        unreachable = {key: failed[piece] for key, piece in indices.items() if piece in failed}
        needed, next_ones = (self._data_pieces(stretches, unreachable) for stretches in (now, soon))
        self._pieces = [*indices.values(), *needed]
        failed = self.cache.hold(self._pieces, list(next_ones))
        unreachable |= {key: failed[piece] for piece, key in needed.items() if piece in failed}
        for _, shards in [*now, *soon]:
            shards.held()
        self._unreachable = unreachable
        return unreachable

    def hold_rows(self, population: Population, shard: int, rows: NDArray[np.int64]) -> None:
        """Has only these rows of a shard local. Raises StorageError when they cannot be fetched."""
        shards = population.shards
        if not isinstance(shards, CachedShards) or len(rows) == 0:
            return
        starts = population.index(shard).row_starts
        self._pieces = [Piece(shards.url(shard), int(starts[row]), int(starts[row + 1])) for row in rows]
        failed = self.cache.hold(self._pieces)
        shards.held()
        if failed:
            raise StorageError(next(iter(failed.values())))

    def _cached(self, stretches: Iterable[Stretch]) -> Iterable[tuple[Stretch, CachedShards]]:
        for stretch in stretches:
            shards = self.populations[stretch.dataset].shards
            if isinstance(shards, CachedShards):
                yield stretch, shards

    def _data_pieces(
        self, stretches: Iterable[tuple[Stretch, CachedShards]], unreachable: Unreachable
    ) -> dict[Piece, tuple[int, int]]:
        """The bytes of the stretches; an index that cannot be read is added to `unreachable`."""
        pieces: dict[Piece, tuple[int, int]] = {}
        for stretch, shards in stretches:
            key = (stretch.dataset, stretch.shard)
            if key in unreachable:
                continue
            population = self.populations[stretch.dataset]
            try:
                rows = population.rows(stretch.shard, stretch.epoch)[stretch.first : stretch.last]
                starts = population.index(stretch.shard).row_starts
            except UNREADABLE as error:
                unreachable[key] = str(error)
                continue
            pieces[Piece(shards.url(stretch.shard), int(starts[rows[0]]), int(starts[rows[-1] + 1]))] = key
        return pieces
