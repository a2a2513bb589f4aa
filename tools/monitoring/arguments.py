"""The command line of `symile-dist monitoring`. Nothing is imported until a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Print = Callable[[argparse.Namespace, Any, Callable[[], Any]], int]


def add_commands(
    commands: Any,
    command: Callable[..., argparse.ArgumentParser],
    show: Print,
    known: Callable[[Sequence[str]], list[Path]],
    state_folder: Callable[[], Path],
) -> None:
    """Adds monitoring up, rules, dashboards and targets.

    Args:
        command: makes one, as `cli._command`.
        show: prints a result as text or as JSON, as `cli._print_result`.
        known: the directories of the named runs, or of all that are known here.
        state_folder: where this user's records are.
    """

    def up(options: argparse.Namespace) -> int:
        from symile_dist.tools.monitoring import command as work

        def ready(told: dict[str, Any]) -> None:
            text = json.dumps(told) if options.json else work.up_text(told, work.answers)
            print(text, flush=True)  # in one line, as it goes on

        work.up(
            Path(options.out) if options.out else state_folder() / "monitoring",
            known,
            options.runs,
            port=options.port,
            with_alertmanager=options.alertmanager,
            token_file=options.token_file,
            time_scale=options.time_scale,
            scrape_seconds=options.scrape_seconds,
            ready=ready,
        )
        return 0

    def rules(options: argparse.Namespace) -> int:
        from symile_dist.tools.monitoring import command as work

        return _written(options, work.files_of_rules(options.time_scale, options.runbook), show)

    def dashboards(options: argparse.Namespace) -> int:
        from symile_dist.tools.monitoring import command as work

        return _written(options, work.files_of_dashboards(), show)

    def targets(options: argparse.Namespace) -> int:
        from symile_dist.tools.monitoring import command as work
        from symile_dist.tools.monitoring.targets import merged_targets, write_merged

        if options.follow and not options.out:
            raise ValueError("--follow: goes with --out, a file that is kept up to date")
        found = known(options.runs)
        if not options.out:
            print(json.dumps(merged_targets(found), indent=2))
            return 0
        number = write_merged(Path(options.out), found)
        print(f"{options.out}: {number} endpoints", file=sys.stderr)
        if options.follow:
            work.follow(Path(options.out), known, options.runs)
        return 0

    monitoring = commands.add_parser("monitoring", help="Prometheus, Grafana and alerts: docs/watching.md")
    parts = monitoring.add_subparsers(metavar="COMMAND", required=True)
    made = command(
        parts,
        "up",
        up,
        "A Prometheus here, on loopback, over all runs that are known here, with the alert rules; until Ctrl-C.",
        "symile-dist monitoring up --port 9090",
    )
    _runs_argument(made)
    made.add_argument("--out", metavar="DIR", help="for configuration and data, which are kept (default: your state)")
    made.add_argument("--port", type=int, default=9090, metavar="N", help="default: 9090")
    made.add_argument("--alertmanager", action="store_true", help="an Alertmanager too, three ports further")
    made.add_argument(
        "--scrape-seconds", type=float, default=2.0, metavar="S", help="for hundreds of ranks: 15 (default: 2)"
    )
    made.add_argument("--token-file", metavar="FILE", help="what metrics.token_file of the runs is")
    _scale_argument(made)

    made = command(
        parts,
        "rules",
        rules,
        "Alert rules and configuration for a Prometheus and an Alertmanager of your own.",
        "symile-dist monitoring rules --out prometheus",
    )
    _out_argument(made)
    _scale_argument(made)
    made.add_argument(
        "--runbook",
        default="docs/runbook.md",
        metavar="URL",
        help="where docs/runbook.md stands for whoever reads an alert",
    )
    made = command(
        parts,
        "dashboards",
        dashboards,
        "Dashboards for a Grafana of your own: import them, or provision the folder.",
        "symile-dist monitoring dashboards --out grafana/dashboards",
    )
    _out_argument(made)
    made = command(
        parts,
        "targets",
        targets,
        "The endpoints of all runs that are known here, as Prometheus reads them (file_sd).",
        "symile-dist monitoring targets --out targets/symile.json --follow",
        json_option=False,
    )
    _runs_argument(made)
    made.add_argument("--out", metavar="FILE", help="write them there (default: print them)")
    made.add_argument("--follow", action="store_true", help="keep the file up to date until Ctrl-C")


def _runs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", help="names or directories (default: all that are known here)"
    )


def _out_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default=".", metavar="DIR", help="default: the current folder")


def _scale_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--time-scale", type=float, default=1.0, metavar="X", help="of the rules' durations: 0.1 tries them out"
    )


def _written(options: argparse.Namespace, made: dict[str, str], show: Print) -> int:
    from symile_dist.tools.monitoring.command import write_files

    paths = write_files(Path(options.out), made)
    return show(options, {"files": paths}, lambda: "\n".join(paths))
