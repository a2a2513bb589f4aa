"""The losses in one process: equal to the readable reference and to a loop over numbers; and their negatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from symile_dist.objectives import PairwiseClipLoss, PairwiseClipObjective, SymileLoss, SymileObjective
from symile_dist.objectives.negatives import draw_permutations
from symile_dist.objectives.reference import pairwise_clip_loss_reference, symile_loss_reference
from symile_dist.similarity import MIPSimilarity, SumSimilarity
from symile_dist.types import Batch, Outputs

SEED, STEP = 5, 7
VALID = {
    "all": None,
    "some": [True, False, True, True, True, False, True, True],
    "first only": [True] + [False] * 7,
    "none": [False] * 8,
}


def representations(
    number: int, batch: int = 8, dimension: int = 6, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randn(number, batch, dimension, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def scale(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(0.4, dtype=dtype, requires_grad=True)


def mask(name: str) -> Tensor | None:
    pattern = VALID[name]
    return None if pattern is None else torch.tensor(pattern)


def fast_symile(tensors: list[Tensor], logit_scale: Tensor, valid: Tensor | None) -> Tensor:
    return SymileLoss(seed=SEED)(tensors, logit_scale, step=STEP, valid=valid)


def plain_symile(tensors: list[Tensor], logit_scale: Tensor, valid: Tensor | None) -> Tensor:
    return symile_loss_reference(tensors, logit_scale, SEED, STEP, valid)


def fast_clip(tensors: list[Tensor], logit_scale: Tensor, valid: Tensor | None) -> Tensor:
    return PairwiseClipLoss()(tensors, logit_scale, valid=valid)


Loss = Callable[[list[Tensor], Tensor, Tensor | None], Tensor]
PAIRS: dict[str, tuple[Loss, Loss]] = {
    "symile": (fast_symile, plain_symile),
    "pairwise_clip": (fast_clip, pairwise_clip_loss_reference),
}


# -- fast = reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", ["all", "some", "first only"])
@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("name", PAIRS)
def test_fast_equals_reference_in_loss_and_gradients(name: str, number: int, valid: str) -> None:
    found = []
    for loss in PAIRS[name]:
        tensors, logit_scale = representations(number), scale()
        value = loss(tensors, logit_scale.exp(), mask(valid))
        found.append((value, torch.autograd.grad(value, [logit_scale, *tensors])))
    (fast, fast_gradients), (reference, reference_gradients) = found
    torch.testing.assert_close(fast, reference, rtol=1e-12, atol=1e-12)
    for what, got, want in zip(["logit_scale", *"abcd"], fast_gradients, reference_gradients, strict=False):
        difference = (got - want).abs().max().item()
        assert difference <= 1e-10 * max(1.0, want.abs().max().item()), f"gradient of {what} is off by {difference:.2e}"


@pytest.mark.parametrize("valid", ["all", "some"])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_symile_equals_a_loop_over_numbers(number: int, valid: str) -> None:
    tensors, logit_scale = representations(number, batch=8), 1.7
    rows = VALID[valid] or [True] * 8
    drawn = draw_permutations(number, 8, SEED, STEP, torch.tensor(rows)).tolist()
    values = [tensor.tolist() for tensor in tensors]
    total, anchors = 0.0, 0
    for anchor in range(number):
        for i in range(8):
            if not rows[i]:
                continue
            logits = {}
            for j in range(8):
                if not rows[j]:
                    continue
                logits[j] = 0.0
                for d in range(6):
                    product = values[anchor][i][d]
                    for other in range(number):
                        if other != anchor:
                            product *= values[other][i if j == i else drawn[anchor][other][j]][d]
                    logits[j] += logit_scale * product
            total += math.log(sum(math.exp(logit) for logit in logits.values())) - logits[i]
            anchors += 1
    loss = SymileLoss(seed=SEED)(tensors, logit_scale, step=STEP, valid=mask(valid))
    assert loss.item() == pytest.approx(total / anchors, rel=1e-12)


def test_pairwise_clip_equals_a_loop_over_numbers() -> None:
    tensors, logit_scale = representations(3), 1.7
    values = [tensor.tolist() for tensor in tensors]
    total = 0.0
    for first, second in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]:
        for i in range(8):
            logits = [
                logit_scale * sum(x * y for x, y in zip(values[first][i], row, strict=True)) for row in values[second]
            ]
            total += (math.log(sum(map(math.exp, logits))) - logits[i]) / 8 / 2
    assert PairwiseClipLoss()(tensors, logit_scale).item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    tensors, logit_scale = representations(3, batch=4, dimension=3), scale()
    valid = torch.tensor([True, True, False, True])

    def loss(log_scale: Tensor, *parts: Tensor) -> Tensor:
        return PAIRS[name][0](list(parts), log_scale.exp(), valid)

    assert torch.autograd.gradcheck(loss, (logit_scale, *tensors))


@pytest.mark.parametrize("number", [2, 3, 4])
def test_the_scale_gradient_is_that_of_a_homogeneous_function(number: int) -> None:
    # s dL/ds = <A, dL/dA> for every modality A: the logits are linear in each.
    tensors, log_scale = representations(number), scale()
    gradients = torch.autograd.grad(fast_symile(tensors, log_scale.exp(), mask("some")), [log_scale, *tensors])
    for tensor, gradient in zip(tensors, gradients[1:], strict=True):
        torch.testing.assert_close((tensor * gradient).sum(), gradients[0], rtol=1e-10, atol=1e-12)


def test_untrained_and_perfect_representations_have_the_known_losses() -> None:
    zeros = [torch.zeros(8, 6, dtype=torch.float64)] * 3
    assert SymileLoss()(zeros, 1.0, step=0).item() == pytest.approx(math.log(8))
    assert PairwiseClipLoss()(zeros, 1.0).item() == pytest.approx(3 * math.log(8))
    perfect = [torch.eye(8, dtype=torch.float64)] * 3
    assert PairwiseClipLoss()(perfect, 100.0).item() < 1e-12
    # Symile's permutations may hand a row its own parts back (as the paper's do): only those rows have a loss, log 2.
    drawn = draw_permutations(3, 8, 0, 0, torch.ones(8, dtype=torch.bool))
    anchors = [(anchor, [m for m in range(3) if m != anchor]) for anchor in range(3)]
    accidents = sum(
        sum(all(int(drawn[anchor, m, j]) == i for m in others) for j in range(8) if j != i) > 0
        for anchor, others in anchors
        for i in range(8)
    )
    assert SymileLoss()(perfect, 100.0, step=0).item() == pytest.approx(accidents * math.log(2) / 24)


# -- invalid rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_what_stands_in_invalid_rows_does_not_matter(name: str) -> None:
    valid = mask("some")
    assert valid is not None
    plain, odd = representations(3), representations(3)
    odd = [tensor.detach().masked_fill(~valid[:, None], 37.0).requires_grad_() for tensor in odd]
    losses, gradients = [], []
    for tensors in (plain, odd):
        logit_scale = scale()
        losses.append(PAIRS[name][0](tensors, logit_scale.exp(), valid))
        gradients.append(torch.autograd.grad(losses[-1], [logit_scale, *tensors]))
    assert torch.equal(*losses)
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=0)
    for gradient in gradients[0][1:]:
        assert not gradient[~valid].any() and gradient[valid].any()


@pytest.mark.parametrize("name", PAIRS)
def test_a_batch_without_one_valid_row_has_finite_zero_gradients(name: str) -> None:
    tensors, logit_scale = representations(3), scale()
    loss = PAIRS[name][0](tensors, logit_scale.exp(), mask("none"))
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, [logit_scale, *tensors]):
        assert not gradient.any() and torch.isfinite(gradient).all()


# -- permutations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", ["all", "some", "first only", "none"])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_valid_rows_are_permuted_among_themselves(number: int, valid: str) -> None:
    flags = torch.ones(8, dtype=torch.bool) if mask(valid) is None else mask(valid)
    assert flags is not None
    drawn = draw_permutations(number, 8, SEED, STEP, flags)
    assert drawn.shape == (number, number, 8)
    assert torch.equal(drawn.sort(dim=-1).values, torch.arange(8).expand(number, number, 8)), "not permutations"
    assert torch.equal(flags[drawn], flags.expand(number, number, 8)), "valid and invalid rows mix"


def test_permutations_are_a_pure_function_of_their_key_and_distinct_otherwise() -> None:
    valid = torch.ones(64, dtype=torch.bool)
    torch.manual_seed(1)
    first = draw_permutations(3, 64, 0, 0, valid)
    torch.manual_seed(2)
    assert torch.equal(first, draw_permutations(3, 64, 0, 0, valid)), "they depend on a hidden state"
    tables = [draw_permutations(3, 64, seed, step, valid) for seed, step in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    rows = {tuple(table[a, o].tolist()) for table in tables for a in range(3) for o in range(3) if a != o}
    assert len(rows) == 4 * 6, "two of (seed, step, anchor, other) share a permutation"


def test_the_loss_depends_on_step_and_seed() -> None:
    tensors = representations(3)
    values = {SymileLoss(seed=seed)(tensors, 1.0, step=step).item() for seed in (0, 1) for step in (0, 1)}
    assert len(values) == 4


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "valid", "words"),
    [
        ([], None, "two or more modalities, got 0"),
        ([torch.zeros(4, 3)], None, "two or more modalities, got 1"),
        ([torch.zeros(4, 3), torch.zeros(4, 5)], None, "representation 1 has shape"),
        ([torch.zeros(4, 3), torch.zeros(5, 3)], None, "representation 1 has shape"),
        ([torch.zeros(4, 3), torch.zeros(4, 3).double()], None, "representation 1 has dtype torch.float64"),
        ([torch.zeros(4, 3), torch.zeros(4, 3).long()], None, "dtype torch.int64; should be floating point"),
        ([torch.zeros(4, 3, 2), torch.zeros(4, 3, 2)], None, r"shape \(4, 3, 2\); should be \(n, D\)"),
        ([torch.zeros(4, 3)] * 2, torch.ones(5, dtype=torch.bool), r"shape \(4,\), is torch.bool \(5,\)"),
        ([torch.zeros(4, 3)] * 2, torch.ones(4), r"valid should be a bool tensor of shape \(4,\), is torch.float32"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told(tensors: list[Tensor], valid: Tensor | None, words: str) -> None:
    for loss in (SymileLoss(), PairwiseClipLoss()):
        with pytest.raises(ValueError, match=words):
            loss(tensors, 1.0, step=0, valid=valid)


def test_unknown_negative_sampling() -> None:
    with pytest.raises(ValueError, match="unknown negative_sampling 'nn'; did you mean 'n'"):
        SymileLoss("nn")


# -- as the trainer calls them ---------------------------------------------------------------------------------------


def batch_of(valid: Tensor) -> Batch:
    size = len(valid)
    return Batch({}, torch.ones(size, 3, dtype=torch.bool), valid, torch.arange(size))


@pytest.mark.parametrize("objective", [SymileObjective(seed=SEED), PairwiseClipObjective()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_objectives_compute_in_fp32(objective: torch.nn.Module, dtype: torch.dtype) -> None:
    valid = mask("some")
    assert valid is not None
    tensors, logit_scale = representations(3, dtype=dtype), scale(dtype)
    outputs = Outputs(dict(zip("abc", tensors, strict=True)), logit_scale.exp())
    report = objective(outputs, batch_of(valid), STEP)
    assert report.loss.dtype == torch.float32
    exact = [tensor.detach().double() for tensor in tensors]
    reference = plain_symile if isinstance(objective, SymileObjective) else pairwise_clip_loss_reference
    expected = reference(exact, outputs.logit_scale.detach().double(), valid)
    # The inputs are what bf16 made of them; from there on everything is fp32.
    assert report.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient in torch.autograd.grad(report.loss, [logit_scale, *tensors]):
        assert gradient.dtype == dtype and torch.isfinite(gradient).all()
    assert not any(metric.requires_grad for metric in report.metrics.values())


def test_positive_and_negative_scores() -> None:
    perfect = torch.eye(8)
    outputs = Outputs(dict.fromkeys("abc", perfect), torch.tensor(1.0))
    metrics = SymileObjective(seed=0)(outputs, batch_of(torch.ones(8, dtype=torch.bool)), 0).metrics
    assert (float(metrics["positive_score"]), float(metrics["negative_score"])) == (1.0, 0.0)
    # A rank with a single row has no negatives: shifted, its row would be the positive itself.
    outputs = Outputs(dict.fromkeys("abc", perfect[:1]), torch.tensor(1.0))
    metrics = SymileObjective(seed=0)(outputs, batch_of(torch.ones(1, dtype=torch.bool)), 0).metrics
    assert (float(metrics["positive_score"]), float(metrics["negative_score"])) == (1.0, 0.0)


def test_similarities() -> None:
    a, b, c = (tensor.detach() for tensor in representations(3))
    mip = torch.einsum("kd,qd,qd->qk", a, b, c)
    torch.testing.assert_close(MIPSimilarity()(a, [b, c]), mip)
    torch.testing.assert_close(SumSimilarity()(a, [b, c]), b @ a.T + c @ a.T)
    torch.testing.assert_close(MIPSimilarity()(a, [b]), b @ a.T)
    for similarity in (MIPSimilarity(), SumSimilarity()):
        with pytest.raises(ValueError):
            similarity(a, [])
    with pytest.raises(ValueError, match="candidates have D = 5, queries D = 6"):
        MIPSimilarity()(a[:, :5], [b])
