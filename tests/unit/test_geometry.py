"""GRAM and TRIANGLE in one process: equal to the readable references and to loops over numbers; their similarities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from symile_dist import similarity
from symile_dist.objectives import (
    GramLoss,
    GramObjective,
    PairwiseSigmoidLoss,
    TriangleLoss,
    TriangleObjective,
    geometry,
    sigmoid,
)
from symile_dist.objectives.reference import gram_loss_reference, triangle_loss_reference
from symile_dist.registry import OBJECTIVES, build
from symile_dist.similarity import AreaSimilarity, VolumeSimilarity, unit_rows
from symile_dist.types import Batch, Outputs

VALID = {
    "all": None,
    "some": [True, False, True, True, True, False, True, True],
    "first only": [True] + [False] * 7,
    "none": [False] * 8,
}
TILES = [(8, 0.0), (8, 0.1), (3, 0.1), (1, 0.0)]
"""Rows at once, and label_smoothing."""
Loss = Callable[..., Tensor]
FAST: dict[str, Any] = {"gram": GramLoss, "triangle": TriangleLoss}
REFERENCE: dict[str, Loss] = {"gram": gram_loss_reference, "triangle": triangle_loss_reference}
CASES = [("gram", 2), ("gram", 3), ("gram", 4), ("gram", 5), ("triangle", 3)]


def representations(number: int, batch: int = 8, dimension: int = 6) -> list[Tensor]:
    """Not of unit length, and alike enough for all terms of the loss to matter."""
    generator = torch.Generator().manual_seed(number)
    common = torch.randn(batch, dimension, generator=generator, dtype=torch.float64)
    own = torch.randn(number, batch, dimension, generator=generator, dtype=torch.float64)
    return [(common + tensor).requires_grad_() for tensor in own]


def scale() -> Tensor:
    return torch.tensor(2.0, dtype=torch.float64, requires_grad=True)


def mask(name: str) -> Tensor | None:
    pattern = VALID[name]
    return None if pattern is None else torch.tensor(pattern)


def loss_and_gradients(function: Loss, tensors: list[Tensor], valid: Tensor | None) -> list[Tensor]:
    log_scale = scale()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(leaves, log_scale.exp(), valid=valid)
    return [value.detach(), *torch.autograd.grad(value, [log_scale, *leaves])]


def check(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-12) -> None:
    for what, g, w in zip(["loss", "logit_scale", *"abcde"], got, want, strict=False):
        assert g.shape == w.shape
        difference = (g - w).abs().max().item()
        assert difference <= tolerance * max(1.0, w.abs().max().item()), f"{what} is off by {difference:.2e}"


# -- fast = reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "smoothing"), TILES)
@pytest.mark.parametrize("valid", ["all", "some", "first only"])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_fast_equals_reference_in_loss_and_gradients(
    name: str, number: int, valid: str, smoothing: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(geometry.LOGITS, "cpu", rows * 8)
    tensors = representations(number)
    for anchor in range(number):
        options = {"anchor": anchor, "label_smoothing": smoothing}
        want = loss_and_gradients(lambda *a, o=options, **k: REFERENCE[name](*a, **k, **o), tensors, mask(valid))
        check(loss_and_gradients(FAST[name](**options), tensors, mask(valid)), want)


def gram_schmidt_volume(vectors: list[list[float]]) -> float:
    """The product of what is left of each vector without its projections on those before."""
    volume, basis = 1.0, []
    for vector in vectors:
        rest = vector
        for direction in basis:
            product = sum(x * y for x, y in zip(rest, direction, strict=True))
            rest = [x - product * y for x, y in zip(rest, direction, strict=True)]
        length = math.sqrt(sum(x * x for x in rest))
        volume *= length
        basis.append([x / length for x in rest])
    return volume


def herons_area(corners: list[list[float]]) -> float:
    """Twice the squared area of the triangle, by Heron's formula."""
    x, y, z = (math.dist(corners[k], corners[q]) for k, q in [(0, 1), (0, 2), (1, 2)])
    half = (x + y + z) / 2
    return 2 * half * (half - x) * (half - y) * (half - z)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_references_and_losses_equal_a_loop_over_numbers(name: str, number: int, smoothing: float) -> None:
    tensors, anchor, rows = representations(number), number - 1, VALID["some"]
    assert rows is not None
    values = [
        [[x / math.hypot(*row) for x in row] for flag, row in zip(rows, tensor.tolist(), strict=True) if flag]
        for tensor in tensors
    ]
    size, distance = sum(rows), gram_schmidt_volume if name == "gram" else herons_area
    others = [m for m in range(number) if m != anchor]
    logits = [
        [-1.7 * distance([values[anchor][i], *(values[m][j] for m in others)]) for j in range(size)]
        for i in range(size)
    ]
    total = 0.0
    for lines in (logits, list(zip(*logits, strict=True))):
        for i, line in enumerate(lines):
            normaliser = math.log(sum(map(math.exp, line)))
            for j, logit in enumerate(line):
                total += ((1 - smoothing) * (i == j) + smoothing / size) * (normaliser - logit) / size / 2
    options = {"anchor": anchor, "label_smoothing": smoothing}
    arguments = (tensors, torch.tensor(1.7, dtype=torch.float64), mask("some"))
    assert REFERENCE[name](*arguments, **options).item() == pytest.approx(total, rel=1e-11)
    assert FAST[name](**options)(*arguments[:2], valid=arguments[2]).item() == pytest.approx(total, rel=1e-11)


@pytest.mark.parametrize(("name", "number"), [("gram", 2), ("gram", 3), ("triangle", 3)])
def test_gradients_agree_with_finite_differences(name: str, number: int) -> None:
    valid = torch.tensor([True, True, False, True])

    def loss(log_scale: Tensor, *parts: Tensor) -> Tensor:
        return FAST[name](label_smoothing=0.1)(list(parts), log_scale.exp(), valid=valid)

    assert torch.autograd.gradcheck(loss, (scale(), *representations(number, batch=4, dimension=4)))


def test_losses_of_wrong_answers_keep_their_digits() -> None:
    # Each anchor equals the other one's tuple: log(1 + exp(x)), x the difference of the two logits, is all but x.
    anchors = torch.eye(2, dtype=torch.float64)
    loss = GramLoss()([anchors, anchors.flip(0)], 21.0).item()
    assert loss - 21.0 * (1 - 1e-6) == pytest.approx(math.log1p(math.exp(-21.0 * (1 - 1e-6))), rel=1e-4)


# -- degenerate vectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [3, 4, 6])
def test_linearly_dependent_queries_have_the_smallest_volume_and_no_gradient(number: int, dtype: torch.dtype) -> None:
    volume = VolumeSimilarity()
    anchor, *queries = torch.randn(number, 8, 7, generator=torch.Generator().manual_seed(number), dtype=dtype)
    for last in (queries[0], queries[-1], queries[0] - 2 * queries[-1]):
        vectors = [unit_rows(vector).requires_grad_() for vector in (anchor, *queries, last)]
        for found in (volume.between(vectors[0], volume.of_tuples(vectors[1:])), volume.of_rows(vectors)):
            torch.testing.assert_close(found, torch.full_like(found, 1e-6), rtol=1e-6, atol=0)
            for gradient in torch.autograd.grad(found.sum(), vectors):
                assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_equal_modalities_have_finite_loss_and_gradients(name: str, number: int, dtype: torch.dtype) -> None:
    shared = representations(2)[0].detach().to(dtype)
    collapsed = shared[:1].expand(8, -1)
    for tensor in (shared, collapsed):
        loss, *gradients = loss_and_gradients(FAST[name](), [tensor] * number, None)
        assert all(torch.isfinite(gradient).all() and gradient.abs().max() < 10 for gradient in gradients)
        if number == 2 and tensor is shared:
            assert loss < math.log(8) - 0.1
        else:  # two vectors of a tuple are equal: with whichever anchor, there is no volume and no area
            assert loss.item() == pytest.approx(math.log(8), abs=1e-2 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_rows_of_zeros_have_finite_losses_and_no_gradient(name: str, number: int) -> None:
    tensors = [tensor.detach().clone() for tensor in representations(number)]
    for tensor in tensors:
        tensor[3] = 0.0
    tensors[0][5] = 0.0
    for value in (found := loss_and_gradients(FAST[name](), tensors, None)):
        assert torch.isfinite(value).all()
    for gradient in found[2:]:
        assert not gradient[3].any() and gradient[4].any()
    assert not found[2][5].any() and found[3][5].any()


def test_positives_keep_their_digits_in_float32() -> None:
    # Volumes of 1e-3: float32 has the determinant, 1e-6, to two digits only, where it is a difference of ones.
    generator = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, 64, 32, generator=generator, dtype=torch.float64)
    tensors = [first.float(), (first + 1e-3 * noise).float()]
    want = loss_and_gradients(gram_loss_reference, [tensor.double() for tensor in tensors], None)
    got = loss_and_gradients(GramLoss(), tensors, None)
    assert got[0].dtype == torch.float32
    check([value.double() for value in got], want, tolerance=1e-6)


def narrow_cone(number: int, spread: float) -> list[Tensor]:
    """float32 (24, 32) whose mean cosine is about 1 - spread^2; those of one number are twice as near to each other."""
    generator = torch.Generator().manual_seed(number)
    axis, *noise = (
        F.normalize(torch.randn(24, 32, generator=generator, dtype=torch.float64), dim=1) for _ in range(number + 2)
    )
    samples = axis[0] + spread * noise[0]
    return [F.normalize(samples + spread / 2 * own, dim=1).float() for own in noise[1:]]


CONES = [("gram", 2, 0.01), ("gram", 3, 0.01), ("gram", 4, 0.1), ("gram", 5, 0.1), ("triangle", 3, 0.01)]
"""Of more vectors the volumes come to the smallest there is in a wider cone."""


@pytest.mark.parametrize(("name", "number", "spread"), CONES)
def test_scores_and_gradients_in_a_narrow_cone_keep_their_digits_in_float32(
    name: str, number: int, spread: float
) -> None:
    tensors = narrow_cone(number, spread)
    wide = [tensor.double() for tensor in tensors]
    scores, exact = (FAST[name].similarity(candidates, queries) for candidates, *queries in (tensors, wide))
    assert (exact.argmax(dim=1) == torch.arange(24)).all()
    error = ((scores - exact).norm() / exact.norm()).item()
    assert error < 1e-5, f"scores are off by {error:.1e}"
    gradients = []
    for loss, given in ((REFERENCE[name], wide), (FAST[name](), tensors)):
        leaves = [tensor.requires_grad_() for tensor in given]
        value = loss(leaves, -1 / exact.mean())
        gradients.append(torch.cat([gradient.double() for gradient in torch.autograd.grad(value, leaves)]))
    want, got = gradients
    error = ((got - want).norm() / want.norm()).item()
    assert error < 2e-5, f"gradients are off by {error:.1e}"


# -- invalid rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_what_stands_in_invalid_rows_does_not_matter(name: str, number: int, smoothing: float) -> None:
    valid = mask("some")
    assert valid is not None
    plain = representations(number)
    loss = FAST[name](label_smoothing=smoothing)
    want = loss_and_gradients(loss, plain, valid)
    for odd in (37.0, math.nan):
        got = loss_and_gradients(loss, [t.detach().masked_fill(~valid[:, None], odd) for t in plain], valid)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)
    for gradient in want[2:]:
        assert not gradient[~valid].any() and gradient[valid].any()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_batch_without_one_valid_row_has_finite_zero_gradients(name: str, number: int) -> None:
    for value in loss_and_gradients(FAST[name](label_smoothing=0.1), representations(number), mask("none")):
        assert not value.any() and torch.isfinite(value).all()


# -- devices and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [GramLoss(), TriangleLoss(), PairwiseSigmoidLoss()])
def test_autocast_does_not_reach_the_losses(loss: Any) -> None:
    found = []
    for enabled in (False, True):
        tensors = [tensor.detach().float().requires_grad_() for tensor in representations(3)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss(tensors, 1.0, *([-1.0] if isinstance(loss, PairwiseSigmoidLoss) else []))
            found.append([value, *torch.autograd.grad(value, tensors)])
    assert all(torch.equal(plain, autocast) for plain, autocast in zip(*found, strict=True))


class Watch(TorchDispatchMode):
    """Notes the largest tensor that is made, and every operation that a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.waits = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = str(func)
        masks = [a for a in args[1] if a is not None and a.dtype == torch.bool] if "index" in name else []
        if masks or any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "equal.default")):
            self.waits.add(name)
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.largest = max(self.largest, tensor.numel())
        return made


def test_the_watch_sees() -> None:
    with Watch() as watch:
        tensor = torch.zeros(10, 7).requires_grad_()
        (tensor[torch.ones(10, dtype=torch.bool)].sum() * float(tensor.detach()[0, 0])).backward()
    assert watch.largest == 70 and len(watch.waits) >= 2


@pytest.mark.parametrize("loss", [GramLoss(label_smoothing=0.1), TriangleLoss(), PairwiseSigmoidLoss(normalize=True)])
def test_no_loss_waits_for_the_device_or_holds_all_logits(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size, dimension = 96, 3
    for module in (geometry, sigmoid):
        monkeypatch.setitem(module.LOGITS, "cpu", 2 * size)
    tensors = [tensor.requires_grad_() for tensor in torch.randn(3, size, dimension).unbind()]
    numbers = [torch.tensor(1.0, requires_grad=True) for _ in range(2 if isinstance(loss, PairwiseSigmoidLoss) else 1)]
    with Watch() as watch:
        loss(tensors, *numbers, valid=torch.arange(size) % 5 > 0).backward()
    assert not watch.waits
    assert 2 * size <= watch.largest <= size * 3 * dimension  # all modalities in one piece, but no N x N
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in [*tensors, *numbers])


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_told() -> None:
    three = [torch.zeros(4, 3)] * 3
    for loss in (GramLoss(), TriangleLoss()):
        with pytest.raises(ValueError, match="two or more modalities, got 1"):
            loss(three[:1], 1.0)
        with pytest.raises(ValueError, match="should be a list of tensors"):
            loss(torch.zeros(3, 4, 3), 1.0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="logit_scale should be one number"):
            loss(three, torch.ones(2))
        with pytest.raises(ValueError, match="valid should be a bool tensor"):
            loss(three, 1.0, valid=torch.ones(4))
    for anchor in (3, -1, True, "a"):
        with pytest.raises(ValueError, match="should be the number of a modality, 0 to 2"):
            GramLoss(anchor=anchor)(three, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="TRIANGLE is for three modalities, got 2"):
        TriangleLoss()(three[:2], 1.0)
    for smoothing in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="label_smoothing"):
            GramLoss(label_smoothing=smoothing)


def test_wrong_options_of_objectives_are_told() -> None:
    names = ["image", "audio", "text"]
    for name in ("gram", "triangle"):
        with pytest.raises(ValueError, match="anchor = 'texts' is none of the modalities; did you mean 'text'"):
            build(name, {"anchor": "texts"}, OBJECTIVES, "objective", modalities=names)
        with pytest.raises(ValueError, match="unknown option 'achor'; did you mean 'anchor'"):
            build(name, {"achor": "text"}, OBJECTIVES, "objective", modalities=names)
    with pytest.raises(ValueError, match="TRIANGLE is for three modalities, got 2"):
        TriangleObjective(["a", "b"])


# -- as the trainer calls them ---------------------------------------------------------------------------------------


def batch_of(valid: Tensor) -> Batch:
    size = len(valid)
    return Batch({}, torch.ones(size, 3, dtype=torch.bool), valid, torch.arange(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAST)
def test_objectives_compute_in_fp32_with_the_anchor_of_the_name(name: str, dtype: torch.dtype) -> None:
    valid = mask("some")
    assert valid is not None
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in representations(3)]
    exact = [tensor.detach().double() for tensor in tensors]
    losses = []
    for anchor, modality in enumerate(["x", "y", "z"]):
        objective = build(name, {"anchor": modality}, OBJECTIVES, "objective", modalities=["x", "y", "z"])
        outputs = Outputs(dict(zip("xyz", tensors, strict=True)), scale().float().exp())
        report = objective(outputs, batch_of(valid), 0)
        assert report.loss.dtype == torch.float32
        want = REFERENCE[name](exact, outputs.logit_scale.double(), valid, anchor=anchor)
        assert report.loss.item() == pytest.approx(want.item(), rel=1e-5)
        for gradient in torch.autograd.grad(report.loss, tensors):
            assert gradient.dtype == dtype and torch.isfinite(gradient).all()
        assert not any(metric.requires_grad for metric in report.metrics.values())
        losses.append(round(report.loss.item(), 6))
    assert len(set(losses)) == 3, "the anchor makes no difference"
    default = build(name, {}, OBJECTIVES, "objective", modalities=["x", "y", "z"])
    assert round(default(outputs, batch_of(valid), 0).loss.item(), 6) == losses[0], "the first is the default"


@pytest.mark.parametrize("objective", [GramObjective(["x", "y", "z"], "y"), TriangleObjective(["x", "y", "z"], "y")])
def test_objectives_train(objective: torch.nn.Module) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 4)
    inputs = [hidden @ torch.randn(4, 8) + 0.1 * torch.randn(64, 8) for _ in range(3)]
    encoders = [torch.nn.Linear(8, 6) for _ in range(3)]
    log_scale = torch.nn.Parameter(torch.tensor(2.66))
    optimizer = torch.optim.Adam([log_scale, *(p for encoder in encoders for p in encoder.parameters())], lr=0.02)
    losses = []
    for step in range(40):
        encoded = {name: encoder(x) for name, encoder, x in zip("xyz", encoders, inputs, strict=True)}
        loss = objective(Outputs(encoded, log_scale.exp()), batch_of(torch.ones(64, dtype=torch.bool)), step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8 * math.log(64) and losses[-1] < 0.5 * losses[0]
    x, y, z = (encoded[name].detach() for name in "xyz")
    found = objective.similarity(y, [x, z]).argmax(dim=1) == torch.arange(64)  # type: ignore[operator]
    assert found.float().mean() > 0.5, "the anchors of their tuples are not found"


# -- similarities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_similarities_are_minus_volumes_and_areas(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, *queries = (tensor.detach() for tensor in representations(4))
    candidates = candidates[:5]
    monkeypatch.setattr(similarity, "SCORES_AT_ONCE", rows * len(candidates))
    unit = [F.normalize(tensor, dim=1).tolist() for tensor in (candidates, *queries)]
    for number in (1, 2, 3):
        score = VolumeSimilarity()(candidates, queries[:number])
        assert score.shape == (8, 5)
        for q in range(8):
            for k in range(5):
                volume = gram_schmidt_volume([unit[0][k], *(unit[m][q] for m in range(1, number + 1))])
                assert score[q, k].item() == pytest.approx(-volume, rel=1e-9)
    areas = AreaSimilarity()(candidates, queries[:2])
    distances = AreaSimilarity()(candidates, queries[:1])
    for q in range(8):
        for k in range(5):
            assert areas[q, k].item() == pytest.approx(-herons_area([unit[m][r] for m, r in ((0, k), (1, q), (2, q))]))
            assert distances[q, k].item() == pytest.approx(-(math.dist(unit[0][k], unit[1][q]) ** 2))
    with pytest.raises(ValueError, match="one or two queries, got 3"):
        AreaSimilarity()(candidates, queries)
    for each in (VolumeSimilarity(), AreaSimilarity()):
        with pytest.raises(ValueError, match="no representations"):
            each(candidates, [])
        with pytest.raises(ValueError, match="candidates have D = 5, queries D = 6"):
            each(candidates[:, :5], queries[:1])
        assert each(candidates.bfloat16(), [queries[0].bfloat16()]).dtype == torch.float32


@pytest.mark.parametrize("similarity", [VolumeSimilarity(), AreaSimilarity()])
def test_what_is_not_a_number_spoils_its_own_scores_only(similarity: Any) -> None:
    candidates, *queries = (tensor.detach() for tensor in representations(3))
    plain = similarity(candidates, queries)
    candidates[2, 0], queries[0][5, 1], queries[1][7, 3] = math.nan, math.nan, math.inf
    spoiled = similarity(candidates, queries)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[[5, 7]] = expected[:, 2] = True
    assert torch.equal(spoiled.isnan(), expected)
    torch.testing.assert_close(spoiled[~expected], plain[~expected], rtol=1e-12, atol=1e-13)


def test_distances_of_rows_are_the_diagonals() -> None:
    for each, numbers in ((VolumeSimilarity(), (2, 3, 4)), (AreaSimilarity(), (2, 3))):
        for number in numbers:
            vectors = [unit_rows(tensor.detach()) for tensor in representations(number)]
            pairs = each.between(vectors[0], each.of_tuples(vectors[1:]))
            torch.testing.assert_close(each.of_rows(vectors), pairs.diagonal(), rtol=1e-12, atol=1e-13)


# -- unit vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_any_length_become_unit_vectors(dtype: torch.dtype) -> None:
    drawn = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.tensor([1e-3, 1.0, 1e14, 1e17, 1e30, 1e37], dtype=torch.float64)
    weights = torch.arange(30.0, dtype=torch.float64).reshape(6, 5).sin()
    rows = (drawn * lengths[:, None]).to(dtype).requires_grad_()
    exact = rows.detach().double().requires_grad_()
    got, want = unit_rows(rows), F.normalize(exact, dim=1)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    (gradient,) = torch.autograd.grad((got * weights).sum(), rows)
    (slope,) = torch.autograd.grad((want * weights).sum(), exact)
    difference = (gradient.double() - slope) * exact.detach().norm(dim=1, keepdim=True)
    assert difference.abs().max() < (1e-2 if dtype == torch.bfloat16 else 10 * tolerance)


def test_unit_rows_of_zeros_and_of_what_is_not_a_number() -> None:
    rows = torch.ones(4, 3)
    rows[0], rows[1, 2], rows[2, 0] = 0.0, math.inf, math.nan
    rows.requires_grad_()
    units = unit_rows(rows)
    assert units.isnan().any(dim=1).tolist() == [False, True, True, False]
    (gradient,) = torch.autograd.grad(units[0].sum() + units[3, 0], rows)
    assert not units[0].any() and not gradient[0].any() and gradient[3].any()
