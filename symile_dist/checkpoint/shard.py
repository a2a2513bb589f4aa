"""A rank's file of a checkpoint: a copy of its tensors in the host's memory, and that memory as a safetensors file.

The step loop waits for the copy alone. The memory is laid out as the file is, so writing it takes no second copy, and
it is kept from one save to the next: fresh pages cost more than the copying.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


class HostCopy:
    """The tensors of one rank at one moment, as the bytes of a safetensors file."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._header = b""
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._header) + self._size

    def take(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Copies tensors of any device, and returns when that is done. Overwrites what was taken before."""
        order = list(_DTYPES)
        names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
        layout: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name in names:
            tensor = tensors[name]
            begin, end = end, end + tensor.numel() * tensor.element_size()
            layout[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        header = json.dumps(layout, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        on_device = any(tensor.is_cuda for tensor in tensors.values())
        if len(self._memory) < end:
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=on_device)
        self._size = end
        for name in names:
            tensor = tensors[name].detach()
            begin, end = layout[name]["data_offsets"]
            place = self._memory[begin:end].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor, non_blocking=True)
        if on_device:
            torch.cuda.synchronize()

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
