"""The guard: which steps are not taken, and when the run goes back to a checkpoint.

A step whose loss or gradients are not finite is never taken. A spike, a loss or a gradient norm far above those of the
steps before, is told of or skipped, as the config says. After a row of skipped steps the run goes back to a checkpoint
from before them, whose weights nothing of this has touched, and leaves the batches in between out: they still count as
consumed, so that every other batch comes in the step in which it always would have.

All of this is a function of what all ranks know alike, and of a state that checkpoints hold: every rank decides the
same, and so does a run that was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from symile_dist.config import GuardConfig
from symile_dist.distributed import all_reduce_max

Spike = Literal["loss_spike", "grad_spike"]
ADVICE = (
    "Lower optimizer.lr (in a new run model.logit_scale_init too), lengthen optimizer.warmup_steps, or look for bad "
    "values in these samples; symile-dist resume goes on, with guard.exclude=[...] without the steps that it names"
)
SPIKES: tuple[Spike, ...] = ("loss_spike", "grad_spike")
LEAST_SPREAD = 0.1
"""Of the log of the gradient norm, and of the loss relative to its median: where a window's values hardly differ, a
little more than they is no spike yet."""


class RollBack(Exception):
    """The loop ends, on all ranks alike, to begin again from a checkpoint."""

    def __init__(self, first: int, last: int, reason: str) -> None:
        """
        Args:
            first, last: the steps whose batches are to be left out.
            reason: a sentence for people, without its full stop.
        """
        super().__init__(reason)
        self.first, self.last, self.reason = first, last, reason


@dataclass
class GuardState:
    """What the guard remembers; part of the loop's state, hence of checkpoints."""

    losses: list[float] = field(default_factory=list)
    """Of the last `guard.window` steps that were taken; finite, as a single infinity would make every later median or
    deviation worthless."""
    grad_norms: list[float] = field(default_factory=list)
    """Of the same steps."""
    consecutive_skips: int = 0
    """Steps in a row that were skipped for what guard.patience counts."""
    first_skipped: int = 0
    """The first of them; 0 where there are none."""
    excluded: list[list[int]] = field(default_factory=list)
    """[first, last] of steps whose batches are left out because the run went back."""
    rollbacks: int = 0


def is_spike(value: float, window: Sequence[float], threshold: float, least_spread: float) -> bool:
    """Whether a value lies more than `threshold` robust standard deviations above the window's median.

    Median and median absolute deviation stay what they are while fewer than half of the window's values are wild, where
    a single one of them would stretch mean and standard deviation until nothing is a spike. (1.4826: of a normal
    distribution's standard deviation to its median absolute deviation.)
    """
    middle = median(window)
    spread = 1.4826 * median(abs(each - middle) for each in window)
    return value - middle > threshold * max(spread, least_spread)


class Guard:
    """One rank's guard. `state` is changed in place. Steps have their numbers in the history: the first is 1."""

    def __init__(self, config: GuardConfig, state: GuardState) -> None:
        self.config, self.state = config, state
        self.found: Spike | None = None
        """What `admits` found last."""

    def excludes(self, step: int) -> bool:
        """Whether a step is left out, and its batch only consumed."""
        return step in self.config.exclude or any(first <= step <= last for first, last in self.state.excluded)

    def spike(self, loss: float, grad_norm: float) -> Spike | None:
        """What a step is, judged by the steps before it; None until the window is half full.

        Of gradient norms the logs are compared: they vary by factors. A loss may be negative.
        """
        state, threshold = self.state, self.config.threshold
        if self.config.action == "off" or 2 * len(state.losses) < self.config.window:
            return None
        if is_spike(_log(grad_norm), [_log(each) for each in state.grad_norms], threshold, LEAST_SPREAD):
            return "grad_spike"
        if is_spike(loss, state.losses, threshold, LEAST_SPREAD * abs(median(state.losses))):
            return "loss_spike"
        return None

    def admits(self, loss: Tensor, grad_norm: float) -> bool:
        """Whether a step may be taken: the same on all ranks, which call it in step. Waits for the device."""
        spike = self.spike(float(loss), grad_norm)
        # By construction all have seen the same numbers. Should one not, they still act alike.
        number = torch.tensor(0 if spike is None else 1 + SPIKES.index(spike), device=loss.device)
        agreed = int(all_reduce_max(number))
        self.found = SPIKES[agreed - 1] if agreed else None
        return self.found is None

    def took(self, loss: float, grad_norm: float) -> None:
        """A step was taken. What is not finite stays out of the window."""
        state = self.state
        if math.isfinite(loss) and math.isfinite(grad_norm) and self.config.action != "off":
            state.losses = [*state.losses, loss][-self.config.window :]
            state.grad_norms = [*state.grad_norms, grad_norm][-self.config.window :]

    def went_well(self) -> None:
        """The row of skipped steps, if there was one, is over."""
        self.state.consecutive_skips = self.state.first_skipped = 0

    def skipped(self, step: int) -> bool:
        """A step was skipped; returns whether these are too many in a row."""
        if self.state.consecutive_skips == 0:
            self.state.first_skipped = step
        self.state.consecutive_skips += 1
        return self.state.consecutive_skips >= self.config.patience

    @property
    def may_roll_back(self) -> bool:
        return self.state.rollbacks < self.config.max_rollbacks

    def distrusted_from(self) -> int:
        """The first step that a rollback leaves out: `guard.margin` steps that were taken, from it on, come before the
        first of those that were skipped."""
        step, margin = self.state.first_skipped, self.config.margin
        while step > 1 and margin > 0:
            step -= 1
            margin -= not self.excludes(step)
        return step


def gone_back(saved: GuardState, now: GuardState, rollback: RollBack) -> GuardState:
    """The state to go on with from a checkpoint: what the run that goes back has left out already stays out."""
    excluded = [*now.excluded, [rollback.first, rollback.last]]
    return replace(saved, excluded=excluded, rollbacks=now.rollbacks + 1)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
