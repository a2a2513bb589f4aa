"""Reading a checkpoint's tensors: whole ones, or the stretches that a rank needs, from the files of any number of
ranks. Nothing is unpickled: the files are safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from symile_dist.checkpoint.manifest import CheckpointError
from symile_dist.checkpoint.pieces import WEIGHTS

PIECES = "pieces"
"""Entry of a file's metadata: parameter -> [start, end, shape of the whole], of what the file has of it."""


class _File(NamedTuple):
    handle: Any
    keys: frozenset[str]
    metadata: dict[str, Any]
    pieces: dict[str, tuple[int, int, tuple[int, ...]]]


class Shards:
    """The tensors of a checkpoint whose files were verified. Files are opened when something is looked for in them."""

    def __init__(self, folder: Path, files: Sequence[str], rank: int = 0) -> None:
        """
        Args:
            files: of each rank that saved, in order.
            rank: in whose file to look first; at the same world size and stage it has all that this rank needs.
        """
        self.folder, self.files = folder, list(files)
        self._order = sorted(range(len(files)), key=lambda number: number != rank)
        self._opened: dict[int, _File] = {}

    def _open(self, number: int) -> _File:
        from safetensors import SafetensorError, safe_open

        if number not in self._opened:
            path = self.folder / self.files[number]
            try:
                handle = safe_open(str(path), framework="pt")
                metadata = {key: json.loads(value) for key, value in (handle.metadata() or {}).items()}
                pieces = {name: (int(a), int(b), tuple(s)) for name, (a, b, s) in metadata.get(PIECES, {}).items()}
                self._opened[number] = _File(handle, frozenset(handle.keys()), metadata, pieces)
            except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from None
        return self._opened[number]

    def _with(self, kind: str, name: str) -> Iterator[_File]:
        for number in self._order:
            file = self._open(number)
            if name in file.pieces and f"{kind}/{name}" in file.keys:
                yield file

    def kinds(self, name: str) -> set[str]:
        """What there is of a parameter: `weights`, and the optimizer's moments and counts."""
        for file in self._with(WEIGHTS, name):
            return {kind for kind, _, of in (key.partition("/") for key in file.keys) if of == name}
        raise CheckpointError(f"{self.folder}: has nothing of parameter '{name}': it is of another model")

    def read(self, kind: str, name: str, start: int, into: Tensor) -> None:
        """Fills `into`, flat, with a parameter's values from `start` on.

        Raises CheckpointError where the files have not all of them.
        """
        lacking = [(start, start + into.numel())]
        for file in self._with(kind, name):
            have_begin, have_end, _ = file.pieces[name]
            left: list[tuple[int, int]] = []
            for begin, end in lacking:
                low, high = max(begin, have_begin), min(end, have_end)
                if low < high:
                    stretch = file.handle.get_slice(f"{kind}/{name}")[low - have_begin : high - have_begin]
                    into[low - start : high - start].copy_(stretch)
                    left += [part for part in ((begin, low), (high, end)) if part[0] < part[1]]
                else:
                    left.append((begin, end))
            lacking = left
            if not lacking:
                return
        raise CheckpointError(f"{self.folder}: lacks values of '{kind}/{name}' from {lacking[0][0]} on")

    def scalar(self, kind: str, name: str) -> float:
        """A number that stands for a whole parameter."""
        return float(next(self._with(kind, name)).handle.get_tensor(f"{kind}/{name}"))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for number in self._order:
            found |= {name: shape for name, (_, _, shape) in self._open(number).pieces.items()}
        return found

    def of_rank(self, number: int, kind: str) -> dict[str, Tensor]:
        """What stands whole in the file of a rank as `KIND/NAME`, by NAME; nothing where no such rank saved."""
        if number >= len(self.files):
            return {}
        file = self._open(number)
        return {key.partition("/")[2]: file.handle.get_tensor(key) for key in file.keys if key.startswith(f"{kind}/")}

    def metadata(self, number: int) -> dict[str, Any]:
        """What the file of a rank says beside its tensors; nothing where no such rank saved."""
        return self._open(number).metadata if number < len(self.files) else {}
