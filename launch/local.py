"""This machine: a job in the background, on one Ray, or on as many nodes of Ray as are asked for, to try things out."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from symile_dist.launch.environment import plain_environment, refuse_references, taken_from_here
from symile_dist.launch.job import Job, JobStatus, State
from symile_dist.launch.processes import found, identity, pieces_of
from symile_dist.storage import read_json, write_json

SPECIFICATION, OUTPUT, EXIT_CODE = "local.json", "output.txt", "exit_code"


def state_of(code: int) -> State:
    """What an exit code of `symile-dist train` means; 75 and 130: it was asked to stop."""
    return "finished" if code == 0 else "stopped" if code in (75, 130) else "failed"


def exit_code_of(folder: Path) -> int | None:
    try:
        return int((folder / EXIT_CODE).read_text())
    except (OSError, ValueError):
        return None


class LocalBackend:
    """See `job.Backend`."""

    def check(self, job: Job) -> None:
        refuse_references(job, "secret")
        taken_from_here(job)
        self._specification(job)

    def _specification(self, job: Job) -> dict[str, Any]:
        if job.minutes:
            raise ValueError("--time: this machine ends no job by itself; leave it out with --on local")
        python = job.profile.python or sys.executable
        return {
            "command": [python, "-m", "symile_dist", *job.train_arguments(str(job.folder / "config.yaml"))],
            "nodes": job.nodes,
            "cpus_per_node": job.cpus_per_node,
            "gpus_per_node": job.gpus_per_node,
            "environment": plain_environment(job),
        }

    def render(self, job: Job) -> str:
        what = self._specification(job)
        ray = "a Ray of its own" if job.nodes == 1 else f"{job.nodes} nodes of Ray, {job.cpus_per_node} CPUs each"
        lines = [
            f"# on this machine, with {ray}",
            *(f"export {k}={shlex.quote(v)}" for k, v in what["environment"].items()),
        ]
        return "\n".join([*lines, shlex.join(what["command"])]) + "\n"

    def submit(self, job: Job) -> dict[str, Any]:
        write_json(job.folder / SPECIFICATION, self._specification(job))
        with open(job.folder / OUTPUT, "wb") as output:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "symile_dist.launch.local_job", str(job.folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | taken_from_here(job),
            )
        return {"folder": str(job.folder), "host": socket.gethostname(), "process": identity(supervisor.pid)}

    def status(self, handle: dict[str, Any]) -> JobStatus:
        here = handle["host"] == socket.gethostname()
        lives = here and found(handle["process"])  # first: what has ended by now has written its code
        code = exit_code_of(Path(handle["folder"]))
        facts = {"host": handle["host"], "pid": handle["process"]["pid"]}
        if code is not None:
            return JobStatus(state_of(code), code, f"on {handle['host']}", facts)
        if lives:
            return JobStatus("running", None, f"process {handle['process']['pid']} on this machine", facts)
        if not here:
            return JobStatus("unknown", None, f"it was started on {handle['host']}: ask there", facts)
        words = "its process has ended without a word: killed, or the machine was restarted"
        return JobStatus("lost", None, words, facts)

    def logs(self, handle: dict[str, Any], follow: bool) -> Iterator[str]:
        output = Path(handle["folder"]) / OUTPUT
        return pieces_of(output, follow, lambda: self.status(handle).state != "running")

    def stop(self, handle: dict[str, Any], now: bool) -> None:
        if handle["host"] != socket.gethostname():
            raise ValueError(f"the job runs on {handle['host']}: stop it there")
        process = found(handle["process"])
        if process:
            process.send_signal(signal.SIGINT if now else signal.SIGTERM)


def specification(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(folder / SPECIFICATION)
    return content
