"""What many tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from symile_dist.config import Config, parse_config
from symile_dist.data.manifest import index_directory
from tests.s3 import Bucket, FaultProxy, new_bucket, s3_endpoint
from tests.shards import config_text, write_shards

SHARD_SIZES = (7, 5, 9, 6, 10)
"""Of the `shards` fixture: 37 samples, so that no batch size divides them."""


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of indexed shards of modalities a, b, c. Read only: a test that damages shards writes its own."""
    directory = write_shards(tmp_path_factory.mktemp("shards") / "train", SHARD_SIZES)
    index_directory(directory)
    return directory


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """make_config(folder of shards, *overrides) -> Config."""

    def make(train: Path, *overrides: str, modalities: tuple[str, ...] = ("a", "b", "c")) -> Config:
        return parse_config(config_text(train, modalities), "test.yaml", overrides).config

    return make


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """URL of an S3 server."""
    with s3_endpoint() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str) -> Iterator[Bucket]:
    """An empty bucket."""
    with new_bucket(endpoint) as made:
        yield made


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[FaultProxy]:
    """A way to the bucket's server on which faults can be injected."""
    with FaultProxy(bucket.endpoint) as made:
        yield made
