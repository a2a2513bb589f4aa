"""What tests of whole runs share: starting one, and comparing what two of them left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from symile_dist.checkpoint.manifest import complete_checkpoints, read_manifest
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


def state_digests(config: Config, step: int) -> dict[str, str]:
    """Digests of everything that a checkpoint holds of the training state: per rank of its weights, moments and random
    state, and of the whole weights."""
    folder = checkpoint_folder(config, step)
    manifest = read_manifest(folder)
    assert len(manifest.files) == config.world_size

    def digest(tensors: dict[str, torch.Tensor]) -> str:
        found = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    digests = {f"rank {number}": digest(load_file(folder / file.path)) for number, file in enumerate(manifest.files)}
    return digests | {"weights": digest(consolidated_weights(folder))}


def checkpoint_folder(config: Config, step: int) -> Path:
    return dict(complete_checkpoints(config.run_directory / "checkpoints"))[step]


def assert_each_sample_once(folder: Path, steps: int, global_batch_size: int, samples: int) -> None:
    """Of what `RecordedSymile` wrote down: in the history that survived, every step has a whole global batch, and every
    epoch every sample exactly once."""
    found: dict[int, list[dict[str, Any]]] = {step: [] for step in range(steps)}
    for path in folder.iterdir():
        for line in path.read_text().split("\n")[:-1]:  # a line that a kill cut short was not trained on
            record = json.loads(line)
            found[record["step"]].append(record | {"rank": path.stem.split("-")[1]})
    consumed: list[int] = []
    for step, records in found.items():
        assert records, f"step {step} is missing"
        # Of several attempts at a step the last counts: what the others trained on was undone.
        latest = max(records, key=lambda record: record["at"])["attempt"]
        batch = [number for record in records if record["attempt"] == latest for number in record["samples"]]
        assert len(batch) == global_batch_size, f"step {step}: {batch}"
        consumed += batch
    for first in range(0, len(consumed), samples):
        epoch = consumed[first : first + samples]
        assert len(set(epoch)) == len(epoch), (
            f"samples came twice in the epoch from step {first // global_batch_size} on"
        )
