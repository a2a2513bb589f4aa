"""Loggers beside history.jsonl: W&B and MLflow for real, offline; what fails, hangs or goes back; the config."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from symile_dist.config import LOGGER_OPTIONS, Config, ConfigError, parse_config
from symile_dist.metrics import loggers
from symile_dist.metrics.history import HISTORY_FILE, History, read_history
from symile_dist.metrics.loggers import LoggedRun, check_loggers, loggers_of, numbers
from symile_dist.registry import LOGGERS, resolve
from symile_dist.storage import write_json

CONFIG = """
run: {name: logged, directory: %s}
data: {train: data/train}
modalities:
  image: &modality {member: npy, decoder: npy, transform: tensor, encoder: identity}
  audio: *modality
  text: {member: txt, decoder: text, transform: tensor, encoder: mlp}
train: {steps: 6, global_batch_size: 8}
metrics: {loggers: %s}
"""


def config_of(directory: Path, named: Mapping[str, Any]) -> Config:
    return parse_config(CONFIG % (directory, json.dumps(named)), "test.yaml").config


def open_history(config: Config, resume_step: int | None = None, seconds: float = 60.0) -> History:
    return History(
        config.run_directory, resume_step, tensorboard=False, loggers=loggers_of(config), close_seconds=seconds
    )


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:g} s still not: {what}"
        time.sleep(0.02)


class Kept:
    """A logger of one's own, which keeps what it is given; `made` has all of them."""

    made: list[Kept] = []  # noqa: RUF012

    def __init__(self, run: LoggedRun, colour: str = "red") -> None:
        self.run, self.colour = run, colour
        self.records: list[Mapping[str, Any]] = []
        self.closed = False
        self.threads: set[str] = set()
        Kept.made.append(self)

    def write(self, record: Mapping[str, Any]) -> None:
        self.threads.add(threading.current_thread().name)
        self.records.append(record)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Failing(Kept):
    """Takes only every second record."""

    def write(self, record: Mapping[str, Any]) -> None:
        if record["step"] % 2:
            key = os.environ["SOME_API_KEY"]
            raise ConnectionError(f"https://me:{key}@host/ says no to {key}")
        super().write(record)


class Unmade(Kept):
    def __init__(self, run: LoggedRun) -> None:
        raise RuntimeError("no server")


class Hanging(Kept):
    """Comes back when `release` is set."""

    release = threading.Event()

    def write(self, record: Mapping[str, Any]) -> None:
        super().write(record)
        Hanging.release.wait(60)


@pytest.fixture(autouse=True)
def forget() -> None:
    Kept.made.clear()
    Hanging.release.clear()


def one(name: str) -> str:
    return f"{__name__}:{name}"


# What every logger has


def test_numbers_of_a_record() -> None:
    record = {"kind": "train", "step": 1, "time": 2.0, "loss": math.inf, "phases": {"forward": 1.5}, "note": "text"}
    assert dict(numbers(record)) == {"train/loss": math.inf, "train/phases/forward": 1.5}


def test_a_logger_of_ones_own_gets_run_and_records(tmp_path: Path) -> None:
    config = config_of(tmp_path, {one("Kept"): {"colour": "blue"}})
    check_loggers(config)
    history = open_history(config, resume_step=3)
    first = history.write("train", 4, samples_seen=32, loss=math.nan)
    history.write("event", 4, message="words")
    history.close()
    (logger,) = Kept.made
    assert logger.colour == "blue" and logger.closed
    assert logger.run.name == "logged" and logger.run.resume_step == 3 and logger.run.target_steps == 6
    assert logger.run.config["train"]["steps"] == 6 and logger.run.directory == tmp_path
    assert [record["kind"] for record in logger.records] == ["train", "event"] and logger.records[0] is first
    assert threading.current_thread().name not in logger.threads, "it ran in the thread of training"
    assert history.write_errors == 0


def test_a_failing_logger_costs_its_records_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef")
    history = open_history(config_of(tmp_path, {one("Failing"): None, one("Kept"): {}}))
    for step in range(1, 7):
        history.write("train", step, loss=1.0)
    history.close()
    failing, kept = Kept.made
    assert [record["step"] for record in failing.records] == [2, 4, 6]
    assert [record["step"] for record in kept.records] == [1, 2, 3, 4, 5, 6] and kept.closed and failing.closed
    assert history.write_errors == 3
    assert caplog.text.count("is incomplete, training goes on") == 1
    assert "0123456789abcdef" not in caplog.text and "says no" in caplog.text
    assert len(read_history(tmp_path / HISTORY_FILE)) == 6


def test_a_logger_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = open_history(config_of(tmp_path, {one("Unmade"): {}}))
    for step in range(100):
        history.write("train", step, loss=1.0)
    history.close()
    assert history.write_errors == 1 and "no server" in caplog.text
    assert len(read_history(tmp_path / HISTORY_FILE)) == 100


def test_a_hanging_logger_holds_up_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = open_history(config_of(tmp_path, {one("Hanging"): {}, one("Kept"): {}}), seconds=1.0)
    history._loggers[0]._queue.maxsize = 50
    begin = time.monotonic()
    for step in range(1, 201):
        history.write("train", step, loss=1.0)
    assert time.monotonic() - begin < 5, "writing waited for the logger"
    hanging, kept = Kept.made
    until(lambda: len(hanging.records) == 1, "the first record came")
    begin = time.monotonic()
    history.close()
    assert 0.5 < time.monotonic() - begin < 10, "close waits as long as it was given, and no longer"
    assert len(kept.records) == 200 and kept.closed, "another logger is written to the end"
    assert 149 <= history.write_errors <= 151, "those that found the queue full, and the end that did not come"
    assert caplog.text.count("is incomplete, training goes on") == 1
    Hanging.release.set()
    until(lambda: not history._loggers[0]._thread.is_alive(), "the thread has ended")
    assert len(hanging.records) == 1 and not hanging.closed, "nothing is written any more once it was given up"
    assert len(read_history(tmp_path / HISTORY_FILE)) == 200


def test_a_process_ends_while_a_logger_hangs(tmp_path: Path) -> None:
    code = (
        "import sys, time; from symile_dist.metrics.history import History\n"
        "history = History(sys.argv[1], tensorboard=False, loggers={'hangs': lambda step: time.sleep(600)},"
        " close_seconds=0.2)\n"
        "history.write('train', 1, loss=1.0); history.close(); print('closed')"
    )
    begin = time.monotonic()
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "closed\n" and time.monotonic() - begin < 30


# The config


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"wandbb": {}}, r"metrics.loggers.wandbb: unknown logger 'wandbb'; did you mean 'wandb'\?"),
        ({"wandb": {"projct": "x"}}, r"metrics.loggers.wandb.projct: unknown option; did you mean 'project'\?"),
        ({"wandb": {"mode": "offlin"}}, r"metrics.loggers.wandb.mode: should be 'online' or 'offline'"),
        ({"mlflow": {"experiment": 3}}, r"metrics.loggers.mlflow.experiment: should be a valid string"),
        ({"wandb": {"api_key": "hidden-value"}}, r"metrics.loggers.wandb.api_key: secrets stand in no config"),
        ({"mlflow": {"tracking_uri": "https://me:hidden-value@host"}}, r"must not hold a password"),
        ({"mlflow": {"tracking_uri": "sqlite:///mlflow.db"}}, r"should name an absolute path"),
        ({"no_such_package:Logger": {}}, r"no package 'no_such_package' is found"),
        ({one("Kept"): {"auth_token": "hidden-value"}}, r"secrets stand in no config"),
    ],
)
def test_mistakes_are_told_by_the_config(named: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config_of(tmp_path, named)
    assert "hidden-value" not in str(caught.value), "the value of what may be a secret is shown"


def test_unknown_option_of_ones_own_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown option 'color'; did you mean 'colour'"):
        check_loggers(config_of(tmp_path, {one("Kept"): {"color": "red"}}))


def test_config_without_the_packages(tmp_path: Path) -> None:
    code = (
        "import sys; from symile_dist.config import parse_config; from symile_dist.metrics.loggers import loggers_of\n"
        "loggers_of(parse_config(sys.argv[1], 'c').config)\n"
        "sys.exit(' '.join({'wandb', 'mlflow', 'torch', 'ray'} & set(sys.modules)) or 0)"
    )
    text = CONFIG % (tmp_path, '{"wandb": {"mode": "offline"}, "mlflow": null}')
    done = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"imported: {done.stderr}"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_absent_package_is_told_before_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda package: None)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=rf"pip install 'symile-dist\[{name}\]'"):
        check_loggers(config_of(tmp_path, {name: {}}))


@pytest.mark.parametrize("name", list(LOGGERS))
def test_options_of_config_and_class_agree(name: str) -> None:
    import inspect

    target = resolve(name, LOGGERS, "logger")
    assert list(inspect.signature(target).parameters)[1:] == list(LOGGER_OPTIONS[name].model_fields)


def test_order_paths_and_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"mlflow": {"tracking_uri": "mlruns"}, "wandb": {}}
    config = config_of(tmp_path, named).with_absolute_paths()
    assert list(config.metrics.loggers) == ["mlflow", "wandb"]
    assert config.metrics.loggers["mlflow"]["tracking_uri"] == str(tmp_path / "mlruns")
    assert config.digest() == config_of(tmp_path, {}).with_absolute_paths().digest()
    for uri in ("http://host:5000", "databricks", f"sqlite:///{tmp_path}/a.db"):
        same = config_of(tmp_path, {"mlflow": {"tracking_uri": uri}}).with_absolute_paths()
        assert same.metrics.loggers["mlflow"]["tracking_uri"] == uri


# Weights & Biases, offline


def wandb_records(file: Path) -> list[Any]:
    """The protobuf records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole, found = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B", "not a .wandb file"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # the end of a block is filled with zeros
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            record = Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    def key(item: Any) -> str:
        return item.key or "/".join(item.nested_key)

    records = [record.history for record in wandb_records(file) if record.WhichOneof("record_type") == "history"]
    return [{key(item): json.loads(item.value_json) for item in history.item} for history in records]


def helper_processes() -> set[str]:
    found = set()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if "wandb-core" in words and f"--pid {os.getpid()}" in words:
            found.add(place.parent.name)
    return found


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'symile-dist[wandb]'")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": "5ec4e7" * 7,  # never to be seen
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)


def test_wandb_keeps_the_same_run_over_restarts_and_rollbacks(
    tmp_path: Path, wandb_offline: None, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "run.json", {"created": 1e9})
    config = config_of(run, {"wandb": {"project": "cubes", "mode": "offline", "tags": ["a"]}})
    check_loggers(config)
    history = open_history(config)
    for step in range(1, 5):
        history.write("train", step, samples_seen=8 * step, loss=float(step), phases={"forward": 0.5})
    history.write("event", 4, message="not a number")
    history.close()
    assert history.write_errors == 0 and not helper_processes(), "W&B's helper process is left"
    identity = (run / "loggers" / "wandb.json").read_text()
    history = open_history(config, resume_step=2)
    for step in range(3, 7):
        history.write("train", step, samples_seen=8 * step, loss=math.nan if step == 4 else 10.0 * step)
    history.close()
    assert history.write_errors == 0 and not helper_processes(), "W&B's helper process is left"
    assert (run / "loggers" / "wandb.json").read_text() == identity

    files = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 2 and {f"run-{json.loads(identity)['id']}.wandb"} == {file.name for file in files}
    first, second = map(wandb_rows, files)
    assert [(row["step"], row["train/loss"], row["train/phases/forward"]) for row in first] == [
        (step, float(step), 0.5) for step in range(1, 5)
    ]
    assert [(row["step"], row["train/loss"]) for row in second if row["step"] != 4] == [(3, 30), (5, 50), (6, 60)]
    assert second[1]["train/loss"] == "NaN" or math.isnan(second[1]["train/loss"])
    (told,) = [record.run for record in wandb_records(files[0]) if record.WhichOneof("record_type") == "run"][:1]
    settings = {item.key: item.value_json for item in told.config.update}
    assert told.project == "cubes" and told.display_name == "logged" and list(told.tags) == ["a"]
    assert json.loads(settings["train"])["steps"] == 6 and "code_version" in settings
    metrics = [record.metric for record in wandb_records(files[0]) if record.WhichOneof("record_type") == "metric"]
    assert any("step" in (metric.step_metric, metric.name) for metric in metrics), "no axis is told"
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or ("5ec4e7" * 7).encode() not in file.read_bytes(), f"the key stands in {file}"
    assert "5ec4e7" not in "".join(capfd.readouterr())


def test_wandb_begins_another_run_in_a_directory_made_anew(tmp_path: Path) -> None:
    def identity(created: float) -> str:
        write_json(tmp_path / "run.json", {"created": created})
        return loggers._stable_id(tmp_path)

    assert identity(1.0) == identity(1.0) != identity(2.0)


def test_wandb_that_is_not_reached_is_kept_here(
    tmp_path: Path, wandb_offline: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    begin = wandb.init

    def init(**options: Any) -> Any:
        if options["mode"] != "offline":
            raise wandb.errors.CommError(f"no route to host, key {os.environ['WANDB_API_KEY']}")
        return begin(**options)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE")
    history = open_history(config_of(tmp_path, {"wandb": {}}))
    history.write("train", 6, loss=1.0)
    history.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [row["train/loss"] for row in wandb_rows(file)] == [1.0]
    assert "no route to host" in caplog.text and "5ec4e7" not in caplog.text and not helper_processes()


# MLflow, with a store in a folder


@pytest.fixture
def mlflow_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'symile-dist[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return str(tmp_path / "store")


def only_run(uri: str, experiment: str = "symile-dist") -> tuple[Any, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None, f"there is no experiment {experiment}"
    (run,) = client.search_runs([found.experiment_id])
    return client, run


def test_mlflow_keeps_the_same_run_over_restarts_and_rollbacks(tmp_path: Path, mlflow_folder: str) -> None:
    options = {"tracking_uri": mlflow_folder, "experiment": "cubes", "tags": {"team": "vision"}}
    config = config_of(tmp_path / "run", {"mlflow": options})
    check_loggers(config)
    history = open_history(config)
    for step in range(1, 5):
        history.write("train", step, loss=float(step), **{"accuracy/a_from_b+c": 0.5})
    history.close()
    assert history.write_errors == 0
    client, run = only_run(mlflow_folder, "cubes")
    assert run.info.status == "KILLED" and run.info.run_name == "logged", "it has not come to its last step"
    assert run.data.params["train.steps"] == "6" and run.data.tags["team"] == "vision"
    assert run.data.tags["symile_dist.version"] and run.data.metrics["train/accuracy/a_from_b_c"] == 0.5

    history = open_history(config, resume_step=2)
    for step in range(3, 7):
        history.write("train", step, loss=math.nan if step == 4 else 10.0 * step)
    history.write("checkpoint", 4, bytes=100)  # whole only now
    history.close()
    assert history.write_errors == 0
    client, again = only_run(mlflow_folder, "cubes")
    assert again.info.run_id == run.info.run_id and again.info.status == "FINISHED"
    points = sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss"))
    latest = {step: value for step, _, value in points}
    assert [step for step, _, _ in points] == [1, 2, 3, 3, 4, 4, 5, 6]
    assert latest[3] == 30.0 and math.isnan(latest[4]) and latest[6] == 60.0


def test_mlflow_makes_another_run_where_its_own_was_deleted(tmp_path: Path, mlflow_folder: str) -> None:
    config = config_of(tmp_path / "run", {"mlflow": {"tracking_uri": mlflow_folder}})
    for step in (6, 7):
        history = open_history(config)
        history.write("train", step, loss=1.0)
        history.close()
        client, run = only_run(mlflow_folder)
        assert history.write_errors == 0 and len(client.get_metric_history(run.info.run_id, "train/loss")) == 1
        client.delete_run(run.info.run_id)


def test_mlflow_sends_later_what_the_server_did_not_take(
    tmp_path: Path, mlflow_folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    down, tried, send = threading.Event(), threading.Event(), MlflowClient.log_batch
    down.set()

    def log_batch(self: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("metrics") and down.is_set():
            tried.set()
            raise ConnectionError("503")
        return send(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    monkeypatch.setattr(loggers, "FLUSH_SECONDS", 0.1)
    history = open_history(config_of(tmp_path / "run", {"mlflow": {"tracking_uri": mlflow_folder}}))
    history.write("train", 1, loss=1.0)
    until(tried.is_set, "it was tried")
    down.clear()
    history.write("train", 2, loss=2.0)
    history.close()
    client, run = only_run(mlflow_folder)
    assert [m.value for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1.0, 2.0]
    assert history.write_errors >= 1 and caplog.text.count("is incomplete") == 1


def test_mlflow_asks_where_to(tmp_path: Path, mlflow_folder: str) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        check_loggers(config_of(tmp_path, {"mlflow": {}}))


def test_tensorboard_draws_what_stands_in_objects(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = History(tmp_path)
    history.write("train", 1, phases={"forward": 0.5})
    history.close()
    accumulator = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert accumulator.Tags()["scalars"] == ["train/phases/forward"]


def test_a_logger_that_is_slow_to_start_gets_the_first_records(tmp_path: Path) -> None:
    there = threading.Event()

    def make(resume_step: int | None) -> Kept:
        there.wait(60)
        return Kept(LoggedRun(name="late", directory=tmp_path))

    history = History(tmp_path, tensorboard=False, loggers={"late": partial(make)}, close_seconds=60)
    history.write("train", 1, loss=1.0)
    there.set()
    history.close()
    assert [record["step"] for record in Kept.made[0].records] == [1]


def test_loggers_are_told_of_an_end_that_the_history_has_from_the_driver(tmp_path: Path) -> None:
    taken: list[Mapping[str, Any]] = []

    class Listening:
        def write(self, record: Mapping[str, Any]) -> None:
            taken.append(record)

        def flush(self) -> None: ...

        def close(self) -> None: ...

    history = History(tmp_path, tensorboard=False, loggers={"one": lambda step: Listening()})
    history.write("train", 3, loss=1.0)
    history.tell_end("failed")
    history.close()
    assert [(record["kind"], record.get("status")) for record in taken] == [("train", None), ("end", "failed")]
    assert [record["kind"] for record in read_history(tmp_path / "history.jsonl")] == ["train"]
