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

from symile_dist.data.manifest import index_directory
from symile_dist.storage import read_json, write_json

SAMPLES_PER_SHARD = 1000
PARAMETERS = "parameters.json"
Columns = Mapping[str, NDArray[Any] | Sequence[str]]
Split = tuple[Columns, Sequence[str] | None]
"""Member -> (n, ...) array or n texts, and n classes."""


def write_dataset(
    folder: Path, parameters: Mapping[str, Any], make: Callable[[str], Split], splits: Sequence[str]
) -> Path:
    """Writes FOLDER/<split>/shard-*.tar of what `make(split)` gives, unless it is there already.

    Args:
        parameters: whatever decides the samples; a folder made with others is made anew.

    Every sample holds NAME.npy for each array, NAME.txt for each text, and its class in the metadata.
    """
    wanted = {"parameters": dict(parameters), "splits": list(splits)}

    def is_there() -> bool:
        return (folder / PARAMETERS).exists() and read_json(folder / PARAMETERS) == wanted

    if is_there():
        return folder
    building = folder.with_name(f".{folder.name}.building-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        for split in splits:
            columns, classes = make(split)
            _write_split(building / split, columns, classes)
            index_directory(building / split)
        write_json(building / PARAMETERS, wanted)
        if not is_there():  # else another experiment has made it meanwhile, and may be reading it
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _write_split(folder: Path, columns: Columns, classes: Sequence[str] | None) -> None:
    from webdataset.writer import ShardWriter

    folder.mkdir(parents=True)
    with ShardWriter(
        str(folder / "shard-%05d.tar"), maxcount=SAMPLES_PER_SHARD, verbose=0, encoder=False, mtime=0, user="", group=""
    ) as writer:
        for number in range(len(next(iter(columns.values())))):
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
