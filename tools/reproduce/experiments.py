"""All experiments by name, and what runs one of them."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

import symile_dist
from symile_dist.health.lease import locked
from symile_dist.storage import read_json, write_json, write_text
from symile_dist.tools.reproduce.lab import Lab
from symile_dist.tools.reproduce.names import EXPERIMENTS
from symile_dist.tools.reproduce.report import Report, markdown


@dataclass(frozen=True)
class Outcome:
    report: Report
    how: dict[str, Any]
    """Command, seeds, hardware; seconds of this call, and those of all trials, whichever call ran them."""
    folder: Path

    @property
    def data(self) -> dict[str, Any]:
        """What results.json holds."""
        return {**self.report.data, **self.how}


def check_folder(lab: Lab) -> None:
    """Raises ValueError where OUT/NAME holds results of more than is asked for, or of another size: they would be lost,
    and their trials done in vain."""
    try:
        there = read_json(lab.folder / "results.json")
        seeds, quick, made_by = int(there["seeds"]), bool(there["quick"]), there["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if seeds > lab.seeds or quick != lab.quick:
        raise ValueError(
            f"{lab.folder}: holds what `{made_by}` has found, with {seeds} seed{'s' if seeds > 1 else ''}; name "
            "another folder by --out, or remove this one"
        )


def reproduce(lab: Lab) -> Outcome:
    """Runs an experiment and writes OUT/NAME/results.json, results.md and its figures.

    What an earlier call has finished in the same folder is not done again.

    Raises ValueError for a user's mistake and as `check_folder` does, RunFailed where a trial's process is killed.
    """
    check_folder(lab)
    module, _, function = EXPERIMENTS[lab.name].partition(":")
    lab.folder.mkdir(parents=True, exist_ok=True)
    with locked(lab.folder):
        begin = time.monotonic()
        report: Report = getattr(import_module(module), function)(lab)
        how: dict[str, Any] = {
            "command": command(lab),
            "seeds": lab.seeds,
            "quick": lab.quick,
            "hardware": f"{os.cpu_count()} {platform.machine()} cores, torch {torch.__version__}",
            "code_version": symile_dist.__version__,
            "seconds": time.monotonic() - begin,
        }
        how["trials"], how["trial_seconds"] = len(lab.seconds), sum(lab.seconds)
        seeds = f"{lab.seeds} seeds" if lab.seeds > 1 else "one seed"
        sentence = (
            f"Made by `{how['command']}` on {how['hardware']} with {seeds}; its {how['trials']} trials took "
            f"{how['trial_seconds'] / 60:.0f} minutes altogether, some of them at a time."
        )
        outcome = Outcome(report, how, lab.folder)
        write_json(lab.folder / "results.json", outcome.data)
        write_text(lab.folder / "results.md", markdown(report, sentence))
    return outcome


def command(lab: Lab) -> str:
    words = ["symile-dist reproduce", lab.name]
    default = 1 if lab.quick else 3
    words += ["--quick"] if lab.quick else []
    words += [f"--seeds {lab.seeds}"] if lab.seeds != default else []
    return " ".join(words)


def show(outcome: Outcome) -> Group:
    """One experiment on a terminal."""
    report = outcome.report
    parts: list[Any] = [f"\n[bold]{escape(report.title)}[/bold]\n{escape(report.paper)}\n"]
    for table in report.tables:
        parts.append(f"  {escape(table.title)}")
        drawn = Table(box=box.SIMPLE)
        for number, column in enumerate(table.header):
            drawn.add_column(escape(column), justify="left" if number == 0 else "right")
        for row in table.rows:
            drawn.add_row(*map(escape, row))
        parts.append(drawn)
    for check in report.checks:
        verdict = "[green]holds[/green]" if check.holds else "[red]fails[/red]"
        parts.append(f"  {verdict}  {escape(check.claim)}: {escape(check.seen)}")
    parts += [f"  {escape(note)}" for note in report.notes]
    files = [f"{outcome.folder}/{name}" for name in ("results.md", *report.figures)]
    parts.append(f"\n  {outcome.how['seconds'] / 60:.1f} minutes; see " + escape(", ".join(files)))
    return Group(*parts)


def summarize(outcomes: list[Outcome]) -> Table:
    """All experiments, a line each."""
    table = Table(box=box.SIMPLE)
    for column in ("experiment", "checks that hold", "minutes"):
        table.add_column(column)
    for outcome in outcomes:
        checks = outcome.report.checks
        held = sum(check.holds for check in checks)
        table.add_row(outcome.report.name, f"{held} of {len(checks)}", f"{outcome.how['seconds'] / 60:.1f}")
    return table
