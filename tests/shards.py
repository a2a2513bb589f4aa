"""Tiny synthetic shards: what every sample holds is a pure function of its number, so a test can recompute it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DIMENSION = 4
CLASSES = 5


def sample_array(modality: str, number: int) -> NDArray[np.float32]:
    """What sample `number` holds for a modality: (DIMENSION,) float32."""
    return np.random.RandomState([ord(modality[0]), number]).standard_normal(DIMENSION).astype(np.float32)


def npy_bytes(array: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def key_of(number: int) -> str:
    return f"{number:06d}"


def sample_members(number: int, modalities: Sequence[str], without: Iterable[str] = ()) -> dict[str, bytes]:
    """Suffix -> bytes of one sample."""
    members = {f"{name}.npy": npy_bytes(sample_array(name, number)) for name in modalities if name not in set(without)}
    return {**members, "json": json.dumps({"class": f"class-{number % CLASSES}", "number": number}).encode()}


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """A plain tar file of (name, bytes), the same bytes every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def write_shards(
    directory: Path,
    sizes: Sequence[int],
    modalities: Sequence[str] = ("a", "b", "c"),
    without: Mapping[int, Iterable[str]] | None = None,
) -> Path:
    """shard-00000.tar, ... with `sizes` samples each, numbered through; no index.

    Args:
        without: sample number -> the modalities that it lacks.
    """
    number = 0
    for shard, size in enumerate(sizes):
        members: list[tuple[str, bytes]] = []
        for number_in_shard in range(number, number + size):
            lacking = (without or {}).get(number_in_shard, ())
            for suffix, data in sample_members(number_in_shard, modalities, lacking).items():
                members.append((f"{key_of(number_in_shard)}.{suffix}", data))
        number += size
        write_tar(directory / f"shard-{shard:05d}.tar", members)
    return directory


def config_text(train: Path | str, modalities: Sequence[str] = ("a", "b", "c"), run: str = "test") -> str:
    """A config over such shards; what a test wants otherwise comes as overrides."""
    lines = [f"run: {{name: {run}}}", f"data: {{train: {train}, loader_processes: 0}}", "modalities:"]
    lines += [
        f"  {name}: {{member: {name}.npy, decoder: npy, transform: tensor, "
        f"encoder: {{name: mlp, input_dim: {DIMENSION}}}}}"
        for name in modalities
    ]
    lines += ["model: {embedding_dim: 8}", "train: {steps: 4, global_batch_size: 12}", "metrics: {enabled: false}"]
    return "\n".join(lines) + "\n"
