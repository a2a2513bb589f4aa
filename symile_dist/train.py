"""The training loop and its state."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from symile_dist.checkpoint.manager import CheckpointManager
from symile_dist.checkpoint.manifest import Manifest
from symile_dist.config import Config
from symile_dist.data.loader import Loader
from symile_dist.distributed import all_reduce_sum
from symile_dist.engine import Engine
from symile_dist.errors import RunStopped
from symile_dist.metrics.recorder import Recorder
from symile_dist.step import TrainedStep, train_step
from symile_dist.types import Batch
from symile_dist.validate import Validator

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What the loop remembers beside weights, optimizer and random state; kept in the checkpoint's manifest."""

    step: int = 0
    """Global batches consumed, skipped ones included."""
    samples_seen: int = 0
    """Valid samples, over all ranks."""
    unreadable_samples: int = 0
    skipped_steps: int = 0
    consecutive_skips: int = 0
    best_step: int | None = None
    """Step of the best validation so far."""
    best_value: float | None = None

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> TrainState:
        return cls(**manifest.train_state)


def train(
    config: Config,
    engine: Engine,
    loader: Loader,
    validator: Validator | None,
    checkpoints: CheckpointManager,
    recorder: Recorder,
    state: TrainState,
) -> TrainState:
    """Trains from `state.step` to `config.train.steps`. Every rank runs the same loop in step.

    Raises RunStopped on all ranks alike when too many steps in a row are skipped or too many samples are unreadable.
    """
    steps = config.train.steps
    due_for = {"log": config.train.log_every, "validation": config.validation.every, "save": config.checkpoint.every}
    recorder.restart_clock()
    last = time.perf_counter()
    for batch in _timed(loader, recorder):
        trained = train_step(engine, batch, state.step, recorder)
        _count(config, state, batch, trained, recorder, time.perf_counter() - last)
        due = {what for what, every in due_for.items() if state.step == steps or (every and state.step % every == 0)}
        if "log" in due:
            _log(config, engine, state, trained, recorder)
        if "validation" in due and validator:
            _validate(config, state, validator, recorder)
        if "save" in due:
            _save(engine, loader, checkpoints, recorder, state)
        last = time.perf_counter()
    return state


def _timed(loader: Loader, recorder: Recorder) -> Iterator[Batch]:
    batches = iter(loader)
    while True:
        with recorder.phase("data_wait"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _count(
    config: Config, state: TrainState, batch: Batch, trained: TrainedStep, recorder: Recorder, seconds: float
) -> None:
    """Counts the step, and stops the run when it can only go on wrongly."""
    local = int(batch.valid.sum())
    # Valid slots over all ranks: the same number everywhere, so that all stop together.
    valid = int(all_reduce_sum(batch.valid.sum().to(trained.loss.device)))
    state.step += 1
    state.samples_seen += valid
    state.unreadable_samples += config.train.global_batch_size - valid
    recorder.count_step(seconds, local, valid, trained.result.applied)
    recorder.count_data(batch.bytes_read, batch.faults)
    for detail in batch.fault_details:
        logger.warning("step %d: unreadable sample: %s", state.step, detail)
    read = state.samples_seen + state.unreadable_samples
    if read >= 1000 and state.unreadable_samples > config.data.max_bad_fraction * read:
        raise RunStopped(
            f"step {state.step}: {state.unreadable_samples} of {read} samples were unreadable, more than "
            f"data.max_bad_fraction = {config.data.max_bad_fraction}; the shards are in {config.data.train}, and "
            f"{config.run_directory / 'logs'} names the samples"
        )
    if trained.result.applied:
        state.consecutive_skips = 0
        return
    state.skipped_steps += 1
    state.consecutive_skips += 1
    recorder.event(state.step, f"step {state.step} skipped: non-finite loss or gradient", level="warning")
    if state.consecutive_skips >= config.train.max_consecutive_skips:
        raise RunStopped(
            f"step {state.step}: loss or gradients were not finite for {state.consecutive_skips} steps in a row "
            "(train.max_consecutive_skips); the weights are those before the first of them. Lower optimizer.lr or "
            "model.logit_scale_init, lengthen optimizer.warmup_steps, or look for bad values in the data"
        )


def _log(config: Config, engine: Engine, state: TrainState, trained: TrainedStep, recorder: Recorder) -> None:
    loss = float(trained.loss)
    values = {name: float(value) for name, value in trained.metrics.items()}
    if getattr(engine.module.objective, "bounds_total_correlation", False):
        values["total_correlation_bound"] = math.log(config.train.global_batch_size) - loss
    recorder.train_record(
        state.step,
        state.samples_seen,
        loss=loss,
        grad_norm=trained.result.grad_norm,
        learning_rate=trained.result.learning_rate,
        logit_scale=engine.logit_scale(),
        skipped_steps=state.skipped_steps,
        **values,
    )


def _validate(config: Config, state: TrainState, validator: Validator, recorder: Recorder) -> None:
    with recorder.phase("eval"):
        values = validator.run()
    name = config.validation.best_metric
    value = values[name]
    better = state.best_value is None or (value < state.best_value if name == "loss" else value > state.best_value)
    if math.isfinite(value) and better:
        state.best_step, state.best_value = state.step, value
    recorder.validation_record(state.step, state.samples_seen, values)
    recorder.restart_clock()


def _save(
    engine: Engine, loader: Loader, checkpoints: CheckpointManager, recorder: Recorder, state: TrainState
) -> None:
    recorder.flush()
    with recorder.phase("checkpoint"):
        size, seconds = checkpoints.save(engine, state.step, asdict(state), loader.state)
    recorder.checkpoint_record(state.step, state.samples_seen, size, seconds)
    recorder.restart_clock()
