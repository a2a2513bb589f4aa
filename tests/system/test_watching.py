"""What watches a run: time that adds up, endpoints that follow it, and nothing of it that training feels."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from symile_dist.config import Config
from symile_dist.failpoints import VARIABLE
from symile_dist.metrics.goodput import read_goodput
from tests.system.conftest import MakeConfig
from tests.system.runs import history, losses, state_digests, train
from tests.system.test_kill import wait_for_step

SLOWED = "objective={{name: 'tests.system.faulty:RecordedSymile', folder: {folder}, pause: {pause}}}"


def slowed(folder: Path, pause: float = 0.1) -> str:
    return SLOWED.format(folder=folder, pause=pause)


def wait_until(found: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(0.05)  # polling, not synchronisation: the condition decides
    pytest.fail(f"{what}: not within {seconds:g} s")


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read().decode())


def scraped(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(get(url))
        for sample in family.samples
    }


def run_json(config: Config) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((config.run_directory / "run.json").read_text())
        return content
    except (OSError, ValueError):
        return {}


class Command:
    """`symile-dist train` in a process of its own."""

    def __init__(self, config: Config, config_file: Path, *overrides: str) -> None:
        place = [f"run.name={config.run.name}", f"run.directory={config.run_directory}"]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.config, self.began = config, time.time()
        self.output = config.run_directory.with_name(f"{config.run.name}.output")
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "symile_dist", "train", str(config_file), "--plain", *place, *overrides],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        assert self.process.wait(timeout=240) == 0, self.output.read_text()[-3000:]


@pytest.fixture
def command(config_file: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(config: Config, *overrides: str) -> Command:
        started.append(Command(config, config_file, *overrides))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            os.killpg(each.process.pid, signal.SIGKILL)
            each.process.wait(timeout=30)


@pytest.mark.slow
def test_goodput_accounts_for_all_time_over_kills(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared_ray: None
) -> None:
    faults = [
        {"at": "step", "rank": rank, "step": step, "do": "kill", "once": str(tmp_path / f"kill-{step}")}
        for rank, step in ((1, 14), (0, 27))
    ]
    monkeypatch.setenv(VARIABLE, json.dumps(faults))
    config = make_config(
        "train.steps=40", "checkpoint.every=10", "validation.every=20", "ray.max_failures=-1", slowed(tmp_path / "seen")
    )
    begin = time.monotonic()
    train(config)
    wall = time.monotonic() - begin
    account = read_goodput(config.run_directory)
    seconds = account["seconds"]
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01, abs=0.3), seconds
    assert account["restarts"] == {"rank_lost": 2} and account["ended"]
    # 40 steps of 0.1 s and more end in checkpoints; 3 and 6 of them, and the time until the loss is seen, are lost.
    assert seconds["productive"] >= 3.0, seconds
    assert seconds["lost"] >= 0.3 and seconds["restart"] > 1, seconds
    assert seconds["eval"] > 0 and seconds["pending"] == 0
    restarts = history(config, "restart")
    assert [(record["cause"], record["rank"]) for record in restarts] == [("rank_lost", 1), ("rank_lost", 0)]
    told = history(config, "goodput")
    assert len(told) == 3 and told[-1]["seconds"]["lost"] == pytest.approx(seconds["lost"], abs=0.01)
    assert history(config, "end")[-1]["status"] == "finished"
    assert json.loads((config.run_directory / "targets.json").read_text()) == []


@pytest.mark.slow
def test_the_account_goes_on_when_the_driver_is_killed(
    make_config: MakeConfig, command: Callable[..., Command], tmp_path: Path
) -> None:
    overrides = ["train.steps=60", "checkpoint.every=10", "validation.every=null", slowed(tmp_path / "seen", 0.2)]
    config = make_config(*overrides)
    first = command(config, *overrides)
    wait_for_step(first.process, config.run_directory / "history.jsonl", 15)  # type: ignore[arg-type]
    page = run_json(config)["page"]
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait(timeout=30)
    killed = read_goodput(config.run_directory)
    assert not killed["ended"]
    command(config, *overrides).wait()
    account = read_goodput(config.run_directory)
    seconds, wall = account["seconds"], account["updated"] - first.began  # until the last word of the second
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01, abs=0.5), seconds
    assert seconds["restart"] > 1 and seconds["productive"] >= 10, seconds
    assert page != run_json(config)["page"]


@pytest.mark.slow
def test_endpoints_follow_a_killed_worker(
    make_config: MakeConfig, command: Callable[..., Command], tmp_path: Path
) -> None:
    overrides = ["train.steps=200", "checkpoint.every=10", "validation.every=null", slowed(tmp_path / "seen")]
    config = make_config(*overrides)
    running = command(config, *overrides)
    wait_for_step(running.process, config.run_directory / "history.jsonl", 12)  # type: ignore[arg-type]
    page = run_json(config)["page"]
    before = json.loads(get(f"{page}targets"))
    assert before == json.loads((config.run_directory / "targets.json").read_text())
    assert sorted(entry["labels"].get("rank", "driver") for entry in before) == ["0", "1", "driver"]
    assert {entry["labels"]["run"] for entry in before} == {"tiny"}
    driver = scraped(f"{page}metrics")
    assert driver[("symile_run_expected_ranks", ())] == 2
    assert driver[("symile_run_restarts_total", (("cause", "rank_lost"),))] == 0
    ranks = json.loads((config.run_directory / "ranks.json").read_text())
    os.kill(next(rank["pid"] for rank in ranks if rank["rank"] == 1), signal.SIGKILL)
    new = wait_until(
        lambda: (now := json.loads(get(f"{page}targets"))) != before and len(now) == 3 and now, "new endpoints"
    )
    wait_until(
        lambda: json.loads((config.run_directory / "targets.json").read_text()) == new, "the same for Prometheus", 10
    )
    for entry in new:
        assert "process_start_time_seconds" in get(f"http://{entry['targets'][0]}/metrics")
    driver = scraped(f"{page}metrics")
    assert driver[("symile_run_restarts_total", (("cause", "rank_lost"),))] == 1
    wait_until(
        lambda: scraped(f"{page}metrics")[("symile_run_time_seconds_total", (("state", "productive"),))] > 0,
        "productive time",
    )
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.process.wait(timeout=120) == 75


@pytest.mark.slow
def test_nothing_that_watches_is_felt(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared_ray: None
) -> None:
    """Ports taken, scrapers that hold on or send junk, a disk that takes no history: the same weights."""
    quiet = make_config("train.steps=40", "metrics.enabled=false", name="quiet")
    train(quiet)
    full = [{"at": "history.write", "step": step, "do": "raise"} for step in range(10, 20)]
    monkeypatch.setenv(VARIABLE, json.dumps(full))
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as also_taken:
        noisy = make_config(
            "train.steps=40",
            f"metrics.port={taken.getsockname()[1]}",
            f"metrics.driver_port={also_taken.getsockname()[1]}",
            f"metrics.token_file={token}",
            name="noisy",
        )
        done = threading.Event()
        hostile = threading.Thread(target=_pester, args=(noisy, done))
        hostile.start()
        try:
            train(noisy)
        finally:
            done.set()  # else a run that fails would leave the thread, and the tests would never end
            hostile.join(timeout=30)
    assert state_digests(noisy, 40) == state_digests(quiet, 40)
    there = {record["step"] for record in history(noisy)}
    assert there == set(range(1, 41)) - set(range(10, 20)), "the history goes on where the disk takes it again"
    assert losses(noisy)[40] == losses(quiet)[40]


def _pester(config: Config, done: threading.Event) -> None:
    """Holds connections to every endpoint of a run, and sends junk."""
    held: list[socket.socket] = []
    while not done.wait(0.2):
        try:
            entries = json.loads((config.run_directory / "targets.json").read_text())
        except (OSError, ValueError):
            continue
        for entry in entries:
            host, _, port = entry["targets"][0].rpartition(":")
            try:
                peer = socket.create_connection((host, int(port)), timeout=1)
                peer.sendall(b"GET /metrics HTTP/1.1\r\nX: " + b"\xff" * 9999)
                held.append(peer)
            except OSError:
                continue
    for peer in held:
        peer.close()
