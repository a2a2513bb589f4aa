"""One group of ranks on Ray, from its start to its end, and what a failure of it was."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from symile_dist.board import Board, Watcher
from symile_dist.checkpoint.manifest import CHECKPOINTS, complete_checkpoints
from symile_dist.cluster import answering_nodes
from symile_dist.config import Config
from symile_dist.failpoints import VARIABLE as FAILPOINTS
from symile_dist.health.attempt import Attempt
from symile_dist.health.beat import signs_of_life
from symile_dist.health.restarts import Failure
from symile_dist.health.watchdog import flight_recorder, hang_of
from symile_dist.monitor import Monitor
from symile_dist.run_directory import tell_run
from symile_dist.signals import handlers_kept
from symile_dist.view.terminal import TerminalView


class Ended(NamedTuple):
    """How a group ended: by itself, or by a failure."""

    outcome: dict[str, Any] | None
    failure: Failure | None


def run_group(
    config: Config,
    attempt: Attempt,
    view: TerminalView,
    monitor: Monitor,
    wish: Callable[[], str | None],
    left_out: Collection[str] = (),
) -> Ended:
    """Starts as many ranks as the config says, and waits until they have ended.

    Args:
        wish: asked often, in another thread; where it says something the ranks save and stop, and that is the outcome's
            status.
        left_out: nodes, by id, on which no rank is started.

    Raises KeyboardInterrupt for signals.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from symile_dist.worker import run_worker

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    use_gpu = config.ray.gpus_per_worker > 0
    resources = {"CPU": config.ray.cpus_per_worker} | ({"GPU": config.ray.gpus_per_worker} if use_gpu else {})
    settings = {
        "config": config.model_dump(mode="json"),
        "board": board,
        "attempt": {name: getattr(attempt, name) for name in ("fence", "failures", "hours", "mirror_holder", "phases")},
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
            num_workers=config.world_size,
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
            worker_runtime_env={"env_vars": flight_recorder(config.run_directory, attempt.fence)} if use_gpu else None,
        ),
    )
    tell_run(config.run_directory, status="running", world_size=config.world_size)
    monitor.begun(config)
    error: Exception | None = None
    watcher = Watcher(board, view, monitor, config, wish)
    try:
        with watcher, handlers_kept():
            try:
                trainer.fit()
            except SystemExit:  # Ray Train's answer to SIGINT
                raise KeyboardInterrupt from None
            except Exception as raised:
                error = raised
    finally:
        with contextlib.suppress(Exception):  # a cluster that is gone has no board
            ray.kill(board)
    if watcher.outcome is not None:
        return Ended(watcher.outcome, None)
    return Ended(None, _failure(config, attempt.fence, error, watcher.ranks))


def _failure(config: Config, fence: int, error: Exception | None, ranks: dict[int, dict[str, Any]]) -> Failure:
    """Whose failure it was, and of what kind: of the rank that died where one did, else of the one that raised."""
    import ray
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {}
    died = {rank: each for rank, each in failures.items() if isinstance(each, WorkerHealthCheckFailedError)}
    rank, cause_of = next(iter(sorted((died or failures).items())), (None, error))
    # Of a lost node it is often the others that tell first, of a connection that broke.
    lost = _lost(ranks)
    rank = min(lost) if lost and rank not in lost else rank
    node = ranks.get(rank, {}).get("node") if rank is not None else None
    beats = signs_of_life(config.run_directory, fence)
    steps = [beats[rank].step] if rank in beats else [beat.step for beat in beats.values()]
    complete = complete_checkpoints(config.run_directory / CHECKPOINTS)
    hang = hang_of(config.run_directory, fence)
    if hang:
        cause, message = "hang", hang
    elif isinstance(cause_of, ray.exceptions.OutOfMemoryError) or (not died and "out of memory" in str(cause_of)):
        # (What Ray says of any actor that died mentions the possibility.)
        cause, message = "out_of_memory", f"rank {rank} ran out of memory"
    elif rank in lost:
        cause, message = "node_lost", f"the node of rank {rank} is lost"
    elif died:
        cause, message = "rank_lost", f"rank {rank} was lost"
    else:
        words = _cause(cause_of)
        cause, message = "other", f"rank {rank} failed: {words}" if rank is not None else f"Ray failed: {words}"
    step = max(steps, default=-1)
    if step >= 0:
        message += f", in step {step + 1}"
    return Failure(cause, message, step if step >= 0 else None, rank, node, complete[-1][0] if complete else 0)


def _lost(ranks: dict[int, dict[str, Any]]) -> set[int]:
    """Those whose nodes do not answer any more; with one node there is none to answer for it."""
    nodes = {rank: told["node"] for rank, told in ranks.items()}
    if len(set(nodes.values())) <= 1:
        return set()
    try:
        answering = {each.id for each in answering_nodes()}
    except Exception:  # the cluster itself is gone: the next attempt will tell
        return set()
    return {rank for rank, node in nodes.items() if node not in answering}


def _cause(error: BaseException | None) -> str:
    """The last line of what Ray says of a failure that names an exception: the traceback stands above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Killed)\b", line)]
    return (named or lines or [type(error).__name__])[-1]
