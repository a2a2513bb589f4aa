"""The index against tarfile's own account, and every way in which shards get damaged, found and told."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from symile_dist.data.files import OpenFile
from symile_dist.data.index import (
    BLOCK,
    ShardError,
    ShardIndex,
    build_index,
    index_path,
    read_index,
    split_name,
    write_index,
)
from symile_dist.data.manifest import MANIFEST, index_directory, read_manifest
from symile_dist.data.spans import BadMember, read_rows
from tests.shards import key_of, sample_members, write_shards, write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def truth(shard: Path) -> dict[tuple[str, str], bytes]:
    """(key, suffix) -> bytes, from tarfile."""
    with tarfile.open(shard) as archive:
        found = {}
        for header in archive:
            file = archive.extractfile(header)
            if file is not None:
                found[split_name(header.name)] = file.read()
        return found


def read_row(shard: Path, index: ShardIndex, row: int) -> list[bytes] | BadMember:
    (found,) = read_rows(OpenFile(str(shard)).read, index, np.array([row]), range(len(index.members)))
    return found


def through_index(shard: Path, index: ShardIndex, keys: list[str]) -> dict[tuple[str, str], bytes]:
    """(key, suffix) -> bytes, from the index; `keys` are those of its rows."""
    found = {}
    for row, key in enumerate(keys):
        parts = read_row(shard, index, row)
        assert not isinstance(parts, BadMember)
        for column, member in enumerate(index.members):
            if index.present[row, column]:
                found[key, member] = parts[column]
            else:
                assert parts[column] == b""
    return found


# -- the index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_index_agrees_with_tarfile(tmp_path: Path, name: str) -> None:
    # Long names need extension headers in gnu and pax, a prefix in ustar; the last member is empty.
    folder = {"ustar": "f" * 120, "gnu": "g" * 300, "pax": "p" * 150 + "/é" * 30}[name]
    members = [
        (f"{folder}/{key_of(number)}.{suffix}", data)
        for number in range(5)
        for suffix, data in sample_members(
            number, ("a", "b"), without={2: ("a",), 3: ("a", "b")}.get(number, ())
        ).items()
    ] + [(f"{folder}/last.seg.npy", b"")]
    shard = write_tar(tmp_path / "s.tar", members, FORMATS[name])
    index = write_index(shard)
    again = read_index(shard)
    assert index.members == again.members == ("a.npy", "b.npy", "json", "seg.npy")
    assert len(again) == 6 and again.shard_bytes == shard.stat().st_size
    for field in ("block_offsets", "sizes", "checksums"):
        assert np.array_equal(getattr(index, field), getattr(again, field)), field
    assert again.present.sum(axis=0).tolist() == [3, 4, 5, 1]
    keys = [f"{folder}/{key_of(number)}" for number in range(5)] + [f"{folder}/last"]
    expected = truth(shard)
    assert len(expected) == len(members)
    assert through_index(shard, again, keys) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0001.png", ("0001", "png")),
        ("train/0001.seg.npy", ("train/0001", "seg.npy")),
        ("v1.2/0001.png", ("v1.2/0001", "png")),
        ("0001.PNG", ("0001", "png")),
        ("README", ("README", "")),
        ("a/.hidden", ("a/", "hidden")),
    ],
)
def test_names_are_split_as_webdataset_does(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


def test_folders_and_files_without_suffix_are_no_members(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as archive:
        folder = tarfile.TarInfo("train")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("train/README"))
        archive.addfile(tarfile.TarInfo("train/1.a"))
        archive.addfile(tarfile.TarInfo("train/1.b"))
    index = build_index(shard)
    assert (len(index), index.members) == (1, ("a", "b"))


def test_an_empty_shard_has_an_index_too(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [])
    write_index(shard)
    index = read_index(shard)
    assert (len(index), index.members) == (0, ())


def test_a_sample_whose_members_do_not_stand_together(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("1.a", b"x"), ("2.a", b"y"), ("1.b", b"z")])
    with pytest.raises(ShardError, match=r"members of sample '1' do not stand together.*sorted by name"):
        build_index(shard)


def test_a_member_that_comes_twice(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("1.a", b"x"), ("1.A", b"y")])
    with pytest.raises(ShardError, match="sample '1' has two members 'a'"):
        build_index(shard)


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    # What it holds does not stand at one place in the file: reading it by offset would give other members' bytes.
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w", format=tarfile.GNU_FORMAT) as archive:
        header = tarfile.TarInfo("1.a")
        header.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(header)
        archive.addfile(tarfile.TarInfo("2.a"))
    with pytest.raises(ShardError, match=r"'1\.a'.*sparse"):
        build_index(shard)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8b" + b"\0" * 600, b"\0" * 100])
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    shard = tmp_path / "s.tar"
    shard.write_bytes(content)
    with pytest.raises(ShardError, match=re.escape(str(shard))):
        build_index(shard)


def test_a_missing_or_damaged_index_names_the_command(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("1.a", b"x")])
    with pytest.raises(ShardError, match=f"has no index; make it with: symile-dist shards index {tmp_path}"):
        read_index(shard)
    write_index(shard)
    good = index_path(shard).read_bytes()
    for bad in (b"", good[:10], good[:-1], good[:30] + bytes([good[30] ^ 1]) + good[31:], b"X" + good[1:]):
        index_path(shard).write_bytes(bad)
        with pytest.raises(ShardError, match=f"damaged index; .*symile-dist shards index {tmp_path} --force"):
            read_index(shard)


# -- the seven corruptions -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "train", [6, 6])


def places(shard: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(shard) as archive:
        return archive.getmembers()


def truncate(shard: Path, size: int) -> None:
    os.truncate(shard, size)


def flip(shard: Path, at: int, bit: int = 4) -> None:
    data = bytearray(shard.read_bytes())
    data[at] ^= 1 << bit
    shard.write_bytes(bytes(data))


def truncate_on_boundary(shard: Path) -> None:
    truncate(shard, places(shard)[12].offset)


def truncate_in_header(shard: Path) -> None:
    truncate(shard, places(shard)[12].offset + 200)


def truncate_in_data(shard: Path) -> None:
    truncate(shard, places(shard)[12].offset_data + 20)


def flip_in_header(shard: Path) -> None:
    flip(shard, places(shard)[12].offset + 3)  # in the name


def zero_a_page(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    start = places(shard)[12].offset // 4096 * 4096
    data[start : start + 4096] = bytes(4096)
    assert len(data) == shard.stat().st_size
    shard.write_bytes(bytes(data))


BEFORE_INDEXING: list[tuple[Callable[[Path], None], str]] = [
    (truncate_on_boundary, "truncated: the end mark of the tar file is missing"),
    (truncate_in_header, "truncated: the end mark|damaged near byte|not a plain tar"),
    (truncate_in_data, "truncated inside '000009.a.npy'|not a plain tar file, or damaged: unexpected end of data"),
    (flip_in_header, "damaged near byte [0-9]+: data follows what looks like the tar's end"),
    (zero_a_page, "damaged near byte [0-9]+: data follows what looks like the tar's end"),
]


@pytest.mark.parametrize(("damage", "words"), BEFORE_INDEXING, ids=[d.__name__ for d, _ in BEFORE_INDEXING])
def test_damage_is_found_when_the_index_is_made(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    shard = folder / "shard-00001.tar"
    damage(shard)
    with tarfile.open(shard) as archive:  # the reason for all this: tarfile says little or nothing
        try:
            assert len(archive.getmembers()) < 24
        except tarfile.ReadError:
            assert damage is truncate_in_data
    with pytest.raises(ShardError, match=words) as caught:
        index_directory(folder)
    assert str(shard) in str(caught.value)
    assert not (folder / MANIFEST).exists(), "a manifest without the damaged shard would lose its samples silently"


@pytest.mark.parametrize("every", range(0, 512, 37))
def test_a_flipped_bit_anywhere_in_a_header_is_found(folder: Path, every: int) -> None:
    shard = folder / "shard-00000.tar"
    member = places(shard)[5]
    flip(shard, member.offset + every, bit=2)
    with pytest.raises(ShardError, match=re.escape(str(shard))):
        build_index(shard)


def test_a_damaged_first_header_is_found(folder: Path) -> None:
    shard = folder / "shard-00000.tar"
    flip(shard, 3)
    with pytest.raises(ShardError, match="not a plain tar file, or damaged"):
        build_index(shard)


def test_all_damaged_shards_are_told_at_once(folder: Path) -> None:
    truncate_in_data(folder / "shard-00000.tar")
    flip_in_header(folder / "shard-00001.tar")
    with pytest.raises(ShardError) as caught:
        index_directory(folder)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[:2]] == [
        str(folder / f"shard-0000{number}.tar") for number in (0, 1)
    ]


@pytest.mark.parametrize("damage", [truncate_on_boundary, truncate_in_header, truncate_in_data])
def test_truncation_after_indexing_is_found_by_the_manifest(folder: Path, damage: Callable[[Path], None]) -> None:
    index_directory(folder)
    size = (folder / "shard-00001.tar").stat().st_size
    damage(folder / "shard-00001.tar")
    with pytest.raises(ShardError, match=f"shard-00001.tar: has [0-9]+ bytes, its manifest says {size}") as caught:
        read_manifest(folder)
    assert f"symile-dist shards index {folder}" in str(caught.value)


@pytest.mark.parametrize("damage", ["data bit", "zeroed page"])
def test_changed_bytes_are_found_when_they_are_read(folder: Path, damage: str) -> None:
    index_directory(folder)
    shard = folder / "shard-00001.tar"
    member = places(shard)[12]  # sample 3 of the shard, member a.npy
    if damage == "data bit":
        flip(shard, member.offset_data + 100)
    else:
        zero_a_page(shard)
    read_manifest(folder)  # the size is as it was
    index = read_index(shard)
    bad = read_row(shard, index, 3)
    assert isinstance(bad, BadMember)
    assert (bad.kind, bad.member, bad.offset) == ("checksum", "a.npy", member.offset_data)
    if damage == "data bit":
        assert not isinstance(read_row(shard, index, 2), BadMember)  # the neighbours are whole
        assert not isinstance(read_row(shard, index, 4), BadMember)


def test_a_file_that_ends_early_is_found_when_it_is_read(folder: Path) -> None:
    index_directory(folder)
    shard = folder / "shard-00001.tar"
    index = read_index(shard)
    end = places(shard)[12].offset_data + 20
    truncate_in_data(shard)
    bad = read_row(shard, index, 3)
    assert isinstance(bad, BadMember)
    assert (bad.kind, bad.member) == ("truncated", "a.npy") and str(end) in bad.reason
    assert not isinstance(read_row(shard, index, 2), BadMember)


def test_a_missing_shard(folder: Path) -> None:
    index_directory(folder)
    (folder / "shard-00000.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-00000\.tar: the shard is in the manifest but not in the folder"):
        read_manifest(folder)


# -- the manifest ----------------------------------------------------------------------------------------------------


def test_manifest_round_trip(folder: Path) -> None:
    progress: list[tuple[int, int]] = []
    made = index_directory(folder, progress=lambda done, total: progress.append((done, total)))
    read = read_manifest(folder)
    assert read == made and read.digest == made.digest
    assert [shard.name for shard in read.shards] == ["shard-00000.tar", "shard-00001.tar"]
    assert (read.samples, read.members) == (12, ("a.npy", "b.npy", "c.npy", "json"))
    assert progress == [(1, 2), (2, 2)]
    assert index_directory(folder).digest == made.digest, "the same shards have the same digest"


def test_digest_changes_with_any_sample(tmp_path: Path) -> None:
    first = index_directory(write_shards(tmp_path / "first", [6, 6])).digest
    assert index_directory(write_shards(tmp_path / "same", [6, 6])).digest == first
    other = write_shards(tmp_path / "other", [6, 6])
    shard = other / "shard-00001.tar"
    flip(shard, places(shard)[12].offset_data + 100)
    assert index_directory(other).digest != first


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: None, "the shards have no index"),
        (lambda folder: index_path(folder / "shard-00000.tar").unlink(), r"shard-00000\.tar: the shard has no index"),
        (lambda folder: write_tar(folder / "zz.tar", []), r"zz\.tar: the shard is not in the manifest"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "damaged manifest"),
        (lambda folder: (folder / MANIFEST).write_text('{"version": 2}'), "damaged manifest"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "damaged manifest"),
    ],
)
def test_what_is_wrong_comes_with_the_command_that_makes_it_right(
    folder: Path, prepare: Callable[[Path], object], words: str
) -> None:
    if "have no index" not in words:
        index_directory(folder)
    prepare(folder)
    with pytest.raises(ShardError, match=words) as caught:
        read_manifest(folder)
    assert f"symile-dist shards index {folder}" in str(caught.value)
    index_directory(folder, force="--force" in str(caught.value))  # the remedy works
    assert read_manifest(folder).samples == 12


def test_no_folder_and_no_shards(tmp_path: Path) -> None:
    for act in (read_manifest, index_directory):
        with pytest.raises(ShardError, match="nowhere: no such folder of shards"):
            act(tmp_path / "nowhere")
        with pytest.raises(ShardError, match=r"holds no \.tar shards"):
            act(tmp_path)


@pytest.mark.parametrize("name", ["../other/shard-00000.tar", "/etc/passwd", "..", "", 5])
def test_shard_names_from_a_manifest_are_not_trusted(folder: Path, name: object) -> None:
    index_directory(folder)
    content = json.loads((folder / MANIFEST).read_text())
    content["shards"][0]["name"] = name
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ShardError, match="leaves the folder"):
        read_manifest(folder)


def test_a_manifest_of_another_version(folder: Path) -> None:
    index_directory(folder)
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(ShardError, match=r"version 99 is not the one of this release"):
        read_manifest(folder)


def test_indexing_again_reads_only_what_changed_unless_forced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_directory(folder)
    read: list[str] = []

    def counting(shard: Path, name: str) -> ShardIndex:
        read.append(shard.name)
        return build_index(shard, name)

    monkeypatch.setattr("symile_dist.data.manifest.build_index", counting)
    index_directory(folder)
    assert read == []
    write_shards(folder, [6, 6, 4])  # the same two again, of the same size but newer, and a third
    index_directory(folder)
    assert sorted(read) == ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]
    index_path(folder / "shard-00000.tar").write_bytes(b"damaged")
    os.truncate(folder / "shard-00001.tar", (folder / "shard-00001.tar").stat().st_size - BLOCK)
    read.clear()
    index_directory(folder)
    assert sorted(read) == ["shard-00000.tar", "shard-00001.tar"]
    read.clear()
    index_directory(folder, force=True)
    assert sorted(read) == ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]


def test_force_takes_up_bytes_that_were_changed_on_purpose(folder: Path) -> None:
    before = index_directory(folder).digest
    shard = folder / "shard-00001.tar"
    times = shard.stat()
    flip(shard, places(shard)[12].offset_data + 100)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))  # as bytes rot on a disk
    assert index_directory(folder).digest == before  # of the same size: not read again
    assert index_directory(folder, force=True).digest != before
    read_row(shard, read_index(shard), 3)
