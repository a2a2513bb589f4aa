"""kill -9 of a worker costs time, never results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from symile_dist.checkpoint.manifest import complete_checkpoints
from tests.system.conftest import MakeConfig
from tests.system.runs import history, losses, state_digests, train

OVERRIDES = [
    "train.steps=150",
    "checkpoint.every=10",
    "validation.every=75",
    "train.zero_stage=2",
    "data.loader_processes=1",
]


def wait_for_step(process: subprocess.Popen[bytes], history_file: Path, step: int) -> None:
    """Until the history holds a training record of at least this step; fails when the run ends before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before the kill"
        if history_file.exists():
            records = [json.loads(line) for line in history_file.read_bytes().split(b"\n")[:-1]]
            if any(record["kind"] == "train" and record["step"] >= step for record in records):
                return
        time.sleep(0.01)  # polling a file, not synchronisation: the condition above decides
    pytest.fail(f"step {step} was not reached within 120 s")


def test_a_worker_killed_in_mid_run_ends_with_the_weights_of_the_undisturbed_run(
    make_config: MakeConfig, config_file: Path, tmp_path: Path, shared_ray: None
) -> None:
    undisturbed = make_config(*OVERRIDES, name="undisturbed")
    train(undisturbed)

    killed = make_config(*OVERRIDES, name="killed")
    command = [sys.executable, "-m", "symile_dist.cli", "train", str(config_file), "--json", *OVERRIDES]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [*command, "run.name=killed", f"run.directory={killed.run_directory}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        wait_for_step(process, killed.run_directory / "history.jsonl", 11)
        ranks = json.loads((killed.run_directory / "ranks.json").read_text())
        # Each rank serves its metrics while it trains.
        for rank in ranks:
            with urllib.request.urlopen(rank["metrics_url"], timeout=10) as answer:
                text = answer.read().decode()
            assert "symile_train_steps_total" in text and "symile_train_phase_seconds_total" in text
        os.kill(next(rank["pid"] for rank in ranks if rank["rank"] == 1), signal.SIGKILL)
        output, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors.decode()[-3000:]
    result = json.loads(output)
    assert result["restarts"] == 1
    (failure,) = json.loads((killed.run_directory / "run.json").read_text())["failures"]
    assert (failure["cause"], failure["rank"]) == ("rank_lost", 1), failure
    (resumed,) = history(killed, "event")
    assert resumed["step"] in range(10, 150, 10), f"did not go on from a checkpoint: {resumed}"
    assert losses(killed) == losses(undisturbed)
    assert state_digests(killed, 150) == state_digests(undisturbed, 150)
    # Nothing of the embedded Ray outlives the command, but for the moment that a killed process takes to be gone.
    workers = [Path(f"/proc/{rank['pid']}") for rank in json.loads((killed.run_directory / "ranks.json").read_text())]
    deadline = time.monotonic() + 30
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its run"
        time.sleep(0.05)


def start(config_file: Path, *overrides: str, address: str | None = None) -> subprocess.Popen[bytes]:
    """`symile-dist train` in a process of its own, with a Ray of its own unless there is an address of one."""
    command = [sys.executable, "-m", "symile_dist", "train", str(config_file), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    if address:
        environment["RAY_ADDRESS"] = address
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # In the background of a shell SIGINT is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_ends_the_run_in_words(make_config: MakeConfig, config_file: Path) -> None:
    config = make_config(name="signalled")
    place = ("run.name=signalled", f"run.directory={config.run_directory}")
    process = start(config_file, "train.steps=100000", "checkpoint.every=50", *place)
    try:
        wait_for_step(process, config.run_directory / "history.jsonl", 3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors.decode()[-3000:]
    assert "interrupted; the same command again goes on" in errors.decode()
    assert json.loads((config.run_directory / "run.json").read_text())["status"] == "interrupted"


def test_sigterm_saves_and_stops_and_the_same_command_goes_on_bitwise(
    make_config: MakeConfig, config_file: Path, shared_ray: None
) -> None:
    undisturbed = make_config("train.steps=60", "checkpoint.every=1000", name="undisturbed")
    train(undisturbed)
    config = make_config("train.steps=60", "checkpoint.every=1000", name="preempted")
    arguments = [
        f"run.directory={config.run_directory}",
        "run.name=preempted",
        "train.steps=60",
        "checkpoint.every=1000",
    ]
    process = start(config_file, *arguments)
    try:
        wait_for_step(process, config.run_directory / "history.jsonl", 3)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 75, errors.decode()[-3000:]
        ((step, _),) = complete_checkpoints(config.run_directory / "checkpoints")
        assert 3 <= step < 60, "not stopped at the end of a step, saved"
        assert json.loads((config.run_directory / "run.json").read_text())["status"] == "preempted"
        process = start(config_file, *arguments)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-3000:]
    finally:
        process.kill()
    assert losses(config) == losses(undisturbed)
    assert state_digests(config, 60) == state_digests(undisturbed, 60)
