"""A history.jsonl that is read while it grows: what is new at each look, and all that a view needs of it."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from pydantic_core import from_json

from symile_dist.metrics.history import HISTORY_FILE, REPLAYED_KINDS
from symile_dist.metrics.names import BAD_ENDS, Topic
from symile_dist.view.series import Table

CHUNK_BYTES = 2**21
MAX_LINE_BYTES = 2**24
"""A longer line is not a record."""
MARK_BYTES = 256
EVENTS = 1000
"""Kept of each sort: common ones do not push out those that matter."""
MAX_KINDS = 64
RATE_RECORDS = 50
"""Training records whose median gives the ETA: a checkpoint or a slow shard does not move it."""
_PROSE = frozenset({"event", "restart", "end"})
"""Kinds of records that tell something and hold no curve."""


class Event(NamedTuple):
    """Something that happened, as a view shows it."""

    number: int
    step: float | None
    time: float | None
    sort: str
    """restart, resume, rollback, skip, spike, checkpoint, data, end or other."""
    level: str
    """info, warning or error."""
    message: str


class HistoryFile:
    """The whole lines of a growing file, each once. A file that was replaced or cut is begun again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.size = 0
        """Bytes at the last look."""
        self.offset = 0
        """Bytes that were given."""
        self._mark = b""
        """The last of them: a file in which they stand elsewhere is another one."""
        self._inside_long_line = False

    def read(self) -> tuple[bool, list[bytes]]:
        """(whether all that was given before is void, the next whole lines: at most about CHUNK_BYTES of them)."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                void = not self._is_same(file, status.st_size)
                if void:
                    self._forget()
                self.size = status.st_size
                file.seek(self.offset)
                chunk = file.read(CHUNK_BYTES)
                while chunk and b"\n" not in chunk[-CHUNK_BYTES:] and len(chunk) < MAX_LINE_BYTES:
                    more = file.read(CHUNK_BYTES)
                    if not more:
                        break
                    chunk += more
        except FileNotFoundError:
            void = self.offset > 0
            self._forget()
            return void, []
        end = chunk.rfind(b"\n") + 1
        if not end and len(chunk) >= MAX_LINE_BYTES:
            end = len(chunk)
            self._inside_long_line = True
            lines: list[bytes] = []
        else:
            lines = chunk[:end].split(b"\n")[:-1]
            if lines and self._inside_long_line:
                self._inside_long_line, lines = False, lines[1:]
        self.offset += end
        self._mark = (self._mark + chunk[:end])[-MARK_BYTES:]
        return void, lines

    def _is_same(self, file: Any, size: int) -> bool:
        # By its bytes: a rewrite that drops nothing is no reason to read all of it again, and an inode may come back.
        if size < self.offset:
            return False
        file.seek(self.offset - len(self._mark))
        return bool(file.read(len(self._mark)) == self._mark)


class RunHistory:
    """All that views show of a history, kept up to date by `refresh`. Safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        self.file = HistoryFile(directory / HISTORY_FILE)
        self.lock = threading.RLock()
        """Held by whoever reads more than one thing."""
        self.fresh: deque[dict[str, Any]] | None = None
        """Where records are put besides, for whoever wants each of them; None for nobody."""
        self.begun = 0
        """How often the file was begun."""
        self._begin()

    def _begin(self) -> None:
        self.begun += 1
        self.records = 0
        self.tables: dict[str, Table] = {}
        self.latest: dict[str, dict[str, Any]] = {}
        """The last record of each kind."""
        self.best: dict[str, float] = {}
        """Of validation: the lowest loss, the highest of each other value."""
        self.counts: dict[str, int] = {}
        """Of events, by sort."""
        self.step: float | None = None
        """The step of the last record that has one."""
        self._common: deque[Event] = deque(maxlen=EVENTS)
        self._grave: deque[Event] = deque(maxlen=EVENTS)
        self._events = 0

    @property
    def generation(self) -> str:
        """Changes when anything that was shown before is void."""
        with self.lock:
            return f"{self.begun}.{sum(table.cuts for table in self.tables.values())}"

    @property
    def complete(self) -> float:
        """The share of the file that has been read, from 0 to 1."""
        return self.file.offset / self.file.size if self.file.size and self.file.offset < self.file.size else 1.0

    def refresh(self, seconds: float = math.inf) -> bool:
        """Reads what is new, for about so long at most; returns whether there was anything."""
        deadline, changed = time.monotonic() + seconds, False
        with self.lock:
            while True:
                before = self.file.offset
                try:
                    void, lines = self.file.read()
                except OSError:  # a file system that fails for a while: what is known stays
                    return changed
                if void:
                    self._begin()
                    changed = True
                elif self.file.offset == before:
                    return changed
                self._add(lines)
                changed = True
                if time.monotonic() > deadline:
                    return True

    def _add(self, lines: list[bytes]) -> None:
        groups: dict[str, tuple[list[dict[str, Any]], list[float]]] = {}
        for line in lines:
            try:
                record = from_json(line)  # four times as fast as json.loads
            except ValueError:  # damaged: read_history tells of it
                continue
            if not isinstance(record, dict):
                continue
            kind, step = record.get("kind"), record.get("step")
            if not isinstance(kind, str):
                continue
            if type(step) is int and abs(step) < 2**53:
                self.step = float(step)
            elif isinstance(step, float) and math.isfinite(step):
                self.step = step
            self.records += 1
            if self.fresh is not None:
                self.fresh.append(record)
            if kind in _PROSE:
                self._note(kind, record)
                self.latest[kind] = record
                continue
            group = groups.get(kind)
            if group is None:
                if len(groups) >= MAX_KINDS or (kind not in self.tables and len(self.tables) >= MAX_KINDS):
                    continue
                group = groups[kind] = ([], [])
            group[0].append(record)
            group[1].append(self.step or 0.0)
        for kind, (records, steps) in groups.items():
            table = self.tables.setdefault(kind, Table(replayed=kind in REPLAYED_KINDS))
            table.add(records, np.array(steps, np.float64))
            self.latest[kind] = records[-1]
            if kind == "validation":
                for record in records:
                    self._compare(record)

    def _compare(self, record: Mapping[str, Any]) -> None:
        for key, value in record.items():
            if key in ("step", "time", "seconds", "samples_seen") or not isinstance(value, (int, float)):
                continue
            if abs(value) < 1e300:
                better = min if key == "loss" else max
                self.best[key] = better(self.best.get(key, value), value)

    # Events

    def _note(self, kind: str, record: Mapping[str, Any]) -> None:
        message = str(record.get("message", ""))[:2000]
        level = record.get("level")
        level = level if level in ("info", "warning", "error") else "info"
        about = record.get("about")
        sort = kind if kind in ("restart", "end") else str(about) if about in get_args(Topic) else "other"
        if kind == "restart":
            level = "warning"
            message = message or str(record.get("cause", ""))
        elif kind == "end":
            status = str(record.get("status", "ended"))
            level = "error" if status in BAD_ENDS else "info"
            message = f"{status}: {message}" if message and message != status else status
        self._events += 1
        self.counts[sort] = self.counts.get(sort, 0) + 1
        stamp = record.get("time")
        stamp = float(stamp) if isinstance(stamp, (int, float)) and abs(stamp) < 1e300 else None
        event = Event(self._events, self.step, stamp, sort, level, message)
        grave = level == "error" or sort in ("restart", "rollback", "end")
        (self._grave if grave else self._common).append(event)

    def events(self, most: int = 500) -> list[Event]:
        """The newest, in the order of the file; those that matter most are kept longest."""
        with self.lock:
            grave = list(self._grave)[-most // 2 :]
            common = list(self._common)[-(most - len(grave)) :]
            return sorted([*grave, *common])

    # Speed

    def step_seconds(self) -> float | None:
        """Median seconds per step of the last training records; None before the first."""
        with self.lock:
            table = self.tables.get("train")
            if table is None:
                return None
            seconds = table.last("step_seconds", RATE_RECORDS)
            seconds = seconds[np.isfinite(seconds) & (seconds > 0)]
            if not len(seconds):
                seconds = np.diff(table.times[-RATE_RECORDS:]) / np.diff(table.steps[-RATE_RECORDS:])
                seconds = seconds[np.isfinite(seconds) & (seconds > 0)]
            return float(np.median(seconds)) if len(seconds) else None
