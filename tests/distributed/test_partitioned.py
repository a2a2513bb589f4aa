"""ZeRO-3 whose parameters are partitioned, small as they are: steps and validation come to what stage 0 does.

DeepSpeed keeps small parameters whole (`stage3_param_persistence_threshold`), and all of a test's are small: whoever
reads one where no hook has gathered it would not be found out.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from symile_dist.config import parse_config
from symile_dist.types import Batch
from tests.processes import run_distributed

BATCH, DIMENSION, STEPS, VALIDATED = 8, 6, 3, 1
TEXT = """
run: {name: partitioned}
data: {train: none}
modalities:
  a: &modality
    {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  b: *modality
  c: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6}, missing_embedding: true}
model: {embedding_dim: 16, logit_scale_init: -1}
# With the usual eps Adam would make steps of what rounding leaves where a gradient is zero.
optimizer: {lr: 1e-2, eps: 1e-3, inner: {lr: 1e-2, eps: 1e-3}}
train: {steps: 3, global_batch_size: 8}
"""
POINTS = "{name: points, encoder: {name: mlp, input_dim: 6}, width: 8, points: 3}"
LABEL = "{member: npy, decoder: npy, transform: {name: tensor, dtype: int64}, encoder: {name: one_hot, classes: 3}}"
CASES: dict[str, list[str]] = {
    "confu": ["objective=confu", "train.micro_batch_size=2"],
    "gated": ["objective=gated_symile", "train.activation_checkpointing=true"],
    "factorcl": ["objective={name: factorcl, label: c, hidden: 16}", f"modalities.c={LABEL}"],
    "wpse": [
        "objective={name: wpse, form: symile, features: 32}",
        *(f"modalities.{m}.encoder={POINTS}" for m in "abc"),
    ],
}


def batch_of(case: str, number: int) -> Batch:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    generator = torch.Generator().manual_seed(number)
    inputs: dict[str, Any] = {name: torch.randn(BATCH, DIMENSION, generator=generator)[rows] for name in "abc"}
    if case == "factorcl":
        inputs["c"] = torch.arange(BATCH)[rows] % 3
    present = torch.ones(BATCH, 3, dtype=torch.bool)
    present[1::4, 2] = False
    ids = torch.arange(BATCH)[rows]
    labels = [str(number % 2) for number in ids.tolist()]
    return Batch(inputs, present[rows], torch.ones(len(ids), dtype=torch.bool), ids, labels)


def trained(case: str, stage: int) -> list[float]:
    """Losses of the steps and, after some of them, what a held-out pass gives."""
    from symile_dist import gradcache
    from symile_dist.engine import Engine
    from symile_dist.metrics.recorder import Recorder
    from symile_dist.step import train_step
    from symile_dist.validate import accuracies, embeddings_of, held_out_pass, similarity_of

    overrides = [*CASES[case], f"train.zero_stage={stage}", f"ray.num_workers={dist.get_world_size()}"]
    overrides += ["deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"] if stage == 3 else []
    config = parse_config(TEXT, "partitioned.yaml", overrides).config
    engine, found = Engine(config, torch.device("cpu")), []
    objective = engine.module.objective
    for step in range(STEPS):
        found.append(float(train_step(engine, batch_of(case, step), step, Recorder()).loss))
        if step != VALIDATED:
            continue
        engine.train(False)
        forward = partial(gradcache.forward, engine.encode, engine.objective, size=config.encoded_at_once)
        held_out = held_out_pass(forward, [batch_of(case, 100 + n) for n in range(2)], embeddings_of(objective))
        values = accuracies(similarity_of(objective), held_out, [*"abc"], across_ranks=True)
        engine.train(True)
        found += [held_out.loss, *values.values(), *(float(v.sum()) for v in held_out.representations.values())]
    return found


def every_case() -> dict[tuple[str, int], list[float]]:
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")
    return {(case, stage): trained(case, stage) for case in CASES for stage in (0, 3)}


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, int], list[float]]]:
    return run_distributed(every_case, 2, timeout=280.0)


@pytest.mark.parametrize("case", CASES)
def test_steps_and_validation_are_those_of_stage_0(ranks: list[Any], case: str) -> None:
    assert ranks[0][case, 3] == ranks[1][case, 3], "the ranks differ"
    assert ranks[0][case, 3] == pytest.approx(ranks[0][case, 0], rel=1e-4, abs=1e-4)
