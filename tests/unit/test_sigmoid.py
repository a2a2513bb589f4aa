"""The pairwise sigmoid loss in one process: equal to the readable reference and to a loop over numbers."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from symile_dist.objectives import PairwiseSigmoidLoss, PairwiseSigmoidObjective, sigmoid
from symile_dist.objectives.reference import pairwise_sigmoid_loss_reference
from symile_dist.registry import OBJECTIVES, build
from symile_dist.similarity import SumSimilarity
from symile_dist.types import Batch, Outputs

VALID = {
    "all": None,
    "some": [True, False, True, True, True, False, True, True],
    "first only": [True] + [False] * 7,
    "none": [False] * 8,
}


def representations(number: int, batch: int = 8, dimension: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return list(torch.randn(number, batch, dimension, generator=generator, dtype=torch.float64))


def mask(name: str) -> Tensor | None:
    pattern = VALID[name]
    return None if pattern is None else torch.tensor(pattern)


def loss_and_gradients(function: Any, tensors: list[Tensor], valid: Tensor | None, bias: float = -1.3) -> list[Tensor]:
    log_scale, logit_bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.4, bias))
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(leaves, log_scale.exp(), logit_bias, valid=valid)
    return [value.detach(), *torch.autograd.grad(value, [log_scale, logit_bias, *leaves])]


def check(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-12) -> None:
    for what, g, w in zip(["loss", "logit_scale", "logit_bias", *"abcd"], got, want, strict=False):
        assert g.shape == w.shape
        difference = (g - w).abs().max().item()
        assert difference <= tolerance * max(1.0, w.abs().max().item()), f"{what} is off by {difference:.2e}"


@pytest.mark.parametrize("rows", [8, 3, 1])
@pytest.mark.parametrize("valid", ["all", "some", "first only"])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_fast_equals_reference_in_loss_and_gradients(
    number: int, valid: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sigmoid.LOGITS, "cpu", rows * 8)
    tensors = representations(number)
    # A bias of 30 and -30: beyond softplus's usual threshold of 20, from which on it is but an approximation.
    for bias in (-1.3, 30.0, -30.0):
        want = loss_and_gradients(pairwise_sigmoid_loss_reference, tensors, mask(valid), bias)
        check(loss_and_gradients(PairwiseSigmoidLoss(), tensors, mask(valid), bias), want)
    unit = [tensor / tensor.norm(dim=1, keepdim=True) for tensor in tensors]
    normalized = PairwiseSigmoidLoss(normalize=True)(tensors, 2.0, -1.0, valid=mask(valid))
    assert normalized.item() == pytest.approx(PairwiseSigmoidLoss()(unit, 2.0, -1.0, valid=mask(valid)).item())


@pytest.mark.parametrize("valid", ["all", "some"])
def test_reference_and_loss_equal_a_loop_over_numbers(valid: str) -> None:
    tensors, rows = representations(3), VALID[valid] or [True] * 8
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (1.7, -2.5))
    total = 0.0
    for first, second in combinations([tensor.tolist() for tensor in tensors], 2):
        for i in range(8):
            for j in range(8):
                if rows[i] and rows[j]:
                    logit = 1.7 * sum(x * y for x, y in zip(first[i], second[j], strict=True)) - 2.5
                    total -= math.log(1 / (1 + math.exp(-logit if i == j else logit))) / sum(rows)
    reference = pairwise_sigmoid_loss_reference(tensors, scale, bias, mask(valid))
    assert reference.item() == pytest.approx(total, rel=1e-12)
    assert PairwiseSigmoidLoss()(tensors, scale, bias, valid=mask(valid)).item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_agree_with_finite_differences(normalize: bool) -> None:
    valid = torch.tensor([True, True, False, True])

    def loss(log_scale: Tensor, bias: Tensor, *parts: Tensor) -> Tensor:
        return PairwiseSigmoidLoss(normalize=normalize)(list(parts), log_scale.exp(), bias, valid=valid)

    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.4, -1.3)]
    tensors = [tensor.requires_grad_() for tensor in representations(3, batch=4, dimension=3)]
    assert torch.autograd.gradcheck(loss, (*numbers, *tensors))


@pytest.mark.parametrize("normalize", [False, True])
def test_what_stands_in_invalid_rows_does_not_matter(normalize: bool) -> None:
    valid = mask("some")
    assert valid is not None
    plain, loss = representations(3), PairwiseSigmoidLoss(normalize=normalize)
    want = loss_and_gradients(loss, plain, valid)
    for odd in (37.0, math.nan):
        got = loss_and_gradients(loss, [t.masked_fill(~valid[:, None], odd) for t in plain], valid)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    for gradient in want[3:]:
        assert not gradient[~valid].any() and gradient[valid].any()


def test_a_batch_without_one_valid_row_has_finite_zero_gradients() -> None:
    for value in loss_and_gradients(PairwiseSigmoidLoss(), representations(3), mask("none")):
        assert not value.any() and torch.isfinite(value).all()


def test_equal_modalities_have_a_small_loss() -> None:
    perfect = [torch.eye(8, dtype=torch.float64)] * 3
    value, *gradients = loss_and_gradients(
        lambda t, s, b, valid: PairwiseSigmoidLoss()(t, 80.0 * s / s.detach(), b, valid=valid), perfect, None, -40.0
    )
    assert 0 < value.item() < 1e-14
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_wrong_arguments_are_told() -> None:
    three = [torch.zeros(4, 3)] * 3
    for arguments, words in [
        ((three[:1], 1.0, 0.0), "two or more modalities, got 1"),
        ((three, torch.ones(2), 0.0), "logit_scale should be one number, is torch.float32"),
        ((three, 1.0, torch.ones(2)), "logit_bias should be one number, is torch.float32"),
        ((three, 1.0, None), "logit_bias should be a number or a tensor of one, is a NoneType"),
    ]:
        with pytest.raises(ValueError, match=words):
            PairwiseSigmoidLoss()(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="valid should be a bool tensor"):
        PairwiseSigmoidLoss()(three, 1.0, 0.0, valid=torch.ones(4))


# -- as the trainer calls it -----------------------------------------------------------------------------------------


def batch_of(valid: Tensor) -> Batch:
    size = len(valid)
    return Batch({}, torch.ones(size, 3, dtype=torch.bool), valid, torch.arange(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_objective_computes_in_fp32_and_holds_the_bias(dtype: torch.dtype) -> None:
    valid = mask("some")
    assert valid is not None
    objective = build("pairwise_sigmoid", {"logit_bias_init": -4.0, "normalize": False}, OBJECTIVES, "objective")
    assert [(name, parameter.shape) for name, parameter in objective.named_parameters()] == [("logit_bias", (1,))]
    tensors = [tensor.to(dtype).requires_grad_() for tensor in representations(3)]
    report = objective(Outputs(dict(zip("abc", tensors, strict=True)), torch.tensor(1.5)), batch_of(valid), 0)
    exact = [tensor.detach().double() for tensor in tensors]
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (1.5, -4.0))
    assert report.loss.dtype == torch.float32
    assert report.loss.item() == pytest.approx(pairwise_sigmoid_loss_reference(exact, *numbers, valid).item(), rel=1e-5)
    for gradient in torch.autograd.grad(report.loss, [objective.logit_bias, *tensors]):
        assert torch.isfinite(gradient).all() and gradient.any()
    assert not any(metric.requires_grad for metric in report.metrics.values())
    assert isinstance(objective.similarity, SumSimilarity) and not objective.similarity.normalize
    assert PairwiseSigmoidObjective().similarity.normalize and PairwiseSigmoidObjective().logit_bias.item() == -10


def test_objective_trains() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 4)
    inputs = [hidden @ torch.randn(4, 8) + 0.1 * torch.randn(64, 8) for _ in range(3)]
    encoders = [torch.nn.Linear(8, 6) for _ in range(3)]
    objective, log_scale = PairwiseSigmoidObjective(), torch.nn.Parameter(torch.tensor(math.log(10.0)))
    learned = [log_scale, *objective.parameters(), *(p for encoder in encoders for p in encoder.parameters())]
    optimizer = torch.optim.Adam(learned, lr=0.02)
    losses = []
    for step in range(40):
        encoded = {name: encoder(x) for name, encoder, x in zip("xyz", encoders, inputs, strict=True)}
        loss = objective(Outputs(encoded, log_scale.exp()), batch_of(torch.ones(64, dtype=torch.bool)), step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and objective.logit_bias.item() != -10.0
    x, y, z = (encoded[name].detach() for name in "xyz")
    found = objective.similarity(x, [y, z]).argmax(dim=1) == torch.arange(64)
    assert found.float().mean() > 0.5
