"""The manifest of a folder of shards: names, sizes, which members their samples have, and digests of their indices.

It tells the number of samples of any population without opening an index, so that a run over thousands of shards
begins at once. Layout: see docs/data.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from symile_dist.config import StorageConfig
from symile_dist.data.index import ShardError, ShardIndex, build_index, parse_index
from symile_dist.errors import StorageError
from symile_dist.storage import FileInfo, Folder

MANIFEST = "manifest.json"
VERSION = 2


@dataclass(frozen=True)
class ShardEntry:
    name: str
    samples: int
    bytes: int
    index_bytes: int
    index_sha256: str
    presence: tuple[tuple[int, int], ...]
    """(mask, samples): how many samples have just the members whose bits are set, bit i for `Manifest.members[i]`."""
    left_out: int = 0
    """Files in the tar that belong to no sample."""


@dataclass(frozen=True)
class Manifest:
    url: str
    """The folder."""
    shards: tuple[ShardEntry, ...]
    """Sorted by name."""
    members: tuple[str, ...]
    """Every suffix that stands in a shard."""
    skipped: tuple[tuple[str, str], ...] = ()
    """(shard, reason): damaged shards that were left out on demand."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """Changes when any sample does: the order of a run is tied to it."""
        text = "\n".join(f"{s.name} {s.samples} {s.bytes} {s.index_sha256}" for s in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        shards = [
            {**vars(entry), "presence": {str(mask): count for mask, count in entry.presence}} for entry in self.shards
        ]
        # A line per shard: readable, and small enough at thousands of them.
        lines = ",\n".join(json.dumps(shard, ensure_ascii=False) for shard in shards)
        content = {
            "version": VERSION,
            "samples": self.samples,
            "members": list(self.members),
            "skipped": dict(self.skipped),
        }
        head = json.dumps(content, ensure_ascii=False, indent=1)
        return head.removesuffix("\n}") + ',\n "shards": [\n' + lines + "\n]}\n"


def shard_names(files: dict[str, FileInfo], folder: Folder) -> list[str]:
    """The .tar files of a listing. Raises ShardError when there is none."""
    names = sorted(name for name in files if name.endswith(".tar") and not name.startswith("."))
    if not names:
        raise ShardError(f"{folder.url}: holds no .tar shards")
    return names


def _listed(folder: Folder) -> dict[str, FileInfo]:
    try:
        return folder.list()
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"{folder.url}: no such folder of shards") from None


def index_directory(
    directory: str | Path,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    processes: int = 1,
    storage: StorageConfig | None = None,
    skip_damaged: bool = False,
) -> Manifest:
    """Writes the index of every shard in a folder, then the manifest; both beside the shards.

    A shard whose index fits its size and is not older is not read again unless `force`, so a second run goes on where
    a killed one ended. `processes` read shards at once. A damaged shard is a ShardError with every bad shard in its
    message, and no manifest is written then, unless `skip_damaged`: the manifest then lists them as skipped. Raises
    StorageError for an object store that fails.
    """
    folder = Folder(directory, storage)
    files = _listed(folder)
    names = shard_names(files, folder)
    found: dict[str, _Summary] = {}
    problems: dict[str, str] = {}
    with executor(processes) as pool:
        jobs: dict[str, Future[_Summary]] = {
            name: pool.submit(_index_one, folder.url, folder.storage, name, _usable(name, files, force))
            for name in names
        }
        for done, (name, job) in enumerate(jobs.items(), start=1):
            try:
                found[name] = job.result()
            except (ShardError, OSError) as error:
                problems[name] = str(error)
            except StorageError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            if progress:
                progress(done, len(names))
    if problems and not (skip_damaged and found):
        raise ShardError(
            "\n".join(problems.values())
            + ("" if skip_damaged else "\n(mend or remove these shards, or leave them out with --skip-damaged)")
        )
    members = tuple(sorted({member for summary in found.values() for member in summary.members}))
    manifest = Manifest(
        folder.url,
        tuple(summary.entry(name, members) for name, summary in sorted(found.items())),
        members,
        tuple(sorted(problems.items())),
    )
    folder.write(MANIFEST, manifest.to_json().encode())
    return manifest


@contextlib.contextmanager
def executor(processes: int) -> Iterator[Executor]:
    """Processes, for parsing headers and checksums keeps a core busy; threads in this process for one of them."""
    pool: Executor
    if processes > 1:
        pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    else:
        pool = ThreadPoolExecutor(1)
    with pool:
        yield pool


def _usable(name: str, files: dict[str, FileInfo], force: bool) -> bool:
    """Whether the index that is there may be of the shard that is there."""
    shard, index = files[name], files.get(f"{name}.idx")
    if force or index is None:
        return False
    # Tar files are padded, so a replaced shard may well have the size of the old one. An object store's versions are
    # no times: there only the size is compared.
    newer = shard.version.isdecimal() and index.version.isdecimal() and int(shard.version) > int(index.version)
    return not newer


class _Summary(NamedTuple):
    """What the manifest keeps of an index; small, for it comes from another process."""

    samples: int
    shard_bytes: int
    index_bytes: int
    index_sha256: str
    members: tuple[str, ...]
    presence: tuple[tuple[tuple[int, ...], int], ...]
    """(columns that are there, samples)"""
    left_out: int

    @classmethod
    def of(cls, index: ShardIndex, content: bytes) -> _Summary:
        patterns, counts = np.unique(index.present, axis=0, return_counts=True)
        presence = tuple(
            (tuple(np.flatnonzero(pattern).tolist()), int(count))
            for pattern, count in zip(patterns, counts, strict=True)
        )
        digest = hashlib.sha256(content).hexdigest()
        return cls(len(index), index.shard_bytes, len(content), digest, index.members, presence, index.left_out)

    def entry(self, name: str, members: tuple[str, ...]) -> ShardEntry:
        """With masks over the members of the whole folder."""
        bits = [1 << members.index(member) for member in self.members]
        presence = sorted((sum(bits[column] for column in columns), count) for columns, count in self.presence)
        return ShardEntry(
            name, self.samples, self.shard_bytes, self.index_bytes, self.index_sha256, tuple(presence), self.left_out
        )


def _index_one(url: str, storage: StorageConfig, name: str, try_present: bool) -> _Summary:
    """Of the index that is there if it fits, else of one that is made and written."""
    folder = Folder(url, storage)
    if try_present:
        try:
            content = folder.read(f"{name}.idx")
            index = parse_index(content, f"{name}.idx", url)
            if index.shard_bytes == folder.info(name).size:
                return _Summary.of(index, content)
        except (ShardError, FileNotFoundError):
            pass  # damaged: made again
    with tempfile.TemporaryDirectory() as scratch, folder.local_copy(name, Path(scratch)) as shard:
        index = build_index(shard, folder / name)
    content = index.to_bytes()
    folder.write(f"{name}.idx", content)
    return _Summary.of(index, content)


def parse_manifest(content: bytes, folder: Folder) -> Manifest:
    """Raises ShardError for a damaged manifest or one of another version; the message names the remedy."""
    path = folder / MANIFEST
    remedy = f"make it with: symile-dist shards index {folder.url}"
    try:
        fields = json.loads(content)
        if fields["version"] != VERSION:
            raise ShardError(
                f"{path}: version {fields['version']} is not the one of this release ({VERSION}); {remedy}"
            )
        shards = tuple(
            ShardEntry(
                **{
                    **entry,
                    "presence": tuple((int(mask), int(count)) for mask, count in entry["presence"].items()),
                }
            )
            for entry in fields["shards"]
        )
        manifest = Manifest(folder.url, shards, tuple(fields["members"]), tuple(fields["skipped"].items()))
        for shard in shards:
            name = shard.name
            if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
                raise ShardError(f"{path}: shard name {name!r} leaves the folder")
            if sum(count for _, count in shard.presence) != shard.samples:
                raise ValueError(f"the counts of {name} disagree")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path}: damaged manifest ({error}); {remedy} --force") from None
    return manifest


def differences(manifest: Manifest, files: dict[str, FileInfo]) -> dict[str, str]:
    """What of a folder is not as its manifest says: shard -> words. One listing, no shard is opened."""
    found: dict[str, str] = {}
    for shard in manifest.shards:
        if shard.name not in files:
            found[shard.name] = "the shard is in the manifest but not in the folder"
        elif files[shard.name].size != shard.bytes:
            found[shard.name] = (
                f"has {files[shard.name].size} bytes, its manifest says {shard.bytes}: damaged or replaced"
            )
        elif f"{shard.name}.idx" not in files:
            found[shard.name] = "the shard has no index"
        elif files[f"{shard.name}.idx"].size != shard.index_bytes:
            found[shard.name] = "its index is not the one that the manifest was made with"
    listed = {shard.name for shard in manifest.shards} | {name for name, _ in manifest.skipped}
    for name in sorted(files):
        if name.endswith(".tar") and not name.startswith(".") and name not in listed:
            found[name] = "the shard is not in the manifest"
    return found


def read_manifest(directory: str | Path, storage: StorageConfig | None = None, check: bool = True) -> Manifest:
    """Reads the manifest and, with `check`, compares it with the files there, without opening a shard.

    Raises ShardError when the folder or the manifest is missing or damaged or, with `check`, when a shard or an index
    is missing or has another size; the message names the command that makes it right.
    """
    folder = Folder(directory, storage)
    remedy = f"symile-dist shards index {folder.url}"
    try:
        manifest = parse_manifest(folder.read(MANIFEST), folder)
    except (FileNotFoundError, NotADirectoryError):
        shard_names(_listed(folder), folder)
        raise ShardError(f"{folder.url}: the shards have no index; make it with: {remedy}") from None
    if check:
        wrong = differences(manifest, _listed(folder))
        if wrong:
            lines = [f"{folder / name}: {words}" for name, words in list(wrong.items())[:5]]
            more = f" (and {len(wrong) - 5} more shards)" if len(wrong) > 5 else ""
            raise ShardError("\n".join(lines) + f"{more}\nif that is as it should be, make the manifest with: {remedy}")
    return manifest


def default_processes() -> int:
    """As many as there are cores for this process."""
    return len(os.sched_getaffinity(0))


__all__ = [
    "Manifest",
    "ShardEntry",
    "ShardError",
    "default_processes",
    "differences",
    "executor",
    "index_directory",
    "parse_manifest",
    "read_manifest",
]
