"""`symile-dist watch`: the terminal view of a run, live or ended, from nothing but its directory."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from symile_dist.view.folder import RunFolder, plain
from symile_dist.view.following import RunHistory
from symile_dist.view.terminal import TerminalView

POLL_SECONDS = 1.0
LINES_BEFORE = 10
"""Of records that were there already, where the view is made of lines."""
EVENTS_TOLD = 50


def summary(directory: Path) -> dict[str, Any]:
    """How the run stands, for programs. What JSON does not know is a word: "NaN", "Infinity", "-Infinity"."""
    history, folder = RunHistory(directory), RunFolder(directory)
    history.refresh()
    ranks = folder.ranks(history)
    told = {
        "run": folder.run(history),
        "progress": folder.progress(history),
        "latest": folder.latest(history),
        "goodput": folder.goodput(history),
        "ranks": {"there": len(ranks["rows"]), "expected": ranks["expected"], "slowest": ranks["slowest"]},
        "checkpoints": folder.checkpoints(history)["rows"],
        "events": folder.events(history)["rows"][-EVENTS_TOLD:],
        "evaluation": folder.evaluation()["rows"],
    }
    shown: dict[str, Any] = plain(told)
    return shown


def watch(
    directory: Path,
    console: Console | None = None,
    lines: bool | None = None,
    once: bool = False,
    wait: Callable[[float], Any] = time.sleep,
) -> None:
    """Draws the run until it has ended.

    Args:
        lines: one per record in the place of a panel; by default where `console` is no terminal.
        once: draw how it stands, and return.
        wait: called with the seconds to the next look.
    """
    watcher = _Watcher(directory, console, lines)
    watcher.read()
    view = watcher.view
    if once:
        view.show()
        return
    view.start()
    try:
        watcher.begin()
        while watcher.look():
            wait(POLL_SECONDS)
    finally:
        view.stop()


class _Watcher:
    def __init__(self, directory: Path, console: Console | None, lines: bool | None) -> None:
        self._folder, self._history = RunFolder(directory), RunHistory(directory)
        self._history.fresh = deque()
        self._recent: deque[dict[str, Any]] = deque(maxlen=LINES_BEFORE)
        self._begun = self._history.begun
        self._newest = self._known_until = -math.inf
        """Of the records' times: of those that were shown, and of those before the file was begun again."""
        self.view = TerminalView(self._folder.name(), self._folder.total_steps() or 0, console, lines)

    def read(self) -> None:
        """Takes all that is there already."""
        while self._history.refresh(0):
            for record in self._records():
                self.view.take(record)
                self._recent.append(record)
        self._tell()

    def begin(self) -> None:
        if self.view.plain:
            for record in self._recent:
                self.view.say(record)

    def look(self) -> bool:
        """Takes what is new; returns whether there may be more."""
        live = bool(self._folder.run(self._history)["live"])  # before the last look: nothing is missed at the end
        while self._history.refresh(0):
            for record in self._records():
                self.view.update(record)
        self._tell()
        return live

    def _records(self) -> list[dict[str, Any]]:
        """The new ones; of a file that was begun again, those that are new in it."""
        fresh = self._history.fresh
        assert fresh is not None
        found = list(fresh)
        fresh.clear()
        if self._history.begun != self._begun:
            self._begun, self._known_until = self._history.begun, self._newest
        found = [record for record in found if _time_of(record) > self._known_until]
        self._newest = max([self._newest, *map(_time_of, found)])
        return found

    def _tell(self) -> None:
        history, folder = self._history, self._folder
        ranks = folder.ranks(history)
        saved = [row["step"] for row in folder.checkpoints(history)["rows"] if row["state"] == "complete"]
        self.view.total_steps = folder.total_steps() or self.view.total_steps
        status, silent = folder.status(history), folder.silent_seconds(history)
        self.view.tell(
            status=f"{status}, not heard of for {silent / 60:.0f} min" if silent else status,
            goodput=folder.goodput(history)["seconds"] or None,
            ranks=len(ranks["rows"]) if ranks["rows"] else None,
            expected_ranks=ranks["expected"],
            restarts=folder.restarts(history),
            checkpoint_step=max(saved, default=None),
        )


def _time_of(record: dict[str, Any]) -> float:
    moment = record.get("time")
    return float(moment) if isinstance(moment, (int, float)) and abs(moment) < 1e300 else 0.0
