"""A new run that begins where another one stood at one of its checkpoints: `symile-dist fork RUN NEW --step N`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from symile_dist.checkpoint.manifest import CHECKPOINTS, CheckpointError, read_manifest, verify
from symile_dist.data.quarantine import QUARANTINE
from symile_dist.metrics.history import HISTORY_FILE
from symile_dist.run_directory import CONFIG_FILE, load_run, read_run, update_run
from symile_dist.storage import sync_directory, write_text
from symile_dist.tools.checkpoints import find_checkpoint


def fork(run: str | Path, new: str | Path, step: str = "latest") -> dict[str, Any]:
    """Makes the directory of a run that goes on from a checkpoint of another: with its weights, moments, random states,
    place in the data, and its history up to there. It has a mirror only once it is given one of its own.

    Args:
        step: a number, `latest` or `best`.

    Raises ValueError for a directory that holds something, CheckpointError for a checkpoint that is not whole. The
    directory is whole or not there; the other run is left as it is.
    """
    target = Path(new).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{new}: is there already and not empty; name another directory")
    source = Path(run).absolute()
    if source == target or source in target.parents:
        raise ValueError(f"{new}: lies in the other run's directory; name another directory")
    if target.is_symlink() or not target.parent.is_dir():
        raise ValueError(f"{new}: its folder {target.parent} is not there, or it is a link; name another directory")
    config = load_run(run)
    folder = find_checkpoint(config, step)
    manifest = read_manifest(folder)
    problems = verify(folder, manifest.files)
    if problems:
        raise CheckpointError(f"{folder}: is damaged: {problems[0]}; take another --step")
    load_run(run, [f"run.name={json.dumps(target.name)}"])  # that it may be a name
    forked = config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": target.name, "directory": str(target)}),
            "checkpoint": config.checkpoint.model_copy(update={"mirror": None}),
        }
    )
    lineage = read_run(config.run_directory).get("lineage")
    origin = {"forked_from": str(config.run_directory.absolute()), "step": manifest.step, "time": time.time()}
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        copy = temporary / CHECKPOINTS / folder.name
        copy.mkdir(parents=True)
        for entry in manifest.files:
            _copy(folder / entry.path, copy / entry.path)
        manifest.write(copy)
        for name in (HISTORY_FILE, QUARANTINE):  # what stands there of later steps is cut off when it goes on
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(config.run_directory / name, temporary / name)
        write_text(temporary / CONFIG_FILE, forked.to_yaml())
        update_run(
            temporary,
            name=target.name,
            status="forked",
            message="",
            config_digest=forked.digest(),
            lineage=[*(lineage if isinstance(lineage, list) else []), origin],
        )
        os.rename(temporary, target)  # an empty folder may stand there
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(target.parent)
    return {"run": str(new), "from": str(run), "step": manifest.step}


def _copy(source: Path, target: Path) -> None:
    """Checkpoints are never changed, so where it can be both have one file."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
