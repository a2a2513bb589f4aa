"""One rank of a run: build the parts, go on from the newest checkpoint, train."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from symile_dist.checkpoint.interval import SaveInterval
from symile_dist.checkpoint.manager import CheckpointManager, seed_everything
from symile_dist.checkpoint.manifest import CHECKPOINTS, Manifest, written_at
from symile_dist.checkpoint.reshape import consolidated_weights
from symile_dist.config import Config
from symile_dist.data.loader import TrainingLoader, open_training
from symile_dist.data.quarantine import QUARANTINE
from symile_dist.distributed import raise_together
from symile_dist.engine import Engine, import_deepspeed
from symile_dist.errors import RunStopped
from symile_dist.failpoints import failpoint
from symile_dist.health.attempt import Attempt
from symile_dist.health.guard import ADVICE, RollBack, gone_back
from symile_dist.health.lease import superseded
from symile_dist.health.stop import StopRequest
from symile_dist.metrics.history import History
from symile_dist.metrics.loggers import loggers_of
from symile_dist.metrics.recorder import Recorder
from symile_dist.preflight import newest_checkpoint
from symile_dist.train import TrainState, train
from symile_dist.validate import Validator

logger = logging.getLogger(__name__)


def no_beat(step: int) -> None:
    """Nobody watches."""


def train_rank(
    config: Config,
    rank: int,
    device: torch.device,
    recorder: Recorder,
    attempt: Attempt | None = None,
    stop: StopRequest | None = None,
    beat: Callable[[int], None] = no_beat,
) -> TrainState:
    """Trains one rank to the end; all ranks call it in step, each in a process of its own.

    `attempt`: what this group of ranks knows of those before it. `stop` and `beat` as of `train`.

    Without a process group of torch DeepSpeed makes one, from the usual environment variables.

    Raises RunStopped for a run that cannot go on, RunPreempted for one that was asked to stop, ValueError for a user's
    mistake.
    """
    attempt, stop = attempt or Attempt(), stop or StopRequest()

    now = -1

    def sign(step: int) -> None:
        nonlocal now
        now = step
        beat(step)

    def alive() -> None:
        beat(now)

    def done(phase: str) -> None:
        attempt.done(phase)
        beat(-1)

    import_deepspeed(device)
    seed_everything(config.seed, rank)
    done("import")
    checkpoints = CheckpointManager(
        config,
        attempt.fence,
        lambda: superseded(config.run_directory, attempt.fence),
        companions=[QUARANTINE],
        mirror_holder=attempt.mirror_holder,
        alive=alive,
    )
    manifest = checkpoints.find()
    state = TrainState.from_manifest(manifest) if manifest else TrainState()
    checkpoints.begin(state.step)
    recorder.count_damaged(checkpoints.damaged_files)
    failpoint("start.begun", rank, state.step)
    done("checkpoint")
    loader = _open_loader(config, rank, manifest)
    done("data")
    source, weights = None, None
    if config.run.init_from and not manifest:
        source = newest_checkpoint(config.run.init_from)[1]
        weights = consolidated_weights(source)
    engine = Engine(config, device, weights)
    done("model")
    if manifest:
        checkpoints.load(engine, manifest)
        done("load")
        recorder.count_resumed(written_at(config.run_directory / CHECKPOINTS, manifest.step), attempt.phases)
    failpoint("start.loaded", rank, state.step)
    if rank == 0:
        recorder.history = History(config.run_directory, resume_step=state.step, loggers=loggers_of(config))
    if manifest:
        recorder.event(state.step, "resume", f"resumed from step {state.step}")
    elif source:
        total = sum(1 for _ in engine.module.parameters()) + len(engine.module.inner_state())
        recorder.event(0, "resume", f"warm start: {len(engine.warm_started)} of {total} parameters from {source}")
    validator = Validator(config, engine) if config.data.validation else None
    interval = SaveInterval(config.checkpoint, config.world_size, time.monotonic(), attempt.failures, attempt.hours)
    tell = _telling_the_first(sign, state.step, attempt, recorder)
    _log_start(config, engine, manifest)
    try:
        while True:
            try:
                return train(config, engine, loader, validator, checkpoints, recorder, state, interval, stop, tell)
            except RollBack as error:
                rollback = error.with_traceback(None)  # it would keep the loader's processes alive
            manifest, state = _go_back(engine, checkpoints, recorder, state, rollback)
            loader = _open_loader(config, rank, manifest)
            if rank == 0:
                recorder.history = History(config.run_directory, resume_step=state.step, loggers=loggers_of(config))
            recorder.count_rollback()
            words = f"back to step {state.step}; steps {rollback.first} to {rollback.last} are left out"
            recorder.event(state.step, "rollback", words, level="warning", back_to=state.step)
            tell(state.step)
    finally:
        checkpoints.close()


def _telling_the_first(
    beat: Callable[[int], None], first: int, attempt: Attempt, recorder: Recorder
) -> Callable[[int], None]:
    """The same signs of life; with the one that ends the first step, how long the way there took is told."""
    told = False

    def tell(step: int) -> None:
        nonlocal told
        beat(step)
        if step > first and not told:
            told = True
            attempt.done("first_step")
            recorder.start_record(step, attempt.phases)

    return tell


def _open_loader(config: Config, rank: int, manifest: Manifest | None) -> TrainingLoader:
    """The data from a checkpoint on, or from the beginning. Raises ValueError on all ranks alike."""
    problem = None
    step, saved = (manifest.step, manifest.loader_state) if manifest else (0, None)
    try:
        loader = open_training(config, rank, step, saved, persist=rank == 0)
    except (ValueError, OSError) as error:
        problem = str(error)
    raise_together(problem)
    return loader


def _go_back(
    engine: Engine, checkpoints: CheckpointManager, recorder: Recorder, state: TrainState, rollback: RollBack
) -> tuple[Manifest, TrainState]:
    """Loads the newest checkpoint from before what went wrong, and gives up those after it.

    Raises RunStopped, on all ranks, where there is none.
    """
    manifest = checkpoints.find(before=rollback.first)
    if manifest is None:
        raise RunStopped(
            f"{rollback.reason}. There is no checkpoint from before step {rollback.first} (guard.margin) to go back "
            f"to; checkpoint.every and checkpoint.keep_last say which there are. {ADVICE}"
        )
    checkpoints.give_up_after(manifest.step)
    checkpoints.begin(manifest.step)
    checkpoints.load(engine, manifest)
    if recorder.history:
        recorder.history.close()
    restored = TrainState.from_manifest(manifest)
    restored.guard = gone_back(restored.guard, state.guard, rollback)
    return manifest, restored


def _log_start(config: Config, engine: Engine, manifest: Manifest | None) -> None:
    parameters = sum(int(getattr(p, "ds_numel", p.numel())) for p in engine.module.parameters())
    logger.info(
        "%d parameters, ZeRO stage %d, %s, from step %d of %d",
        parameters,
        config.train.zero_stage,
        config.train.precision,
        manifest.step if manifest else 0,
        config.train.steps,
    )
