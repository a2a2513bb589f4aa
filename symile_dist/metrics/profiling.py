"""Steps under torch's profiler: a trace of each, and a table of what bounds their phases."""

from __future__ import annotations

import bisect
import heapq
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from symile_dist.config import Config
from symile_dist.metrics.recorder import Recorder
from symile_dist.spans import OTHER
from symile_dist.storage import write_json, write_text

logger = logging.getLogger(__name__)
PROFILE = "profile"
"""Folder of a run's directory."""
MARK = "phase "
OPERATORS_SHOWN = 3
IDLE = 0.5
"""A device that is busy for less of a phase waits for the host."""

_KINDS = {
    "products": ("mm", "conv", "linear", "gemm", "attention", "einsum", "cutlass", "sgemm", "flash"),
    "collectives": ("nccl", "gloo", "c10d", "allreduce", "allgather", "all_gather", "reduce_scatter", "broadcast"),
    "copies": ("copy", "memcpy", "to_copy", "cat", "clone", "pin_memory"),
    "optimizer": ("adam", "multi_tensor"),
}
"""Kind of operator -> parts of its name; the first that fits. All others pass over memory, element by element."""
BOUND_BY = {
    "products": "computation: matrix products and convolutions",
    "collectives": "collectives: the network, or slower ranks",
    "copies": "copies of memory",
    "optimizer": "the optimizer's passes over memory",
    "elements": "memory: operators that work element by element",
}


class Operation(NamedTuple):
    """One call of an operator, or one kernel."""

    name: str
    begin: float
    """microseconds"""
    microseconds: float
    """Of its own: without the operators that it calls."""


class Phase(NamedTuple):
    """One interval that the step has marked."""

    name: str
    begin: float
    end: float


class StepProfiler:
    """One rank's. It writes RUN/profile/rank-00000-steps-11-13.trace.json.gz (chrome://tracing, Perfetto), and the
    table beside it as .md and .json. A profiler that fails is told of; training goes on."""

    def __init__(self, config: Config, rank: int, recorder: Recorder) -> None:
        self._steps = config.train.profile_steps if rank in config.train.profile_ranks else None
        self._folder, self._rank, self._recorder = config.run_directory / PROFILE, rank, recorder
        self._profile: Any = None
        self._began = 0.0
        self._first = 0

    def before(self, step: int) -> None:
        """The step is to be taken."""
        if self._steps is None or self._profile is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        try:
            self._profile = profile(activities=activities)
            self._profile.__enter__()
        except Exception as error:
            self._give_up(step, error)
            return
        self._annotate = self._recorder.spans.annotate
        self._recorder.spans.annotate = lambda name: record_function(MARK + name)
        self._began, self._first = time.perf_counter(), step

    def after(self, step: int) -> None:
        """The step is done."""
        if self._steps and step >= self._steps[1]:
            self.finish(step)

    def finish(self, step: int) -> None:
        """Writes what there is, if steps are being profiled: the loop ends with this step."""
        if self._profile is None:
            return
        taken, self._profile, steps = self._profile, None, step - self._first + 1
        seconds = (time.perf_counter() - self._began) / steps
        self._recorder.spans.annotate = self._annotate
        self._steps = None
        try:
            taken.__exit__(None, None, None)
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"rank-{self._rank:05d}-steps-{self._first}-{step}"
            taken.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
            rows = table(*_read(taken.events()), steps)
            path = self._folder / f"{name}.md"
            write_json(path.with_suffix(".json"), {"rank": self._rank, "step_seconds": seconds, "phases": rows})
            write_text(path, as_text(rows, f"Rank {self._rank}, steps {self._first} to {step}", seconds))
        except Exception as error:
            self._give_up(step, error)
            return
        self._recorder.event(step, "profile", f"steps {self._first} to {step} are profiled: {path}")
        logger.info("profile: %s", path)

    def _give_up(self, step: int, error: Exception) -> None:
        self._steps = self._profile = None
        self._recorder.event(step, "profile", f"profiling failed, training goes on: {error}", level="warning")
        logger.warning("profiling failed: %s", error)


def _read(events: Iterable[Any]) -> tuple[list[Phase], list[Operation], list[Operation]]:
    """The marked phases, the host's operations and the device's."""
    phases, host, device = [], [], []
    for event in events:
        begin, end = event.time_range.start, event.time_range.end
        on_device = "CUDA" in str(event.device_type)
        if event.name.startswith(MARK):
            if not on_device:
                phases.append(Phase(event.name.removeprefix(MARK), begin, end))
        elif on_device:
            device.append(Operation(event.name, begin, end - begin))
        elif event.self_cpu_time_total > 0:
            host.append(Operation(event.name, begin, event.self_cpu_time_total))
    return phases, host, device


def kind_of(operator: str) -> str:
    """One of BOUND_BY, by the operator's name."""
    name = operator.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), "elements")


def segments(phases: Sequence[Phase]) -> list[tuple[float, str]]:
    """(moment, the innermost phase from then on), of phases that lie within each other or apart."""
    found: list[tuple[float, str]] = [(-math.inf, OTHER)]
    around: list[Phase] = []

    def leave(until: float) -> None:
        while around and around[-1].end <= until:
            end = around.pop().end
            found.append((end, around[-1].name if around else OTHER))

    for phase in sorted(phases, key=lambda each: (each.begin, -each.end)):
        leave(phase.begin)
        around.append(phase)
        found.append((phase.begin, phase.name))
    leave(math.inf)
    return found


def table(
    phases: Sequence[Phase], host: Sequence[Operation], device: Sequence[Operation], steps: int
) -> list[dict[str, Any]]:
    """One row per phase, the longest first: seconds per step (without phases within), what bounds it, its operators.

    Where there is a device its kernels count, in the phases in which they run; else the host's operators.
    """
    parts = segments(phases)
    own: defaultdict[str, float] = defaultdict(float)
    for (begin, name), (end, _) in pairwise(parts[1:]):
        own[name] += end - begin
    begins = [begin for begin, _ in parts]
    spent: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for operation in device or host:
        name = parts[bisect.bisect_right(begins, operation.begin) - 1][1]
        spent[name][operation.name] += operation.microseconds
    rows = []
    for name in sorted((name for name in own if own[name] > 0), key=own.__getitem__, reverse=True):
        operators = spent[name]
        rows.append(
            {
                "phase": name,
                "seconds": own[name] / steps / 1e6,
                "bound_by": bound_by(name, operators, own[name], bool(device)),
                "operators": {
                    operator: microseconds / steps / 1e6
                    for operator, microseconds in heapq.nlargest(
                        OPERATORS_SHOWN, operators.items(), key=lambda item: item[1]
                    )
                },
            }
        )
    return rows


def bound_by(phase: str, operators: Mapping[str, float], microseconds: float, on_device: bool) -> str:
    """In words: what a phase of that length waits for."""
    busy = sum(operators.values())
    if phase == "data_wait":
        return "data: the loader's processes, the store, or the decoding"
    if phase == "gather":
        return BOUND_BY["collectives"]
    if busy <= IDLE * microseconds:
        return "the host: the device is idle" if on_device else "the host: Python, or waiting"
    kinds: defaultdict[str, float] = defaultdict(float)
    for operator, each in operators.items():
        kinds[kind_of(operator)] += each
    return BOUND_BY[max(kinds, key=kinds.__getitem__)]


def as_text(rows: Sequence[Mapping[str, Any]], title: str, step_seconds: float) -> str:
    """As Markdown."""
    lines = [
        f"# {title}: {1e3 * step_seconds:.1f} ms a step",
        "",
        "The profiler itself takes time: compare phases with each other, and steps with those of the history.",
        "",
        "| phase | ms a step | share | bound by | operators (ms) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        operators = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in row["operators"].items())
        share = f"{row['seconds'] / step_seconds:.0%}" if step_seconds else "-"
        lines.append(f"| {row['phase']} | {1e3 * row['seconds']:.2f} | {share} | {row['bound_by']} | {operators} |")
    return "\n".join(lines) + "\n"
