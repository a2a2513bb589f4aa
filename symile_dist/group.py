"""One group of ranks on Ray, from its start to its end, and what a failure of it was."""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from symile_dist.board import Board, Watcher
from symile_dist.checkpoint.manifest import CHECKPOINTS, complete_checkpoints
from symile_dist.cluster import answering_nodes
from symile_dist.config import Config
from symile_dist.failpoints import VARIABLE as FAILPOINTS
from symile_dist.health.attempt import Attempt
from symile_dist.health.beat import signs_of_life
from symile_dist.health.restarts import Failure
from symile_dist.health.watchdog import hang_of
from symile_dist.monitor import Monitor
from symile_dist.positions import positions
from symile_dist.run_directory import tell_run
from symile_dist.view.terminal import TerminalView

PLACEMENT_SECONDS = 60.0
"""The cluster was seen to have room for the ranks: so long may it take to reserve it."""
POLL_SECONDS = 0.5
SETTLE_SECONDS = 1.0
"""So long have the other ranks, after the first failure, to tell of theirs."""


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
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    settings = {
        "config": config.model_dump(mode="json"),
        "board": board,
        "attempt": {name: getattr(attempt, name) for name in ("fence", "failures", "hours", "mirror_holder", "phases")},
        "began": time.time(),
        "failpoints": os.environ.get(FAILPOINTS),
    }
    tell_run(config.run_directory, status="running", world_size=config.world_size)
    monitor.begun(config)
    failures: dict[int | None, Exception] = {}
    watcher = Watcher(board, view, monitor, config, wish)
    try:
        with watcher, _actors(config, left_out) as actors:
            failures = _train(actors, settings, config.ray.collective_timeout_seconds)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:  # no ranks yet, or no cluster any more
        failures = {None: error}
    finally:
        with contextlib.suppress(Exception):  # a cluster that is gone has no board
            ray.kill(board)
    if watcher.outcome is not None:
        return Ended(watcher.outcome, None)
    return Ended(None, _failure(config, attempt.fence, failures, watcher.ranks))


@contextlib.contextmanager
def _actors(config: Config, left_out: Collection[str]) -> Iterator[list[Any]]:
    """The ranks' processes, on as few nodes as hold them; none is left at the end."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from symile_dist.worker import TrainingRank

    cpus, gpus, number = config.ray.cpus_per_worker, config.ray.gpus_per_worker, config.world_size
    elsewhere = [{"ray.io/node-id": f"!in({','.join(sorted(left_out))})"}] * number if left_out else None
    bundle = {"CPU": cpus} | ({"GPU": float(gpus)} if gpus else {})
    group = placement_group([bundle] * number, strategy="PACK", bundle_label_selector=elsewhere)
    actors: list[Any] = []
    try:
        until = time.monotonic() + PLACEMENT_SECONDS
        while not group.wait(1):  # second by second, for a signal is heard in between
            if time.monotonic() > until:
                raise RuntimeError(f"RuntimeError: no room for {number} x {bundle} within {PLACEMENT_SECONDS:.0f} s")
        for index in range(number):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            options = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": place}
            actors.append(ray.remote(**options)(TrainingRank).remote())
        yield actors
    finally:
        with contextlib.suppress(Exception):  # of a cluster that is gone nothing is left
            for actor in actors:
                ray.kill(actor)
            remove_placement_group(group)


def _train(actors: list[Any], settings: dict[str, Any], start_seconds: float) -> dict[int | None, Exception]:
    """Waits until all ranks have ended, or one has failed. Returns rank -> failure, of all that failed with it."""
    import ray

    places = ray.get([actor.place.remote() for actor in actors], timeout=start_seconds)
    placed = sorted(zip(positions(places), actors, strict=True))
    meeting = ray.get(placed[0][1].rendezvous.remote(len(actors)), timeout=start_seconds)
    running = {actor.train.remote(settings, position, meeting): position.rank for position, actor in placed}
    failures: dict[int | None, Exception] = {}
    until = math.inf
    while running and time.monotonic() < until:
        # The timeout lets signals through.
        ended, _ = ray.wait(list(running), num_returns=len(running) if failures else 1, timeout=POLL_SECONDS)
        for task in ended:
            rank = running.pop(task)
            try:
                ray.get(task)
            except Exception as error:
                failures[rank] = error
                # The others notice a lost rank, too, and some sooner than Ray: all have a moment to tell.
                until = min(until, time.monotonic() + SETTLE_SECONDS)
    return failures


def _failure(
    config: Config, fence: int, failures: dict[int | None, Exception], ranks: dict[int, dict[str, Any]]
) -> Failure:
    """Whose failure it was, and of what kind: of the rank that died where one did, else of the one that raised."""
    import ray

    died = {rank: each for rank, each in failures.items() if isinstance(each, ray.exceptions.RayActorError)}
    rank, cause_of = next(iter((died or failures).items()), (None, RuntimeError("they ended without a word")))
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
