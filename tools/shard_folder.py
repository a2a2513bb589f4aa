"""A folder that a command fills with shards, in parts and after kills: its plan, its lock, its temporary files.

Whatever was whole before a kill is kept: a shard gets its name only once it is whole and on the disk; until then it is
hidden, and the next run removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from symile_dist.storage import read_json, sync_directory

_LEFTOVER = re.compile(r"\..+\.tmp")
REMEDY = "name another folder, or remove it first"


def parse_part(part: str) -> tuple[int, int]:
    """ "2/3" -> (2, 3). Raises ValueError for anything but i/n with 1 <= i <= n."""
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"'{part}' is no part; write i/n, e.g. 1/4 to 4/4 for four machines")
    return int(found[1]), int(found[2])


def check_space(folder: Path, needed: int) -> None:
    """Raises ValueError where the disk is too small: better now than after hours."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder}: {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free")


def take_lock(file: BinaryIO, kind: int) -> bool:
    """Takes a lock, or changes the one held; False where others hold it, or the file system has no locks.

    Whoever works in the folder holds a shared lock; who gets the exclusive one is alone, and may take temporary files
    for dead. The lock is the kernel's, so that of a killed process is gone with it.
    """
    try:
        fcntl.flock(file, kind)
    except OSError:
        return False
    return True


def remove_leftovers(folder: Path, shards: Collection[str] | None = None) -> None:
    """Removes what killed runs left unfinished; with `shards`, only what is of these shards.

    To be called by who is alone in the folder.
    """
    for path in folder.iterdir():
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if shards is not None and path.name[1:].partition(".tar")[0] + ".tar" not in shards:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def work_in(folder: Path, lock: BinaryIO, shards: Collection[str]) -> None:
    """Takes the folder's lock to work on some shards; removes what is left of them where nobody else is at work."""
    if take_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
        remove_leftovers(folder, shards)
    take_lock(lock, fcntl.LOCK_SH)


def tidy(folder: Path, lock: BinaryIO) -> None:
    """Removes all that killed runs left unfinished, where nobody else is at work."""
    if take_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
        remove_leftovers(folder)


def refuse_strangers(folder: Path, known: Collection[str]) -> None:
    """Raises ValueError for shards in the folder that are not of the plan: the manifest would list them."""
    strange = sorted(path.name for path in folder.glob("*.tar") if path.name not in known)
    if strange:
        raise ValueError(f"{folder}: holds {strange[0]}, which is not of this dataset; move it elsewhere")


def read_plan(folder: Path, name: str) -> Any:
    """What stands in the folder's plan; None for an empty folder or none. Raises ValueError for anything else."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder")
    if not (folder / name).exists():
        strange = sorted(path.name for path in folder.iterdir() if not _LEFTOVER.fullmatch(path.name))
        if strange:
            raise ValueError(f"{folder}: holds something that is not of this command ({strange[0]}); {REMEDY}")
        return None
    try:
        return read_json(folder / name)
    except ValueError as error:
        raise damaged_plan(folder / name, error) from None


def damaged_plan(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: damaged or not of this command ({error}); {REMEDY}")


def compare_parameters(folder: Path, present: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError where the folder's plan was made with other parameters: what differs, and how."""
    if present == wanted:
        return
    different = sorted(name for name in {*present, *wanted} if present.get(name) != wanted.get(name))
    told = "; ".join(f"{name}: there {_short(present.get(name))}, now {_short(wanted.get(name))}" for name in different)
    raise ValueError(f"{folder}: holds shards of other inputs or options ({told}); {REMEDY}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def not_complete(shards: int, by_part: Mapping[str, int]) -> str:
    """A line for people: how many shards are missing, and of which parts."""
    parts = ", ".join(f"{name} ({count})" for name, count in by_part.items())
    return (
        f"  not complete: {shards} shards are missing, of the parts {parts}; the manifest is written when the last one "
        "is there"
    )


def write_new(path: Path, content: bytes) -> None:
    """Writes a file, whole, unless it is there: of several parts that begin at once one wins."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
