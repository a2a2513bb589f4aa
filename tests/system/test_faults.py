"""Faults cost time, never results: kills by the dozen, hangs, a killed driver, lost nodes, clocks that jump."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from symile_dist.config import Config, parse_config
from symile_dist.errors import RunFailed
from symile_dist.failpoints import VARIABLE
from tests.system.conftest import MakeConfig, config_text
from tests.system.runs import assert_each_sample_once, history, losses, state_digests, train
from tests.system.test_kill import start, wait_for_step

SAMPLES, BATCH = 256, 16


def recorded(folder: Path, **options: object) -> str:
    words = "".join(f", {name}: {json.dumps(value)}" for name, value in options.items())
    return f"objective={{name: 'tests.system.faulty:RecordedSymile', folder: {folder}{words}}}"


def failures(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((directory / "run.json").read_text())["failures"]
    return found


SHORT = ["train.steps=40", "checkpoint.every=10", "validation.every=null", "ray.hang_seconds=12"]


@pytest.fixture(scope="module")
def undisturbed(shards: Path, shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of SHORT, done: what the disturbed ones must come to."""
    place = f"run.directory={tmp_path_factory.mktemp('undisturbed') / 'run'}"
    config = parse_config(config_text(shards), "tiny.yaml", [*SHORT, place]).config.with_absolute_paths()
    train(config)
    return config


def assert_as_undisturbed(config: Config, undisturbed: Config) -> None:
    assert losses(config) == losses(undisturbed)
    assert state_digests(config, 40) == state_digests(undisturbed, 40)


# -- goal 1: kill -9 costs time, never results ------------------------------------------------------------------------

STEPS, EVERY = 64, 5
KILLS = 7


def kills(seed: int, folder: Path) -> list[dict[str, Any]]:
    """One in a save, one in a restart, the others in steps; each at a place of its own, chosen by the seed."""
    chance = random.Random(seed)
    saving = chance.choice(["begun", "half_written", "written"])
    faults: list[dict[str, Any]] = [
        {"at": f"checkpoint.{saving}", "step": EVERY * chance.randrange(2, 12)},
        {"at": "checkpoint.before_manifest", "step": EVERY * chance.randrange(2, 12), "rank": 0},
        {"at": chance.choice(["start.begun", "start.loaded"]), "step": EVERY * chance.randrange(1, 12)},
    ]
    while len(faults) < KILLS:
        faults.append({"at": "step", "step": chance.randrange(1, STEPS), "after": round(chance.uniform(0, 0.05), 3)})
    return [
        {"rank": chance.randrange(2), "do": "kill", "once": str(folder / f"kill-{number}"), **fault}
        for number, fault in enumerate(faults)
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_many_kills_end_with_the_state_of_the_undisturbed_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, zero_stage: int
) -> None:
    overrides = [
        f"train.steps={STEPS}",
        f"checkpoint.every={EVERY}",
        f"train.zero_stage={zero_stage}",
        "validation.every=32",
        "data.loader_processes=1",
        "modalities.a.encoder.dropout=0.1",  # so that random states matter
        "modalities.a.encoder.hidden=[16]",
        "ray.max_failures=-1",
        "ray.max_repeats=0",
        "ray.max_node_failures=0",
    ]
    undisturbed = make_config(*overrides, recorded(tmp_path / "seen"), name="undisturbed")
    train(undisturbed)
    assert_each_sample_once(tmp_path / "seen", STEPS, BATCH, SAMPLES)
    monkeypatch.setenv(VARIABLE, json.dumps(kills(zero_stage, tmp_path)))
    killed = make_config(*overrides, recorded(tmp_path / "seen-killed"), name="killed")
    train(killed)
    happened = len(list(tmp_path.glob("kill-*")))
    assert happened >= 5, "most of the kills did not happen"
    assert len(failures(killed.run_directory)) <= happened  # two may strike the same attempt
    assert state_digests(killed, STEPS) == state_digests(undisturbed, STEPS)
    assert losses(killed) == losses(undisturbed)
    assert_each_sample_once(tmp_path / "seen-killed", STEPS, BATCH, SAMPLES)


# -- goal 10: a hung rank ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stop", "hang"])
def test_a_hung_rank_is_found_its_stack_kept_and_the_group_restarted(
    undisturbed: Config, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    faults = [{"at": "step", "rank": 1, "step": 15, "do": fault, "once": str(tmp_path / "once")}]
    monkeypatch.setenv(VARIABLE, json.dumps(faults))
    hung = make_config(*SHORT, name="hung")
    train(hung)
    (failure,) = failures(hung.run_directory)
    assert failure["cause"] == "hang" and "no step was finished for 12 s" in failure["message"], failure
    (stacks,) = (hung.run_directory / "logs").glob("stacks-*.txt")
    text = stacks.read_text()
    assert "== rank 0" in text and "== rank 1" in text
    # Where it hangs: rank 1 in the failpoint, rank 0 in the collective that rank 1 does not come to.
    assert "_do (symile_dist/failpoints.py" in text.partition("== rank 1")[2], text
    assert_as_undisturbed(hung, undisturbed)


# -- goal 11: the driver is lost ---------------------------------------------------------------------------------------


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for first in range(random.Random(os.getpid()).randrange(20000, 40000), 60000):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind_and_the_same_command_goes_on(
    undisturbed: Config, make_config: MakeConfig, config_file: Path, tmp_path: Path
) -> None:
    slow = [*SHORT, recorded(tmp_path / "seen", pause=0.2)]
    config = make_config(*slow, name="driverless")
    ports = f"metrics.port={free_ports(2)}"
    arguments = [*slow, ports, "run.name=driverless", f"run.directory={config.run_directory}"]
    process = start(config_file, *arguments)
    try:
        wait_for_step(process, config.run_directory / "history.jsonl", 15)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4, "Ray and two ranks"
        # Ray's two agents look for their GCS for a minute before they give up; they hold nothing that is needed.
        agents = [each for each in family if "Agent" in each.name()]
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs([each for each in family if each not in agents], timeout=30)
        assert not alive, f"orphans: {[(each.pid, each.name()) for each in alive]}"
        process = start(config_file, *arguments)  # on the same ports
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-3000:]
        assert not (config.run_directory / "logs" / "rank-00000.log").read_text().count("in use")
    finally:
        process.kill()
    _, alive = psutil.wait_procs(agents, timeout=90)
    assert not alive, "Ray's agents stay"
    (resumed,) = history(config, "event")
    assert resumed["step"] in (10, 20, 30)
    assert_as_undisturbed(config, undisturbed)


# -- goal 13: clocks ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clocks_that_jump_change_nothing(
    undisturbed: Config, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = [*SHORT, "checkpoint.every_minutes=60", recorded(tmp_path / "seen", clock_jumps=True)]
    jumping = make_config(*overrides, name="jumping")
    faults = [{"at": "step", "rank": 1, "step": 15, "do": "kill", "once": str(tmp_path / "once")}]
    monkeypatch.setenv(VARIABLE, json.dumps(faults))
    train(jumping)
    assert [each["cause"] for each in failures(jumping.run_directory)] == ["rank_lost"]
    assert_as_undisturbed(jumping, undisturbed)
    assert_each_sample_once(tmp_path / "seen", 40, BATCH, SAMPLES)
    for age, folder in enumerate(sorted((jumping.run_directory / "checkpoints").glob("step-*"))):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (1e9 - age * 1e6, 1e9 - age * 1e6))  # the newest looks oldest
    longer = make_config(*overrides, "train.steps=44", name="jumping")
    train(longer, resume=True)
    assert [record["step"] for record in history(longer, "event")] == [10, 40], "the age of files decided"


# -- a step that is to blame -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_step_that_always_fails_ends_the_run_with_the_names_of_its_samples(make_config: MakeConfig) -> None:
    config = make_config(
        "objective={name: 'tests.system.faulty:FailsAlways', step: 7}", "validation.every=null", "ray.max_repeats=2"
    )
    with pytest.raises(RunFailed, match=r"step 7 failed 2 times \(ray.max_repeats\).*its batch holds .*shard-0000\d"):
        train(config)
    run = json.loads((config.run_directory / "run.json").read_text())
    assert (run["status"], run["restarts"], len(run["failing_samples"])) == ("failed", 2, BATCH)
    assert [each["cause"] for each in run["failures"]] == ["out_of_memory", "out_of_memory"]


# -- goal 14: nodes that go and come -----------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray of three nodes, with room for 2, 1 and 1 ranks."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_lost_node_costs_ranks_and_a_new_one_brings_them_back(
    cluster: Any, make_config: MakeConfig, config_file: Path, tmp_path: Path
) -> None:
    steps = 360
    overrides = [
        f"train.steps={steps}",
        "checkpoint.every=20",
        "validation.every=null",
        "optimizer.lr=1e-3",
        "ray.num_workers=4",
        "ray.min_workers=1",
        recorded(tmp_path / "seen", pause=0.1),
    ]
    config = make_config(*overrides, name="elastic")
    arguments = [*overrides, "run.name=elastic", f"run.directory={config.run_directory}"]
    process = start(config_file, *arguments, address=cluster.address)
    run_file, log = config.run_directory / "run.json", config.run_directory / "history.jsonl"
    try:
        wait_for_step(process, log, 25)
        assert json.loads(run_file.read_text())["world_size"] == 4
        ranks = json.loads((config.run_directory / "ranks.json").read_text())
        nodes = [rank["node"] for rank in ranks]
        small = [node for node in cluster.worker_nodes if nodes.count(node.node_id) == 1]
        # With three left, of which three do not divide a batch of 16: two train, one is spare.
        cluster.remove_node(small[0], allow_graceful=False)
        wait_for(process, lambda: json.loads(run_file.read_text())["world_size"] == 2)
        wait_for_step(process, log, history(config)[-1]["step"] + 20)
        cluster.add_node(num_cpus=1)
        wait_for(process, lambda: json.loads(run_file.read_text())["world_size"] == 4)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()[-3000:]
    finally:
        process.kill()
    (failure,) = failures(config.run_directory)
    assert failure["cause"] == "node_lost", failure
    assert_each_sample_once(tmp_path / "seen", steps, BATCH, SAMPLES)
    starts = history(config, "start")
    assert len(starts) == 3


def wait_for(process: subprocess.Popen[bytes], condition: Any) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert process.poll() is None, "the run ended before"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)  # polling a file, not synchronisation: the condition decides
