"""A Ray cluster that is there: the job is one of Ray's own jobs, submitted over its dashboard's address."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import json
import os
import shlex
import shutil
import socket
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from symile_dist.environment import LAUNCH
from symile_dist.launch.environment import plain_environment, refuse_references
from symile_dist.launch.job import Job, JobStatus, State
from symile_dist.launch.local import state_of

STATES: dict[str, State] = {
    "PENDING": "queued",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "STOPPED": "stopped",
}
IGNORED = [
    ".env*",
    "*.pem",
    ".aws",
    ".ssh",
    ".netrc",
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    ".*_cache",
    "*.egg-info",
    "node_modules",
    "data",
    "runs",
    "*.tar",
]
CONFIG = ".symile-dist.yaml"


class RayJobsBackend:
    """See `job.Backend`."""

    def check(self, job: Job) -> None:
        refuse_references(job, "env", "secret")  # Ray shows a job's environment on its dashboard
        self._description(job)
        address = address_of(job)
        _client(address, job.profile.ray.token)
        staged_files(job)

    def _description(self, job: Job) -> dict[str, Any]:
        if job.minutes:
            raise ValueError("--time: Ray ends no job by itself; leave it out with --on ray")
        python = job.profile.python or sys.executable
        record = {"name": job.name, "job": job.id, "backend": "ray", "handle": self._handle(job, address_of(job))}
        environment = plain_environment(job) | {
            # Ray kills what has not ended by itself after this.
            "RAY_JOB_STOP_WAIT_TIME_S": str(int(job.config.ray.grace_seconds) + 15),
            LAUNCH: json.dumps(record),
        }
        return {
            "submission_id": f"{job.name}-{job.id}",
            "entrypoint": shlex.join([python, "-m", "symile_dist", *job.train_arguments(CONFIG)]),
            "runtime_env": {"env_vars": environment},
            "metadata": {"run": str(job.config.run_directory)},
        }

    def _handle(self, job: Job, address: str) -> dict[str, Any]:
        token = job.profile.ray.token
        return {"id": f"{job.name}-{job.id}", "address": address} | ({"token": token} if token else {})

    def render(self, job: Job) -> str:
        import yaml

        content = {**self._description(job), "address": address_of(job), "working_dir": staged_files(job)}
        text: str = yaml.safe_dump(content, sort_keys=False, width=120)
        return text

    def submit(self, job: Job) -> dict[str, Any]:
        address, what = address_of(job), self._description(job)
        client = _client(address, job.profile.ray.token)
        with tempfile.TemporaryDirectory(prefix="symile-") as folder:
            for name in staged_files(job):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(job.profile.ray.working_dir or ".").expanduser() / name, Path(folder) / name)
            (Path(folder) / CONFIG).write_text(job.config.to_yaml(), encoding="utf-8")
            what["runtime_env"]["working_dir"] = folder
            try:
                client.submit_job(**what)
            except Exception as error:
                raise ValueError(f"--on ray: the cluster at {address} did not take the job: {error}") from None
        return self._handle(job, address)

    def status(self, handle: dict[str, Any]) -> JobStatus:
        client = _client(handle["address"], handle.get("token"))
        try:
            info = client.get_job_info(handle["id"])
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return JobStatus("lost", None, f"the cluster at {handle['address']} knows no job {handle['id']}")
            raise ValueError(f"ray: {error}") from None
        state, code = STATES.get(str(info.status.value), "unknown"), info.driver_exit_code
        if state == "failed" and code is not None:
            state = state_of(code)
        ended = state not in ("queued", "running")
        words = f"{handle['id']} on {handle['address']}: {str(info.status.value).lower()}"
        if state == "failed" and code is None and info.message:
            words += f": {info.message.strip().splitlines()[0]}"
        return JobStatus(state, code if ended else None, words, {"id": handle["id"], "address": handle["address"]})

    def logs(self, handle: dict[str, Any], follow: bool) -> Iterator[str]:
        client = _client(handle["address"], handle.get("token"))
        try:
            if not follow:
                yield client.get_job_logs(handle["id"])
                return
            pieces = client.tail_job_logs(handle["id"])
            with contextlib.closing(asyncio.new_event_loop()) as loop, contextlib.suppress(StopAsyncIteration):
                while True:
                    yield loop.run_until_complete(anext(pieces))
        except RuntimeError as error:
            raise ValueError(f"ray: {error}") from None

    def stop(self, handle: dict[str, Any], now: bool) -> None:
        if now:
            raise ValueError("--now: Ray gives every job its time to save; leave it out")
        client = _client(handle["address"], handle.get("token"))
        try:
            client.stop_job(handle["id"])
        except RuntimeError as error:
            raise ValueError(f"ray: {error}") from None


def address_of(job: Job) -> str:
    """Of the cluster's dashboard. Raises ValueError where none is known."""
    given = job.profile.ray.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not given:
        raise ValueError(
            "--on ray: which cluster? Name its dashboard's address: RAY_API_SERVER_ADDRESS=http://HOST:8265, or "
            "`ray: {address: ...}` in a profile"
        )
    if not given.startswith(("http://", "https://")):
        raise ValueError(f"--on ray: {given} is not the address of a dashboard, such as http://HOST:8265")
    return given.rstrip("/")


def staged_files(job: Job) -> list[str]:
    """Names of the files of the profile's working_dir that go along. Raises ValueError where these are too much."""
    profile = job.profile.ray
    if not profile.working_dir:
        return []
    root = Path(profile.working_dir).expanduser()
    if not root.is_dir():
        raise ValueError(f"ray.working_dir: {root} is not a folder")
    ignored = [*IGNORED, *profile.ignore]

    def is_ignored(relative: Path) -> bool:
        return any(fnmatch.fnmatch(relative.name, p) or fnmatch.fnmatch(str(relative), p) for p in ignored)

    names, size = [], 0
    for folder, folders, files in os.walk(root):
        at = Path(folder).relative_to(root)
        folders[:] = sorted(name for name in folders if not is_ignored(at / name))
        for name in sorted(files):
            if not is_ignored(at / name):
                names.append(str(at / name))
                size += (root / at / name).stat().st_size
                if size > profile.max_megabytes * 1e6:
                    raise ValueError(
                        f"ray.working_dir: {root} holds more than {profile.max_megabytes} MB; leave out what the job "
                        f"does not need (ray.ignore; data and runs are left out anyway), or raise ray.max_megabytes"
                    )
    return names


def _client(address: str, token: str | None) -> Any:
    """Raises ValueError where nothing answers at the address, or the token is not its."""
    where = urllib.parse.urlsplit(address)
    try:
        port = where.port or (443 if where.scheme == "https" else 80)
        socket.create_connection((where.hostname or "", port), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--on ray: nothing answers at {address} ({error}); is the cluster's dashboard there?"
        ) from None
    headers = {"Authorization": f"Bearer {_token(token)}"} if token else None
    from ray.job_submission import JobSubmissionClient

    try:
        with contextlib.redirect_stdout(sys.stderr):
            return JobSubmissionClient(address, headers=headers)
    except Exception as error:
        words = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "auth" in type(error).__name__.lower() or "401" in words or "403" in words:
            words = (
                "it asks for a token, and got none or another one: set RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH, or `ray: {token: file:/path}` in a profile"
            )
        raise ValueError(f"--on ray: {address}: {words}") from None


def _token(reference: str) -> str:
    kind, _, place = reference.partition(":")
    try:
        return os.environ[place] if kind == "env" else Path(place).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, KeyError):
        raise ValueError(f"ray.token: {reference} is not there") from None
