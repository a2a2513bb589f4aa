"""One group of ranks, from its start to its end: what it is told of the run before it, and how long its start took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from symile_dist.metrics.names import START_PHASES


@dataclass
class Attempt:
    """What a rank knows of the attempt that it belongs to."""

    fence: int = 0
    """The number under which the group holds the run; 0: none."""
    failures: int = 0
    """Of the groups before it, since the driver began."""
    hours: float = 0.0
    """Since the driver began."""
    mirror_holder: str = ""
    """What the driver's claim of the mirror has said."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of the phases of its start that are over; see START_PHASES."""
    _since: float = field(default_factory=time.perf_counter)

    def done(self, phase: str) -> None:
        """The phase that began when the one before was done is over."""
        assert phase in START_PHASES, phase
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._since
        self._since = now
