"""Runs a config on Ray, attempt after attempt, until the last step or until it cannot go on: what the command line
calls."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console

from symile_dist import run_directory
from symile_dist.checkpoint.attempts import usable_checkpoints
from symile_dist.checkpoint.manifest import CHECKPOINTS, CheckpointError, complete_checkpoints, read_manifest
from symile_dist.checkpoint.mirror import Mirror
from symile_dist.cluster import answering_nodes, fitted, living_nodes, own_address, ranks_held, start_ray
from symile_dist.config import Config
from symile_dist.data.loader import open_training
from symile_dist.data.quarantine import QUARANTINE
from symile_dist.environment import take_secrets
from symile_dist.errors import RunFailed, StorageError
from symile_dist.group import run_group
from symile_dist.health.attempt import Attempt
from symile_dist.health.lease import Lease, locked
from symile_dist.health.restarts import Restarts
from symile_dist.metrics.exporter import check_address, token_of
from symile_dist.metrics.http import LOOPBACK
from symile_dist.monitor import Monitor, settle
from symile_dist.preflight import preflight
from symile_dist.run_directory import tell_run
from symile_dist.signals import terminating
from symile_dist.view.terminal import TerminalView

logger = logging.getLogger(__name__)

PREEMPTED, RESCALED = "preempted", "rescaled"
"""Why ranks are asked to save and stop: the driver was told to end; the cluster holds more of them by now."""
LOOK_SECONDS = 10.0
"""From one look at the cluster's nodes to the next."""
POLL_SECONDS = 2.0


def launch(
    config: Config,
    fresh: bool = False,
    resume: bool = False,
    plain: bool | None = None,
    console: Console | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """What `symile-dist train` does: checks everything, then makes the run directory, then trains.

    Arguments as in `run_directory.check` and `run`; `began` (time.monotonic()) is when the command did. Returns and
    raises what `run` does; after a ValueError nothing has been written.
    """
    began = time.monotonic() if began is None else began
    with terminating(config.ray.grace_seconds) as terminated:
        try:
            return _launch(config, fresh, resume, plain, console, began, terminated)
        except KeyboardInterrupt:
            if not terminated.is_set():
                raise
            return {**_ended_as_asked(config), "restarts": 0, "seconds": 0.0}  # the grace is over


def _launch(
    config: Config,
    fresh: bool,
    resume: bool,
    plain: bool | None,
    console: Console | None,
    began: float,
    terminated: threading.Event,
) -> dict[str, Any]:
    take_secrets()
    directory = config.run_directory
    for warning in preflight(config, fresh)[:5]:
        logger.warning("%s", warning)
    run_directory.check(config, fresh, resume)
    check_address(config)
    if token_of(config) is None and config.metrics.enabled and config.metrics.address not in LOOPBACK:
        logger.warning("metrics.address: whoever reaches this machine reads metrics, page and config: see token_file")
    done = [] if fresh else usable_checkpoints(directory / CHECKPOINTS)
    if done and done[-1][0] >= config.train.steps:
        with contextlib.suppress(CheckpointError):  # damaged: the ranks go on from the one before
            state = {key: value for key, value in read_manifest(done[-1][1]).train_state.items() if key != "guard"}
            with locked(directory) as lease:
                _claim_mirror(config, lease, fresh, resume)
                tell_run(directory, status="finished", message="", page=None, **state)
                settle(directory)
            return {"status": "finished", "message": "", **state, "restarts": 0, "seconds": 0.0}
    start_ray(config)
    with locked(directory) as lease:
        holder = _claim_mirror(config, lease, fresh, resume)
        run_directory.prepare(config, fresh, resume)
        return run(config, lease, terminated, holder, plain, console, began)


def _claim_mirror(config: Config, lease: Lease, fresh: bool, resume: bool) -> str:
    """Takes the mirror for this run, and copies there what it lacks of the newest checkpoint. Returns who holds it.

    Raises ValueError where it is another run's or holds what this run must not go on from, RunFailed where it does not
    answer and nothing is here.
    """
    if not config.checkpoint.mirror:
        return ""
    mirror = Mirror(config)
    here = [] if fresh else usable_checkpoints(config.run_directory / CHECKPOINTS)
    try:
        before, there = mirror.owner().get("config"), mirror.steps()
        if fresh and there:
            raise ValueError(f"checkpoint.mirror: {mirror.folder.url} holds the old run's checkpoints; choose another")
        if there and not here and before and not resume:
            changed = run_directory.differences(Config.model_validate(before), config)
            if changed:
                raise ValueError(
                    f"checkpoint.mirror: {mirror.folder.url} holds a run of another config ({'; '.join(changed[:5])}); "
                    "go on with it by its own config, or choose another mirror"
                )
        holder, fence = mirror.claim()
        lease.fence = max(lease.fence, fence)
        if here and here[-1][0] not in there:
            mirror.copy_whole(here[-1][1], [config.run_directory / QUARANTINE])
    except (StorageError, OSError) as error:
        words = f"checkpoint.mirror: {error}"
        if not here:
            raise RunFailed(words) from None
        logger.warning("%s; going on with what is here", words)
        return mirror.holder
    return holder


def run(
    config: Config,
    lease: Lease,
    terminated: threading.Event,
    mirror_holder: str = "",
    plain: bool | None = None,
    console: Console | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Trains, with restarts, until the last step, in a directory that is prepared and on a Ray that is started.

    `terminated` is set when it shall save and stop. `console` is where the live view is drawn (standard output when
    left out), `plain` asks for lines in its place. `began`: as of `launch`.

    Returns {"status": "finished", "restarts": ..., "seconds": ...} and what `TrainState` holds at the end; the status
    is "preempted" where it was told to stop. Raises ValueError for a user's mistake that only a worker could see,
    RunFailed when the run cannot go on.
    """
    begin = time.monotonic()
    directory = config.run_directory
    restarts = Restarts(config.ray.max_failures, config.ray.max_repeats, config.ray.max_node_failures)
    monitor = Monitor(config, own_address(), began)
    tell_run(directory, status="running", pid=os.getpid(), failures=[])
    view = TerminalView(config.run.name, config.train.steps, console=console, plain=plain)
    view.start()
    outcome = {"status": "interrupted", "message": "interrupted by a signal"}
    try:
        if monitor.url:
            view.note(f"watch it: {monitor.url}")
        outcome = _attempts(config, lease, view, monitor, restarts, terminated, mirror_holder)
    except KeyboardInterrupt:
        if not terminated.is_set():
            tell_run(directory, **outcome)
            raise
        outcome = _ended_as_asked(config)  # the grace is over
    except Exception as error:
        outcome = {"status": "failed", "message": str(error)}
        tell_run(directory, **outcome)
        raise
    finally:
        view.stop()
        monitor.end(outcome["status"], outcome["message"])
    tell_run(directory, **outcome)
    if outcome["status"] == "refused":
        raise ValueError(outcome["message"])
    if outcome["status"] not in ("finished", PREEMPTED):
        raise RunFailed(outcome["message"])
    return {**outcome, "restarts": len(restarts.failures), "seconds": time.monotonic() - begin}


def _attempts(
    config: Config,
    lease: Lease,
    view: TerminalView,
    monitor: Monitor,
    restarts: Restarts,
    terminated: threading.Event,
    mirror_holder: str,
) -> dict[str, Any]:
    """One group of ranks after another, until one ends by itself: its outcome. Raises RunFailed when there have been
    enough."""
    directory, begin = config.run_directory, time.monotonic()
    failed: float | None = None
    while True:
        placed = _place(config, restarts, view, monitor, terminated)
        if placed is None:
            return _ended_as_asked(config)
        hours = (time.monotonic() - begin) / 3600
        attempt = Attempt(_advance(lease), len(restarts.failures), hours, mirror_holder)
        if failed is not None:
            attempt.phases["wait"] = time.monotonic() - failed
            failed = None
        wish = _wishes(config, placed, terminated)
        outcome, failure = run_group(placed.config, attempt, view, monitor, wish, placed.left_out)
        if outcome is not None and outcome["status"] != RESCALED:
            return outcome
        if terminated.is_set():
            return _ended_as_asked(config)
        if failure is None:
            tell_run(directory, status="restarting")
            monitor.restarting()
            view.note("the cluster holds more ranks by now: they are started anew")
            continue
        failed = time.monotonic()
        restarts.add(failure)
        monitor.failed(failure)
        tell_run(directory, status="restarting", restarts=len(restarts.failures), failures=restarts.told())
        reason = restarts.gives_up()
        if reason:
            samples = _samples_of(config, failure.step) if restarts.repeats > 1 else ""
            raise RunFailed(f"{reason}; the last: {failure.message}{samples}; see {directory / 'logs'}")
        wait = restarts.wait_seconds()
        pause = f" in {wait:g} s" if wait else ""
        words = f"{failure.message}: the group is restarted{pause} (restart {len(restarts.failures)})"
        view.note(words, level="warning")
        terminated.wait(wait)


class _Placed(NamedTuple):
    """A config whose ranks the cluster holds."""

    config: Config
    left_out: frozenset[str]
    """Nodes, by id, that have no part in it."""


def _place(
    config: Config, restarts: Restarts, view: TerminalView, monitor: Monitor, terminated: threading.Event
) -> _Placed | None:
    """As many ranks as the cluster holds; after a failure it waits until it holds enough. None when asked to end.

    Raises ValueError where the cluster is too small from the start, RunFailed where it stays so.
    """
    deadline, told = time.monotonic() + config.ray.wait_for_nodes_seconds, False
    while not terminated.is_set():
        try:
            nodes = answering_nodes() if restarts.failures else living_nodes()
            known = {node.id for node in living_nodes()}
        except Exception as error:
            raise RunFailed(f"the Ray cluster does not answer any more: {error}") from error
        for left_out in (restarts.left_out(), set()):  # what keeps failing is better than nothing
            able = [node for node in nodes if node.id not in left_out]
            try:
                placed = fitted(config, able)
            except ValueError as error:
                lack = str(error)
            else:
                if placed.world_size < config.world_size:
                    view.note(f"the cluster holds {placed.world_size} of {config.world_size} ranks", level="warning")
                return _Placed(placed, frozenset(known - {node.id for node in able}))
        if not restarts.failures:
            raise ValueError(lack)
        if time.monotonic() > deadline:
            raise RunFailed(f"{lack}; it has been so for {config.ray.wait_for_nodes_seconds:g} s")
        if not told:
            view.note(f"waiting for nodes: {lack}", level="warning")
            told = True
        monitor.look()
        terminated.wait(POLL_SECONDS)
    return None


def _wishes(config: Config, placed: _Placed, terminated: threading.Event) -> Callable[[], str | None]:
    """Says when a group should save and stop."""
    next_look, seen_before = time.monotonic() + LOOK_SECONDS, False

    def wish() -> str | None:
        nonlocal next_look, seen_before
        if terminated.is_set():
            return PREEMPTED
        if placed.config.world_size < config.world_size and time.monotonic() > next_look:
            able = [node for node in living_nodes() if node.id not in placed.left_out]
            more = ranks_held(config, able) > placed.config.world_size
            next_look = time.monotonic() + LOOK_SECONDS
            if more and seen_before:  # twice in a row: a node that has just been lost is still among them
                return RESCALED
            seen_before = more
        return None

    return wish


def _ended_as_asked(config: Config) -> dict[str, Any]:
    """The outcome of a run that was told to end, and whose ranks have not said how that went."""
    saved = usable_checkpoints(config.run_directory / CHECKPOINTS)
    words = f"step {saved[-1][0]} is the newest that is saved" if saved else "nothing is saved yet"
    return {"status": PREEMPTED, "message": f"ended as asked; {words}"}


def _advance(lease: Lease) -> int:
    try:
        return lease.advance()
    except OSError as error:
        raise RunFailed(f"the run's lock cannot be written: {error}; make room, then resume") from error


def _samples_of(config: Config, step: int | None) -> str:
    """Which samples the batch of a step holds, in words; nothing where that cannot be told."""
    alone = config.model_copy(update={"ray": config.ray.model_copy(update={"num_workers": 1})})
    complete = complete_checkpoints(config.run_directory / CHECKPOINTS)
    try:
        assert step is not None
        saved = read_manifest(complete[-1][1]).loader_state if complete else None
        names = open_training(alone, 0, step, saved).names_of(step)
    except Exception as error:
        logger.warning("the samples of step %s cannot be told: %s", step, error)
        return ""
    tell_run(config.run_directory, failing_samples=names)
    more = f" and {len(names) - 5} more (in run.json)" if len(names) > 5 else ""
    return f"; its batch holds {', '.join(names[:5])}{more}"
