"""What all ranks say of their last steps, together: means, and who is behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch

from symile_dist.distributed import all_gather
from symile_dist.metrics.names import OWN_PHASES, PHASES


def gathered(own: Mapping[str, float], modalities: Sequence[str], device: torch.device) -> list[dict[str, float]]:
    """Every rank's figures (see `Recorder.own_speed`), by rank. All ranks call it, in step, with the same modalities.

    One collective of a few numbers, which go as whole microseconds, bytes and millionths: float32, which every backend
    takes, would round bytes.
    """
    columns = _columns(modalities)
    scaled = [round(own.get(name, 0.0) * scale) for name, scale in columns.items()]
    table = all_gather(torch.tensor([scaled], dtype=torch.int64, device=device)).tolist()
    return [{name: value / scale for (name, scale), value in zip(columns.items(), row, strict=True)} for row in table]


def _columns(modalities: Sequence[str]) -> dict[str, float]:
    """Name -> units in which it travels."""
    fractions = {f"missing/{name}": 1e6 for name in modalities}
    seconds = dict.fromkeys((*(f"phases.{phase}" for phase in PHASES), "step_seconds"), 1000000.0)
    return seconds | {"data_bytes": 1.0, "memory_bytes": 1.0} | fractions


def phases_of(row: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix("phases."): value for name, value in row.items() if name.startswith("phases.")}


def summary(table: Sequence[Mapping[str, float]], modalities: Sequence[str]) -> dict[str, Any]:
    """For the history: mean seconds per step by phase, the largest memory, the shares of what lacks, the slowest."""
    phases = [phases_of(row) for row in table]
    found: dict[str, Any] = {
        "phases": {phase: round(fmean(each[phase] for each in phases), 6) for phase in PHASES},
        "memory_bytes": max(row["memory_bytes"] for row in table),
        "data_bytes": sum(row["data_bytes"] for row in table),
    }
    for name in modalities:
        share = fmean(row[f"missing/{name}"] for row in table)
        if share > 0:
            found[f"missing/{name}"] = share
    behind = slowest(phases)
    return found | ({"slowest": behind} if behind else {})


def slowest(phases: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """The rank whose own work takes longest, in which phase it lies furthest behind the median rank, and by how much.

    In synchronous training all steps take the same: the others' waits hide who makes them wait. None for one rank, or
    where none is behind.
    """
    if len(phases) < 2:
        return None
    own = [sum(each[phase] for phase in OWN_PHASES) for each in phases]
    rank = max(range(len(own)), key=own.__getitem__)
    middle = {phase: median(each[phase] for each in phases) for phase in OWN_PHASES}
    typical = median(own)
    if own[rank] <= typical:
        return None
    phase = max(OWN_PHASES, key=lambda name: phases[rank][name] - middle[name])
    ratio = own[rank] / typical if typical > 0 else None
    return {"rank": rank, "phase": phase, "seconds": round(own[rank] - typical, 6), "ratio": ratio}
