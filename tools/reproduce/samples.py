"""Shards of synthetic samples: arrays and texts in, WebDataset shards with their index out."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symile_dist.data.manifest import index_directory, read_manifest
from symile_dist.storage import read_json, write_json
from symile_dist.tools.progress import Report, silent

SAMPLES_PER_SHARD = 1000
PARAMETERS = "parameters.json"
Columns = Mapping[str, NDArray[Any] | Sequence[str]]
Split = tuple[Columns, Sequence[str] | None]
"""Member -> (n, ...) array or n texts, and n classes."""


def write_dataset(
    folder: Path,
    parameters: Mapping[str, Any],
    make: Callable[[str], Split],
    splits: Sequence[str],
    progress: Report = silent,
) -> Path:
    """Writes FOLDER/<split>/shard-*.tar of what `make(split)` gives, unless it is there already.

    Args:
        parameters: whatever decides the samples; a folder made with others, or damaged, is made anew.

    Every sample holds NAME.npy for each array, NAME.txt for each text, and its class in the metadata.

    Raises ValueError where the folder holds something else.
    """
    wanted = {"parameters": dict(parameters), "splits": list(splits)}
    if _is_whole(folder, wanted):
        return folder
    if folder.exists() and not (folder.is_dir() and ((folder / PARAMETERS).exists() or not any(folder.iterdir()))):
        raise ValueError(f"{folder}: holds something that is not this dataset; name another folder by --out")
    _remove_debris(folder)
    building = folder.with_name(f".{folder.name}.building-{os.getpid()}")
    try:
        for split in splits:
            columns, classes = make(split)
            _write_split(building / split, columns, classes, progress)
            index_directory(building / split)
        write_json(building / PARAMETERS, wanted)
        if not _is_whole(folder, wanted):  # else another experiment has made it meanwhile, and may be reading it
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _is_whole(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the dataset is there, all shards of the size that their manifests say."""
    try:
        if read_json(folder / PARAMETERS) != wanted:
            return False
        for split in wanted["splits"]:
            read_manifest(folder / split)
    except (OSError, ValueError):
        return False
    return True


def _remove_debris(folder: Path) -> None:
    """What killed processes have left of the same dataset."""
    for building in folder.parent.glob(f".{folder.name}.building-*"):
        try:
            os.kill(int(building.name.rpartition("-")[2]), 0)
        except (ProcessLookupError, ValueError):
            shutil.rmtree(building, ignore_errors=True)
        except PermissionError:  # another user's process, which lives
            pass


def _write_split(folder: Path, columns: Columns, classes: Sequence[str] | None, progress: Report) -> None:
    from webdataset.writer import ShardWriter

    folder.mkdir(parents=True)
    with ShardWriter(
        str(folder / "shard-%05d.tar"), maxcount=SAMPLES_PER_SHARD, verbose=0, encoder=False, mtime=0, user="", group=""
    ) as writer:
        count = len(next(iter(columns.values())))
        for number in range(count):
            if number % SAMPLES_PER_SHARD == 0:
                progress("making data", number, count)
            sample: dict[str, str | bytes] = {"__key__": f"{number:08d}"}
            for name, column in columns.items():
                value = column[number]
                if isinstance(value, str):
                    sample[f"{name}.txt"] = value.encode()
                    continue
                buffer = io.BytesIO()
                np.save(buffer, value, allow_pickle=False)
                sample[f"{name}.npy"] = buffer.getvalue()
            if classes is not None:
                sample["json"] = json.dumps({"class": classes[number]}).encode()
            writer.write(sample)
    progress("making data", count, count)
