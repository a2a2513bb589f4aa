"""What the driver shows of its run: metrics of its own, where all endpoints are, how the time was spent, the page."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import symile_dist
from symile_dist.config import Config
from symile_dist.health.restarts import Failure
from symile_dist.metrics.discovery import as_json, targets, write_targets
from symile_dist.metrics.exporter import Exporter, token_of
from symile_dist.metrics.goodput import Goodput, read_goodput, settled, write_goodput
from symile_dist.metrics.history import History
from symile_dist.metrics.http import Application, HttpServer
from symile_dist.metrics.names import RUN_STATES
from symile_dist.metrics.ranks import phases_of
from symile_dist.run_directory import tell_run, write_ranks
from symile_dist.view.page import page_application

logger = logging.getLogger(__name__)
WRITE_SECONDS = 5.0
"""From one writing of ranks.json and goodput.json to the next."""


class Monitor:
    """Of one driver. Nothing that goes wrong here ends the run. Safe to call from several threads."""

    def __init__(self, config: Config, host: str | None = None, began: float | None = None) -> None:
        """
        Args:
            host: how other machines call this one.
            began: when the driver did (time.monotonic()): its time counts from then on.
        """
        self._config, self._directory = config, config.run_directory
        self._lock = threading.RLock()
        self._goodput = Goodput(read_goodput(self._directory), began)
        self._ranks: dict[int, dict[str, Any]] = {}
        self._step = 0
        self._next_write = 0.0
        self._counted: dict[str, float] = {}
        self._exporter = Exporter(None, owner="driver") if config.metrics.enabled else None
        self._server: HttpServer | None = None
        if self._exporter:
            self._describe(self._exporter)
            settings = config.metrics
            page = page_application(self._directory)
            threading.Thread(target=page.read_ahead, daemon=True, name="history").start()
            application = _routed(
                {"/metrics": self._exporter.application, "/targets": _json_of(lambda: as_json(self._targets()))},
                page,
            )
            self._server = HttpServer(application, settings.address, settings.driver_port, token_of(config), host)
        tell_run(self._directory, page=self.url)
        self._write(now=True)

    @property
    def url(self) -> str | None:
        """Of the page; None where nothing is served."""
        return self._server.url("/") if self._server else None

    def _describe(self, exporter: Exporter) -> None:
        train = self._config.train
        described = {
            "version": symile_dist.__version__,
            "objective": self._config.objective.name,
            "precision": train.precision,
            "zero_stage": str(train.zero_stage),
        }
        exporter.set("symile_run_info", 1, **described)
        exporter.set("symile_run_expected_ranks", self._config.world_size)
        exporter.set("symile_run_target_steps", train.steps)
        exporter.set("symile_global_batch_size_samples", train.global_batch_size)
        for cause, count in self._goodput.restarts.items():
            exporter.increment("symile_run_restarts_total", count, cause=cause)

    def _targets(self) -> list[dict[str, Any]]:
        url = self._server.url("/metrics") if self._server else None
        with self._lock:
            ranks = [self._ranks[rank] for rank in sorted(self._ranks)]
        return targets(self._config.run.name, self._directory, url, ranks)

    # What happens

    def begun(self, config: Config) -> None:
        """A group of ranks is started, perhaps fewer than asked for."""
        if self._exporter:
            self._exporter.set("symile_run_expected_ranks", config.world_size)

    def joined(self, ranks: Mapping[int, dict[str, Any]]) -> None:
        """These ranks are there."""
        with self._lock:
            self._ranks = {rank: dict(told) for rank, told in ranks.items()}
        self._write(now=True)

    def take(self, record: Mapping[str, Any]) -> None:
        """A record of rank 0, as it comes."""
        with self._lock:
            kind = record.get("kind")
            self._step = int(record.get("step", self._step))
            if kind == "start":
                self._goodput.stepping()
            elif kind == "validation":
                self._goodput.spent("eval", float(record.get("seconds", 0.0)))
            elif kind == "checkpoint":
                self._goodput.spent("checkpoint", float(record["stall_seconds"]))
                self._goodput.saved(float(record["seconds"]))
                self._next_write = 0.0  # should this process be killed, what is saved is not taken for lost
            elif kind == "event" and "back_to" in record:
                self._goodput.went_back()
            elif kind == "ranks":
                self._take_ranks(record["table"])

    def _take_ranks(self, table: Iterable[Mapping[str, float]]) -> None:
        for rank, row in enumerate(table):
            told = {"step": self._step, "step_seconds": row["step_seconds"], "memory_bytes": row["memory_bytes"]}
            self._ranks.setdefault(rank, {"rank": rank}).update(told, phases=phases_of(row))

    def failed(self, failure: Failure) -> None:
        """A group of ranks has ended before the run has; none of its processes is left."""
        with self._lock:
            self._goodput.failed(failure.cause)
            step = self._step if failure.step is None else failure.step
        if self._exporter:
            self._exporter.increment("symile_run_restarts_total", cause=failure.cause)
        self._write(now=True)
        rank = {} if failure.rank is None else {"rank": failure.rank}
        self._record(("restart", step, {"cause": failure.cause, "message": failure.message, **rank}))

    def restarting(self) -> None:
        """A group of ranks has saved and ended, to begin again in another size."""
        with self._lock:
            self._goodput.restarting()
        self._write(now=True)
        self._record(("restart", self._step, {"cause": "rescaled", "message": "the cluster holds more ranks by now"}))

    def told(self) -> dict[str, Any]:
        """What no record says, for a view: see `TerminalView.tell`."""
        with self._lock:
            return {
                "goodput": self._goodput.seconds(),
                "ranks": len(self._ranks),
                "expected_ranks": self._config.world_size,
                "restarts": sum(self._goodput.restarts.values()),
            }

    def look(self) -> None:
        """To be called often: keeps the driver's metrics and files up to date."""
        self._write(now=False)

    def end(self, status: str, message: str) -> None:
        """The run has ended, for now. Its last group of ranks has.

        One that has failed or stopped itself stays on the list of endpoints with its driver, which does not answer any
        more: someone is to be told.
        """
        with self._lock:
            self._goodput.end()
        self._record(("end", self._step, {"status": status, "message": message}))
        self._write(now=True, left=self._targets()[:1] if status in ("failed", "stopped") else [])
        if self._server:
            self._server.close()
        tell_run(self._directory, page=None)

    # What is written

    def _record(self, *records: tuple[str, int, dict[str, Any]]) -> None:
        """Into the history, which between groups of ranks nobody else writes."""
        with self._lock:
            seconds = self._goodput.told()["seconds"]
        history = History(self._directory, tensorboard=False, repair=False)
        for kind, step, values in (*records, ("goodput", self._step, {"seconds": seconds})):
            history.write(kind, step, **values)
        history.close()

    def _write(self, now: bool, left: list[dict[str, Any]] | None = None) -> None:
        """`left`: the endpoints that a run leaves behind which has ended."""
        with self._lock:
            if self._exporter:
                self._count_seconds(self._exporter)
            if not now and time.monotonic() < self._next_write:
                return
            self._next_write = time.monotonic() + WRITE_SECONDS
            told, ranks = self._goodput.told(ended=left is not None), dict(self._ranks)
        try:
            write_ranks(self._directory, ranks)
            write_goodput(self._directory, told)
            write_targets(self._directory, self._targets() if left is None else left)
        except OSError as error:  # a full disk, say: the run goes on
            logger.warning("%s: what it shows of the run is out of date: %s", self._directory, error)

    def _count_seconds(self, exporter: Exporter) -> None:
        seconds = self._goodput.seconds()
        for state in RUN_STATES:
            more = seconds[state] - self._counted.get(state, 0.0)
            exporter.increment("symile_run_time_seconds_total", max(0.0, more), state=state)
            self._counted[state] = seconds[state]


def settle(directory: Path) -> None:
    """Ends what a driver that was killed has left of a run that is found to be at its end."""
    try:
        write_targets(directory, [])
        account = read_goodput(directory)
        if account and not account["ended"]:
            write_goodput(directory, settled(account))
    except OSError as error:
        logger.warning("%s: what it shows of the run is out of date: %s", directory, error)


def _routed(routes: Mapping[str, Application], rest: Application) -> Application:
    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        route = routes.get(environ.get("PATH_INFO", "/"))
        if route and environ["REQUEST_METHOD"] != "GET":
            start_response("405 Method Not Allowed", [("Allow", "GET"), ("Content-Type", "text/plain")])
            return [b""]
        return (route or rest)(environ, start_response)

    return application


def _json_of(content: Callable[[], bytes]) -> Application:
    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
        return [content()]

    return application
