"""Disturbs a run on purpose, at random from a seed, and says what it cost: `symile-dist chaos RUN`.

The run must end as if nothing had happened; what is lost is time, and goodput is the fraction that is left.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from symile_dist.health.beat import SignOfLife, is_here, signs_of_life, started
from symile_dist.health.lease import current_fence, is_held
from symile_dist.metrics.history import HISTORY_FILE, read_history
from symile_dist.run_directory import load_run, read_run

FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
"""What may happen to a rank: it dies, or it stands still until the watchdog ends it."""
ENDED = ("finished", "failed", "stopped", "refused", "interrupted", "preempted")
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 60.0


class Disturbance(NamedTuple):
    seconds: float
    """since chaos began"""
    fault: str
    rank: int
    step: int
    """that the rank was in"""
    recovery_seconds: float | None
    """until the run had finished a step after that again; None where it ended before"""


def disturb(
    run: Path,
    every: tuple[float, float],
    seconds: float,
    seed: int = 0,
    faults: tuple[str, ...] = ("kill",),
    tell: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """Disturbs a run that trains on this machine until it has ended, or for so many seconds.

    Args:
        every: least and most seconds from one disturbance to the next.

    Returns what was done and the goodput: the seconds that the steps of the surviving history took, over those that
    have passed. Raises ValueError where the run does not train here, or for unknown faults.
    """
    run = run.absolute()
    load_run(run)
    unknown = [fault for fault in faults if fault not in FAULTS]
    if unknown or not faults:
        raise ValueError(f"unknown fault '{', '.join(unknown)}'; there are {', '.join(FAULTS)}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds {seconds:g}: should be a number above 0")
    if not 0 < every[0] <= every[1] < math.inf:
        raise ValueError(f"--kill-every {every[0]:g}-{every[1]:g}: should be two numbers of seconds, the smaller first")
    if not _ranks_here(run):
        raise ValueError(
            f"{run}: no rank of it trains on this machine; start it first, and disturb it from another shell"
        )
    chance = random.Random(seed)
    begin, begun_at = time.monotonic(), time.time()
    first_step = _last_step(run)
    done: list[Disturbance] = []
    last, end = begin, begin + seconds
    while time.monotonic() < end and not _has_ended(run):
        pause = last + chance.uniform(*every)
        ranks = _ranks_here(run)
        while (time.monotonic() < pause or not ranks) and time.monotonic() < end and not _has_ended(run):
            time.sleep(POLL_SECONDS)
            ranks = _ranks_here(run)
        if time.monotonic() >= end or not ranks or _has_ended(run):
            break
        sign, fault = chance.choice(ranks), chance.choice(faults)
        at = last = time.monotonic()
        try:
            os.kill(sign.pid, FAULTS[fault])
        except ProcessLookupError:  # it has just ended by itself
            continue
        tell(f"{at - begin:.0f} s: {fault} of rank {sign.rank} in step {sign.step + 1}")
        recovery = _recovered(run, sign, end)
        done.append(Disturbance(at - begin, fault, sign.rank, sign.step + 1, recovery))
    passed = time.monotonic() - begin
    productive = _productive_seconds(run, first_step, begun_at)
    recoveries = sorted(each.recovery_seconds for each in done if each.recovery_seconds is not None)
    return {
        "run": str(run),
        "seed": seed,
        "seconds": passed,
        "disturbances": [each._asdict() for each in done],
        "recovery_seconds": {
            "median": recoveries[len(recoveries) // 2] if recoveries else None,
            "longest": recoveries[-1] if recoveries else None,
        },
        "steps": _last_step(run) - first_step,
        "goodput": min(1.0, productive / passed),
        "status": read_run(run).get("status"),
    }


def _ranks_here(run: Path) -> list[SignOfLife]:
    """Ranks of the present attempt that are in a step, by rank; none where nobody holds the run: their process numbers
    may be others' by now."""
    if not is_held(run):
        return []
    signs = signs_of_life(run, current_fence(run)).values()
    return sorted(
        sign for sign in signs if is_here(sign.place) and sign.step >= 0 and sign.started == started(sign.pid)
    )


def _has_ended(run: Path) -> bool:
    return read_run(run).get("status") in ENDED


def _recovered(run: Path, before: SignOfLife, end: float) -> float | None:
    """Seconds until a rank of a later attempt is past its first step; None where it is not `PATIENCE_SECONDS` after the
    end of chaos."""
    begin = time.monotonic()
    first: int | None = None
    while not _has_ended(run) and time.monotonic() < end + PATIENCE_SECONDS:
        signs = signs_of_life(run, current_fence(run))
        fresh = [sign.step for sign in signs.values() if sign.fence > before.fence and sign.step >= 0]
        first = min(fresh) if first is None and fresh else first
        if first is not None and max(fresh, default=-1) > first:
            return time.monotonic() - begin
        time.sleep(POLL_SECONDS / 4)
    return None


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / HISTORY_FILE
    return [record for record in read_history(path) if record["kind"] == "train"] if path.exists() else []


def _last_step(run: Path) -> int:
    return max((int(record["step"]) for record in _records(run)), default=0)


def _productive_seconds(run: Path, first_step: int, since: float) -> float:
    """What the steps after `first_step` took, each counted once, as it stands in the history that survived."""
    total, step = 0.0, first_step
    for record in _records(run):
        if record["step"] > step and record["time"] >= since:
            total += (record["step"] - step) * record["step_seconds"]
            step = record["step"]
    return total


def summary(result: dict[str, Any]) -> str:
    """In words."""
    done = result["disturbances"]
    median, longest = result["recovery_seconds"]["median"], result["recovery_seconds"]["longest"]
    recovery = f", back in a step after {median:.1f} s (median; longest {longest:.1f} s)" if median is not None else ""
    return (
        f"{len(done)} disturbances in {result['seconds']:.0f} s{recovery}\n"
        f"{result['steps']} steps; goodput {result['goodput']:.1%}; the run's status: {result['status']}"
    )
