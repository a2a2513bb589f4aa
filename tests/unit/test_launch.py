"""What is submitted, and what is refused before that."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from symile_dist.cli import build_parser, main
from symile_dist.config import parse_config
from symile_dist.health.lease import lease_file, locked
from symile_dist.health.restarts import Failure
from symile_dist.launch import BACKENDS
from symile_dist.launch.command import _refuse_second, prepared, resubmitted, status_of
from symile_dist.launch.job import Job, State, backend_named, minutes_of, node_sizes, rank_overrides
from symile_dist.launch.local import LocalBackend, state_of
from symile_dist.launch.processes import identity, pieces_of
from symile_dist.launch.profiles import Profile, load_profiles
from symile_dist.launch.ray_jobs import staged_files
from symile_dist.launch.records import new_id, record_of, records, remember
from symile_dist.launch.slurm import _ended, script_of
from symile_dist.run_directory import check, prepare, read_run, update_run, write_ranks
from tests.shards import config_text


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without settings, in a folder of her own."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return tmp_path


@pytest.fixture
def config_file(shards: Path, home: Path) -> Path:
    path = home / "work" / "my.yaml"
    path.write_text(config_text(shards, run="mine"))
    return path


def profiles(home: Path, text: str) -> None:
    (home / "settings" / "symile-dist").mkdir(parents=True)
    (home / "settings" / "symile-dist" / "profiles.yaml").write_text(text)


def job(shards: Path, profile: Profile | None = None, **changes: Any) -> Job:
    config = parse_config(
        config_text(shards, run="mine"), "my.yaml", ["ray.num_workers=2"]
    ).config.with_absolute_paths()
    given: dict[str, Any] = {"nodes": 2, "gpus_per_node": 0, "cpus_per_node": 1, "id": "20260102-030405"} | changes
    return Job(config, profile=profile or Profile(), **given)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says that must end with exit code 2, having written nothing."""
    before = sorted(Path().rglob("*"))
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 2, f"exit code {code}: {captured.err}"
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    assert sorted(Path().rglob("*")) == before, "something was written"
    return captured.err


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("12:00:00", 720), ("0:00:30", 1), ("2-0", 2880), ("1-12:30", 2190), ("1-0:0:1", 1441)],
)
def test_time_limits_are_slurm_s(text: str, minutes: int) -> None:
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "-5", "1:2:3:4", "0", "1d"])
def test_a_time_limit_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="--time"):
        minutes_of(text)


def test_nodes_and_gpus_give_the_ranks(shards: Path) -> None:
    assert rank_overrides(2, 3, ["train.steps=4"]) == ["ray.num_workers=6", "ray.gpus_per_worker=1"]
    assert rank_overrides(3, 2, ["ray.num_workers=4"]) == ["ray.gpus_per_worker=1"]
    assert rank_overrides(3, None, []) == rank_overrides(3, 0, []) == []
    four = parse_config(config_text(shards), "my.yaml", ["ray.num_workers=4", "ray.cpus_per_worker=2"]).config
    assert node_sizes(four, 2, None, None) == (0, 4)
    assert node_sizes(four, 2, None, 9) == (0, 9)
    assert node_sizes(four, 3, 2, None) == (2, 4)
    on_gpus = parse_config(config_text(shards), "my.yaml", ["ray.num_workers=4", "ray.gpus_per_worker=1"]).config
    assert node_sizes(on_gpus, 2, None, None) == (2, 2)
    with pytest.raises(ValueError, match="one of them is wrong"):
        node_sizes(on_gpus, 2, 0, None)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0, None, None), "--nodes 0"),
        ((1, -1, None), "--gpus-per-node -1"),
        ((1, None, 0), "--cpus-per-node 0"),
        ((5, None, None), "more than the ranks"),
        ((2, 1, None), "2 ranks a node"),
        ((2, None, 1), "2 ranks a node need 2"),
    ],
)
def test_nodes_that_do_not_hold_the_ranks(
    shards: Path, numbers: tuple[int, int | None, int | None], words: str
) -> None:
    config = parse_config(config_text(shards), "my.yaml", ["ray.num_workers=4"]).config
    with pytest.raises(ValueError, match=words):
        rank_overrides(numbers[0], numbers[1], ["ray.num_workers=4"])
        node_sizes(config, *numbers)


# -- profiles --------------------------------------------------------------------------------------------------------


def test_every_mistake_of_a_profile_is_told_with_its_place(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiles(home, "one: {slurm: {partitoin: gpu}}\ntwo: {environment: {AWS_SECRET_ACCESS_KEY: abc}, backend: slrum}\n")
    with pytest.raises(ValueError) as told:
        load_profiles()
    words = str(told.value)
    assert "one.slurm.partitoin: unknown key; did you mean 'partition'?" in words
    assert "two.environment" in words and "does not stand here" in words and "abc" not in words
    assert "two.backend" in words


@pytest.mark.parametrize("reference", ["abc", "env:", "env:A B", "vault:x", "secret:name"])
def test_a_secret_is_named_not_written(reference: str) -> None:
    with pytest.raises(ValueError, match="never the secret itself"):
        Profile.model_validate({"secrets": {"AWS_SECRET_ACCESS_KEY": reference}})


def test_the_user_s_profile_comes_first_and_an_unknown_one_is_refused(
    home: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiles(home, "a: {slurm: {partition: mine}}\n")
    Path("configs").mkdir()
    Path("configs/profiles.yaml").write_text("a: {slurm: {partition: theirs}}\nb: {backend: local}\n")
    assert {name: found.slurm.partition for name, found in load_profiles().items()} == {"a": "mine", "b": None}
    assert "did you mean" in refused(capsys, "submit", config_file, "--on", "local", "--profile", "aa")


# -- what is refused -------------------------------------------------------------------------------------------------


def test_an_unknown_backend(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'slurm'?" in refused(capsys, "submit", config_file, "--on", "slrum")
    assert "--on" in refused(capsys, "submit", config_file)


def test_a_missing_sbatch(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(config_file.parent))
    assert "sbatch is not here" in refused(capsys, "submit", config_file, "--on", "slurm")


def test_a_batch_that_no_world_size_divides(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = refused(capsys, "submit", config_file, "--on", "slurm", "--nodes", 5, "--gpus-per-node", 1)
    assert "12 is not divisible by ray.num_workers = 5" in words


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:6379", ""])
def test_a_cluster_that_does_not_answer(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    words = refused(capsys, "submit", config_file, "--on", "ray")
    assert (address or "Name its dashboard's address") in words


def test_a_run_directory_that_cannot_be_written(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert "file" in refused(capsys, "submit", config_file, "--on", "local", "run.directory=file/run")
    Path("other").mkdir()
    Path("other/letter.txt").touch()
    assert "not a run directory" in refused(capsys, "submit", config_file, "--on", "local", "run.directory=other")


def test_no_credentials_for_the_store(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "nowhere")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    options = ["data.train=s3://bucket/train", f"data.storage.endpoint_url={endpoint}"]
    words = refused(capsys, "submit", config_file, "--on", "local", *options, "data.storage.give_up_seconds=2")
    assert "credentials" in words.lower()


def test_data_that_is_not_there(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(capsys, "submit", config_file, "--on", "local", "data.train=nowhere")


def test_a_secret_that_is_not_set(home: Path, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiles(home, "default: {secrets: {AWS_SECRET_ACCESS_KEY: env:NOT_SET}}\n")
    assert "NOT_SET is not set" in refused(capsys, "submit", config_file, "--on", "local")


@pytest.mark.parametrize("verb", [["status"], ["logs"], ["stop"], ["resume"]])
def test_a_run_that_nobody_knows(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "symile-dist list" in refused(capsys, *verb, "nobody")


# -- dry runs --------------------------------------------------------------------------------------------------------


def test_a_dry_run_needs_nothing_heavy(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, more in (("local", []), ("slurm", []), ("ray", [])):
        code = (
            "import sys; from symile_dist.cli import main; "
            f"code = main(['submit', {str(config_file)!r}, '--on', {backend!r}, '--dry-run', *{more!r}]); "
            "heavy = {'torch', 'ray', 'deepspeed', 'numpy'} & set(sys.modules); sys.exit(str(heavy) if heavy else code)"
        )
        environment = os.environ | {"RAY_API_SERVER_ADDRESS": "http://head:8265"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and done.stdout.strip(), f"{backend}: {done.stderr}"


def test_a_dry_run_can_be_written_to_a_file(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(config_file), "--on", "slurm", "--dry-run", "--output", "job.sh"]) == 0
    assert Path("job.sh").read_text().startswith("#!/bin/bash\n#SBATCH ")
    assert not Path("runs").exists()


# -- Slurm's script --------------------------------------------------------------------------------------------------

FULL = {
    "python": "/opt/a b/python",
    "environment": {"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "it's $HOME; `rm`"},
    "secrets": {"AWS_SECRET_ACCESS_KEY": "env:MY_KEY", "HF_TOKEN": "file:/keys/hf"},
    "slurm": {
        "account": "lab",
        "partition": "gpu",
        "qos": "high",
        "constraint": "h200",
        "reservation": "mine",
        "exclusive": True,
        "modules": ["cuda/12.8"],
        "container": "/images/symile.sqsh",
        "container_mounts": ["/data"],
    },
}


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_script_is_bash_and_quotes_what_it_is_given(shards: Path, nodes: int, runtime: str) -> None:
    profile = Profile.model_validate(FULL | {"slurm": FULL["slurm"] | {"container_runtime": runtime}})  # type: ignore[operator]
    script = script_of([job(shards, profile, nodes=nodes, gpus_per_node=8, minutes=90, resume=True)])
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in (
        "account=lab",
        "partition=gpu",
        "gpus-per-node=8",
        "time=90",
        "exclusive",
        f"nodes={nodes}",
        "requeue",
    ):
        assert f"#SBATCH --{line}\n" in script
    assert "export NOTE='it'\"'\"'s $HOME; `rm`'\n" in script
    assert 'export AWS_SECRET_ACCESS_KEY="${MY_KEY}"\n' in script and "module load cuda/12.8\n" in script
    assert "'/opt/a b/python' -m symile_dist train" in script and script.count("--resume") == 1
    assert ("--container-image=/images/symile.sqsh" in script) == (runtime == "pyxis")
    assert ("apptainer exec --nv" in script) == (runtime == "apptainer")
    assert ("ray_node worker" in script) == (nodes > 1)


def test_a_name_that_sbatch_would_take_apart_is_refused(shards: Path) -> None:
    profile = Profile.model_validate({"slurm": {"account": 'a"\n#SBATCH --wrap=x'}})
    with pytest.raises(ValueError, match="cannot stand there"):
        script_of([job(shards, profile)])


def test_seeds_are_one_array_each_in_its_own_place(
    config_file: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = home / "work" / "a $HOME 100%"
    given = [f"run.directory={json.dumps(str(odd))}", "--seeds", "3,10-11", "--on", "slurm"]
    assert main(["submit", str(config_file), *given, "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "#SBATCH --array=3,10,11\n" in script and "#SBATCH --job-name=mine\n" in script
    driver = next(line for line in script.splitlines() if " train " in line).split(" train ")[1].split(" --plain")[0]
    (output,) = (line.removeprefix("#SBATCH --output=") for line in script.splitlines() if "--output=" in line)
    for seed in (3, 10, 11):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(seed)}
        done = subprocess.run(["bash", "-c", f"printf %s {driver}"], env=environment, capture_output=True, check=True)
        path = Path(done.stdout.decode())
        assert path.parents[2] == Path(f"{odd}-seed{seed}") and path.name == "config.yaml"
        # As sbatch takes a file's name apart; it strips the quotes around what has spaces.
        assert output.strip('"').replace("%a", str(seed)).replace("%%", "%") == str(path.parent / "output.txt")
    assert not list(home.glob("work/a *")), "a dry run writes nothing"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "write 0,1,2 or 0-4"),
        ("1,x", "write 0,1,2 or 0-4"),
        ("-1", "write 0,1,2 or 0-4"),
        ("4-2", "from the lower"),
        ("0-1000", "1,000 at most"),
        ("0-999999999", "1,000 at most"),
        ("0-3,2", "the same seed twice"),
    ],
)
def test_seeds_that_are_none(text: str, words: str, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, "submit", config_file, "--on", "slurm", "--dry-run", f"--seeds={text}")


def test_seeds_and_a_seed_are_refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = refused(capsys, "submit", config_file, "seed=3", "--seeds", "0-4", "--on", "slurm", "--dry-run")
    assert "say one of them" in words


def test_every_seed_has_its_own_place_and_mirror(config_file: Path) -> None:
    command = ["submit", str(config_file), "checkpoint.mirror=s3://bucket/runs/", "--seeds", "0-1", "--on", "local"]
    options = build_parser().parse_args(command)
    backend, jobs = prepared(options)
    assert backend == "local" and [each.config.seed for each in jobs] == [0, 1]
    assert [each.name for each in jobs] == ["mine-seed0", "mine-seed1"]
    assert [each.config.checkpoint.mirror for each in jobs] == ["s3://bucket/runs-seed0", "s3://bucket/runs-seed1"]
    assert [each.config.run_directory.name for each in jobs] == ["mine-seed0", "mine-seed1"]
    assert jobs[0].id == jobs[1].id


def test_of_seeds_that_go_one_by_one_those_before_a_refusal_are_named(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit(self: LocalBackend, one: Job) -> dict[str, Any]:
        if one.config.seed == 2:
            raise ValueError("no more")
        return {"folder": str(one.folder), "host": "elsewhere", "process": {"pid": 1, "created": 0.0}}

    monkeypatch.setattr(LocalBackend, "submit", submit)
    assert main(["submit", str(config_file), "--seeds", "1-3", "--on", "local"]) == 2
    assert "no more (submitted before it: mine-seed1)" in capsys.readouterr().err
    assert record_of("mine-seed1")["handle"]["host"] == "elsewhere"
    assert not Path("runs/mine-seed2").exists() and not Path("runs/mine-seed3").exists()


def test_a_time_limit_that_a_backend_does_not_keep_is_refused_before_a_dry_run(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    for backend in ("local", "ray"):
        words = refused(capsys, "submit", config_file, "--on", backend, "--time", "60", "--dry-run")
        assert f"leave it out with --on {backend}" in words


def test_requeueing_can_be_turned_off(shards: Path) -> None:
    script = script_of([job(shards, Profile.model_validate({"slurm": {"requeue": False}}))])
    assert "#SBATCH --no-requeue\n" in script and '[ -n "" ]' in script


# -- what goes along to a Ray cluster --------------------------------------------------------------------------------


def test_what_a_job_needs_not_stays_here(shards: Path, home: Path) -> None:
    root = home / "work" / "mine"
    for name in ("encoder.py", "sub/more.py", "data/shard.tar", "runs/a/x", ".git/config", "notes.txt", "sub/a.tar"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    profile = Profile.model_validate({"ray": {"working_dir": str(root), "ignore": ["*.txt"]}})
    assert staged_files(job(shards, profile)) == ["encoder.py", "sub/more.py"]
    (root / "big.bin").write_bytes(b"\0" * 2_000_000)
    small = Profile.model_validate({"ray": {"working_dir": str(root), "max_megabytes": 1}})
    with pytest.raises(ValueError, match="more than 1 MB"):
        staged_files(job(shards, small))


# -- records ---------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_name_and_by_directory(shards: Path, home: Path) -> None:
    one = job(shards)
    one.folder.mkdir(parents=True)
    remember(one, "slurm", {"id": "7", "folder": str(one.folder)})
    directory = one.config.run_directory
    for name in ("mine", str(directory), "runs/mine"):
        assert record_of(name)["handle"]["id"] == "7"
    assert [record["name"] for record in records()] == ["mine"]
    assert new_id(directory) != one.id
    os.rename(directory, home / "moved")
    assert record_of(str(home / "moved"))["run"] == str(home / "moved"), "a run that was moved"


def test_two_runs_of_one_name_are_told_apart(shards: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        (home / folder).mkdir()
        config = parse_config(config_text(shards, run="mine"), "x", [f"run.directory={home / folder / 'mine'}"]).config
        remember(Job(config, 1, 0, 1, Profile(), "1"), "kuberay", {})
    assert "several runs" in refused(capsys, "status", "mine")


def test_a_directory_that_holds_only_a_submission_is_free(shards: Path) -> None:
    one = job(shards)
    one.folder.mkdir(parents=True)
    remember(one, "slurm", {"id": "7", "folder": str(one.folder)})
    check(one.config, fresh=False, resume=False)
    prepare(one.config, fresh=False, resume=False)
    assert read_run(one.config.run_directory)["launch"]["handle"]["id"] == "7"


# -- this machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "state"), [(0, "finished"), (75, "stopped"), (130, "stopped"), (1, "failed"), (2, "failed")]
)
def test_exit_codes(code: int, state: str) -> None:
    assert state_of(code) == state


def test_a_job_whose_process_is_gone_is_lost_and_another_process_is_not_it(home: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    handle = {"folder": str(home), "host": socket.gethostname(), "process": identity(child.pid)}
    assert LocalBackend().status(handle).state == "running"
    later = handle | {"process": {"pid": child.pid, "started": time.time() + 60}}
    assert LocalBackend().status(later).state == "lost", "a process that has only the number"
    child.communicate()
    assert LocalBackend().status(handle).state == "lost"
    (home / "exit_code").write_text("75\n")
    assert LocalBackend().status(handle).state == "stopped"
    assert LocalBackend().status(handle | {"host": "elsewhere"}).exit_code == 75


def test_following_a_file_ends_with_what_was_written_last(tmp_path: Path) -> None:
    path, pieces = tmp_path / "log", ["one\n", "two\n", "three"]

    def ended() -> bool:
        with open(path, "a") as file:
            file.write(pieces.pop(0))
        return not pieces

    path.touch()
    assert "".join(pieces_of(path, True, ended)) == "one\ntwo\nthree"


def test_backends_are_all_there() -> None:
    for name in BACKENDS:
        backend = backend_named(name)
        for verb in ("check", "render", "submit", "status", "logs", "stop"):
            assert callable(getattr(backend, verb)), f"{name} has no {verb}"


def test_the_profile_s_schema_is_documented() -> None:
    def undocumented(model: Any) -> list[str]:
        return [name for name, field in model.model_fields.items() if not field.description]

    for model in (Profile, *(field.annotation for field in Profile.model_fields.values())):
        if hasattr(model, "model_fields"):
            assert not undocumented(model), model
    assert yaml.safe_dump(Profile().model_dump()) and json.dumps(Profile.model_json_schema())


# -- what a review found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "told", "expected"),
    [
        ("finished", "0:0", ("finished", 0)),
        ("failed", "3:0", ("failed", 3)),
        ("failed", "75:0", ("stopped", 75)),
        ("stopped", "0:9", ("stopped", 137)),
        ("stopped", "0:0", ("stopped", 75)),
        ("failed", "0:53", ("failed", 181)),
        ("failed", "0:0", ("failed", 1)),
        ("failed", "", ("failed", 1)),
        ("running", "0:0", ("running", None)),
    ],
)
def test_only_a_complete_job_of_slurm_has_the_code_0(
    state: State, told: str, expected: tuple[State, int | None]
) -> None:
    assert _ended(state, told) == expected


def test_a_process_of_another_host_is_not_ended_here(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(shards).config
    prepare(config, fresh=False, resume=False)
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock = lease_file(config.run_directory)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump({"process": bystander.pid, "host": "elsewhere"}, file)
        file.flush()
        assert "on elsewhere; stop it there" in refused(capsys, "stop", "mine")
        assert bystander.poll() is None, "a process of this machine that has the number was ended"
    bystander.communicate()


def test_a_run_that_trains_in_a_terminal_after_its_job_is_running(shards: Path, config_file: Path) -> None:
    one = job(shards)
    prepare(one.config, fresh=False, resume=False)
    one.folder.mkdir(parents=True)
    (one.folder / "exit_code").write_text("2\n")
    remember(
        one, "local", {"folder": str(one.folder), "host": socket.gethostname(), "process": {"pid": 1, "started": 0}}
    )
    assert status_of(record_of("mine")).state == "failed"
    with locked(one.config.run_directory):
        assert status_of(record_of("mine")).state == "running"
        with pytest.raises(ValueError, match=r"stop .* first"):
            _refuse_second(one.config.run_directory)


def test_without_a_place_for_records_nothing_is_started(
    config_file: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "blocked").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "blocked"))
    assert "blocked" in refused(capsys, "submit", config_file, "--on", "local")


def test_what_a_backend_refuses_leaves_nothing(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LocalBackend, job: Job) -> dict[str, Any]:
        raise ValueError("no room")

    monkeypatch.setattr(LocalBackend, "submit", refuse)
    assert "no room" in refused(capsys, "submit", config_file, "--on", "local")


@pytest.mark.parametrize("content", ['{"launch": {"backend": "local"}}', "[]", '{"launch": 3}', "{", '{"launch": []}'])
def test_a_damaged_record_is_none(shards: Path, home: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = job(shards).config
    prepare(config, fresh=False, resume=False)
    (config.run_directory / "run.json").write_text(content)
    index = home / "state" / "symile-dist" / "runs" / "x.json"
    index.parent.mkdir(parents=True)
    index.write_text(content)
    assert main(["list"]) == 0 and main(["status", "mine"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_status_has_failures_with_their_causes_and_the_ranks_hosts(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job(shards).config
    prepare(config, fresh=False, resume=False)
    failures = [Failure("rank_lost", f"rank 1 was lost, in step {step + 1}", step, 1, "n") for step in range(6)]
    told = [vars(failure) for failure in failures]
    update_run(config.run_directory, status="restarting", restarts=6, failures=[*told, "cut"])
    write_ranks(config.run_directory, {n: {"rank": n, "host": "ab"[n // 2], "pid": 7, "node": "n"} for n in range(4)})
    with locked(config.run_directory):
        assert main(["status", "mine"]) == 0
    words = capsys.readouterr().out
    assert "it is        restarting" in words and "ranks        a: 0 1; b: 2 3" in words
    assert words.count("failure      rank_lost: rank 1 was lost, in step") == 5 and "in step 6" in words
    assert main(["status", "mine", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [failure["step"] for failure in found["failures"]] == list(range(6))
    assert found["ranks"][2] == {"rank": 2, "host": "b", "pid": 7}


def test_a_moved_run_is_still_what_it_was(shards: Path, home: Path) -> None:
    one = job(shards)
    prepare(one.config, fresh=False, resume=False)
    one.folder.mkdir(parents=True)
    (one.folder / "exit_code").write_text("0\n")
    (one.folder / "output.txt").write_text("words\n")
    remember(
        one, "local", {"folder": str(one.folder), "host": socket.gethostname(), "process": {"pid": 1, "started": 0}}
    )
    os.rename(one.config.run_directory, home / "moved")
    record = record_of(str(home / "moved"))
    assert status_of(record).state == "finished"
    assert "".join(LocalBackend().logs(record["handle"], follow=False)) == "words\n"


def resume_options(**given: Any) -> argparse.Namespace:
    nothing = dict.fromkeys(("nodes", "gpus_per_node", "cpus_per_node", "time", "profile"))
    return argparse.Namespace(**nothing | {"overrides": []} | given)


def test_a_resume_of_another_size_has_other_ranks(shards: Path) -> None:
    one = job(shards)
    prepare(one.config, fresh=False, resume=False)
    record = {"run": str(one.config.run_directory), "backend": "slurm", "job_sizes": {"nodes": 2, "time": "90"}}
    _, same = resubmitted(resume_options(), record | {"job_sizes": {"nodes": 2, "time": "90", "backend": "slurm"}})
    assert (same.nodes, same.config.world_size, same.minutes, same.resume) == (2, 2, 90, True)
    _, larger = resubmitted(resume_options(nodes=3, gpus_per_node=2), record)
    assert (larger.config.world_size, larger.config.ray.gpus_per_worker, larger.minutes) == (6, 1, None)
    _, given = resubmitted(resume_options(gpus_per_node=2, overrides=["ray.num_workers=4"]), record)
    assert (given.config.world_size, given.config.ray.gpus_per_worker) == (4, 1)


def test_a_job_that_never_began_is_resumed_from_what_was_submitted(shards: Path) -> None:
    one = job(shards)
    one.folder.mkdir(parents=True)
    (one.folder / "config.yaml").write_text(one.config.to_yaml())
    record = {"run": str(one.config.run_directory), "backend": "local", "job": one.id}
    _, again = resubmitted(resume_options(nodes=2), record)
    assert again.config.digest() == one.config.digest()


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "WANDB_KEY", "GH_PAT", "HF_TOKEN"])
def test_what_looks_like_a_secret_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="does not stand here"):
        Profile.model_validate({"environment": {name: "x"}})


def test_what_only_looks_like_one_is_not() -> None:
    Profile.model_validate({"environment": {"TOKENIZERS_PARALLELISM": "false", "AWS_SHARED_CREDENTIALS_FILE": "/c"}})
    with pytest.raises(ValueError, match="does not stand here"):
        Profile.model_validate({"environment": {"DATABASE": "postgres://user:word@host/x"}})
    with pytest.raises(ValueError, match=r"ray\.token"):
        Profile.model_validate({"ray": {"token": "supersecret"}})


def test_paths_and_times_that_sbatch_takes_for_something_else(shards: Path) -> None:
    config = parse_config(config_text(shards), "x", ["run.directory=/runs/50%j"]).config
    assert "--output=/runs/50%%j/jobs/" in script_of([Job(config, 1, 0, 1, Profile(), "1")])
    with pytest.raises(ValueError, match="grace_seconds"):
        script_of([job(shards, minutes=2)])


def test_output_without_a_dry_run_is_refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--dry-run" in refused(capsys, "submit", config_file, "--on", "local", "--output", "x.txt")


def test_the_last_descendant_is_ended_though_its_parent_has_gone() -> None:
    code = (
        "import subprocess, sys\n"
        "from symile_dist.launch.processes import adopt_orphans, end_descendants\n"
        "adopt_orphans()\n"
        # A grandchild that is deaf to SIGTERM; its parent ends at once.
        "deaf = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); '\n"
        "deaf += 'print(1, flush=True); time.sleep(99)'\n"
        "parent = 'import subprocess, sys; p = subprocess.Popen([sys.executable, \"-c\", sys.argv[1]]); print(p.pid)'\n"
        "child = subprocess.Popen([sys.executable, '-c', parent, deaf], stdout=subprocess.PIPE, text=True)\n"
        "lines = {child.stdout.readline().strip(), child.stdout.readline().strip()} - {'1'}\n"
        "child.wait()\n"
        "end_descendants(0.2)\n"
        "print(lines.pop())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not psutil.pid_exists(int(done.stdout)) or psutil.Process(int(done.stdout)).status() == "zombie"
