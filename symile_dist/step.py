"""One training step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from symile_dist.engine import Engine, StepResult
from symile_dist.gradcache import forward_backward
from symile_dist.metrics.recorder import Recorder
from symile_dist.types import Batch


class TrainedStep(NamedTuple):
    loss: Tensor
    """The global loss, still on the device: reading it waits for the device."""
    metrics: dict[str, Tensor]
    result: StepResult


def train_step(engine: Engine, batch: Batch, step: int, recorder: Recorder) -> TrainedStep:
    """Forward, objective on the global batch, backward, and the optimizer step, which all ranks take or skip together.

    Args:
        step: number of the global batch, from 0; with the seed it decides the negatives and the learning rate.
    """
    size = engine.config.encoded_at_once
    if size < len(batch):
        with recorder.phase("backward"):
            report = forward_backward(engine, batch, step, size)
    else:
        with recorder.phase("forward"):
            report = engine.forward(batch, step)
        with recorder.phase("backward"):
            engine.backward(report.loss)
    with recorder.phase("optimizer"):
        result = engine.step(step)
    return TrainedStep(report.loss.detach(), report.metrics, result)
