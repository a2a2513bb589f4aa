"""The index of a shard: where each sample's members lie in the tar file, and their checksums.

`shard.tar.idx` stands beside `shard.tar`, so that a sample is one `pread` away and a shard that has lost bytes is
told from a shard that has not. Layout, little-endian, written so that another program can write it too:

    8 bytes   magic "SYMIDX01"
    4 bytes   u32: length L of the header
    L bytes   header, JSON: {"members": ["flac", "json", ...], "samples": n, "shard_bytes": bytes of the tar file,
              "left_out": files in the tar without a suffix, which belong to no sample}
    n * F * 4 u32: offset of the member's data in the tar file, in blocks of 512 bytes, row by row (F = members)
    n * F * 4 u32: size of the member in bytes; 0xFFFFFFFF where the sample lacks the member
    n * F * 4 u32: CRC-32 of the member's bytes
    4 bytes   u32: CRC-32 of everything before

Rows stand in the order of the tar file.

A sample is a run of members whose names agree up to the first dot of the last path component (webdataset's rule);
the rest of the name is the member's suffix, which may have several parts (`seg.npy`).
"""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32  # zlib's, ten times as fast

from symile_dist.errors import StorageError
from symile_dist.storage import write_atomic

MAGIC = b"SYMIDX01"
ABSENT = 0xFFFFFFFF
BLOCK = 512


class ShardError(ValueError):
    """A shard, an index or a manifest that is not what it should be; the message names the file and the remedy."""


UNREADABLE = (ShardError, StorageError, OSError)
"""What opening or reading a shard or its index may raise."""


@dataclass(frozen=True)
class ShardIndex:
    members: tuple[str, ...]
    """F suffixes, sorted."""
    shard_bytes: int
    places: NDArray[np.uint32]
    """(n, 3, F): per sample the members' offsets in blocks, sizes and CRC-32s. Samples stand together in memory, since
    they are read one here, one there."""
    left_out: int = 0
    """Files in the tar that belong to no sample."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def block_offsets(self) -> NDArray[np.uint32]:
        """(n, F)"""
        return self.places[:, 0]

    @property
    def sizes(self) -> NDArray[np.uint32]:
        """(n, F): ABSENT where a sample lacks the member."""
        return self.places[:, 1]

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """(n, F)"""
        return self.places[:, 2]

    @property
    def present(self) -> NDArray[np.bool_]:
        """(n, F)"""
        return np.asarray(self.sizes != ABSENT)

    @property
    def row_starts(self) -> NDArray[np.int64]:
        """(n + 1,) where each row's first member begins in the tar file, in bytes; the end of the last row's data.

        The bytes [row_starts[a], row_starts[b]) hold the rows [a, b) and nothing of others: such ranges tile a shard.
        """
        offsets = self.block_offsets.astype(np.int64) * BLOCK
        there = self.present
        starts = np.where(there, offsets, np.iinfo(np.int64).max).min(axis=1, initial=np.iinfo(np.int64).max)
        ends = np.where(there, offsets + self.sizes, 0).max(axis=1, initial=0)
        return np.append(starts, ends.max(initial=0))

    def to_bytes(self) -> bytes:
        header = json.dumps(
            {
                "members": list(self.members),
                "samples": len(self),
                "shard_bytes": self.shard_bytes,
                "left_out": self.left_out,
            },
            sort_keys=True,
        ).encode()
        parts = [MAGIC, struct.pack("<I", len(header)), header]
        parts += [array.astype("<u4").tobytes() for array in (self.block_offsets, self.sizes, self.checksums)]
        body = b"".join(parts)
        return body + struct.pack("<I", crc32(body))


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".idx")


def split_name(name: str) -> tuple[str, str]:
    """`train/0001.seg.npy` -> (`train/0001`, `seg.npy`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _strict_members(shard: Path, shard_name: str) -> Iterator[tuple[tarfile.TarInfo, int, bytes]]:
    """Every file in the tar: its header, its data's offset and its data.

    tarfile takes a damaged header for the end of the archive and says nothing; so what follows the last member must
    be the end mark (two blocks of zeros) and nothing but zeros.
    """
    size = shard.stat().st_size
    with open(shard, "rb") as raw:
        try:
            with tarfile.open(fileobj=raw, mode="r:") as archive:
                for header in archive:
                    if header.islnk() or header.issym():
                        raise ShardError(
                            f"{shard_name}: '{header.name}' is a link: write the shard again without links"
                        )
                    name = PurePosixPath(header.name)
                    if name.is_absolute() or ".." in name.parts:
                        raise ShardError(f"{shard_name}: member name '{header.name}' leaves its folder: refused")
                    if header.size < 0 or header.size >= ABSENT:
                        raise ShardError(
                            f"{shard_name}: '{header.name}' declares {header.size} bytes; a member has at most 4 GiB"
                        )
                    if header.issparse():
                        raise ShardError(
                            f"{shard_name}: '{header.name}' is sparse: write the shard again, without tar -S"
                        )
                    if header.isfile():
                        end = header.offset_data + header.size
                        if end > size:
                            raise ShardError(
                                f"{shard_name}: truncated inside '{header.name}' (needs {end} bytes, has {size})"
                            )
                        raw.seek(header.offset_data)
                        yield header, header.offset_data, raw.read(header.size)
                end_of_members = archive.offset
        except (
            tarfile.TarError,
            ValueError,
            OverflowError,
            MemoryError,
        ) as error:  # numbers in headers may be anything
            if isinstance(error, ShardError):
                raise
            raise ShardError(f"{shard_name}: not a plain tar file, or damaged: {error}") from None
        raw.seek(end_of_members)
        tail = raw.read()
    if len(tail) < 2 * BLOCK:
        raise ShardError(f"{shard_name}: truncated: the end mark of the tar file is missing")
    if any(tail):
        raise ShardError(
            f"{shard_name}: damaged near byte {end_of_members}: data follows what looks like the tar's end"
        )


def build_index(shard: Path, name: str = "") -> ShardIndex:
    """Reads a whole shard once. Raises ShardError for a shard that has lost or changed bytes, as far as a tar shows.

    `name`: what messages call the shard, where it is a copy of another one.
    """
    samples: list[tuple[str, dict[str, tuple[int, int, int]]]] = []
    seen: set[str] = set()
    left_out = 0
    name = name or str(shard)
    for header, offset, data in _strict_members(shard, name):
        key, suffix = split_name(header.name)
        if not suffix:
            left_out += 1
            continue
        if not samples or samples[-1][0] != key:
            if key in seen:
                raise ShardError(
                    f"{name}: the members of sample '{key}' do not stand together; webdataset shards need them in a "
                    "row: write the shard again, sorted by name"
                )
            seen.add(key)
            samples.append((key, {}))
        if suffix in samples[-1][1]:
            raise ShardError(f"{name}: sample '{key}' has two members '{suffix}'")
        samples[-1][1][suffix] = (offset // BLOCK, len(data), crc32(data))
    members = tuple(sorted({suffix for _, parts in samples for suffix in parts}))
    places = np.full((len(samples), 3, len(members)), ABSENT, dtype=np.uint32)
    column_of = {member: column for column, member in enumerate(members)}
    for row, (_, parts) in enumerate(samples):
        for member, place in parts.items():
            places[row, :, column_of[member]] = place
    return ShardIndex(members, shard.stat().st_size, places, left_out)


def write_index(shard: Path) -> ShardIndex:
    """Builds the index of a shard and writes it beside the shard, atomically."""
    index = build_index(shard)
    content = index.to_bytes()
    write_atomic(index_path(shard), lambda file: file.write(content))
    return index


def read_index(shard: Path, sha256: str | None = None) -> ShardIndex:
    """Reads the index beside a shard. Raises ShardError as `parse_index` does, and where there is none."""
    path = index_path(shard)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ShardError(f"{shard}: has no index; make it with: symile-dist shards index {shard.parent}") from None
    return parse_index(content, str(path), str(shard.parent), sha256)


def parse_index(content: bytes, name: str, folder: str, sha256: str | None = None) -> ShardIndex:
    """Raises ShardError when the index is damaged or is not the one of that sha256 (the manifest's).

    `name` and `folder` are what messages call the index and where its shard lies.
    """
    if len(content) < 16 or content[:8] != MAGIC or crc32(content[:-4]) != struct.unpack("<I", content[-4:])[0]:
        raise ShardError(f"{name}: damaged index; make it again with: symile-dist shards index {folder} --force")
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ShardError(
            f"{name}: is not the index that the manifest was made with; if the shard was replaced on purpose: "
            f"symile-dist shards index {folder}"
        )
    (length,) = struct.unpack_from("<I", content, 8)
    try:
        header = json.loads(content[12 : 12 + length])
        members, samples = tuple(map(str, header["members"])), int(header["samples"])
        planes = np.frombuffer(content[12 + length : -4], dtype="<u4").reshape(3, samples, len(members))
        places = np.ascontiguousarray(planes.transpose(1, 0, 2))
        return ShardIndex(members, int(header["shard_bytes"]), places, int(header.get("left_out", 0)))
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{name}: not an index that this version reads: {error}") from None
