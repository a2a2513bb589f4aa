"""The config with which training reads features in place of raw media."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from symile_dist.config import Config
from symile_dist.data.decode import decode_npy
from symile_dist.data.index import BLOCK, read_index
from symile_dist.data.manifest import Manifest
from symile_dist.tools.features.recipe import feature_member


class FeatureShape(NamedTuple):
    """What a modality's features look like."""

    shape: tuple[int, ...]
    """Of the first one."""
    variable_length: bool
    """The first dimension differs from sample to sample."""


def feature_shapes(folder: Path, manifest: Manifest, modalities: Sequence[str]) -> dict[str, FeatureShape]:
    """Modality -> what its features look like, from the indices and one of them; without those that have none."""
    found: dict[str, FeatureShape] = {}
    sizes: dict[str, set[int]] = {name: set() for name in modalities}
    for entry in manifest.shards:
        index = read_index(folder / entry.name)
        for name in modalities:
            if feature_member(name) not in index.members:
                continue
            column = index.members.index(feature_member(name))
            rows = np.flatnonzero(index.present[:, column])
            sizes[name].update(np.unique(index.sizes[rows, column]).tolist())
            if name not in found and len(rows):
                with open(folder / entry.name, "rb") as file:
                    file.seek(int(index.block_offsets[rows[0], column]) * BLOCK)
                    array = decode_npy(file.read(int(index.sizes[rows[0], column])))
                found[name] = FeatureShape(array.shape, False)
    return {name: found[name]._replace(variable_length=len(sizes[name]) > 1) for name in modalities if name in found}


def feature_config(
    config: Config, shapes: dict[str, FeatureShape], members: Sequence[str], folder: Path
) -> dict[str, Any]:
    """The sections `data` and `modalities` of a config over the features.

    Encoded modalities get a linear map; the others stay as they are, where their member was kept.
    """
    modalities: dict[str, Any] = {}
    for name, modality in config.modalities.items():
        if name in shapes:
            modalities[name] = _of_features(name, shapes[name])
            if modality.lr is not None:
                modalities[name]["lr"] = modality.lr
        elif modality.member.lower() in members:
            whole = modality.model_dump(mode="json", exclude_defaults=True)
            modalities[name] = {
                key: value["name"] if isinstance(value, dict) and set(value) == {"name"} else value
                for key, value in whole.items()
            }
    return {"data": {"train": str(folder)}, "modalities": modalities}


def _of_features(name: str, found: FeatureShape) -> dict[str, Any]:
    shape: list[int | None] = list(found.shape)
    transform: dict[str, Any] = {"name": "tensor", "shape": shape}
    encoder: dict[str, Any] = {"name": "mlp", "input_dim": int(np.prod(found.shape))}
    if found.variable_length:
        shape[0] = None
        transform["variable_length"] = True
        encoder = {"name": "my_package.encoders:SequenceEncoder", "input_dim": found.shape[-1]}
    return {"member": feature_member(name), "decoder": "npy", "transform": transform, "encoder": encoder}


def snippet_text(sections: dict[str, Any]) -> str:
    """As YAML, a line per part."""
    lines = [f"data: {_flow(sections['data'])}", "modalities:"]
    for name, modality in sections["modalities"].items():
        lines.append(f"  {name}:")
        lines += [f"    {key}: {_flow(value)}" for key, value in modality.items()]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")
