"""What is checked before any work starts: the config against the code, the data and the run directory.

Raises ValueError with everything that is wrong, so that no worker is started in vain.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch

from symile_dist.checkpoint.manifest import CHECKPOINTS, CheckpointError, complete_checkpoints
from symile_dist.checkpoint.manifest import read_manifest as read_checkpoint
from symile_dist.config import Component, Config
from symile_dist.data.index import ShardError
from symile_dist.data.loader import open_training, open_validation
from symile_dist.data.manifest import differences as shard_differences
from symile_dist.data.manifest import read_manifest
from symile_dist.errors import RunStopped
from symile_dist.hub import weights_follow
from symile_dist.metrics.loggers import check_loggers
from symile_dist.model import make_objective
from symile_dist.registry import DECODERS, ENCODERS, TRANSFORMS, build, check_options, resolve, suggestion
from symile_dist.run_directory import differences, load_run
from symile_dist.storage import Folder


def _checks(config: Config) -> list[Callable[[], Any]]:
    def encoder(name: str) -> None:
        spec = config.modalities[name].encoder
        fixed = ("embedding_dim",)
        encoder = resolve(spec.name, ENCODERS, "encoder")
        check_options(encoder, spec.options, "encoder", spec.name, fixed)
        ours = _is_ours({"name": spec.name, **spec.options})
        # What comes of an option of the wrong type, and of a size that cannot be.
        mistakes = (TypeError, AttributeError, *((ArithmeticError, RuntimeError) if ours else ()))
        try:
            if hasattr(encoder, "check"):  # that its weights can be had
                encoder.check(**spec.options)
            if ours:
                _build_without_memory(spec, config.model.embedding_dim)
        except mistakes as error:
            raise ValueError(f"encoder '{spec.name}': {error}; are its options of the right type?") from error

    def decoder(name: str) -> None:
        spec = config.modalities[name].decoder
        check_options(resolve(spec.name, DECODERS, "decoder"), {"data": b"", **spec.options}, "decoder", spec.name)

    def transform(name: str) -> None:
        spec = config.modalities[name].transform
        build(spec.name, spec.options, TRANSFORMS, "transform")

    def of_modality(name: str, check: Callable[[str], None]) -> None:
        try:
            check(name)
        except ValueError as error:
            raise ValueError(f"modality '{name}': {error}") from error

    def objective() -> None:
        make_objective(config)
        if config.objective.options.get("backend") == "triton" and not config.ray.gpus_per_worker:
            raise ValueError("objective.backend=triton needs GPUs: set ray.gpus_per_worker=1, or leave the backend out")

    def training_data() -> None:
        try:
            open_training(config, rank=0, start_step=0)
        except RunStopped as error:
            raise ValueError(str(error)) from None

    def held_out_data(directory: str) -> None:
        open_validation(config, directory, rank=0, max_samples=None)

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

    checks: list[Callable[[], Any]] = [objective, best_metric, warm_start, lambda: check_loggers(config)]
    for name, modality in config.modalities.items():
        for check in [decoder, transform] if modality.encoder_of else [encoder, decoder, transform]:
            checks.append(lambda n=name, check=check: of_modality(n, check))  # type: ignore[misc]
    checks.append(training_data)
    for directory in {config.data.validation, config.data.test} - {None}:
        checks.append(lambda d=directory: held_out_data(d))  # type: ignore[misc]
    return checks


def _build_without_memory(encoder: Component, embedding_dim: int) -> None:
    """Shapes alone, and no trained weights. Raises ValueError for options that cannot be, and as torch does."""
    with weights_follow(), torch.device("meta"), catch_warnings(action="ignore"):
        built = build(encoder.name, encoder.options, ENCODERS, "encoder", embedding_dim=embedding_dim)
    for name, parameter in built.named_parameters():
        if parameter.numel() == 0:
            raise ValueError(f"encoder '{encoder.name}': a size is 0: '{name}' is {tuple(parameter.shape)}")


def _is_ours(encoder: Any) -> bool:
    """Whether an encoder, its name or a map with name and options, is of the registry, and so is the one that it may
    hold: whether others can be built without memory nobody knows."""
    options = encoder if isinstance(encoder, Mapping) else {"name": encoder}
    name = options.get("name")
    return isinstance(name, str) and name in ENCODERS and ("encoder" not in options or _is_ours(options["encoder"]))


def _changed_shards(config: Config) -> list[str]:
    """Warnings of shards that are not as their manifest says.

    Raises ValueError for shards that it does not list, and for any change where `data.on_error` is stop.
    """
    warnings, problems = [], []
    held_out = {config.data.validation, config.data.test} - {None}
    for url in dict.fromkeys([*(dataset.path for dataset in config.data.train.values()), *held_out]):
        folder = Folder(str(url), config.data.storage)
        try:
            manifest, files = read_manifest(folder.url, config.data.storage, check=False), folder.list()
        except (ShardError, FileNotFoundError):
            continue  # told by the check that opens it
        for name, words in shard_differences(manifest, files).items():
            line = f"{folder / name}: {words}"
            if config.data.on_error == "stop" or name not in {shard.name for shard in manifest.shards}:
                problems.append(f"{line}; if that is as it should be: symile-dist shards index {folder.url}")
            else:
                warnings.append(f"{line}; its samples are left out (data.on_error=quarantine)")
    if problems:
        more = f"\n(and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError("\n".join(problems[:5]) + more)
    return warnings


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
        if re.match(r"model\.|objective\.name|modalities\.\w+\.(encoder|encoder_of|freeze|lr)\b", change)
    ]
    if fixed:
        raise ValueError(
            f"{config.run_directory}: a run cannot go on with another model ({'; '.join(fixed[:3])}); begin a new run "
            f"with run.init_from={config.run_directory}"
        )
    open_training(config, rank=0, start_step=manifest.step, saved=manifest.loader_state)


def preflight(config: Config, fresh: bool = False) -> list[str]:
    """Raises ValueError with one line per problem; returns warnings. `fresh`: what the run directory holds does not
    matter."""
    problems: list[str] = []
    warnings: list[str] = []
    data_is_there = True
    checks = [*_checks(config), lambda: warnings.extend(_changed_shards(config))]
    for check in checks + ([] if fresh else [lambda: _check_continues(config)]):
        try:
            check()
        except ValueError as error:
            data_is_there = data_is_there and not isinstance(error, ShardError)
            if not any(str(error) in told for told in problems):  # opening the data meets a wrong transform again
                problems.append(str(error))
    if problems:
        source = f"data.source: {config.data.source}"
        raise ValueError("\n".join(problems + ([] if data_is_there or not config.data.source else [source])))
    return warnings


def newest_checkpoint(run: str | Path) -> tuple[int, Path]:
    """(step, folder) of a run's newest complete checkpoint. Raises ValueError when there is none."""
    complete = complete_checkpoints(Path(run) / CHECKPOINTS)
    if not complete:
        raise ValueError(f"{run}: no complete checkpoint there; is it the directory of a run?")
    return complete[-1]
