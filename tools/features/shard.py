"""One shard: its samples' members are read, checked and decoded, encoded in batches, and written in the same order."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from symile_dist.data.batches import UNDECODABLE
from symile_dist.data.files import OpenFile
from symile_dist.data.index import BLOCK, ShardIndex, index_path, parse_index, split_name, write_index
from symile_dist.data.manifest import ShardEntry
from symile_dist.errors import RunFailed
from symile_dist.registry import DECODERS, TRANSFORMS, build, resolve
from symile_dist.storage import Folder, write_atomic
from symile_dist.tools.features.encoders import FrozenEncoders
from symile_dist.tools.features.recipe import EMPTY_MEMBER, Recipe, feature_member

LEFT_OUT = ".left-out.jsonl"
"""Stands beside a shard of features from which something is missing: a line per member."""


class LeftOut(NamedTuple):
    """A member of a source shard that could not be used."""

    shard: str
    key: str
    """The sample's; made up where no header of its members can be read."""
    member: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}, sample '{self.key}', member '{self.member}': {self.reason}"


def is_complete(folder: Path, shard: str) -> bool:
    return (folder / shard).exists() and index_path(folder / shard).exists()


def read_left_out(folder: Path, shard: str) -> list[LeftOut]:
    """What is missing from a shard of features that is complete."""
    try:
        lines = (folder / f"{shard}{LEFT_OUT}").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [LeftOut(**json.loads(line)) for line in lines]


def encode_shard(recipe: Recipe, encoders: FrozenEncoders, source: Folder, entry: ShardEntry, out: Path) -> None:
    """Writes the shard of features that belongs to a source shard, then its index, unless they are there.

    Raises ShardError for an index that is not the manifest's, RunFailed where encoding cannot go on.
    """
    target = out / entry.name
    if not target.exists():
        content = source.read(f"{entry.name}.idx")
        index = parse_index(content, source / f"{entry.name}.idx", source.url, entry.index_sha256)
        scratch = out / f".{entry.name}.{os.getpid()}.source.tmp"
        scratch.mkdir(exist_ok=True)  # a killed part's, which had the same number
        try:
            with source.local_copy(entry.name, scratch) as path:
                work = _Work(recipe, encoders, index, OpenFile(str(path)), entry.name, sample_keys(path, index))
                write_atomic(target, lambda tar: work.write(tar, out))
        finally:
            with contextlib.suppress(OSError):
                scratch.rmdir()
    written = write_index(target)
    if len(written) != entry.samples:
        target.unlink()
        index_path(target).unlink()
        raise RunFailed(f"{source / entry.name}: {entry.samples} samples became {len(written)}: are its keys unique?")


def sample_keys(shard: Path, index: ShardIndex) -> list[str]:
    """The key of each row. Where no header of a sample's members can be read, one is made up: the row must stay."""
    keys_at: dict[int, str] = {}
    # A damaged header ends tarfile's walk, with or without a word.
    with (
        contextlib.suppress(tarfile.TarError, ValueError, OverflowError, MemoryError),
        tarfile.open(shard, "r:") as tar,
    ):
        for header in tar:
            keys_at[header.offset_data] = split_name(header.name)[0]
    keys: list[str] = []
    seen: set[str] = set()
    offsets = index.block_offsets.astype(np.int64) * BLOCK
    with open(shard, "rb") as file:
        for row in range(len(index)):
            found = None
            for offset in offsets[row, index.present[row]].tolist():
                found = keys_at.get(offset) or _key_before(file, offset)
                if found and found not in seen:
                    break
            key = found if found and found not in seen else f"unreadable-{row:08d}"
            seen.add(key)
            keys.append(key)
    return keys


def _key_before(file: BinaryIO, offset: int) -> str | None:
    """The key in the header that stands before a member's data."""
    file.seek(offset - BLOCK)
    try:
        return split_name(tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape").name)[0]
    except (tarfile.TarError, ValueError):
        return None


@dataclass
class _Sample:
    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    """What goes into the shard of features, by suffix."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What is to be encoded, by modality."""
    left_out: list[LeftOut] = field(default_factory=list)


class _Work:
    """The encoding of one shard."""

    def __init__(
        self,
        recipe: Recipe,
        encoders: FrozenEncoders,
        index: ShardIndex,
        file: OpenFile,
        shard: str,
        keys: Sequence[str],
    ) -> None:
        self.recipe, self.encoders, self.index = recipe, encoders, index
        self.file, self.shard, self.keys = file, shard, keys
        modalities = {name: recipe.config.modalities[name] for name in recipe.modalities}
        self.decoders: dict[str, Any] = {
            name: resolve(m.decoder.name, DECODERS, "decoder") for name, m in modalities.items()
        }
        self.decoder_options = {name: m.decoder.options for name, m in modalities.items()}
        self.transforms: dict[str, Any] = {
            name: build(m.transform.name, m.transform.options, TRANSFORMS, "transform")
            for name, m in modalities.items()
        }
        self.column_of = {member: column for column, member in enumerate(index.members)}

    def write(self, file: BinaryIO, out: Path) -> None:
        """The tar file, and beside it what was left out of it."""
        from webdataset.writer import TarWriter

        left_out: list[LeftOut] = []
        # Without fixed times and owners two runs would differ.
        with TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644, keep_meta=True) as tar:
            for samples in self._batches():
                for modality in self.recipe.modalities:
                    self._encode(modality, samples)
                for sample in samples:
                    left_out += sample.left_out
                    tar.write({"__key__": sample.key, **(sample.members or {EMPTY_MEMBER: b""})})
        report = out / f"{self.shard}{LEFT_OUT}"
        # Before the shard has its name: a whole shard has a whole report.
        if left_out:
            lines = "".join(json.dumps(each._asdict(), ensure_ascii=False) + "\n" for each in left_out)
            write_atomic(report, lambda file: file.write(lines.encode()))
        else:
            report.unlink(missing_ok=True)

    def _batches(self) -> Iterator[list[_Sample]]:
        """Samples in their order, `batch_size` at a time; the next ones are decoded while one batch is encoded."""
        waiting: deque[list[Future[_Sample]]] = deque()
        with ThreadPoolExecutor(self.recipe.threads) as pool:
            try:
                for start in range(0, len(self.index), self.recipe.batch_size):
                    rows = range(start, min(start + self.recipe.batch_size, len(self.index)))
                    waiting.append([pool.submit(self._read, row) for row in rows])
                    if len(waiting) > 1:
                        yield [future.result() for future in waiting.popleft()]
                while waiting:
                    yield [future.result() for future in waiting.popleft()]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, row: int) -> _Sample:
        sample = _Sample(self.keys[row])
        for member in self.recipe.kept:
            data = self._bytes(sample, row, member)
            if data is not None:
                sample.members[member] = data
        for name in self.recipe.modalities:
            member = self.recipe.member(name)
            data = self._bytes(sample, row, member)
            if data is None:
                continue
            try:
                decoded = self.decoders[name](data, **self.decoder_options[name])
                tensor = self.transforms[name](decoded, None)
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"the transform of '{name}' gives {type(tensor).__name__}, not a tensor")
                sample.tensors[name] = tensor
            except UNDECODABLE as error:
                self._leave_out(sample, member, error)
        return sample

    def _bytes(self, sample: _Sample, row: int, member: str) -> bytes | None:
        """A member's bytes; None where the sample lacks it, or where they are not what the index says."""
        column = self.column_of.get(member)
        if column is None or not self.index.present[row, column]:
            return None
        size, offset = int(self.index.sizes[row, column]), int(self.index.block_offsets[row, column]) * BLOCK
        try:
            data = self.file.read(size, offset)
            if len(data) < size:
                raise ValueError(f"the file ends after {len(data)} of its {size} bytes")
            if zlib.crc32(data) != int(self.index.checksums[row, column]):
                raise ValueError("its bytes do not match their checksum")
        except (OSError, ValueError) as error:
            self._leave_out(sample, member, error)
            return None
        return data

    def _leave_out(self, sample: _Sample, member: str, error: Exception) -> None:
        left_out = LeftOut(self.shard, sample.key, member, str(error) or type(error).__name__)
        if self.recipe.stop_on_error:
            raise RunFailed(str(left_out)) from error
        if left_out not in sample.left_out:  # two modalities may read one member
            sample.left_out.append(left_out)

    def _encode(self, modality: str, samples: list[_Sample]) -> None:
        """Adds the features of the samples that have the modality. Samples of one shape are encoded together; those of
        a rarer shape that the encoder refuses are left out."""
        variable = bool(getattr(self.transforms[modality], "variable_length", False))
        alike: dict[tuple[Any, ...], list[_Sample]] = {}
        for sample in samples:
            if modality in sample.tensors:
                tensor = sample.tensors[modality]
                alike.setdefault((tensor.dtype, *tensor.shape[1 if variable else 0 :]), []).append(sample)
        for number, group in enumerate(sorted(alike.values(), key=len, reverse=True)):
            keys, tensors = [sample.key for sample in group], [sample.tensors[modality] for sample in group]
            try:
                features = self.encoders.encode(modality, keys, tensors, variable)
            except RunFailed as error:
                if number == 0:
                    raise RunFailed(f"{self.shard}: {error}") from error
                for sample in group:
                    self._leave_out(sample, self.recipe.member(modality), error)
                continue
            for sample, feature in zip(group, features, strict=True):
                sample.members[feature_member(modality)] = npy_bytes(feature)


def npy_bytes(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


__all__ = ["LEFT_OUT", "LeftOut", "encode_shard", "is_complete", "read_left_out", "sample_keys"]
