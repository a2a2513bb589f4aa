"""The order: every sample once per epoch, the same at every world size and from every step on."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter

import numpy as np
import pytest

from symile_dist.data.order import LaneStream, LanesWindowsOrder, SequentialOrder, Slots, choose_lanes

Sample = tuple[int, int]


def samples(slots: Slots) -> list[Sample]:
    return list(zip(slots.shard.tolist(), slots.row.tolist(), strict=True))


def batch(order: LanesWindowsOrder, step: int) -> list[tuple[int, int, int]]:
    """(shard, row, epoch) of a whole global batch."""
    return list(zip(*(part.tolist() for part in order.slots(step, 0, order.global_batch_size)[1:]), strict=True))


class Case:
    """One random dataset and batch; the seed is in the test's name."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.sizes = [draw.choice([0, 1, draw.randint(2, 40)]) for _ in range(draw.randint(1, 12))]
        if not any(self.sizes):
            self.sizes[-1] = 3
        # G is a multiple of 12, so that worlds of 1, 2, 3 and 4 divide it.
        self.batch = 12 * draw.randint(1, 4)
        possible = [c for c in range(1, self.batch + 1) if self.batch % c == 0 and c <= sum(self.sizes)]
        self.lanes = draw.choice(possible)
        self.window = draw.randint(1, 5)
        self.seed = seed

    def order(self, seed: int | None = None) -> LanesWindowsOrder:
        return LanesWindowsOrder.of_one(
            self.sizes, self.batch, self.lanes, self.window, self.seed if seed is None else seed
        )

    def __str__(self) -> str:
        return f"sizes {self.sizes}, G {self.batch}, C {self.lanes}, K {self.window}, seed {self.seed}"


CASES = [pytest.param(Case(seed), id=f"case{seed}") for seed in range(40)]
LARGE_CASES = [pytest.param(case, id=f"case{seed}") for seed in range(10) if sum((case := Case(seed)).sizes) > 20]


@pytest.mark.parametrize("case", CASES)
def test_what_was_asked_for_before_does_not_matter(case: Case) -> None:
    """Windows are kept from step to step: forwards, backwards, anywhere, and when the population changes."""
    draw, used, changed = random.Random(case.seed), case.order(), [max(size - 1, 0) for size in case.sizes]
    if sum(changed) < case.lanes:
        changed = list(case.sizes)
    for sizes in (None, changed):
        if sizes is not None:
            used.streams[0].set_population(1, sizes)
        for step in [draw.randint(0, 60) for _ in range(12)]:
            expected = case.order()
            if sizes is not None:
                expected.streams[0].set_population(1, sizes)
            assert batch(used, step) == batch(expected, step), f"{case}, step {step}"


@pytest.mark.parametrize("case", CASES)
def test_every_sample_exactly_once_per_epoch(case: Case) -> None:
    order = case.order()
    everything = sorted((shard, row) for shard, size in enumerate(case.sizes) for row in range(size))
    epochs = 3
    # A lane may run ahead of another by one sample per epoch: read until all have left the third epoch.
    steps = -(-epochs * (len(everything) // case.lanes + 1) * case.lanes // case.batch) + 1
    by_epoch: dict[int, list[Sample]] = {}
    for step in range(steps):
        for shard, row, epoch in batch(order, step):
            by_epoch.setdefault(epoch, []).append((shard, row))
    for epoch in range(epochs):
        got = sorted(by_epoch[epoch])
        twice = [sample for sample, count in Counter(got).items() if count > 1]
        assert got == everything, (
            f"{case}: epoch {epoch} repeats {twice[:5]}, loses {sorted(set(everything) - set(got))[:5]}"
        )


@pytest.mark.parametrize("case", CASES)
def test_the_same_global_batches_at_every_world_size(case: Case) -> None:
    whole = case.order()
    for world in (2, 3, 4):
        ranks = [case.order() for _ in range(world)]  # ranks share nothing
        share = case.batch // world
        for step in (0, 1, 2, 7, 30):
            parts = [ranks[r].slots(step, r * share, (r + 1) * share) for r in range(world)]
            got = [np.concatenate(columns).tolist() for columns in zip(*parts, strict=True)]
            assert got == [column.tolist() for column in whole.slots(step, 0, case.batch)], (
                f"{case}: world {world}, step {step}"
            )


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_order_goes_on_from_any_step_as_a_streaming_one_does(case: Case) -> None:
    streaming = case.order()
    streamed = [batch(streaming, step) for step in range(25)]
    for step in (24, 11, 1):
        assert batch(case.order(), step) == streamed[step], f"{case}: step {step}"


@pytest.mark.parametrize("case", LARGE_CASES)
def test_another_seed_gives_another_order(case: Case) -> None:
    streams = [[batch(case.order(seed), step) for step in range(4)] for seed in (1, 2)]
    assert streams[0] != streams[1], str(case)


def test_another_epoch_has_another_order() -> None:
    order = LanesWindowsOrder.of_one([10] * 6, 12, 4, 2, seed=0)
    first, second = ([sample[:2] for step in range(5 * e, 5 * e + 5) for sample in batch(order, step)] for e in (0, 1))
    assert sorted(first) == sorted(second) and first != second


GOLDEN_BATCH = [
    (0, 3, 0),
    (4, 0, 0),
    (3, 1, 0),
    (3, 5, 0),
    (5, 0, 0),
    (5, 1, 0),
    (2, 4, 0),
    (5, 3, 0),
    (6, 0, 0),
    (6, 6, 0),
    (6, 9, 0),
    (6, 4, 0),
]
GOLDEN_DIGEST = "d3040782a55901d41a090b5f08469c42d0b511184316ec588efb536a29796883"


def test_the_order_is_the_one_that_checkpoints_rely_on() -> None:
    # Golden: a change here means that every run which resumes repeats and loses samples.
    order = LanesWindowsOrder.of_one([7, 0, 5, 9, 1, 6, 10], global_batch_size=12, lanes=4, window=2, seed=3)
    assert batch(order, 2) == GOLDEN_BATCH
    content = "\n".join(str(batch(order, step)) for step in range(50))
    assert hashlib.sha256(content.encode()).hexdigest() == GOLDEN_DIGEST


def test_a_batch_at_the_boundary_spans_two_epochs() -> None:
    order = LanesWindowsOrder.of_one([5, 6], global_batch_size=4, lanes=2, window=1, seed=0)  # 11 samples
    epochs = [sorted({epoch for _, _, epoch in batch(order, step)}) for step in range(6)]
    assert epochs[:2] == [[0], [0]] and [0, 1] in epochs and all(len(batch(order, step)) == 4 for step in range(6))


@pytest.mark.parametrize(("size", "lanes"), [(10, 5), (11, 5), (5, 5), (7, 4), (1, 1)])
def test_lanes_differ_by_one_sample_at_most_and_take_turns(size: int, lanes: int) -> None:
    order = LanesWindowsOrder.of_one([size], lanes, lanes, 1, 0)
    table = np.array([[order.streams[0].lane_size(epoch, lane) for lane in range(lanes)] for epoch in range(lanes)])
    assert table.sum(axis=1).tolist() == [size] * lanes  # an epoch is the whole dataset
    assert table.sum(axis=0).tolist() == [size] * lanes  # in C epochs every lane reads as much
    assert int(table.max() - table.min()) <= 1


def test_resuming_far_into_a_run_takes_no_more_work_than_near_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    read_in = LaneStream._read_in

    def counting(self: LaneStream, generation: int, end: int, lane: int) -> int:
        nonlocal calls
        calls += 1
        return read_in(self, generation, end, lane)

    monkeypatch.setattr(LaneStream, "_read_in", counting)
    for sizes, lanes in [([13, 12], 12), ([3, 4], 6), ([1000] * 20, 12)]:
        calls = 0
        order = LanesWindowsOrder.of_one(sizes, 12, lanes, 2, 0)
        order.slots(10_000_000, 0, 12)
        # Per slot: at most C epochs of search, whatever the step.
        assert calls <= 12 * (lanes + 2), f"{sizes}, C {lanes}: {calls} calls"


def test_a_large_dataset_costs_no_memory_per_sample() -> None:
    order = LanesWindowsOrder.of_one([10_000] * 3_300, 4096, 64, 4, 0)  # 33M samples
    resumed = order.slots(7_000, 0, 512)  # in the middle of the first epoch, one rank of eight
    assert len(resumed.shard) == 512 and set(resumed.epoch.tolist()) == {0}
    held = sum(window.shuffled.nbytes for window in order.streams[0]._windows.values())
    assert held <= 4 * 8 * 4 * 10_000, f"{held} bytes for the windows of eight lanes"


def test_windows_mix_shards_and_are_shuffled() -> None:
    order = LanesWindowsOrder.of_one([50] * 8, 50, 1, 4, 0)
    first = batch(order, 0)
    assert len({shard for shard, _, _ in first}) == 4  # all of a window's shards
    assert first != sorted(first)


@pytest.mark.parametrize(
    ("sizes", "batch_size", "lanes", "words"),
    [
        ([0, 0], 4, 1, "the dataset holds no samples"),
        ([], 4, 1, "the dataset holds no samples"),
        ([9], 8, 3, "3 lanes do not divide the global batch of 8"),
        ([3], 8, 4, "4 lanes for 3 samples: use at most as many lanes as samples"),
    ],
)
def test_what_cannot_be_ordered(sizes: list[int], batch_size: int, lanes: int, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        LanesWindowsOrder.of_one(sizes, batch_size, lanes, 2, 0)


@pytest.mark.parametrize(
    ("batch_size", "shards", "number", "expected"),
    [
        (512, 20, 20_000, 16),
        (512, 3300, 33_000_000, 64),
        (12, 5, 37, 4),
        (7, 5, 37, 1),
        (12, 5, 2, 2),
        (96, 50, 99, 48),
    ],
)
def test_chosen_lanes_divide_the_batch_and_have_a_shard_each(
    batch_size: int, shards: int, number: int, expected: int
) -> None:
    assert choose_lanes(batch_size, shards, number) == expected


# -- validation ------------------------------------------------------------------------------------------------------


def test_validation_reads_each_sample_once_in_order_with_a_masked_tail() -> None:
    order = SequentialOrder([3, 0, 4], global_batch_size=4)
    assert (order.steps, order.num_samples) == (2, 7)
    assert samples(order.slots(0, 0, 4)) == [(0, 0), (0, 1), (0, 2), (2, 0)]
    assert samples(order.slots(1, 0, 4)) == [(2, 1), (2, 2), (2, 3), (-1, 0)]
    assert samples(order.slots(1, 2, 4)) == [(2, 3), (-1, 0)]


def test_validation_may_stop_early() -> None:
    order = SequentialOrder([3, 4], global_batch_size=4, max_samples=5)
    assert (order.steps, order.num_samples) == (2, 5)
    assert samples(order.slots(1, 0, 4)) == [(1, 1), (-1, 0), (-1, 0), (-1, 0)]
    assert SequentialOrder([3], 4, max_samples=100).num_samples == 3


def test_validation_without_samples() -> None:
    with pytest.raises(ValueError, match="holds no samples"):
        SequentialOrder([0], 4)
