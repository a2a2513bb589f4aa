"""Safetensors files: a rank's of a checkpoint, from a copy of its tensors in the host's memory; and any other, tensor
by tensor.

The memory is laid out as the file is, so writing it takes no second copy, and it is kept from one save to the next:
fresh pages cost more than the copying.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
"""torch's types -> the format's names, in the order in which they stand in a file: the larger first, so that each value
stands at a multiple of its size."""
CHUNK = 2**23
"""Bytes that are written and hashed at once; other threads run in the meantime."""


Kind = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""


def _layout(kinds: Mapping[str, Kind], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A file's header, and where each tensor's bytes stand after it, in the order in which they do."""
    order = list(_DTYPES)
    names = sorted(kinds, key=lambda name: (order.index(kinds[name][0]), name))
    layout: dict[str, Any] = {"__metadata__": dict(metadata)}
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name in names:
        dtype, shape = kinds[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        places[name] = begin, end
        layout[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(layout, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, places


def write_tensors(
    file: BinaryIO, kinds: Mapping[str, Kind], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file of any size; one tensor at a time is in memory.

    Args:
        read: name -> the tensor, of the type and shape that `kinds` says.
    """
    header, places = _layout(kinds, metadata)
    file.write(header)
    for name, (begin, end) in places.items():
        tensor = read(name)
        assert (tensor.dtype, tuple(tensor.shape)) == kinds[name], name
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert data.nbytes == end - begin
        file.write(data.data)


class HostCopy:
    """The tensors of one rank at one moment, as the bytes of a safetensors file."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._header = b""
        self._size = 0
        self._lacking: dict[str, tuple[Tensor, Tensor]] = {}
        """Name -> (tensor, its place), of what is still to be copied."""
        self._stream: Any = None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._header) + self._size

    def take(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Copies tensors of any device, and returns when that is done. Overwrites what was taken before."""
        self.lay_out(tensors, metadata)
        self.fill()

    def lay_out(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Makes room for tensors, which `fill` copies: the first half of `take`."""
        kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self._header, places = _layout(kinds, metadata)
        self._size = max((end for _, end in places.values()), default=0)
        on_device = any(tensor.is_cuda for tensor in tensors.values())
        if len(self._memory) < self._size:
            self._memory = torch.empty(self._size, dtype=torch.uint8, pin_memory=on_device)
        self._lacking = {
            name: (tensors[name].detach(), self._memory[begin:end].view(kinds[name][0]).view(kinds[name][1]))
            for name, (begin, end) in places.items()
        }
        # On a device the copies run beside what comes next, of what stands there now.
        self._stream = torch.cuda.Stream() if on_device else None
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())

    def fill(self, kinds: Container[str] | None = None) -> None:
        """Copies the tensors of some kinds (what stands before the `/` of their names), or all that are lacking;
        returns when that is done."""
        names = [name for name in self._lacking if kinds is None or name.partition("/")[0] in kinds]
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            for name in names:
                tensor, place = self._lacking.pop(name)
                place.copy_(tensor, non_blocking=True)
        if self._stream:
            self._stream.synchronize()

    def write(self, path: Path, half: Callable[[], None] = lambda: None) -> str:
        """Writes the file, durably, and returns its sha256. Raises OSError; then `path` may hold a part of it.

        `half` is called when half of it is written.
        """
        digest = hashlib.sha256(self._header)
        bytes_of = memoryview(self._memory.numpy())  # type: ignore[arg-type]
        with open(path, "wb", buffering=0) as file:
            file.write(self._header)
            for begin in range(0, self._size, CHUNK):
                if begin <= self._size // 2 < begin + CHUNK:
                    half()
                part = bytes_of[begin : min(self._size, begin + CHUNK)]
                digest.update(part)
                while len(part):
                    part = part[file.write(part) :]
            os.fsync(file.fileno())
        return digest.hexdigest()
