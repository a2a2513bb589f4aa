"""One read per sample: what the index says, or what is wrong with it."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from symile_dist.data.files import OpenFile
from symile_dist.data.index import ABSENT, BLOCK
from symile_dist.data.spans import BadMember, Spans

MEMBERS = ("a", "b", "c")
PARTS = [[b"x" * 700, b"", b"y" * 5], [b"only", None, None], [None, b"q" * 513, b"z"], [None, None, None]]
"""Of four samples, None for an absent member."""


def laid_out() -> tuple[bytes, np.ndarray]:
    """A shard, member after member in blocks, and its (4, 3, 3) places."""
    data = b""
    places = np.full((len(PARTS), 3, 3), ABSENT, dtype=np.uint32)
    for row, parts in enumerate(PARTS):
        for column in (2, 0, 1):  # members need not stand in the order of their names
            part = parts[column]
            if part is not None:
                data += b"\0" * (-len(data) % BLOCK) + b"h" * BLOCK
                places[row, :, column] = len(data) // BLOCK, len(part), zlib.crc32(part)
                data += part
    return data, places


def read_all(data: bytes, places: np.ndarray) -> list[list[bytes] | BadMember]:
    return list(Spans.of(places, MEMBERS).read([lambda length, at: data[at : at + length]] * len(places)))


def test_every_member_and_nothing_for_an_absent_one() -> None:
    data, places = laid_out()
    assert read_all(data, places) == [[part or b"" for part in parts] for parts in PARTS]
    assert read_all(data, places[:0]) == []
    backwards = list(Spans.of(places, MEMBERS).read([lambda length, at: data[at : at + length]] * 4, 2))
    assert backwards == read_all(data, places)[2:]


def test_each_flipped_bit_is_one_samples_fault() -> None:
    data, places = laid_out()
    for row, parts in enumerate(PARTS):
        for column, part in enumerate(parts):
            if part:
                at = int(places[row, 0, column]) * BLOCK
                damaged = bytearray(data)
                damaged[at + len(part) - 1] ^= 1
                found = read_all(bytes(damaged), places)
                why = BadMember("checksum", MEMBERS[column], at, "its bytes do not match their checksum")
                assert [each for each in found if isinstance(each, BadMember)] == [why] and found[row] == why


def test_a_shard_that_ends_early_says_where() -> None:
    data, places = laid_out()
    for end in range(0, len(data), 37):
        for row, found in enumerate(read_all(data[:end], places)):
            ends = [
                int(places[row, 0, column]) * BLOCK + len(part)
                for column, part in enumerate(PARTS[row])
                if part is not None
            ]
            if max(ends, default=0) <= end:
                assert not isinstance(found, BadMember), (row, end)
            else:
                assert isinstance(found, BadMember) and found.kind == "truncated", (row, end)


def test_lost_bytes_that_have_the_checksum_of_the_whole_are_told() -> None:
    data, places = laid_out()
    places[1, 2, 0] = zlib.crc32(b"on")  # as if "on" and "only" had the same one
    end = int(places[1, 0, 0]) * BLOCK + 2
    found = read_all(data[:end], places)[1]
    assert isinstance(found, BadMember) and found.kind == "truncated"


def test_an_error_of_the_disk_is_one_samples_fault() -> None:
    data, places = laid_out()
    bad = int(places[1, 0, 0]) * BLOCK

    def read(length: int, at: int) -> bytes:
        if at == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return data[at : at + length]

    found = list(Spans.of(places, MEMBERS).read([read] * 4))
    assert found[1] == BadMember("open", "", bad, "the disk gives an error for these bytes: Input/output error")
    assert [each for row, each in enumerate(found) if row != 1] == [
        [part or b"" for part in parts] for row, parts in enumerate(PARTS) if row != 1
    ]


def test_a_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reads at most 2 GiB at once."""
    (tmp_path / "file").write_bytes(bytes(range(250)))
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, at: whole(file, min(length, 100), at))
    file = OpenFile(str(tmp_path / "file"))
    assert file.read(240, 5) == bytes(range(5, 245))
    assert file.read(300, 5) == bytes(range(5, 250)), "fewer where the file ends early"
    assert file.read(10, 999) == b""


def test_a_descriptor_is_closed_when_nobody_reads(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    file = OpenFile(str(tmp_path / "file"))
    descriptor, read = file.descriptor, file.read
    del file
    assert read(5, 0) == b"bytes", "who may still read keeps it open"
    del read
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
