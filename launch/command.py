"""submit, status, logs, stop, list: what the command line does with a run, wherever it lives."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from symile_dist.config import Config, load_config
from symile_dist.health.lease import holder_of, is_held
from symile_dist.launch.job import (
    ENDED,
    ArrayBackend,
    Job,
    JobStatus,
    backend_named,
    minutes_of,
    node_sizes,
    rank_overrides,
    seeds_of,
)
from symile_dist.launch.processes import pieces_of
from symile_dist.launch.profiles import Profile, profile_named
from symile_dist.launch.records import known_record, new_id, record_of, records, remember, submitting
from symile_dist.run_directory import RANKS_FILE, check, load_run, read_run
from symile_dist.storage import read_json, write_text

WAIT_SECONDS = 2.0
PATIENCE_SECONDS = 600.0
"""A backend that does not answer for so long is no longer waited for."""
FAILURES_TOLD = 5
"""Of those since the driver was started."""
SIZES = ("nodes", "gpus_per_node", "cpus_per_node", "time")
"""Options that a resumed job has from the one before."""
SHARING = ("local", "slurm")
"""Backends whose machines see this one's files; of the others the run's directory may be elsewhere."""


def job_of(config: Config, options: argparse.Namespace, profile: Profile, job_id: str, resume: bool) -> Job:
    """Raises ValueError where the nodes do not hold the config's ranks."""
    gpus, cpus = node_sizes(config, options.nodes, options.gpus_per_node, options.cpus_per_node)
    minutes = minutes_of(options.time) if options.time else None
    return Job(config.with_absolute_paths(), options.nodes, gpus, cpus, profile, job_id, minutes, resume)


def prepared(options: argparse.Namespace) -> tuple[str, list[Job]]:
    """(backend, jobs) of `submit`: one, or one for each of --seeds. Raises ValueError for whatever is wrong with them.

    A seed's run has the name, the directory and the mirror of the config with -seedS behind them.
    """
    profile = profile_named(options.profile)
    backend = options.on or profile.backend
    if not backend:
        raise ValueError("--on: where to? local, ray, kuberay or slurm (or a profile that says it)")
    backend_named(backend)
    given = list(options.overrides) + ([f"run.name={json.dumps(options.name)}"] if options.name else [])
    given += rank_overrides(options.nodes, options.gpus_per_node, given)
    if options.seeds is None:
        configs = [load_config(options.config, given).config]
    else:
        configs = _of_seeds(options.config, given, seeds_of(options.seeds))
    job_id = new_id(*(each.run_directory for each in configs))
    return backend, [job_of(each, options, profile, job_id, resume=False) for each in configs]


def _of_seeds(file: str, given: Sequence[str], seeds: Sequence[int]) -> list[Config]:
    """The config with each seed, and with places of its own."""
    if any(override.startswith("seed=") for override in given):
        raise ValueError("--seeds and seed=: say one of them")
    config = load_config(file, given).config
    mirror = config.checkpoint.mirror
    found = []
    for seed in seeds:
        ending = f"-seed{seed}"
        run = {"name": config.run.name + ending, "directory": f"{config.run_directory}{ending}"}
        checkpoint = {"mirror": mirror.rstrip("/") + ending if mirror else None}
        changes: dict[str, Any] = {
            "seed": seed,
            "run": config.run.model_copy(update=run),
            "checkpoint": config.checkpoint.model_copy(update=checkpoint),
        }
        found.append(config.model_copy(update=changes))
    return found


def resubmitted(options: argparse.Namespace, record: dict[str, Any]) -> tuple[str, Job]:
    """(backend, job) of `resume` on the machines on which a run was before."""
    before, given = record.get("job_sizes") or {}, list(options.overrides)
    resized = options.nodes is not None or options.gpus_per_node is not None
    for name in SIZES:
        if getattr(options, name) is None and (name != "time" or record["backend"] == before.get("backend")):
            setattr(options, name, before.get(name))
    options.nodes = options.nodes or 1
    options.profile = options.profile or record.get("profile")
    # Without new sizes the ranks are those that the run has.
    ranks = rank_overrides(options.nodes, options.gpus_per_node, given) if resized else []
    config = load_run(record["run"], [*given, *ranks])
    job_id = new_id(config.run_directory)
    return record["backend"], job_of(config, options, profile_named(options.profile), job_id, resume=True)


def backend_text(backend_name: str, jobs: Sequence[Job]) -> str:
    """What `submit` would submit."""
    backend = backend_named(backend_name)
    if isinstance(backend, ArrayBackend):
        return backend.render_array(jobs)
    return "\n".join(backend.render(job) for job in jobs)


def submit(
    backend_name: str, jobs: Sequence[Job], options: argparse.Namespace, examine: Callable[[Config, str], None]
) -> list[dict[str, Any]]:
    """Checks everything, then submits. Returns a record for each. Raises ValueError before anything is written, but
    where a backend takes one job after another and refuses a later one: those before it are named.

    Args:
        jobs: one, or several that differ in their seed.
        examine: raises ValueError where the config would fail at once on the backend of that name.
    """
    backend = backend_named(backend_name)
    directories = [job.config.run_directory for job in jobs]
    seen_here = backend_name in SHARING or directories[0].parent.is_dir()
    for job in jobs:
        if seen_here:
            check(job.config, fresh=False, resume=job.resume)
        _refuse_second(job.config.run_directory)
    if isinstance(backend, ArrayBackend):
        backend.check_array(jobs)
    else:
        for job in jobs:
            backend.check(job)
    examine(jobs[0].config, backend_name)
    given = {name: getattr(options, name, None) for name in SIZES} | {"backend": backend_name}
    submitted: list[dict[str, Any]] = []

    def take(part: Sequence[Job], handles: Sequence[dict[str, Any]]) -> None:
        for job, handle in zip(part, handles, strict=True):
            more = {"profile": getattr(options, "profile", None), "job_sizes": given}
            submitted.append(remember(job, backend_name, handle, **more))

    try:
        with submitting(directories):
            for directory in directories:
                _refuse_second(directory)  # another may have been faster
            if isinstance(backend, ArrayBackend):
                with _new_folders(jobs, seen_here):
                    handles = backend.submit_array(jobs)
                take(jobs, handles)
            else:
                for job in jobs:
                    with _new_folders([job], seen_here):
                        handle = backend.submit(job)
                    take([job], [handle])
    except OSError as error:
        words = f"{error.filename or directories[0]}: cannot be written: {error.strerror or error}"
        raise ValueError(words + _already(submitted)) from None
    except ValueError as error:
        if not submitted:
            raise
        raise ValueError(f"{error}{_already(submitted)}") from None
    return submitted


def _already(submitted: Sequence[dict[str, Any]]) -> str:
    names = ", ".join(record["name"] for record in submitted)
    return f" (submitted before it: {names})" if names else ""


@contextlib.contextmanager
def _new_folders(jobs: Sequence[Job], seen_here: bool) -> Iterator[None]:
    """The jobs' folders with their configs; they are taken away again where the jobs are not taken."""
    made: list[Path] = []
    try:
        for job in jobs if seen_here else ():
            made.append(next(path for path in (*reversed(job.folder.parents), job.folder) if not path.exists()))
            job.folder.mkdir(parents=True)
            write_text(job.folder / "config.yaml", job.config.to_yaml())
        yield
    except BaseException:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
        raise


def _refuse_second(directory: Path) -> None:
    """Raises ValueError where a job of the run is queued or under way."""
    record = known_record(directory)
    status = status_of(record)
    if status.state in ("queued", "running"):
        raise ValueError(
            f"{directory}: its job is {status.state} ({status.detail}); `symile-dist stop {directory}` first"
        )


def status_of(record: dict[str, Any]) -> JobStatus:
    """What the backend says; of a run that was not submitted, what its directory says."""
    directory = Path(record["run"])
    if record["backend"]:
        found = backend_named(record["backend"]).status(record["handle"])
        if found.state not in ENDED or not is_held(directory):
            return found
    told = read_run(directory).get("status", "unknown")
    if is_held(directory):  # in a terminal, perhaps after its job has ended
        holder = holder_of(directory)
        return JobStatus(
            "running", None, f"process {holder.get('process')} on {holder.get('host')}", {"holder": holder}
        )
    states: dict[str, Any] = {"finished": "finished", "unknown": "unknown"}
    states |= dict.fromkeys(("preempted", "interrupted", "forked"), "stopped")
    state = states.get(told, "lost" if told in ("running", "restarting", "starting") else "failed")
    return JobStatus(state, None, "not submitted: trained by `symile-dist train`")


def status(run: str) -> dict[str, Any]:
    """Everything that is known of a run: its job, and how far it is."""
    record = record_of(run)
    found = status_of(record)
    directory = Path(record["run"])
    known = read_run(directory)
    told: dict[str, Any] = {"name": record["name"], "run": record["run"], "on": record["backend"], **asdict(found)}
    told["job"] = record.get("job")
    for key in ("status", "message", "step", "restarts", "best_step", "best_value"):
        if key in known:
            told[f"run_{key}" if key in ("status", "message") else key] = known[key]
    told["failures"] = _dicts(known.get("failures"))
    told["ranks"] = _ranks(directory)
    progress = _last_step(directory / "history.jsonl")
    if progress:
        told |= {key: progress[key] for key in ("step", "loss", "samples_per_second") if key in progress}
    return told


def _dicts(content: Any) -> list[dict[str, Any]]:
    """Files may be cut, or written by hand."""
    return [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []


def _ranks(directory: Path) -> list[dict[str, Any]]:
    """Where each rank is, or last was."""
    try:
        rows = _dicts(read_json(directory / RANKS_FILE))
    except (OSError, ValueError):
        return []
    return [{key: row.get(key) for key in ("rank", "host", "pid")} for row in rows]


def _hosts(ranks: Sequence[dict[str, Any]]) -> str:
    """Host by host: `a: 0 1; b: 2 3`."""
    found: dict[str, list[str]] = {}
    for row in ranks:
        found.setdefault(str(row["host"]), []).append(str(row["rank"]))
    return "; ".join(f"{host}: {' '.join(numbers)}" for host, numbers in found.items())


def _printable(words: Any) -> str:
    """An escape sequence could do anything to the terminal."""
    return "".join(each if each.isprintable() else " " for each in str(words))


def _last_step(history: Path) -> dict[str, Any]:
    """The newest record of training."""
    try:
        with open(history, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("kind") == "train":
            return record
    return {}


def format_status(told: dict[str, Any]) -> str:
    code = f", exit code {told['exit_code']}" if told["exit_code"] is not None else ""
    lines = [f"{told['name']}: {told['state']}{code}", f"  where        {told['on'] or 'here'}: {told['detail']}"]
    if told.get("step") is not None:
        loss = f", loss {told['loss']:.4f}" if isinstance(told.get("loss"), float) else ""
        lines.append(f"  step         {told['step']}{loss}")
    if told["state"] == "running" and told.get("run_status") not in (None, "running"):
        lines.append(f"  it is        {_printable(told['run_status'])}")
    if told.get("restarts"):
        lines.append(f"  restarts     {told['restarts']}")
    for failure in told["failures"][-FAILURES_TOLD:]:
        lines.append(f"  failure      {_printable(failure.get('cause'))}: {_printable(failure.get('message'))}")
    if told["ranks"]:
        lines.append(f"  ranks        {_printable(_hosts(told['ranks']))}")
    if told.get("run_message"):
        lines.append(f"  message      {_printable(told['run_message'])}")
    return "\n".join([*lines, f"  directory    {told['run']}"])


def list_runs() -> list[dict[str, Any]]:
    """A row per run. A backend that cannot be asked is told in the row."""
    rows = []
    for record in records():
        try:
            found = status_of(record)
        except ValueError as error:
            found = JobStatus("unknown", None, str(error).splitlines()[0])
        step = _last_step(Path(record["run"]) / "history.jsonl").get("step")
        row = {"name": record["name"], "on": record["backend"], "state": found.state, "exit_code": found.exit_code}
        rows.append({**row, "step": step, "submitted": record.get("submitted"), "run": record["run"]})
    return rows


def runs_table(rows: list[dict[str, Any]]) -> Any:
    if not rows:
        return "no runs yet: symile-dist train CONFIG, or submit CONFIG --on ..."
    table = Table(box=None)
    for column in ("name", "on", "state", "step", "submitted", "directory"):
        table.add_column(column)
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["submitted"])) if row["submitted"] else ""
        step = "" if row["step"] is None else str(row["step"])
        table.add_row(row["name"], row["on"] or "here", row["state"], step, when, row["run"])
    return table


def logs(run: str, follow: bool, rank: int | None) -> Iterator[str]:
    """What a run's job, or one of its ranks, has written. Raises ValueError where that is not to be seen from here."""
    record = record_of(run)
    ended: Callable[[], bool] = lambda: status_of(record).state in ENDED  # noqa: E731
    if rank is None and record["backend"]:
        return backend_named(record["backend"]).logs(record["handle"], follow)
    if rank is None:
        raise ValueError(f"{run}: was not submitted, its words went to its terminal; --rank R has those of a rank")
    path = Path(record["run"]) / "logs" / f"rank-{rank:05d}.log"
    if not path.exists() and not (follow and path.parent.parent.is_dir()):
        there = sorted(int(file.stem[5:]) for file in path.parent.glob("rank-*.log")) if path.parent.is_dir() else []
        raise ValueError(f"{path}: not to be seen from here{f'; there are ranks {there}' if there else ''}")
    return pieces_of(path, follow, ended)


def stop(run: str, now: bool) -> str:
    """Returns what was done, in words. Raises ValueError where there is nothing to stop."""
    record = record_of(run)
    found = status_of(record)
    if found.state in ENDED:
        raise ValueError(f"{record['name']}: has ended already ({found.state})")
    holder = found.facts.get("holder")
    if holder is None:
        backend_named(record["backend"]).stop(record["handle"], now)
    elif holder.get("host") != socket.gethostname() or not isinstance(holder.get("process"), int):
        raise ValueError(
            f"{record['name']}: is held by process {holder.get('process')} on {holder.get('host')}; stop it there"
        )
    else:
        os.kill(holder["process"], signal.SIGINT if now else signal.SIGTERM)
    return f"{record['name']}: {'ended' if now else 'asked to save and stop'}"


def wait(record: dict[str, Any], show: bool) -> int:
    """Waits for a job, with its words if they are to be shown; returns its exit code."""
    backend = backend_named(record["backend"])
    with contextlib.suppress(ValueError):  # a connection that is lost: below it is asked again
        for piece in backend.logs(record["handle"], follow=True) if show else ():
            sys.stdout.write(piece)
            sys.stdout.flush()
    unanswered = 0
    while True:
        try:
            found, unanswered = backend.status(record["handle"]), 0
        except ValueError:
            unanswered += 1
            if unanswered * WAIT_SECONDS > PATIENCE_SECONDS:
                raise
        else:
            if found.state in ENDED:
                break
        time.sleep(WAIT_SECONDS)
    if found.exit_code is not None:
        return found.exit_code
    return {"finished": 0, "stopped": 75}.get(found.state, 1)
