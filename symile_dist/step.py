"""One training step."""

from __future__ import annotations

from collections.abc import Callable
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


def train_step(
    engine: Engine,
    batch: Batch,
    step: int,
    recorder: Recorder,
    admits: Callable[[Tensor, float], bool] | None = None,
) -> TrainedStep:
    """Forward, objective on the global batch, backward, and the optimizer step, which all ranks take or skip together.

    Args:
        step: number of the global batch, from 0; with the seed it decides the negatives and the learning rate.
        admits: asked with the global loss and the gradients' norm whether the optimizer may step.
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
        loss = report.loss.detach()
        result = engine.step(step, (lambda grad_norm: admits(loss, grad_norm)) if admits else None)
    return TrainedStep(loss, report.metrics, result)
