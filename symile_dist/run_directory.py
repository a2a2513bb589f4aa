"""A run's directory: its config, what became of it, and who may write into it.

config.yaml       the resolved config        run.json          status and lineage
checkpoints/      see checkpoint/manifest    ranks.json        pid, host and metrics address of every rank
history.jsonl     see metrics/history        tensorboard/      the same for TensorBoard
logs/             one file per rank          evaluation/       results of `symile-dist evaluate`
health/           signs of life of all ranks jobs/             one folder per submission, see launch/
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import symile_dist
from symile_dist.checkpoint.manifest import CHECKPOINTS, checkpoint_folders
from symile_dist.config import Config, ConfigError, load_config
from symile_dist.environment import launch_record
from symile_dist.storage import read_json, write_json, write_text

logger = logging.getLogger(__name__)
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
RANKS_FILE = "ranks.json"
SUBMITTED = {RUN_FILE, "jobs"}
"""What the directory of a run holds whose job has not begun."""


def load_run(directory: str | Path, overrides: list[str] | None = None) -> Config:
    """The config of an existing run. Raises ConfigError when the directory holds none."""
    path = Path(directory)
    submitted = sorted(path.glob(f"jobs/*/{CONFIG_FILE}"), reverse=True)  # of a run whose job has not begun
    file = next((file for file in (path / CONFIG_FILE, *submitted) if file.exists()), None)
    if file is None:
        hint = "; did you mean its parent's name under runs/?" if not path.exists() else ""
        raise ConfigError(f"{path}: not a run directory (it has no {CONFIG_FILE}){hint}")
    # The directory may have been moved or be named otherwise from here: it is where it is.
    return load_config(file, [*(overrides or []), f"run.directory={json.dumps(str(path))}"]).config


def check(config: Config, fresh: bool, resume: bool) -> None:
    """Raises ValueError when the run cannot have its directory; writes nothing.

    It cannot when the directory holds something else, or a run of another config, unless `resume` (the new config takes
    over and the change is kept in the lineage) or `fresh` (the old run is moved aside, not deleted).
    """
    directory = config.run_directory
    there = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if there != directory and not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"{directory}: cannot be written: {there} is not a folder that this user may write to")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: is a file, not a folder; choose another run.directory")
    if not directory.exists() or not {path.name for path in directory.iterdir()} - SUBMITTED:
        return
    if not (directory / CONFIG_FILE).exists():
        raise ValueError(f"{directory}: is not empty and not a run directory; choose another run.directory")
    if fresh or resume:
        return
    old = load_run(directory)
    if old.digest() != config.digest():
        raise ValueError(
            f"{directory}: holds a run of another config ({'; '.join(differences(old, config)[:5])}). To go on with "
            f"it: symile-dist resume {directory} [key=value ...]. To begin anew: another run.name, or --fresh, which "
            "moves the old run aside"
        )


def _move_aside(directory: Path) -> None:
    aside = directory.with_name(f"{directory.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    number = 1
    while aside.exists():
        number += 1
        aside = directory.with_name(f"{directory.name}.before-{time.strftime('%Y%m%d-%H%M%S')}-{number}")
    os.rename(directory, aside)


def prepare(config: Config, fresh: bool, resume: bool) -> bool:
    """Makes the run directory ready; returns True when an earlier attempt is continued.

    Raises ValueError as `check` does, or when the directory cannot be written.
    """
    check(config, fresh, resume)
    directory = config.run_directory
    lineage: list[dict[str, Any]] = []
    try:
        if fresh and (directory / CONFIG_FILE).exists():
            _move_aside(directory)
        continued = (directory / CONFIG_FILE).exists()
        if continued:
            kept = read_run(directory).get("lineage")
            lineage = kept if isinstance(kept, list) else []
            changed = differences(load_run(directory), config)
            if changed and checkpoint_folders(directory / CHECKPOINTS):
                lineage = [*lineage, {"changed": changed, "time": time.time()}]
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / CONFIG_FILE, config.to_yaml())
        submitted, known = launch_record(), read_run(directory).get("launch")
        if submitted and isinstance(known, dict) and known.get("job") == submitted.get("job"):
            submitted = known | submitted  # whoever submitted it may have written down more
        update_run(
            directory,
            name=config.run.name,
            status="starting",
            message="",
            config_digest=config.digest(),
            code_version=symile_dist.__version__,
            lineage=lineage,
            **({"launch": submitted} if submitted else {}),
        )
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written: {error.strerror or error}") from None
    return continued


def read_run(directory: Path) -> dict[str, Any]:
    """run.json as a dict; empty where it is missing or no longer one (nothing depends on it but what people read)."""
    try:
        content = read_json(directory / RUN_FILE)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def update_run(directory: Path, **values: Any) -> None:
    """Changes entries of run.json, atomically."""
    content = read_run(directory)
    content.setdefault("created", time.time())
    write_json(directory / RUN_FILE, {**content, **values, "updated": time.time()})


def tell_run(directory: Path, **values: Any) -> None:
    """`update_run` of a run that is under way, which does not end because run.json cannot be written."""
    try:
        update_run(directory, **values)
    except OSError as error:
        logger.warning("%s: is out of date: %s", directory / RUN_FILE, error)


def write_ranks(directory: Path, ranks: dict[int, dict[str, Any]]) -> None:
    write_json(directory / RANKS_FILE, [ranks[rank] for rank in sorted(ranks)])


def flat_config(config: Config | dict[str, Any]) -> dict[str, Any]:
    """`section.key` -> value of every key of a config, or of one as plain data, but for run.name and run.directory."""

    def flatten(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {path: value}
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= flatten(item, f"{path}.{key}" if path else str(key))
        return flat

    flat = flatten(config if isinstance(config, dict) else config.model_dump(mode="json"), "")
    return {key: value for key, value in flat.items() if key not in ("run.name", "run.directory")}


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every key in which two configs differ, but for run.name, run.directory and `evaluation`."""
    before, after = (
        {key: value for key, value in flat_config(config).items() if key.partition(".")[0] != "evaluation"}
        for config in (old, new)
    )
    keys = dict.fromkeys([*before, *after])
    changed = [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]
    if sorted(old.modalities) == sorted(new.modalities) and list(old.modalities) != list(new.modalities):
        changed.append(f"order of modalities: {', '.join(old.modalities)} -> {', '.join(new.modalities)}")
    return changed
