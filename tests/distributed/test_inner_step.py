"""The second optimizer beside DeepSpeed's, at ZeRO 0-3 on real processes: who trains what, skips, checkpoints."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from symile_dist.config import Config, parse_config
from symile_dist.types import Batch
from tests.processes import run_distributed

BATCH, INPUT, STEPS, SAVED, POISONED = 12, 6, 4, 2, 1
TEXT = """
run: {name: inner}
data: {train: none}
modalities:
  x1: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  x2: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  y: {member: npy, decoder: npy, transform: {name: tensor, dtype: int64}, encoder: {name: one_hot, classes: 2}}
model: {embedding_dim: 8, normalization: none}
objective: {name: factorcl, label: y, hidden: 16, head_layers: 1}
# With the usual eps Adam would make steps of what rounding leaves where a gradient is zero.
optimizer: {lr: 1e-2, eps: 1e-3, max_grad_norm: 0, schedule: constant, inner: {lr: 1e-2, eps: 1e-3}}
train: {steps: 8, global_batch_size: 12}
"""
# Precision, ZeRO stage, micro-batch of the two-pass step.
CASES = [
    ("fp32", 0, None),
    ("fp32", 1, None),
    ("fp32", 2, 4),
    ("fp32", 3, None),
    ("fp32", 3, 4),
    ("bf16", 0, 4),
    ("bf16", 1, None),
    ("bf16", 3, None),
]
POISONED_STAGES = (0, 3)


def batch_of(step: int, rank: int, world_size: int, poisoned: bool) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    labels = torch.randint(2, (BATCH,), generator=generator)
    inputs: dict[str, Any] = {name: torch.randn(BATCH, INPUT, generator=generator) for name in ("x1", "x2")}
    inputs = {name: (values + labels[:, None])[rows] for name, values in inputs.items()} | {"y": labels[rows]}
    if poisoned and rank == world_size - 1:
        inputs["x1"] = torch.full_like(inputs["x1"], torch.nan)
    valid = (torch.arange(BATCH) != 3)[rows]
    return Batch(inputs, torch.ones(len(valid), 3, dtype=torch.bool), valid, torch.arange(len(valid)))


def start(*overrides: str) -> Any:
    from symile_dist.engine import Engine

    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    return Engine(configured(world_size, *overrides), torch.device("cpu"))


def configured(world_size: int, *overrides: str) -> Config:
    return parse_config(TEXT, "inner.yaml", [f"ray.num_workers={world_size}", *overrides]).config


def outer_weights(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if engine.config.train.zero_stage else None
        whole[name] = (parameter if master is None else master).detach().float().clone()
    return whole


def inner_weights(engine: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.module.inner_state().items()}


def all_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def take_step(engine: Any, step: int, poisoned: bool = False) -> Any:
    from symile_dist.metrics.recorder import Recorder
    from symile_dist.step import train_step

    return train_step(engine, batch_of(step, dist.get_rank(), dist.get_world_size(), poisoned), step, Recorder())


class Watched:
    """An inner optimizer that looks at all weights before and after its step."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.wrapped = engine, engine.inner
        self.seen: list[dict[str, bool]] = []
        self.before = inner_weights(engine)

    def step(self, loss: Tensor) -> bool:
        outer, inner = outer_weights(self.engine), inner_weights(self.engine)
        applied: bool = self.wrapped.step(loss)
        self.seen.append(
            {
                "the outer step leaves the critics": all_equal(self.before, inner),
                "the inner step leaves all else": all_equal(outer, outer_weights(self.engine)),
                "the inner step trains the critics": not all_equal(inner, inner_weights(self.engine)),
            }
        )
        self.before = inner_weights(self.engine)
        return applied

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.wrapped.tensors()
        return found


def one_case(precision: str, stage: int, size: int | None, folder: Path) -> dict[str, Any]:
    """A few steps, watched; the checkpoint in their midst, loaded into another engine and gone on from."""
    options = [f"train.precision={precision}", f"train.zero_stage={stage}", f"train.micro_batch_size={size or 'null'}"]
    from symile_dist.checkpoint.manager import CheckpointManager

    engine = start(*options)
    manager = CheckpointManager(configured(dist.get_world_size(), f"run.directory={folder}"))
    first = outer_weights(engine)
    engine.inner = watched = Watched(engine)
    losses = []
    for step in range(STEPS):
        if step == SAVED:
            manager.save(engine, step, {}, {})
        trained = take_step(engine, step)
        losses.append(float(trained.loss))
        assert trained.result.applied and trained.result.inner_applied
    last = {**outer_weights(engine), **inner_weights(engine)}
    again = start(*options, "seed=5")
    manager.finish()
    saved = manager.find()
    assert saved is not None
    manager.load(again, saved)
    resumed = [float(take_step(again, step).loss) for step in range(SAVED, STEPS)]
    return {
        "losses": losses,
        "watched": watched.seen,
        "trained": not all_equal(first, outer_weights(engine)),
        "resumed": resumed == losses[SAVED:] and all_equal({**outer_weights(again), **inner_weights(again)}, last),
        "critics": {tensor.dtype for tensor in inner_weights(engine).values()},
        "weights": last,
    }


def poisoned_case(stage: int) -> dict[str, Any]:
    """One rank has NaN in a step: nobody may change anything."""
    engine = start(f"train.zero_stage={stage}")
    steps = []
    for step in range(3):
        before = {**outer_weights(engine), **inner_weights(engine)}
        result = take_step(engine, step, poisoned=step == POISONED).result
        steps.append((result.applied, all_equal(before, {**outer_weights(engine), **inner_weights(engine)})))
    return {"steps": steps, "adam": [int(state["step"]) for state in engine.inner.adam.state.values()]}


def infinite_case() -> tuple[list[Any], bool]:
    """The inner loss alone is infinite, on one rank."""
    engine = start()
    rank = dist.get_rank()
    engine.forward(batch_of(0, rank, dist.get_world_size(), False), 0)
    engine.backward(engine.forward(batch_of(0, rank, dist.get_world_size(), False), 0).loss)
    loss, before = engine._inner_loss, inner_weights(engine)
    engine._inner_loss = lambda: loss() * (torch.inf if rank == 0 else 1.0)
    result = engine.step(0)
    return [result.applied, result.inner_applied], all_equal(before, inner_weights(engine))


def warm_case() -> dict[str, bool]:
    """Another run's weights to begin with."""
    engine = start()
    weights = {name: tensor + 1 for name, tensor in {**outer_weights(engine), **inner_weights(engine)}.items()}
    from symile_dist.engine import Engine

    other = Engine(configured(dist.get_world_size(), "seed=3"), torch.device("cpu"), weights)
    return {
        "all are told": sorted(other.warm_started) == sorted(weights),
        "all are there": all_equal({**outer_weights(other), **inner_weights(other)}, weights),
    }


def every_case(folder: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for number, case in enumerate(CASES):
        place = Path(folder) / str(number)
        if dist.get_rank() == 0:
            place.mkdir()
        dist.barrier()
        found[case] = one_case(*case, place)
    for stage in POISONED_STAGES:
        found["poisoned", stage] = poisoned_case(stage)
    found["infinite"] = infinite_case()
    found["warm"] = warm_case()
    return found


def alone() -> dict[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return one_case("fp32", 0, None, Path(folder))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_distributed(every_case, 2, str(tmp_path_factory.mktemp("inner")), timeout=280.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_optimizer_trains_its_own_and_leaves_the_other_s(ranks: list[Any], case: Any) -> None:
    for rank, found in enumerate(ranks):
        assert len(found[case]["watched"]) == STEPS and found[case]["trained"]
        for step, seen in enumerate(found[case]["watched"]):
            assert all(seen.values()), f"rank {rank}, step {step}: {seen}"
        assert found[case]["critics"] == {torch.float32}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resuming_is_bitwise(ranks: list[Any], case: Any) -> None:
    assert all(found[case]["resumed"] for found in ranks)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stages_and_passes_agree_and_so_do_the_ranks(ranks: list[Any], case: Any) -> None:
    found, want = ranks[0][case], ranks[0]["fp32", 0, None]
    tolerance = 1e-4 if case[0] == "fp32" else 0.1
    assert found["losses"] == pytest.approx(want["losses"], rel=tolerance, abs=tolerance)
    for name, tensor in found["weights"].items():
        if case[0] == "fp32":
            assert float((tensor - want["weights"][name]).norm() / want["weights"][name].norm()) < 2e-3, name
        assert torch.equal(tensor, ranks[1][case]["weights"][name]), f"{name} differs between the ranks"


def test_one_rank_trains_like_two(ranks: list[Any]) -> None:
    (found,) = run_distributed(alone, 1)
    assert found["losses"] == pytest.approx(ranks[0]["fp32", 0, None]["losses"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("stage", POISONED_STAGES)
def test_a_poisoned_step_trains_neither(ranks: list[Any], stage: int) -> None:
    for found in ranks:
        steps = found["poisoned", stage]["steps"]
        assert steps == [(step != POISONED, step == POISONED) for step in range(3)]
        assert set(found["poisoned", stage]["adam"]) == {2}


def test_another_run_s_critics_are_begun_with(ranks: list[Any]) -> None:
    for found in ranks:
        assert all(found["warm"].values()), found["warm"]


def test_an_infinite_inner_loss_of_one_rank_skips_the_inner_step_of_all(ranks: list[Any]) -> None:
    for found in ranks:
        assert found["infinite"] == ([True, False], True)
