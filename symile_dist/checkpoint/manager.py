"""Saving, finding, verifying and pruning a run's checkpoints, by all ranks together."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

import symile_dist
from symile_dist.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointError,
    FileEntry,
    Manifest,
    check_fits,
    checkpoint_folders,
    complete_checkpoints,
    folder_name,
    read_manifest,
    unlisted_files,
    verify,
)
from symile_dist.config import Config
from symile_dist.distributed import barrier, broadcast_object, gather_objects, rank, world_size
from symile_dist.storage import sha256_of_file, sync_directory

logger = logging.getLogger(__name__)


class SavesShards(Protocol):
    """What the manager needs of an engine."""

    def save(self, directory: Path, tag: str) -> None: ...
    def load(self, directory: Path, tag: str) -> None: ...


def seed_everything(seed: int, rank: int) -> None:
    """Seeds torch, numpy and python for what encoders draw (dropout): differently on each rank."""
    torch.manual_seed(seed * 1_000_003 + rank + 1)
    np.random.seed((seed * 1_000_003 + rank + 1) % 2**32)
    random.seed(f"{seed}-{rank}")


def _rng_state() -> dict[str, Any]:
    """The state of every global generator, in types that torch.load reads with weights_only."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": list(random.getstate()[1]),
        "python_gauss": random.getstate()[2],
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate((3, tuple(state["python"]), state["python_gauss"]))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def _remove(folder: Path) -> None:
    """The manifest first: half a deletion must not look like a checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


class CheckpointManager:
    """The checkpoints of one run; every method is called by all ranks, in step.

    A save: every rank writes its ZeRO shard and RNG state, syncs, hashes; when all are done rank 0 writes the
    manifest. Killed at any moment before that, the folder is no checkpoint and the next save of its step clears it.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = config.run_directory / CHECKPOINTS

    def save(
        self, engine: SavesShards, step: int, train_state: dict[str, Any], loader_state: dict[str, Any]
    ) -> tuple[int, float]:
        """Saves a checkpoint; returns (bytes of all files, seconds)."""
        begin = time.perf_counter()
        folder = self.directory / folder_name(step)
        if rank() == 0:
            if folder.exists():
                _remove(folder)  # what a killed save left behind, or the same step of an earlier attempt
            folder.mkdir(parents=True)
        barrier()
        engine.save(self.directory, folder.name)
        torch.save(_rng_state(), folder / f"rng-rank-{rank():05d}.pt")
        barrier()
        # Any rank can hash any file, as they share the folder: deal them out evenly.
        names = broadcast_object(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
        own: list[FileEntry] = []
        for name in names[rank() :: world_size()]:
            path = folder / name
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            own.append(FileEntry(name, path.stat().st_size, sha256_of_file(path)))
        files = sorted((entry for part in gather_objects(own) for entry in part), key=lambda entry: entry.path)
        if rank() == 0:
            sync_directory(folder)
            Manifest(
                step=step,
                world_size=world_size(),
                zero_stage=self.config.train.zero_stage,
                precision=self.config.train.precision,
                config_digest=self.config.digest(),
                code_version=symile_dist.__version__,
                train_state=train_state,
                loader_state=loader_state,
                files=tuple(files),
            ).write(folder)
            sync_directory(self.directory)
            self._prune(step, best=train_state.get("best_step"))
        barrier()
        return sum(entry.size for entry in files), time.perf_counter() - begin

    def _prune(self, step: int, best: int | None) -> None:
        """Keeps the newest `keep_last` complete checkpoints and the best; removes leftovers of killed saves.

        Also those of later steps: they belong to a future that this run has left by going on from before them.
        """
        complete = [each for each, _ in complete_checkpoints(self.directory) if each <= step]
        kept = {*complete[-self.config.checkpoint.keep_last :], best}
        for each, folder in checkpoint_folders(self.directory):
            if each > step or each not in kept:
                _remove(folder)

    def find(self) -> Manifest | None:
        """The newest complete checkpoint whose files all verify; None when the run has none yet.

        Rank 0 says which candidates there are and all ranks verify a share of the files, so all come to the same
        answer. Raises CheckpointError when there are checkpoints but none is whole: never silently from zero.
        """
        candidates = broadcast_object([folder.name for _, folder in reversed(complete_checkpoints(self.directory))])
        problems: list[str] = []
        for name in candidates:
            folder = self.directory / name
            try:
                manifest = read_manifest(folder)
                found = verify(folder, manifest.files[rank() :: world_size()]) + unlisted_files(folder, manifest)
            except CheckpointError as error:
                manifest, found = None, [str(error)]
            bad = sorted({problem for part in gather_objects(found) for problem in part})
            if not bad:
                assert manifest is not None
                return manifest
            problems += bad
            if rank() == 0:
                for problem in bad:
                    logger.warning("checkpoint %s is damaged: %s", name, problem)
        if problems:
            raise CheckpointError(
                f"{self.directory}: no checkpoint is whole:\n  " + "\n  ".join(problems) + "\n"
                "To begin again from step 0, use another run directory or: symile-dist train CONFIG --fresh"
            )
        return None

    def load(self, engine: SavesShards, manifest: Manifest) -> None:
        """Loads a checkpoint that `find` verified.

        Raises CheckpointError when it was saved at another world size, ZeRO stage or precision.
        """
        train = self.config.train
        check_fits(manifest, world_size(), train.zero_stage, train.precision)
        name = folder_name(manifest.step)
        engine.load(self.directory, name)
        path = self.directory / name / f"rng-rank-{rank():05d}.pt"
        _set_rng_state(torch.load(path, weights_only=True))
