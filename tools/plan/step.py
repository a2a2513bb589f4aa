"""All that the encoders take in a step: of the number of rows that they are run with, or of any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symile_dist.config import Config
from symile_dist.tools.plan.communication import StepPasses, step_passes
from symile_dist.tools.plan.shapes import InputShape
from symile_dist.tools.plan.trace import Event, Model, Pass, Shapes, build_model, encode

Floats = NDArray[np.float64]
FEW = (4, 8)
"""Rows of two runs from which any number of rows is concluded: bytes and work are straight lines in them."""


@dataclass(frozen=True)
class Line:
    """Values that are a + b * rows, known at one or two numbers of rows."""

    rows: tuple[int, ...]
    values: tuple[Floats, ...]

    @classmethod
    def of(cls, rows: Sequence[int], runs: Sequence[Sequence[Any]], name: str) -> Line:
        """Of the attribute `name` of what the runs consist of."""
        return cls(tuple(rows), tuple(np.array([getattr(one, name) for one in run], dtype=np.float64) for run in runs))

    def at(self, rows: int) -> Floats:
        if rows in self.rows:
            return self.values[self.rows.index(rows)]
        (first, second), (short, long) = self.rows, self.values
        return np.asarray(short + (long - short) * ((rows - first) / (second - first)))

    @property
    def per_row(self) -> float:
        """The sum of all values, per row: of what one row more adds where that is known."""
        if len(self.rows) == 1:
            return float(self.values[0].sum()) / self.rows[0]
        return float((self.values[1] - self.values[0]).sum()) / (self.rows[1] - self.rows[0])


@dataclass(frozen=True)
class Work:
    """The operators of a pass."""

    flops: Line
    bytes: Line
    is_convolution: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: Sequence[int], passes: Sequence[Pass], forward: bool = False) -> Work:
        """`forward`: of the way there alone."""
        runs = [one.operations[: one.forward if forward else None] for one in passes]
        _check_same(runs)
        convolutions = np.array([one.is_convolution for one in runs[0]], dtype=np.bool_)
        return cls(Line.of(rows, runs, "flops"), Line.of(rows, runs, "bytes"), convolutions)


@dataclass(frozen=True)
class Timeline:
    """What is alive at the events of a pass."""

    events: Sequence[Event]
    alive: Line
    peak: Line

    @classmethod
    def of(cls, rows: Sequence[int], runs: Sequence[Sequence[Event]]) -> Timeline:
        _check_same(runs)
        return cls(runs[0], Line.of(rows, runs, "alive"), Line.of(rows, runs, "peak"))


def _check_same(runs: Sequence[Sequence[Any]]) -> None:
    if len({len(run) for run in runs}) > 1:
        raise ValueError(
            "an encoder takes another way for another number of samples: its memory and work cannot be concluded from "
            "small batches"
        )


@dataclass(frozen=True)
class Encoders:
    """All that is known of a model's passes through its encoders; good for any world size and bucket."""

    model: Model
    passes: StepPasses
    """For the order of events."""
    whole: Timeline
    """One pass: all of it. Two passes: encoders forward and backward."""
    work: Work
    """Of `whole`."""
    encoding: Timeline | None
    """Two passes: forward without a graph."""
    forward: Work
    """Of a forward pass without a graph."""
    model_flops: float
    """Per sample, forward and backward, nothing computed twice."""
    forward_flops: float
    """Per sample."""
    representations: Shapes

    def with_parts(self, parts: int) -> Encoders:
        """The same, of a two-pass step with so many micro-batches."""
        return self if self.passes.encode is None else replace(self, passes=self.passes._replace(parts=parts))


def run_encoders(
    config: Config, inputs: Mapping[str, InputShape], rows: Sequence[int] = FEW, model: Model | None = None
) -> Encoders:
    """Builds and runs the model on the meta device.

    Args:
        rows: samples that the encoders hold at once. Of one number everything is known for that alone, of two for all.
        model: the config's, where it was built before.

    Raises ValueError for a model that cannot be had, built or run there.
    """
    model = model or build_model(config)
    partitioned = config.train.zero_stage == 3
    steps = [step_passes(config, model, inputs, number, partitioned) for number in rows]
    whole = [step.whole for step in steps]
    encodings = [step.encode for step in steps if step.encode]
    work = Work.of(rows, whole)
    forward = Work.of(rows, encodings) if encodings else Work.of(rows, whole, forward=True)
    model_flops = work.flops.per_row
    if config.train.activation_checkpointing:
        plain = config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": False})})
        again = build_model(plain)
        once = encode(again, inputs, rows[0], 2, True, partitioned)
        model_flops = Work.of(rows[:1], [once]).flops.per_row
    return Encoders(
        model,
        steps[0],
        Timeline.of(rows, [one.events for one in whole]),
        work,
        Timeline.of(rows, [one.events for one in encodings]) if encodings else None,
        forward,
        model_flops,
        forward.flops.per_row,
        (encodings or whole)[0].representations,
    )


__all__ = ["FEW", "Encoders", "Floats", "Line", "Timeline", "Work", "run_encoders"]
