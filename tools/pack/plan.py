"""Which samples go into which shard: decided once, before anything is written, and kept beside the shards.

`pack.json` holds the parameters and what the survey counted; `pack.npy` what the survey measured of every sample, so
that other parts and later runs need not look at every file again. From both follow all shards, whoever writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from symile_dist.data.index import index_path
from symile_dist.seeding import permutation
from symile_dist.storage import write_atomic
from symile_dist.tools.pack.source import Progress, Source, Survey
from symile_dist.tools.shard_folder import (
    compare_parameters,
    damaged_plan,
    read_plan,
    refuse_strangers,
    write_new,
)

VERSION = 1
"""Raised whenever the same parameters would give other bytes."""
PLAN, SIZES, LOCK = "pack.json", "pack.npy", ".pack.lock"

_TAR_RECORD = 10240
"""Bytes: a tar file ends with two blocks of zeros, then zeros up to a whole record."""


class Shard(NamedTuple):
    """One shard of the plan."""

    number: int
    first: int
    last: int
    """Places in the order: first .. last - 1."""
    bytes: int
    """Of the tar file."""

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}.tar"


@dataclass(frozen=True)
class Plan:
    """All shards of a dataset."""

    folder: Path
    survey: Survey
    order: NDArray[np.int64]
    """(samples,): the source's rows, in the order of the shards."""
    shards: tuple[Shard, ...]

    def is_complete(self, shard: Shard) -> bool:
        """Raises ValueError for a file of another size: shards get their name when they are whole."""
        path = self.folder / shard.name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        if size != shard.bytes:
            raise ValueError(f"{path}: has {size} bytes, the plan says {shard.bytes}: damaged or replaced; remove it")
        return index_path(path).exists()


def make_plan(
    source: Source,
    folder: Path,
    *,
    shard_bytes: int,
    max_samples: int | None,
    seed: int | None,
    progress: Progress,
) -> Plan:
    """The plan that stands in the folder, or a new one.

    Raises ValueError where the folder holds anything else: other files, or a plan of other parameters.
    """
    parameters = {
        "version": VERSION,
        **source.parameters(),
        "shard_bytes": shard_bytes,
        "max_samples": max_samples,
        "seed": seed,
    }
    parameters = json.loads(json.dumps(parameters))  # as it is read back
    present = _read_plan(folder)
    if present is not None:
        compare_parameters(folder, present["parameters"], parameters)
    survey = None if present is None else _read_sizes(folder, present)
    if survey is None:
        survey = source.survey(progress)
        if not survey.tar_bytes.any():
            raise ValueError(f"no sample is left to pack of {len(survey.tar_bytes)}")
        folder.mkdir(parents=True, exist_ok=True)
        ours = {"parameters": parameters, "survey": _counts(survey), "sha256": _digest(survey)}
        if present is None:
            write_new(folder / PLAN, (json.dumps(ours, indent=2) + "\n").encode())
        # Another part may have been first: then its plan holds.
        present = _read_plan(folder) or ours
        compare_parameters(folder, present["parameters"], parameters)
        if present["sha256"] != ours["sha256"]:
            raise ValueError(
                f"{folder}: its plan was made when other source files were there; restore them, or pack into another "
                "folder"
            )
        write_atomic(folder / SIZES, lambda file: np.save(file, _table(survey), allow_pickle=False))
    rows = np.flatnonzero(survey.tar_bytes)
    order = rows if seed is None else rows[permutation(len(rows), "pack", seed)]
    return Plan(folder, survey, order, tuple(_shards(survey.tar_bytes[order], shard_bytes, max_samples)))


def check_folder(plan: Plan) -> None:
    """Raises ValueError for shards in the folder that the plan does not know: the manifest would list them."""
    refuse_strangers(plan.folder, {shard.name for shard in plan.shards})


def _shards(tar_bytes: NDArray[np.int64], shard_bytes: int, max_samples: int | None) -> Iterator[Shard]:
    """Filled one after the other, in order; a sample larger than `shard_bytes` has a shard of its own."""
    ends = np.cumsum(tar_bytes)
    first = number = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + shard_bytes, side="right")))
        if max_samples is not None:
            last = min(last, first + max_samples)
        content = int(ends[last - 1]) - before + 2 * 512
        yield Shard(number, first, last, -(-content // _TAR_RECORD) * _TAR_RECORD)
        first, number = last, number + 1


def _read_plan(folder: Path) -> dict[str, Any] | None:
    """What stands in pack.json; None for an empty folder or none. Raises ValueError for anything else."""
    content = read_plan(folder, PLAN)
    if content is None:
        return None
    try:
        nothing = np.zeros(0, np.int64)
        _ = content["parameters"]["version"], content["sha256"], Survey(nothing, nothing, **content["survey"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged_plan(folder / PLAN, error) from None
    return dict(content)


def _counts(survey: Survey) -> dict[str, Any]:
    return {name: value for name, value in vars(survey).items() if name not in ("starts", "tar_bytes")}


def _table(survey: Survey) -> NDArray[np.int64]:
    """(2, n + 1)"""
    return np.stack([survey.starts, np.append(survey.tar_bytes, 0)])


def _digest(survey: Survey) -> str:
    return hashlib.sha256(_table(survey).astype("<i8", copy=False).data).hexdigest()


def _read_sizes(folder: Path, plan: dict[str, Any]) -> Survey | None:
    """The survey that the plan was made with; None where it is lost, and has to be made again."""
    try:
        table = np.lib.format.open_memmap(folder / SIZES, mode="r")
    except (OSError, ValueError):
        return None
    if table.ndim != 2 or len(table) != 2:
        return None
    survey = Survey(table[0], table[1, :-1], **plan["survey"])
    return survey if _digest(survey) == plan["sha256"] else None
