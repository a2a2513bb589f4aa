"""The global sample order: lanes x windows, a pure function of (seed, step).

No rank and no loader process keeps any state, so the order is the same for every number of ranks and processes and
a run goes on from any step at once.

- Epoch e permutes the shards (keyed on seed and e). Their concatenation is cut into C contiguous **lanes** of
  N // C + [(c - e) mod C < N mod C] samples: the odd samples move round the lanes from epoch to epoch.
- A lane takes K shards at a time, a **window**, and permutes the samples in it (keyed on seed, e, c and window).
- Lanes run on across epochs: nothing is padded, nothing dropped, and a batch at the boundary spans two epochs.
- Slot j of step t, 0 <= j < G, is lane floor(j C / G), lane offset t G / C + j mod (G / C).
- Rank r of R owns the slots [r G / R, (r + 1) G / R).

Every sample therefore comes exactly once per epoch of its lane; the lanes of an epoch partition it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from symile_dist.seeding import permutation

Int64Array = NDArray[np.int64]


class Slots(NamedTuple):
    """Which samples a run of slots holds; arrays of equal length."""

    shard: Int64Array
    row: Int64Array
    """The sample's place among the *population* of its shard."""
    epoch: Int64Array


def choose_lanes(global_batch_size: int, num_shards: int, num_samples: int) -> int:
    """The largest divisor of the global batch that gives every lane a shard or more, at most 64.

    It does not depend on the world size, so neither does the order.
    """
    limit = max(1, min(num_shards, num_samples, 64))
    return max(c for c in range(1, limit + 1) if global_batch_size % c == 0)


class _Window(NamedTuple):
    start: int
    """First offset of the window in the lane's share of the epoch."""
    shard: Int64Array
    row: Int64Array


class LanesWindowsOrder:
    """The order of a dataset of shards.

    Args:
        shard_sizes: samples of each shard (of its population), in the order of the manifest.
        global_batch_size: G, samples per step over all ranks.
        lanes: C, must divide G and be at most the number of samples.
        window: K, shards that are shuffled together.
        seed: the run's seed.
    """

    def __init__(self, shard_sizes: Sequence[int], global_batch_size: int, lanes: int, window: int, seed: int) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        self.global_batch_size, self.lanes, self.window, self.seed = global_batch_size, lanes, window, seed
        if self.num_samples == 0:
            raise ValueError("the dataset holds no samples")
        if global_batch_size % lanes:
            raise ValueError(f"{lanes} lanes do not divide the global batch of {global_batch_size}")
        if lanes > self.num_samples:
            raise ValueError(f"{lanes} lanes for {self.num_samples} samples: use at most as many lanes as samples")
        self._windows: OrderedDict[tuple[int, int, int], _Window] = OrderedDict()
        self._epochs: OrderedDict[int, tuple[Int64Array, Int64Array]] = OrderedDict()

    # -- lanes ---------------------------------------------------------------------------------------------------

    def lane_size(self, epoch: int, lane: int) -> int:
        """Samples of a lane in an epoch."""
        return self.num_samples // self.lanes + int((lane - epoch) % self.lanes < self.num_samples % self.lanes)

    def _lane_start(self, epoch: int, lane: int) -> int:
        """Where a lane begins in the epoch's concatenation of shards."""
        quotient, odd = divmod(self.num_samples, self.lanes)
        # Lanes with one sample more are those with (lane - epoch) mod C < odd: epoch, epoch + 1, ... (mod C).
        first = epoch % self.lanes
        larger = max(0, min(lane, first + odd) - first) + max(0, min(lane, first + odd - self.lanes))
        return lane * quotient + larger

    def _consumed_before(self, epoch: int, lane: int) -> int:
        """Samples of the lane in epochs 0 .. epoch - 1: the lane offset at which the epoch begins."""
        quotient, odd = divmod(self.num_samples, self.lanes)
        cycles, rest = divmod(epoch, self.lanes)
        larger = cycles * odd + sum((lane - e) % self.lanes < odd for e in range(rest))
        return epoch * quotient + larger

    def _epoch_of(self, lane: int, offset: int) -> tuple[int, int]:
        """(epoch, offset within the lane's share of it) of a lane offset."""
        cycles, rest = divmod(offset, self.num_samples)  # in any C epochs a lane reads N samples
        epoch = cycles * self.lanes + rest // (self.num_samples // self.lanes + 1)  # never too late: no share is larger
        while self._consumed_before(epoch + 1, lane) <= offset:
            epoch += 1
        return epoch, offset - self._consumed_before(epoch, lane)

    # -- windows -------------------------------------------------------------------------------------------------

    def _epoch_shards(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The shards of an epoch in their order, and where each begins in the concatenation (one entry more)."""
        if epoch not in self._epochs:
            order = permutation(len(self.sizes), "shards", self.seed, epoch)
            starts = np.concatenate([[0], np.cumsum(self.sizes[order])]).astype(np.int64)
            self._epochs[epoch] = (order, starts)
            while len(self._epochs) > 3:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window_at(self, epoch: int, lane: int, offset: int) -> _Window:
        order, starts = self._epoch_shards(epoch)
        begin = self._lane_start(epoch, lane)
        end = begin + self.lane_size(epoch, lane)
        first_shard = int(np.searchsorted(starts, begin, side="right")) - 1
        at_shard = int(np.searchsorted(starts, begin + offset, side="right")) - 1
        number = (at_shard - first_shard) // self.window
        key = (epoch, lane, number)
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        shards: list[Int64Array] = []
        rows: list[Int64Array] = []
        window_shards = range(
            first_shard + number * self.window, min(first_shard + (number + 1) * self.window, len(order))
        )
        for place in window_shards:
            low, high = max(begin, int(starts[place])), min(end, int(starts[place + 1]))
            if high > low:
                rows.append(np.arange(low - starts[place], high - starts[place], dtype=np.int64))
                shards.append(np.full(high - low, order[place], dtype=np.int64))
        mixed = permutation(sum(map(len, rows)), "window", self.seed, epoch, lane, number)
        window = _Window(
            max(begin, int(starts[window_shards[0]])) - begin,
            np.concatenate(shards)[mixed],
            np.concatenate(rows)[mixed],
        )
        self._windows[key] = window
        while len(self._windows) > 2 * self.lanes:
            self._windows.popitem(last=False)
        return window

    def _lane_run(self, lane: int, offset: int, count: int) -> Slots:
        """`count` consecutive samples of a lane's stream."""
        shards: list[Int64Array] = []
        rows: list[Int64Array] = []
        epochs: list[Int64Array] = []
        while count:
            epoch, within = self._epoch_of(lane, offset)
            window = self._window_at(epoch, lane, within)
            take = slice(within - window.start, within - window.start + count)
            shards.append(window.shard[take])
            rows.append(window.row[take])
            taken = len(shards[-1])
            epochs.append(np.full(taken, epoch, dtype=np.int64))
            offset, count = offset + taken, count - taken
        return Slots(np.concatenate(shards), np.concatenate(rows), np.concatenate(epochs))

    # -- what the loader asks ------------------------------------------------------------------------------------

    def slots(self, step: int, low: int, high: int) -> Slots:
        """The samples in the slots [low, high) of a step."""
        per_lane = self.global_batch_size // self.lanes
        runs = []
        for lane in range(low // per_lane, -(-high // per_lane)):
            first, last = max(low, lane * per_lane), min(high, (lane + 1) * per_lane)
            runs.append(self._lane_run(lane, step * per_lane + first - lane * per_lane, last - first))
        return Slots(*(np.concatenate(parts) for parts in zip(*runs, strict=True)))


class SequentialOrder:
    """Each sample once, in the order of the manifest: for validation. The tail of the last step holds no samples."""

    def __init__(self, shard_sizes: Sequence[int], global_batch_size: int, max_samples: int | None = None) -> None:
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(shard_sizes, dtype=np.int64))]).astype(np.int64)
        self.num_samples = int(self.starts[-1] if max_samples is None else min(self.starts[-1], max_samples))
        if self.num_samples == 0:
            raise ValueError("the dataset holds no samples")
        self.global_batch_size = global_batch_size

    @property
    def steps(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def slots(self, step: int, low: int, high: int) -> Slots:
        """The samples in the slots [low, high) of a step; shard -1 where there is none."""
        at = step * self.global_batch_size + np.arange(low, high, dtype=np.int64)
        shard = np.searchsorted(self.starts, at, side="right").astype(np.int64) - 1
        none = at >= self.num_samples
        shard[none] = 0
        row = at - self.starts[shard]
        shard[none], row[none] = -1, 0
        return Slots(shard, row, np.zeros_like(at))


Order = LanesWindowsOrder | SequentialOrder
