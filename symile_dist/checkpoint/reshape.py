"""From ZeRO's shards to whole weights."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor

from symile_dist.checkpoint.manifest import CheckpointError, Manifest, read_manifest, unlisted_files, verify


def verified_manifest(folder: Path) -> Manifest:
    """Reads a checkpoint's manifest and compares every file with it. Raises CheckpointError with what is wrong."""
    manifest = read_manifest(folder)
    problems = verify(folder, manifest.files) + unlisted_files(folder, manifest)
    if problems:
        raise CheckpointError("\n".join(problems))
    return manifest


def consolidated_weights(folder: Path) -> dict[str, Tensor]:
    """Whole fp32 weights by parameter name, from a checkpoint of any ZeRO stage and world size, on the CPU.

    The master copies where ZeRO keeps them. Raises CheckpointError before anything is unpickled when a file does not
    agree with the manifest.
    """
    manifest = verified_manifest(folder)
    if manifest.zero_stage == 0:
        # Written by this code and verified above; holds more than tensors, hence no weights_only.
        state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: tensor.float() for name, tensor in state["module"].items()}
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It prints its progress, which has no place in what `--json` prints.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    return {name: tensor.detach() for name, tensor in state.items()}
