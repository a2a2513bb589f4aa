"""What became of a run's time: every second of it, restarts and the driver's own death included, in one state."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from symile_dist.metrics.names import RESTART_CAUSES, RUN_STATES
from symile_dist.storage import read_json, write_json

GOODPUT_FILE = "goodput.json"
PIECE_SECONDS = 0.5
PENDING = "pending"
"""Steps whose fate is not known yet: the next checkpoint makes them productive, a failure before it lost."""
State = Literal["init", "restart", "steps"]


class Goodput:
    """The account of one run; the driver keeps it, as it alone sees all of the time.

    It begins in `init`. Safe to use from one thread.
    """

    def __init__(
        self,
        before: Mapping[str, Any] | None = None,
        began: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        date: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            before: what `told` gave to an earlier driver of the run, which counts on. If that one did not come to
                `end`, what was pending is lost, and the time since then was spent on its restart.
            began: when this driver did, by `clock`; now, when left out.
        """
        self._clock, self._date = clock, date
        self._seconds = dict.fromkeys(RUN_STATES, 0.0)
        self.restarts: dict[str, int] = {}
        self._pending: deque[list[float]] = deque()
        """[moment of the end, seconds], oldest first."""
        self._state: State = "init"
        self._since = clock() if began is None else began
        if before:
            self._go_on(before)

    def _go_on(self, before: Mapping[str, Any]) -> None:
        seconds = before["seconds"]
        for state in RUN_STATES:
            self._seconds[state] = seconds.get(state, 0.0)
        self.restarts = dict(before.get("restarts", {}))
        self._seconds["lost"] += seconds.get(PENDING, 0.0)
        if not before.get("ended", True):
            begun = self._date() - (self._clock() - self._since)
            self._seconds["restart"] += max(0.0, begun - before.get("updated", begun))
            self._state = "restart"

    def _count(self) -> None:
        """The time since the last call belongs to the state that it was spent in."""
        now = self._clock()
        passed, self._since = now - self._since, now
        if self._state != "steps":
            self._seconds[self._state] += passed
        elif self._pending and self._pending[-1][1] < PIECE_SECONDS:
            self._pending[-1][0] = now
            self._pending[-1][1] += passed
        else:
            self._pending.append([now, passed])

    def stepping(self) -> None:
        """The first step of a group of ranks is done."""
        self._count()
        self._state = "steps"

    def spent(self, state: Literal["checkpoint", "eval"], seconds: float) -> None:
        """Of the newest time, so much was no steps."""
        self._count()
        left = seconds
        while left > 0 and self._pending:
            taken = min(left, self._pending[-1][1])
            self._pending[-1][1] -= taken
            self._seconds[state] += taken
            left -= taken
            if self._pending[-1][1] <= 0:
                self._pending.pop()

    def saved(self, seconds_ago: float) -> None:
        """A checkpoint that was begun so long ago is whole: the steps before it are safe."""
        self._count()
        begun = self._since - seconds_ago
        while self._pending and self._pending[0][0] <= begun:
            self._seconds["productive"] += self._pending.popleft()[1]

    def went_back(self) -> None:
        """The run has gone back to its newest checkpoint."""
        self._count()
        self._lose()

    def _lose(self) -> None:
        while self._pending:
            self._seconds["lost"] += self._pending.popleft()[1]

    def failed(self, cause: str) -> None:
        """A group of ranks has ended before the run has; `cause` as of RESTART_CAUSES."""
        self._count()
        self._lose()
        self.restarts[cause] = self.restarts.get(cause, 0) + 1
        self._state = "restart"

    def restarting(self) -> None:
        """A group has saved and ended, to begin again in another size."""
        self._count()
        self._settle()
        self._state = "restart"

    def end(self) -> None:
        """The last group has ended. What came after the last save was the save itself, and the end of the processes."""
        self._count()
        self._settle()
        self._state = "init"

    def _settle(self) -> None:
        while self._pending:
            self._seconds["checkpoint"] += self._pending.popleft()[1]

    def seconds(self) -> dict[str, float]:
        """By state, `pending` among them; their sum is the run's wall time."""
        self._count()
        return {**self._seconds, PENDING: sum(seconds for _, seconds in self._pending)}

    def told(self, ended: bool = False) -> dict[str, Any]:
        """For goodput.json, and for the next driver."""
        seconds = {state: round(value, 3) for state, value in self.seconds().items()}
        return {"seconds": seconds, "restarts": self.restarts, "updated": self._date(), "ended": ended}


def read_goodput(directory: Path) -> dict[str, Any]:
    """A run's account, as far as it can be read; empty where there is none."""
    try:
        content = read_json(directory / GOODPUT_FILE)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("seconds"), dict):
        return {}
    seconds = {state: finite(content["seconds"].get(state)) or 0.0 for state in (*RUN_STATES, PENDING)}
    counts = content.get("restarts")
    restarts = {
        cause: int(count)
        for cause in RESTART_CAUSES
        if (count := finite(counts.get(cause) if isinstance(counts, dict) else None))
    }
    updated = finite(content.get("updated"))
    found = {"seconds": seconds, "restarts": restarts, "ended": content.get("ended") is not False}
    return found | ({} if updated is None else {"updated": updated})


def finite(value: Any) -> float | None:
    """A number of 0 or more; None for anything else."""
    try:
        number = float(value) if isinstance(value, (int, float)) else -1.0
    except OverflowError:
        return None
    return number if 0 <= number < math.inf else None


def settled(told: Mapping[str, Any]) -> dict[str, Any]:
    """The account of a run that is found at its end, though its driver was killed: its last steps are in a
    checkpoint."""
    seconds = dict(told["seconds"])
    seconds["productive"] = seconds.get("productive", 0.0) + seconds.get(PENDING, 0.0)
    return {**told, "seconds": seconds | {PENDING: 0.0}, "ended": True}


def write_goodput(directory: Path, told: Mapping[str, Any]) -> None:
    """Raises OSError."""
    write_json(directory / GOODPUT_FILE, dict(told))
