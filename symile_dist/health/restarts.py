"""What follows from a failure: whether the run goes on, when, and without which nodes. Nothing here knows of Ray."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from symile_dist.metrics.names import RESTART_CAUSES

LONGEST_WAIT = 60.0
"""seconds"""


@dataclass(frozen=True)
class Failure:
    """One end of the group of ranks that nobody wished for."""

    cause: str
    """One of RESTART_CAUSES."""
    message: str
    step: int | None = None
    """The step that the failed rank was in."""
    rank: int | None = None
    node: str | None = None
    checkpoint: int = 0
    """Step of the newest checkpoint at that time."""

    def __post_init__(self) -> None:
        assert self.cause in RESTART_CAUSES, self.cause


@dataclass
class Restarts:
    """The failures of a run, and what follows from them."""

    max_failures: int
    """So many in a row without a new checkpoint are survived; -1: any number."""
    max_repeats: int
    """So many in a row in the same step end the run: it is the step's fault."""
    max_node_failures: int
    """A node that failed so often is left out."""
    failures: list[Failure] = field(default_factory=list)
    without_progress: int = 0
    repeats: int = 0

    def add(self, failure: Failure) -> None:
        before = self.failures[-1] if self.failures else None
        progress = before is None or failure.checkpoint > before.checkpoint
        self.without_progress = 1 if progress else self.without_progress + 1
        same = before is not None and failure.step is not None and failure.step == before.step
        self.repeats = self.repeats + 1 if same else 1
        self.failures.append(failure)

    def gives_up(self) -> str | None:
        """Why the run does not go on, or None."""
        last = self.failures[-1]
        if last.step is not None and self.repeats >= self.max_repeats > 0 and last.cause != "node_lost":
            return f"step {last.step} failed {self.repeats} times (ray.max_repeats)"
        if 0 <= self.max_failures < self.without_progress:
            times = "once" if self.without_progress == 1 else f"{self.without_progress} times"
            return f"the workers failed {times} without a new checkpoint between (ray.max_failures)"
        return None

    def wait_seconds(self) -> float:
        """Before the next attempt: none after the first failure, then doubling."""
        return 0.0 if self.without_progress <= 1 else min(LONGEST_WAIT, 2.0 ** (self.without_progress - 2))

    def left_out(self) -> set[str]:
        """Nodes that failed too often."""
        counts = Counter(failure.node for failure in self.failures if failure.node)
        return {node for node, count in counts.items() if count >= self.max_node_failures > 0}

    def told(self) -> list[dict[str, Any]]:
        """For run.json."""
        return [{key: value for key, value in vars(failure).items() if value is not None} for failure in self.failures]
