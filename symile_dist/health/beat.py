"""Signs of life: every rank writes down which step it is in, and watchdog and driver read it.

One small file per rank, written in place: it costs microseconds a step, and is there when the rank is not.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

HEALTH = "health"
"""Folder of a run's directory."""
_SUFFIX = ".beat"


class SignOfLife(NamedTuple):
    rank: int
    fence: int
    """Of the attempt that the rank belongs to."""
    pid: int
    started: int
    """When its process was, by `started`: its number may be another's by now."""
    place: str
    """Host and node that it runs on: see `place_of`."""
    step: int
    """The step it is in; -1 before the first."""
    signs: int
    """Grows with every sign: whoever watches needs no clock in common."""


def place_of(node: str) -> str:
    """Names the node of this process, by host and id: hosts of one cluster may be called alike."""
    return f"{socket.gethostname()}-{node[:12]}"


def is_here(place: str) -> bool:
    """Whether a place is on this host, as far as its name says."""
    return place.rpartition("-")[0] == socket.gethostname()


def started(pid: int) -> int:
    """When a process was started, in the kernel's ticks; 0 where there is none, or no /proc."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


class Beat:
    """One rank's sign of life."""

    def __init__(self, run_directory: Path, rank: int, fence: int, place: str) -> None:
        folder = run_directory / HEALTH
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / f"rank-{rank:05d}{_SUFFIX}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._fixed = f"{rank} {fence} {os.getpid()} {started(os.getpid())} {place}"
        self._count = 0
        self(-1)

    def __call__(self, step: int) -> None:
        self._count += 1
        os.pwrite(self._file, f"{self._fixed} {step:d} {self._count:d}".ljust(160).encode(), 0)


def signs_of_life(run_directory: Path, fence: int) -> dict[int, SignOfLife]:
    """By rank, of those that belong to an attempt."""
    found = {}
    for path in (run_directory / HEALTH).glob(f"*{_SUFFIX}"):
        try:
            rank, of, pid, ticks, place, step, count = path.read_text().split()
            sign = SignOfLife(int(rank), int(of), int(pid), int(ticks), place, int(step), int(count))
        except (OSError, ValueError):  # in the midst of being written: the next look will do
            continue
        if sign.fence == fence:
            found[sign.rank] = sign
    return found
