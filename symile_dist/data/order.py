"""The global sample order: lanes x windows, a pure function of (seed, step).

No rank and no loader process keeps any state, so the order is the same for every number of ranks and processes and
a run goes on from any step at once.

- Epoch e permutes the shards (keyed on seed and e). Their concatenation is cut into C contiguous **lanes** of
  N // C + [(c - e) mod C < N mod C] samples: the odd samples move round the lanes from epoch to epoch.
- A lane takes K shards at a time, a **window**, and permutes the samples in it (keyed on seed, e, c and window).
- Lanes run on across epochs: nothing is padded, nothing dropped, and a batch at the boundary spans two epochs.
- The q-th sample of the dataset's stream is lane q mod C, lane offset q // C. Step t takes the next ones, sorted by
  lane: with one dataset, slot j of step t is lane floor(j C / G), lane offset t G / C + j mod (G / C).
- Several datasets: after t steps dataset d has given n_d(t) samples, n_d a function of t and the weights alone. Each
  has lanes, windows and epochs of its own; the slots of a step are sorted by (lane, dataset).
- Rank r of R owns the slots [r G / R, (r + 1) G / R).

Every sample therefore comes exactly once per epoch of its dataset; the lanes of an epoch partition it. The number of
samples may change from one epoch to the next (quarantine): that begins another **generation** of the population.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from symile_dist.data.recent import Recent
from symile_dist.seeding import permutation

Int64Array = NDArray[np.int64]


class Slots(NamedTuple):
    """Which samples a run of slots holds; arrays of equal length."""

    dataset: Int64Array
    """Number of the dataset, in the order of the config."""
    shard: Int64Array
    """-1 where the slot holds no sample."""
    row: Int64Array
    """The sample's place among the *population* of its shard in that epoch."""
    epoch: Int64Array
    """Of the dataset."""


class Stretch(NamedTuple):
    """Consecutive samples of one shard's population that a lane reads in one window."""

    dataset: int
    epoch: int
    shard: int
    first: int
    last: int
    """Not included."""


def choose_lanes(global_batch_size: int, num_shards: int, num_samples: int) -> int:
    """The largest divisor of the global batch that gives every lane a shard or more, at most 64.

    It does not depend on the world size, so neither does the order.
    """
    limit = max(1, min(num_shards, num_samples, 64))
    return max(c for c in range(1, limit + 1) if global_batch_size % c == 0)


def largest_world_size(global_batch_size: int, available: int) -> int:
    """The most ranks, of those available, that divide the global batch: what an elastic run falls to."""
    return max(world for world in range(1, min(available, global_batch_size) + 1) if global_batch_size % world == 0)


def _cyclic_count(first: int, length: int, modulus: int, end: int) -> int:
    """How many x in [0, end), end <= modulus, have (x - first) mod modulus < length, for 0 <= first < modulus."""
    return max(0, min(end, first + length) - first) + max(0, min(end, first + length - modulus))


class _Generation(NamedTuple):
    """A population of shards, the same for some epochs."""

    first_epoch: int
    sizes: Int64Array
    """Samples per shard."""
    num_samples: int


class _Window(NamedTuple):
    epoch: int
    start: int
    """The lane offset of its first sample."""
    shards: Int64Array
    shifts: Int64Array
    """Per shard, what to add to a sample's place in the window to have its row."""
    ends: Int64Array
    """Per shard, how many samples of the window it and those before it hold."""
    shuffled: NDArray[np.uint32]
    """A permutation of the window's samples."""


class LaneStream:
    """The endless stream of one dataset, cut into lanes.

    Args:
        shard_sizes: samples of each shard (of its population), in the order of the manifest.
        lanes: C, at most the number of samples.
        window: K, shards that are shuffled together.
        key: seeds the permutations.
    """

    def __init__(self, shard_sizes: Sequence[int], lanes: int, window: int, key: tuple[int | str, ...]) -> None:
        self.lanes, self.window, self.key = lanes, window, key
        self._generations: list[_Generation] = []
        self._windows: dict[int, _Window] = {}
        """Per lane, the one that was read last."""
        self._epochs: Recent[int, tuple[Int64Array, Int64Array]] = Recent(3)
        self.set_population(0, shard_sizes)

    @property
    def num_samples(self) -> int:
        """Of the newest generation."""
        return self._generations[-1].num_samples

    def set_population(self, epoch: int, shard_sizes: Sequence[int]) -> None:
        """From this epoch on the shards hold so many samples. Raises ValueError for fewer samples than lanes."""
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        number = int(sizes.sum())
        if number == 0:
            raise ValueError("the dataset holds no samples")
        if self.lanes > number:
            raise ValueError(f"{self.lanes} lanes for {number} samples: use at most as many lanes as samples")
        self._generations = [g for g in self._generations if g.first_epoch < epoch]
        self._generations.append(_Generation(epoch, sizes, number))
        self._windows.clear()
        self._epochs.clear()

    def _generation_number(self, epoch: int) -> int:
        return bisect_right(self._generations, epoch, key=lambda generation: generation.first_epoch) - 1

    # -- lanes ---------------------------------------------------------------------------------------------------

    def lane_size(self, epoch: int, lane: int) -> int:
        """Samples of a lane in an epoch."""
        quotient, odd = divmod(self._generations[self._generation_number(epoch)].num_samples, self.lanes)
        return quotient + int((lane - epoch) % self.lanes < odd)

    def _lane_start(self, epoch: int, lane: int) -> int:
        """Where a lane begins in the epoch's concatenation of shards."""
        quotient, odd = divmod(self._generations[self._generation_number(epoch)].num_samples, self.lanes)
        # Lanes with one sample more are those with (lane - epoch) mod C < odd.
        return lane * quotient + _cyclic_count(epoch % self.lanes, odd, self.lanes, lane)

    def _read_in(self, generation: int, end: int, lane: int) -> int:
        """Samples that a lane reads in the epochs of a generation before epoch `end`."""
        first, _, number = self._generations[generation]
        quotient, odd = divmod(number, self.lanes)
        # Epochs e with (lane - e) mod C < odd, that is with (e - (lane - odd + 1)) mod C < odd, read one sample more.
        start = (lane - odd + 1 - first) % self.lanes
        cycles, rest = divmod(end - first, self.lanes)
        return (end - first) * quotient + cycles * odd + _cyclic_count(start, odd, self.lanes, rest)

    def consumed_before(self, epoch: int, lane: int) -> int:
        """Samples of the lane in epochs 0 .. epoch - 1: the lane offset at which the epoch begins."""
        total = 0
        for number, generation in enumerate(self._generations):
            if generation.first_epoch >= epoch:
                break
            last = self._generations[number + 1].first_epoch if number + 1 < len(self._generations) else epoch
            total += self._read_in(number, min(last, epoch), lane)
        return total

    def epoch_of(self, lane: int, offset: int) -> tuple[int, int]:
        """(epoch, offset within the lane's share of it) of a lane offset."""
        number, rest = 0, offset
        while number + 1 < len(self._generations):
            read = self._read_in(number, self._generations[number + 1].first_epoch, lane)
            if rest < read:
                break
            number, rest = number + 1, rest - read
        first, _, samples = self._generations[number]
        cycles, left = divmod(rest, samples)  # in any C epochs a lane reads N samples
        epoch = first + cycles * self.lanes + left // (samples // self.lanes + 1)  # never too late: no share is larger
        while self._read_in(number, epoch + 1, lane) <= rest:
            epoch += 1
        return epoch, rest - self._read_in(number, epoch, lane)

    # -- windows -------------------------------------------------------------------------------------------------

    def _epoch_shards(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The shards of an epoch in their order, and where each begins in the concatenation (one entry more)."""
        return self._epochs.get(epoch, lambda: self._permute_shards(epoch))

    def _permute_shards(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        sizes = self._generations[self._generation_number(epoch)].sizes
        order = permutation(len(sizes), "shards", *self.key, epoch)
        return order, np.concatenate([[0], np.cumsum(sizes[order])]).astype(np.int64)

    def _window_bounds(self, epoch: int, lane: int, offset: int) -> tuple[int, range, int, int]:
        """Of the window at an offset of the lane's share: its number, its places in the epoch's shards; the lane's
        bounds."""
        order, starts = self._epoch_shards(epoch)
        begin = self._lane_start(epoch, lane)
        end = begin + self.lane_size(epoch, lane)
        first_shard = int(np.searchsorted(starts, begin, side="right")) - 1
        at_shard = int(np.searchsorted(starts, begin + offset, side="right")) - 1
        number = (at_shard - first_shard) // self.window
        first = first_shard + number * self.window
        return number, range(first, min(first + self.window, len(order))), begin, end

    def _window_of(self, lane: int, offset: int) -> _Window:
        """The window at a lane offset. Most steps go on in the lane's window of the step before."""
        window = self._windows.get(lane)
        if window is None or not 0 <= offset - window.start < len(window.shuffled):
            window = self._windows[lane] = self._make_window(lane, offset)
        return window

    def _make_window(self, lane: int, offset: int) -> _Window:
        epoch, within = self.epoch_of(lane, offset)
        number, places, begin, end = self._window_bounds(epoch, lane, within)
        order, starts = self._epoch_shards(epoch)
        low = np.maximum(begin, starts[places.start : places.stop])
        high = np.minimum(end, starts[places.start + 1 : places.stop + 1])
        some = high > low
        ends = np.cumsum((high - low)[some])
        first_rows = (low - starts[places.start : places.stop])[some]
        return _Window(
            epoch,
            offset - within + int(low[0]) - begin,
            order[places.start : places.stop][some],
            first_rows - np.append(0, ends[:-1]),
            ends,
            permutation(int(ends[-1]), "window", *self.key, epoch, lane, number).astype(np.uint32),
        )

    def run(self, lane: int, offset: int, count: int) -> Iterator[tuple[Int64Array, Int64Array, int]]:
        """`count` consecutive samples of a lane: (shards, rows, epoch) of one window after the other."""
        while count:
            window = self._window_of(lane, offset)
            begin = offset - window.start
            picked = window.shuffled[begin : begin + count].astype(np.int64)
            which = np.searchsorted(window.ends, picked, side="right")
            yield window.shards[which], window.shifts[which] + picked, window.epoch
            offset, count = offset + len(picked), count - len(picked)

    def stretches(self, lane: int, offset: int, count: int) -> Iterator[tuple[list[tuple[int, int, int, int]], int]]:
        """What the windows that hold `count` samples from an offset on read: [(epoch, shard, first, last)], window by
        window, each with the lane offset at which the next one begins. Makes no permutation."""
        last = offset + max(1, count)
        while offset < last:
            epoch, within = self.epoch_of(lane, offset)
            _, places, begin, end = self._window_bounds(epoch, lane, within)
            order, starts = self._epoch_shards(epoch)
            parts = []
            for place in places:
                low, high = max(begin, int(starts[place])), min(end, int(starts[place + 1]))
                if high > low:
                    parts.append((epoch, int(order[place]), low - int(starts[place]), high - int(starts[place])))
            stop = min(end, int(starts[places.stop])) - begin
            offset += stop - within
            yield parts, offset


class Mixture:
    """How many samples of each dataset the first n slots of a stream hold, for any n at once.

    The weights are the leaves of a Huffman tree, at whose nodes the samples are split in two: of m samples the left
    branch gets floor(m w + 1/2). Both branches of such a split never shrink as m grows, so no dataset's count ever
    does, and each stays within 1 of its share for two or three datasets (within 2 for any number).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(repr(float(weight))) for weight in weights]
        heap: list[tuple[Fraction, int, object]] = [(weight, number, number) for number, weight in enumerate(exact)]
        heapq.heapify(heap)
        while len(heap) > 1:
            right, left = heapq.heappop(heap), heapq.heappop(heap)
            # (left branch, right branch, share of the left one); ties are settled by the first dataset in each.
            node = (left[2], right[2], left[0] / (left[0] + right[0]))
            heapq.heappush(heap, (left[0] + right[0], min(left[1], right[1]), node))
        self._tree = heap[0][2]
        self._datasets = len(exact)

    def counts(self, total: int) -> list[int]:
        """Samples of each dataset among the first `total`; they sum to it."""
        counts = [0] * self._datasets
        pending: list[tuple[object, int]] = [(self._tree, total)]
        while pending:
            node, number = pending.pop()
            if isinstance(node, tuple):
                left, right, share = node
                of_left = (2 * number * share.numerator + share.denominator) // (2 * share.denominator)
                pending += [(left, of_left), (right, number - of_left)]
            else:
                assert isinstance(node, int)
                counts[node] = number
        return counts


class _Run(NamedTuple):
    """Consecutive samples of one lane of one dataset in a step."""

    dataset: int
    lane: int
    offset: int
    samples: int


class LanesWindowsOrder:
    """The order of one dataset or of a mixture.

    Args:
        streams: of each dataset; all have the same number of lanes, which must divide the global batch.
        global_batch_size: G, samples per step over all ranks.
        weights: shares of the datasets, in any unit; equal ones when left out.
    """

    def __init__(
        self, streams: Sequence[LaneStream], global_batch_size: int, weights: Sequence[float] | None = None
    ) -> None:
        self.streams, self.global_batch_size, self.lanes = list(streams), global_batch_size, streams[0].lanes
        assert all(stream.lanes == self.lanes for stream in streams)
        if global_batch_size % self.lanes:
            raise ValueError(f"{self.lanes} lanes do not divide the global batch of {global_batch_size}")
        self.mixture = Mixture(weights or [1.0] * len(streams))

    @classmethod
    def of_one(
        cls, shard_sizes: Sequence[int], global_batch_size: int, lanes: int, window: int, seed: int
    ) -> LanesWindowsOrder:
        """The order of one dataset."""
        return cls([LaneStream(shard_sizes, lanes, window, (seed,))], global_batch_size)

    def consumed(self, step: int) -> list[int]:
        """Samples of each dataset in the steps before this one."""
        return self.mixture.counts(step * self.global_batch_size)

    def _runs(self, step: int, low: int, high: int) -> Iterator[_Run]:
        """The slots [low, high) of a step, in their order."""
        before, after = self.consumed(step), self.consumed(step + 1)
        slot = 0
        for lane in range(self.lanes):
            if slot >= high:
                break
            for dataset, (first, last) in enumerate(zip(before, after, strict=True)):
                # Of the samples q in [first, last) those with q mod C = lane.
                offset = (first - lane + self.lanes - 1) // self.lanes
                count = (last - lane + self.lanes - 1) // self.lanes - offset
                skip, take = max(0, low - slot), min(count, high - slot)
                if take > skip:
                    yield _Run(dataset, lane, offset + skip, take - skip)
                slot += count

    def slots(self, step: int, low: int, high: int) -> Slots:
        """The samples in the slots [low, high) of a step."""
        columns: tuple[list[Int64Array], ...] = ([], [], [], [])
        for dataset, lane, offset, count in self._runs(step, low, high):
            for shards, rows, epoch in self.streams[dataset].run(lane, offset, count):
                same = np.ones(len(rows), dtype=np.int64)
                for column, values in zip(columns, (dataset * same, shards, rows, epoch * same), strict=True):
                    column.append(values)
        return Slots(*(np.concatenate(column) for column in columns))

    def stretches(self, step: int, low: int, high: int, stop: int) -> tuple[list[Stretch], list[Stretch]]:
        """What the windows of these slots read, and what the windows after them will before step `stop`: for fetching
        ahead."""
        ends = self.consumed(stop)
        now: dict[Stretch, None] = {}
        soon: dict[Stretch, None] = {}
        for dataset, lane, offset, count in self._runs(step, low, high):
            next_window = offset
            for parts, end in self.streams[dataset].stretches(lane, offset, count):
                now.update(dict.fromkeys(Stretch(dataset, *part) for part in parts))
                next_window = end
            if next_window * self.lanes + lane >= ends[dataset]:
                continue
            for parts, _ in self.streams[dataset].stretches(lane, next_window, 1):
                soon.update(dict.fromkeys(Stretch(dataset, *part) for part in parts))
        return list(now), [stretch for stretch in soon if stretch not in now]

    # -- epochs --------------------------------------------------------------------------------------------------

    def next_epoch(self, dataset: int, step: int) -> int:
        """The first epoch of a dataset of which no slot before this step holds a sample."""
        stream, consumed = self.streams[dataset], self.consumed(step)[dataset]
        begun = 0
        for lane in range(self.lanes):
            read = (consumed - lane + self.lanes - 1) // self.lanes
            if read > 0:
                begun = max(begun, stream.epoch_of(lane, read - 1)[0] + 1)
        return begun

    def first_step(self, dataset: int, epoch: int) -> int:
        """The first step with a sample of this epoch of a dataset."""
        stream = self.streams[dataset]
        first = min(stream.consumed_before(epoch, lane) * self.lanes + lane for lane in range(self.lanes))
        low, high = 0, 1
        while self.consumed(high)[dataset] <= first:
            low, high = high, 2 * high
        while high - low > 1:  # consumed(low) <= first < consumed(high)
            middle = (low + high) // 2
            if self.consumed(middle)[dataset] <= first:
                low = middle
            else:
                high = middle
        return low


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
        return Slots(np.zeros_like(at), shard, row, np.zeros_like(at))

    def stretches(self, step: int, low: int, high: int, stop: int) -> tuple[list[Stretch], list[Stretch]]:
        """The shards of these slots, and those of the two steps after it."""

        def between(first: int, last: int) -> list[Stretch]:
            first, last = min(first, self.num_samples), min(last, self.num_samples)
            found = []
            shard = int(np.searchsorted(self.starts, first, side="right")) - 1
            while first < last:
                end = int(self.starts[shard + 1])
                if end > first:
                    # To the shard's end: the next steps go on in it, and one range is fetched once.
                    found.append(Stretch(0, 0, shard, 0, int(end - self.starts[shard])))
                first, shard = max(first, end), shard + 1
            return found

        at = step * self.global_batch_size
        now = between(at + low, at + high)
        later = between(at + high, min(at + 3 * self.global_batch_size, stop * self.global_batch_size))
        return now, [stretch for stretch in later if stretch not in now]


Order = LanesWindowsOrder | SequentialOrder
