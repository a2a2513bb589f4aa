"""Jobs on real backends: this machine, a real Slurm, a real Ray over two hosts."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from symile_dist.config import Config
from symile_dist.environment import EXPECTED_NODES
from symile_dist.failpoints import VARIABLE as FAILPOINTS
from symile_dist.run_directory import load_run, read_run
from tests import slurm as real_slurm
from tests.hosts import Hosts, RayHosts, hosts, why_not
from tests.system.conftest import MakeConfig
from tests.system.runs import history, losses, state_digests, train

needs_slurm = pytest.mark.skipif(
    bool(real_slurm.missing()), reason=f"no Slurm here (Debian: slurm-wlm, munge): {', '.join(real_slurm.missing())}"
)
needs_hosts = pytest.mark.skipif(bool(why_not()), reason=f"no network namespaces here: {why_not()}")

STEPS = 300
LONG = [f"train.steps={STEPS}", "checkpoint.every=20", "validation.every=100"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of the test's own; nothing of the machine's Ray."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory, shared_ray: None) -> Config:
    """The run that the others have to end like."""
    from symile_dist.config import parse_config
    from tests.system.conftest import config_text

    place = [f"run.directory={tmp_path_factory.mktemp('undisturbed') / 'run'}"]
    config = parse_config(config_text(shards), "tiny.yaml", [*LONG, *place]).config.with_absolute_paths()
    train(config)
    return config


def command(*words: object, code: int = 0, **environment: str) -> str:
    """What `symile-dist WORDS` prints; fails for another exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "symile_dist", *map(str, words)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == code, f"{words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code != 2 else done.stderr


def told(run: object) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(command("status", run, "--json"))
    return content


def until(done: Callable[[], Any], words: str, seconds: float = 120) -> Any:
    """Polls, as a user would; what is asked decides, not the time."""
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, words
        time.sleep(0.5)
    return found


def reached(config: Config, step: int) -> Callable[[], bool]:
    def done() -> bool:
        with contextlib.suppress(OSError, ValueError):
            return any(record["step"] >= step for record in history(config))
        return False

    return done


def with_variable(name: str, value: str) -> list[psutil.Process]:
    """Processes that have it in their environment: all that a job has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(name) == value:
                found.append(process)
    return found


# -- this machine ----------------------------------------------------------------------------------------------------


def test_a_job_in_the_background_is_followed_and_its_exit_code_kept(
    make_config: MakeConfig, config_file: Path, tmp_path: Path
) -> None:
    config = make_config("train.steps=6", name="background")
    place = [f"run.directory={config.run_directory}", "run.name=background"]
    output = command("submit", config_file, *place, "train.steps=6", "--on", "local", "--wait")
    assert "step 6/6" in output and "finished: step 6" in output
    status = told("background")
    assert (status["state"], status["exit_code"], status["step"], status["on"]) == ("finished", 0, 6, "local")
    assert command("logs", "background") in output
    assert "rank 1 starts" in command("logs", config.run_directory, "--rank", 1)
    assert "to be seen" in command("logs", "background", "--rank", 7, code=2)
    assert "has ended already" in command("stop", "background", code=2)
    rows = json.loads(command("list", "--json"))
    assert [(row["name"], row["state"]) for row in rows] == [("background", "finished")]
    # The same command again: another job of the run, which has nothing left to do.
    assert "finished: step 6" in command("submit", config_file, *place, "train.steps=6", "--on", "local", "--wait")


@pytest.mark.slow
def test_two_nodes_of_this_machine_stop_and_go_on(
    make_config: MakeConfig, config_file: Path, undisturbed: Config
) -> None:
    config = make_config(*LONG, name="local")
    place = [f"run.directory={config.run_directory}", "run.name=local"]
    command("submit", config_file, *place, *LONG, "--on", "local", "--nodes", 2)
    until(reached(config, 30), "the job does not reach step 30")
    assert "running" in command("submit", config_file, *place, *LONG, "--on", "local", "--nodes", 2, code=2)
    command("stop", "local")
    until(lambda: told("local")["state"] == "stopped", "the job does not stop")
    assert told("local")["exit_code"] == 75
    until(lambda: not with_variable(EXPECTED_NODES, "2"), "processes of the job are left", 30)
    command("resume", "local", "--wait")
    assert told("local")["state"] == "finished"
    assert state_digests(config, STEPS) == state_digests(undisturbed, STEPS)
    assert losses(config) == losses(undisturbed)


# -- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with real_slurm.slurm(tmp_path_factory.mktemp("slurm")) as configuration:
        yield configuration


@pytest.fixture
def on_slurm(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """on_slurm("scontrol", ...): what a command of Slurm's prints."""
    monkeypatch.setenv("SLURM_CONF", str(cluster))

    def run(*words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    return run


@pytest.mark.slow
@needs_slurm
def test_a_preempted_job_is_queued_again_and_ends_like_the_undisturbed_run(
    make_config: MakeConfig, config_file: Path, undisturbed: Config, on_slurm: Callable[..., str]
) -> None:
    config = make_config(*LONG, name="slurm")
    place = [f"run.directory={config.run_directory}", "run.name=slurm"]
    record = json.loads(command("submit", config_file, *place, *LONG, "--on", "slurm", "--nodes", 2, "--json"))
    number = record["handle"]["id"]
    for restarts, step, whom in ((1, 30, []), (2, 90, ["--batch"])):  # the steps get it, then the script alone
        until(reached(config, step), f"the job does not reach step {step}")
        on_slurm("scancel", "--signal=USR1", *whom, number)
        until(lambda restarts=restarts: told("slurm")["facts"]["restarts"] == restarts, "it is not queued again", 60)
    until(lambda: told("slurm")["state"] == "finished", "the job does not go on to its end", 180)
    status = told("slurm")
    assert status["exit_code"] == 0 and status["facts"]["nodes"] == "n[1-2]"
    ranks = json.loads((config.run_directory / "ranks.json").read_text())
    assert len({rank["node"] for rank in ranks}) == 2, "the ranks are on one node of Ray"
    assert state_digests(config, STEPS) == state_digests(undisturbed, STEPS)
    assert losses(config) == losses(undisturbed)
    until(lambda: not with_variable("SLURM_JOB_ID", number), "processes of the job are left", 30)


@pytest.mark.slow
@needs_slurm
def test_a_failing_job_returns_its_code_and_leaves_nothing(
    make_config: MakeConfig, config_file: Path, on_slurm: Callable[..., str]
) -> None:
    config = make_config(name="failing")
    place = [f"run.directory={config.run_directory}", "run.name=failing", "ray.max_failures=0"]
    fault = json.dumps([{"at": "step", "rank": 1, "step": 4, "do": "raise"}])
    submitted = command("submit", config_file, *place, "--on", "slurm", "--nodes", 2, "--json", **{FAILPOINTS: fault})
    number = json.loads(submitted)["handle"]["id"]
    until(lambda: read_run(config.run_directory).get("status") == "failed", "the run does not fail")
    begin = time.monotonic()
    until(lambda: told("failing")["state"] == "failed", "the job does not end", 60)
    until(lambda: not with_variable("SLURM_JOB_ID", number), "processes of the job are left", 60)
    assert time.monotonic() - begin < 30
    assert told("failing")["exit_code"] == 1
    assert "failed:" in command("logs", "failing")


@pytest.mark.slow
@needs_slurm
def test_of_an_array_of_seeds_one_is_preempted_and_all_end(
    make_config: MakeConfig, config_file: Path, on_slurm: Callable[..., str]
) -> None:
    config = make_config(*LONG, name="array")
    place = [f"run.directory={config.run_directory}", "run.name=array", "train.steps=60", "ray.num_workers=1"]
    sent = [*LONG, *place, "--seeds", "0,2", "--on", "slurm"]
    records = json.loads(command("submit", config_file, *sent, "--json"))
    first, last = (record["handle"]["id"] for record in records)
    assert (first.partition("_")[2], last.partition("_")[2]) == ("0", "2")
    twice = command("submit", config_file, *sent, code=2)
    assert "its job is queued" in twice or "its job is running" in twice
    seeds = {seed: Path(f"{config.run_directory}-seed{seed}") for seed in (0, 2)}

    def newest(seed: int) -> int:
        with contextlib.suppress(OSError, ValueError):
            lines = (seeds[seed] / "history.jsonl").read_text().splitlines()
            return max(int(json.loads(line).get("step", 0)) for line in lines)
        return 0

    until(lambda: newest(2) >= 10, "the last seed does not reach step 10", 240)
    on_slurm("scancel", "--signal=USR1", last)
    for seed, restarts in ((2, 1), (0, 0)):
        until(lambda seed=seed: told(f"array-seed{seed}")["state"] == "finished", f"seed {seed} does not end", 180)
        status = told(f"array-seed{seed}")
        assert (status["exit_code"], status["facts"]["restarts"]) == (0, restarts)
        assert newest(seed) == 60 and load_run(seeds[seed]).seed == seed
    assert "queued again" in command("logs", "array-seed2")
    assert "queued again" not in command("logs", "array-seed0")


# -- a Ray over two hosts --------------------------------------------------------------------------------------------

QUICK = {
    # A lost host is seen in seconds rather than in a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    "OMP_WAIT_POLICY": "passive",
}


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Hosts]:
    with hosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def ray_hosts(two_hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> RayHosts:
    return RayHosts(two_hosts, tmp_path_factory.mktemp("ray"), 1, QUICK)


@pytest.fixture
def on_ray(ray_hosts: RayHosts, monkeypatch: pytest.MonkeyPatch) -> RayHosts:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_hosts.dashboard)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(ray_hosts.token))
    return ray_hosts


@pytest.mark.slow
@needs_hosts
def test_a_job_of_a_ray_cluster_is_submitted_followed_stopped_and_resumed(
    make_config: MakeConfig, config_file: Path, undisturbed: Config, on_ray: RayHosts
) -> None:
    config = make_config(*LONG, name="ray")
    place = [f"run.directory={config.run_directory}", "run.name=ray"]
    submit = ["submit", config_file, *place, *LONG, "--on", "ray", "--nodes", 2]
    assert "asks for a token" in command(*submit, code=2, RAY_AUTH_TOKEN_PATH="", RAY_AUTH_TOKEN="0" * 64)
    assert not config.run_directory.exists()
    command(*submit)
    until(reached(config, 30), "the job does not reach step 30")
    nodes = {rank["host"] for rank in json.loads((config.run_directory / "ranks.json").read_text())}
    assert nodes, "no rank has told where it is"
    command("stop", "ray")
    until(lambda: told("ray")["state"] == "stopped", "the job does not stop")
    assert f"/{STEPS}" in command("logs", "ray")
    assert "resumed from step" in command("resume", "ray", "--wait")
    status = told("ray")
    assert (status["state"], status["exit_code"]) == ("finished", 0)
    assert state_digests(config, STEPS) == state_digests(undisturbed, STEPS)
    assert losses(config) == losses(undisturbed)
    broken = [f"run.directory={config.run_directory}-broken", "run.name=broken", "ray.max_failures=0", *LONG]
    fault = json.dumps([{"at": "step", "rank": 1, "step": 4, "do": "raise"}])
    profile = Path(os.environ["XDG_CONFIG_HOME"]) / "symile-dist" / "profiles.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text(json.dumps({"faulty": {"environment": {FAILPOINTS: fault}}}))
    submit = ["submit", config_file, *broken, "--on", "ray", "--nodes", 2, "--profile", "faulty", "--wait"]
    assert "failed: " in command(*submit, code=1)
    assert told("broken")["exit_code"] == 1


@pytest.mark.slow
@needs_hosts
def test_the_doctor_looks_at_every_node_and_at_what_is_between_them(
    make_config: MakeConfig, config_file: Path, on_ray: RayHosts, tmp_path: Path
) -> None:
    doctor = [sys.executable, "-m", "symile_dist", "doctor", str(config_file), "ray.num_workers=2", "--json"]
    environment = on_ray.environment | {"RAY_ADDRESS": on_ray.address, EXPECTED_NODES: "2"}
    process = on_ray.hosts.start(0, doctor, environment, tmp_path / "told.txt")
    code = process.wait(120)
    text = (tmp_path / "told.txt").read_text()
    told = json.loads(text[text.index("{\n") : text.rindex("}") + 1])
    checks = {each["check"]: each for each in told["findings"]}
    assert code == 0, [each for each in told["findings"] if each["level"] == "FAIL"]
    assert "2 nodes" in checks["cluster"]["found"] and "holds the run's 2 ranks" in checks["cluster"]["found"]
    assert checks["clocks"]["level"] == "OK"
    assert "between 2 nodes, gloo" in checks["all-reduce"]["found"]
    assert [each["check"] for each in told["findings"]].count("Python") == 2, "one of each node"


@pytest.mark.slow
@needs_hosts
def test_a_host_whose_cable_is_cut_and_then_one_that_dies_come_back(
    make_config: MakeConfig, config_file: Path, undisturbed: Config, on_ray: RayHosts
) -> None:
    config = make_config(*LONG, name="hosts")
    place = [f"run.directory={config.run_directory}", "run.name=hosts"]
    command("submit", config_file, *place, *LONG, "ray.collective_timeout_seconds=30", "--on", "ray", "--nodes", 2)

    def lost(times: int) -> Callable[[], bool]:
        return lambda: read_run(config.run_directory).get("restarts", 0) >= times

    until(reached(config, 30), "the job does not reach step 30")
    on_ray.hosts.cut(1)
    until(lost(1), "the cut is not seen")
    on_ray.hosts.heal(1)
    until(reached(config, 90), "the job does not go on after the cut")
    on_ray.hosts.kill(on_ray.nodes[1])
    until(lost(2), "the host's death is not seen")
    on_ray.restart(1)
    until(lambda: told("hosts")["state"] == "finished", "the job does not go on to its end", 200)
    assert {failure["cause"] for failure in read_run(config.run_directory)["failures"]} == {"node_lost"}
    assert state_digests(config, STEPS) == state_digests(undisturbed, STEPS)
    assert losses(config) == losses(undisturbed)
