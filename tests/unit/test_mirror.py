"""The mirror of checkpoints, over a real S3 API: what is lost here comes back from there, and it holds up nobody."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from symile_dist.checkpoint.manager import CheckpointManager
from symile_dist.checkpoint.manifest import CheckpointError
from symile_dist.checkpoint.mirror import Mirror
from symile_dist.config import Config, parse_config
from symile_dist.errors import StorageError
from tests.s3 import Bucket, FaultProxy, at_random
from tests.unit.test_checkpoint_manager import TEXT, Model, save, steps

Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path, bucket: Bucket) -> Make:
    def config(*overrides: str, run: str = "run", endpoint: str = bucket.endpoint) -> Config:
        options = [
            f"run.directory={tmp_path / run}",
            f"checkpoint.mirror={bucket.url}/mirror",
            "checkpoint.keep_last=2",
            f"data.storage.endpoint_url={endpoint}",
            "data.storage.timeout_seconds=3",
            "data.storage.give_up_seconds=10",
        ]
        return parse_config(TEXT, "tiny.yaml", [*options, *overrides]).config

    return config


def names(bucket: Bucket) -> list[str]:
    found = bucket.client.list_objects_v2(Bucket=bucket.name, Prefix="mirror/").get("Contents", [])
    return sorted(entry["Key"].removeprefix("mirror/") for entry in found)


def finish_copying(manager: CheckpointManager) -> None:
    assert manager._copies is not None
    manager._copies.finish()


def kept(bucket: Bucket) -> list[int]:
    """Steps of which the mirror has all; fails when it has anything else."""
    found = names(bucket)
    committed = [int(name[5:13]) for name in found if name.endswith(".manifest.json")]
    for name in found:
        assert name == "owner.json" or int(name[5:13]) in committed, f"left over: {name}"
    return committed


def test_a_lost_run_directory_comes_back_through_a_store_that_fails_now_and_then(make: Make, bucket: Bucket) -> None:
    with FaultProxy(bucket.endpoint, at_random(3, 0.05, ("503", "reset"))) as proxy:
        config = make(endpoint=proxy.url)
        manager, model = CheckpointManager(config, fence=4), Model()
        for step in (5, 10, 15, 20):
            save(manager, model, step)
            finish_copying(manager)
        manager.finish()
        assert [(copied.step, copied.problem) for copied in manager.news_of_mirror()] == [
            (5, None), (10, None), (15, None), (20, None),
        ]  # fmt: skip
        assert kept(bucket) == [15, 20], "pruned like the disk"
        shutil.rmtree(config.run_directory)
        again = Model()
        assert Mirror(config).claim()[1] == 4, "the fence goes on from the mirror's"
        manager = CheckpointManager(config, fence=5)
        manifest = manager.find()
        assert manifest and manifest.step == 20
        manager.load(again, manifest)
        assert again.weight.tolist() == [20.0] * 8
        assert sum(proxy.injected.values()) > 0, "the store never failed"


def test_damage_here_is_mended_from_the_mirror_and_damage_there_is_found(make: Make, bucket: Bucket) -> None:
    config = make()
    manager, model = CheckpointManager(config), Model()
    for step in (5, 10):
        save(manager, model, step)
        finish_copying(manager)
    file = next((config.run_directory / "checkpoints" / "step-00000010").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    mended = CheckpointManager(config)
    manifest = mended.find()
    assert manifest and manifest.step == 10 and mended.damaged_files == 1
    mended.load(model, manifest)
    assert model.weight.tolist() == [10.0] * 8
    # There it is damaged, here it is lost: the one before is taken.
    shutil.rmtree(config.run_directory)
    name = next(name for name in names(bucket) if "00000010.rank" in name)
    content = bucket.client.get_object(Bucket=bucket.name, Key=f"mirror/{name}")["Body"].read()
    bucket.put(f"mirror/{name}", content[:-1] + bytes([content[-1] ^ 1]))
    manifest = CheckpointManager(config).find()
    assert manifest and manifest.step == 5


def test_a_store_that_does_not_answer_costs_no_training_and_is_told(make: Make, bucket: Bucket) -> None:
    with FaultProxy(bucket.endpoint) as proxy:
        config = make("data.storage.give_up_seconds=1", endpoint=proxy.url)
        manager, model = CheckpointManager(config), Model()
        save(manager, model, 5)
        finish_copying(manager)
        proxy.fault = lambda number, method, path: "503"
        save(manager, model, 10)
        manager.finish()
        first, second = manager.news_of_mirror()
        assert first.problem is None and "no answer from" in str(second.problem)
        assert steps(config) == [5, 10], "the checkpoint here has nothing to do with it"
        # A run that begins where nothing is left must know whether the mirror has something.
        found = CheckpointManager(config).find()
        assert found and found.step == 10
        shutil.rmtree(config.run_directory)
        with pytest.raises(CheckpointError, match="the mirror does not say whether it has"):
            CheckpointManager(config).find()
        with pytest.raises(StorageError, match="no answer from"):
            Mirror(config).claim()
        proxy.fault = lambda number, method, path: None
        found = CheckpointManager(config).find()
        assert found and found.step == 5


def test_a_slow_store_lets_checkpoints_go_by_but_not_the_last(make: Make, bucket: Bucket) -> None:
    config = make()
    manager, model = CheckpointManager(config), Model()
    go = threading.Event()
    assert manager._copies is not None
    real = manager._copies.mirror.put

    def slowly(step: int, path: Path) -> None:
        go.wait(20)
        real(step, path)

    manager._copies.mirror.put = slowly  # type: ignore[method-assign]
    save(manager, model, 5, 10, 15, 20)
    assert steps(config) == [5, 15, 20], "what is on its way was pruned"
    go.set()
    manager.finish()
    assert [copied.step for copied in manager.news_of_mirror()] == [5, 20]
    assert kept(bucket)[-1] == 20


def test_the_higher_fence_wins(make: Make, bucket: Bucket) -> None:
    for fence, run in ((3, "one"), (5, "two"), (4, "three")):
        manager, model = CheckpointManager(make(run=run), fence=fence), Model()
        save(manager, model, 10)
        manager.finish()
        (copied,) = manager.news_of_mirror()
        assert (copied.problem is None) == (fence != 4), copied
    assert "of a later attempt (fence 5)" in str(copied.problem)
    assert Mirror(make()).manifest(10).fence == 5


def test_going_back_goes_back_there_too(make: Make, bucket: Bucket) -> None:
    manager, model = CheckpointManager(make("checkpoint.keep_last=9"), fence=1), Model()
    for step in (5, 10, 15):
        save(manager, model, step)
    manager.finish()
    manager.give_up_after(8)
    assert kept(bucket) == [5]
    manifest = CheckpointManager(make(run="elsewhere"), fence=2).find()
    assert manifest and manifest.step == 5


def test_a_mirror_is_one_runs_and_of_one_job_at_a_time(make: Make, bucket: Bucket) -> None:
    config = make()
    holder, fence = Mirror(config).claim()
    assert fence == 0
    owner = json.loads(bucket.client.get_object(Bucket=bucket.name, Key="mirror/owner.json")["Body"].read())
    assert (owner["run"], owner["holder"]) == ("tiny", holder)
    with pytest.raises(ValueError, match="is that of run 'tiny'; choose another folder"):
        Mirror(make("run.name=other")).claim()
    with pytest.raises(FileNotFoundError):
        Mirror(make("checkpoint.mirror=s3://no-such-bucket-here/x")).claim()
    former, model = CheckpointManager(config, fence=1, mirror_holder=holder), Model()
    save(former, model, 5)
    finish_copying(former)
    # Another directory, whose job claims it: what the former one still commits is its own directory's alone.
    holder, fence = Mirror(make(run="second")).claim()
    assert fence == 1
    later = CheckpointManager(make(run="second"), fence=2, mirror_holder=holder)
    assert later.find()
    save(later, model, 10, 12)
    later.finish()
    save(former, model, 15)
    former.finish()
    assert "another job has claimed it" in str(former.news_of_mirror()[-1].problem)
    assert Mirror(make()).steps()[-1] == 12, "the former job has pruned the later one's"


def test_a_damaged_manifest_there_stops_nobody(make: Make, bucket: Bucket) -> None:
    config = make()
    manager = CheckpointManager(config)
    save(manager, Model(), 5)
    manager.finish()
    bucket.put("mirror/step-00000099.manifest.json", b"{")
    assert Mirror(config).claim()[1] == 0
    manifest = CheckpointManager(config).find()
    assert manifest and manifest.step == 5


def test_what_does_not_come_is_not_waited_for_for_ever(make: Make, bucket: Bucket) -> None:
    config = make("data.storage.give_up_seconds=1")
    manager = CheckpointManager(config)
    signs: list[int] = []
    assert manager._copies is not None
    manager._copies.alive = lambda: signs.append(1)
    manager._copies.mirror.put = lambda step, path: None  # type: ignore[method-assign]  # as if another removed it
    save(manager, Model(), 5)
    manager.finish()
    (copied,) = manager.news_of_mirror()
    assert "did not come in 1 s" in str(copied.problem) and signs


def test_what_cannot_be_fetched_leaves_what_is_here(
    make: Make, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    manager = CheckpointManager(config)
    save(manager, Model(), 5, 10)
    manager.finish()
    folder = config.run_directory / "checkpoints" / "step-00000010"
    file = next(folder.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    second = CheckpointManager(config)
    assert second._copies is not None
    monkeypatch.setattr(second._copies.mirror, "fetch", lambda *arguments: (_ for _ in ()).throw(OSError("broken off")))
    manifest = second.find()
    assert manifest and manifest.step == 5 and file.read_bytes() == content[:-1]
    file.write_bytes(content)  # it was the disk's passing fault
    manifest = CheckpointManager(config).find()
    assert manifest and manifest.step == 10


@pytest.mark.parametrize("value", ["", "s3:/b/x", "s3//b/x", "s3://", "pipe://x"])
def test_a_mirror_that_is_no_folder_is_a_mistake(make: Make, value: str) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.mirror"):
        make(f"checkpoint.mirror={json.dumps(value)}")


def test_a_mirror_lies_elsewhere(make: Make, tmp_path: Path) -> None:
    for place in ("run", "run/mirror", "."):
        with pytest.raises(ValueError, match="lie in another"):
            make(f"checkpoint.mirror={tmp_path / place}")


def test_what_a_checkpoint_needs_beside_itself_goes_along(make: Make, bucket: Bucket) -> None:
    config = make()
    config.run_directory.mkdir()
    (config.run_directory / "list.json").write_text("what is left out")
    manager = CheckpointManager(config, companions=["list.json", "not-there.json"])
    save(manager, Model(), 5)
    manager.finish()
    shutil.rmtree(config.run_directory)
    manifest = CheckpointManager(config, companions=["list.json", "not-there.json"]).find()
    assert manifest and manifest.step == 5
    assert (config.run_directory / "list.json").read_text() == "what is left out"
    assert sorted(path.name for path in config.run_directory.iterdir()) == ["checkpoints", "list.json"]


def test_a_folder_is_a_mirror_as_well(make: Make, tmp_path: Path) -> None:
    config = make(f"checkpoint.mirror={tmp_path / 'mirror'}")
    Mirror(config).claim()
    manager, model = CheckpointManager(config), Model()
    save(manager, model, 5)
    manager.finish()
    shutil.rmtree(config.run_directory)
    manifest = CheckpointManager(config).find()
    assert manifest and manifest.step == 5
