"""The run in a terminal: one live panel where there is a terminal, one line per record where there is none.

The driver draws it (workers report and draw nothing), from the records of history.jsonl, so that the same view can
follow a run from its file.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

RATE_WINDOW = 50
"""Training records whose median gives the ETA: a checkpoint or a slow shard does not move it."""
EVENTS_SHOWN = 5
URLS_SHOWN = 8

_STYLES = {"info": "", "warning": "yellow", "error": "bold red"}
_COMMON_KEYS = frozenset({"kind", "step", "time", "samples_seen", "loss"})


def format_record(record: Mapping[str, Any], total_steps: int, step_seconds: float | None = None) -> str:
    """One line for one record of the history, without a newline; missing keys are left out.

    Args:
        record: as `metrics.history` writes it.
        total_steps: the step at which the run ends.
        step_seconds: seconds per step for the ETA; by default those of the record itself.
    """
    kind = record.get("kind")
    step = _number(record, "step")
    if kind == "event":
        where = "" if step is None else f" (step {step:.0f})"
        return f"{_one_line(record.get('level', 'info'))}{where}: {_one_line(record.get('message', ''))}"
    if kind == "train":
        parts = [_progress(step, total_steps)]
        for key, formatted in _TRAIN_PARTS.items():
            value = _number(record, key)
            if value is not None:
                parts.append(formatted(value))
        rate = _number(record, "step_seconds") if step_seconds is None else step_seconds
        parts.append(f"ETA {_eta(step, total_steps, rate)}")
        return "  ".join(parts)
    parts = [f"{_one_line(kind or 'record')} at step {'?' if step is None else f'{step:.0f}'}"]
    for key in ["loss", *(key for key in record if key not in _COMMON_KEYS)]:
        value = _number(record, key)
        if value is not None:
            parts.append(f"{_short_key(key)} {_metric(key, value)}")
    return "  ".join(parts)


class TerminalView:
    """What a person sees of a run.

    It shows what `update` was last given; a key that is missing is not shown. A terminal that cannot be written
    (closed, a pipe without reader) never raises. Safe to call from several threads.

    Beside the keys that training writes, any record may carry `skipped_steps` and `restarts` (totals so far) and
    `metrics_urls` (list of strings, one per rank).
    """

    def __init__(
        self, run_name: str, total_steps: int, console: Console | None = None, plain: bool | None = None
    ) -> None:
        """
        Args:
            run_name: the panel's title.
            total_steps: the step at which the run ends.
            console: where to draw; by default standard output.
            plain: lines instead of a panel; by default where `console` is not a terminal that can move its cursor.
        """
        self.run_name = run_name
        self.total_steps = total_steps
        self.console = console or Console()
        self.plain = plain if plain is not None else (not self.console.is_terminal or self.console.is_dumb_terminal)
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._train: dict[str, Any] = {}
        self._totals: dict[str, float] = {}
        self._validation: dict[str, Any] = {}
        self._checkpoint_step: float | None = None
        self._metrics_urls: list[str] = []
        self._events: deque[tuple[str, str]] = deque(maxlen=EVENTS_SHOWN)
        self._step_seconds: deque[float] = deque(maxlen=RATE_WINDOW)

    def start(self) -> None:
        """Begins to draw."""
        if self.plain:
            self._print(f"run {_one_line(self.run_name)}: {self.total_steps} steps")
        elif self._live is None:
            self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4)
            self._quietly(self._live.start)

    def update(self, record: Mapping[str, Any]) -> None:
        """Takes one record, as it stands in history.jsonl."""
        with self._lock:
            self._remember(record)
            line = format_record(record, self.total_steps, self.step_seconds)
        if self.plain:
            self._print(line)

    def note(self, message: str, level: str = "info") -> None:
        """Shows a message that is not in the history; `level` is info, warning or error."""
        self.update({"kind": "event", "message": message, "level": level})

    def stop(self) -> None:
        """Draws the last state and gives the terminal back; may be called twice."""
        if self._live is not None:
            self._quietly(self._live.stop)
            self._live = None

    @property
    def step_seconds(self) -> float | None:
        """Median seconds per step of the last training records; None before the first."""
        return statistics.median(self._step_seconds) if self._step_seconds else None

    def _remember(self, record: Mapping[str, Any]) -> None:
        for key in ("skipped_steps", "restarts"):
            value = _number(record, key)
            if value is not None:
                self._totals[key] = value
        urls = record.get("metrics_urls")
        if isinstance(urls, (list, tuple)):
            self._metrics_urls = [_one_line(url) for url in urls]
        kind = record.get("kind")
        if kind == "train":
            seconds = self._seconds_of(record)
            if seconds is not None and 0 < seconds < math.inf:
                self._step_seconds.append(seconds)
            self._train = dict(record)
        elif kind == "validation":
            self._validation = dict(record)
        elif kind == "checkpoint":
            self._checkpoint_step = _number(record, "step")
        elif kind == "event":
            self._events.append((format_record(record, self.total_steps), str(record.get("level", "info"))))

    def _seconds_of(self, record: Mapping[str, Any]) -> float | None:
        seconds = _number(record, "step_seconds")
        if seconds is not None:
            return seconds
        ends = [_number(each, key) for key in ("time", "step") for each in (self._train, record)]
        if None in ends:
            return None
        time_before, time_now, step_before, step_now = (end or 0.0 for end in ends)
        return (time_now - time_before) / (step_now - step_before) if step_now > step_before else None

    # Drawing

    def _quietly(self, action: Callable[..., Any], *arguments: Any) -> None:
        # A closed file or a character that it cannot encode is a ValueError; rich ends the process on a broken pipe.
        # Losing sight of the run is no reason to stop it.
        with contextlib.suppress(OSError, ValueError, SystemExit):
            action(*arguments)

    def _print(self, line: str) -> None:
        self._quietly(lambda: self.console.print(Text(line), soft_wrap=True))

    def render(self) -> Panel:
        """The panel as it stands now."""
        with self._lock:
            step = _number(self._train, "step")
            parts: list[Any] = [
                self._progress_row(step),
                self._numbers(),
            ]
            validation = self._validation_text()
            if validation is not None:
                parts.append(validation)
            if self._metrics_urls:
                hidden = len(self._metrics_urls) - URLS_SHOWN
                more = f" and {hidden} more" if hidden > 0 else ""
                parts.append(Text("metrics  " + " ".join(self._metrics_urls[:URLS_SHOWN]) + more, style="dim"))
            parts += [Text(message, style=_STYLES.get(level, "")) for message, level in self._events]
        return Panel(Group(*parts), title=Text(_one_line(self.run_name)), title_align="left")

    def _progress_row(self, step: float | None) -> Table:
        # In a table, because a bare ProgressBar ends without a line break and swallows the row below it.
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column()
        row.add_column(ratio=1)
        row.add_column()
        bar = ProgressBar(total=max(self.total_steps, 1), completed=step or 0.0)
        eta = _eta(step, self.total_steps, self.step_seconds)
        row.add_row(Text(_progress(step, self.total_steps)), bar, Text(f"ETA {eta}"))
        return row

    def _numbers(self) -> Table:
        cells: list[tuple[str, str]] = []
        for key, (label, formatted) in _PANEL_CELLS.items():
            value = _number(self._train, key)
            cells.append((label, "-" if value is None else formatted(value)))
        cells.append(("skipped steps", f"{self._totals.get('skipped_steps', 0):.0f}"))
        cells.append(("restarts", f"{self._totals.get('restarts', 0):.0f}"))
        saved = "-" if self._checkpoint_step is None else f"step {self._checkpoint_step:.0f}"
        cells.append(("last checkpoint", saved))
        table = Table.grid(padding=(0, 2), expand=False)
        for start in range(0, len(cells), 3):
            row: list[Text] = []
            for label, shown in cells[start : start + 3]:
                style = "bold red" if shown in ("nan", "inf", "-inf") else "bold"
                row += [Text(label, style="dim"), Text(shown, style=style)]
            table.add_row(*row)
        return table

    def _validation_text(self) -> Text | None:
        if not self._validation:
            return None
        step = _number(self._validation, "step")
        parts = [f"validation at step {'?' if step is None else f'{step:.0f}'}"]
        for key in ["loss", *(key for key in self._validation if key.startswith("accuracy/"))]:
            value = _number(self._validation, key)
            if value is not None:
                parts.append(f"{_short_key(key)} {_metric(key, value)}")
        return Text("  ".join(parts))


def _number(record: Mapping[str, Any], key: str) -> float | None:
    """The value as a float; None where it is missing or no number. Understands the history's "NaN"."""
    value = record.get(key)
    if isinstance(value, (int, float)):
        return float(value)
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return None


def _one_line(text: Any) -> str:
    # A line break would tear the lines apart; an escape sequence could do anything to the terminal.
    return " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())


def _decimal(value: float) -> str:
    if value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3f}"
    return f"{value:.3e}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _metric(key: str, value: float) -> str:
    return _percent(value) if key.startswith("accuracy/") else _decimal(value)


def _short_key(key: str) -> str:
    return _one_line(key.removeprefix("accuracy/"))


def _progress(step: float | None, total_steps: int) -> str:
    return f"step {'-' if step is None else f'{step:.0f}'}/{total_steps}"


def _eta(step: float | None, total_steps: int, step_seconds: float | None) -> str:
    if step is None or step_seconds is None or not math.isfinite(step_seconds):
        return "-"
    seconds = max(total_steps - step, 0) * step_seconds
    # Beyond a century it is no estimate, and timedelta overflows.
    return str(timedelta(seconds=round(seconds))) if seconds < 3e9 else "-"


_TRAIN_PARTS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {_decimal(value)}",
    "logit_scale": lambda value: f"logit_scale {value:.3g}",
    "samples_per_second": lambda value: f"{_rate(value)} samples/s",
    "data_wait_fraction": lambda value: f"data wait {_percent(value)}",
}
_PANEL_CELLS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", _decimal),
    "logit_scale": ("logit_scale", lambda value: f"{value:.3g}"),
    "samples_per_second": ("samples/s", _rate),
    "data_wait_fraction": ("data wait", _percent),
    "grad_norm": ("grad norm", _decimal),
    "learning_rate": ("learning rate", lambda value: f"{value:.3g}"),
}
