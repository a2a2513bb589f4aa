"""Prometheus itself: what it is told, and one of one's own on loopback, with Alertmanager where that is wanted."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import yaml

from symile_dist.errors import RunFailed
from symile_dist.tools.monitoring.alerts import duration

JOB = "symile-dist"
RULES_FILE, CONFIG_FILE, TARGETS_FILE, LOG_FILE, DATA = "rules.yml", "prometheus.yml", "targets.json", "log.txt", "data"
SAMPLE_LIMIT = 2000
"""Of one endpoint; a rank has some 250 series, and fewer than 400 with many modalities and directions."""
PR_SET_PDEATHSIG = 1
READY_SECONDS = 60.0
END_SECONDS = 10.0
KEPT = "60d"
INSTALL = (
    "install it (Debian, Ubuntu: apt-get install {package}; elsewhere: a binary from https://prometheus.io/download "
    "in PATH), or use configs/monitoring/docker-compose.yml"
)


class Program(NamedTuple):
    """One of the two servers."""

    names: tuple[str, ...]
    """Of the command: Debian's name differs from the project's."""
    package: str


PROMETHEUS = Program(("prometheus",), "prometheus")
ALERTMANAGER = Program(("alertmanager", "prometheus-alertmanager"), "prometheus-alertmanager")


def find(program: Program) -> str:
    """Path of the command. Raises ValueError where there is none."""
    for name in program.names:
        path = shutil.which(name)
        if path:
            return path
    raise ValueError(f"the command {program.names[0]} is not in PATH: {INSTALL.format(package=program.package)}")


def scrape_config(
    targets_file: str | None = TARGETS_FILE,
    targets_url: str | None = None,
    *,
    rule_files: Sequence[str] = (RULES_FILE,),
    scrape_seconds: float = 15.0,
    refresh_seconds: float = 15.0,
    alertmanager: str | None = None,
    token_file: str | None = None,
) -> dict[str, Any]:
    """What Prometheus is told. The labels run, run_id, role, rank and host come with the endpoints.

    Args:
        targets_file: the list of endpoints (file_sd); as RUN/targets.json, or several runs' together.
        targets_url: where a driver serves the list (HTTP SD): http://HOST:PORT/targets.
        alertmanager: HOST:PORT.
        token_file: what metrics.token_file of the runs is, where they have one.
    """
    job: dict[str, Any] = {"job_name": JOB, "sample_limit": SAMPLE_LIMIT}
    if targets_file:
        # It is told of changes on a local disk, and looks so often elsewhere.
        job["file_sd_configs"] = [{"files": [targets_file], "refresh_interval": duration(refresh_seconds)}]
    if targets_url:
        job["http_sd_configs"] = [{"url": targets_url, "refresh_interval": "5s"}]
    if token_file:
        job["authorization"] = {"type": "Bearer", "credentials_file": token_file}
        for each in job.get("http_sd_configs", []):
            each["authorization"] = job["authorization"]
    interval = duration(scrape_seconds)
    made: dict[str, Any] = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": list(rule_files),
        "scrape_configs": [job],
    }
    if alertmanager:
        made["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    return made


def config_text(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, width=120, allow_unicode=True)


def refuse_taken(port: int, what: str) -> None:
    """Raises ValueError where something listens on a port of loopback already."""
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: one that has just ended
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"--port: {what} cannot listen on 127.0.0.1:{port}: {error.strerror}") from None


class Client:
    """Asks a Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str | float) -> Any:
        """`data` of an answer of /api/v1/`path`. Raises ValueError where the question is wrong."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{path} {parameters}: {error.read().decode(errors='replace')}") from None

    def query(self, expression: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of each series, now or at a Unix time."""
        data = self.get("query", query=expression, **({} if at is None else {"time": at}))
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(series["metric"], float(series["value"][1])) for series in data["result"]]

    def query_range(
        self, expression: str, start: float, end: float, step: float
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """(labels, [(Unix time, value), ...]) of each series."""
        data = self.get("query_range", query=expression, start=start, end=end, step=step)
        return [
            (series["metric"], [(float(moment), float(value)) for moment, value in series["values"]])
            for series in data["result"]
        ]

    def alerts(self, state: str = "firing") -> list[dict[str, str]]:
        """Labels of the alerts that are `firing`, or `pending`."""
        return [alert["labels"] for alert in self.get("alerts")["alerts"] if alert["state"] == state]

    def targets(self) -> list[dict[str, Any]]:
        """Its endpoints, with `labels`, `health` and `lastError`."""
        found: list[dict[str, Any]] = self.get("targets", state="active")["activeTargets"]
        return found


class Server:
    """A Prometheus or an Alertmanager on loopback. It ends with this object, and (Linux) with the thread that made it,
    however that ends."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        """Raises RunFailed, with its last words, where it does not come up."""
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._name = Path(command[0]).name
        self._log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,  # Ctrl-C is for this process alone
                preexec_fn=_end_with_parent,
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                return
            time.sleep(0.05)
        self.check()
        raise RunFailed(f"{self._name} is not ready after {READY_SECONDS:g} s; see {self._log}")

    def check(self) -> None:
        """Raises RunFailed where it has ended."""
        if self.process.poll() is not None:
            words = self._log.read_text(errors="replace").splitlines()[-3:]
            raise RunFailed(f"{self._name} has ended (exit code {self.process.returncode}): {' / '.join(words)}")

    def close(self) -> None:
        """Ends it; may be called twice."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Prometheus(Server, Client):
    """A Prometheus over the files of a folder: prometheus.yml, and what that names. Its data is kept in data/."""

    def __init__(self, folder: Path, port: int) -> None:
        """Raises ValueError where the command is missing, RunFailed where it does not come up."""
        super().__init__(
            [
                find(PROMETHEUS),
                f"--config.file={folder / CONFIG_FILE}",
                f"--storage.tsdb.path={folder / DATA}",
                f"--storage.tsdb.retention.time={KEPT}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            port,
            folder / LOG_FILE,
        )


def free_port() -> int:
    """One that nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def prometheus_over(
    folder: Path, targets_file: Path, *, rules_text: str = "", scrape_seconds: float = 1.0, port: int = 0
) -> Iterator[Prometheus]:
    """A Prometheus of its own for a list of endpoints, in a folder that holds its files; it ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RULES_FILE).write_text(rules_text or "groups: []\n", encoding="utf-8")
    config = scrape_config(str(targets_file.absolute()), scrape_seconds=scrape_seconds)
    (folder / CONFIG_FILE).write_text(config_text(config), encoding="utf-8")
    with Prometheus(folder, port or free_port()) as server:
        yield server


def start_alertmanager(folder: Path, config: Path, port: int) -> Server:
    """An Alertmanager on loopback, which talks to no other. Raises as `Prometheus`."""
    return Server(
        [
            find(ALERTMANAGER),
            f"--config.file={config}",
            f"--storage.path={folder / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
            "--log.level=warn",
        ],
        port,
        folder / LOG_FILE,
    )


def _end_with_parent() -> None:
    """In the child: SIGTERM comes when its parent ends (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
