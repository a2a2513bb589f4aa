"""Objectives that go wrong on purpose."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

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


class RecordedSymile(SymileObjective):
    """Symile that writes down which samples each rank trained on, and when; each step takes `pause` seconds more.

    With `clock_jumps` this process's wall clock jumps by up to a day, forth and back, each time somebody looks at it.
    """

    def __init__(self, seed: int, folder: str, pause: float = 0.0, clock_jumps: bool = False) -> None:
        super().__init__(seed)
        self.folder, self.pause = Path(folder), pause
        if clock_jumps and dist.is_initialized():
            real, chance = time.time, random.Random(os.getpid())
            time.time = lambda: real() + chance.uniform(-86400, 86400)

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        if torch.is_grad_enabled():
            time.sleep(self.pause)
            attempt = os.environ["MASTER_PORT"]  # the same on its ranks, another one in each attempt
            samples = batch.sample_ids.tolist()
            record = {"step": step, "attempt": attempt, "at": time.monotonic_ns(), "samples": samples}
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"rank-{dist.get_rank()}-{os.getpid()}.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        return super().forward(outputs, batch, step)


class FailsAlways(SymileObjective):
    """Symile with a step for which the memory of rank 1 is too small."""

    def __init__(self, seed: int, step: int) -> None:
        super().__init__(seed)
        self.step = step

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        if torch.is_grad_enabled() and step == self.step and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(outputs, batch, step)
