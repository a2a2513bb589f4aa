"""Chaos for ten minutes, and a healthy run for ten more: `make soak`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from symile_dist.metrics.goodput import read_goodput
from symile_dist.tools.monitoring.alerts import rules_text
from symile_dist.tools.monitoring.prometheus import prometheus_over
from tests.system.conftest import MakeConfig
from tests.system.runs import assert_each_sample_once, history, losses, state_digests, train
from tests.system.test_faults import recorded
from tests.system.test_kill import start, wait_for_step

STEPS, SECONDS = 6000, 600


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_minutes_of_kills_end_with_the_weights_of_the_undisturbed_run(
    make_config: MakeConfig, config_file: Path, tmp_path: Path, shared_ray: None
) -> None:
    """A kill every 20 to 40 seconds, of either rank, whatever it is doing."""
    overrides = [
        f"train.steps={STEPS}",
        "train.zero_stage=2",
        "train.log_every=10",
        "checkpoint.every=25",
        "validation.every=500",
        "optimizer.lr=1e-3",
        "data.loader_processes=1",
        "modalities.a.encoder.dropout=0.1",
        "modalities.a.encoder.hidden=[16]",
        "ray.max_failures=-1",
        "ray.max_repeats=0",
        "ray.max_node_failures=0",
    ]
    chaotic = make_config(*overrides, recorded(tmp_path / "seen", pause=0.03), name="chaotic")
    arguments = [*overrides, recorded(tmp_path / "seen", pause=0.03), "run.name=chaotic"]
    process = start(config_file, *arguments, f"run.directory={chaotic.run_directory}")
    try:
        wait_for_step(process, chaotic.run_directory / "history.jsonl", 10)
        command = [sys.executable, "-m", "symile_dist", "chaos", str(chaotic.run_directory), "--json"]
        done = subprocess.run(
            [*command, "--kill-every", "20-40", "--seconds", str(SECONDS), "--seed", "1"], stdout=subprocess.PIPE
        )
        assert done.returncode == 0
        result = json.loads(done.stdout)
        print(json.dumps({key: value for key, value in result.items() if key != "disturbances"}, indent=2))
        assert len(result["disturbances"]) >= 12
        _, errors = process.communicate(timeout=1200)
        assert process.returncode == 0, errors.decode()[-3000:]
    finally:
        process.kill()
    stalls = [record["stall_seconds"] for record in history(chaotic, "checkpoint")]
    print(f"{len(stalls)} checkpoints survived, {sum(stalls) / len(stalls) * 1e3:.1f} ms of stall each")
    undisturbed = make_config(*overrides, recorded(tmp_path / "seen-undisturbed"), name="undisturbed")
    train(undisturbed)
    assert losses(chaotic) == losses(undisturbed)
    assert state_digests(chaotic, STEPS) == state_digests(undisturbed, STEPS)
    assert_each_sample_once(tmp_path / "seen", STEPS, 16, 256)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_no_alert_fires_on_ten_minutes_of_a_healthy_run(
    make_config: MakeConfig, config_file: Path, tmp_path: Path
) -> None:
    """With the rules' durations at a tenth: what stands for an hour and forty minutes, its start and end among it."""
    overrides = ["train.steps=1000000", "train.log_every=10", "checkpoint.every=200", "validation.every=500"]
    healthy = make_config(*overrides, name="healthy")
    place = ["run.name=healthy", f"run.directory={healthy.run_directory}"]
    process = start(config_file, *overrides, recorded(tmp_path / "seen", pause=0.03), *place)
    fired: dict[str, float] = {}
    try:
        targets, begin = healthy.run_directory / "targets.json", time.monotonic()
        while not targets.exists():
            assert time.monotonic() < begin + 120, "the run does not start"
            time.sleep(0.05)
        with prometheus_over(tmp_path / "prometheus", targets, rules_text=rules_text(0.1)) as server:
            while time.monotonic() < begin + SECONDS:
                for alert in server.alerts("firing"):
                    fired.setdefault(alert["alertname"], time.monotonic() - begin)
                time.sleep(0.5)
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(timeout=120) == 75
            ended = time.monotonic()
            while time.monotonic() < ended + 60:
                for alert in server.alerts("firing"):
                    fired.setdefault(alert["alertname"], time.monotonic() - begin)
                time.sleep(0.5)
            size = len(server.query('{run="healthy"}', at=time.time() - 70))
    finally:
        process.kill()
    seconds = read_goodput(healthy.run_directory)["seconds"]
    print(json.dumps({"fired": fired, "series": size, "goodput": seconds}, indent=2))
    assert not fired
