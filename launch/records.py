"""Where a run lives: found by its name or its directory.

A job's record is job.json in its folder, RUN/jobs/ID; run.json holds the newest. A run whose directory this machine
does not see is known by a copy in the user's state folder (~/.local/state/symile-dist/runs).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from symile_dist.launch import BACKENDS
from symile_dist.launch.job import Job
from symile_dist.run_directory import CONFIG_FILE, RUN_FILE, read_run, update_run
from symile_dist.storage import read_json, write_json

JOBS = "jobs"
JOB_FILE = "job.json"


def state_folder() -> Path:
    """Of this user: records, and what a job's machines tell each other. All nodes see it where they share the home."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "symile-dist"


def new_id(*directories: Path) -> str:
    """For a submission, of one run or several: by time, so that the newest sorts last."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [stamp, *(f"{stamp}-{number}" for number in range(2, 100))]
    return next(name for name in names if not any((each / JOBS / name).exists() for each in directories))


def check_state_folder() -> None:
    """Raises OSError where records cannot be written: a job that nobody finds again must not be started."""
    folder = state_folder() / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


@contextlib.contextmanager
def submitting(directories: Sequence[Path]) -> Iterator[None]:
    """Of several submissions of a run at once, by this user, the others wait for the first.

    Raises OSError where records cannot be written.
    """
    check_state_folder()
    with contextlib.ExitStack() as stack:
        for directory in sorted(directories):  # in one order, so that no two wait for each other
            lock = (state_folder() / "runs" / _index_name(directory)).with_suffix(".lock")
            fcntl.flock(stack.enter_context(open(lock, "w")), fcntl.LOCK_EX)
        yield


def _is_record(content: Any) -> TypeGuard[dict[str, Any]]:
    """Whether it is one: files may be cut, or written by hand."""
    kinds = {"name": str, "handle": dict}
    if not isinstance(content, dict) or content.get("backend") not in BACKENDS:
        return False
    return all(isinstance(content.get(key), kind) for key, kind in kinds.items())


def _here(record: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A record that was found in a run's directory, which may have been moved."""
    handle = dict(record["handle"])
    folder = directory / JOBS / str(record.get("job"))
    if "folder" in handle and folder.is_dir():
        handle["folder"] = str(folder)
    return {**record, "run": str(directory), "handle": handle}


def remember(job: Job, backend: str, handle: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Writes down where a job has gone, and what else is to be known of it. Returns the record."""
    record = {
        "name": job.name,
        "run": str(job.config.run_directory),
        "job": job.id,
        "backend": backend,
        "submitted": time.time(),
        "handle": handle,
        **more,
    }
    index = state_folder() / "runs" / _index_name(job.config.run_directory)
    index.parent.mkdir(parents=True, exist_ok=True)
    write_json(index, record)
    if job.folder.is_dir():
        write_json(job.folder / JOB_FILE, record)
        update_run(job.config.run_directory, name=job.name, launch=record)
    return record


def _index_name(directory: Path) -> str:
    return f"{directory.name}-{hashlib.sha256(str(directory).encode()).hexdigest()[:12]}.json"


def known_record(directory: Path) -> dict[str, Any]:
    """The newest record of the run in a directory, which may be one that this machine does not see; without a backend
    where it was not submitted."""
    told = read_run(directory)
    known = told.get("launch")
    if _is_record(known):
        return _here(known, directory)
    with contextlib.suppress(OSError, ValueError):
        content = read_json(state_folder() / "runs" / _index_name(directory))
        if _is_record(content):
            return content
    unsubmitted: dict[str, Any] = {"name": directory.name, "run": str(directory), "backend": None, "handle": {}}
    return {**unsubmitted, "submitted": told.get("created", 0.0)}


def record_of(run: str) -> dict[str, Any]:
    """The newest record of a run that is named, or whose directory is named.

    A run that was not submitted has a record without a backend. Raises ValueError where there is no such run, or where
    several runs have the name.
    """
    for directory in (Path(run), Path("runs") / run):
        if (directory / RUN_FILE).exists() or (directory / CONFIG_FILE).exists():
            return known_record(directory.resolve())
    named = [record for record in records() if record["name"] == run or record["run"] == str(Path(run).absolute())]
    if not named:
        raise ValueError(
            f"{run}: not a run directory (it has no {CONFIG_FILE}), and no run of that name is known; "
            "`symile-dist list` has those that are"
        )
    if len(named) > 1:
        raise ValueError(f"{run}: several runs are called so; name a directory: {', '.join(r['run'] for r in named)}")
    return known_record(Path(named[0]["run"]))


def records() -> list[dict[str, Any]]:
    """All runs that this user has submitted from here, the newest first; and those under runs/."""
    found: dict[str, dict[str, Any]] = {}
    folder = state_folder() / "runs"
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = read_json(file)
            if _is_record(record):
                found[str(Path(record["run"]).resolve())] = record
    for file in Path("runs").glob(f"*/{RUN_FILE}"):
        directory = file.parent.resolve()
        record = known_record(directory)
        if record["backend"] or str(directory) not in found:
            found[str(directory)] = record
    return sorted(found.values(), key=lambda record: -float(record.get("submitted", 0)))
