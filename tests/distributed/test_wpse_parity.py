"""WPSE over real ranks: loss and averaged gradients are the single process's, also in two passes at ZeRO 0-3."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from symile_dist import distributed
from symile_dist.config import Config, parse_config
from symile_dist.encoders.points import PointHead
from symile_dist.objectives import WPSELoss
from symile_dist.objectives.kernels import draw_waves, make_kernel
from symile_dist.objectives.negatives import GlobalBatch
from symile_dist.objectives.reference import pairwise_clip_loss_reference, symile_loss_reference
from symile_dist.types import Batch, Padded, PointSet
from tests.distributed.test_gradcache import relative, take_step
from tests.distributed.test_objective_parity import check, without_gather_gradient, without_world_size
from tests.processes import run_distributed

BATCH, INPUT, DIMENSION, LONGEST, FEATURES, SEED, STEP = 8, 5, 4, 6, 16, 3, 11
ALPHAS = (0.6, 0.4)
VALID = {
    "all": [True] * BATCH,
    "some": [number not in (1, 6) for number in range(BATCH)],
    "a rank without": [number not in (2, 3, 6) for number in range(BATCH)],
    "none": [False] * BATCH,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "pairwise": {},
    "imq": {"kernel": "imq"},
    "symile": {"form": "symile"},
    "cube": {"form": "symile", "negative_sampling": "n_squared"},
}
CASES = [(name, number, valid) for name in OPTIONS for number in (2, 3) for valid in VALID]
NAIVE = [("pairwise", 3), ("cube", 3)]
Figures = dict[str, Any]


def inputs(number: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The global batch's tokens per modality, the numbers of them (M, N), and the shared encoders' weights."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randn(number, BATCH, LONGEST, INPUT, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, LONGEST + 1, (number, BATCH), generator=generator)
    weights = 0.7 * torch.randn(number, INPUT, DIMENSION + 1, generator=generator, dtype=torch.float64)
    return list(tokens), sizes, [weight.clone().requires_grad_() for weight in weights]


def point_set(tokens: Tensor, sizes: Tensor, weight: Tensor) -> PointSet:
    """No longer than the largest of these samples: so ranks pad differently."""
    longest = int(sizes.max())
    emitted = tokens[:, :longest] @ weight
    there = torch.arange(longest) < sizes[:, None]
    return PointSet(emitted[..., :DIMENSION], emitted[..., DIMENSION] * there, sizes)


def one_case(name: str, number: int, valid: str, **options: Any) -> Figures:
    """Loss and averaged gradients of one case, on this rank's rows."""
    world, rank = distributed.world_size(), distributed.rank()
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    tokens, sizes, weights = inputs(number)
    log_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    sets = [point_set(t[rows], s[rows], w) for t, s, w in zip(tokens, sizes, weights, strict=True)]
    loss = WPSELoss(seed=SEED, alphas=ALPHAS, features=FEATURES, **(OPTIONS[name] | options))
    value = loss(sets, log_scale.exp(), step=STEP, valid=torch.tensor(VALID[valid])[rows])
    gradients = torch.autograd.grad(value, [log_scale, *weights])
    averaged = [distributed.all_reduce_sum(gradient) / world for gradient in gradients]
    return {"loss": float(value.detach()), "gradients": [gradient.numpy() for gradient in averaged]}


def told(**options: Any) -> str:
    """What this rank is told where the ranks' arguments do not fit."""
    try:
        WPSELoss(**options)([torch.ones(2, 3)] * 2, 1.0, step=0)
    except ValueError as error:
        return str(error)
    return ""


def every_case() -> Figures:
    """What one rank finds, in one start of the processes."""
    rank = distributed.rank()
    torch.manual_seed(rank)  # other random numbers on every rank: nothing may depend on them
    np.random.seed(rank)
    figures: Figures = {str(case): one_case(*case) for case in CASES}
    with patch("symile_dist.objectives.negatives.all_gather_with_gradient", without_gather_gradient):
        for case in NAIVE:
            figures[f"no gather gradient {case}"] = one_case(*case, "some")
    with patch.object(GlobalBatch, "mean", without_world_size):
        for case in NAIVE:
            figures[f"no world size {case}"] = one_case(*case, "some")
    waves = draw_waves(make_kernel("gaussian", 0.5), FEATURES, DIMENSION, 3, SEED, STEP)
    figures["waves"] = [tensor.tolist() for tensor in waves]
    if distributed.world_size() > 1:
        figures["kernels"] = told(kernel="imq" if rank else "gaussian")
        figures["seeds"] = told(seed=rank)
    return figures


def reference(name: str, number: int, valid: str) -> Figures:
    """The same case in this process, on the whole batch, as the papers write it."""
    tokens, sizes, weights = inputs(number)
    log_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    options = OPTIONS[name]
    factors = number if options.get("form") == "symile" else 2
    kernel = make_kernel(options.get("kernel", "gaussian"), 0.5, factors)
    waves = draw_waves(kernel, FEATURES, DIMENSION, factors, SEED, STEP)
    frequencies, phases = (tensor.double() for tensor in waves)
    encoded = []
    for m in range(number):
        found = []
        for row in range(BATCH):
            emitted = tokens[m][row, : int(sizes[m, row])] @ weights[m]
            unit = emitted[:, :DIMENSION] / emitted[:, :DIMENSION].norm(dim=1, keepdim=True)
            own = m if factors == number else 0
            cosines = (unit @ frequencies[own].T + phases[own]).cos()
            blocks = [
                (ALPHAS[0] * DIMENSION ** (factors / 2 - 1)) ** (1 / factors) * unit,
                (ALPHAS[1] * 2 ** (factors - 1) / FEATURES) ** (1 / factors) * cosines,
            ]
            found.append((emitted[:, DIMENSION:] * torch.cat(blocks, dim=1)).mean(dim=0))
        encoded.append(torch.stack(found))
    flags = torch.tensor(VALID[valid])
    if not flags.any():  # the mean over nothing: what the fast path promises is zero
        value = 0.0 * sum(tensor.sum() for tensor in [log_scale, *weights])  # type: ignore[assignment]
    elif options.get("form") == "symile":
        sampling = options.get("negative_sampling", "n")
        value = symile_loss_reference(encoded, log_scale.exp(), SEED, STEP, flags, negative_sampling=sampling)
    else:
        pairs = len(list(combinations(range(number), 2)))
        value = pairwise_clip_loss_reference(encoded, log_scale.exp(), flags) / pairs
    gradients = torch.autograd.grad(value, [log_scale, *weights])
    return {"loss": float(value.detach()), "gradients": [gradient.numpy() for gradient in gradients]}


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["world1", "world2", "world4"])
def ranks(request: pytest.FixtureRequest) -> list[Figures]:
    """What every rank found."""
    return run_distributed(every_case, request.param)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_averaged_gradients_are_the_single_process_ones(
    ranks: list[Figures], case: tuple[str, int, str]
) -> None:
    want = reference(*case)
    for rank, figures in enumerate(ranks):
        try:
            check(figures[str(case)], want)
        except AssertionError as error:
            raise AssertionError(f"rank {rank} of {len(ranks)}: {error}") from None
    assert len({figures[str(case)]["loss"] for figures in ranks}) == 1, "the ranks disagree on the loss"


@pytest.mark.parametrize("scheme", ["no gather gradient", "no world size"])
@pytest.mark.parametrize("case", NAIVE, ids=str)
def test_naive_schemes_fail_the_same_check(ranks: list[Figures], scheme: str, case: tuple[str, int]) -> None:
    want, got = reference(*case, "some"), ranks[0][f"{scheme} {case}"]
    if len(ranks) == 1:
        check(got, want)
        return
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-10), "the loss itself does not give a naive scheme away"
    with pytest.raises(AssertionError, match="gradient of"):
        check(got, want)


def test_all_ranks_draw_the_same_features(ranks: list[Figures]) -> None:
    assert all(figures["waves"] == ranks[0]["waves"] for figures in ranks)


def test_ranks_that_disagree_are_told_alike(ranks: list[Figures]) -> None:
    if len(ranks) > 1:
        for what in ("kernels", "seeds"):
            assert {figures[what] for figures in ranks} == {ranks[0][what]}
            assert "the ranks disagree" in ranks[0][what] and "WPSE" in ranks[0][what]


# -- the two-pass step -------------------------------------------------------------------------------------------------

STEPS = 2
TEXT = f"""
run: {{name: wpse}}
data: {{train: none}}
modalities:
  a: {{member: npy, decoder: npy, transform: tensor, encoder: "{__name__}:Tokens"}}
  b: {{member: npy, decoder: npy, transform: tensor, encoder: "{__name__}:Tokens"}}
  c:
    member: npy
    decoder: npy
    transform: tensor
    encoder: {{name: points, encoder: {{name: mlp, input_dim: {INPUT}}}, width: 8, points: 3}}
model:
  embedding_dim: {DIMENSION}
  normalization: none
  logit_scale_init: 14.2857
  logit_scale_form: raw
  logit_scale_range: [1, 100]
optimizer: {{lr: 1e-2, max_grad_norm: 0}}
train: {{steps: 8, global_batch_size: {BATCH}}}
"""
# (ZeRO stage, micro-batch or one pass, form)
TWO_PASSES = [
    (0, None, "pairwise"),
    (0, 3, "pairwise"),
    (1, 3, "symile"),
    (2, 3, "pairwise"),
    (3, 3, "symile"),
    (3, None, "pairwise"),
]


class Tokens(nn.Module):
    """A linear head of points per token, no further than the longest of the samples that it sees."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.head = PointHead(INPUT, embedding_dim)

    def forward(self, inputs: Padded) -> PointSet:
        return self.head(inputs.values[:, : int(inputs.lengths.max())], inputs.lengths)


def configured(*overrides: str, world_size: int = 1) -> Config:
    return parse_config(TEXT, "wpse.yaml", [f"ray.num_workers={world_size}", *overrides]).config


def batch_of(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    found: dict[str, Any] = {}
    for name in "ab":
        lengths = torch.randint(1, LONGEST + 1, (BATCH,), generator=generator)
        values = torch.randn(BATCH, LONGEST, INPUT, generator=generator)
        found[name] = Padded(values[rows], lengths[rows])
    found["c"] = torch.randn(BATCH, INPUT, generator=generator)[rows]
    valid = (torch.arange(BATCH) != 3)[rows]
    return Batch(found, torch.ones(len(valid), 3, dtype=torch.bool), valid, torch.arange(len(valid)))


def two_passes() -> Figures:
    from symile_dist.engine import Engine

    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    figures: Figures = {}
    for stage, size, form in TWO_PASSES:
        options = [f"train.zero_stage={stage}", f"train.micro_batch_size={size or 'null'}"]
        config = configured(*options, f"objective={{name: wpse, features: 16, form: {form}}}", world_size=world_size)
        engine = Engine(config, torch.device("cpu"))
        steps = [take_step(engine, batch_of(step, rank, world_size), step) for step in range(STEPS)]
        figures[str((stage, size, form))] = steps
        figures[f"scale {stage}"] = engine.logit_scale()
    return figures


def one_process(form: str) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """The same steps in this process, in one pass and without DeepSpeed: loss and gradients on the same weights."""
    from symile_dist.model import TrainingModule
    from symile_dist.optim import learning_rate_factor, make_optimizer

    config = configured(f"objective={{name: wpse, features: 16, form: {form}}}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = TrainingModule(config)
    optimizer = make_optimizer(module, config)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = module(batch_of(step), step).loss
        loss.backward()
        yield (
            float(loss.detach()),
            {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None},
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(config.optimizer, step, config.train.steps)
        optimizer.step()


@pytest.fixture(scope="module")
def engines() -> list[Figures]:
    return run_distributed(two_passes, 2, timeout=280.0)


@pytest.mark.parametrize("case", TWO_PASSES, ids=str)
def test_point_sets_of_unequal_size_in_two_passes(engines: list[Figures], case: tuple[int, int | None, str]) -> None:
    want = list(one_process(case[2]))
    for rank, figures in enumerate(engines):
        for step, ((loss, gradients, applied), (of_loss, of_gradients)) in enumerate(
            zip(figures[str(case)], want, strict=True)
        ):
            assert applied and loss == pytest.approx(of_loss, rel=1e-6), f"rank {rank}, step {step}"
            assert relative(gradients, of_gradients) <= 1e-6, f"rank {rank}, step {step}"


def test_the_scale_is_learned_as_it_is(engines: list[Figures]) -> None:
    # Adam moves it by about the learning rate per step, not by so much of its logarithm.
    for stage in range(4):
        moved = abs(engines[0][f"scale {stage}"] - 14.2857)
        assert 1e-3 < moved < 0.03, f"stage {stage}"
