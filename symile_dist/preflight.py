"""What is checked before any work starts: the config against the code, the data and the run directory.

Raises ValueError with everything that is wrong, so that no worker is started in vain.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from symile_dist.checkpoint.manifest import CHECKPOINTS, CheckpointError, check_fits, complete_checkpoints
from symile_dist.checkpoint.manifest import read_manifest as read_checkpoint
from symile_dist.config import Config
from symile_dist.data.loader import open_training, open_validation
from symile_dist.model import make_objective
from symile_dist.registry import DECODERS, ENCODERS, TRANSFORMS, build, check_options, resolve, suggestion
from symile_dist.run_directory import differences, load_run


def _checks(config: Config) -> list[Callable[[], Any]]:
    def encoder(name: str) -> None:
        spec = config.modalities[name].encoder
        fixed = ("embedding_dim",)
        check_options(resolve(spec.name, ENCODERS, "encoder"), spec.options, "encoder", spec.name, fixed)

    def decoder(name: str) -> None:
        spec = config.modalities[name].decoder
        check_options(resolve(spec.name, DECODERS, "decoder"), {"data": b"", **spec.options}, "decoder", spec.name)

    def transform(name: str) -> None:
        spec = config.modalities[name].transform
        build(spec.name, spec.options, TRANSFORMS, "transform")

    def objective() -> None:
        make_objective(config)
        if config.objective.options.get("backend") == "triton" and not config.ray.gpus_per_worker:
            raise ValueError("objective.backend=triton needs GPUs: set ray.gpus_per_worker=1, or leave the backend out")

    def data(directory: str, train: bool) -> None:
        dataset, _ = open_validation(config, directory, rank=0, max_samples=None)
        dataset.first_readable()
        lanes, samples = config.data.lanes, dataset.population.num_samples
        if train and lanes and lanes > samples:
            raise ValueError(f"data.lanes = {lanes} exceeds the {samples} samples of {directory}")

    def best_metric() -> None:
        known = ["loss"] + [
            f"accuracy/{target}_from_{'_'.join(m for m in config.modalities if m != target)}"
            for target in config.modalities
        ]
        name = config.validation.best_metric
        if name not in known:
            raise ValueError(f"validation.best_metric: unknown value '{name}'{suggestion(name, known)}")

    def warm_start() -> None:
        if config.run.init_from:
            newest_checkpoint(config.run.init_from)

    checks: list[Callable[[], Any]] = [objective, best_metric, warm_start]
    for name in config.modalities:
        checks += [lambda n=name: encoder(n), lambda n=name: decoder(n), lambda n=name: transform(n)]  # type: ignore[misc]
    checks.append(lambda: data(config.data.train, train=True))
    for directory in {config.data.validation, config.data.test} - {None, config.data.train}:
        checks.append(lambda d=directory: data(d, train=False))  # type: ignore[misc]
    return checks


def _check_continues(config: Config) -> None:
    """Raises ValueError when the run's newest checkpoint is not of this run's shape, data or order."""
    complete = complete_checkpoints(config.run_directory / CHECKPOINTS)
    if not complete:
        return
    manifest = None
    for _, folder in reversed(complete):
        with contextlib.suppress(CheckpointError):  # a damaged one: the ranks pass it over too, and say so
            manifest = read_checkpoint(folder)
            break
    if manifest is None:
        return
    fixed = [
        change
        for change in differences(load_run(config.run_directory), config)
        if re.match(r"model\.|objective\.name|modalities\.\w+\.(encoder|freeze|lr)\b", change)
    ]
    if fixed:
        raise ValueError(
            f"{config.run_directory}: a run cannot go on with another model ({'; '.join(fixed[:3])}); begin a new run "
            f"with run.init_from={config.run_directory}"
        )
    check_fits(manifest, config.world_size, config.train.zero_stage, config.train.precision)
    open_training(config, rank=0, start_step=manifest.step).check_state(manifest.loader_state)


def preflight(config: Config, fresh: bool = False) -> None:
    """Raises ValueError with one line per problem. `fresh`: what the run directory holds does not matter."""
    problems: list[str] = []
    for check in _checks(config) + ([] if fresh else [lambda: _check_continues(config)]):
        try:
            check()
        except ValueError as error:
            if str(error) not in problems:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def newest_checkpoint(run: str | Path) -> tuple[int, Path]:
    """(step, folder) of a run's newest complete checkpoint. Raises ValueError when there is none."""
    complete = complete_checkpoints(Path(run) / CHECKPOINTS)
    if not complete:
        raise ValueError(f"{run}: no complete checkpoint there; is it the directory of a run?")
    return complete[-1]
