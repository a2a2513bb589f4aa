"""The run's history: RUN/history.jsonl for people and programs, and the same records for loggers (see `loggers`).

One JSON object per line: {"kind": "train" | "validation" | "checkpoint" | "event" | ..., "step": int,
"time": Unix seconds, "samples_seen": int, ...}. JSON knows no NaN or Infinity: they are written as the strings "NaN",
"Infinity" and "-Infinity", and `read_history` turns them back into floats. Order is that of the steps and lines;
times are for show, since clocks jump.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from symile_dist.failpoints import failpoint
from symile_dist.metrics.loggers import CLOSE_SECONDS, BackgroundLogger, MakeLogger, TensorBoardLogger
from symile_dist.storage import sync_directory

logger = logging.getLogger(__name__)

HISTORY_FILE = "history.jsonl"

REPLAYED_KINDS = frozenset({"train", "validation", "checkpoint"})
"""What a resumed run makes again. Everything else (events) happened once and stays."""

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a history.jsonl, in the order of the file.

    A last line without its end is left out (the run may be writing it now, or was killed while it did); a damaged line
    elsewhere is left out with a warning.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return list(iterate_history(path))


def iterate_history(path: Path) -> Iterator[dict[str, Any]]:
    """As `read_history`, one record after the other: a whole history takes far more memory than its figures."""
    for _, record in _parsed_lines(path):
        yield {key: _decoded(value) for key, value in record.items()}


def _parsed_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line, ending in a newline, with its record."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line, parse_int=_integer)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:  # of json and of UTF-8 alike
                if line.strip() and line.endswith(b"\n"):
                    logger.warning("%s:%d: damaged record left out: %s", path, number, error)
                continue
            yield line.rstrip(b"\n") + b"\n", record


def _integer(digits: str) -> int | float:
    """What no float can hold is infinite: whoever reads a history computes with floats."""
    return int(digits) if len(digits) < 300 else math.copysign(math.inf, -1 if digits[0] == "-" else 1)


def _encoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """Scalars of torch and NumPy as Python's own, without importing either."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else str(value)


class History:
    """Appends to the history of the run in `directory`, and gives the records to the loggers; one writer at a time.

    With `resume_step`, what the run recorded of training after that step is dropped first, so that each step stands
    once in the history that survives. No failure to write stops training, and no logger holds it up: `write_errors`
    counts them, the first is logged, and each later record is tried anew.
    """

    def __init__(
        self,
        directory: Path,
        resume_step: int | None = None,
        *,
        repair: bool = True,
        tensorboard: bool = True,
        loggers: Mapping[str, MakeLogger] | None = None,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        """
        Args:
            directory: the run's directory, made if need be.
            resume_step: the step of the checkpoint that training goes on from; None keeps all records.
            repair: drop what is damaged, or was written after `resume_step`; it takes seconds where a history is long.
            tensorboard: whether to write event files too (imports torch).
            loggers: what makes further loggers, by name: `loggers_of(config)`.
            close_seconds: how long `close` waits for the loggers.
        """
        self.path = Path(directory) / HISTORY_FILE
        self._errors = 0
        self._file: BinaryIO | None = None
        self._closed = False
        self._close_seconds = close_seconds
        if repair:
            self._guarded(self._repair, resume_step)
        self._guarded(self._open)
        made: dict[str, MakeLogger] = {**(loggers or {})}
        if tensorboard:
            made = {"tensorboard": partial(TensorBoardLogger, self.path.parent), **made}
        self._loggers = [BackgroundLogger(name, partial(make, resume_step)) for name, make in made.items()]

    @property
    def write_errors(self) -> int:
        """Records, or other writes, that did not reach the disk or a logger."""
        return self._errors + sum(each.errors for each in self._loggers)

    def write(self, kind: str, step: int, samples_seen: int | None = None, **values: Any) -> dict[str, Any]:
        """Appends one record and returns it, as `read_history` would give it back.

        Args:
            kind: "train", "validation", "checkpoint", "event", ...
            step: optimizer steps done so far.
            samples_seen: samples of the whole group so far.
            values: numbers, strings, or lists and dicts of them; scalars of torch and NumPy become numbers.
        """
        assert not self._closed, "the history is closed"
        record: dict[str, Any] = {"kind": kind, "step": int(step), "time": time.time()}
        if samples_seen is not None:
            record["samples_seen"] = int(samples_seen)
        record.update((key, _plain(value)) for key, value in values.items())
        line = json.dumps(_encoded(record), ensure_ascii=False, allow_nan=False) + "\n"
        self._guarded(self._append, line.encode("utf-8", errors="replace"), record["step"])
        for each in self._loggers:
            each.write(record)
        return record

    def tell_end(self, status: str) -> None:
        """Tells the loggers how the run, or this group of ranks, has ended; the history has it from the driver."""
        for each in self._loggers:
            each.write({"kind": "end", "step": 0, "time": time.time(), "status": status})

    def flush(self) -> None:
        """Returns once history.jsonl is on the disk, if it takes it: before a checkpoint commits, say. Loggers flush by
        themselves, every few seconds."""
        if self._file is not None:
            self._guarded(os.fsync, self._file.fileno())

    def close(self) -> None:
        """Flushes and closes, the loggers too, for which it waits `close_seconds` at most; may be called twice."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        if self._file is not None:
            self._guarded(self._file.close)
            self._file = None
        deadline = time.monotonic() + self._close_seconds
        for each in self._loggers:
            each.close()
        for each in self._loggers:
            each.join(deadline)

    # The file

    def _guarded(self, action: Callable[..., Any], *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if self._errors == 0:
                logger.warning("history is incomplete, training goes on: %s: %s (said once)", self.path, error)
            self._errors += 1

    def _repair(self, resume_step: int | None) -> None:
        """Drops the damaged and the replayed, by an atomic rewrite, so that a kill leaves the old file or the new."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        temporary = self.path.with_name(HISTORY_FILE + ".temporary")
        try:
            with temporary.open("wb") as file:
                for line, record in _parsed_lines(self.path):
                    replayed = resume_step is not None and record.get("step", 0) > resume_step
                    if not (replayed and record.get("kind") in REPLAYED_KINDS):
                        file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            sync_directory(self.path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        # Unbuffered: a record reaches the file in one write, so that a kill tears at most the last line.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b", buffering=0)
        size = self._file.seek(0, os.SEEK_END)
        if size > 0:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":  # The repair failed; the next record must not join the torn one.
                self._file.write(b"\n")
        return self._file

    def _append(self, line: bytes, step: int) -> None:
        failpoint("history.write", 0, step)
        file = self._file or self._open()
        size = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):  # A full disk first shows as a short count, then as an error.
                written += file.write(line[written:])
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise
