"""`symile-dist compare`: several runs side by side: their curves, results and what their configs differ in.

Reads nothing but the runs' directories; a run may be under way, of another version or lack any of its files.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import statistics
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import yaml

from symile_dist.config import ConfigError
from symile_dist.masking import is_secret, masked_data
from symile_dist.metrics.goodput import read_goodput
from symile_dist.metrics.history import HISTORY_FILE, iterate_history
from symile_dist.registry import suggestion
from symile_dist.run_directory import CONFIG_FILE, flat_config, load_run, read_run
from symile_dist.storage import read_json

Axis = Literal["steps", "samples", "time"]
AXES: dict[Axis, str] = {"steps": "step", "samples": "samples seen", "time": "hours since the first record"}
DEFAULT_KEYS = ("train.loss", "validation.loss", "validation.accuracy/*", "train.samples_per_second")
RESULT_KEYS = ("validation.loss", "validation.accuracy/*", "validation.total_correlation_bound")
"""Of which the results name the best and the last value."""
SPEED_KEYS = ("train.samples_per_second", "train.mfu")
SPARKLINE = 20
"""Characters of a small curve."""
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Curve:
    """One value over a run. Where steps were done again, the later values stand."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    samples: array[float] = field(default_factory=lambda: array("d"))
    """Seen by then; NaN where that is not known."""
    hours: array[float] = field(default_factory=lambda: array("d"))
    """Of wall time since the run's first record."""
    values: array[float] = field(default_factory=lambda: array("d"))
    """NaN and Inf included."""

    def add(self, step: float, samples: float, hours: float, value: float) -> None:
        while self.steps and self.steps[-1] >= step:
            for each in (self.steps, self.samples, self.hours, self.values):
                each.pop()
        self.steps.append(step)
        self.samples.append(samples)
        self.hours.append(hours)
        self.values.append(value)

    def over(self, axis: Axis) -> array[float]:
        return {"steps": self.steps, "samples": self.samples, "time": self.hours}[axis]

    def finite(self) -> list[tuple[float, float]]:
        """(step, value), NaN and Inf left out."""
        return [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]

    @property
    def last(self) -> tuple[float, float]:
        return self.steps[-1], self.values[-1]

    def best(self, better: str) -> tuple[float, float] | None:
        """(step, value) of the first of the best."""
        pick = min if better == "lower" else max
        return pick(self.finite(), key=lambda point: point[1], default=None)


@dataclass
class Run:
    """What is known of one run."""

    label: str
    directory: Path
    told: dict[str, Any]
    """Its run.json."""
    config: dict[str, Any]
    """`section.key` -> value."""
    whole_config: bool
    """Defaults included: a key that `config` lacks does not exist."""
    curves: dict[str, Curve]
    known: set[str]
    """Every key of its history that has numbers."""
    seconds: float | None
    """Wall time."""
    goodput: float | None
    evaluations: dict[str, float]
    """`SPLIT: figure` -> value, of each split's newest step."""
    notes: list[str] = field(default_factory=list)


@dataclass
class Row:
    """One line of the table of results."""

    name: str
    values: list[Any]
    """One per run; None where there is none."""
    shown: list[str]
    better: Literal["lower", "higher"] | None = None

    @property
    def best(self) -> list[int]:
        """The runs that hold the row's best value; none where there is nothing to choose from."""
        there = {i: v for i, v in enumerate(self.values) if isinstance(v, (int, float)) and math.isfinite(v)}
        if self.better is None or len(there) < 2 or len(set(there.values())) < 2:
            return []
        top = (min if self.better == "lower" else max)(there.values())
        return [index for index, value in there.items() if value == top]


@dataclass
class Comparison:
    runs: list[Run]
    keys: list[str]
    """Of the curves, in order; each is there in one run or more."""
    axis: Axis
    rows: list[Row]
    config: dict[str, list[str]]
    """Keys in which the configs differ -> the value in each run; `–` where there is none."""
    notes: list[str]


def compare(
    names: Sequence[str],
    keys: Sequence[str] = (),
    axis: Axis = "steps",
    *,
    record_of: Callable[[str], Mapping[str, Any]] = lambda name: {"run": name},
) -> Comparison:
    """Reads the runs and puts them beside each other; writes nothing.

    Args:
        names: directories, or names of runs.
        keys: KIND.KEY of the history (`train.loss`, `train.phases.forward`), where `*` stands for anything; by default
            DEFAULT_KEYS.
        record_of: finds a run's record by a name, as launch.records does; by default only directories are names.

    Raises ValueError for a run or a key that is not there.
    """
    directories = [_directory(name, record_of(name)) for name in names]
    if len(directories) < 2:
        raise ValueError("name two runs or more")
    for name, directory in zip(names, directories, strict=True):
        if directories.count(directory) > 1:
            raise ValueError(f"{name}: {directory} is named twice")
    for key in keys:
        if not re.fullmatch(r"\w+\.\S+", key):
            raise ValueError(f"--key {key}: should be KIND.KEY, such as train.loss or validation.accuracy/*")
    labels = _labels(directories)
    wanted = tuple(keys) or DEFAULT_KEYS
    runs = [
        _read(label, each, (*wanted, *RESULT_KEYS, *SPEED_KEYS))
        for label, each in zip(labels, directories, strict=True)
    ]
    known = {key for run in runs for key in run.known}
    for key in keys:
        if not fnmatch.filter(known, key):
            hint = suggestion(key, sorted(known)) if known else ": they have no history"
            raise ValueError(f"--key {key}: none of these runs has it{hint}")
    shown = [key for pattern in wanted for key in sorted(fnmatch.filter(known, pattern))]
    notes = [f"{run.label}: {note}" for run in runs for note in run.notes]
    for run in runs:
        lost = [key for key in shown if key in run.curves and not any(map(math.isfinite, run.curves[key].over(axis)))]
        if lost:
            notes.append(f"{run.label}: its history does not tell {AXES[axis]} of {', '.join(lost)}")
    config = _differing(runs)
    if {"train.global_batch_size", "objective.name"} & set(config):
        notes.append("losses of different batches or objectives are not comparable; accuracies are")
    return Comparison(runs, list(dict.fromkeys(shown)), axis, _rows(runs), config, notes)


def _directory(name: str, record: Mapping[str, Any]) -> Path:
    directory = Path(record["run"])
    if not directory.is_dir():
        raise ValueError(f"{name}: there is no directory {directory} on this machine")
    return directory.resolve()


def _labels(directories: Sequence[Path]) -> list[str]:
    """The folder's name, with as many of its parents as it takes to tell the runs apart."""

    def label(directory: Path, parts: int) -> str:
        return "/".join(directory.parts[-parts:])

    labels = []
    for directory in directories:
        others = [other for other in directories if other != directory]
        parts = 1
        while parts < len(directory.parts) and any(label(directory, parts) == label(each, parts) for each in others):
            parts += 1
        labels.append(label(directory, parts))
    return labels


def _read(label: str, directory: Path, patterns: Sequence[str]) -> Run:
    told, notes = read_run(directory), []
    config, whole = {}, False
    try:
        loaded = load_run(directory)
        config, whole = flat_config(loaded), True
        config["order of modalities"] = ", ".join(loaded.modalities)
    except ConfigError as error:
        notes.append(
            f"its config is not of this version, so that defaults are not compared ({str(error).splitlines()[0]})"
        )
        try:
            plain = yaml.safe_load((directory / CONFIG_FILE).read_text(encoding="utf-8"))
            config = flat_config(plain) if isinstance(plain, dict) else {}
        except (OSError, ValueError, yaml.YAMLError):
            notes.append("its config cannot be read")
    curves, known, span = _read_curves(directory / HISTORY_FILE, patterns, notes)
    seconds = read_goodput(directory).get("seconds", {})
    spent = {key: value for key, value in seconds.items() if isinstance(value, (int, float))}
    total = sum(spent.values())
    return Run(
        label,
        directory,
        told,
        config,
        whole,
        curves,
        known,
        total if total > 0 else span,
        spent.get("productive", 0.0) / total if total > 0 else None,
        _evaluations(directory, notes),
        notes,
    )


def _read_curves(
    path: Path, patterns: Sequence[str], notes: list[str]
) -> tuple[dict[str, Curve], set[str], float | None]:
    """(curves that fit a pattern, all keys, seconds from the first record to the last)."""
    curves: dict[str, Curve] = {}
    known: set[str] = set()
    names: dict[tuple[str, str], tuple[str, bool]] = {}
    first = last = None
    try:
        for record in iterate_history(path):
            kind, step, now = record.get("kind"), record.get("step"), record.get("time")
            if not isinstance(kind, str) or not isinstance(step, (int, float)) or not isinstance(now, (int, float)):
                continue
            first = now if first is None else first
            last = now
            samples = record.get("samples_seen")
            samples = float(samples) if isinstance(samples, (int, float)) else math.nan
            for inner, value in _numbers(record):
                if (kind, inner) not in names:
                    key = f"{kind}.{inner}"
                    names[kind, inner] = key, any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
                    known.add(key)
                key, taken = names[kind, inner]
                if taken:
                    curves.setdefault(key, Curve()).add(float(step), samples, (now - first) / 3600, float(value))
    except FileNotFoundError:
        notes.append("it has no history")
    except OSError as error:
        notes.append(f"its history cannot be read: {error.strerror or error}")
    for key, curve in curves.items():
        odd = [step for step, value in zip(curve.steps, curve.values, strict=True) if not math.isfinite(value)]
        if odd:
            notes.append(
                f"{key} is NaN or infinite in {len(odd)} of {len(curve.values)} records, first at step {odd[0]:.0f}"
            )
    return curves, known, None if first is None or last is None else max(0.0, last - first)


def _numbers(record: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, (int, float)):
            if path or key not in ("step", "time", "samples_seen"):
                yield f"{path}{key}", value
        elif isinstance(value, dict):
            yield from _numbers(value, f"{path}{key}.")


def _evaluations(directory: Path, notes: list[str]) -> dict[str, float]:
    newest: dict[str, dict[str, Any]] = {}
    for file in sorted((directory / "evaluation").glob("*.json")):
        try:
            found = read_json(file)
            split, step = str(found["split"]), int(found["step"])
        except (OSError, ValueError, KeyError, TypeError):
            notes.append(f"evaluation/{file.name} is no result")
            continue
        if split not in newest or step >= newest[split]["step"]:
            newest[split] = {**found, "step": step}
    figures: dict[str, float] = {}
    for split, found in newest.items():
        figures[f"{split}: step"] = found["step"]
        values = {"loss": found.get("loss")}
        for part, words in (("retrieval", ""), ("zero_shot", "zero-shot "), ("probe", "probe ")):
            rows = found.get(part)
            for name, row in rows.items() if isinstance(rows, dict) else ():
                values[f"{words}{name}"] = row.get("accuracy") if isinstance(row, dict) else None
        figures |= {f"{split}: {name}": value for name, value in values.items() if isinstance(value, (int, float))}
    return figures


# Results


def _rows(runs: Sequence[Run]) -> list[Row]:
    rows: list[Row] = []

    def add(
        name: str,
        values: Iterable[Any],
        show: Callable[[Any], str],
        better: Literal["lower", "higher"] | None = None,
        more: Sequence[str] = (),
    ) -> None:
        kept = list(values)
        if any(value is not None for value in kept):
            shown = ["–" if value is None else show(value) for value in kept]
            rows.append(
                Row(name, kept, [f"{a}{b}" for a, b in zip(shown, more or [""] * len(shown), strict=True)], better)
            )

    add("status", (run.told.get("status") for run in runs), str)
    add("step", (_last_step(run) for run in runs), _integer)
    add("samples seen", (_samples_seen(run) for run in runs), _integer)
    add("wall time", (run.seconds for run in runs), _duration)
    add("goodput", (run.goodput for run in runs), _percent, "higher")
    add("restarts", (run.told.get("restarts") for run in runs), _integer)
    add("samples/s (median)", (_median(run, "train.samples_per_second") for run in runs), _figure, "higher")
    add("MFU (median)", (_median(run, "train.mfu") for run in runs), _percent, "higher")
    keys = [
        key for pattern in RESULT_KEYS for key in fnmatch.filter(sorted({k for r in runs for k in r.curves}), pattern)
    ]
    for key in keys:
        better: Literal["lower", "higher"] = "lower" if key.endswith(".loss") else "higher"
        tops = [run.curves[key].best(better) if key in run.curves else None for run in runs]
        steps = ["" if top is None else f" (step {top[0]:.0f})" for top in tops]
        name = key.replace(".accuracy/", " ").replace(".", " ").replace("_", " ")
        show = _formatter(key)
        add(f"{name}, best", (top and top[1] for top in tops), show, better, steps)
        if any(key in run.curves and top != run.curves[key].last for run, top in zip(runs, tops, strict=True)):
            add(f"{name}, last", (_last(run, key) for run in runs), show, better)
    for name in dict.fromkeys(name for run in runs for name in run.evaluations):
        figure = name.partition(": ")[2]
        show = {"step": _integer, "loss": _figure}.get(figure, _percent)
        order: Literal["lower", "higher"] | None = {"step": None, "loss": "lower"}.get(figure, "higher")
        add(name, (run.evaluations.get(name) for run in runs), show, order)
    add("code version", (run.told.get("code_version") for run in runs), str)
    return rows


def _last(run: Run, key: str) -> float | None:
    return run.curves[key].last[1] if key in run.curves else None


def _last_step(run: Run) -> float | None:
    return _most(run.told.get("step"), (curve.steps[-1] for curve in run.curves.values()))


def _samples_seen(run: Run) -> float | None:
    return _most(run.told.get("samples_seen"), (curve.samples[-1] for curve in run.curves.values()))


def _most(told: Any, seen: Iterable[float]) -> float | None:
    """run.json is written at the end, the history all along, but not at every step."""
    numbers = [value for value in (told, *seen) if isinstance(value, (int, float)) and math.isfinite(value)]
    return max(numbers, default=None)


def _median(run: Run, key: str) -> float | None:
    found = [value for _, value in run.curves[key].finite()] if key in run.curves else []
    return statistics.median(found) if found else None


def _integer(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, (int, float)) and math.isfinite(value) else str(value)


def _figure(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 or not math.isfinite(value) else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _formatter(key: str) -> Callable[[float], str]:
    return _percent if "accuracy/" in key else _figure


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if 0 <= seconds < 3e9 else "–"


# Configs


def _differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    found = {}
    for key in dict.fromkeys(key for run in runs for key in run.config):
        there = [run.config[key] for run in runs if key in run.config]
        lacking = [run for run in runs if key not in run.config]
        # A config that holds no defaults says nothing by what it lacks.
        if all(value == there[0] for value in there) and not any(run.whole_config for run in lacking):
            continue
        found[key] = [_setting(key, run.config[key]) if key in run.config else "–" for run in runs]
    return found


def _setting(key: str, value: Any) -> str:
    # A flat key: any of its parts may be called like a secret.
    shown = masked_data(value, next((part for part in key.split(".") if is_secret(part)), ""))
    return shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False, default=str)


# The terminal


def sparkline(curve: Curve, axis: Axis, span: tuple[float, float], heights: tuple[float, float]) -> str:
    """A curve in SPARKLINE characters: means of its values between the ends of `span`, on a scale from `heights`; `×`
    where there are none but NaN and Inf."""
    sums, counts, odd = [0.0] * SPARKLINE, [0] * SPARKLINE, [False] * SPARKLINE
    width, height = span[1] - span[0], heights[1] - heights[0]
    for x, value in zip(curve.over(axis), curve.values, strict=True):
        if not math.isfinite(x):
            continue
        place = min(SPARKLINE - 1, int((x - span[0]) / width * SPARKLINE)) if width > 0 else 0
        if math.isfinite(value):
            sums[place] += value
            counts[place] += 1
        else:
            odd[place] = True
    line, last = "", " "
    seen = [place for place, count in enumerate(counts) if count]
    for place, (total, count, bad) in enumerate(zip(sums, counts, odd, strict=True)):
        if count:
            share = (total / count - heights[0]) / height if height > 0 else 0.5
            last = BARS[min(len(BARS) - 1, max(0, int(share * len(BARS))))]
            line += last
        elif bad:
            line += "×"
        else:  # between two of few records
            line += last if seen and place < seen[-1] else " "
    return line


def ends(values: Iterable[float]) -> tuple[float, float]:
    """The least and the greatest finite value; (0, 0) where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 0.0)


def tables(found: Comparison) -> Any:
    """The comparison for a terminal, of rich's."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    labels = [run.label for run in found.runs]

    def table(title: str, first: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
        made.add_column(Text(first), overflow="fold")
        for label in labels:
            made.add_column(Text(_plain(label)), overflow="fold")
        return made

    results = table("Results", "")
    for row in found.rows:
        best = row.best
        cells = [
            Text(f"{_plain(cell)} *", style="bold green") if i in best else Text(_plain(cell))
            for i, cell in enumerate(row.shown)
        ]
        results.add_row(Text(_plain(row.name)), *cells)
    parts: list[Any] = [results]
    if any(row.best for row in found.rows):
        parts.append(Text("* the best of the row", style="dim"))
    if found.keys:
        curves = table(f"Curves over {AXES[found.axis]}; all of a row on one scale", "")
        for key in found.keys:
            there = [run.curves[key] for run in found.runs if key in run.curves]
            span = ends(x for curve in there for x in curve.over(found.axis))
            heights = ends(value for curve in there for value in curve.values)
            cells = []
            for run in found.runs:
                curve = run.curves.get(key)
                line = "" if curve is None else sparkline(curve, found.axis, span, heights)
                cells.append(Text("–" if curve is None else f"{line} {_formatter(key)(curve.values[-1])}"))
            curves.add_row(Text(_plain(key)), *cells)
        parts.append(curves)
    if found.config:
        config = table("Keys in which the configs differ", "key")
        for key, values in found.config.items():
            config.add_row(Text(_plain(key)), *(Text(_plain(value)) for value in values))
        parts.append(config)
    else:
        parts.append(Text("their configs do not differ"))
    parts += [Text(f"note: {_plain(note)}", style="yellow") for note in found.notes]
    return Group(*parts)


def _plain(text: str) -> str:
    # An escape sequence in a name or a message could do anything to the terminal.
    return "".join(character if character.isprintable() else " " for character in text)


def as_json(found: Comparison, files: Sequence[Path] = ()) -> dict[str, Any]:
    """The comparison as JSON can hold it: NaN and Inf are strings, as in history.jsonl."""

    def number(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value

    labels = [run.label for run in found.runs]
    curves: dict[str, Any] = {}
    for key in found.keys:
        curves[key] = {}
        for run in found.runs:
            if key in run.curves:
                curve = run.curves[key]
                low, high = ends(curve.values)
                curves[key][run.label] = {
                    "records": len(curve.values),
                    "first": number(curve.values[0]),
                    "last": number(curve.values[-1]),
                    "least": low,
                    "greatest": high,
                    "last_step": int(curve.steps[-1]),
                }
    return {
        "runs": [
            {"label": run.label, "run": str(run.directory), "status": run.told.get("status")} for run in found.runs
        ],
        "results": [
            {
                "name": row.name,
                "values": dict(zip(labels, map(number, row.values), strict=True)),
                "better": row.better,
                "best": [labels[index] for index in row.best],
            }
            for row in found.rows
        ],
        "config": {key: dict(zip(labels, values, strict=True)) for key, values in found.config.items()},
        "axis": found.axis,
        "curves": curves,
        "notes": found.notes,
        "files": [str(file) for file in files],
    }


def check_out(out: str | None, html: bool) -> Path | None:
    """The folder for figures. Raises ValueError where it cannot be one."""
    if out is None:
        if html:
            raise ValueError("--html: say where to, by --out DIR")
        return None
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    return path
