"""The loader: the same global stream for every number of ranks and processes, whatever happens to the bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from symile_dist.config import Config
from symile_dist.data.batches import collate
from symile_dist.data.index import ShardError, index_path, read_index
from symile_dist.data.loader import Loader, open_training, open_validation
from symile_dist.data.manifest import Manifest, ShardEntry, index_directory, read_manifest
from symile_dist.encoders.points import TextPoints
from symile_dist.encoders.text import TextConvNet
from symile_dist.errors import RunStopped
from symile_dist.types import Batch, Fault, Padded
from tests.conftest import SHARD_SIZES
from tests.shards import (
    CLASSES,
    DIMENSION,
    config_text,
    key_of,
    npy_bytes,
    sample_array,
    sample_members,
    write_shards,
    write_tar,
)

MakeConfig = Callable[..., Config]
STEPS = 5
"""Of 12 samples: more than one epoch of the 37."""


def ids(batch: Batch) -> list[int]:
    return batch.sample_ids.tolist()


def global_stream(config: Config, start_step: int = 0) -> list[list[int]]:
    """The sample ids of every global batch: those of the ranks, one after the other."""
    ranks = [[ids(batch) for batch in open_training(config, r, start_step)] for r in range(config.world_size)]
    return [list(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]


def configured(make_config: MakeConfig, folder: Path, *overrides: str) -> Config:
    return make_config(folder, f"train.steps={STEPS}", *overrides)


def damage(folder: Path, sample: int, member: str = "a.npy") -> None:
    """Flips a bit in a member of a sample, given by its id."""
    start = 0
    for entry in read_manifest(folder).shards:
        if sample < start + entry.samples:
            shard = folder / entry.name
            index = read_index(shard)
            at = int(index.block_offsets[sample - start, index.members.index(member)]) * 512 + 100
            data = bytearray(shard.read_bytes())
            data[at] ^= 1
            shard.write_bytes(bytes(data))
            return
        start += entry.samples
    raise AssertionError(f"no sample {sample}")


# -- the stream ------------------------------------------------------------------------------------------------------


def test_the_same_stream_at_every_world_size_and_number_of_processes(shards: Path, make_config: MakeConfig) -> None:
    two_epochs = ("train.global_batch_size=24", "train.steps=4")
    expected = global_stream(make_config(shards, *two_epochs))
    assert len(expected) == 4 and all(len(batch) == 24 for batch in expected)
    counts = Counter(chain.from_iterable(expected))
    assert set(counts) == set(range(37)) and set(counts.values()) <= {2, 3}
    for world in (1, 2, 3, 4, 6, 8):
        for processes in (0, 1, 3):
            overrides = (f"ray.num_workers={world}", f"data.loader_processes={processes}")
            assert global_stream(make_config(shards, *two_epochs, *overrides)) == expected, (world, processes)


def test_a_run_that_is_killed_and_goes_on_at_other_worlds_reads_every_sample_once(
    shards: Path, make_config: MakeConfig
) -> None:
    steps, draw = 20, random.Random(0)
    overrides = ("train.global_batch_size=24", f"train.steps={steps}", "data.lanes=1")
    stream: list[int] = []
    step = 0
    while step < steps:
        world, stop = draw.choice((1, 2, 3, 4, 6, 8)), min(steps, step + draw.randint(1, 5))
        # Killed after `stop` batches: what was prefetched beyond them is lost, and read again.
        config = make_config(shards, *overrides, f"ray.num_workers={world}")
        ranks = [list(islice(open_training(config, rank, step), stop - step)) for rank in range(world)]
        stream += [sample for parts in zip(*ranks, strict=True) for batch in parts for sample in ids(batch)]
        step = stop
    for epoch in range(len(stream) // 37):
        assert sorted(stream[37 * epoch : 37 * (epoch + 1)]) == list(range(37)), f"epoch {epoch}"


def test_an_epoch_holds_every_sample_once(shards: Path, make_config: MakeConfig) -> None:
    # One lane: its first 37 slots are the first epoch.
    stream = list(chain.from_iterable(global_stream(configured(make_config, shards, "data.lanes=1"))))
    assert sorted(stream[: sum(SHARD_SIZES)]) == list(range(sum(SHARD_SIZES)))


def test_resuming_at_a_step_goes_on_with_the_same_batches(shards: Path, make_config: MakeConfig) -> None:
    expected = global_stream(configured(make_config, shards))
    config = configured(make_config, shards, "ray.num_workers=2")
    for start in (1, 3, STEPS):
        assert global_stream(config, start) == expected[start:], f"from step {start}"


def test_state_counts_the_batches_that_were_consumed(shards: Path, make_config: MakeConfig) -> None:
    loader = open_training(configured(make_config, shards, "data.loader_processes=2"), 0, 1)
    stream = iter(loader)
    next(stream), next(stream)
    assert loader.state["batches_consumed"] == 3, "prefetched batches are not consumed ones"


def test_a_batch_holds_the_samples_that_its_ids_name(shards: Path, make_config: MakeConfig) -> None:
    batch = next(iter(open_training(configured(make_config, shards), 0, 0)))
    assert list(batch.inputs) == ["a", "b", "c"] and len(batch) == 12
    for name, values in batch.inputs.items():
        assert isinstance(values, torch.Tensor) and values.shape == (12, DIMENSION)
        expected = torch.stack([torch.from_numpy(sample_array(name, number)) for number in ids(batch)])
        assert torch.equal(values, expected), name
    assert batch.valid.all() and batch.present.shape == (12, 3) and batch.present.all()
    assert batch.faults == [] and batch.read.bytes > 12 * 3 * 4 * DIMENSION


def test_held_out_batches_carry_the_label_that_retrieval_is_judged_by(shards: Path, make_config: MakeConfig) -> None:
    dataset, _ = open_validation(configured(make_config, shards), str(shards), 0, None)
    batch = dataset[0]
    assert batch.labels == [f"class-{number % CLASSES}" for number in ids(batch)]


def test_without_a_label_each_sample_is_a_class_of_its_own(shards: Path, make_config: MakeConfig) -> None:
    for override in ("data.label=null", "data.label=nothing_there", "data.metadata_member=txt"):
        dataset, _ = open_validation(configured(make_config, shards, override), str(shards), 0, None)
        batch = dataset[0]
        assert batch.labels == [f"sample {number}" for number in ids(batch)], override


# -- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_sample_is_masked_in_place_and_counted(tmp_path: Path, make_config: MakeConfig) -> None:
    folder = write_shards(tmp_path / "train", SHARD_SIZES)
    index_directory(folder)
    config = configured(make_config, folder, "ray.num_workers=2")
    expected = global_stream(config)
    bad = expected[0][4]  # of rank 0
    damage(folder, bad)
    assert global_stream(config) == expected, "the order must not shift"
    for rank in (0, 1):
        for step, batch in enumerate(open_training(config, rank, 0)):
            wrong = [sample == bad for sample in ids(batch)]
            assert batch.valid.tolist() == [not w for w in wrong], f"rank {rank}, step {step}"
            for fault in batch.faults:
                assert (fault.kind, fault.member, fault.dataset) == ("checksum", "a.npy", "train")
                assert re.fullmatch(
                    r"shard-0000[0-9]\.tar, sample [0-9]+, member 'a\.npy' at byte [0-9]+: .*", str(fault)
                )
            assert len(batch.faults) == sum(wrong)
            for name, values in batch.inputs.items():
                assert isinstance(values, torch.Tensor)
                assert torch.isfinite(values).all(), "the filler must be harmless"
                for slot, sample in enumerate(ids(batch)):
                    if sample != bad:
                        assert torch.equal(values[slot], torch.from_numpy(sample_array(name, sample)))


def test_a_share_without_one_readable_sample(tmp_path: Path, make_config: MakeConfig) -> None:
    folder = write_shards(tmp_path / "train", [24])
    index_directory(folder)
    config = configured(make_config, folder, "ray.num_workers=4")
    first = ids(next(iter(open_training(config, 1, 0))))
    for sample in first:
        damage(folder, sample)
    batch = next(iter(open_training(config, 1, 0)))
    assert ids(batch) == first and not batch.valid.any()
    assert [fault.kind for fault in batch.faults] == ["checksum"] * 3
    assert [tuple(values.shape) for values in batch.inputs.values()] == [(3, DIMENSION)] * 3  # type: ignore[union-attr]


def test_a_shard_that_vanished_under_way(tmp_path: Path, make_config: MakeConfig) -> None:
    folder = write_shards(tmp_path / "train", [12, 12])
    index_directory(folder)
    loader = open_training(configured(make_config, folder), 0, 0)
    (folder / "shard-00001.tar").unlink()
    batch = next(iter(loader))
    assert batch.valid.tolist() == [sample < 12 for sample in ids(batch)]
    assert [(fault.kind, fault.shard, fault.row) for fault in batch.faults] == [("open", "shard-00001.tar", -1)]
    assert not batch.valid.all()


def test_what_cannot_be_decoded_is_a_fault_of_its_own_kind(shards: Path, make_config: MakeConfig) -> None:
    with pytest.raises(
        ShardError,
        match=r"no readable sample found for modality 'a' (.|\n)*the decoder or transform may not fit",
    ):
        open_training(configured(make_config, shards, "modalities.a.transform.shape=[3]"), 0, 0)


def test_a_sample_of_another_shape_is_masked_and_told(tmp_path: Path, make_config: MakeConfig) -> None:
    folder = tmp_path / "train"
    members = []
    for number in range(24):
        parts = sample_members(number, ("a", "b", "c"))
        if number == 5:
            parts["b.npy"] = npy_bytes(np.zeros(7, dtype=np.float32))
        members += [(f"{key_of(number)}.{suffix}", data) for suffix, data in parts.items()]
    write_tar(folder / "shard-00000.tar", members)
    index_directory(folder)
    loader = open_training(configured(make_config, folder, "train.steps=2"), 0, 0)
    faults = [fault for batch in loader for fault in batch.faults]
    assert [(fault.kind, fault.member, fault.row) for fault in faults] == [("decode", "b.npy", 5)]
    assert "(7,) where others are torch.float32 (4,)" in faults[0].reason


def test_more_shards_than_descriptors(tmp_path: Path) -> None:
    """Of two datasets of 80 shards, in a process that may have 64 files: no sample is lost, none suspected."""
    for name in ("one", "two"):
        index_directory(write_shards(tmp_path / name, [2] * 80))
    (tmp_path / "config.yaml").write_text(config_text(tmp_path / "one"))
    script = f"""
import resource
from symile_dist.config import load_config
from symile_dist.data.loader import open_training
mixture = "{{one: {{path: {tmp_path}/one, weight: 1}}, two: {{path: {tmp_path}/two, weight: 1}}}}"
overrides = [f"data.train={{mixture}}", "train.global_batch_size=160", "data.lanes=40", "data.window=20"]
config = load_config({str(tmp_path / "config.yaml")!r}, [*overrides, "train.steps=4"]).config
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
batches = list(open_training(config, 0, 0))
assert len(batches) == 4 and not [fault for batch in batches for fault in batch.faults], batches[0].faults
assert all(batch.valid.all() for batch in batches)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("deleted", [False, True])
def test_an_index_that_is_damaged_under_way(
    tmp_path: Path, make_config: MakeConfig, processes: int, deleted: bool
) -> None:
    # Some samples of each shard lack a member, so that how many are used stands in the index only.
    folder = write_shards(tmp_path / "train", [8, 8, 8], without={1: ("a",), 9: ("b",), 17: ("c",)})
    index_directory(folder)
    damage(folder, 12)
    config = configured(make_config, folder, f"data.loader_processes={processes}", "train.steps=9")
    loader = open_training(config, 0, 0)
    seen: list[int] = []
    for step, batch in enumerate(loader):
        if step == 0:
            index = index_path(folder / "shard-00001.tar")
            index.unlink() if deleted else index.write_bytes(b"damaged")
        loader.exclude(batch.faults)
        seen += [sample for sample, valid in zip(ids(batch), batch.valid.tolist(), strict=True) if valid]
    assert loader.consumed == 9, "the run goes on"
    assert 12 not in seen and set(range(24)) - {1, 9, 12, 17} - set(range(8, 16)) <= set(seen)


# -- population ------------------------------------------------------------------------------------------------------


def test_samples_that_lack_a_member_are_left_out_before_ordering(tmp_path: Path, make_config: MakeConfig) -> None:
    lacking = {2: ("a",), 9: ("c",), **dict.fromkeys(range(12, 21), ("b",))}  # the whole third shard lacks b
    folder = write_shards(tmp_path / "train", SHARD_SIZES, without=lacking)
    index_directory(folder)
    config = configured(make_config, folder, "data.lanes=1")
    complete = sorted(set(range(sum(SHARD_SIZES))) - set(lacking))
    assert open_training(config, 0, 0).dataset.populations[0].sizes(0) == [6, 4, 0, 6, 10]
    stream = list(chain.from_iterable(global_stream(config)))
    assert sorted(stream[: len(complete)]) == complete
    assert sorted(stream[len(complete) : 2 * len(complete)]) == complete


def test_a_modality_that_no_sample_has(shards: Path, make_config: MakeConfig) -> None:
    config = configured(make_config, shards, "modalities.b.member=seg.npy")
    with pytest.raises(ShardError, match=r"no sample has a member 'seg.npy' \(modality 'b'\); its members are: a.npy"):
        open_training(config, 0, 0)


def test_no_sample_that_has_every_modality(tmp_path: Path, make_config: MakeConfig) -> None:
    folder = write_shards(tmp_path / "train", [4], without={0: ("a",), 1: ("b",), 2: ("c",), 3: ("a",)})
    index_directory(folder)
    with pytest.raises(ShardError, match="none of the 4 samples has all of the members"):
        open_training(configured(make_config, folder), 0, 0)


def test_an_index_of_another_shard_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    # Sample ids are counted by the manifest, rows by the indices: they must not disagree.
    folder = write_shards(tmp_path / "train", [4, 6])
    index_directory(folder)
    one, other = (index_path(folder / f"shard-0000{number}.tar") for number in (0, 1))
    other.write_bytes(one.read_bytes())
    with pytest.raises(ShardError, match=r"shard-00001\.tar: its index is not the one that the manifest was made with"):
        read_manifest(folder)
    faults = [fault for batch in open_training(configured(make_config, folder), 0, 0) for fault in batch.faults]
    assert {(fault.kind, fault.shard, fault.row) for fault in faults} == {("index", "shard-00001.tar", -1)}


# -- validation ------------------------------------------------------------------------------------------------------


def test_validation_covers_every_sample_with_a_masked_tail(shards: Path, make_config: MakeConfig) -> None:
    for world in (1, 2, 4):
        config = configured(make_config, shards, f"ray.num_workers={world}")
        batches: list[list[Batch]] = []
        for rank in range(world):
            dataset, steps = open_validation(config, str(shards), rank, max_samples=None)
            assert steps == 4
            batches.append(list(Loader(dataset, config, 0, steps)))
        stream = [sample for parts in zip(*batches, strict=True) for batch in parts for sample in ids(batch)]
        valid = [v for parts in zip(*batches, strict=True) for batch in parts for v in batch.valid.tolist()]
        assert stream == [*range(37), *[-1] * 11], f"world {world}"
        assert valid == [sample >= 0 for sample in stream]
        assert all(batch.faults == [] for parts in batches for batch in parts), "an empty slot is no fault"


def test_validation_of_the_first_samples_only(shards: Path, make_config: MakeConfig) -> None:
    config = configured(make_config, shards)
    dataset, steps = open_validation(config, str(shards), 0, max_samples=15)
    assert [ids(dataset[step]) for step in range(steps)] == [list(range(12)), [12, 13, 14, *[-1] * 9]]


# -- the checkpoint's part -------------------------------------------------------------------------------------------


def test_check_state_accepts_its_own_and_refuses_another_stream(
    shards: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    config = configured(make_config, shards)
    saved = json.loads(json.dumps(open_training(config, 0, 3).state))
    assert saved["batches_consumed"] == 3
    open_training(config, 0, 0).check_state(saved)
    open_training(configured(make_config, shards, "ray.num_workers=4"), 2, 0).check_state(saved)
    other = write_shards(tmp_path / "train", [7, 5, 9, 6, 11])
    index_directory(other)
    for folder, override, key in [
        (other, "seed=0", "index_digest"),
        (shards, "seed=1", "seed"),
        (shards, "train.global_batch_size=24", "global_batch_size"),
        (shards, "data.lanes=2", "lanes"),
        (shards, "data.window=2", "window"),
    ]:
        with pytest.raises(ValueError, match=f"another data stream: {key} was .*run.init_from"):
            open_training(configured(make_config, folder, override), 0, 0).check_state(saved)


# -- collate ---------------------------------------------------------------------------------------------------------


def test_collate_pads_variable_lengths_with_zeros() -> None:
    samples = [torch.ones(length, 2) * length for length in (3, 0, 5, 1)]
    padded = collate(samples, variable_length=True)
    assert isinstance(padded, Padded)
    assert padded.values.shape == (4, 5, 2) and padded.lengths.tolist() == [3, 0, 5, 1]
    assert padded.lengths.dtype == torch.int64
    for row, sample in enumerate(samples):
        assert torch.equal(padded.values[row, : len(sample)], sample)
        assert not padded.values[row, len(sample) :].any()
    assert padded.mask().sum(dim=1).tolist() == [3, 0, 5, 1]


def test_sequences_that_are_all_empty_have_one_position_of_padding() -> None:
    padded = collate([torch.zeros(0, dtype=torch.int64)] * 2, variable_length=True)
    assert isinstance(padded, Padded)
    assert padded.values.tolist() == [[0], [0]] and padded.lengths.tolist() == [0, 0]
    for encoder in (TextConvNet(8), TextPoints(8)):
        emitted = encoder(padded)
        assert all(torch.isfinite(tensor).all() for tensor in (emitted if isinstance(emitted, tuple) else [emitted]))


def test_collate_keeps_integers_integers() -> None:
    padded = collate([torch.tensor([1, 2]), torch.tensor([3])], variable_length=True)
    assert isinstance(padded, Padded) and padded.values.tolist() == [[1, 2], [3, 0]]
    assert padded.values.dtype == torch.int64


def test_collate_of_one_shape_stacks() -> None:
    stacked = collate([torch.ones(2, 3)] * 4, variable_length=False)
    assert isinstance(stacked, torch.Tensor) and stacked.shape == (4, 2, 3)


# -- quarantine ------------------------------------------------------------------------------------------------------


def quarantined_stream(config: Config, start: int = 0, saved: dict[str, object] | None = None) -> list[list[int]]:
    """The global batches of a run that tells every rank what any of them could not read; loaders' state is compared."""
    world = config.world_size
    loaders = [open_training(config, rank, start, saved, persist=rank == 0) for rank in range(world)]
    stream = []
    for batches in zip(*loaders, strict=True):
        faults = [fault for batch in batches for fault in batch.faults]
        if faults:
            for loader in loaders:
                loader.exclude(faults)
        valid = [v for batch in batches for v in batch.valid.tolist()]
        sample_ids = [i for batch in batches for i in ids(batch)]
        stream.append([i if v else -1 - i for i, v in zip(sample_ids, valid, strict=True)])
        states = [loader.state for loader in loaders]
        assert all(state == states[0] for state in states)
        assert len(json.dumps(states[0])) <= 1000
        STATES.append(states[0])
    return stream


STATES: list[dict[str, object]] = []


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_what_could_not_be_read_is_left_out_from_the_next_epoch_on(
    tmp_path: Path, make_config: MakeConfig, world: int, processes: int
) -> None:
    folder = write_shards(tmp_path / "train", SHARD_SIZES)
    index_directory(folder)
    for sample in (3, 11):
        damage(folder, sample)
    index_path(folder / "shard-00003.tar").write_bytes(b"damaged")  # samples 21 to 26
    config = make_config(
        folder,
        "train.steps=12",
        "data.lanes=1",
        f"ray.num_workers={world}",
        f"data.loader_processes={processes}",
        f"run.directory={tmp_path / 'run'}",
    )
    STATES.clear()
    stream = quarantined_stream(config)
    bad = {3, 11, *range(21, 27)}
    flat = [i for batch in stream for i in batch]
    first, rest = flat[:37], flat[37:]
    assert sum(i < 0 for i in first) == len(bad) and len({i for i in first if i >= 0}) == 37 - len(bad)
    good = sorted(set(range(37)) - bad)
    assert sorted(rest[: len(good)]) == good, "the second epoch holds what is left, exactly"
    assert sorted(rest[len(good) : 2 * len(good)]) == good
    # A run that goes on from any of its checkpoints, at another world, has the same stream.
    for step in (2, 4, 7):
        other = make_config(
            folder, "train.steps=12", "data.lanes=1", "ray.num_workers=2", f"run.directory={tmp_path / 'run'}"
        )
        assert quarantined_stream(other, step, STATES[step - 1]) == stream[step:], f"from step {step}"


def test_too_few_samples_left(tmp_path: Path, make_config: MakeConfig) -> None:
    folder = write_shards(tmp_path / "train", [12, 12])
    index_directory(folder)
    loader = open_training(make_config(folder, f"run.directory={tmp_path / 'run'}"), 0, 0)
    next(iter(loader))
    faults = [Fault("open", "train", f"shard-0000{n}.tar", -1, "", -1, "gone") for n in (0, 1)]
    with pytest.raises(RunStopped, match="too few samples are left"):
        loader.exclude(faults)


# -- missing modalities ----------------------------------------------------------------------------------------------


def test_samples_that_lack_a_modality_come_with_a_placeholder(tmp_path: Path, make_config: MakeConfig) -> None:
    lacking = {2: ("a",), 9: ("c",), 10: ("b", "c"), 20: ("a", "b", "c")}
    folder = write_shards(tmp_path / "train", SHARD_SIZES, without=lacking)
    index_directory(folder)
    for require, left_out in (
        ("2", {10, 20}),
        ("1", {20}),
        ("[b]", {10, 20}),
        ("[a,b]", {2, 10, 20}),
        ("all", set(lacking)),
    ):
        config = configured(make_config, folder, "data.lanes=1", f"data.require={require}")
        loader = open_training(config, 0, 0)
        seen: list[int] = []
        for batch in loader:
            seen += ids(batch)
            for slot, sample in enumerate(ids(batch)):
                expected = [name not in lacking.get(sample, ()) for name in "abc"]
                assert batch.present[slot].tolist() == expected, f"sample {sample}"
                for there, values in zip(expected, batch.inputs.values(), strict=True):
                    assert isinstance(values, torch.Tensor) and (there or not values[slot].any())
        used = sorted(set(range(37)) - left_out)
        assert sorted(seen[: len(used)]) == used, require


def test_withheld_modalities_are_the_same_ones_in_every_epoch_and_world(shards: Path, make_config: MakeConfig) -> None:
    seen: dict[int, list[bool]] = {}
    for world in (1, 2):
        config = configured(
            make_config, shards, "data.missing_probability=0.4", f"ray.num_workers={world}", "train.steps=8"
        )
        for rank in range(world):
            for batch in open_training(config, rank, 0):
                for sample, present in zip(ids(batch), batch.present.tolist(), strict=True):
                    assert seen.setdefault(sample, present) == present
    share = 1 - np.mean(list(seen.values()))
    assert len(seen) == 37 and 0.25 < share < 0.55
    only_a = configured(make_config, shards, "data.missing_probability={a: 1.0}")
    batch = next(iter(open_training(only_a, 0, 0)))
    assert batch.present.tolist() == [[False, True, True]] * 12 and batch.read.missing == {"a": 12}


# -- mixtures --------------------------------------------------------------------------------------------------------


def test_a_mixture_keeps_to_its_weights_at_every_world_and_after_every_step(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    sizes = {"large": [9, 8, 7, 13], "small": [6, 5], "rare": [4, 3]}
    for name, parts in sizes.items():
        index_directory(write_shards(tmp_path / name, parts))
    weights = {"large": 5.0, "small": 2.0, "rare": 1.0}
    mixture = ", ".join(f"{name}: {{path: {tmp_path / name}, weight: {weight}}}" for name, weight in weights.items())
    streams = []
    for world, processes in ((1, 0), (2, 2), (3, 0), (6, 0)):
        config = make_config(
            tmp_path / "large",
            f"data.train={{{mixture}}}",
            "train.steps=20",
            "train.global_batch_size=12",
            f"ray.num_workers={world}",
            f"data.loader_processes={processes}",
        )
        streams.append(global_stream(config))
    assert all(stream == streams[0] for stream in streams)
    assert global_stream(config, 7) == streams[0][7:]
    starts = np.cumsum([0, 37, 11, 7])
    counts = np.zeros(3)
    by_dataset: list[list[int]] = [[], [], []]
    for step, batch in enumerate(streams[0], start=1):
        for sample in batch:
            dataset = int(np.searchsorted(starts, sample, side="right")) - 1
            counts[dataset] += 1
            by_dataset[dataset].append(sample)
        assert np.abs(counts - step * 12 * np.array([5, 2, 1]) / 8).max() < 1, f"after {step} steps: {counts}"
    for number, (size, seen) in enumerate(zip((37, 11, 7), by_dataset, strict=True)):
        # Lanes may be one sample apart where an epoch ends.
        for epoch in range(len(seen) // size):
            part = seen[epoch * size : (epoch + 1) * size]
            assert len(set(part)) >= size - 4, f"dataset {number}, epoch {epoch}"


# -- large datasets --------------------------------------------------------------------------------------------------


def test_a_run_over_33_million_samples_opens_no_index_and_plans_at_once(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    folder = tmp_path / "large"
    synthetic_manifest(folder, shards=3300, samples=10_000)
    script = f"""
import json, resource, sys, time
from symile_dist.config import parse_config
from symile_dist.data import loader
from symile_dist.data.batches import StepDataset
from tests.shards import config_text
overrides = ["train.global_batch_size=4096", "train.steps=100000"]
config = parse_config(config_text({str(folder)!r}), "large", overrides).config
StepDataset._find_examples = lambda self: []  # there are no bytes behind this manifest
loader.open_training(config, 0, 0).order.slots(0, 0, 512)  # imports and allocators
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
results = []
for step in (1, 7_001, 8_056, 1_000_003):
    begin = time.process_time()
    training = loader.open_training(config, 0, step)
    opened = time.process_time()
    slots = training.order.slots(step, 0, 4096)  # a world of one rank: the most that a rank can have
    results.append((opened - begin, time.process_time() - opened, len(slots.row), len(json.dumps(training.state))))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"results": results, "kilobytes": after - before}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for _, _, slots, state in found["results"]:
        assert slots == 4096 and state <= 1000
    assert found["kilobytes"] <= 50_000, found


def synthetic_manifest(folder: Path, shards: int, samples: int) -> None:
    """A manifest of shards that do not exist."""
    entries = tuple(
        ShardEntry(f"shard-{number:05d}.tar", samples, 10**9, 370_000, f"{number:064x}", ((15, samples),))
        for number in range(shards)
    )
    folder.mkdir()
    (folder / "manifest.json").write_text(Manifest(str(folder), entries, ("a.npy", "b.npy", "c.npy", "json")).to_json())
    assert (folder / "manifest.json").stat().st_size < 1_000_000
    assert not list(folder.glob("*.idx"))


def test_nothing_is_kept_of_an_epoch_that_is_over(shards: Path, make_config: MakeConfig) -> None:
    population = open_training(configured(make_config, shards), 0, 0).dataset.populations[0]
    for epoch in range(1_000):
        population.rows(0, epoch)
    tracemalloc.start()
    try:
        for epoch in range(1_000, 6_000):
            population.rows(0, epoch)
        assert tracemalloc.get_traced_memory()[0] < 100_000, "bytes that 5,000 epochs leave behind"
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [0, 1])
def test_memory_stays_flat_over_a_hundred_thousand_batches(
    shards: Path, make_config: MakeConfig, processes: int
) -> None:
    """The slope of the resident memory of this process and its loader processes, after a warm-up."""
    steps = 100_000 if processes == 0 else 10_000
    config = make_config(shards, f"train.steps={steps}", f"data.loader_processes={processes}")
    measured: list[tuple[int, float]] = []
    for step, _ in enumerate(open_training(config, 0, 0)):
        if step % (steps // 50) == 0 and step > steps // 10:
            measured.append((step, resident_megabytes()))
    slope = float(np.polyfit(*zip(*measured, strict=True), 1)[0])
    assert slope * 100_000 < 8, f"{slope * 100_000:.1f} MB per 100,000 batches: {measured[0]} ... {measured[-1]}"


def resident_megabytes() -> float:
    """Of this process and its children."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


# -- augmentation ----------------------------------------------------------------------------------------------------


class Drawn:
    """Gives what it draws."""

    def __call__(self, decoded: object, rng: np.random.Generator | None) -> torch.Tensor:
        return torch.tensor([-1.0 if rng is None else rng.random()])


def test_a_sample_draws_the_same_in_an_epoch_whatever_the_world(shards: Path, make_config: MakeConfig) -> None:
    drawing = "modalities.a.transform=tests.unit.test_loader:Drawn"
    draws: list[dict[int, float]] = []
    for world in (1, 2):
        config = configured(make_config, shards, drawing, f"ray.num_workers={world}", "train.steps=2")
        found: dict[int, float] = {}
        for rank in range(world):
            for batch in open_training(config, rank, 0):
                values = batch.inputs["a"]
                assert isinstance(values, torch.Tensor)
                found |= dict(zip(ids(batch), values[:, 0].tolist(), strict=True))
        draws.append(found)
    assert draws[0] == draws[1] and len(set(draws[0].values())) == len(draws[0]) and min(draws[0].values()) >= 0
    dataset, _ = open_validation(configured(make_config, shards, drawing), str(shards), 0, None)
    held_out = dataset[0].inputs["a"]
    assert isinstance(held_out, torch.Tensor) and (held_out == -1).all()


def test_no_generator_is_made_where_nothing_draws(shards: Path, make_config: MakeConfig) -> None:
    dataset = open_training(configured(make_config, shards), 0, 0).dataset
    assert not dataset.augments, "tensors are taken as they are"
