"""The training loop and its state."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from symile_dist import spans
from symile_dist.checkpoint.interval import SaveInterval
from symile_dist.checkpoint.manager import CheckpointManager
from symile_dist.checkpoint.manifest import Manifest
from symile_dist.config import Config
from symile_dist.data.loader import TrainingLoader
from symile_dist.distributed import all_reduce_sum, gather_objects, rank
from symile_dist.engine import Engine
from symile_dist.errors import RunPreempted, RunStopped
from symile_dist.failpoints import failpoint
from symile_dist.flops import device_facts, flops_per_sample
from symile_dist.health.guard import ADVICE, Guard, GuardState, RollBack
from symile_dist.health.stop import StopRequest
from symile_dist.metrics import ranks
from symile_dist.metrics.history import HISTORY_FILE
from symile_dist.metrics.profiling import StepProfiler
from symile_dist.metrics.recorder import Recorder
from symile_dist.step import TrainedStep, train_step
from symile_dist.types import Batch, Fault
from symile_dist.validate import Validator, embeddings_of, similarity_of
from symile_dist.vitals import Vitals

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
    best_step: int | None = None
    """Step of the best validation so far."""
    best_value: float | None = None
    guard: GuardState = field(default_factory=GuardState)

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> TrainState:
        return cls(**{**manifest.train_state, "guard": GuardState(**manifest.train_state["guard"])})

    def summary(self) -> dict[str, Any]:
        """For people: without what the guard remembers of single steps."""
        return {key: value for key, value in asdict(self).items() if key != "guard"}


def train(
    config: Config,
    engine: Engine,
    loader: TrainingLoader,
    validator: Validator | None,
    checkpoints: CheckpointManager,
    recorder: Recorder,
    state: TrainState,
    interval: SaveInterval,
    stop: StopRequest,
    beat: Callable[[int], None],
) -> TrainState:
    """Trains from `state.step` to `config.train.steps`. Every rank runs the same loop in step.

    `stop` may be asked on any rank; `beat` is called with the number of each step, and as often as anything else has
    come to its end.

    Raises, on all ranks alike: RunPreempted, with everything saved, once a stop was asked for; RunStopped when too many
    steps in a row are skipped or too many samples are unreadable; RollBack, with no save on its way, when training is
    to begin again from an older checkpoint.
    """
    guard = Guard(config.guard, state.guard)
    steps = config.train.steps
    due_for = {"log": config.train.log_every, "validation": config.validation.every}
    vitals = Vitals(similarity_of(engine.module.objective), embeddings_of(engine.module.objective))
    profiler = StepProfiler(config, rank(), recorder)
    spans.use(recorder.spans)
    recorder.spans.take()  # what came before is no step's
    recorder.restart_clock()
    last = time.perf_counter()
    for batch in _timed(loader, recorder):
        beat(state.step)
        failpoint("step", rank(), state.step)
        profiler.before(state.step + 1)
        trained = None
        if not guard.excludes(state.step + 1):
            admits = guard.admits if config.guard.action == "skip" else None
            trained = train_step(engine, batch, state.step, recorder, admits)
        skipped_for = _skip_reason(trained, guard)
        wishes = {
            "stop": stop.reason is not None,
            "save": rank() == 0 and interval.due(state.step + 1, time.monotonic()),
        }
        seconds = time.perf_counter() - last
        interval.stepped(seconds, checkpoints.saving)
        granted = _count(config, engine, state, batch, skipped_for, loader, recorder, seconds, wishes)
        profiler.after(state.step)
        rollback = _guarded(guard, state, batch, trained, loader, recorder)
        if rollback:
            checkpoints.settle()
            _tell_saves(checkpoints, recorder, state)
            profiler.finish(state.step)
            raise rollback
        due = {what for what, every in due_for.items() if state.step == steps or (every and state.step % every == 0)}
        if "log" in due and trained:
            _log(config, engine, state, batch, trained, loader, recorder, vitals)
        if "validation" in due and validator:
            _validate(config, state, validator, recorder)
            beat(state.step)
        if granted or state.step == steps:
            interval.saved(time.monotonic(), _save(engine, loader, checkpoints, recorder, state))
        if "stop" in granted and state.step < steps:
            profiler.finish(state.step)
            checkpoints.finish()
            _tell_saves(checkpoints, recorder, state)
            recorder.event(state.step, "stop", f"stopped as asked after step {state.step}, saved")
            raise RunPreempted(f"step {state.step}: stopped as asked, and saved")
        _tell_saves(checkpoints, recorder, state)
        last = time.perf_counter()
    beat(state.step)
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


def _skip_reason(trained: TrainedStep | None, guard: Guard) -> str | None:
    """One of SKIP_REASONS; None where the step was taken."""
    if trained is None:
        return "excluded"
    if trained.result.applied:
        return None
    if trained.result.refused:
        return guard.found
    return "overflow" if trained.result.rescaled else "nonfinite_grad"


def _count(
    config: Config,
    engine: Engine,
    state: TrainState,
    batch: Batch,
    skipped_for: str | None,
    loader: TrainingLoader,
    recorder: Recorder,
    seconds: float,
    wishes: dict[str, bool],
) -> set[str]:
    """Counts the step; returns which wishes any rank has.

    Raises RunStopped when it can only go on wrongly.
    """
    local = int(batch.valid.sum())
    # Valid slots over all ranks, and wishes: the same numbers everywhere, so that all act alike.
    valid, *wished = all_reduce_sum(torch.tensor([local, *wishes.values()], device=engine.device)).tolist()
    state.step += 1
    state.samples_seen += valid
    state.unreadable_samples += config.train.global_batch_size - valid
    recorder.count_step(state.step, seconds, local, valid, skipped_for)
    recorder.count_data(batch, local, loader.queue_depth)
    if valid < config.train.global_batch_size:
        _unreadable(config, state, batch, loader, recorder)
    return {wish for wish, number in zip(wishes, wished, strict=True) if number}


def _guarded(
    guard: Guard,
    state: TrainState,
    batch: Batch,
    trained: TrainedStep | None,
    loader: TrainingLoader,
    recorder: Recorder,
) -> RollBack | None:
    """Tells of spikes and skipped steps; says whether the run is to go back, and raises RunStopped when it has too
    often."""
    if trained is None:
        state.skipped_steps += 1
        return None
    result, config = trained.result, guard.config
    recorder.tell_step(float(trained.loss), result.grad_norm)  # no wait: the step has asked the device for the norm
    if result.applied and config.action != "off":
        loss = float(trained.loss)
        spike = guard.spike(loss, result.grad_norm) if config.action == "warn" else None
        if spike:
            what = f"loss {loss:.4g}, gradient norm {result.grad_norm:.4g}"
            recorder.event(state.step, "spike", f"step {state.step} is a spike ({spike}): {what}", level="warning")
        guard.took(loss, result.grad_norm)
    if result.applied and result.inner_applied:
        guard.went_well()
        return None
    state.skipped_steps += 1
    if result.rescaled:
        words = "gradients exceed fp16's range; the loss is scaled by less from here on"
        recorder.event(state.step, "skip", f"step {state.step} skipped: {words}", level="warning")
        return None
    inner = " of the inner optimizer" if result.applied else ""
    words = "non-finite loss or gradient"
    if result.refused:
        words = f"a spike ({guard.found}): loss {float(trained.loss):.4g}, gradient norm {result.grad_norm:.4g}"
    recorder.event(state.step, "skip", f"step {state.step}{inner} skipped: {words}", level="warning")
    if not guard.skipped(state.step):
        return None
    samples = [name for part in gather_objects(loader.names(batch.sample_ids)) for name in part]
    more = f" and {len(samples) - 5} more (in {HISTORY_FILE})" if len(samples) > 5 else ""
    reason = (
        f"step {state.step}: loss or gradients were not finite{', or a spike,' if config.action == 'skip' else ''} for "
        f"{state.guard.consecutive_skips} steps in a row (guard.patience); the last batch held {', '.join(samples[:5])}"
        f"{more}"
    )
    recorder.event(state.step, "skip", reason, level="error", samples=samples)
    if not guard.may_roll_back:
        raise RunStopped(
            f"{reason}. The run has gone back to a checkpoint {state.guard.rollbacks} times (guard.max_rollbacks). "
            f"{ADVICE}"
        )
    return RollBack(guard.distrusted_from(), state.step, reason)


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
        words = f"unreadable: {fault}; left out from epoch {entry.epoch} of {entry.dataset} on"
        recorder.event(state.step, "data", words, level="warning")
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
    batch: Batch,
    trained: TrainedStep,
    loader: TrainingLoader,
    recorder: Recorder,
    vitals: Vitals,
) -> None:
    modalities = list(config.modalities)
    if recorder.flops_per_sample is None:
        recorder.flops_per_sample, problem = flops_per_sample(engine, batch)
        if problem:
            recorder.event(state.step, "profile", f"no FLOP/s and no MFU: {problem}", level="warning")
    device = device_facts(engine.device, config)
    recorder.tell_device(device)
    own = recorder.own_speed() | {"memory_bytes": device.get("memory_peak", device["resident"])}
    table = ranks.gathered(own, modalities, engine.device)
    recorder.publish_ranks(state.step, table)
    if recorder.tells_node:
        recorder.count_fetched(loader.fetch_counters())
    loss = float(trained.loss)
    values: dict[str, Any] = {name: float(value) for name, value in trained.metrics.items()}
    if getattr(engine.module.objective, "bounds_total_correlation", False):
        values["total_correlation_bound"] = math.log(config.train.global_batch_size) - loss
    if recorder.history:
        values |= vitals.look(engine.module.seen, batch)
        values |= ranks.summary(table, modalities) | recorder.efficiency(config.world_size, device.get("peak_flops"))
    recorder.train_record(
        state.step,
        state.samples_seen,
        loss=loss,
        grad_norm=trained.result.grad_norm,
        learning_rate=trained.result.learning_rate,
        logit_scale=engine.logit_scale(),
        skipped_steps=state.skipped_steps,
        loss_scale=engine.loss_scale(),
        **values,
    )


def _validate(config: Config, state: TrainState, validator: Validator, recorder: Recorder) -> None:
    begin = time.perf_counter()
    with recorder.phase("eval"):
        values = validator.run()
    for fault in validator.faults[:3]:
        recorder.event(state.step, "data", f"unreadable in validation: {fault}", level="warning")
    if validator.faults and config.data.on_error == "stop":
        raise RunStopped(f"step {state.step}: unreadable in validation (data.on_error=stop): {validator.faults[0]}")
    name = config.validation.best_metric
    value = values[name]
    better = state.best_value is None or (value < state.best_value if name == "loss" else value > state.best_value)
    if math.isfinite(value) and better:
        state.best_step, state.best_value = state.step, value
    recorder.validation_record(state.step, state.samples_seen, values, time.perf_counter() - begin)
    recorder.restart_clock()


def _save(
    engine: Engine, loader: TrainingLoader, checkpoints: CheckpointManager, recorder: Recorder, state: TrainState
) -> float:
    """Returns the seconds that it took the loop."""
    recorder.flush()
    with recorder.phase("checkpoint"):
        stall = checkpoints.save(engine, state.step, asdict(state), loader.state)
    recorder.restart_clock()
    return stall


def _tell_saves(checkpoints: CheckpointManager, recorder: Recorder, state: TrainState) -> None:
    """Of saves that have come to their end behind the loop."""
    for saved in checkpoints.news():
        if saved.problem:
            words = f"checkpoint of step {saved.step} not saved: {saved.problem}"
            recorder.event(state.step, "checkpoint", words, level="warning")
            recorder.count_failed_save()
        else:
            samples_seen = saved.train_state["samples_seen"]
            recorder.checkpoint_record(saved.step, samples_seen, saved.size, saved.seconds, saved.stall)
    for copied in checkpoints.news_of_mirror():
        if copied.problem:
            words = f"checkpoint of step {copied.step} not copied to the mirror: {copied.problem}"
            recorder.event(state.step, "checkpoint", words, level="warning")
            recorder.count_failed_save(mirror=True)
        else:
            recorder.record("mirror", copied.step, seconds=copied.seconds)
