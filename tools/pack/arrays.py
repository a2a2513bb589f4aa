"""Samples from arrays on disk, one row each. Arrays are memory-mapped: none is ever loaded whole, nothing unpickled."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symile_dist.storage import sha256_of_file
from symile_dist.tools.pack.source import Progress, ReadSample, Survey, json_bytes, key_of, tar_bytes

DIGEST_ROWS = 64
"""Rows of a large array that its digest covers, evenly spaced: the whole of it would take as long as packing."""


def open_array(path: Path) -> NDArray[Any]:
    """A memory-mapped array from a .npy file or a tensor from a .pt file.

    bfloat16, which numpy does not know, comes as uint16 fields of a structured type (see `row_of`). Raises ValueError
    for anything that is not a plain numeric array, which a pickle in either format is.
    """
    found: NDArray[Any]
    if path.suffix == ".npy":
        try:
            with np.errstate(over="ignore"):  # the product of a hostile shape
                found = np.lib.format.open_memmap(path, mode="r")
        except OSError:
            raise
        except Exception as error:  # a damaged header may raise almost anything (TokenError, MemoryError)
            reason = str(error)[:LONGEST_REASON] or type(error).__name__
            raise ValueError(f"{path}: not a plain .npy array: {reason}") from None
    else:
        found = _open_tensor(path)
    if found.dtype.kind not in "biuf" and found.dtype != _BFLOAT16:
        raise ValueError(f"{path}: an array of {found.dtype} is not numeric")
    if found.ndim == 0:
        raise ValueError(f"{path}: one number, not an array of samples")
    return found


_BFLOAT16 = np.dtype([("bfloat16", "<u2")])
LONGEST_REASON = 300
"""Characters of another library's message: numpy repeats a header that it cannot read, of up to 10,000."""


def _open_tensor(path: Path) -> NDArray[Any]:
    import torch

    remedy = "save it again as a plain tensor with torch.save, or with numpy.save as .npy"
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a foreign zip archive or pickle may raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: cannot be read safely as a tensor ({reason}); {remedy}") from None
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{path}: holds no plain tensor ({type(tensor).__name__}); {remedy}")
    tensor = tensor.detach()
    try:
        if tensor.dtype == torch.bfloat16:
            return np.asarray(tensor.view(torch.int16).numpy().view(_BFLOAT16))
        return np.asarray(tensor.numpy())
    except (TypeError, RuntimeError):  # of a type that numpy does not know, or without values (meta)
        raise ValueError(f"{path}: a tensor of {tensor.dtype} on {tensor.device} cannot be packed; {remedy}") from None


def row_of(values: NDArray[Any], row: int) -> NDArray[Any]:
    """One row, copied; bfloat16 as float32, which holds it exactly."""
    return _widened(np.array(values[row]))


def _widened(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype == _BFLOAT16:
        return np.asarray((values["bfloat16"].astype(np.uint32) << 16).view(np.float32))
    return values


def cast(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Raises ValueError where a number does not fit: infinite now but not before, or no longer the same integer.

    NaN stays NaN: the loader's transforms refuse it, sample by sample.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        made = values.astype(dtype)
    if made.dtype.kind == "f":
        if np.isinf(made).any() and not np.isinf(values).any():
            remedy = "; use --dtype float32, into another folder" if made.dtype == np.float16 else ""
            raise ValueError(f"{np.nanmax(np.abs(values)):g} does not fit into {made.dtype}{remedy}")
    elif (made != values).any():
        raise ValueError(f"values that are not integers of {made.dtype}")
    return made


def npy_bytes(values: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(values), allow_pickle=False)
    return file.getvalue()


@dataclass(frozen=True)
class ArrayMember:
    """A member of every sample: rows of one or more arrays, joined."""

    member: str
    paths: tuple[Path, ...]
    dtype: str
    """numpy's name of what is written."""


@dataclass(frozen=True)
class ArraySource:
    """Arrays of n rows; row i of each belongs to sample i.

    Raises ValueError for unequal lengths, and for a fact that is NaN or infinite.
    """

    layout: str
    members: tuple[ArrayMember, ...]
    facts: tuple[tuple[str, Path], ...]
    """(key in the member `json`, array of (n,) or a .txt file of n lines)"""

    def __post_init__(self) -> None:
        lengths = {path: len(open_array(path)) for member in self.members for path in member.paths}
        for name, path in self.facts:
            if path.suffix != ".txt" and open_array(path).ndim != 1:
                raise ValueError(f"{path}: has shape {open_array(path).shape}; '{name}' needs one number per sample")
            values = self._fact(path)
            lengths[path] = len(values)
            # JSON knows no NaN, and as a class it would make one class of all samples whose class is not known.
            if path.suffix != ".txt" and len(odd := np.flatnonzero(~np.isfinite(values))):
                raise ValueError(
                    f"{path}: row {odd[0]}: '{name}' is {values[odd[0]]}; give every sample a number, or leave out "
                    "the samples that have none"
                )
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{path.name} {length}" for path, length in lengths.items())
            raise ValueError(f"the arrays are not equally long, so rows do not belong together: {told}")

    def parameters(self) -> dict[str, Any]:
        paths = [path for member in self.members for path in member.paths] + [path for _, path in self.facts]
        digests: dict[str, list[str]] = {}
        for path in dict.fromkeys(paths):  # files of several folders may have one name
            digests.setdefault(path.name, []).append(_digest(path))
        return {
            "layout": self.layout,
            "members": {
                member.member: {"arrays": [path.name for path in member.paths], "dtype": member.dtype}
                for member in self.members
            },
            "facts": {name: path.name for name, path in self.facts},
            "sha256": {name: found[0] if len(found) == 1 else found for name, found in digests.items()},
        }

    def survey(self, progress: Progress) -> Survey:
        with self._opened() as (arrays, facts):
            rows = len(next(iter(arrays.values()))[0])
            fixed = 0
            if rows:  # every row of an array has one size
                fixed = tar_bytes(len(content) for content in self._contents(arrays, 0, check=False).values())
            sizes = array("q")
            for row in range(rows):
                sizes.append(fixed + tar_bytes([len(self._json(facts, row))]))
                if row % 65536 == 0:
                    progress("rows", row, rows)
        return Survey(
            starts=np.zeros(rows + 1, np.int64),
            tar_bytes=np.array(sizes, dtype=np.int64),
            members=dict(sorted({**{member.member: rows for member in self.members}, "json": rows}.items())),
        )

    @contextlib.contextmanager
    def open(self) -> Iterator[ReadSample]:
        with self._opened() as (arrays, facts):

            def read(row: int, _start: int, _end: int) -> tuple[str, dict[str, bytes]]:
                return key_of(row), {**self._contents(arrays, row), "json": self._json(facts, row)}

            yield read

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[dict[str, list[NDArray[Any]]], dict[str, Any]]]:
        arrays = {member.member: [open_array(path) for path in member.paths] for member in self.members}
        yield arrays, {name: self._fact(path) for name, path in self.facts}

    def _contents(self, arrays: dict[str, list[NDArray[Any]]], row: int, check: bool = True) -> dict[str, bytes]:
        contents = {}
        for member in self.members:
            parts = [row_of(values, row) for values in arrays[member.member]]
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
            try:
                made = cast(joined, member.dtype) if check else np.zeros(joined.shape, member.dtype)
            except ValueError as error:
                names = " and ".join(str(path) for path in member.paths)
                raise ValueError(f"{names}: row {row}: {error}") from None
            contents[member.member] = npy_bytes(made)
        return contents

    @staticmethod
    def _fact(path: Path) -> Any:
        return _lines(path, path.stat().st_mtime_ns) if path.suffix == ".txt" else _widened(open_array(path))

    @staticmethod
    def _json(facts: dict[str, Any], row: int) -> bytes:
        values = {name: _plain(values[row]) for name, values in facts.items()}
        if "class" in values:
            values["class"] = str(values["class"])
        return json_bytes(values)


def _plain(value: Any) -> Any:
    """A number of numpy's as JSON has it; 7.0 as 7, because published ids went through a float tensor."""
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _Lines:
    """The lines of a text file in few bytes: a number per line, and the different lines (a handful of languages)."""

    def __init__(self, path: Path) -> None:
        numbers: dict[str, int] = {}
        self.codes = array("I")
        try:
            with open(path, encoding="utf-8-sig", newline="\n") as file:  # editors put a byte-order mark in front
                for line in file:
                    self.codes.append(numbers.setdefault(line.rstrip("\r\n"), len(numbers)))
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8") from None
        self.lines = list(numbers)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> str:
        return self.lines[self.codes[row]]


@functools.lru_cache(maxsize=4)
def _lines(path: Path, _changed: int) -> _Lines:
    """Kept: a process asks once per shard."""
    return _Lines(path)


def _digest(path: Path) -> str:
    """SHA-256 of a text or a list of numbers; of a larger array, of its shape, type and evenly spaced rows."""
    if path.suffix == ".txt":
        return sha256_of_file(path)
    values = open_array(path)
    digest = hashlib.sha256(f"{values.shape} {values.dtype.str}".encode())
    if values.ndim == 1:
        digest.update(np.ascontiguousarray(values).tobytes())
    else:
        for row in np.unique(np.linspace(0, max(len(values) - 1, 0), DIGEST_ROWS).astype(np.int64)):
            digest.update(np.ascontiguousarray(values[row : row + 1]).tobytes())
    return digest.hexdigest()


def arrays_source(arrays: Sequence[str], label: str | None = None) -> ArraySource:
    """`NAME=FILE` each -> a member `NAME.npy` of every sample: the array's row, of the array's type.

    Args:
        label: an array (n,), or a .txt file of n lines, that holds the class.

    Raises ValueError for what is not of that form, for one name twice, and as `ArraySource` does.
    """
    members: dict[str, ArrayMember] = {}
    for text in arrays:
        name, equals, file = text.partition("=")
        if not equals or not re.fullmatch(r"[a-z0-9_-]+", name):
            raise ValueError(f"--array {text}: write NAME=FILE, the name in small letters, e.g. vision=vision.npy")
        if name in members:
            raise ValueError(f"--array {name}: the name stands twice")
        dtype = open_array(Path(file)).dtype
        kind = "float32" if dtype == _BFLOAT16 else dtype.newbyteorder("=").name
        members[name] = ArrayMember(f"{name}.npy", (Path(file),), kind)
    return ArraySource("arrays", tuple(members.values()), () if label is None else (("class", Path(label)),))


def find_array(folders: tuple[Path, ...], stem: str, split: str, suffixes: tuple[str, ...]) -> Path | None:
    """`<stem>_<split>` with one of the suffixes in one of the folders. Raises ValueError where several are there."""
    found = [
        folder / f"{stem}_{split}{suffix}"
        for folder in folders
        for suffix in suffixes
        if (folder / f"{stem}_{split}{suffix}").is_file()
    ]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]}: two files for one array; remove one")
    return found[0] if found else None


def require_array(folders: tuple[Path, ...], stem: str, split: str, suffixes: tuple[str, ...]) -> Path:
    """Like `find_array`; raises ValueError where none is there."""
    found = find_array(folders, stem, split, suffixes)
    if found is None:
        there = sorted(path.name for folder in folders if folder.is_dir() for path in folder.glob(f"{stem}_*"))
        told = f"; there is {', '.join(there[:SHOWN])}" if there else ""
        names = " or ".join(f"{stem}_{split}{suffix}" for suffix in suffixes)
        raise ValueError(f"{' and '.join(str(folder) for folder in folders)}: no {names}{told}")
    return found


SHOWN = 5
"""Names that a message lists."""


def require_shape(path: Path, shape: tuple[int | None, ...], meaning: str) -> None:
    """Raises ValueError unless the array has this shape; None stands for any number."""
    found = open_array(path).shape
    if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
        wanted = ", ".join("n" if size is None else str(size) for size in shape)
        raise ValueError(f"{path}: has shape {tuple(found)}; {meaning} is ({wanted})")
