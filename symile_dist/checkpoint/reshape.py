"""From the files of many ranks to whole weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from symile_dist.checkpoint.manifest import CheckpointError, Manifest, read_manifest, verify
from symile_dist.checkpoint.pieces import WEIGHTS
from symile_dist.checkpoint.shard import Kind
from symile_dist.checkpoint.shards import Shards


def verified_manifest(folder: Path) -> Manifest:
    """Reads a checkpoint's manifest and compares every file with it. Raises CheckpointError with what is wrong."""
    manifest = read_manifest(folder)
    problems = verify(folder, manifest.files)
    if problems:
        raise CheckpointError("\n".join(problems))
    return manifest


class WholeWeights:
    """The weights of a checkpoint of any ZeRO stage and world size, whole, one at a time: parameters in fp32, buffers
    and the inner modules' weights as they were saved. On the CPU.

    Raises CheckpointError where a file does not agree with the manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = verified_manifest(folder)
        self._saved = Shards(folder, [entry.path for entry in self.manifest.files])
        self._others = self._saved.of_rank(0, "buffers") | self._saved.of_rank(0, "inner")
        self.kinds: dict[str, Kind] = {name: (torch.float32, shape) for name, shape in self._saved.shapes().items()}
        """Name -> type and shape."""
        self.parameters = frozenset(self.kinds)
        """Names of the parameters that the run's own optimizer trains, or keeps frozen."""
        self.kinds |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._others.items()}

    def read(self, name: str) -> Tensor:
        if name in self._others:
            return self._others[name]
        values = torch.empty(self.kinds[name][1])
        self._saved.read(WEIGHTS, name, 0, values.view(-1))
        return values


def consolidated_weights(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint's weights by name: see `WholeWeights`."""
    weights = WholeWeights(folder)
    return {name: weights.read(name) for name in weights.kinds}
