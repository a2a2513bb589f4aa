"""The manager's decisions, in one process: late commits, going back, the copy beside the next step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from symile_dist.checkpoint.attempts import usable_checkpoints
from symile_dist.checkpoint.manager import CheckpointManager
from symile_dist.checkpoint.manifest import complete_checkpoints
from symile_dist.checkpoint.shard import HostCopy
from symile_dist.checkpoint.shards import Shards
from symile_dist.config import Config, parse_config
from symile_dist.errors import RunStopped

TEXT = """
run: {name: tiny}
data: {train: none}
modalities:
  a: {member: npy, decoder: npy, transform: tensor, encoder: identity}
  b: {member: npy, decoder: npy, transform: tensor, encoder: identity}
train: {steps: 100, global_batch_size: 4}
checkpoint: {keep_last: 100, max_failures: 2}
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config(TEXT, "tiny.yaml", [f"run.directory={tmp_path / 'run'}"]).config


class Model:
    """A weight that every step changes, once the manager lets it."""

    def __init__(self) -> None:
        self.before_update: Callable[[], None] = lambda: None
        self.weight = torch.zeros(8)

    def saved_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"weights/w": self.weight}, {"pieces": {"w": [0, 8, [8]]}}

    def restore(self, saved: Shards) -> None:
        saved.read("weights", "w", 0, self.weight)

    def step(self) -> None:
        self.before_update()
        self.weight += 1


def steps(config: Config) -> list[int]:
    return [step for step, _ in complete_checkpoints(config.run_directory / "checkpoints")]


def save(manager: CheckpointManager, model: Model, *of_steps: int) -> None:
    for step in of_steps:
        model.weight.fill_(step)
        manager.save(model, step, {}, {}, wait=True)


def test_an_update_waits_until_what_is_saved_is_copied(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    model, manager = Model(), CheckpointManager(config)
    go, filling = threading.Event(), threading.Event()
    real = HostCopy.fill

    def slowly(self: HostCopy, *kinds: Any) -> None:
        if not kinds:  # in the thread: of the rest, beside the next forward pass
            filling.set()
            go.wait(10)
        real(self, *kinds)

    monkeypatch.setattr(HostCopy, "fill", slowly)
    model.weight.fill_(7)
    manager.save(model, 7, {}, {})
    assert filling.wait(10), "save copied all at once"
    stepping = threading.Thread(target=model.step)
    stepping.start()
    stepping.join(0.2)
    assert stepping.is_alive() and model.weight[0] == 7, "the update did not wait for the copy"
    go.set()
    stepping.join(10)
    manager.finish()
    assert model.weight[0] == 8
    manifest = manager.find()
    assert manifest and manifest.step == 7
    manager.load(model, manifest)
    assert model.weight.tolist() == [7.0] * 8, "the checkpoint holds what the next step made of it"


def test_what_was_superseded_commits_nothing(config: Config) -> None:
    reason: list[str] = []
    manager = CheckpointManager(config, fence=1, superseded=lambda: next(iter(reason), None))
    model = Model()
    save(manager, model, 5)
    reason.append("held by another job by now (fence 2)")
    save(manager, model, 10)
    (first, second) = manager.news()
    assert (first.problem, second.step) == (None, 10) and "fence 2" in str(second.problem)
    assert steps(config) == [5]
    with pytest.raises(RunStopped, match="fence 2"):
        save(manager, model, 15)
    assert [path.name for path in (config.run_directory / "checkpoints").iterdir()] == ["step-00000005"], "leftovers"


def test_a_commit_that_came_too_late_is_passed_over(config: Config) -> None:
    former, model = CheckpointManager(config, fence=1), Model()
    former.begin(0)
    save(former, model, 5)
    later = CheckpointManager(config, fence=2)
    manifest = later.find()
    assert manifest and manifest.step == 5
    later.begin(5)
    # It had looked at the lease just before that changed hands.
    save(former, model, 10)
    third = CheckpointManager(config, fence=3)
    manifest = third.find()
    assert manifest and manifest.step == 5, "the later attempt went on from 5 and never saw 10"
    directory = config.run_directory / "checkpoints"
    assert [step for step, _ in usable_checkpoints(directory)] == [5], "tools would take what the run does not"
    third.begin(5)
    save(third, model, 10)
    manifest = CheckpointManager(config, fence=4).find()
    assert manifest and (manifest.step, manifest.fence) == (10, 3)


def test_going_back_leaves_what_was_before_to_a_resume(config: Config) -> None:
    manager, model = CheckpointManager(config, fence=1), Model()
    manager.begin(0)
    save(manager, model, 5, 10, 15)
    before = manager.find(before=12)
    assert before and before.step == 10
    assert manager.find(before=3) is None, "there is none to go back to: the run stops there"
    for fence in (2, 3):  # the run is resumed
        resumed = CheckpointManager(config, fence=fence)
        manifest = resumed.find()
        assert manifest and manifest.step == 15, "looking for an older checkpoint made the run forget the newer"
        resumed.begin(15)
    resumed.give_up_after(10)
    resumed.begin(10)
    assert steps(config) == [5, 10]
    manifest = CheckpointManager(config, fence=4).find()
    assert manifest and manifest.step == 10


@pytest.mark.parametrize("content", ["", "[[1", '{"a": 1}', "[[1, 2, 3]]", "[[null, 1]]"])
def test_a_damaged_list_of_attempts_stops_nobody(config: Config, content: str) -> None:
    manager, model = CheckpointManager(config, fence=1), Model()
    save(manager, model, 5)
    (config.run_directory / "checkpoints" / "attempts.json").write_text(content)
    manifest = CheckpointManager(config, fence=2).find()
    assert manifest and manifest.step == 5


def test_what_goes_wrong_behind_a_commit_leaves_the_checkpoint_whole(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, model = CheckpointManager(config), Model()

    def broken(step: int, best: int | None) -> None:
        raise OSError("the pruning fails")

    monkeypatch.setattr(manager, "_prune", broken)
    save(manager, model, 5)
    assert [(saved.step, saved.problem) for saved in manager.news()] == [(5, None)]
    manifest = CheckpointManager(config).find()
    assert manifest and manifest.step == 5
