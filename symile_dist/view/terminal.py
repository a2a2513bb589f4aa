"""The run in a terminal: one live panel where there is a terminal, one line per record where there is none.

The driver draws it (workers report and draw nothing), from the records of history.jsonl; `symile-dist watch` draws the
same from the run's files.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
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

from symile_dist.metrics.names import BAD_ENDS, PHASES, STRAGGLER_RATIO
from symile_dist.metrics.panels import PANELS, TERMINAL
from symile_dist.metrics.panels import Panel as Shown

RATE_WINDOW = 50
"""Training records whose median gives the ETA: a checkpoint or a slow shard does not move it."""
EVENTS_SHOWN = 5
URLS_SHOWN = 8
TREND_POINTS = 200
CURVE_WIDTH = 40
PHASES_NAMED = 5
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_PHASE_STYLES = {
    "data_wait": "dark_orange",
    "h2d": "yellow",
    "forward": "blue",
    "gather": "cyan",
    "loss": "magenta",
    "backward": "bright_blue",
    "optimizer": "green",
    "checkpoint": "red",
    "eval": "white",
}

_STATUS_STYLES = {"running": "green", "finished": "bold blue", **dict.fromkeys(BAD_ENDS, "bold red")}
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
    if kind in ("restart", "end"):
        where = "" if step is None else f" (step {step:.0f})"
        told = [_one_line(record.get(key, "")) for key in ("status" if kind == "end" else "cause", "message")]
        return f"{kind}{where}: {': '.join(part for part in told if part) or '-'}"
    if kind == "goodput" and isinstance(record.get("seconds"), Mapping):
        return _goodput_words(record["seconds"])
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
        self._restarts = 0
        self._status = ""
        self._goodput: dict[str, float] = {}
        self._ranks: tuple[int, int | None] | None = None
        self._trends = {panel.key: _Trend() for panel in _curves_shown()}

    def start(self) -> None:
        """Begins to draw."""
        if self.plain:
            self._print(f"run {_one_line(self.run_name)}: {self.total_steps} steps")
        elif self._live is None:
            self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4)
            self._quietly(self._live.start)

    def update(self, record: Mapping[str, Any]) -> None:
        """Takes one record, as it stands in history.jsonl."""
        self.take(record)
        if self.plain:
            self.say(record)

    def say(self, record: Mapping[str, Any]) -> None:
        """Prints the line of a record."""
        self._print(format_record(record, self.total_steps, self.step_seconds))

    def take(self, record: Mapping[str, Any]) -> None:
        """The same without a line of its own: of what has been before somebody looked."""
        with self._lock:
            self._remember(record)

    def tell(
        self,
        *,
        status: str | None = None,
        goodput: Mapping[str, Any] | None = None,
        ranks: int | None = None,
        expected_ranks: int | None = None,
        restarts: int | None = None,
        checkpoint_step: int | None = None,
    ) -> None:
        """Takes what no record says: what is left out stays as it was.

        Args:
            status: of the run, as in run.json.
            goodput: seconds by state, as in goodput.json.
            ranks, expected_ranks: how many there are, and should be.
            restarts: how often the group of ranks was started again.
            checkpoint_step: of the newest checkpoint that is complete.
        """
        with self._lock:
            self._status = status or self._status
            if goodput is not None:
                self._goodput = _seconds_by_state(goodput)
            if ranks is not None:
                self._ranks = (ranks, expected_ranks)
            if restarts is not None:
                self._restarts = restarts
            if checkpoint_step is not None:
                self._checkpoint_step = checkpoint_step

    def show(self) -> None:
        """Prints how the run stands, once."""
        shown = Group(self._title(), *self._parts()) if self.plain else self.render()
        self._quietly(self.console.print, shown)

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
        for panel in _curves_shown():
            value = _value_of(panel, record)
            if value is not None:
                self._trends[panel.key].add(value)
        if kind == "train":
            seconds = self._seconds_of(record)
            if seconds is not None and 0 < seconds < math.inf:
                self._step_seconds.append(seconds)
            self._train = dict(record)
        elif kind == "validation":
            self._validation = dict(record)
        elif kind == "checkpoint":
            self._checkpoint_step = _number(record, "step")
        elif kind == "goodput" and isinstance(record.get("seconds"), Mapping):
            self._goodput = _seconds_by_state(record["seconds"])
        elif kind == "restart":
            self._restarts += 1
            self._events.append((format_record(record, self.total_steps), "warning"))
        elif kind == "end":
            self._status = _one_line(record.get("status", "")) or self._status
            level = "error" if self._status in BAD_ENDS else "info"
            self._events.append((format_record(record, self.total_steps), level))
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
        return Panel(Group(*self._parts()), title=self._title(), title_align="left")

    def _title(self) -> Text:
        title = Text(_one_line(self.run_name))
        if self._status:
            title.append(f"  {self._status}", style=_STATUS_STYLES.get(self._status, "yellow"))
        return title

    def _parts(self) -> list[Any]:
        with self._lock:
            step = _number(self._train, "step")
            parts: list[Any] = [self._progress_row(step), self._numbers()]
            parts += [part for part in (self._curves(), self._phases(), self._validation_text()) if part is not None]
            parts += self._health()
            if self._metrics_urls:
                hidden = len(self._metrics_urls) - URLS_SHOWN
                more = f" and {hidden} more" if hidden > 0 else ""
                parts.append(Text("metrics  " + " ".join(self._metrics_urls[:URLS_SHOWN]) + more, style="dim"))
            return parts + [Text(message, style=_STYLES.get(level, "")) for message, level in self._events]

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
        cells.append(("restarts", f"{max(self._totals.get('restarts', 0), self._restarts):.0f}"))
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

    def _curves(self) -> Table | None:
        """The panels of `TERMINAL`, from the run's beginning on."""
        blocks = _ASCII_BLOCKS if self.console.options.ascii_only else _BLOCKS
        table = Table.grid(padding=(0, 2))
        for panel in _curves_shown():
            trend = self._trends[panel.key]
            if len(trend.values) > 1 and trend.last is not None:
                shown = _in_unit(trend.last, panel.unit)
                table.add_row(
                    Text(panel.title.lower(), style="dim"), Text(trend.drawn(blocks), style="blue"), Text(shown)
                )
        return table if table.row_count else None

    def _phases(self) -> Text | None:
        """Where a step's time goes: of the last record, as a mean over the ranks."""
        phases = self._train.get("phases")
        if not isinstance(phases, Mapping):
            return None
        known = {name: _number(phases, name) or 0.0 for name in dict.fromkeys((*PHASES, *phases))}
        seconds = {name: value for name, value in known.items() if 0 < value < math.inf}
        total = sum(seconds.values())
        if not total:
            return None
        block = "#" if self.console.options.ascii_only else "█"
        text = Text("step   ", style="dim")
        for name, value in (seconds if self.console.color_system else {}).items():  # its colours are what it says
            text.append(
                block * round(CURVE_WIDTH * value / total), style=f"not dim {_PHASE_STYLES.get(name, 'bright_black')}"
            )
        for name in sorted(seconds, key=lambda name: -seconds[name])[:PHASES_NAMED]:
            style = f"not dim {_PHASE_STYLES.get(name, 'bright_black')}"
            text.append(f"  {_one_line(name)} ", style=style).append(
                f"{100 * seconds[name] / total:.0f}%", style="not dim"
            )
        return text

    def _health(self) -> list[Text]:
        """Goodput and ranks, in a line each."""
        lines = []
        if sum(self._goodput.values()) > 0:
            lines.append(Text(_goodput_words(self._goodput)))
        words, style = [], ""
        if self._ranks is not None:
            there, expected = self._ranks
            words.append(f"ranks {there:,} of {expected:,}" if expected else f"ranks {there:,}")
            style = "yellow" if expected and there < expected else ""
        slowest = self._train.get("slowest")
        if isinstance(slowest, Mapping):
            ratio = _number(slowest, "ratio")
            factor = "" if ratio is None else f", {ratio:.2f} times the median rank's own work"
            words.append(
                f"slowest: rank {_one_line(slowest.get('rank', '?'))} in {_one_line(slowest.get('phase', '?'))}{factor}"
            )
            style = "yellow" if ratio is not None and ratio >= STRAGGLER_RATIO else style
        return [*lines, Text("  ".join(words), style=style)] if words else lines

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


class _Trend:
    """The whole of a curve in a few values: neighbours are put together whenever there are too many."""

    def __init__(self) -> None:
        self.values: list[float] = []
        """Means of finite values."""
        self.last: float | None = None
        self._each = 1
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        self.last = value
        if not math.isfinite(value) or abs(value) > 1e100:
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count == self._each:
            self.values.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self.values) == TREND_POINTS:
            self.values = [
                (first + second) / 2 for first, second in zip(self.values[::2], self.values[1::2], strict=True)
            ]
            self._each *= 2

    def drawn(self, blocks: str, width: int = CURVE_WIDTH) -> str:
        """In one line of characters, lowest to highest."""
        count = min(width, len(self.values))
        edges = [round(len(self.values) * place / count) for place in range(count + 1)]
        means = [statistics.fmean(self.values[first:last]) for first, last in itertools.pairwise(edges)]
        low, high = min(means), max(means)
        size = (high - low) or 1.0
        return "".join(blocks[min(len(blocks) - 1, int(len(blocks) * (mean - low) / size))] for mean in means)


@functools.cache
def _curves_shown() -> tuple[Shown, ...]:
    return tuple(panel for key in TERMINAL if (panel := PANELS.get(key)) and panel.shape == "curve" and panel.curves)


def _value_of(panel: Shown, record: Mapping[str, Any]) -> float | None:
    """What a record says of a panel's first curve; of several that a `*` stands for their mean."""
    curve = panel.curves[0]
    if record.get("kind") != curve.kind:
        return None
    if not curve.key.endswith("*"):
        return _number(record, curve.key)
    values = [value for key in record if key.startswith(curve.key[:-1]) and (value := _number(record, key)) is not None]
    return statistics.fmean(values) if values else None


def _seconds_by_state(told: Mapping[str, Any]) -> dict[str, float]:
    known = {str(name): _number(told, name) for name in told}
    return {name: value for name, value in known.items() if value is not None and 0 <= value < math.inf}


def _goodput_words(told: Mapping[str, Any]) -> str:
    seconds = _seconds_by_state(told)
    total = sum(seconds.values()) or 1.0
    others = sorted(
        (name for name in seconds if name != "productive" and seconds[name] > 0), key=lambda name: -seconds[name]
    )
    parts = [f"goodput {_percent(seconds.get('productive', 0.0) / total)}"]
    parts += [f"{_one_line(name)} {_percent(seconds[name] / total)}" for name in others]
    return "  ".join(parts)


def _in_unit(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return str(value)
    if unit == "seconds":
        return f"{1000 * value:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    if unit == "ratio":
        return _percent(value)
    if unit == "samples/second":
        return f"{_rate(value)}/s"
    return _decimal(value) if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}"


def _number(record: Mapping[str, Any], key: str) -> float | None:
    """The value as a float; None where it is missing or no number. Understands the history's "NaN"."""
    value = record.get(key)
    if isinstance(value, (int, float)):
        return float(value) if abs(value) < 1e300 else math.copysign(math.inf, value) if value == value else value
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
