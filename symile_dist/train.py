"""The training loop and its state."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from symile_dist.checkpoint.manager import CheckpointManager
from symile_dist.checkpoint.manifest import Manifest
from symile_dist.config import Config
from symile_dist.data.loader import TrainingLoader
from symile_dist.distributed import all_reduce_sum, gather_objects, rank
from symile_dist.engine import Engine
from symile_dist.errors import RunPreempted, RunStopped
from symile_dist.failpoints import failpoint
from symile_dist.health.stop import StopRequest
from symile_dist.metrics.recorder import Recorder
from symile_dist.step import TrainedStep, train_step
from symile_dist.types import Batch, Fault
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
    loader: TrainingLoader,
    validator: Validator | None,
    checkpoints: CheckpointManager,
    recorder: Recorder,
    state: TrainState,
    stop: StopRequest,
    beat: Callable[[int], None],
) -> TrainState:
    """Trains from `state.step` to `config.train.steps`. Every rank runs the same loop in step.

    `stop` may be asked on any rank; `beat` is called with the number of each step, and as often as anything else has
    come to its end.

    Raises, on all ranks alike: RunPreempted, with everything saved, once a stop was asked for; RunStopped when too many
    steps in a row are skipped or too many samples are unreadable.
    """
    steps = config.train.steps
    due_for = {"log": config.train.log_every, "validation": config.validation.every, "save": config.checkpoint.every}
    recorder.restart_clock()
    last = time.perf_counter()
    for batch in _timed(loader, recorder):
        beat(state.step)
        failpoint("step", rank(), state.step)
        trained = train_step(engine, batch, state.step, recorder)
        stopping = _count(config, state, batch, trained, loader, recorder, time.perf_counter() - last, stop)
        due = {what for what, every in due_for.items() if state.step == steps or (every and state.step % every == 0)}
        if "log" in due:
            _log(config, engine, state, trained, loader, recorder)
        if "validation" in due and validator:
            _validate(config, state, validator, recorder)
            beat(state.step)
        if "save" in due or stopping:
            _save(engine, loader, checkpoints, recorder, state)
        if stopping and state.step < steps:
            checkpoints.finish()
            _tell_saves(checkpoints, recorder, state)
            recorder.event(state.step, f"stopped as asked after step {state.step}, saved")
            raise RunPreempted(f"step {state.step}: stopped as asked, and saved")
        _tell_saves(checkpoints, recorder, state)
        last = time.perf_counter()
    checkpoints.finish()
    _tell_saves(checkpoints, recorder, state)
    return state


def _timed(loader: TrainingLoader, recorder: Recorder) -> Iterator[Batch]:
    batches = iter(loader)
    while True:
        with recorder.phase("data_wait"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _count(
    config: Config,
    state: TrainState,
    batch: Batch,
    trained: TrainedStep,
    loader: TrainingLoader,
    recorder: Recorder,
    seconds: float,
    stop: StopRequest,
) -> bool:
    """Counts the step; returns whether the run is to stop after it.

    Raises RunStopped when it can only go on wrongly.
    """
    local = int(batch.valid.sum())
    # Valid slots over all ranks, and wishes to stop: the same numbers everywhere, so that all stop together.
    counts = torch.tensor([local, stop.reason is not None], device=trained.loss.device)
    valid, wishes = all_reduce_sum(counts).tolist()
    state.step += 1
    state.samples_seen += valid
    state.unreadable_samples += config.train.global_batch_size - valid
    skipped_for = "overflow" if trained.result.rescaled else "nonfinite_grad"
    recorder.count_step(seconds, local, valid, None if trained.result.applied else skipped_for)
    recorder.count_data(batch, loader.queue_depth)
    if valid < config.train.global_batch_size:
        _unreadable(config, state, batch, loader, recorder)
    if trained.result.applied and trained.result.inner_applied:
        state.consecutive_skips = 0
        return wishes > 0
    state.skipped_steps += 1
    if trained.result.rescaled:
        words = "gradients exceed fp16's range; the loss is scaled by less from here on"
        recorder.event(state.step, f"step {state.step} skipped: {words}", level="warning")
        return wishes > 0
    state.consecutive_skips += 1
    inner = " of the inner optimizer" if trained.result.applied else ""
    recorder.event(state.step, f"step {state.step}{inner} skipped: non-finite loss or gradient", level="warning")
    if state.consecutive_skips >= config.train.max_consecutive_skips:
        raise RunStopped(
            f"step {state.step}: loss or gradients were not finite for {state.consecutive_skips} steps in a row "
            "(train.max_consecutive_skips); the weights are those before the first of them. Lower optimizer.lr or "
            "model.logit_scale_init, lengthen optimizer.warmup_steps, or look for bad values in the data"
        )
    return wishes > 0


def _unreadable(config: Config, state: TrainState, batch: Batch, loader: TrainingLoader, recorder: Recorder) -> None:
    """Tells what could not be read, on any rank, and leaves it out from the next epoch on, or stops the run."""
    faults = [fault for part in gather_objects(batch.faults) for fault in part]
    if config.data.on_error == "stop":
        raise RunStopped(
            f"step {state.step}: unreadable (data.on_error=stop): {'; '.join(map(str, faults[:3]))}"
            f"{f' and {len(faults) - 3} more' if len(faults) > 3 else ''}. Mend the shards (symile-dist shards verify "
            "names everything that is wrong with them), or set data.on_error=quarantine"
        )
    for entry in loader.exclude(faults):
        fault = Fault(entry.kind, entry.dataset, entry.shard, entry.row, entry.member, entry.offset, entry.reason)
        recorder.event(
            state.step, f"unreadable: {fault}; left out from epoch {entry.epoch} of {entry.dataset} on", level="warning"
        )
        logger.warning("step %d: unreadable: %s", state.step, fault)
    read = state.samples_seen + state.unreadable_samples
    if read >= 1000 and state.unreadable_samples > config.data.max_bad_fraction * read:
        worst = ", ".join(f"{shard} ({count})" for shard, count in loader.quarantine.worst_shards())
        raise RunStopped(
            f"step {state.step}: {state.unreadable_samples} of {read} samples were unreadable, more than "
            f"data.max_bad_fraction = {config.data.max_bad_fraction}; the worst shards: {worst}. All of them: "
            f"symile-dist shards quarantine {config.run_directory}"
        )


def _log(
    config: Config,
    engine: Engine,
    state: TrainState,
    trained: TrainedStep,
    loader: TrainingLoader,
    recorder: Recorder,
) -> None:
    if recorder.tells_node:
        recorder.count_fetched(loader.fetch_counters())
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
        **({"loss_scale": engine.loss_scale()} if config.train.precision == "fp16" else {}),
        **values,
    )


def _validate(config: Config, state: TrainState, validator: Validator, recorder: Recorder) -> None:
    with recorder.phase("eval"):
        values = validator.run()
    for fault in validator.faults[:3]:
        recorder.event(state.step, f"unreadable in validation: {fault}", level="warning")
    if validator.faults and config.data.on_error == "stop":
        raise RunStopped(f"step {state.step}: unreadable in validation (data.on_error=stop): {validator.faults[0]}")
    name = config.validation.best_metric
    value = values[name]
    better = state.best_value is None or (value < state.best_value if name == "loss" else value > state.best_value)
    if math.isfinite(value) and better:
        state.best_step, state.best_value = state.step, value
    recorder.validation_record(state.step, state.samples_seen, values)
    recorder.restart_clock()


def _save(
    engine: Engine, loader: TrainingLoader, checkpoints: CheckpointManager, recorder: Recorder, state: TrainState
) -> None:
    recorder.flush()
    with recorder.phase("checkpoint"):
        checkpoints.save(engine, state.step, asdict(state), loader.state)
    recorder.restart_clock()


def _tell_saves(checkpoints: CheckpointManager, recorder: Recorder, state: TrainState) -> None:
    """Of saves that have come to their end behind the loop."""
    for saved in checkpoints.news():
        if saved.problem:
            recorder.event(state.step, f"checkpoint of step {saved.step} not saved: {saved.problem}", level="warning")
        else:
            samples_seen = saved.train_state["samples_seen"]
            recorder.checkpoint_record(saved.step, samples_seen, saved.size, saved.seconds, saved.stall)
