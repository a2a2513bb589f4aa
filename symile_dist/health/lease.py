"""Who may write into a run's directory: one process at a time, under a number that only grows (the fence).

The operating system's lock ends with the process that has it, however that ends. Where machines share a file system
that keeps no locks between them, the holder's sign of life, a count that grows, stands for it: nobody's clock is asked.
What a holder has left running, such as workers that outlive their driver, knows the fence under which it was started,
and may not commit anything once there is a higher one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from symile_dist.errors import RunFailed

BEAT_SECONDS = 2.0
SILENT_SECONDS = 10.0
"""A holder on another machine that gives no sign of life for so long is dead."""
_LENGTH = 512
"""Bytes of the file, always: written at once and never cut, so that nobody reads half of it."""


def lease_file(directory: Path) -> Path:
    """It stands beside the directory, which may be moved aside."""
    return directory.with_name(f".{directory.name}.lock")


def current_fence(directory: Path) -> int:
    """The number under which the directory is held, or was held last; 0 where it never was."""
    return int(_read(lease_file(directory)).get("fence", 0))


def holder_of(directory: Path) -> dict[str, Any]:
    """Who holds the directory, or held it last: `process` and `host`; empty where nobody ever did."""
    return _read(lease_file(directory))


def is_held(directory: Path) -> bool:
    """Whether a process of this machine holds it."""
    try:
        with open(lease_file(directory)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def superseded(directory: Path, fence: int) -> str | None:
    """Why whoever was started under a fence may commit nothing more; None while it may."""
    now = current_fence(directory)
    return f"{directory} is held by another job by now (fence {now}; this one has {fence})" if now > fence > 0 else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Lease:
    """A directory that this process holds."""

    def __init__(self, path: Path, file: TextIO, fence: int) -> None:
        self.fence = fence
        self._path, self._file, self._beat = path, file, 0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)
        self._thread.start()

    def advance(self) -> int:
        """A new number, under which processes may be started; those of all former ones may commit nothing more.

        Raises RunFailed where another process, on another machine, has taken the directory over meanwhile.
        """
        with self._lock:
            if self._is_lost():
                now = _read(self._path)
                raise RunFailed(
                    f"{self._path}: process {now.get('process')} on {now.get('host')} has taken the run over"
                )
            self.fence += 1
            self._write()
        return self.fence

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with self._lock:
            if not self._is_lost():
                self._write(released=True)

    def _live(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._lock, contextlib.suppress(OSError):  # a full disk, say: the lock itself is still there
                if self._is_lost():
                    return
                self._write()

    def _is_lost(self) -> bool:
        """Whether the file names another holder: this process was taken for dead."""
        now = _read(self._path)
        return bool(now) and (now.get("process"), now.get("host")) != (os.getpid(), socket.gethostname())

    def _write(self, released: bool = False) -> None:
        self._beat += 1
        content = {
            "fence": self.fence,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "beat": self._beat,
            "released": released,
        }
        os.pwrite(
            self._file.fileno(), json.dumps(content).encode().ljust(_LENGTH), 0
        )  # in place: the lock is the file's


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[Lease]:
    """Holds the directory for this process; raises ValueError, naming the other, while another process has it."""
    path = lease_file(directory)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not in append mode, in which Linux writes at the end whatever place is named.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _refusal(directory, _read(path)) from None
        before = _read(path)
        if _lives_elsewhere(path, before):
            raise _refusal(directory, before)
        lease = Lease(path, file, int(before.get("fence", 0)) + 1)
        try:
            yield lease
        finally:
            lease.release()


def _refusal(directory: Path, holder: dict[str, Any]) -> ValueError:
    who = f"process {holder['process']} on {holder['host']}" if "process" in holder else "another process"
    return ValueError(
        f"{directory}: {who} trains here already; stop it first, or choose another folder (run.directory, --out)"
    )


def _lives_elsewhere(path: Path, holder: dict[str, Any]) -> bool:
    """Whether a holder on another machine, whose lock is not seen here, gives a sign of life."""
    if not holder or holder.get("released") or holder.get("host") == socket.gethostname():
        return False
    deadline = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 4)
        now = _read(path)
        if now and now.get("beat") != holder.get("beat"):
            return not now.get("released")
    return False
