"""From the files of many ranks to whole weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from symile_dist.checkpoint.manifest import CheckpointError, Manifest, read_manifest, verify
from symile_dist.checkpoint.shards import Shards


def verified_manifest(folder: Path) -> Manifest:
    """Reads a checkpoint's manifest and compares every file with it. Raises CheckpointError with what is wrong."""
    manifest = read_manifest(folder)
    problems = verify(folder, manifest.files)
    if problems:
        raise CheckpointError("\n".join(problems))
    return manifest


def consolidated_weights(folder: Path) -> dict[str, Tensor]:
    """Whole fp32 weights by parameter name, from a checkpoint of any ZeRO stage and world size, on the CPU; buffers and
    the inner modules' weights too.

    Raises CheckpointError where a file does not agree with the manifest.
    """
    manifest = verified_manifest(folder)
    saved = Shards(folder, [entry.path for entry in manifest.files])
    weights = {name: saved.whole(name) for name in saved.shapes()}
    return weights | saved.of_rank(0, "buffers") | saved.of_rank(0, "inner")
