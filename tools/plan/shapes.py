"""What one sample of every modality looks like, from the data where it can be reached, else from the config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from symile_dist.config import Config, ModalityConfig
from symile_dist.data.batches import UNDECODABLE, Reader
from symile_dist.data.index import ShardIndex, parse_index
from symile_dist.data.manifest import Manifest, read_manifest
from symile_dist.data.spans import BadMember, Spans
from symile_dist.errors import StorageError
from symile_dist.storage import Folder
from symile_dist.types import Batch, Inputs, Padded

LOOKED_AT = 64
"""Samples of the first shard whose lengths are compared: a batch is padded to its longest."""


class InputShape(NamedTuple):
    """One modality's sample, as the encoder gets it."""

    shape: tuple[int, ...]
    """Without the batch's dimension; of sequences of unequal length the longest of `LOOKED_AT` samples."""
    dtype: torch.dtype
    padded: bool
    """Sequences of unequal length: `types.Padded`."""
    source: str
    """Where it comes from, for people."""
    assumed: bool = False
    """It does not come from a sample."""

    @property
    def bytes(self) -> int:
        """Of one sample, its length included."""
        return math.prod(self.shape) * self.dtype.itemsize + (8 if self.padded else 0)


class DataFacts(NamedTuple):
    """What the training data tells."""

    inputs: dict[str, InputShape]
    samples: int | None
    """None where the data cannot be reached."""
    bytes_per_sample: float | None
    """That are read of a shard: from the first wanted member to the end of the last one."""
    source: str


def data_facts(config: Config, given: Mapping[str, str]) -> DataFacts:
    """Shapes, number and size of the training samples.

    Args:
        given: modality -> shape such as `3x224x224` that a person has said; it goes before everything else.

    Raises ValueError for a modality whose shape nobody tells, with what to do.
    """
    unknown = [name for name in given if name not in config.modalities]
    if unknown:
        raise ValueError(f"--shape {unknown[0]}=...: the config has no such modality ({', '.join(config.modalities)})")
    samples: int | None = None
    per_sample: float | None = None
    seen: dict[str, InputShape] = {}
    sources = []
    for name, dataset in config.data.train.items():
        try:
            manifest = read_manifest(dataset.path, config.data.storage, check=False)
        except (ValueError, OSError, StorageError):
            sources.append(f"{dataset.path} cannot be reached")
            continue
        samples = (samples or 0) + _usable(manifest, config)
        sources.append(f"{dataset.path} ({name})")
        if not seen:
            seen, per_sample = _first_samples(config, manifest)
    inputs = {}
    for name, modality in config.modalities.items():
        found = _said(name, given, modality) or seen.get(name) or _declared(modality)
        if found is None:
            raise ValueError(
                f"modality '{name}': the data cannot be read here, and neither its transform nor its encoder tells the "
                f"shape of a sample; give it: --shape {name}=3x224x224 (or one number, for a sequence)"
            )
        inputs[name] = found
    return DataFacts(inputs, samples, per_sample, "; ".join(sources))


def make_batch(
    inputs: Mapping[str, InputShape], rows: int, device: str = "meta", modalities: Sequence[str] = ()
) -> Batch:
    """`rows` samples of these shapes, all present and valid; zeros where the device is a real one."""
    made: dict[str, Inputs] = {}
    for name, one in inputs.items():
        values = torch.zeros((rows, *one.shape), dtype=one.dtype, device=device)
        lengths = torch.full((rows,), one.shape[0] if one.shape else 1, dtype=torch.int64, device=device)
        made[name] = Padded(values, lengths) if one.padded else values
    flags = torch.ones((rows, len(modalities) or len(inputs)), dtype=torch.bool, device=device)
    return Batch(made, flags, flags[:, 0].clone(), torch.zeros(rows, dtype=torch.int64, device=device))


def _usable(manifest: Manifest, config: Config) -> int:
    """Samples with all modalities where all are required, else all."""
    if config.data.require != "all":
        return manifest.samples
    wanted = 0
    for modality in config.modalities.values():
        if modality.member.lower() in manifest.members:
            wanted |= 1 << manifest.members.index(modality.member.lower())
    return sum(count for shard in manifest.shards for mask, count in shard.presence if mask & wanted == wanted)


def _first_samples(config: Config, manifest: Manifest) -> tuple[dict[str, InputShape], float | None]:
    """Shapes of the first shard's first samples, read and transformed, and bytes per sample."""
    folder = Folder(manifest.url, config.data.storage)
    if folder.path is None or not manifest.shards:
        return {}, _by_manifest(manifest)  # of an object store no whole shard is fetched for a plan
    shard = folder.path / manifest.shards[0].name
    try:
        index = parse_index(folder.read(f"{shard.name}.idx"), f"{shard.name}.idx", manifest.url)
        found = {name: _read_shape(name, one, shard, index) for name, one in config.modalities.items()}
    except (ValueError, OSError):
        return {}, _by_manifest(manifest)
    wanted = [one.member.lower() for one in config.modalities.values() if one.member.lower() in index.members]
    columns = [index.members.index(member) for member in dict.fromkeys(wanted)]
    lengths = Spans.of(index.places[:, :, columns], [index.members[column] for column in columns]).lengths
    return {name: one for name, one in found.items() if one is not None}, float(np.mean(lengths)) if lengths else None


def _by_manifest(manifest: Manifest) -> float | None:
    return sum(shard.bytes for shard in manifest.shards) / manifest.samples if manifest.samples else None


def _read_shape(name: str, modality: ModalityConfig, shard: Path, index: ShardIndex) -> InputShape | None:
    """None where no sample can be had: a tokenizer that is not there, a member that the first samples lack."""
    member = modality.member.lower()
    if member not in index.members:
        return None
    column = index.members.index(member)
    try:
        reader = Reader.from_config(name, modality)
    except ValueError:
        return None
    rows = np.flatnonzero(index.present[:, column])
    # Of one size: one sample will do.
    rows = rows[: LOOKED_AT if reader.variable_length else 1]
    spans = Spans.of(index.places[rows][:, :, [column]], [member])
    shapes = []
    dtype = torch.float32
    with shard.open("rb") as file:

        def read(length: int, offset: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        for parts in spans.read([read] * len(rows)):
            if isinstance(parts, BadMember):
                continue
            try:
                tensor = reader(parts[0], None)
            except UNDECODABLE:
                continue
            shapes.append(tuple(tensor.shape))
            dtype = tensor.dtype
    if not shapes:
        return None
    longest = max(shapes)
    source = f"the first sample of {shard.name}"
    if reader.variable_length:
        source = f"the longest of the first {len(shapes)} samples of {shard.name}"
    return InputShape(longest, dtype, reader.variable_length, source)


def _kind(modality: ModalityConfig) -> tuple[torch.dtype, bool]:
    """What the transform gives: dtype, and whether its length varies."""
    name, options = modality.transform.name, modality.transform.options
    if name in ("characters", "tokens"):
        return torch.int64, True
    if name == "tensor":
        dtype = getattr(torch, str(options.get("dtype", "float32")), torch.float32)
        return dtype, bool(options.get("variable_length", False))
    return torch.float32, name == "waveform" or (name == "whisper_features" and not options.get("whole_window"))


def _said(name: str, given: Mapping[str, str], modality: ModalityConfig) -> InputShape | None:
    if name not in given:
        return None
    try:
        shape = tuple(int(size) for size in given[name].split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"--shape {name}={given[name]}: should be sizes such as 3x224x224")
    return InputShape(shape, *_kind(modality), "--shape", assumed=True)


def _declared(modality: ModalityConfig) -> InputShape | None:
    """By the transform's options, else by the encoder's."""
    transform, encoder = modality.transform, modality.encoder
    dtype, padded = _kind(modality)
    options = transform.options
    if transform.name == "image" and options.get("size"):
        channels = 1 if modality.decoder.options.get("mode") == "L" else 3
        return InputShape((channels, *options["size"]), dtype, padded, "the transform's size", assumed=True)
    if transform.name in ("characters", "tokens"):
        length = int(options.get("max_length", 256 if transform.name == "characters" else 128))
        return InputShape((length,), dtype, padded, "the transform's max_length", assumed=True)
    if transform.name == "waveform" and options.get("max_seconds"):
        samples = round(float(options["max_seconds"]) * int(options.get("sample_rate", 16000)))
        return InputShape((samples,), dtype, padded, "the transform's max_seconds", assumed=True)
    if transform.name in ("tensor", "features") and options.get("shape") and None not in options["shape"]:
        return InputShape(tuple(options["shape"]), dtype, padded, "the transform's shape", assumed=True)
    key = {"mlp": "input_dim", "features": "input_dim", "xlm_roberta": "max_length"}.get(encoder.name, "")
    if isinstance(encoder.options.get(key), int):
        return InputShape((int(encoder.options[key]),), dtype, padded, f"the encoder's {key}", assumed=True)
    return None


__all__ = ["LOOKED_AT", "DataFacts", "InputShape", "data_facts", "make_batch"]
