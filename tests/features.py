"""Making shards of features in one process, and reading them back by tarfile and through their index."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from symile_dist.cluster import Node
from symile_dist.data.index import BLOCK, read_index, split_name
from symile_dist.data.manifest import ShardEntry
from symile_dist.storage import Folder
from symile_dist.tools.features import actors
from symile_dist.tools.features.encoders import FrozenEncoders
from symile_dist.tools.features.recipe import Recipe
from symile_dist.tools.features.shard import encode_shard


def encode_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are encoded one after the other in this process; what would be returned by an actor is looked at alike."""

    def encode_all(
        recipe: Recipe, source: Folder, out: Path, entries: Sequence[ShardEntry], *options: Any
    ) -> Iterator[ShardEntry]:
        encoders = FrozenEncoders(recipe)
        options[-1](encoders.digests())
        for entry in entries:
            encode_shard(recipe, encoders, source, entry, out)
            yield entry

    monkeypatch.setattr(actors, "encode_shards", encode_all)
    monkeypatch.setattr("symile_dist.cluster.join_ray", lambda cpus: [Node("here", {"CPU": 2.0})])


def fingerprints(folder: Path) -> dict[str, str]:
    """Of every file but the lock, hidden ones too."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.endswith(".lock")
    }


def read_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """key -> suffix -> bytes, in the order of the shards; fails where an index says otherwise than its shard."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        rows: list[dict[str, bytes]] = []
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None and (member.mtime, member.uid, member.uname) == (0, 0, "")
                key, suffix = split_name(member.name)
                if key not in samples:
                    samples[key] = {}
                    rows.append(samples[key])
                samples[key][suffix] = file.read()
        index, content = read_index(shard), shard.read_bytes()
        assert len(index) == len(rows)
        for row, sample in enumerate(rows):
            assert {m for column, m in enumerate(index.members) if index.present[row, column]} == set(sample)
            for column, name in enumerate(index.members):
                if index.present[row, column]:
                    start = int(index.block_offsets[row, column]) * BLOCK
                    data = content[start : start + int(index.sizes[row, column])]
                    assert data == sample[name] and zlib.crc32(data) == index.checksums[row, column]
    return samples
