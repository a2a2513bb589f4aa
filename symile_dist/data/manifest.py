"""The manifest of a folder of shards: their names, sample counts, sizes and the digest of their indices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from symile_dist.data.index import ShardError, build_index, index_path, read_index, write_index
from symile_dist.storage import read_json, sha256_of_file, write_json

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class ShardEntry:
    name: str
    samples: int
    bytes: int
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    directory: Path
    shards: tuple[ShardEntry, ...]
    """Sorted by name."""
    members: tuple[str, ...]
    """Every suffix that stands in a shard."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """Changes when any sample does: the order of a run is tied to it."""
        text = "\n".join(f"{s.name} {s.samples} {s.bytes} {s.index_sha256}" for s in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()


def _shards_in(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise ShardError(f"{directory}: no such folder of shards")
    shards = sorted(directory.glob("*.tar"))
    if not shards:
        raise ShardError(f"{directory}: holds no .tar shards")
    return shards


def index_directory(
    directory: str | Path, force: bool = False, progress: Callable[[int, int], None] | None = None
) -> Manifest:
    """Writes the index of every shard in a folder, then the manifest.

    A shard whose index fits its size and is not older is not read again unless `force`. Raises ShardError, with every
    bad shard in the message, and writes no manifest then.
    """
    folder = Path(directory)
    shards = _shards_in(folder)

    def one(shard: Path) -> tuple[ShardEntry, tuple[str, ...]]:
        index = None
        if not force and index_path(shard).exists():
            try:
                index = read_index(shard)
            except ShardError:
                index = None  # damaged: made again below
            # Tar files are padded, so a replaced shard may well have the size of the old one.
            newer = shard.stat().st_mtime_ns > index_path(shard).stat().st_mtime_ns
            if index is not None and (newer or index.shard_bytes != shard.stat().st_size):
                index = None
        if index is None:
            index = write_index(shard)
        entry = ShardEntry(shard.name, len(index), index.shard_bytes, sha256_of_file(index_path(shard)))
        return entry, index.members

    entries: list[ShardEntry] = []
    members: set[str] = set()
    problems: list[str] = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        futures = [pool.submit(one, shard) for shard in shards]
        for done, future in enumerate(futures, start=1):
            try:
                entry, found = future.result()
            except (ShardError, OSError) as error:
                problems.append(str(error))
            else:
                entries.append(entry)
                members.update(found)
            if progress:
                progress(done, len(shards))
    if problems:
        raise ShardError("\n".join(problems))
    manifest = Manifest(folder, tuple(entries), tuple(sorted(members)))
    write_json(
        folder / MANIFEST,
        {
            "version": VERSION,
            "samples": manifest.samples,
            "members": list(manifest.members),
            "shards": [vars(entry) for entry in manifest.shards],
        },
    )
    return manifest


def read_manifest(directory: str | Path) -> Manifest:
    """Reads the manifest and compares it with the files there, without opening a shard.

    Raises ShardError when the folder, the manifest, a shard or an index is missing, or a shard's size has changed;
    the message names the command that makes it right.
    """
    folder = Path(directory)
    remedy = f"make it with: symile-dist shards index {folder}"
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder of shards")
    path = folder / MANIFEST
    if not path.exists():
        _shards_in(folder)
        raise ShardError(f"{folder}: the shards have no index; {remedy}")
    try:
        content = read_json(path)
        if content["version"] != VERSION:
            raise ShardError(f"{path}: version {content['version']} is not known here (this is {VERSION})")
        shards = tuple(ShardEntry(**entry) for entry in content["shards"])
        manifest = Manifest(folder, shards, tuple(content["members"]))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path}: damaged manifest ({error}); {remedy} --force") from None
    listed = {shard.name for shard in manifest.shards}
    for shard in manifest.shards:
        if not isinstance(shard.name, str) or "/" in shard.name or shard.name in ("", ".", ".."):
            raise ShardError(f"{path}: shard name {shard.name!r} leaves the folder")
        file = folder / shard.name
        if not file.exists():
            raise ShardError(f"{file}: the shard is in the manifest but not in the folder; {remedy}")
        if file.stat().st_size != shard.bytes:
            raise ShardError(
                f"{file}: has {file.stat().st_size} bytes, its manifest says {shard.bytes}: damaged or replaced; "
                f"if it was replaced on purpose, {remedy}"
            )
        if not index_path(file).exists():
            raise ShardError(f"{file}: the shard has no index; {remedy}")
    extra = sorted(file.name for file in folder.glob("*.tar") if file.name not in listed)
    if extra:
        raise ShardError(f"{folder}: {len(extra)} shards are not in the manifest ({extra[0]}, ...); {remedy}")
    return manifest


__all__ = ["Manifest", "ShardEntry", "ShardError", "build_index", "index_directory", "read_manifest"]
