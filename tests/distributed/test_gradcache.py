"""The two-pass step at ZeRO 0-3 on real processes: its gradients are those of one pass in one process."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from symile_dist.config import Config, parse_config
from symile_dist.types import Batch
from tests.processes import run_distributed

BATCH, INPUT, STEPS = 12, 6, 3
POISONED_STEP = 1
TEXT = """
run: {name: gradcache}
data: {train: none}
modalities:
  a: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  b: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  c: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6}}
model: {embedding_dim: 16, logit_scale_init: -1}
objective: {name: symile, negative_sampling: n_squared}
optimizer: {lr: 1e-2, max_grad_norm: 0}
train: {steps: 8, global_batch_size: 12}
"""
STAGES = [0, 1, 2, 3]
# Micro-batches that divide a rank's six rows and one that does not.
CASES = list(itertools.product(STAGES, (None, 1, 2, 4)))


class Dropout(nn.Sequential):
    """An encoder whose output depends on the random state."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__(nn.Linear(INPUT, 24), nn.Dropout(0.5), nn.Linear(24, embedding_dim))


class Normalized(nn.Sequential):
    """An encoder whose output depends on the neighbours."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__(nn.Linear(INPUT, 24), nn.BatchNorm1d(24), nn.Linear(24, embedding_dim))


def configured(*overrides: str, world_size: int = 1) -> Config:
    return parse_config(TEXT, "gradcache.yaml", [f"ray.num_workers={world_size}", *overrides]).config


def batch_of(step: int, rank: int = 0, world_size: int = 1, poisoned: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    inputs: dict[str, Any] = {name: torch.randn(BATCH, INPUT, generator=generator)[rows] for name in "abc"}
    if poisoned and rank == world_size - 1:
        inputs["b"] = torch.full_like(inputs["b"], torch.nan)
    valid = (torch.arange(BATCH) != 3)[rows]
    return Batch(inputs, torch.ones(len(valid), 3, dtype=torch.bool), valid, torch.arange(len(valid)))


def start(*overrides: str) -> Any:
    from symile_dist.engine import Engine

    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    return Engine(configured(*overrides, world_size=world_size), torch.device("cpu"))


def take_step(engine: Any, batch: Batch, step: int) -> tuple[float, dict[str, Tensor], bool]:
    """Loss, whole gradients before the optimizer step, and whether it was taken."""
    from deepspeed.utils import safe_get_full_grad

    from symile_dist.gradcache import forward_backward

    size = engine.config.encoded_at_once
    if size < len(batch):
        report = forward_backward(engine, batch, step, size)
    else:
        report = engine.forward(batch, step)
        engine.backward(report.loss)
    gradients = {name: safe_get_full_grad(p).float().clone() for name, p in engine.module.named_parameters()}
    return float(report.loss.detach()), gradients, engine.step(step).applied


def run_steps(*overrides: str, poisoned: bool = False) -> list[Any]:
    engine = start(*overrides)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return [
        take_step(engine, batch_of(step, rank, world_size, poisoned and step == POISONED_STEP), step)
        for step in range(STEPS)
    ]


def every_case() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for stage, size in CASES:
        found[stage, size] = run_steps(f"train.zero_stage={stage}", f"train.micro_batch_size={size or 'null'}")
    for stage in STAGES:
        options = (f"train.zero_stage={stage}", "train.micro_batch_size=2")
        found["poisoned", stage] = run_steps(*options, poisoned=True)
        if stage:  # DeepSpeed shows no gradients of bf16 at stage 0
            found["bf16", stage] = run_steps(*options, "train.precision=bf16")
            found["bf16, one pass", stage] = run_steps(options[0], "train.precision=bf16")
    return found


def one_process() -> list[Any]:
    """The same steps in this process, in one pass and without DeepSpeed: loss and gradients on the same weights."""
    from symile_dist.model import TrainingModule
    from symile_dist.optim import make_optimizer

    config = configured()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = TrainingModule(config)
    optimizer = make_optimizer(module, config)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = module(batch_of(step), step).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        found.append((float(loss.detach()), gradients))
        from symile_dist.optim import learning_rate_factor

        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(config.optimizer, step, config.train.steps)
        optimizer.step()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_distributed(every_case, 2, timeout=280.0)


def relative(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    difference = sum(float((got[name] - want[name]).double().norm() ** 2) for name in want)
    return math.sqrt(difference / sum(float(tensor.double().norm() ** 2) for tensor in want.values()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_one_pass_in_one_process(ranks: list[Any], case: Any) -> None:
    for rank, found in enumerate(ranks):
        for step, ((loss, gradients, applied), (want, of_want)) in enumerate(
            zip(found[case], one_process(), strict=True)
        ):
            assert applied and loss == pytest.approx(want, rel=1e-6), f"rank {rank}, step {step}"
            assert relative(gradients, of_want) <= 1e-6, f"rank {rank}, step {step}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_poisoned_step_is_skipped_and_leaves_nothing_behind(ranks: list[Any], stage: int) -> None:
    for found in ranks:
        steps = found["poisoned", stage]
        assert [applied for *_, applied in steps] == [step != POISONED_STEP for step in range(STEPS)]
        assert math.isnan(steps[POISONED_STEP][0])
        after = steps[POISONED_STEP + 1]
        assert math.isfinite(after[0]) and all(torch.isfinite(gradient).all() for gradient in after[1].values())


@pytest.mark.parametrize("stage", STAGES[1:])
def test_bf16_differs_from_one_pass_by_its_rounding_only(ranks: list[Any], stage: int) -> None:
    for (loss, gradients, applied), (want, of_want, _) in zip(
        ranks[0]["bf16", stage], ranks[0]["bf16, one pass", stage], strict=True
    ):
        assert applied and loss == pytest.approx(want, rel=2e-2)
        assert relative(gradients, of_want) <= 2e-2


# -- random state, batch normalisation --------------------------------------------------------------------------------

DROPOUT = f"modalities.a.encoder={__name__}:Dropout"
NORMALIZED = f"modalities.a.encoder={__name__}:Normalized"


def dropout_case() -> dict[str, Any]:
    engine = start(DROPOUT, "train.micro_batch_size=5")
    batch = batch_of(0)
    torch.manual_seed(9)
    loss, gradients, _ = take_step(engine, batch, 0)
    after = torch.get_rng_state()

    # The same micro-batches with one graph over all of them.
    whole = start(DROPOUT)
    torch.manual_seed(9)
    module = whole.module
    parts = [module(batch.rows(slice(first, first + 5)), None).representations for first in (0, 5, 10)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in "abc"}
    report = module(batch, 0, joined)
    report.loss.backward()
    want = {name: p.grad for name, p in module.named_parameters()}
    return {
        "loss": (loss, float(report.loss.detach())),
        "error": relative(gradients, want),
        "random state goes on": torch.equal(after, torch.get_rng_state()),
    }


def test_dropout_is_the_same_in_both_passes() -> None:
    (found,) = run_distributed(dropout_case, 1)
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-6)
    assert found["error"] <= 1e-6
    assert found["random state goes on"]


def batch_norm_cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        start(NORMALIZED, "train.micro_batch_size=5")
    except ValueError as error:
        found["refused"] = str(error)
    found["whole batch"] = type(start(NORMALIZED)).__name__
    found["frozen encoder"] = type(start(NORMALIZED, "modalities.a.freeze=true", "train.micro_batch_size=5")).__name__
    results = []
    for size in (5, 12):
        engine = start(NORMALIZED, "train.freeze_batch_norm=true", f"train.micro_batch_size={size}")
        engine.train(False)
        engine.train()
        results.append(take_step(engine, batch_of(0), 0)[1])
        statistics = engine.module.model.encoders["a"][1]
        found[f"statistics {size}"] = float(statistics.running_mean.abs().max())
    found["error"] = relative(*results)
    return found


def test_batch_norm_is_refused_unless_frozen() -> None:
    (found,) = run_distributed(batch_norm_cases, 1)
    assert "train.micro_batch_size: 'model.encoders.a.1' is a batch normalisation" in found["refused"]
    assert "train.freeze_batch_norm=true" in found["refused"]
    assert found["whole batch"] == found["frozen encoder"] == "Engine"
    assert found["error"] <= 1e-6
    assert found["statistics 5"] == found["statistics 12"] == 0.0


def broken_off_case() -> str:
    engine = start("train.micro_batch_size=5")
    encode, calls = engine.encode, []

    def fails_in_pass_two(batch: Batch) -> Any:
        calls.append(batch)
        if len(calls) == 5:
            raise MemoryError("out of memory")
        return encode(batch)

    engine.encode = fails_in_pass_two
    with pytest.raises(MemoryError):
        take_step(engine, batch_of(0), 0)
    try:
        take_step(engine, batch_of(0), 0)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_no_step_is_taken_on_the_gradients_of_a_broken_one() -> None:
    assert "a step was broken off" in run_distributed(broken_off_case, 1)[0]
