"""The manifest of a checkpoint: what makes a folder of shards a checkpoint.

It is written last, atomically, once every rank's files are on disk: a folder without a manifest is not a checkpoint,
whatever it holds. It lists every file with size and sha256, and nothing is unpickled before they agree.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symile_dist.storage import sha256_of_file, write_json

CHECKPOINTS = "checkpoints"
"""Folder of a run's directory in which its checkpoints stand."""
MANIFEST = "manifest.json"
VERSION = 2
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message says which and what to do."""


@dataclass(frozen=True)
class FileEntry:
    path: str
    """Relative to the checkpoint's folder."""
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    step: int
    world_size: int
    zero_stage: int
    precision: str
    config_digest: str
    code_version: str
    fence: int
    """Under which number its writer held the run: that of the lease."""
    train_state: dict[str, Any]
    """The loop's counters."""
    loader_state: dict[str, Any]
    """Where the data stream stands, and what it must be made of."""
    files: tuple[FileEntry, ...]
    """Of each rank that saved, in order."""

    def write(self, folder: Path) -> None:
        content = {"version": VERSION, **asdict(self)}
        write_json(folder / MANIFEST, {"sha256": _digest(content), **content})


def _digest(content: dict[str, Any]) -> str:
    """Of everything that the manifest says: it is verified like the files that it lists."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def written_at(checkpoints: Path, step: int) -> float:
    """Unix time at which a complete checkpoint was committed, or copied here."""
    return (checkpoints / folder_name(step) / MANIFEST).stat().st_mtime


def checkpoint_folders(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is named like a checkpoint, by step."""
    if not directory.is_dir():
        return []
    found = [(_STEP_FOLDER.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def complete_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of those that were committed, by step. Their files are not looked at: see `verify`."""
    return [(step, path) for step, path in checkpoint_folders(directory) if (path / MANIFEST).exists()]


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError when the manifest is missing or damaged."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a complete checkpoint (it has no {MANIFEST})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: damaged manifest: {error}") from None
    manifest = parse_manifest(content, path)
    if folder_name(manifest.step) != folder.name:
        raise CheckpointError(f"{path}: is the manifest of step {manifest.step}, not of {folder.name}")
    return manifest


def parse_manifest(text: bytes, path: Path | str) -> Manifest:
    """The content of a manifest's file, of which `path` tells where it stands. Raises CheckpointError where it is
    damaged."""
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            raise CheckpointError(f"{path}: made by another version of symile_dist")
        if content.pop("sha256") != _digest(content):
            raise ValueError("it is not as it was written")
        del content["version"]
        files = tuple(FileEntry(**entry) for entry in content.pop("files"))
        manifest = Manifest(files=files, **content)
        numbers = [manifest.step, manifest.world_size, manifest.zero_stage, manifest.fence]
        numbers += [entry.size for entry in files]
        names = (manifest.precision, *(text for entry in files for text in (entry.path, entry.sha256)))
        if not (
            files
            and all(type(number) is int for number in numbers)
            and all(isinstance(name, str) for name in names)
            and isinstance(manifest.train_state, dict)
            and isinstance(manifest.loader_state, dict)
        ):
            raise TypeError("an entry is missing or of another type")
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged manifest: {error}") from None
    for entry in files:
        if Path(entry.path).name != entry.path or entry.path in ("", ".", ".."):
            raise CheckpointError(f"{path}: file name {entry.path!r} leaves the checkpoint's folder")
    return manifest


def verify(folder: Path, files: Sequence[FileEntry]) -> list[str]:
    """What is wrong with these files: one line each, naming the file; empty when all agree with the manifest."""
    problems = []
    for entry in files:
        path = folder / entry.path
        try:
            size = path.stat().st_size
            if size != entry.size:
                problems.append(f"{path}: has {size} bytes, the manifest says {entry.size}")
            elif sha256_of_file(path) != entry.sha256:
                problems.append(f"{path}: its bytes do not match the manifest's sha256")
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
    return problems
