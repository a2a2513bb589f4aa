"""The loader: the same global stream for every number of ranks and processes, whatever happens to the bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch

from symile_dist.config import Config
from symile_dist.data.index import ShardError, index_path, read_index
from symile_dist.data.loader import Loader, Population, collate, open_training, open_validation
from symile_dist.data.manifest import index_directory, read_manifest
from symile_dist.types import Batch, Padded
from tests.conftest import SHARD_SIZES
from tests.shards import CLASSES, DIMENSION, sample_array, write_shards

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
    expected = global_stream(configured(make_config, shards))
    assert len(expected) == STEPS and all(len(set(batch)) == 12 for batch in expected[:3])
    for world in (1, 2, 4):
        for processes in (0, 2):
            config = configured(make_config, shards, f"ray.num_workers={world}", f"data.loader_processes={processes}")
            assert global_stream(config) == expected, f"world {world}, {processes} loader processes"


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
    assert batch.faults == {} and batch.bytes_read > 12 * 3 * 4 * DIMENSION


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
            assert batch.faults == ({"checksum": sum(wrong)} if any(wrong) else {})
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
    assert ids(batch) == first and not batch.valid.any() and batch.faults == {"checksum": 3}
    assert [tuple(values.shape) for values in batch.inputs.values()] == [(3, DIMENSION)] * 3  # type: ignore[union-attr]


def test_a_shard_that_vanished_under_way(tmp_path: Path, make_config: MakeConfig) -> None:
    folder = write_shards(tmp_path / "train", [12, 12])
    index_directory(folder)
    loader = open_training(configured(make_config, folder), 0, 0)
    (folder / "shard-00001.tar").unlink()
    batch = next(iter(loader))
    assert batch.valid.tolist() == [sample < 12 for sample in ids(batch)]
    assert batch.faults == {"open": sum(sample >= 12 for sample in ids(batch))} and not batch.valid.all()


def test_what_cannot_be_decoded_is_a_fault_of_its_own_kind(shards: Path, make_config: MakeConfig) -> None:
    loader = open_training(configured(make_config, shards, "modalities.a.transform.shape=[3]"), 0, 0)
    with pytest.raises(
        ShardError, match=r"no readable sample found (.|\n)*the decoder or transform may not fit the data"
    ):
        next(iter(loader))


# -- population ------------------------------------------------------------------------------------------------------


def test_samples_that_lack_a_member_are_left_out_before_ordering(tmp_path: Path, make_config: MakeConfig) -> None:
    lacking = {2: ("a",), 9: ("c",), **dict.fromkeys(range(12, 21), ("b",))}  # the whole third shard lacks b
    folder = write_shards(tmp_path / "train", SHARD_SIZES, without=lacking)
    index_directory(folder)
    config = configured(make_config, folder, "data.lanes=1")
    complete = sorted(set(range(sum(SHARD_SIZES))) - set(lacking))
    assert Population(read_manifest(folder), config).sizes == [6, 4, 0, 6, 10]
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
    with pytest.raises(ShardError, match=r"shard-00001\.tar\.idx: is not the index that the manifest was made with"):
        open_training(configured(make_config, folder), 0, 0)


# -- validation ------------------------------------------------------------------------------------------------------


def test_validation_covers_every_sample_with_a_masked_tail(shards: Path, make_config: MakeConfig) -> None:
    for world in (1, 2, 4):
        config = configured(make_config, shards, f"ray.num_workers={world}")
        batches: list[list[Batch]] = []
        for rank in range(world):
            dataset, steps = open_validation(config, str(shards), rank, max_samples=None)
            assert steps == 4
            batches.append(list(Loader(dataset, config.data, 0, steps)))
        stream = [sample for parts in zip(*batches, strict=True) for batch in parts for sample in ids(batch)]
        valid = [v for parts in zip(*batches, strict=True) for batch in parts for v in batch.valid.tolist()]
        assert stream == [*range(37), *[-1] * 11], f"world {world}"
        assert valid == [sample >= 0 for sample in stream]
        assert all(batch.faults == {} for parts in batches for batch in parts), "an empty slot is no fault"


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


def test_collate_keeps_integers_integers() -> None:
    padded = collate([torch.tensor([1, 2]), torch.tensor([3])], variable_length=True)
    assert isinstance(padded, Padded) and padded.values.tolist() == [[1, 2], [3, 0]]
    assert padded.values.dtype == torch.int64


def test_collate_of_one_shape_stacks_and_refuses_several() -> None:
    stacked = collate([torch.ones(2, 3)] * 4, variable_length=False)
    assert isinstance(stacked, torch.Tensor) and stacked.shape == (4, 2, 3)
    with pytest.raises(ValueError, match=r"unequal shapes \[\(2,\), \(3,\)\]: set a size in the transform"):
        collate([torch.ones(2), torch.ones(3)], variable_length=False)
