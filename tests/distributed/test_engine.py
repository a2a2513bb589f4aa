"""ZeRO 0-3 in fp32 and bf16 on two real processes: all train, and agree with stage 0."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from symile_dist.config import Config, parse_config
from symile_dist.types import Batch
from tests.processes import run_distributed

STEPS, BATCH, DIMENSION = 8, 8, 6
POISONED_STEP = 3
TEXT = """
run: {name: engine}
data: {train: none}
modalities:
  a: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  b: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  c: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6}, lr: 2e-2,
      missing_embedding: true}
model: {embedding_dim: 16, logit_scale_init: -1}
optimizer: {lr: 1e-2, max_grad_norm: 1.0, warmup_steps: 2}
train: {steps: 8, global_batch_size: 8}
ray: {num_workers: 2}
"""
CASES = list(itertools.product(("fp32", "bf16"), (0, 1, 2, 3)))


def _config(precision: str, stage: int, world_size: int) -> Config:
    overrides = [f"train.precision={precision}", f"train.zero_stage={stage}", f"ray.num_workers={world_size}"]
    return parse_config(TEXT, "engine.yaml", overrides).config


def _batch(step: int, rank: int, world_size: int, poisoned: bool) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    whole = {name: torch.randn(BATCH, DIMENSION, generator=generator) for name in "abc"}
    inputs: dict[str, Any] = {name: values[rows] for name, values in whole.items()}
    if poisoned and rank == world_size - 1:
        inputs["a"] = torch.full_like(inputs["a"], torch.nan)
    n = rows.stop - rows.start
    present = torch.ones(BATCH, 3, dtype=torch.bool)
    present[1::4, 2] = False  # so that the learned vector takes part
    return Batch(inputs, present[rows], torch.ones(n, dtype=torch.bool), torch.arange(n))


def _train(precision: str, stage: int, poisoned: bool) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_fp32_param

    from symile_dist.engine import Engine

    rank, world_size = dist.get_rank(), dist.get_world_size()
    engine = Engine(_config(precision, stage, world_size), torch.device("cpu"))

    def weights() -> dict[str, torch.Tensor]:
        whole = {}
        for name, parameter in engine.module.named_parameters():
            master = safe_get_full_fp32_param(parameter) if stage else None
            whole[name] = (parameter if master is None else master).detach().float().clone()
        return whole

    steps, before, after = [], {}, {}
    for step in range(STEPS):
        poison = poisoned and step == POISONED_STEP
        if poison:
            before = weights()
        report = engine.forward(_batch(step, rank, world_size, poison), step)
        engine.backward(report.loss)
        result = engine.step(step)
        if poison:
            after = weights()
        steps.append((float(report.loss.detach()), result.applied, result.grad_norm))
    return {"steps": steps, "weights": weights(), "before": before, "after": after}


def _all_cases() -> dict[tuple[str, int, bool], dict[str, Any]]:
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")
    return {(*case, poisoned): _train(*case, poisoned) for case in CASES for poisoned in (False, True)}


def _one_process() -> dict[str, Any]:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    return _train("fp32", 0, False)


@pytest.fixture(scope="module")
def runs() -> list[dict[tuple[str, int, bool], dict[str, Any]]]:
    return run_distributed(_all_cases, 2, timeout=280.0)


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_stages_train_and_agree_with_stage_0(runs: list[Any], precision: str, stage: int) -> None:
    reference, found = runs[0]["fp32", 0, False], runs[0][precision, stage, False]
    # fp32: the same arithmetic in another order of sums. bf16: 8 bits of mantissa in weights and activations.
    tolerance = 1e-5 if precision == "fp32" else 0.06
    for step, ((loss, _, norm), (other_loss, applied, other_norm)) in enumerate(
        zip(reference["steps"], found["steps"], strict=True)
    ):
        assert applied, f"step {step} was skipped"
        assert other_loss == pytest.approx(loss, rel=tolerance, abs=tolerance), f"loss of step {step}"
        assert other_norm == pytest.approx(norm, rel=3 * tolerance), f"gradient norm of step {step}"
    for name, weights in reference["weights"].items():
        error = float((found["weights"][name] - weights).norm() / weights.norm())
        assert error < 3 * tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_a_step_poisoned_on_one_rank_is_skipped_by_both(runs: list[Any], precision: str, stage: int) -> None:
    for rank, run in enumerate(runs):
        found = run[precision, stage, True]
        applied = [applied for _, applied, _ in found["steps"]]
        assert applied == [step != POISONED_STEP for step in range(STEPS)], f"rank {rank}"
        for name, weights in found["before"].items():
            assert torch.equal(weights, found["after"][name]), f"rank {rank}: {name} changed in the skipped step"
        assert all(math.isfinite(loss) for step, (loss, *_) in enumerate(found["steps"]) if step != POISONED_STEP)


def test_ranks_report_the_same_loss_and_hold_the_same_weights(runs: list[Any]) -> None:
    for case, found in runs[0].items():
        other = runs[1][case]
        assert [s[:2] for s in found["steps"] if s[0] == s[0]] == [s[:2] for s in other["steps"] if s[0] == s[0]], case
        for name, weights in found["weights"].items():
            assert torch.equal(weights, other["weights"][name]), f"{case}: {name}"


def test_two_ranks_train_like_one(runs: list[Any]) -> None:
    (alone,) = run_distributed(_one_process, 1)
    for (loss, _, norm), (other_loss, _, other_norm) in zip(
        alone["steps"], runs[0]["fp32", 0, False]["steps"], strict=True
    ):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
    for name, weights in alone["weights"].items():
        error = float(F.mse_loss(runs[0]["fp32", 0, False]["weights"][name], weights).sqrt() / weights.norm())
        assert error < 1e-4, name


def _compiles_nothing() -> bool:
    import sys

    from symile_dist.engine import import_deepspeed

    import_deepspeed(torch.device("cpu"))
    return sys.modules["deepspeed.comm.torch"].build_shm_op() is None  # type: ignore[attr-defined]


def test_no_start_compiles_what_a_kill_could_leave_locked() -> None:
    assert run_distributed(_compiles_nothing, 1) == [True]


def _imported_by_a_step() -> set[str]:
    import sys

    from symile_dist.engine import Engine
    from symile_dist.flops import flops_per_sample

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    engine = Engine(_config("fp32", 1, 1), torch.device("cpu"))
    batch = _batch(0, 0, 1, False)
    engine.backward(engine.forward(batch, 0).loss)
    assert engine.step(0).applied
    assert flops_per_sample(engine, batch)[0] > 0
    return {"mlflow", "pandas", "scipy", "transformers"} & set(sys.modules)


def test_a_step_imports_nothing_large_that_it_does_not_need() -> None:
    """Seconds of every start and restart, of every rank."""
    assert run_distributed(_imported_by_a_step, 1) == [set()]
