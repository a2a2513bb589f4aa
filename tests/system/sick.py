"""Parts of a run that fall ill while a file of their name lies in a folder: each as often as it is looked at."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from symile_dist.data.transforms import TensorTransform
from symile_dist.objectives.symile import SymileObjective
from symile_dist.types import Batch, Outputs, StepReport

PAUSE = 0.05


class SickObjective(SymileObjective):
    """Symile, with steps of PAUSE seconds at least. `nan`: its loss is; `slow`: every rank takes 0.2 s more,
    `straggle`: rank 1 does; `stall`: no step ends."""

    def __init__(self, seed: int, folder: str) -> None:
        super().__init__(seed)
        self.folder = Path(folder)

    def _is(self, name: str) -> bool:
        return (self.folder / name).exists()

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        if torch.is_grad_enabled():
            time.sleep(PAUSE)
            while self._is("stall"):
                time.sleep(0.02)
            if self._is("slow") or (self._is("straggle") and dist.get_rank() == 1):
                time.sleep(0.2)
        report = super().forward(outputs, batch, step)
        return report._replace(loss=report.loss * torch.nan) if self._is("nan") else report


class SickEncoder(nn.Module):
    """A linear map. `collapse`: it says the same of all samples."""

    def __init__(self, embedding_dim: int, input_dim: int, folder: str) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, embedding_dim)
        self.folder = Path(folder)

    def forward(self, inputs: Tensor) -> Tensor:
        emitted: Tensor = self.linear(inputs)
        return emitted.mean(dim=0, keepdim=True).expand_as(emitted) if (self.folder / "collapse").exists() else emitted


class SickTransform(TensorTransform):
    """Arrays as tensors. `starve`: each takes 20 ms."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def __call__(self, decoded: NDArray[Any], rng: np.random.Generator | None) -> Tensor:
        if (self.folder / "starve").exists():
            time.sleep(0.02)
        return super().__call__(decoded, rng)
