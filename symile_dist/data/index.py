"""The index of a shard: where each sample's members lie in the tar file, and their checksums.

`shard.tar.idx` stands beside `shard.tar`, so that a sample is one `pread` away and a shard that has lost bytes is
told from a shard that has not. Layout, little-endian, written so that another program can write it too:

    8 bytes   magic "SYMIDX01"
    4 bytes   u32: length L of the header
    L bytes   header, JSON: {"members": ["flac", "json", ...], "samples": n, "shard_bytes": bytes of the tar file}
    n * F * 4 u32: offset of the member's data in the tar file, in blocks of 512 bytes, row by row (F = members)
    n * F * 4 u32: size of the member in bytes; 0xFFFFFFFF where the sample lacks the member
    n * F * 4 u32: CRC-32 of the member's bytes
    4 bytes   u32: CRC-32 of everything before

A sample is a run of members whose names agree up to the first dot of the last path component (webdataset's rule);
the rest of the name is the member's suffix, which may have several parts (`seg.npy`).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from symile_dist.storage import write_atomic

MAGIC = b"SYMIDX01"
ABSENT = 0xFFFFFFFF
BLOCK = 512


class ShardError(ValueError):
    """A shard, an index or a manifest that is not what it should be; the message names the file and the remedy."""


@dataclass(frozen=True)
class ShardIndex:
    members: tuple[str, ...]
    """F suffixes, sorted."""
    shard_bytes: int
    block_offsets: NDArray[np.uint32]
    """(n, F)"""
    sizes: NDArray[np.uint32]
    """(n, F): ABSENT where a sample lacks the member."""
    checksums: NDArray[np.uint32]
    """(n, F)"""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def present(self) -> NDArray[np.bool_]:
        """(n, F)"""
        return np.asarray(self.sizes != ABSENT)

    def to_bytes(self) -> bytes:
        header = json.dumps(
            {"members": list(self.members), "samples": len(self), "shard_bytes": self.shard_bytes}, sort_keys=True
        ).encode()
        parts = [MAGIC, struct.pack("<I", len(header)), header]
        parts += [array.astype("<u4").tobytes() for array in (self.block_offsets, self.sizes, self.checksums)]
        body = b"".join(parts)
        return body + struct.pack("<I", zlib.crc32(body))


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".idx")


def split_name(name: str) -> tuple[str, str]:
    """`train/0001.seg.npy` -> (`train/0001`, `seg.npy`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _strict_members(shard: Path) -> Iterator[tuple[tarfile.TarInfo, int, bytes]]:
    """Every file in the tar: its header, its data's offset and its data.

    tarfile takes a damaged header for the end of the archive and says nothing; so what follows the last member must
    be the end mark (two blocks of zeros) and nothing but zeros.
    """
    size = shard.stat().st_size
    with open(shard, "rb") as raw:
        try:
            with tarfile.open(fileobj=raw, mode="r:") as archive:
                for header in archive:
                    if header.islnk():
                        raise ShardError(
                            f"{shard}: '{header.name}' is a hard link: write the shard again without links"
                        )
                    if header.issparse():
                        raise ShardError(f"{shard}: '{header.name}' is sparse: write the shard again, without tar -S")
                    if header.isfile():
                        end = header.offset_data + header.size
                        if end > size:
                            raise ShardError(
                                f"{shard}: truncated inside '{header.name}' (needs {end} bytes, has {size})"
                            )
                        raw.seek(header.offset_data)
                        yield header, header.offset_data, raw.read(header.size)
                end_of_members = archive.offset
        except tarfile.TarError as error:
            raise ShardError(f"{shard}: not a plain tar file, or damaged: {error}") from None
        raw.seek(end_of_members)
        tail = raw.read()
    if len(tail) < 2 * BLOCK:
        raise ShardError(f"{shard}: truncated: the end mark of the tar file is missing")
    if any(tail):
        raise ShardError(f"{shard}: damaged near byte {end_of_members}: data follows what looks like the tar's end")


def build_index(shard: Path) -> ShardIndex:
    """Reads a whole shard once. Raises ShardError for a shard that has lost or changed bytes, as far as a tar shows."""
    samples: list[tuple[str, dict[str, tuple[int, int, int]]]] = []
    seen: set[str] = set()
    for header, offset, data in _strict_members(shard):
        key, suffix = split_name(header.name)
        if not suffix:
            continue  # no suffix: belongs to no modality
        if not samples or samples[-1][0] != key:
            if key in seen:
                raise ShardError(
                    f"{shard}: the members of sample '{key}' do not stand together; webdataset shards need them in a "
                    "row: write the shard again, sorted by name"
                )
            seen.add(key)
            samples.append((key, {}))
        if suffix in samples[-1][1]:
            raise ShardError(f"{shard}: sample '{key}' has two members '{suffix}'")
        samples[-1][1][suffix] = (offset // BLOCK, len(data), zlib.crc32(data))
    members = tuple(sorted({suffix for _, parts in samples for suffix in parts}))
    table = np.full((3, len(samples), len(members)), ABSENT, dtype=np.uint32)
    for row, (_, parts) in enumerate(samples):
        for column, member in enumerate(members):
            if member in parts:
                table[:, row, column] = parts[member]
    return ShardIndex(members, shard.stat().st_size, *table)


def write_index(shard: Path) -> ShardIndex:
    """Builds the index of a shard and writes it beside the shard, atomically."""
    index = build_index(shard)
    content = index.to_bytes()
    write_atomic(index_path(shard), lambda file: file.write(content))
    return index


def read_index(shard: Path, sha256: str | None = None) -> ShardIndex:
    """Raises ShardError when the index is missing or damaged, or is not the one of that sha256 (the manifest's)."""
    path = index_path(shard)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ShardError(f"{shard}: has no index; make it with: symile-dist shards index {shard.parent}") from None
    if len(content) < 16 or content[:8] != MAGIC or zlib.crc32(content[:-4]) != struct.unpack("<I", content[-4:])[0]:
        raise ShardError(f"{path}: damaged index; make it again with: symile-dist shards index {shard.parent} --force")
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ShardError(
            f"{path}: is not the index that the manifest was made with; if the shard was replaced on purpose: "
            f"symile-dist shards index {shard.parent}"
        )
    (length,) = struct.unpack_from("<I", content, 8)
    header = json.loads(content[12 : 12 + length])
    members, samples = tuple(header["members"]), int(header["samples"])
    table = np.frombuffer(content[12 + length : -4], dtype="<u4").reshape(3, samples, len(members))
    return ShardIndex(members, int(header["shard_bytes"]), *table)


def read_member_bytes(descriptor: int, index: ShardIndex, row: int, columns: list[int]) -> list[bytes]:
    """One `pread` that spans the wanted members of a sample, then slices. Empty where a member is absent.

    Raises ShardError when the bytes do not match their checksum or the file ends early.
    """
    offsets = [int(index.block_offsets[row, c]) * BLOCK for c in columns]
    sizes = [int(index.sizes[row, c]) for c in columns]
    there = [i for i, size in enumerate(sizes) if size != ABSENT]
    if not there:
        return [b"" for _ in columns]
    start = min(offsets[i] for i in there)
    end = max(offsets[i] + sizes[i] for i in there)
    span = os.pread(descriptor, end - start, start)
    parts: list[bytes] = []
    for i, column in enumerate(columns):
        if sizes[i] == ABSENT:
            parts.append(b"")
            continue
        data = span[offsets[i] - start : offsets[i] - start + sizes[i]]
        if len(data) != sizes[i]:
            raise ShardError(f"sample {row}, member '{index.members[column]}': the file ends early")
        if zlib.crc32(data) != int(index.checksums[row, column]):
            raise ShardError(f"sample {row}, member '{index.members[column]}': bytes do not match their checksum")
        parts.append(data)
    return parts
