"""Runs a config on Ray, attempt after attempt, until the last step or until it cannot go on: what the command line
calls."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console

from symile_dist import run_directory
from symile_dist.board import Board, Watcher
from symile_dist.checkpoint.manifest import CHECKPOINTS, CheckpointError, complete_checkpoints, read_manifest
from symile_dist.cluster import fitted, resources_without, start_ray
from symile_dist.config import Config
from symile_dist.errors import RunFailed
from symile_dist.failpoints import VARIABLE as FAILPOINTS
from symile_dist.health.beat import signs_of_life
from symile_dist.health.lease import Lease, locked
from symile_dist.health.restarts import Failure, Restarts
from symile_dist.health.watchdog import hang_of
from symile_dist.preflight import preflight
from symile_dist.run_directory import update_run
from symile_dist.view.terminal import TerminalView

logger = logging.getLogger(__name__)


def launch(
    config: Config,
    fresh: bool = False,
    resume: bool = False,
    plain: bool | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """What `symile-dist train` does: checks everything, then makes the run directory, then trains.

    Arguments as in `run_directory.check` and `run`. Returns and raises what `run` does; after a ValueError nothing has
    been written.
    """
    for warning in preflight(config, fresh)[:5]:
        logger.warning("%s", warning)
    run_directory.check(config, fresh, resume)
    done = [] if fresh else complete_checkpoints(config.run_directory / CHECKPOINTS)
    if done and done[-1][0] >= config.train.steps:
        with contextlib.suppress(CheckpointError):  # damaged: the ranks go on from the one before
            state = read_manifest(done[-1][1]).train_state
            return {"status": "finished", "message": "", **state, "restarts": 0, "seconds": 0.0}
    fitting = start_ray(config)
    with locked(config.run_directory) as lease:
        run_directory.prepare(fitting, fresh, resume)
        return run(config, lease, plain, console)


def run(config: Config, lease: Lease, plain: bool | None = None, console: Console | None = None) -> dict[str, Any]:
    """Trains, with restarts, until the last step, in a directory that is prepared and on a Ray that is started.

    `console` is where the live view is drawn (standard output when left out), `plain` asks for lines in its place.

    Returns {"status": "finished", "restarts": ..., "seconds": ...} and what `TrainState` holds at the end; the status
    is "preempted" where a signal has asked it to save and stop. Raises ValueError for a user's mistake that only a
    worker could see, RunFailed when the run cannot go on.
    """
    import ray

    begin = time.monotonic()
    directory = config.run_directory
    board = ray.remote(num_cpus=0, max_concurrency=4)(Board).remote()
    restarts = Restarts(config.ray.max_failures, config.ray.max_repeats, config.ray.max_node_failures)
    update_run(directory, status="running", pid=os.getpid(), failures=[])
    view = TerminalView(config.run.name, config.train.steps, console=console, plain=plain)
    view.start()
    try:
        while True:
            ended = _attempt(config, lease, board, view, restarts)
            if ended.outcome is not None:
                break
            assert ended.failure is not None
            restarts.add(ended.failure)
            told = {"restarts": len(restarts.failures), "failures": restarts.told()}
            reason = restarts.gives_up()
            if reason:
                message = f"{reason}; the last: {ended.failure.message}; see {directory / 'logs'}"
                update_run(directory, status="failed", message=message, **told)
                raise RunFailed(message)
            update_run(directory, status="restarting", **told)
            wait = restarts.wait_seconds()
            pause = f" in {wait:g} s" if wait else ""
            words = f"{ended.failure.message}: the group is restarted{pause} (restart {len(restarts.failures)})"
            view.note(words, level="warning")
            time.sleep(wait)
    except KeyboardInterrupt:
        update_run(directory, status="interrupted", message="interrupted by a signal")
        raise
    finally:
        view.stop()
        with contextlib.suppress(Exception):  # a cluster that is gone has no board
            ray.kill(board)
    outcome = ended.outcome
    update_run(directory, **outcome)
    if outcome["status"] == "refused":
        raise ValueError(outcome["message"])
    if outcome["status"] not in ("finished", "preempted"):
        raise RunFailed(outcome["message"])
    return {**outcome, "restarts": len(restarts.failures), "seconds": time.monotonic() - begin}


class _Ended(NamedTuple):
    """How an attempt ended: by itself, or by a failure."""

    outcome: dict[str, Any] | None
    failure: Failure | None


def _attempt(config: Config, lease: Lease, board: Any, view: TerminalView, restarts: Restarts) -> _Ended:
    """One group of ranks, from its start to its end, on what the cluster holds now."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from symile_dist.worker import run_worker

    fence = lease.advance()
    left_out, fitting = restarts.left_out(), config
    if restarts.failures:
        try:
            fitting = fitted(config, resources_without(left_out))
        except ValueError:  # too little without them: what keeps failing is better than nothing
            left_out, fitting = set(), fitted(config, resources_without(()))
    ray.get(board.begin.remote())
    use_gpu = config.ray.gpus_per_worker > 0
    resources = {"CPU": config.ray.cpus_per_worker} | ({"GPU": config.ray.gpus_per_worker} if use_gpu else {})
    settings = {
        "config": fitting.model_dump(mode="json"),
        "board": board,
        "fence": fence,
        "began": time.time(),
        "failpoints": os.environ.get(FAILPOINTS),
    }
    trainer = TorchTrainer(
        run_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(config.ray.collective_timeout_seconds)
        ),
        scaling_config=ScalingConfig(
            num_workers=fitting.world_size,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            label_selector={"ray.io/node-id": f"!in({','.join(sorted(left_out))})"} if left_out else None,
        ),
        run_config=RunConfig(
            # A name of its own each time: Ray would otherwise resume by its own books, and ours are the manifests.
            name=f"{config.run.name}-{time.time_ns()}",
            storage_path=str(config.run_directory / "ray"),
            # Restarts are the driver's: it knows the run's checkpoints, and what the cluster still holds.
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    update_run(config.run_directory, status="running", world_size=fitting.world_size)
    failure: Exception | None = None
    watcher = Watcher(board, view, fitting)
    with watcher, _preempted(watcher, config.ray.grace_seconds):
        try:
            trainer.fit()
        except SystemExit:  # Ray Train's answer to SIGINT
            raise KeyboardInterrupt from None
        except Exception as error:
            failure = error
    if watcher.outcome is not None:
        return _Ended(watcher.outcome, None)
    return _Ended(None, _failure(config, fence, failure, watcher.ranks))


def _failure(config: Config, fence: int, error: Exception | None, ranks: dict[int, dict[str, Any]]) -> Failure:
    """Whose failure it was, and of what kind: of the rank that died where one did, else of the one that raised."""
    import ray
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {}
    died = {rank: each for rank, each in failures.items() if isinstance(each, WorkerHealthCheckFailedError)}
    rank, cause_of = next(iter(sorted((died or failures).items())), (None, error))
    node = ranks.get(rank, {}).get("node") if rank is not None else None
    beats = signs_of_life(config.run_directory, fence)
    steps = [beats[rank].step] if rank in beats else [beat.step for beat in beats.values()]
    complete = complete_checkpoints(config.run_directory / CHECKPOINTS)
    words = _cause(cause_of)
    hang = hang_of(config.run_directory, fence)
    alive = {each["NodeID"] for each in ray.nodes() if each["Alive"]}
    if hang:
        cause, message = "hang", hang
    elif isinstance(cause_of, ray.exceptions.OutOfMemoryError) or (not died and "out of memory" in str(cause_of)):
        # (What Ray says of any actor that died mentions the possibility.)
        cause, message = "out_of_memory", f"rank {rank} ran out of memory"
    elif node and node not in alive:
        cause, message = "node_lost", f"the node of rank {rank} is lost"
    elif died:
        cause, message = "rank_lost", f"rank {rank} was lost"
    else:
        cause, message = "other", f"rank {rank} failed: {words}" if rank is not None else f"Ray failed: {words}"
    step = max(steps, default=-1)
    if step >= 0:
        message += f", in step {step + 1}"
    return Failure(cause, message, step if step >= 0 else None, rank, node, complete[-1][0] if complete else 0)


@contextlib.contextmanager
def _preempted(watcher: Watcher, grace_seconds: float) -> Iterator[None]:
    """SIGTERM, which Slurm, Kubernetes and `timeout` send, asks the ranks to save and stop; a second one, or the end of
    the grace, ends them at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def at_once(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def ask(number: int, frame: object) -> None:
        watcher.ask_to_stop("preempted")
        signal.signal(signal.SIGTERM, at_once)
        signal.signal(signal.SIGALRM, at_once)
        signal.setitimer(signal.ITIMER_REAL, grace_seconds)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, which Slurm, Kubernetes and `timeout` send, ends the work as Ctrl-C does; Ray's own handler aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _cause(error: BaseException | None) -> str:
    """The last line of what Ray says of a failure that names an exception: the traceback stands above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Killed)\b", line)]
    return (named or lines or [type(error).__name__])[-1]
