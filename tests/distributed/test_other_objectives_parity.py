"""SigLIP, GRAM and TRIANGLE over real ranks: equal to the single-process references, as `test_objective_parity` has it.

Each rank encodes its own rows with linear encoders that all ranks share; the averages over the ranks of the encoders'
gradients must be the gradients of the loss on the concatenated batch.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from symile_dist import distributed
from symile_dist.objectives import GramLoss, PairwiseSigmoidLoss, TriangleLoss, geometry, sigmoid
from symile_dist.objectives.negatives import GlobalBatch
from symile_dist.objectives.reference import (
    gram_loss_reference,
    pairwise_sigmoid_loss_reference,
    triangle_loss_reference,
)
from tests.distributed.test_objective_parity import check, without_gather_gradient, without_world_size
from tests.processes import run_distributed

BATCH, INPUT, DIMENSION = 16, 5, 7
VALID = {
    "all": [True] * BATCH,
    "some": [number not in (1, 6, 7, 13) for number in range(BATCH)],
    # Ranks of 4 rows: one has none at all, another one row.
    "a rank without": [number not in (4, 5, 6, 7, 13, 14, 15) for number in range(BATCH)],
    "none": [False] * BATCH,
}
SMOOTHED = {"anchor": 1, "label_smoothing": 0.1}
LOSSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sigmoid": (PairwiseSigmoidLoss, pairwise_sigmoid_loss_reference, {}),
    "gram": (GramLoss, gram_loss_reference, {}),
    "gram, smoothed": (GramLoss, gram_loss_reference, SMOOTHED),
    "triangle": (TriangleLoss, triangle_loss_reference, {}),
    "triangle, smoothed": (TriangleLoss, triangle_loss_reference, SMOOTHED),
}
CASES = [
    (loss, number, valid)
    for loss in LOSSES
    for number in (2, 3, 4)
    for valid in VALID
    if not ("triangle" in loss and number != 3)
]
NAIVE = {"no gather gradient": [("gram", 3), ("triangle", 3), ("sigmoid", 3)], "no world size": [("sigmoid", 3)]}
Figures = dict[str, Any]


def inputs(number: int) -> tuple[list[Tensor], list[Tensor]]:
    """The global batch's inputs and the shared encoders' weights, per modality."""
    generator = torch.Generator().manual_seed(number)
    data = torch.randn(number, BATCH, INPUT, generator=generator, dtype=torch.float64)
    weights = 0.5 * torch.randn(number, INPUT, DIMENSION, generator=generator, dtype=torch.float64)
    return list(data), [weight.clone().requires_grad_() for weight in weights]


def numbers(loss: str) -> list[Tensor]:
    """The learned scalars: log of the scale and, for the sigmoid, the bias."""
    values = [1.1, -0.7] if loss == "sigmoid" else [1.1]
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def one_case(loss: str, number: int, valid: str) -> Figures:
    """Loss and averaged gradients of one case, on this rank's rows."""
    world, rank = distributed.world_size(), distributed.rank()
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    data, weights = inputs(number)
    log_scale, *bias = learned = numbers(loss)
    local = [x[rows] @ weight for x, weight in zip(data, weights, strict=True)]
    make, _, options = LOSSES[loss]
    value = make(**options)(local, log_scale.exp(), *bias, valid=torch.tensor(VALID[valid])[rows])
    gradients = torch.autograd.grad(value, [*learned, *weights])
    averaged = [distributed.all_reduce_sum(gradient) / world for gradient in gradients]
    return {"loss": float(value.detach()), "gradients": [gradient.numpy() for gradient in averaged]}


def disagreement(**options: Any) -> str:
    """What this rank is told where the ranks' arguments do not fit."""
    try:
        GramLoss(**options)([torch.ones(2, 3)] * 3, 1.0)
    except ValueError as error:
        return str(error)
    return ""


def every_case() -> Figures:
    """What one rank finds, in one start of the processes; with tiles of two rows."""
    with patch.dict(geometry.LOGITS, cpu=2 * BATCH), patch.dict(sigmoid.LOGITS, cpu=2 * BATCH):
        figures: Figures = {str(case): one_case(*case) for case in CASES}
        with patch("symile_dist.objectives.negatives.all_gather_with_gradient", without_gather_gradient):
            for case in NAIVE["no gather gradient"]:
                figures[f"no gather gradient {case}"] = one_case(*case, "some")
        with patch.object(GlobalBatch, "mean", without_world_size):
            for case in NAIVE["no world size"]:
                figures[f"no world size {case}"] = one_case(*case, "some")
    if distributed.world_size() > 1:
        rank = distributed.rank()
        figures["anchors"] = disagreement(anchor=min(rank, 1))
        figures["no such anchor"] = disagreement(anchor=7 if rank == 1 else 0)
    return figures


def reference(loss: str, number: int, valid: str) -> Figures:
    """The same case in this process, on the whole batch, as the papers write it."""
    data, weights = inputs(number)
    log_scale, *bias = learned = numbers(loss)
    encoded = [x @ weight for x, weight in zip(data, weights, strict=True)]
    flags = torch.tensor(VALID[valid])
    _, plain, options = LOSSES[loss]
    if flags.any():
        value = plain(encoded, log_scale.exp(), *bias, flags, **options)
    else:  # the mean over nothing: what the fast path promises is zero
        value = 0.0 * sum(tensor.sum() for tensor in [*learned, *encoded])
    gradients = torch.autograd.grad(value, [*learned, *weights])
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


@pytest.mark.parametrize(("scheme", "case"), [(scheme, case) for scheme, cases in NAIVE.items() for case in cases])
def test_naive_schemes_fail_the_same_check(ranks: list[Figures], scheme: str, case: tuple[str, int]) -> None:
    want, got = reference(*case, "some"), ranks[0][f"{scheme} {case}"]
    if len(ranks) == 1:
        check(got, want)
        return
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-10), "the loss itself does not give a naive scheme away"
    with pytest.raises(AssertionError, match="ratio to the single-process one"):
        check(got, want)


def test_mistakes_are_told_on_all_ranks_alike(ranks: list[Figures]) -> None:
    for figures in ranks if len(ranks) > 1 else []:
        assert "the ranks disagree: rank 0 has" in figures["anchors"] and "anchor=1" in figures["anchors"]
        assert figures["no such anchor"] == "rank 1: anchor = 7 should be the number of a modality, 0 to 2"
