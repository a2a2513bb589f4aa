"""A run directory without training: a checkpoint of the weights that a run begins with, or of given ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from symile_dist.checkpoint.manifest import CHECKPOINTS, FileEntry, Manifest, folder_name
from symile_dist.checkpoint.shard import HostCopy
from symile_dist.checkpoint.shards import PIECES
from symile_dist.config import Config
from symile_dist.model import TrainingModule
from symile_dist.run_directory import prepare


def untrained_run(config: Config, weights: dict[str, Tensor] | None = None, step: int = 4) -> Path:
    """Makes the run's directory with one checkpoint, as one rank leaves it; returns the directory.

    Args:
        weights: in the place of the initial ones.
    """
    prepare(config, fresh=False, resume=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = TrainingModule(config)
    state = module.state_dict() | (weights or {})
    # A name that the model does not know may be asked for: it is then a parameter.
    others = {f"buffers/{name}": state.pop(name) for name, _ in module.named_buffers() if name in state}
    others |= {f"inner/{name}": state.pop(name, tensor) for name, tensor in module.inner_state().items()}
    copy = HostCopy()
    copy.take(
        {f"weights/{name}": tensor.float().reshape(-1) for name, tensor in state.items()} | others,
        {PIECES: json.dumps({name: [0, tensor.numel(), tensor.shape] for name, tensor in state.items()})},
    )
    folder = config.run_directory / CHECKPOINTS / folder_name(step)
    folder.mkdir(parents=True)
    path = folder / "rank-00000.test.safetensors"
    files = (FileEntry(path.name, copy.size, copy.write(path)),)
    Manifest(step, 1, 0, "fp32", config.digest(), "test", 0, {"best_step": step}, {}, files).write(folder)
    return config.run_directory
