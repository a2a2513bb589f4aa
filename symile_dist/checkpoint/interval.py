"""When a checkpoint is due: every so many steps, every so many minutes, or as often as pays.

Saving costs time; not saving costs, at a failure, half an interval of work on average. The sum per hour is least at
sqrt(2 * cost * MTTF) (Young, 1974), MTTF being the mean time between failures. A save's cost is what the loop stands
still for, and what the steps beside it are slower: on CPUs, which write and hash too, that is the larger part.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from symile_dist.config import CheckpointConfig

DEVICE_HOURS = 8000.0
"""Between failures, before any was seen: 7.9 h at 1,024 GPUs (Meta's Research SuperCluster, arXiv 2410.21680)."""
LONGEST_MTTF = 24 * 3600.0
FIRST_SECONDS = 60.0
"""Until the first save, whose cost is not known yet."""
MOST_OVERHEAD = 0.005
"""Of the time, for saving, however often it fails."""
LEAST_COST = 0.01
"""Seconds: what is measured of less is chance."""
REMEMBERED_STEPS, REMEMBERED_SAVES = 65, 8


class SaveInterval:
    """Rank 0's decision in all that asks a clock; the loop gives it to the other ranks."""

    def __init__(self, config: CheckpointConfig, world_size: int, now: float, failures: int = 0, hours: float = 0.0):
        """
        Args:
            now: seconds of a monotonic clock.
            failures: of the run so far, in so many hours.
        """
        self.config = config
        self._last = now
        self._undisturbed: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._costs: deque[float] = deque(maxlen=REMEMBERED_SAVES)
        """Of each save; the last one's grows while it is under way."""
        prior = min(LONGEST_MTTF, DEVICE_HOURS * 3600 / world_size)
        # The prior counts as one failure that was seen.
        self.mean_time_to_failure = (prior + hours * 3600) / (1 + failures)

    def seconds(self) -> float | None:
        """From one save to the next; None where only steps count."""
        if self.config.every_minutes is not None:
            return self.config.every_minutes * 60
        if self.config.every != "auto":
            return None
        if not self._costs:
            return FIRST_SECONDS
        cost = self.cost()
        return max(math.sqrt(2 * cost * self.mean_time_to_failure), cost / MOST_OVERHEAD)

    def cost(self) -> float:
        """Seconds that a save takes from the steps, of those seen."""
        return max(LEAST_COST, statistics.median(self._costs))

    def due(self, step: int, now: float) -> bool:
        """`step`: how many are done."""
        seconds = self.seconds()
        by_clock = seconds is not None and now - self._last >= seconds
        return by_clock or (isinstance(self.config.every, int) and step % self.config.every == 0)

    def stepped(self, seconds: float, saving: bool) -> None:
        """A step has taken so long; `saving`: while a save was under way."""
        if not saving:
            self._undisturbed.append(seconds)
        elif self._costs and self._undisturbed:
            self._costs[-1] += seconds - statistics.median(self._undisturbed)

    def saved(self, now: float, stall: float) -> None:
        """A save has begun, which held the loop up for `stall` seconds."""
        self._last = now
        self._costs.append(stall)
