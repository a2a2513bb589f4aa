"""The doctor finds what is wrong with a machine, a store or a config, and says what to do."""

from __future__ import annotations

import json
import resource
import socket
from pathlib import Path

import pytest

from symile_dist.cli import main
from symile_dist.config import Config, parse_config
from symile_dist.tools.doctor import bandwidth, fit, machine, store
from symile_dist.tools.doctor.command import before_submission, examine
from symile_dist.tools.doctor.finding import Finding, checked
from tests.s3 import Bucket
from tests.shards import config_text


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "FI_PROVIDER", "NCCL_IB_HCA"):
        monkeypatch.delenv(name, raising=False)


def made(shards: Path, *overrides: str) -> Config:
    return parse_config(config_text(shards), "my.yaml", overrides).config.with_absolute_paths()


def level(found: list[Finding], check: str) -> str:
    (one,) = [each for each in found if each.check == check]
    assert (one.fix != "") == (one.level != "OK"), one
    return one.level


def test_a_good_machine_and_config_have_no_failures(shards: Path) -> None:
    found = examine(made(shards))
    assert not [each for each in found if each.level == "FAIL"]
    for check in ("Python", "torch", "ray", "deepspeed", "shared memory", "disk", "config", "data 'train'", "forward"):
        assert any(each.check == check or check == "disk" for each in found), f"{check} was not looked at"


def test_json_and_exit_code(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text(config_text(shards))
    assert main(["doctor", "my.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["FAIL"] == 0 and told["OK"] == sum(each["level"] == "OK" for each in told["findings"])
    assert main(["doctor", "my.yaml", "modalities.a.encoder.input_dim=3"]) == 1
    assert "forward" in capsys.readouterr().out


def test_an_encoder_of_another_shape_than_the_data(shards: Path) -> None:
    config = made(shards, "modalities.a.encoder.input_dim=3")
    with pytest.raises(ValueError, match="input_dim is 3"):
        before_submission(config, "ray")
    assert level(checked("forward", lambda: fit.forward_works(config)), "forward") == "FAIL"


def test_gpus_that_are_not_here(shards: Path) -> None:
    found = list(machine.devices(1, 2, several_nodes=False))
    assert [each.level for each in found] == ["FAIL"] and found[0].check in ("CUDA", "GPUs")


@pytest.mark.parametrize(
    ("variable", "value"), [("GLOO_SOCKET_IFNAME", "nope0"), ("NCCL_SOCKET_IFNAME", "=nope0,nope1")]
)
def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    found = list(machine.network(several_nodes=True))
    assert level(found, variable) == "FAIL" and "lo" in found[0].fix
    monkeypatch.setenv(variable, "lo")
    assert level(list(machine.network(several_nodes=True)), variable) == "OK"


def test_a_fabric_that_is_asked_for_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/sys/class/infiniband").is_dir():
        pytest.skip("this machine has such a device")
    assert list(machine.fabric()) == []
    monkeypatch.setenv("FI_PROVIDER", "efa")
    assert level(list(machine.fabric()), "InfiniBand") == "FAIL"


def test_few_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        assert level(list(machine.open_files()), "open files") == "WARN"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_port_that_is_taken(shards: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = made(shards, f"metrics.port={taken.getsockname()[1]}", "metrics.enabled=true")
        assert level(list(machine.ports(config)), "ports") == "FAIL"
    assert level(list(machine.ports(config)), "ports") == "OK"


def test_a_run_directory_below_a_file(shards: Path) -> None:
    Path("file").touch()
    found = checked("run directory", lambda: machine.disks(made(shards, "run.directory=file/run")))
    assert level(found, "run directory") == "FAIL"


def test_what_two_processes_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "MEGABYTES", 1)
    found = list(bandwidth.between_processes(2, gpus=False))
    assert [each.check for each in found] == ["all-reduce", "all-gather"]
    assert all("GB/s between 2 processes" in each.found for each in found)


def test_a_mirror_that_takes_and_refuses(shards: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"data.storage.endpoint_url={bucket.endpoint}"
    config = made(shards, f"checkpoint.mirror=s3://{bucket.name}/run", endpoint)
    found = checked("checkpoint.mirror", lambda: store.mirror_takes(config))
    assert level(found, "checkpoint.mirror") == "OK" and "a second write refused" in found[0].found
    nowhere = made(shards, "checkpoint.mirror=s3://no-such-bucket/run", endpoint, "data.storage.give_up_seconds=1")
    found = checked("checkpoint.mirror", lambda: store.mirror_takes(nowhere))
    assert level(found, "checkpoint.mirror") == "FAIL"
    with pytest.raises(ValueError, match="no-such-bucket"):
        before_submission(nowhere, "slurm")


def test_data_that_only_the_cluster_sees_is_left_to_it(shards: Path) -> None:
    config = made(shards, "data.train=/only/there")
    with pytest.raises(ValueError, match="/only/there"):
        before_submission(config, "slurm")
    before_submission(config, "kuberay")


def test_a_check_that_cannot_be_made_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise OSError("strange machine")

    assert [(each.level, each.found) for each in checked("x", broken)] == [("FAIL", "strange machine")]
