"""Checkpoints by real processes: every world size and ZeRO stage reads every other's; torn saves are not seen."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from symile_dist.checkpoint.manifest import CheckpointError, complete_checkpoints, read_manifest
from symile_dist.config import Config, parse_config
from symile_dist.errors import RunStopped
from symile_dist.types import Batch
from tests.processes import RankFailed, run_distributed

BATCH, INPUT, SAVED, STEPS = 12, 6, 3, 5
TEXT = """
run: {name: checkpoints}
data: {train: none}
modalities:
  a: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [13]}}
  b: {member: npy, decoder: npy, transform: tensor, freeze: true, encoder: {name: mlp, input_dim: 6, hidden: [7]}}
  c: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6}}
model: {embedding_dim: 10, logit_scale_init: -1}
optimizer: {lr: 1e-2}
train: {steps: 8, global_batch_size: 12}
checkpoint: {max_failures: 2}
"""
# World size, stage, precision: each is saved, and read by the others in turn.
SETTINGS = [
    (1, 0, "fp32"),
    (2, 1, "fp32"),
    (3, 3, "fp32"),
    (2, 2, "bf16"),
    (2, 0, "bf16"),
    (4, 3, "bf16"),
]


def configured(directory: str, stage: int, precision: str, *more: str) -> Config:
    world = f"ray.num_workers={dist.get_world_size() if dist.is_initialized() else 1}"
    options = [world, f"train.zero_stage={stage}", f"train.precision={precision}", f"run.directory={directory}"]
    return parse_config(TEXT, "checkpoint.yaml", [*options, *more]).config


def started(config: Config) -> Any:
    from symile_dist.engine import Engine

    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")
    return Engine(config, torch.device("cpu"))


def batch_of(step: int) -> Batch:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(step)
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    inputs: dict[str, Any] = {name: torch.randn(BATCH, INPUT, generator=generator)[rows] for name in "abc"}
    count = rows.stop - rows.start
    return Batch(
        inputs, torch.ones(count, 3, dtype=torch.bool), torch.ones(count, dtype=torch.bool), torch.arange(count)
    )


def take_steps(engine: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        report = engine.forward(batch_of(step), step)
        engine.backward(report.loss)
        engine.step(step)
        losses.append(float(report.loss.detach()))
    return losses


def whole_state(engine: Any) -> dict[str, Tensor]:
    """Masters, moments and counts of every parameter, put together from all ranks."""
    from symile_dist.checkpoint.pieces import pieces_of, saved_tensors

    optimizer = engine.deepspeed.optimizer
    pieces = list(pieces_of(engine.module, optimizer, dist.get_rank(), dist.get_world_size(), dealt=True))
    own = ({piece.name: piece for piece in pieces}, saved_tensors(pieces, optimizer))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, ({n: (p.start, p.length, p.shape) for n, p in own[0].items()}, own[1]))
    whole: dict[str, Tensor] = {}
    for places, tensors in parts:
        for key, values in tensors.items():
            start, length, shape = places[key.partition("/")[2]]
            if key.startswith("step/"):
                whole[key] = values
            else:
                empty = torch.full((torch.Size(shape).numel(),), torch.nan)
                whole.setdefault(key, empty)[start : start + length] = values.float()
    return whole


def save(directory: str, stage: int, precision: str) -> dict[str, Any]:
    from symile_dist.checkpoint.manager import CheckpointManager

    config = configured(directory, stage, precision)
    engine, manager = started(config), CheckpointManager(config)
    take_steps(engine, 0, SAVED)
    manager.save(engine, SAVED, {"samples_seen": 1}, {})
    state, drawn = whole_state(engine), torch.rand(3)
    losses = take_steps(engine, SAVED, STEPS)  # while the save is on its way
    manager.finish()
    return {"state": state, "drawn": drawn, "losses": losses, "last": whole_state(engine)}


def load(directories: list[str], stage: int, precision: str) -> list[dict[str, Any]]:
    from symile_dist.checkpoint.manager import CheckpointManager

    found = []
    for directory in directories:
        config = configured(directory, stage, precision)
        engine, manager = started(config), CheckpointManager(config)
        manifest = manager.find()
        assert manifest is not None
        manager.load(engine, manifest)
        state, drawn = whole_state(engine), torch.rand(3)
        losses = take_steps(engine, SAVED, STEPS)
        found.append({"state": state, "drawn": drawn, "losses": losses, "last": whole_state(engine)})
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """(folders, per setting what every rank saw)."""
    folders = [str(tmp_path_factory.mktemp("saved") / "run") for _ in SETTINGS]
    seen = [
        run_distributed(save, world, folder, stage, precision, timeout=200)
        for folder, (world, stage, precision) in zip(folders, SETTINGS, strict=True)
    ]
    return folders, seen


@pytest.mark.parametrize("reader", range(len(SETTINGS)), ids=[f"world {w}, stage {s}, {p}" for w, s, p in SETTINGS])
def test_any_world_size_and_stage_reads_any_other_exactly(
    saved: tuple[list[str], list[list[dict[str, Any]]]], reader: int
) -> None:
    folders, seen = saved
    world, stage, precision = SETTINGS[reader]
    by_rank = run_distributed(load, world, folders, stage, precision, timeout=300)
    for number, setting in enumerate(SETTINGS):
        expected, found = seen[number][0], by_rank[0][number]
        assert expected["state"].keys() == found["state"].keys(), f"from {setting}"
        for key, values in expected["state"].items():
            # Frozen weights have no master: they are kept in the run's own precision.
            if setting[2] == precision or not key.startswith("weights/model.encoders.b"):
                assert torch.equal(found["state"][key], values), f"{key} from {setting}"
        tolerance = 1e-5 if setting[2] == precision == "fp32" else 2e-2
        assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance), f"from {setting}"
        if number == reader:  # at its own setting it is as if nothing had happened
            for rank in range(world):
                one, other = seen[number][rank], by_rank[rank][number]
                assert one["losses"] == other["losses"] and torch.equal(one["drawn"], other["drawn"])
                assert all(torch.equal(other["last"][key], values) for key, values in one["last"].items())


# -- torn, failed and damaged saves ----------------------------------------------------------------------------------


def save_twice(directory: str, failpoints: list[dict[str, Any]]) -> list[Any]:
    """A checkpoint of step 1, then failpoints, then one of step 2; in the end what `news` told."""
    from symile_dist.checkpoint.manager import CheckpointManager
    from symile_dist.failpoints import VARIABLE

    config = configured(directory, 2, "fp32")
    engine, manager = started(config), CheckpointManager(config)
    take_steps(engine, 0, 1)
    manager.save(engine, 1, {}, {}, wait=True)
    os.environ[VARIABLE] = json.dumps(failpoints)
    told: list[Any] = []
    try:
        for step in (2, 3):
            take_steps(engine, step - 1, step)
            manager.save(engine, step, {}, {}, wait=True)
        manager.finish()
    except RunStopped as error:
        told.append(str(error))
    return [*((saved.step, saved.problem) for saved in manager.news()), *told]


@pytest.mark.parametrize(
    ("at", "rank"),
    [
        ("checkpoint.begun", 0),
        ("checkpoint.begun", 1),
        ("checkpoint.half_written", 0),
        ("checkpoint.half_written", 1),
        ("checkpoint.written", 1),
        ("checkpoint.before_manifest", 0),
    ],
)
def test_a_save_that_is_killed_is_not_seen(tmp_path: Path, at: str, rank: int) -> None:
    run = tmp_path / "run"
    with pytest.raises(RankFailed):
        run_distributed(save_twice, 2, str(run), [{"at": at, "rank": rank, "step": 2, "do": "kill"}], timeout=60)
    assert [step for step, _ in complete_checkpoints(run / "checkpoints")] == [1], "a torn save looks like a checkpoint"
    # The next save clears what was left, and is whole.
    run_distributed(save_twice, 2, str(run), [], timeout=60)
    assert [step for step, _ in complete_checkpoints(run / "checkpoints")] == [2, 3]


def test_a_kill_after_the_manifest_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = {"at": "checkpoint.committed", "rank": 0, "step": 2, "do": "kill"}
    with pytest.raises(RankFailed):
        run_distributed(save_twice, 2, str(run), [fault], timeout=60)
    assert [step for step, _ in complete_checkpoints(run / "checkpoints")] == [1, 2]


def test_a_full_disk_costs_a_checkpoint_and_several_in_a_row_end_the_run(tmp_path: Path) -> None:
    full = {"at": "checkpoint.half_written", "rank": 1, "do": "raise"}
    once = run_distributed(save_twice, 2, str(tmp_path / "once"), [{**full, "step": 2}], timeout=60)
    for told in once:
        (_, first), (step, second), (last, third) = told
        assert first is None and step == 2 and "No space left" in second and (last, third) == (3, None)
    folder = tmp_path / "once" / "checkpoints"
    assert [step for step, _ in complete_checkpoints(folder)] == [1, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000003"], "leftovers"
    for told in run_distributed(save_twice, 2, str(tmp_path / "always"), [full], timeout=60):
        assert "the last 2 checkpoints could not be saved" in told[-1] and "No space left" in told[-1]
    assert [step for step, _ in complete_checkpoints(tmp_path / "always" / "checkpoints")] == [1]


def mirrored(directory: str, failpoints: list[dict[str, Any]]) -> list[Any]:
    """Checkpoints of steps 1 to 3, each copied to the mirror before the next; (step, problem) of each copy."""
    from symile_dist.checkpoint.manager import CheckpointManager
    from symile_dist.failpoints import VARIABLE

    os.environ[VARIABLE] = json.dumps(failpoints)
    config = configured(directory, 2, "fp32", f"checkpoint.mirror={directory}-mirror")
    engine, manager = started(config), CheckpointManager(config)
    told: list[Any] = []
    for step in (1, 2, 3):
        take_steps(engine, step - 1, step)
        manager.save(engine, step, {}, {}, wait=True)
        assert manager._copies is not None
        manager._copies.finish()
        told += [(copied.step, copied.problem) for copied in manager.news_of_mirror()]
    manager.finish()
    return told


def find_at_mirror(directory: str) -> dict[str, Any]:
    from symile_dist.checkpoint.manager import CheckpointManager

    config = configured(directory, 1, "fp32", f"checkpoint.mirror={directory}-mirror")
    engine, manager = started(config), CheckpointManager(config)
    manifest = manager.find()
    assert manifest is not None
    manager.load(engine, manifest)
    return {"step": manifest.step, "state": whole_state(engine)}


def test_what_one_rank_cannot_copy_to_the_mirror_is_not_seen_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "run-mirror").mkdir()
    fault = {"at": "mirror.begun", "rank": 1, "step": 3, "do": "raise"}
    for told in run_distributed(mirrored, 2, str(run), [fault], timeout=60):
        (_, first), (_, second), (step, third) = told
        assert first is None and second is None and step == 3 and "No space left" in third
    assert [step for step, _ in complete_checkpoints(run / "checkpoints")][-1] == 3
    # The run's directory is lost: another world size and stage goes on from what the mirror has whole.
    expected = run_distributed(find_at_mirror, 3, str(run), timeout=60)[0]
    assert expected["step"] == 3
    shutil.rmtree(run)
    for found in run_distributed(find_at_mirror, 3, str(run), timeout=60):
        assert found["step"] == 2
        assert found["state"].keys() == expected["state"].keys()


def find_each(directories: list[str]) -> list[Any]:
    from symile_dist.checkpoint.manager import CheckpointManager

    found: list[Any] = []
    for directory in directories:
        try:
            manifest = CheckpointManager(configured(directory, 2, "fp32")).find()
            found.append(manifest and manifest.step)
        except CheckpointError as error:
            found.append(str(error))
    return found


def test_every_damaged_file_is_named_and_all_ranks_agree_on_the_checkpoint_before(tmp_path: Path) -> None:

    run_distributed(save_twice, 2, str(tmp_path / "whole"), [], timeout=60)
    manifest = read_manifest(tmp_path / "whole" / "checkpoints" / "step-00000003")
    names = [entry.path for entry in manifest.files] + ["manifest.json"]
    damage: dict[str, Any] = {
        "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
        "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
        "missing": lambda path: path.unlink(),
        "swapped": lambda path: path.write_bytes(
            (path.parents[1] / "step-00000002" / path.name.replace("-3.", "-2.")).read_bytes()
        ),
    }
    runs, expected = [], []
    for kind, harm in damage.items():
        for number, name in enumerate(names):
            run = tmp_path / f"{kind}-{number}"
            shutil.copytree(tmp_path / "whole", run)
            harm(run / "checkpoints" / "step-00000003" / name)
            runs.append(str(run))
            expected.append(2)
    for seen in run_distributed(find_each, 2, runs, timeout=60):
        assert seen == expected
    # With none left it says so, and does not begin again.
    for step in (2, 3):
        folder = tmp_path / "whole" / "checkpoints" / f"step-{step:08d}"
        (folder / read_manifest(folder).files[1].path).write_bytes(b"")
    for (told,) in run_distributed(find_each, 2, [str(tmp_path / "whole")], timeout=60):
        assert "no checkpoint is whole" in told and told.count("rank-00001") == 2


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
