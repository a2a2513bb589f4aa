"""Objectives that go wrong on purpose."""

from __future__ import annotations

import torch
import torch.distributed as dist

from symile_dist.objectives.symile import SymileObjective
from symile_dist.types import Batch, Outputs, StepReport


class PoisonedSymile(SymileObjective):
    """Symile whose gradients are not finite on rank 1 alone, at the steps from `first` to `last`."""

    def __init__(self, seed: int, first: int, last: int, value: float = float("nan")) -> None:
        super().__init__(seed)
        self.first, self.last, self.value = first, last, value

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        report = super().forward(outputs, batch, step)
        if torch.is_grad_enabled() and self.first <= step <= self.last and dist.get_rank() == 1:
            representation = next(iter(outputs.representations.values()))
            return report._replace(loss=report.loss + self.value * representation.sum() * 0.5)
        return report


class MistakenOnOneRank(SymileObjective):
    """Symile that raises ValueError on rank 1 alone, while rank 0 waits for it in a collective."""

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        if step == 2 and dist.get_rank() == 1:
            raise ValueError("only rank 1 saw this")
        return super().forward(outputs, batch, step)
