"""A real Prometheus over a real run: every panel shows something, every alert fires when it should and only then."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from symile_dist.config import Config
from symile_dist.failpoints import VARIABLE
from symile_dist.tools.monitoring.alerts import alerts, rules_text
from symile_dist.tools.monitoring.grafana import annotation_expressions, dashboards, expressions
from symile_dist.tools.monitoring.prometheus import Prometheus, prometheus_over
from tests.system.conftest import DIMENSION, MODALITIES, MakeConfig
from tests.system.test_kill import wait_for_step
from tests.system.test_watching import Command, command, run_json, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Prometheus (Debian: apt-get install prometheus)"),
]
__all__ = ["command"]
SCALE = 1 / 60
"""Of the rules' durations: a minute is a second."""
RESTARTS_SCALE = 1 / 10
"""Where restarts are counted, each of which takes its seconds."""


def sick(folder: Path) -> list[str]:
    """A run that falls ill by files in a folder."""
    folder.mkdir()
    modalities = [
        f"modalities.{name}.encoder={{name: 'tests.system.sick:SickEncoder', input_dim: {DIMENSION}, folder: {folder}}}"
        for name in MODALITIES
    ]
    return [
        "train.steps=1000000",
        "train.log_every=5",
        "validation.every=100",
        "checkpoint.every=20",
        "checkpoint.max_failures=1000",
        "guard.patience=1000000",
        "ray.max_failures=-1",
        "ray.max_repeats=0",
        f"objective={{name: 'tests.system.sick:SickObjective', folder: {folder}}}",
        f"modalities.a.transform={{name: 'tests.system.sick:SickTransform', folder: {folder}}}",
        *modalities,
    ]


@contextlib.contextmanager
def ill(folder: Path, *names: str) -> Iterator[None]:
    for name in names:
        (folder / name).touch()
    yield
    for name in names:
        (folder / name).unlink()


def firing(server: Prometheus) -> set[str]:
    return {alert["alertname"] for alert in server.alerts()}


def fires(server: Prometheus, *names: str, seconds: float = 120) -> None:
    for name in names:
        wait_until(lambda name=name: name in firing(server), f"alert {name}", seconds)  # type: ignore[misc]


def kill_rank(config: Config, rank: int = 1) -> None:
    ranks = json.loads((config.run_directory / "ranks.json").read_text())
    os.kill(next(each["pid"] for each in ranks if each["rank"] == rank), signal.SIGKILL)


def metrics_ports(config: Config) -> set[str]:
    entries = json.loads((config.run_directory / "targets.json").read_text())
    return {entry["targets"][0] for entry in entries if entry["labels"]["role"] == "rank"}


def test_every_panel_shows_something_and_a_kill_shows(
    make_config: MakeConfig, command: Callable[..., Command], tmp_path: Path
) -> None:
    overrides = sick(tmp_path / "sick")
    config = make_config(*overrides)
    begin = time.time()
    running = command(config, *overrides)
    targets = config.run_directory / "targets.json"
    wait_for_step(running.process, config.run_directory / "history.jsonl", 40)  # type: ignore[arg-type]
    with prometheus_over(tmp_path / "prometheus", targets, rules_text=rules_text()) as server:
        wait_until(lambda: [value for _, value in server.query('up{role="rank"}')] == [1.0, 1.0], "two ranks up")
        before = metrics_ports(config)
        kill_rank(config)
        wait_until(
            lambda: (found := metrics_ports(config)) and len(found) == 2 and not found & before, "new endpoints", 120
        )
        joined = time.monotonic()
        wait_until(
            lambda: (
                {each["labels"]["instance"] for each in server.targets() if each["labels"].get("rank")}
                == metrics_ports(config)
            ),
            "Prometheus follows",
            10,
        )
        assert time.monotonic() - joined < 10
        missing = "symile_run_expected_ranks - on (run, run_id) count by (run, run_id) (up{role='rank'} == 1)"
        gap = "max_over_time((" + missing + ")[5m:1s]) > 0 or min_over_time(up{role='rank'}[5m]) == 0"
        assert server.query(gap), "nothing shows that a rank was gone"
        wait_until(
            lambda: [value for _, value in server.query('symile_run_restarts_total{cause="rank_lost"}')] == [1.0],
            "the restart is counted",
        )
        # Counted after the restart is: a scrape may have come in between.
        wait_until(
            lambda: (lost := server.query('symile_run_time_seconds_total{state="lost"}')) and lost[0][1] > 0,
            "what the kill cost is counted",
        )
        # The kill may have fallen between a validation and the scrape that would have seen it: wait for the next one.
        validated = ("symile_validation_loss", "symile_contrastive_retrieval_accuracy_ratio")
        wait_until(lambda: all(server.query(name) for name in validated), "steps go on, to a validation", 120)
        empty = list(nothing_to_see(server, begin))
        assert not empty, "panels without a value:\n" + "\n".join(empty)
        for expression in {each for content in dashboards().values() for each in annotation_expressions(content)}:
            server.query_range(expression, begin, time.time(), 5)
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.process.wait(timeout=120) == 75
        wait_until(lambda: not server.targets(), "a run that has ended is no target any more", 30)


def nothing_to_see(server: Prometheus, begin: float) -> Iterator[str]:
    """The expressions of all dashboards that give no number, for whatever moment of the run."""
    for content in dashboards().values():
        for each in expressions(content, window="20s"):
            # A step past now, so that what was scraped last is seen.
            found = server.query_range(each.expression, begin, time.time() + 2, 2)
            numbers = [value for _, values in found for _, value in values if not math.isnan(value)]
            if each.needs_gpu:
                assert not numbers, f"{each.dashboard}/{each.panel} does not need a GPU"
            elif not numbers:
                yield f"{each.dashboard}/{each.panel}: {each.expression}"


@pytest.mark.timeout(900)
def test_every_alert_fires_on_a_sick_run_and_none_on_a_healthy_one(
    make_config: MakeConfig, command: Callable[..., Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sick"
    overrides = sick(folder)
    config = make_config(*overrides)
    seen: set[str] = set()
    full = [{"at": "checkpoint.written", "do": "raise", "while": str(folder / "full")}]
    monkeypatch.setenv(VARIABLE, json.dumps(full))
    running = command(config, *overrides)
    targets = config.run_directory / "targets.json"
    wait_for_step(running.process, config.run_directory / "history.jsonl", 20)  # type: ignore[arg-type]
    with (
        prometheus_over(tmp_path / "fast", targets, rules_text=rules_text(SCALE), scrape_seconds=0.5) as server,
        prometheus_over(tmp_path / "slow", targets, rules_text=rules_text(RESTARTS_SCALE)) as slower,
    ):
        # A healthy run of what stands for an hour.
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert not firing(server), f"{firing(server)} of a healthy run"
            time.sleep(0.2)

        def falls_ill(*names: str, alerts: Sequence[str]) -> None:
            with ill(folder, *names):
                fires(server, *alerts)
                seen.update(alerts)

        together = ("Straggler", "ThroughputDrop", "CheckpointStale", "ContrastiveCollapse")
        falls_ill("straggle", "full", "collapse", alerts=together)
        falls_ill("nan", alerts=("LossNotFinite", "GradSkipStorm"))
        falls_ill("starve", alerts=("DataStarved",))
        falls_ill("stall", alerts=("TrainingStalled",))
        wait_until(lambda: not firing(server), "it is well again", 120)
        for _ in range(3):
            before = metrics_ports(config)
            kill_rank(config)
            wait_until(
                lambda before=before: len(found := metrics_ports(config)) == 2 and not found & before,  # type: ignore[misc]
                "the next group",
                120,
            )
        fires(slower, "RestartLoop")
        os.kill(running.process.pid, signal.SIGKILL)
        fires(slower, "RanksMissing")
        seen |= {"RestartLoop", "RanksMissing"}
    assert seen == {alert.name for alert in alerts()}
    assert run_json(config)["status"] == "running"
