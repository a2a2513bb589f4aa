"""Where a run's records go beside history.jsonl: TensorBoard always, Weights & Biases and MLflow where the config names
them, or a class of your own.

A logger takes records as `metrics.history` makes them. Each has a thread and a bounded queue of its own, so that one
that fails, hangs or is offline costs records and never training. Rank 0 alone has loggers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import symile_dist
from symile_dist.config import Config
from symile_dist.masking import masked_data
from symile_dist.registry import LOGGERS, build, check_options, resolve
from symile_dist.storage import error_words, read_json, write_json

logger = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
KEPT_FOLDER = "loggers"
"""In a run's directory: which run of a service its records belong to, over restarts."""

QUEUE_RECORDS = 10_000
FLUSH_SECONDS = 5.0
CLOSE_SECONDS = 15.0
"""How long a run waits for all of its loggers together before it goes on without them."""

Record = Mapping[str, Any]


class Logger(Protocol):
    """What takes records. All calls come from one thread; whatever a call raises is counted, and the next call comes
    all the same."""

    def write(self, record: Record) -> None:
        """Takes one record: {"kind", "step", "time" (Unix seconds), ...}. Steps go back where the run does."""

    def flush(self) -> None:
        """Called every few seconds while there are new records."""

    def close(self) -> None:
        """Called once, at the end, with no more than `CLOSE_SECONDS` to return in."""


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """What a logger is told of the run, as its argument `run`."""

    name: str
    directory: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved config as plain data, secrets masked."""
    code_version: str = symile_dist.__version__
    target_steps: int = 0
    """The step at which the run ends."""
    resume_step: int | None = None
    """The step that training goes on from; None where records are only added."""


MakeLogger = Callable[[int | None], Logger]
"""Makes a logger, given the step that training goes on from."""


def loggers_of(config: Config) -> dict[str, MakeLogger]:
    """What makes the loggers that a config names, for `History`; nothing is imported or opened yet."""
    run = LoggedRun(
        name=config.run.name,
        directory=config.run_directory,
        config=masked_data(config.model_dump(mode="json")),
        target_steps=config.train.steps,
    )

    def make(name: str, options: Mapping[str, Any], resume_step: int | None) -> Logger:
        made: Logger = build(name, options, LOGGERS, "logger", run=replace(run, resume_step=resume_step))
        return made

    return {name: partial(make, name, options) for name, options in config.metrics.loggers.items()}


def check_loggers(config: Config) -> None:
    """Raises ValueError for a logger that cannot be made here: its package or its class is missing, say. Reaches no
    service."""
    for name, options in config.metrics.loggers.items():
        target = resolve(name, LOGGERS, "logger")
        check_options(target, options, "logger", name, fixed=("run",))
        if hasattr(target, "check"):
            target.check(**options)


class BackgroundLogger:
    """A logger in a thread of its own, which also makes it. Nothing here raises or waits, but `join`."""

    def __init__(self, name: str, make: Callable[[], Logger], queue_records: int = QUEUE_RECORDS) -> None:
        """
        Args:
            name: for messages.
            make: called in the thread; where it fails, all records are left out.
            queue_records: more records than this that wait are left out.
        """
        self.name = name
        self.errors = 0
        """Records, or other calls, that failed."""
        self._lock = threading.Lock()
        self._queue: queue.Queue[Record] = queue.Queue(queue_records)
        self._closing, self._given_up = threading.Event(), threading.Event()
        # Daemon: a logger that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, args=(make,), name=f"logger-{name}", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        if self._given_up.is_set():
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._count(f"it does not keep up; more than {self._queue.maxsize} records wait for it")

    def close(self) -> None:
        """Asks it to write what waits and to end; `join` waits for that."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait({})  # wakes it up

    def join(self, deadline: float) -> None:
        """Waits until it has ended, no longer than until `deadline` (of time.monotonic)."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._given_up.set()
            self._count(f"it does not end; about {self._queue.qsize()} records are left out")

    def _count(self, problem: str | Exception) -> None:
        with self._lock:
            self.errors += 1
            first = self.errors == 1
        if first:
            words = problem if isinstance(problem, str) else _words(problem)
            logger.warning("logger '%s' is incomplete, training goes on: %s (said once)", self.name, words)

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except Exception as error:
            self._count(error)
            return None

    def _run(self, make: Callable[[], Logger]) -> None:
        made = self._attempt(make)
        if made is None:
            self._given_up.set()
            return
        flushed, dirty = time.monotonic(), False
        while not self._given_up.is_set():
            wait = None if not dirty else max(0.0, flushed + FLUSH_SECONDS - time.monotonic())
            try:
                record = self._queue.get(timeout=wait)
            except queue.Empty:
                record = {}
            if record:
                self._attempt(made.write, record)
                dirty = True
            if self._closing.is_set() and self._queue.empty():
                break
            if dirty and time.monotonic() >= flushed + FLUSH_SECONDS:
                self._attempt(made.flush)
                flushed, dirty = time.monotonic(), False
        if not self._given_up.is_set():
            if dirty:
                self._attempt(made.flush)
            self._attempt(made.close)


def numbers(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a record, NaN and Inf too, as (`kind/key`, value); those of its objects are `kind/key/inner`."""

    def walk(path: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from walk(f"{path}/{key}", inner)
        elif isinstance(value, (int, float)):
            yield path, value

    for key, value in record.items():
        if key not in ("kind", "step", "time"):
            yield from walk(f"{record['kind']}/{key}", value)


class TensorBoardLogger:
    """Event files in RUN/tensorboard. Imports torch."""

    def __init__(self, directory: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what older files hold from `purge_step` on.
        purge_step = None if resume_step is None else resume_step + 1
        folder = str(directory / TENSORBOARD_FOLDER)
        self._writer: Any = SummaryWriter(folder, purge_step=purge_step, flush_secs=30)

    def write(self, record: Record) -> None:
        for tag, value in numbers(record):
            self._guarded("add_scalar", tag, value, record["step"], record["time"])

    def flush(self) -> None:
        self._guarded("flush")

    def close(self) -> None:
        self._guarded("close")

    def _guarded(self, method: str, *arguments: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments)
        except Exception:
            # Its writer thread ends at the first failure, whatever the kind, and does not come back.
            self._writer = None
            raise


def _needs(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"metrics.loggers.{name}: the package '{package}' is not installed: pip install 'symile-dist[{name}]'"
        )


class WandbLogger:
    """Weights & Biases: the same run over restarts. The key is WANDB_API_KEY's, or that of `wandb login`.

    Sends the config, the version and the records' numbers, and nothing else: no output of the terminal, source code,
    list of packages or facts about the machine. Where the service cannot be reached at the start, the run is kept in
    RUN/wandb, for `wandb sync`.

    W&B's own step only ever grows, while a run's steps go back: charts are drawn over the metric `step`, and steps that
    are done again stand there twice, of which the later row counts.
    """

    @staticmethod
    def check(**_: Any) -> None:
        _needs("wandb", "wandb")

    def __init__(
        self,
        run: LoggedRun,
        project: str = "symile-dist",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
        base_url: str | None = None,
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb: Any = wandb
        self._target, self._step, self._failed = run.target_steps, 0, False
        kept = _kept(run.directory, "wandb")
        if "id" not in kept:
            kept = _keep(run.directory, "wandb", {"id": _stable_id(run.directory)})
        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "x_disable_meta": True,
            "x_disable_machine_info": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
            "init_timeout": 30.0,
            "finish_timeout": CLOSE_SECONDS,
        }
        if base_url:
            settings["base_url"] = base_url

        def begin(mode: str | None) -> Any:
            offline = (mode or os.environ.get("WANDB_MODE")) == "offline"
            return self._wandb.init(
                project=project,
                entity=entity,
                group=group,
                tags=list(tags) or None,
                name=run.name,
                id=kept["id"],
                resume=None if offline else "allow",  # offline it is the id that tells
                dir=str(run.directory),
                config={**run.config, "code_version": run.code_version},
                allow_val_change=True,
                mode=mode,
                reinit="create_new",
                settings=self._wandb.Settings(**settings),
            )

        try:
            self._run = begin(mode)
        except Exception as error:
            if mode == "offline":
                raise
            logger.warning("W&B is not reached, the run is kept in %s: %s", run.directory / "wandb", _words(error))
            self._run = begin("offline")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._step = max(self._step, record["step"])
        self._failed = self._failed or (record["kind"] == "end" and record.get("status") == "failed")
        values = dict(numbers(record))
        if values:
            self._run.log({"step": record["step"], **values})

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        done = self._step >= self._target and not self._failed
        self._run.finish(exit_code=0 if done else 1)
        if self._wandb.run is None:  # nobody else in this process uses it: its helper process ends now
            self._wandb.teardown()


class MlflowLogger:
    """MLflow: the same run over restarts. Credentials are those of its environment (MLFLOW_TRACKING_USERNAME, ...).

    The config becomes parameters and the version a tag, when the run is made; the records' numbers are sent together
    every few seconds, and those that the server does not take are kept for the next time, up to 50,000 of them. A step
    that is done again has several values, of which the latest counts.
    """

    BATCH, PENDING = 1000, 50_000
    """Metrics in one request, which is what the server allows; and metrics that wait."""

    @staticmethod
    def check(tracking_uri: str | None = None, **_: Any) -> None:
        _needs("mlflow", "mlflow")
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise ValueError(
                "metrics.loggers.mlflow: where to? Set its tracking_uri (a server or a folder) or MLFLOW_TRACKING_URI"
            )
        database = uri.partition("://")[0].partition("+")[0]
        if database in ("sqlite", "postgresql", "mysql", "mssql") and importlib.util.find_spec("sqlalchemy") is None:
            raise ValueError(f"metrics.loggers.mlflow: {database}:// needs MLflow's full package: pip install mlflow")

    def __init__(
        self,
        run: LoggedRun,
        tracking_uri: str | None = None,
        experiment: str = "symile-dist",
        tags: Mapping[str, str] | None = None,
    ) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        if "://" not in uri or uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it asks whether that is meant: it is
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client: Any = MlflowClient(tracking_uri=uri or None)
        self._logged, self._experiment, self._tags = run, experiment, dict(tags or {})
        # The same name on another server, or in another experiment, is another run.
        self._place = hashlib.sha256(f"{uri}\n{experiment}".encode()).hexdigest()[:16]
        self._run_id: str | None = None
        self._metrics: deque[Any] = deque(maxlen=self.PENDING)
        self._step, self._failed = 0, False

    def write(self, record: Record) -> None:
        self._step = max(self._step, record["step"])
        self._failed = self._failed or (record["kind"] == "end" and record.get("status") == "failed")
        milliseconds = int(record["time"] * 1000)
        for key, value in numbers(record):
            name = re.sub(r"[^\w\-. :/]", "_", key)[:250]
            self._metrics.append(self._metric(name, float(value), milliseconds, record["step"]))
        if len(self._metrics) == self.PENDING:
            raise RuntimeError("MLflow does not take records; the oldest are left out")

    def flush(self) -> None:
        if self._run_id is None:
            self._run_id = self._begin()
        while self._metrics:
            batch = [self._metrics[index] for index in range(min(self.BATCH, len(self._metrics)))]
            self._client.log_batch(self._run_id, metrics=batch, synchronous=True)
            for _ in batch:
                self._metrics.popleft()

    def close(self) -> None:
        if self._run_id is not None:
            done = "FINISHED" if self._step >= self._logged.target_steps else "KILLED"
            self._client.set_terminated(self._run_id, status="FAILED" if self._failed else done)

    def _begin(self) -> str:
        """The run's id at MLflow: that of the run's earlier starts where there is one."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        kept = _kept(self._logged.directory, "mlflow").get(self._place)
        if isinstance(kept, str):
            try:
                if self._client.get_run(kept).info.lifecycle_stage == "active":
                    self._client.update_run(kept, status="RUNNING")
                    return kept
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        found = self._client.get_experiment_by_name(self._experiment)
        place = found.experiment_id if found else self._client.create_experiment(self._experiment)
        tags = {"mlflow.source.name": "symile-dist", "symile_dist.version": self._logged.code_version, **self._tags}
        run_id = str(self._client.create_run(place, run_name=self._logged.name, tags=tags).info.run_id)
        _keep(self._logged.directory, "mlflow", {self._place: run_id})
        parameters = [Param(key[:250], str(value)[:500]) for key, value in _flat(self._logged.config)]
        for begin in range(0, len(parameters), 100):  # as many as the server takes at once
            self._client.log_batch(run_id, params=parameters[begin : begin + 100], synchronous=True)
        return run_id


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _kept(directory: Path, name: str) -> dict[str, Any]:
    try:
        content = read_json(directory / KEPT_FOLDER / f"{name}.json")
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _keep(directory: Path, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    content = {**_kept(directory, name), **values}
    write_json(directory / KEPT_FOLDER / f"{name}.json", content)
    return content


def _stable_id(directory: Path) -> str:
    """Of a run, from its directory and when it was made: a run that is moved aside and begun anew is another one."""
    created: Any = time.time()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        created = read_json(directory / "run.json").get("created", created)
    return hashlib.sha256(f"{directory.absolute()}\n{created}".encode()).hexdigest()[:16]


def _words(error: Exception) -> str:
    """An exception in one line that may be logged: keys of the environment and passwords in URLs are cut out."""
    text = error_words(error)
    for name, value in os.environ.items():
        if len(value) >= 6 and re.search(r"(KEY|TOKEN|PASSWORD|SECRET)", name):
            text = text.replace(value, f"<{name}>")
    return re.sub(r"://[^\s/@]+@", "://...@", text)
