"""The command line of the launcher. Nothing is imported until a command runs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from symile_dist.launch import BACKENDS

Print = Callable[[argparse.Namespace, Any, Callable[[], Any]], int]
Check = Callable[[Any, str], None]
"""Of a config, for a backend: raises ValueError for what would fail at once."""


def add_commands(commands: Any, command: Callable[..., argparse.ArgumentParser], show: Print, examine: Check) -> None:
    """Adds submit, status, logs, stop and list.

    Args:
        command: makes one, as `cli._command`.
        show: prints a result as text or as JSON, as `cli._print_result`.
        examine: is asked before every submission.
    """

    def submit(options: argparse.Namespace) -> int:
        from symile_dist.launch.command import backend_text, prepared
        from symile_dist.launch.command import submit as submit_job

        if options.output and not options.dry_run:
            raise ValueError("--output: goes with --dry-run, which writes what would be submitted")
        backend, jobs = prepared(options)
        if options.dry_run:
            text = backend_text(backend, jobs)
            if options.output:
                with open(options.output, "w", encoding="utf-8") as file:
                    file.write(text)
            return show(options, {"on": backend, "text": text}, lambda: options.output or text.rstrip("\n"))
        return _told(options, submit_job(backend, jobs, options, examine), show)

    def status(options: argparse.Namespace) -> int:
        from symile_dist.launch.command import format_status
        from symile_dist.launch.command import status as status_of

        told = status_of(options.run)
        return show(options, told, lambda: format_status(told))

    def logs(options: argparse.Namespace) -> int:
        from symile_dist.launch.command import logs as pieces

        with contextlib.suppress(KeyboardInterrupt):  # that is how one stops following
            for piece in pieces(options.run, options.follow, options.rank):
                sys.stdout.write(piece)
                sys.stdout.flush()
        return 0

    def stop(options: argparse.Namespace) -> int:
        from symile_dist.launch.command import stop as stop_run

        words = stop_run(options.run, options.now)
        return show(options, {"run": options.run, "done": words}, lambda: words)

    def list_all(options: argparse.Namespace) -> int:
        from symile_dist.launch.command import list_runs, runs_table

        rows = list_runs()
        return show(options, rows, lambda: runs_table(rows))

    made = command(
        commands,
        "submit",
        submit,
        "Have a config trained by machines elsewhere, or here in the background: docs/launch.md",
        "symile-dist submit configs/demo.yaml --on slurm --nodes 2 --gpus-per-node 8 --time 12:00:00",
    )
    made.add_argument("config", metavar="CONFIG", help="YAML file; see configs/ and docs/")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="overrides, e.g. train.steps=100")
    made.add_argument("--on", metavar="BACKEND", help=f"{', '.join(BACKENDS)} (default: the profile's)")
    made.add_argument("--name", help="of the run: run.name")
    made.add_argument(
        "--seeds", metavar="S,S,...", help="a run for each, NAME-seedS: 0,1,2 or 0-4; with slurm they are one array"
    )
    size_arguments(made)
    profile_argument(made)
    made.add_argument("--dry-run", action="store_true", help="print what would be submitted; needs no cluster")
    made.add_argument("--output", metavar="FILE", help="with --dry-run: write it there")
    made.add_argument("--wait", action="store_true", help="follow the job; its exit code is this command's")

    made = command(
        commands,
        "status",
        status,
        "How a run is: what its job does, and how far it is.",
        "symile-dist status demo-symile --json",
    )
    _run_argument(made)
    made = command(
        commands,
        "logs",
        logs,
        "What a run's job has printed, or what one of its ranks has written.",
        "symile-dist logs demo-symile -f --rank 0",
        json_option=False,
    )
    _run_argument(made)
    made.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    made.add_argument("--rank", type=int, metavar="R", help="the log of this rank, from the run's directory")
    made = command(
        commands,
        "stop",
        stop,
        "Have a run save and stop; `symile-dist resume RUN` goes on with it.",
        "symile-dist stop demo-symile",
    )
    _run_argument(made)
    made.add_argument("--now", action="store_true", help="end it without saving")
    command(commands, "list", list_all, "All runs that are known here, and how they are.", "symile-dist list --json")


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's name or directory")


def size_arguments(parser: argparse.ArgumentParser, nodes: int | None = 1) -> None:
    """--nodes and its like; with `nodes=None` what is left out stays as it was."""
    parser.add_argument("--nodes", type=int, default=nodes, metavar="N", help="default: 1" if nodes else None)
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="a rank on each (default: what the config needs)"
    )
    parser.add_argument("--cpus-per-node", type=int, metavar="C", help="default: what the ranks need")
    parser.add_argument("--time", metavar="T", help="limit: minutes, HH:MM:SS or D-HH:MM:SS")


def profile_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", help="settings of a cluster, from profiles.yaml (default: the one called default)")


def resume_elsewhere(options: argparse.Namespace, show: Print, examine: Check) -> int | None:
    """`resume` of a run that was submitted goes where it was; None for one to be trained here."""
    from symile_dist.launch.command import resubmitted, submit
    from symile_dist.launch.records import record_of

    record = record_of(options.run)
    backend = options.on or record["backend"]
    if backend in (None, "here"):
        options.run = record["run"]
        return None
    found, job = resubmitted(options, record | {"backend": backend})
    return _told(options, submit(found, [job], options, examine), show)


def _told(options: argparse.Namespace, told: list[dict[str, Any]], show: Print) -> int:
    from symile_dist.launch.command import wait

    several = getattr(options, "seeds", None) is not None
    words = "\n".join(map(_words, told))
    if not options.wait:
        return show(options, told if several else told[0], lambda: words)
    if not options.json:
        print(words, flush=True)
    codes = []
    for record in told:
        try:
            codes.append(wait(record, show=not options.json and not several))
        except KeyboardInterrupt:
            name = record["name"]
            print(f"{name}: not waited for any longer; the job goes on: symile-dist status {name}", file=sys.stderr)
            return 130
        if several and not options.json:
            print(f"{record['name']}: ended with exit code {codes[-1]}", flush=True)
    if options.json:
        ended = [{**record, "exit_code": code} for record, code in zip(told, codes, strict=True)]
        show(options, ended if several else ended[0], lambda: "")
    return next((code for code in codes if code), 0)


def _words(record: dict[str, Any]) -> str:
    name = record["name"]
    return (
        f"{name}: submitted, {record['backend']} job {record['handle'].get('id', record['job'])}\n"
        f"  how it is    symile-dist status {name}\n"
        f"  its words    symile-dist logs {name} -f\n"
        f"  stop it      symile-dist stop {name}"
    )
