"""Where a rank's time goes: every second since the last look belongs to exactly one phase.

On a GPU the time between two marks is the device's (events on its stream, read once they have passed): nothing waits
for it, and a wait of the host that the device did not notice costs nothing. Elsewhere it is the host's.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

OTHER = "other"
WHOLE = frozenset({"eval", "checkpoint"})
"""Phases that are not divided: a forward pass of validation is validation."""


class Spans:
    """One rank's clock. Phases within phases take their time from them: `gather` within `loss` is not `loss`."""

    def __init__(self, on_gpu: bool = False) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._collectives: defaultdict[str, float] = defaultdict(float)
        self._within: list[str] = []
        self.annotate: Callable[[str], contextlib.AbstractContextManager[Any]] = lambda name: contextlib.nullcontext()
        """Entered with every phase: a profiler's marks."""
        self._thread = threading.get_ident()
        self._events: deque[tuple[Any, Any, str, bool]] | None = deque() if on_gpu else None
        self._last = self._mark()

    def _mark(self) -> Any:
        if self._events is None:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _passed(self, begin: Any, end: Any, name: str, collective: bool = False) -> None:
        if self._events is not None:
            self._events.append((begin, end, name, collective))
        else:
            (self._collectives if collective else self._seconds)[name] += end - begin

    def _turn(self) -> Any:
        """The time since the last mark belongs to the phase that it was in."""
        now = self._mark()
        self._passed(self._last, now, self._within[-1] if self._within else OTHER)
        self._last = now
        return now

    def _divides(self) -> bool:
        # Autograd calls from threads of its own, while this one waits for it; others (a save behind the loop) have no
        # part in the step.
        mine = threading.get_ident() == self._thread or "backward" in self._within
        return mine and not (self._within and self._within[-1] in WHOLE)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase (see PHASES in metrics/names.py)."""
        if not self._divides():
            yield
            return
        self._turn()
        self._within.append(name)
        try:
            with self.annotate(name):
                yield
        finally:
            self._turn()
            self._within.pop()

    @contextlib.contextmanager
    def collective(self, operation: str) -> Iterator[None]:
        """Times a collective, the wait for slower ranks included; its time is the phase `gather`'s too."""
        if not self._divides():
            yield
            return
        with self.phase("gather"):
            begin = self._last
            try:
                yield
            finally:
                self._passed(begin, self._mark(), operation, collective=True)

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """(seconds by phase, seconds by collective) since the last call, as far as the device has come."""
        self._turn()
        while self._events and self._events[0][1].query():
            begin, end, name, collective = self._events.popleft()
            seconds = begin.elapsed_time(end) / 1e3
            (self._collectives if collective else self._seconds)[name] += seconds
        taken = dict(self._seconds), dict(self._collectives)
        self._seconds.clear()
        self._collectives.clear()
        return taken


_current: Spans | None = None


def use(spans: Spans | None) -> None:
    """From now on `phase` and `collective` of this process are timed by `spans`."""
    global _current
    _current = spans


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    return _current.phase(name) if _current else contextlib.nullcontext()


def collective(operation: str) -> contextlib.AbstractContextManager[None]:
    return _current.collective(operation) if _current else contextlib.nullcontext()
