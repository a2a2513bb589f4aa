"""Weighted point sets: kernels, random features, losses and the objective, against what their definitions say."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from symile_dist.encoders.points import Points
from symile_dist.objectives import PairwiseClipLoss, SymileLoss, WPSELoss, WPSEObjective, wpse
from symile_dist.objectives.kernels import draw_waves, make_kernel, simplex
from symile_dist.objectives.reference import pairwise_clip_loss_reference
from symile_dist.objectives.wpse import as_point_set, point_set_similarity, unit_points
from symile_dist.registry import OBJECTIVES, build
from symile_dist.similarity import MIPSimilarity, SumSimilarity
from symile_dist.types import Batch, Outputs, PointSet

KERNELS = ["gaussian", "imq"]
DIMENSION = 6


def random_sets(number: int, n: int = 5, points: int = 4, dimension: int = DIMENSION, seed: int = 0) -> list[PointSet]:
    """Sets of unequal size in float64, from the first to the last modality one point more; padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for m in range(number):
        length = points + m
        vectors = torch.randn(n, length, dimension, generator=generator, dtype=torch.float64)
        weights = torch.randn(n, length, generator=generator, dtype=torch.float64)
        sizes = torch.randint(1, length + 1, (n,), generator=generator)
        there = torch.arange(length) < sizes[:, None]
        found.append(PointSet(vectors * there[:, :, None], weights * there, sizes))
    return found


def unit_vectors(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1)


# -- kernels and random features ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dimension", [4, 64])
def test_random_features_approximate_the_kernel(name: str, dimension: int) -> None:
    # Pairs at all distances: from a vector towards another one.
    x, y = unit_vectors(2, 64, dimension)
    y = torch.nn.functional.normalize(torch.lerp(x, y, torch.linspace(0, 1, 64, dtype=torch.float64)[:, None]), dim=1)
    kernel = make_kernel(name, 0.5)
    exact = kernel(torch.cdist(x, y).square())
    assert exact.max() > 0.99 and exact.min() < 0.4
    errors, average = [], torch.zeros_like(exact)
    for draw in range(40):
        waves = draw_waves(kernel, 1024, dimension, 2, draw)
        approximate = waves(x.float(), 0).double() @ waves(y.float(), 1).double().T
        errors.append(float((approximate - exact).abs().mean()))
        average += approximate / 40
    assert sum(errors) / 40 <= 0.035
    assert (average - exact).abs().mean() <= 0.01, "the features are biased"


def mean_of_pairs(vectors: list[Tensor]) -> Tensor:
    """Of the squared distance between two of M tensors (..., D)."""
    return torch.stack([(u - v).square().sum(dim=-1) for u, v in combinations(vectors, 2)]).mean(dim=0)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("number", [3, 4, 5])
def test_random_features_of_several_vectors(name: str, number: int) -> None:
    # From the same vector in all modalities to independent ones; they need not be of unit length.
    vectors = list(unit_vectors(number, 32, DIMENSION))
    away = torch.linspace(0, 1, 32, dtype=torch.float64)[:, None]
    vectors[1:] = [torch.lerp(vectors[0], vector, away) for vector in vectors[1:]]
    kernel = make_kernel(name, 0.5, number)
    exact = kernel(mean_of_pairs(vectors))
    assert exact[0] == 1.0 and exact.min() < 0.5
    average, shared = torch.zeros(32), torch.zeros(32)
    for draw in range(120):
        waves = draw_waves(kernel, 1024, DIMENSION, number, draw)
        features = [waves(vector.float(), m) for m, vector in enumerate(vectors)]
        average += torch.stack(features).prod(dim=0).sum(dim=1) / 120
        one_wave = [waves(vector.float(), 0) for vector in vectors]
        shared += torch.stack(one_wave).prod(dim=0).sum(dim=1) / 120
    assert (average - exact).abs().max() <= 0.035
    if number == 3:
        assert shared.abs().max() <= 0.035, "with one phase the mean of a product of three is zero"


@pytest.mark.parametrize("number", [2, 3, 7])
def test_simplex(number: int) -> None:
    corners = simplex(number)
    assert corners.shape == (number, number - 1)
    expected = 2 / (number - 1) * (np.eye(number) - 1 / number)
    np.testing.assert_allclose(corners @ corners.T, expected, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_two_modalities_have_the_same_features(name: str) -> None:
    waves = draw_waves(make_kernel(name, 0.5), 16, 3, 2, "key")
    vectors = unit_vectors(8, 3).float()
    assert torch.equal(waves(vectors, 0), waves(vectors, 1))
    assert waves.amplitude == pytest.approx((2 / 16) ** 0.5)


def test_features_depend_on_their_key_alone_and_disturb_no_other_random_numbers() -> None:
    kernel = make_kernel("imq", 0.5)
    first = draw_waves(kernel, 32, 3, 2, 7, 1)
    draw_waves.cache_clear()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    again, other = draw_waves(kernel, 32, 3, 2, 7, 1), draw_waves(kernel, 32, 3, 2, 7, 2)
    assert torch.equal(first.frequencies, again.frequencies) and torch.equal(first.phases, again.phases)
    assert not torch.equal(first.frequencies, other.frequencies) and not torch.equal(first.phases, other.phases)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]


# -- similarity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("number", [2, 3])
def test_similarity_is_the_sum_over_all_tuples_of_points(name: str, number: int) -> None:
    sets, alphas = random_sets(number, n=2, points=3), (0.7, 0.2)
    kernel = make_kernel(name, 0.5, number)
    found = point_set_similarity(sets, kernel, alphas)
    assert found.shape == (2,) * number
    for rows in product(range(2), repeat=number):
        total = 0.0
        for points in product(*(range(int(s.sizes[row])) for s, row in zip(sets, rows, strict=True))):
            chosen = [
                torch.nn.functional.normalize(s.vectors[row, j], dim=0)
                for s, row, j in zip(sets, rows, points, strict=True)
            ]
            weight = float(
                torch.stack([s.weights[row, j] / s.sizes[row] for s, row, j in zip(sets, rows, points, strict=True)])
                .prod()
                .item()
            )
            linear = torch.stack(chosen).prod(dim=0).sum() * DIMENSION ** (number / 2 - 1)
            square = mean_of_pairs(chosen)
            of_kernel = (
                torch.exp(-square / (2 * 0.25 * number / 2))
                if name == "gaussian"
                else (0.25 * number / 2 / (0.25 * number / 2 + square)).sqrt()
            )
            total += weight * float(alphas[0] * linear + alphas[1] * of_kernel)
        assert float(found[rows]) == pytest.approx(total, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("form", ["pairwise", "symile"])
@pytest.mark.parametrize("alphas", [(0.667, 0.333), (0.0, 1.0), (1.0, 0.0)])
def test_products_of_z_are_the_similarity(name: str, form: str, alphas: tuple[float, float]) -> None:
    number = 3 if form == "symile" else 2
    sets = random_sets(number)
    loss = WPSELoss(form=form, kernel=name, bandwidth=2.0, alphas=alphas, features=4096)
    width = DIMENSION * (alphas[0] > 0) + 4096 * (alphas[1] > 0)
    average: Any = 0.0
    for draw in range(12):
        vectors = loss.embed(sets, draw)
        assert all(vector.shape == (5, width) for vector in vectors)
        letters = "abc"[:number]
        equation = ",".join(f"{letter}z" for letter in letters) + "->" + letters
        average = average + torch.einsum(equation, *vectors) / 12
    exact = loss.similarity(sets)
    assert (average - exact).abs().max() <= (1e-12 if alphas[1] == 0 else 0.02)
    assert exact.abs().max() > 0.1


def test_order_of_points_and_padding_do_not_matter() -> None:
    (points,) = random_sets(1)
    loss = WPSELoss(features=32)
    (want, _) = loss.embed([points, points], 0)
    order = torch.randperm(points.weights.shape[1], generator=torch.Generator().manual_seed(1))
    shuffled = PointSet(points.vectors[:, order], points.weights[:, order], points.sizes)
    further = PointSet(
        torch.nn.functional.pad(points.vectors, (0, 0, 0, 3)),
        torch.nn.functional.pad(points.weights, (0, 3)),
        points.sizes,
    )
    for other in (shuffled, further):
        assert (loss.embed([other, other], 0)[0] - want).abs().max() < 1e-12


def test_unit_points_have_length_one_unless_they_are_tiny() -> None:
    vectors = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [3e-8, 4e-8]]])
    units, weights = unit_points(PointSet(vectors, torch.tensor([[2.0, 1.0, 3.0]]), torch.tensor([2])))
    assert units[0].tolist() == [pytest.approx([0.6, 0.8]), [0, 0], pytest.approx([0.03, 0.04])]
    assert weights.tolist() == [[1.0, 0.5, 1.5]]


# -- the loss ----------------------------------------------------------------------------------------------------------


def one_point(vectors: Tensor) -> PointSet:
    return PointSet(vectors[:, None], torch.ones(len(vectors), 1, dtype=vectors.dtype), torch.ones(len(vectors)).long())


def test_one_point_of_weight_one_and_the_linear_kernel_make_clip() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(32, 16, generator=generator) for _ in range(2))
    found = WPSELoss(alphas=(1, 0))([one_point(image), one_point(text)], 14.2857, step=3)
    normalized = [torch.nn.functional.normalize(tensor, dim=1) for tensor in (image, text)]
    want = pairwise_clip_loss_reference(normalized, torch.tensor(14.2857))
    assert found.item() == pytest.approx(want.item(), abs=1e-6)
    assert WPSELoss(alphas=(1, 0))([image, text], 14.2857, step=3).item() == found.item(), "a vector is a set of one"
    # For more modalities: the mean over pairs, where the CLIP baseline of Symile has the sum.
    three = [image, text, image + text]
    clip = PairwiseClipLoss(normalize=True)(three, 10.0)
    assert WPSELoss(alphas=(1, 0))(three, 10.0, step=0).item() == pytest.approx(clip.item() / 3, rel=1e-6)


def test_two_modalities_are_the_same_in_both_forms() -> None:
    sets = random_sets(2)
    pairwise = WPSELoss(features=64)
    symile = WPSELoss(features=64, form="symile", negative_sampling="n_squared")
    for mine, other in zip(pairwise.embed(sets, 2), symile.embed(sets, 2), strict=True):
        assert (mine - other).abs().max() < 1e-12
    assert pairwise(sets, 9.0, step=2).item() == pytest.approx(symile(sets, 9.0, step=2).item(), rel=1e-12)


def test_symile_form_is_the_symile_loss_of_z() -> None:
    sets = random_sets(3, n=8)
    loss = WPSELoss(features=64, form="symile", seed=5)
    want = SymileLoss("n", seed=5)(loss.embed(sets, 4), 9.0, step=4)
    assert loss(sets, 9.0, step=4).item() == pytest.approx(want.item(), rel=1e-12)


def gradients_of(loss: WPSELoss, sets: list[PointSet], **arguments: Any) -> list[Tensor]:
    leaves = [points._replace(vectors=points.vectors.clone(), weights=points.weights.clone()) for points in sets]
    tensors = [tensor.requires_grad_() for points in leaves for tensor in points[:2]]
    value = loss(leaves, 9.0, step=1, **arguments)
    return [value.detach(), *torch.autograd.grad(value, tensors)]


@pytest.mark.parametrize("form", ["pairwise", "symile"])
def test_blocks_of_samples_change_nothing(form: str) -> None:
    loss, sets = WPSELoss(features=64, form=form), random_sets(3, n=7)
    whole = gradients_of(loss, sets)
    with patch.dict(wpse.COSINES, cpu=3 * 5 * 64):
        for found, want in zip(gradients_of(loss, sets), whole, strict=True):
            assert (found - want).abs().max() < 1e-12


@pytest.mark.parametrize("form", ["pairwise", "symile"])
def test_invalid_rows_reach_neither_loss_nor_gradients(form: str) -> None:
    loss = WPSELoss(features=32, form=form, negative_sampling=None if form == "pairwise" else "n_squared")
    sets, valid = random_sets(3, n=6), torch.tensor([True, False, True, True, False, True])
    want = gradients_of(loss, [PointSet(*(tensor[valid] for tensor in points)) for points in sets])
    for points in sets:
        points.vectors[1], points.weights[4] = torch.nan, torch.inf
    found = gradients_of(loss, sets, valid=valid)
    assert found[0].item() == pytest.approx(want[0].item(), rel=1e-12)
    for gradient, of_valid in zip(found[1:], want[1:], strict=True):
        assert (gradient[valid] - of_valid).abs().max() < 1e-12 and not gradient[~valid].any()


def test_a_lacking_modality_is_no_positive_but_stays_a_negative() -> None:
    sets = random_sets(2, n=4)
    present = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    loss = WPSELoss(features=32)
    x, y = loss.embed(sets, 0)
    logits, rows = 5.0 * x @ y.T, torch.tensor([0, 2, 3])
    cross_entropy = torch.nn.functional.cross_entropy
    want = (cross_entropy(logits[rows], rows) + cross_entropy(logits.T[rows], rows)) / 2
    assert loss(sets, 5.0, step=0, present=present).item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_xor_is_learned_from_the_kernel_block_alone(kernel: str) -> None:
    torch.manual_seed(0)
    vectors = [torch.nn.Linear(1, 4 * 8) for _ in range(3)]
    weights = [torch.nn.Linear(1, 4) for _ in range(3)]
    log_scale = torch.nn.Parameter(torch.tensor(2.0))
    parameters = [log_scale, *(p for layer in [*vectors, *weights] for p in layer.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    loss = WPSELoss(form="symile", kernel=kernel, alphas=(0, 1), features=128)

    def encode(m: int, bits: Tensor) -> PointSet:
        return PointSet(vectors[m](bits).unflatten(1, (4, 8)), weights[m](bits), torch.full((len(bits),), 4))

    for step in range(80):
        a, b = torch.randint(0, 2, (2, 64, 1))
        value = loss([encode(m, bits.float()) for m, bits in enumerate((a, b, a ^ b))], log_scale.exp(), step=step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    with torch.no_grad():
        scores = loss.similarity([encode(m, torch.tensor([[0.0], [1.0]])) for m in range(3)])  # (a, b, c)
    for first, third in product((0, 1), repeat=2):
        right = first ^ third
        assert scores[first, right, third] > scores[first, 1 - right, third] + 0.05, f"a = {first}, c = {third}"


def test_landmarks_learn_several_bits_from_the_kernel_block_alone() -> None:
    """Points that learn their places gather, and stop at one bit or two."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"encoder": {"name": "mlp", "input_dim": 3}, "width": 32, "landmarks": True}
    encoders = [Points(16, **options) for _ in range(3)]
    log_scale = torch.nn.Parameter(torch.tensor(2.66))
    optimizer = torch.optim.Adam([log_scale, *(p for e in encoders for p in e.parameters())], lr=0.01)
    loss = WPSELoss(form="symile", alphas=(0, 1), bandwidth=0.3, features=512)
    for step in range(80):
        a, b = torch.randint(0, 2, (2, 128, 3))
        sets = [encode(bits.float()) for encode, bits in zip(encoders, (a, b, a ^ b), strict=True)]
        value = loss(sets, log_scale.exp(), step=step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    every = torch.tensor(list(product((0, 1), repeat=3)))
    with torch.no_grad():
        of_a, of_b, of_c = (loss.embed([encode(every.float())] * 3, None)[m] for m, encode in enumerate(encoders))
    for first, second in product(range(8), repeat=2):
        asked = of_a[first] * of_c[first ^ second]
        assert int((of_b @ asked).argmax()) == second, f"a = {first}, b = {second}"


def test_pointwise_mutual_information_is_recovered_beyond_the_dimension() -> None:
    """In the limit of large batches, where the symmetric InfoNCE is a function of the joint distribution."""
    size, dimension, points = 12, 3, 8
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(size, size, generator=generator).exp()
    for _ in range(100):
        joint = joint / joint.sum(dim=1, keepdim=True) / size
        joint = joint / joint.sum(dim=0, keepdim=True) / size
    information = (joint * size**2).log()

    def centred(matrix: Tensor) -> Tensor:
        return matrix - matrix.mean(dim=0) - matrix.mean(dim=1, keepdim=True) + matrix.mean()

    assert int((torch.linalg.svdvals(centred(information)) > 0.05).sum()) > dimension + 1

    def recovered(alphas: tuple[float, float], number: int) -> float:
        torch.manual_seed(1)
        vectors = [torch.randn(size, number, dimension, requires_grad=True) for _ in range(2)]
        weights = [torch.randn(size, number, requires_grad=number > 1) for _ in range(2)]
        if number == 1:
            weights = [torch.ones(size, 1) for _ in range(2)]
        log_scale = torch.tensor(2.5, requires_grad=True)
        learned = [*vectors, log_scale, *(w for w in weights if w.requires_grad)]
        optimizer = torch.optim.Adam(learned, lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
        sizes, kernel = torch.full((size,), number), make_kernel("gaussian", 0.5)
        for _ in range(250):
            sets = [PointSet(v, w, sizes) for v, w in zip(vectors, weights, strict=True)]
            logits = log_scale.exp() * point_set_similarity(sets, kernel, alphas)
            normalizers = (logits.logsumexp(dim=1, keepdim=True) + logits.logsumexp(dim=0, keepdim=True)) / 2
            value = -(joint * (logits - normalizers)).sum()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
        both = torch.stack([centred(logits.detach()).flatten(), centred(information).flatten()])
        return float(torch.corrcoef(both)[0, 1])

    point_sets, linear = recovered((0.667, 0.333), points), recovered((1.0, 0.0), 1)
    assert point_sets >= 0.95 and linear < point_sets - 0.2


def test_wrong_arguments_are_told() -> None:
    good, (bad, *_) = random_sets(2), random_sets(1, n=4)
    loss = WPSELoss(features=8)
    for sets, arguments, words in [
        (good[:1], {"step": 0}, "two or more modalities, got 1"),
        (good, {}, "pass step=, or fixed_features=True"),
        ([good[0], bad], {"step": 0}, r"same number of samples and the same D; got \(n, D\) of \[\(4, 6\), \(5, 6\)\]"),
        (
            [good[0], good[1]._replace(weights=good[0].weights)],
            {"step": 0},
            r"representation 1 has vectors \(5, 5, 6\)",
        ),
        ([good[0], good[1]._replace(sizes=torch.ones(5))], {"step": 0}, "torch.float32 sizes"),
        ([good[0], good[1].vectors], {"step": 0}, r"representation 1 is torch.float64 of shape \(5, 5, 6\)"),
        ([good[0], None], {"step": 0}, "representation 1 is a NoneType"),
        (good, {"step": 0, "valid": torch.ones(5)}, r"valid should be a bool tensor of shape \(5,\)"),
        (good, {"step": 0, "present": torch.ones(5).bool()}, r"present should be a bool tensor of shape \(5, 2\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            loss(sets, 1.0, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "symille"}, "unknown form 'symille'; did you mean 'symile'"),
        ({"kernel": "gauss"}, "unknown kernel 'gauss'; did you mean 'gaussian'"),
        ({"bandwidth": 0}, "bandwidth = 0 should be positive"),
        ({"alphas": (0, 0)}, "not both 0"),
        ({"alphas": (1, -1)}, "two numbers of 0 or more"),
        ({"epsilon": 0}, "epsilon = 0 should be positive"),
        ({"features": 0}, "features = 0 should be an integer of 1 or more"),
        ({"features": True}, "features = True should be an integer of 1 or more"),
        ({"negative_sampling": "n"}, "go with form='symile'"),
        ({"form": "symile", "negative_sampling": "m"}, "unknown negative_sampling 'm'"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WPSELoss(**options)
    with pytest.raises(ValueError, match=words):
        WPSEObjective(seed=0, **options)


# -- as the trainer calls it -------------------------------------------------------------------------------------------


def outputs_of(sets: list[PointSet]) -> Outputs:
    return Outputs(dict(zip("abc", sets, strict=False)), torch.tensor(7.0))


def batch_of(n: int, number: int, lacking: bool = False) -> Batch:
    present = torch.ones(n, number, dtype=torch.bool)
    present[0, 0] = not lacking
    valid = torch.arange(n) != n - 1
    return Batch({}, present, valid, torch.arange(n))


@pytest.mark.parametrize("form", ["pairwise", "symile"])
def test_objective_draws_new_features_in_training_and_keeps_them_in_evaluation(form: str) -> None:
    objective = build("wpse", {"form": form, "features": 32}, OBJECTIVES, "objective", seed=3)
    sets = random_sets(3)
    outputs, batch = outputs_of(sets), batch_of(5, 3)
    training = [objective(outputs, batch, step).loss.item() for step in (0, 1, 0)]
    assert training[0] == training[2] != training[1]
    assert training[0] == pytest.approx(objective.loss(sets, 7.0, step=0, valid=batch.valid).item(), rel=1e-12)
    objective.eval()
    first, second = (objective.embeddings(outputs.representations) for _ in range(2))
    assert list(first) == ["a", "b", "c"] and all(torch.equal(first[name], second[name]) for name in first)
    assert first["a"].shape == (5, DIMENSION + 32)
    fixed = objective.loss(sets, 7.0, step=1, valid=batch.valid, fixed_features=True)
    assert objective(outputs, batch, 1).loss.item() == pytest.approx(fixed.item(), rel=1e-12)
    if form == "pairwise":  # in the other one negatives are drawn for the step
        assert objective(outputs, batch, 2).loss.item() == pytest.approx(fixed.item(), rel=1e-12)
    assert not torch.equal(first["a"], objective.loss.embed(sets, 0)[0])
    kind = MIPSimilarity if form == "symile" else SumSimilarity
    assert isinstance(objective.similarity, kind) and objective.bounds_total_correlation
    assert not list(objective.parameters())


@pytest.mark.parametrize("form", ["pairwise", "symile"])
def test_objective_leaves_out_lacking_modalities_as_positives_where_it_is_told_to(form: str) -> None:
    sets, batch = random_sets(3), batch_of(5, 3, lacking=True)
    keep, leave_out = (WPSEObjective(0, form=form, features=32, missing=how) for how in ("placeholder", "exclude"))
    kept, left = (objective(outputs_of(sets), batch, 0).loss.item() for objective in (keep, leave_out))
    assert kept == pytest.approx(keep.loss(sets, 7.0, step=0, valid=batch.valid).item(), rel=1e-12)
    want = keep.loss(sets, 7.0, step=0, valid=batch.valid, present=batch.present).item()
    assert left == pytest.approx(want, rel=1e-12) and left != pytest.approx(kept, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_objective_computes_in_float32(dtype: torch.dtype) -> None:
    sets = [PointSet(s.vectors.to(dtype), s.weights.to(dtype).requires_grad_(), s.sizes) for s in random_sets(2, n=8)]
    report = WPSEObjective(0, features=64)(outputs_of(sets), batch_of(8, 2), 0)
    exact = [PointSet(s.vectors.double(), s.weights.detach().double(), s.sizes) for s in sets]
    want = WPSELoss(features=64)(exact, 7.0, step=0, valid=batch_of(8, 2).valid)
    assert report.loss.dtype == torch.float32 and report.loss.item() == pytest.approx(want.item(), rel=1e-5)
    for gradient in torch.autograd.grad(report.loss, [s.weights for s in sets]):
        assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.any()
    assert set(report.metrics) == {"positive_score", "negative_score", "largest_point_weight"}
    assert not any(metric.requires_grad for metric in report.metrics.values())
    largest = max(float(s.weights[:7].detach().abs().max()) for s in sets)
    assert report.metrics["largest_point_weight"].item() == pytest.approx(largest)


def test_objective_refuses_what_cannot_be_computed() -> None:
    with pytest.raises(ValueError, match="missing = 'drop' should be"):
        WPSEObjective(0, missing="drop")
    with pytest.raises(ValueError, match="objective 'wpse': negative_sampling='n_squared' at a global batch of 65536"):
        WPSEObjective(0, list("abcd"), 65536, form="symile", negative_sampling="n_squared")


def test_a_vector_is_a_point_set_of_one() -> None:
    vectors = torch.randn(3, 4, dtype=torch.float64)
    points = as_point_set(vectors)
    assert torch.equal(points.vectors[:, 0], vectors) and points.weights.tolist() == [[1.0]] * 3
    assert points.sizes.tolist() == [1, 1, 1] and as_point_set(points) is points
