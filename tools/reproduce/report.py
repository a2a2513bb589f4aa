"""What an experiment shows: tables beside the published figures, checks, figures; as files and on the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]


class Check(NamedTuple):
    """A claim that the experiment has to show, with the figure seen."""

    claim: str
    seen: str
    holds: bool


@dataclass
class Report:
    """One experiment's outcome."""

    name: str
    title: str
    paper: str
    """Which experiment of which paper."""
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    """Names of PNG files in the report's folder; each has an SVG beside it."""
    notes: list[str] = field(default_factory=list)
    """Where this differs from the paper's setting."""
    values: dict[str, Any] = field(default_factory=dict)
    """Every number behind the tables."""

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    @property
    def data(self) -> dict[str, Any]:
        """As JSON can hold it."""
        content = {**vars(self), "holds": self.holds}
        return content | {key: [entry._asdict() for entry in content[key]] for key in ("tables", "checks")}


class MeanError(NamedTuple):
    """Mean and standard error over seeds; the error is NaN for a single seed."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if math.isnan(self.error) else f"{self.mean:.3f} ± {self.error:.3f}"


def mean_error(values: Sequence[float]) -> MeanError:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return MeanError(statistics.mean(values), error)


def at_least(claim: str, value: float, bound: float) -> Check:
    return Check(f"{claim} ≥ {bound:g}", f"{value:.3f}", value >= bound)


def at_most(claim: str, value: float, bound: float) -> Check:
    return Check(f"{claim} ≤ {bound:g}", f"{value:.3f}", value <= bound)


def markdown(report: Report, how: str) -> str:
    """The report as a page; `how`: command, hardware and time."""
    lines = [f"# {report.title}", "", report.paper, "", how, ""]
    for table in report.tables:
        lines += [f"**{table.title}**", "", _line(table.header), "|---" * len(table.header) + "|"]
        lines += [_line(row) for row in table.rows]
        lines.append("")
    if report.checks:
        lines += ["| what it has to show | seen | |", "|---|---|---|"]
        lines += [_line([c.claim, c.seen, "holds" if c.holds else "**does not hold**"]) for c in report.checks]
        lines.append("")
    lines += [f"- {note}" for note in report.notes] + [""] * bool(report.notes)
    for figure in report.figures:
        lines += [f"![{report.title}]({figure})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    # A bar within a cell would begin another one.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def save_figure(figure: Any, folder: Path, name: str) -> str:
    """Writes a matplotlib figure as NAME.png and NAME.svg; returns the PNG's name."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=160)
    pyplot.close(figure)
    return f"{name}.png"


def new_figure(columns: int = 1, width: float = 5.2, height: float = 3.8) -> tuple[Any, list[Any]]:
    """A figure with some panels side by side, in the style of all reports."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)
    for panel in axes[0]:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


COLORS = {"symile": "#1f6fb4", "pairwise_clip": "#d1622b", "bound": "#7a7a7a"}
