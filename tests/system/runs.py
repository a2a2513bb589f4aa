"""What tests of whole runs share: starting one, and comparing what two of them left."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from symile_dist.checkpoint.manifest import complete_checkpoints
from symile_dist.checkpoint.reshape import consolidated_weights
from symile_dist.config import Config
from symile_dist.driver import launch
from symile_dist.metrics.history import read_history


def train(config: Config, fresh: bool = False, resume: bool = False) -> dict[str, Any]:
    """What `symile-dist train` does, in this process."""
    return launch(config, fresh, resume, plain=True)


def history(config: Config, kind: str = "train") -> list[dict[str, Any]]:
    return [record for record in read_history(config.run_directory / "history.jsonl") if record["kind"] == kind]


def losses(config: Config) -> dict[int, float]:
    """step -> loss. Fails when a step stands twice."""
    records = history(config)
    steps = [record["step"] for record in records]
    assert len(set(steps)) == len(steps), f"steps stand twice in the history: {steps}"
    return {record["step"]: record["loss"] for record in records}


def _digest(value: Any, into: Any) -> None:
    if isinstance(value, torch.Tensor):
        into.update(
            str(value.dtype).encode() + value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            into.update(str(key).encode())
            _digest(value[key], into)
    elif isinstance(value, list | tuple):
        for item in value:
            _digest(item, into)
    elif isinstance(value, int | float | str | bool | type(None)):
        into.update(repr(value).encode())


def state_digests(config: Config, step: int) -> dict[str, str]:
    """Digests of the whole weights and, per file of a checkpoint, of moments and random state.

    Not of ZeRO-3's optimizer files: there DeepSpeed pads partitions with memory that nobody wrote.
    """
    folder = dict(complete_checkpoints(config.run_directory / "checkpoints"))[step]
    weights = hashlib.sha256()
    _digest(consolidated_weights(folder), weights)
    digests = {"weights": weights.hexdigest()}
    for path in sorted(folder.glob("*.pt")):
        if config.train.zero_stage == 3 and "optim_states" in path.name:
            continue
        state = torch.load(path, map_location="cpu", weights_only=False)
        kept = state.get("module") if "model_states" in path.name else state.get("optimizer_state_dict", state)
        digest = hashlib.sha256()
        _digest(kept, digest)
        digests[path.name] = digest.hexdigest()
    assert sum(name.startswith("rng-") for name in digests) == config.world_size
    return digests


def checkpoint_folder(config: Config, step: int) -> Path:
    return dict(complete_checkpoints(config.run_directory / "checkpoints"))[step]
