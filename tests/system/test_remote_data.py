"""Shards in an object store: a real S3 API on loopback, real fetchers, real loader processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from symile_dist.config import Config, parse_config
from symile_dist.data.cache import ShardCache
from symile_dist.data.index import read_index
from symile_dist.data.loader import TrainingLoader, open_training
from symile_dist.data.manifest import index_directory, read_manifest
from symile_dist.tools.shards import stats_of, verify_folder
from tests.s3 import Bucket, FaultProxy, at_random
from tests.shards import config_text, write_shards

SIZES = (40, 30, 50, 20, 60, 40, 30, 50)
STEPS = 27
"""Of 24 samples: two epochs of the 320 and a little."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_shards(tmp_path_factory.mktemp("shards") / "train", SIZES)
    index_directory(folder)
    return folder


Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def config(train: str | Path, endpoint: str | None, *overrides: str, cache: str = "cache") -> Config:
        storage = [f"data.storage.endpoint_url={endpoint}"] if endpoint else []
        return parse_config(
            config_text(train),
            "remote.yaml",
            [
                f"train.steps={STEPS}",
                "train.global_batch_size=24",
                "data.lanes=4",
                "data.window=2",
                "data.storage.timeout_seconds=3",
                "data.storage.give_up_seconds=20",
                f"data.storage.cache_directory={tmp_path / cache}",
                f"run.directory={tmp_path / 'run'}",
                *storage,
                *overrides,
            ],
        ).config

    return config


def stream(config: Config, start: int = 0) -> list[list[tuple[int, bytes]]]:
    """Per global batch (sample, its bytes as tensors) of every slot."""
    loaders = [open_training(config, rank, start) for rank in range(config.world_size)]
    found = []
    for batches in zip(*loaders, strict=True):
        assert not any(batch.faults for batch in batches), [str(f) for batch in batches for f in batch.faults]
        found.append(
            [
                (int(sample), b"".join(values[slot].numpy().tobytes() for values in batch.inputs.values()))  # type: ignore[union-attr]
                for batch in batches
                for slot, sample in enumerate(batch.sample_ids)
            ]
        )
    return found


def counters(loader: TrainingLoader) -> dict[str, int]:
    return loader.fetch_counters()


def test_indexing_verifying_and_describing_shards_in_a_bucket(local: Path, bucket: Bucket, tmp_path: Path) -> None:
    raw = write_shards(tmp_path / "raw", [4, 5])
    url = bucket.upload(raw, "raw")
    storage = bucket.storage(tmp_path / "cache")
    made = index_directory(url, storage=storage, processes=2)
    assert made.samples == 9 and read_manifest(url, storage) == made
    assert made.digest == index_directory(raw).digest
    assert verify_folder(url, storage) == [] and stats_of(url, storage)["samples"] == 9
    bucket.put("raw/shard-00001.tar", b"short")
    assert {fault.shard for fault in verify_folder(url, storage)} == {"shard-00001.tar"}


def test_the_stream_from_a_bucket_is_the_local_one(local: Path, bucket: Bucket, make: Make) -> None:
    expected = stream(make(local, None))
    url = bucket.upload(local, "train")
    for world, processes in ((1, 0), (2, 1), (4, 0)):
        config = make(
            url,
            bucket.endpoint,
            f"ray.num_workers={world}",
            f"data.loader_processes={processes}",
            cache=f"cache-{world}",
        )
        assert stream(config) == expected, f"world {world}, {processes} loader processes"
        assert stream(config, 9) == expected[9:]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_epoch_fetches_the_dataset_once(local: Path, bucket: Bucket, make: Make, world: int) -> None:
    """Every rank on a node of its own: the sum of what the nodes fetch is the dataset."""
    url = bucket.upload(local, "train")
    whole = sum(entry.bytes + entry.index_bytes for entry in read_manifest(local).shards)
    fetched = 0
    for rank in range(world):
        config = make(url, bucket.endpoint, f"ray.num_workers={world}", "train.steps=13", cache=f"node-{rank}")
        loader = open_training(config, rank, 0)
        before = counters(loader)["bytes_fetched"]  # the manifest and a few samples that show the shapes
        assert sum(1 for _ in loader) == 13
        fetched += counters(loader)["bytes_fetched"] - before
        assert counters(loader)["requests"] < 100, "requests per sample"
    assert fetched <= 1.05 * whole, f"{fetched} bytes of {whole}"


def test_faults_of_the_network_change_nothing(local: Path, bucket: Bucket, make: Make) -> None:
    expected = stream(make(local, None))
    url = bucket.upload(local, "train")
    with FaultProxy(bucket.endpoint, at_random(seed=1, rate=0.05, faults=("503", "reset", "cut"))) as proxy:
        config = make(url, proxy.url, "data.storage.request_bytes=65536")
        assert stream(config) == expected


def test_the_fetcher_killed_in_mid_run(local: Path, bucket: Bucket, make: Make) -> None:
    expected = list(chain.from_iterable(stream(make(local, None))))
    config = make(bucket.upload(local, "train"), bucket.endpoint)
    loader = open_training(config, 0, 0)
    seen = []
    for number, batch in enumerate(loader):
        seen += batch.sample_ids.tolist()
        assert batch.valid.all()
        if number in (5, 14):
            os.kill(_fetcher_of(config), signal.SIGKILL)
    assert seen == [sample for sample, _ in expected]


def _fetcher_of(config: Config) -> int:
    """Process number of the fetcher that serves this config's cache."""
    folder = str(config.data.storage.cache_directory).encode()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if b"symile_dist.data.fetcher" in command and folder in command:
                return int(process.name)
    raise AssertionError("no fetcher runs")


def test_a_shard_that_is_missing_in_the_bucket_is_left_out(local: Path, bucket: Bucket, make: Make) -> None:
    url = bucket.upload(local, "train")
    bucket.client.delete_object(Bucket=bucket.name, Key="train/shard-00003.tar")
    loader = open_training(make(url, bucket.endpoint, "data.lanes=1"), 0, 0)
    seen: list[int] = []
    for batch in loader:
        for fault in batch.faults:
            assert (fault.kind, fault.shard, fault.row) == ("open", "shard-00003.tar", -1)
        if batch.faults:
            loader.exclude(batch.faults)
        seen += [sample for sample, valid in zip(batch.sample_ids.tolist(), batch.valid.tolist(), strict=True) if valid]
    lost = set(range(120, 140))
    assert sorted(seen[:600]) == sorted([*(set(range(320)) - lost)] * 2)
    assert len(loader.quarantine.entries) == 1


def test_a_cache_that_is_too_small_is_told(local: Path, bucket: Bucket, make: Make) -> None:
    url = bucket.upload(write_shards_of_size(local.parent / "wide"), "wide")
    config = make(url, bucket.endpoint, "data.storage.cache_bytes=1048576", "data.lanes=4", "train.steps=2")
    with pytest.raises(ValueError, match=r"data\.storage\.cache_bytes"):
        list(open_training(config, 0, 0))


def write_shards_of_size(folder: Path) -> Path:
    """Shards of about half a megabyte each."""
    if not folder.exists():
        write_shards(folder, [120] * 8)
        index_directory(folder)
    return folder


def test_a_dead_endpoint_is_told_in_words(local: Path, make: Make) -> None:
    config = make("s3://bucket/train", "http://127.0.0.1:9", "data.storage.give_up_seconds=1")
    with pytest.raises(Exception, match=r"s3://bucket/train.*no answer|127\.0\.0\.1:9"):
        open_training(config, 0, 0)


@pytest.fixture
def one_shard(tmp_path: Path, bucket: Bucket, make: Make, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A folder of one shard of 24 samples, and what is fetched again."""
    folder = write_shards(tmp_path / "one", [24])
    index_directory(folder)
    forgotten: list[str] = []
    forget = ShardCache.forget
    monkeypatch.setattr(ShardCache, "forget", lambda cache, url: (forgotten.append(url), forget(cache, url))[1])
    return folder, forgotten


def flip(data: bytes, folder: Path, rows: list[int]) -> bytes:
    """A bit of the member `a.npy` of some rows of the shard."""
    index, flipped = read_index(folder / "shard-00000.tar"), bytearray(data)
    for row in rows:
        flipped[int(index.block_offsets[row, index.members.index("a.npy")]) * 512 + 100] ^= 1
    return bytes(flipped)


def cached_shard(tmp_path: Path, size: int) -> Path:
    """The one cached file that is larger than an index."""
    (found,) = (path for path in (tmp_path / "cache").rglob("*-*-*") if path.stat().st_size > size // 2)
    return found


def test_bytes_that_went_bad_in_the_cache_are_fetched_again_once(
    one_shard: tuple[Path, list[str]], bucket: Bucket, make: Make, tmp_path: Path
) -> None:
    folder, forgotten = one_shard
    whole = (folder / "shard-00000.tar").read_bytes()
    dataset = open_training(make(bucket.upload(folder, "one"), bucket.endpoint, "data.lanes=1"), 0, 0).dataset
    local = open_training(make(folder, None, "data.lanes=1"), 0, 0).dataset
    expected = dict(local.read(local.locate(0)))
    raw = dataset.locate(0)
    cached = cached_shard(tmp_path, len(whole))
    start = int(cached.name.split("-")[1])
    cached.write_bytes(flip(whole, folder, [3, 9, 17, 20])[start : start + cached.stat().st_size])
    assert dict(dataset.read(raw)) == expected and len(expected) == 24 and raw.faults == []
    assert len(forgotten) == 1, "and what comes after in the batch is read from the new bytes"


def test_bytes_that_are_bad_in_the_store_are_told_after_one_more_try(
    one_shard: tuple[Path, list[str]], bucket: Bucket, make: Make
) -> None:
    folder, forgotten = one_shard
    url = bucket.upload(folder, "one")
    bucket.put("one/shard-00000.tar", flip((folder / "shard-00000.tar").read_bytes(), folder, [3, 9, 17, 20]))
    dataset = open_training(make(url, bucket.endpoint, "data.lanes=1"), 0, 0).dataset
    forgotten.clear()
    raw = dataset.locate(0)
    assert len(dict(dataset.read(raw))) == 20
    assert sorted((fault.kind, fault.row) for fault in raw.faults) == [("checksum", row) for row in (3, 9, 17, 20)]
    assert len(forgotten) == 1
