"""Symile's loss in one process: every strategy against the readable reference, the published package and the limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import symile
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from symile_dist.config import parse_config
from symile_dist.model import make_objective
from symile_dist.objectives import PairwiseClipLoss, SymileLoss, cube, permuted
from symile_dist.objectives.cube import Cube, draw_sheets, sample_without_replacement
from symile_dist.objectives.exponentials import is_bounded, largest_logit
from symile_dist.objectives.reference import symile_loss_reference

SEED, STEP = 3, 5
STRATEGIES: dict[str, dict[str, Any]] = {
    "n": {"negative_sampling": "n"},
    "n_squared": {"negative_sampling": "n_squared"},
    "sheets": {"negative_sampling": "sheets", "sheets": 4},
}
MASKS = {"all": None, "some": [True, False, True, True, False, True, True], "one": [True] + [False] * 6}


def draw(number: int, batch: int = 7, dimension: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * number + batch)
    drawn = torch.randn(number, batch, dimension, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def aligned(batch: int, dimension: int, dtype: torch.dtype, noise: float = 0.1) -> list[Tensor]:
    """What a trained model emits: unit vectors whose triples have a MIP far above all others'."""
    generator = torch.Generator().manual_seed(batch)
    common = torch.randn(batch, dimension, generator=generator, dtype=torch.float64)
    signs = torch.randn(batch, dimension, generator=generator, dtype=torch.float64).sign()
    tensors = [common, common.abs() * signs, common.sign() * signs * common.abs()]
    return [
        F.normalize(t + noise * torch.randn(t.shape, generator=generator, dtype=torch.float64), dim=1)
        .to(dtype)
        .requires_grad_()
        for t in tensors
    ]


def gradients(loss: Tensor, scale: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [scale, *tensors])]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


def check(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    names = ["the loss", "the gradient of the scale", *(f"the gradient of modality {m}" for m in range(len(want) - 2))]
    size = max(float(tensor.norm()) for tensor in want[2:])  # a gradient may be zero but for rounding
    for name, g, w in zip(names, got, want, strict=True):
        difference = float((g.double() - w.double()).norm())
        assert difference <= tolerance * max(float(w.norm()), size if "modality" in name else 0.0, 1e-12), (
            f"{name} is off by {difference:.1e}"
        )


# -- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.7, 400.0], ids=["plain sums", "online sums"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("strategy", "number"), [(s, m) for s in STRATEGIES for m in (2, 3, 4) if not (s == "sheets" and m == 2)]
)
def test_equals_the_reference_in_float64(strategy: str, number: int, mask: str, scale: float) -> None:
    tensors, multiplier = draw(number), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    flags = None if MASKS[mask] is None else torch.tensor(MASKS[mask])
    loss = SymileLoss(seed=SEED, **STRATEGIES[strategy])(tensors, multiplier, step=STEP, valid=flags)
    want = symile_loss_reference(tensors, multiplier, SEED, STEP, flags, **STRATEGIES[strategy])
    check(gradients(loss, multiplier, tensors), gradients(want, multiplier, tensors), 1e-12)


@pytest.mark.parametrize("scale", [0.7, 400.0])
@pytest.mark.parametrize(("number", "batch"), [(3, 2), (3, 13), (4, 6)])
def test_the_full_cube_equals_the_published_package(number: int, batch: int, scale: float) -> None:
    tensors, multiplier = draw(number, batch), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    want = symile.Symile("n_squared")(tensors, multiplier)
    loss = SymileLoss("n_squared")(tensors, multiplier)
    check(gradients(loss, multiplier, tensors), gradients(want, multiplier, tensors), 1e-12)


def test_two_modalities_are_the_symmetric_infonce() -> None:
    tensors, scale = draw(2), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    logits, labels = scale * tensors[0] @ tensors[1].T, torch.arange(7)
    want = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss = SymileLoss("n_squared")(tensors, scale)
    check(gradients(loss, scale, tensors), gradients(want, scale, tensors), 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_reference_backend_is_the_reference(strategy: str) -> None:
    tensors, scale = draw(3), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    found = [
        SymileLoss(seed=SEED, backend=backend, **STRATEGIES[strategy])(tensors, scale, step=STEP)
        for backend in ("reference", "chunks", "auto")
    ]
    want, *others = [gradients(loss, scale, tensors) for loss in found]
    for got in others:
        check(got, want, 1e-12)


@pytest.mark.parametrize("tile", [(1, 7), (3, 20), (5, 40), (100, 10**6)], ids=str)
@pytest.mark.parametrize("scale", [0.7, 400.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tiles_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, strategy: str, scale: float, tile: tuple[int, int]
) -> None:
    tensors, multiplier = draw(3), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    flags = torch.tensor(MASKS["some"])
    want = symile_loss_reference(tensors, multiplier, SEED, STEP, flags, **STRATEGIES[strategy])
    monkeypatch.setitem(cube.TILE_ROWS, "cpu", tile[0])
    monkeypatch.setitem(cube.TILE_LOGITS, "cpu", tile[1])
    monkeypatch.setitem(permuted.LOGITS, "cpu", tile[1])
    monkeypatch.setattr(permuted, "COLUMNS", tile[0])
    loss = SymileLoss(seed=SEED, **STRATEGIES[strategy])(tensors, multiplier, step=STEP, valid=flags)
    check(gradients(loss, multiplier, tensors), gradients(want, multiplier, tensors), 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_homogeneous(strategy: str) -> None:
    tensors, scale = draw(3, dtype=torch.float32), torch.tensor(1.3, requires_grad=True)
    _, of_scale, *of_tensors = gradients(
        SymileLoss(seed=SEED, **STRATEGIES[strategy])(tensors, scale, step=STEP), scale, tensors
    )
    for tensor, gradient in zip(tensors, of_tensors, strict=True):
        assert float((tensor.detach() * gradient).sum()) == pytest.approx(1.3 * float(of_scale), rel=1e-4)


# -- options ---------------------------------------------------------------------------------------------------------


def test_options_are_what_they_say() -> None:
    tensors, scale = draw(3), torch.tensor(1.3, dtype=torch.float64)
    plain = SymileLoss("n_squared")
    unit = [F.normalize(tensor, dim=1) for tensor in tensors]
    torch.testing.assert_close(SymileLoss("n_squared", normalize=True)(tensors, scale), plain(unit, scale))
    torch.testing.assert_close(
        SymileLoss("n_squared", dimension_scaling=True)(tensors, scale), plain(tensors, scale * 6 ** ((3 - 1) / 2))
    )
    torch.testing.assert_close(
        SymileLoss("n_squared", pairwise_weight=0.3)(tensors, scale),
        plain(tensors, scale) + 0.3 * PairwiseClipLoss()(tensors, scale),
    )
    torch.testing.assert_close(plain(tensors, 1.3), plain(tensors, scale))
    torch.testing.assert_close(plain(tensors, scale.reshape(1)), plain(tensors, scale))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sample_is_no_positive_for_the_anchors_it_lacks(strategy: str) -> None:
    tensors, scale = draw(3), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    present = torch.rand(7, 3, generator=torch.Generator().manual_seed(1)) > 0.4
    present[:, 1] = False  # an anchor without any positive counts as zero
    valid = torch.tensor(MASKS["some"])
    arguments: dict[str, Any] = {"step": STEP, "valid": valid, "present": present}
    loss = SymileLoss(seed=SEED, **STRATEGIES[strategy])(tensors, scale, **arguments)
    want = symile_loss_reference(tensors, scale, SEED, STEP, valid, present=present, **STRATEGIES[strategy])
    check(gradients(loss, scale, tensors), gradients(want, scale, tensors), 1e-12)
    # By hand: the mean over anchors of the mean over their samples that count.
    whole = symile_loss_reference(tensors, scale, SEED, STEP, valid, **STRATEGIES[strategy])
    assert abs(float(loss.detach()) - float(whole.detach())) > 1e-3, "the flags change nothing"


def test_invalid_rows_may_hold_anything() -> None:
    for strategy, options in STRATEGIES.items():
        tensors, scale = draw(3), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        valid = torch.tensor(MASKS["some"])
        loss = SymileLoss(seed=SEED, **options)
        want = gradients(loss(tensors, scale, step=STEP, valid=valid), scale, tensors)
        spoilt = [torch.where(valid[:, None], t.detach(), torch.nan).requires_grad_() for t in tensors]
        got = gradients(loss(spoilt, scale, step=STEP, valid=valid), scale, spoilt)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w), f"{strategy}: what an invalid row holds changes the result"


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["n", "n_squared", "sheets"])
def test_a_trained_model_keeps_its_digits_in_float32(strategy: str) -> None:
    """Where the loss is 1e-3, softmax in float32 has lost four digits of the gradient; here it has not."""
    exact = aligned(192, 512, torch.float64)
    low = [tensor.detach().float().requires_grad_() for tensor in exact]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    options: dict[str, Any] = {"negative_sampling": strategy, "sheets": 12 if strategy == "sheets" else None}
    loss = SymileLoss(seed=SEED, **options)
    scale = torch.tensor(180.0 if strategy == "n" else 260.0)
    wide = scale.double().requires_grad_()
    want = gradients(loss(exact, wide, step=STEP), wide, exact)
    assert 1e-4 < float(want[0]) < 2e-2, f"the case is no longer that of a trained model: loss {float(want[0]):.1e}"
    scale.requires_grad_()
    got = gradients(loss(low, scale, step=STEP), scale, low)
    for name, g, w in zip(["loss", "scale", *"abc"], got, want, strict=True):
        assert error(g, w) <= 1e-6, f"{name}: relative error {error(g, w):.1e}"


@pytest.mark.parametrize("kind", ["one-hot", "layer_norm"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logits_of_any_size_are_finite_and_right(strategy: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    if kind == "one-hot":
        drawn = 0.01 * torch.randn(3, 16, 16, generator=generator) + torch.eye(16)
    else:
        drawn = F.layer_norm(torch.randn(3, 16, 64, generator=generator), (64,))  # |r| = sqrt(D)
    low = [tensor.clone().requires_grad_() for tensor in drawn]
    wide = [tensor.double().requires_grad_() for tensor in drawn]
    loss = SymileLoss(seed=SEED, **STRATEGIES[strategy])
    scales = [torch.tensor(100.0, dtype=t.dtype, requires_grad=True) for t in (low[0], wide[0])]
    got = gradients(loss(low, scales[0], step=STEP), scales[0], low)
    want = gradients(loss(wide, scales[1], step=STEP), scales[1], wide)
    for name, g, w in zip(["loss", "scale", *"abc"], got, want, strict=True):
        assert torch.isfinite(g).all(), name
        # Logits are some hundreds to thousands: in float32 they are rounded by up to 1e-4.
        assert float((g - w).abs().max()) <= 2e-3 * max(1e-6, float(w.abs().max())), name


def test_the_bound_holds_and_chooses_the_way() -> None:
    tensors = [tensor.detach() for tensor in draw(3)]
    largest = float(torch.einsum("id,jd,kd->ijk", *tensors).abs().max())
    bound = float(largest_logit(tensors, torch.tensor(-2.0, dtype=torch.float64)))
    assert 2 * largest <= bound <= 20 * largest
    for dtype, limit in ((torch.float32, 80.7), (torch.bfloat16, 80.7), (torch.float64, 701.7)):
        for value, expected in ((limit - 5 - 0.2, True), (limit - 5 + 0.2, False), (math.nan, False)):
            assert bool(is_bounded(torch.tensor(value), round(math.exp(5)), dtype)) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("where", ["modality 0", "modality 2", "scale"])
def test_nan_gives_nan(strategy: str, where: str) -> None:
    tensors, scale = draw(3, dtype=torch.float32), torch.tensor(1.0)
    if where == "scale":
        scale = torch.tensor(math.nan)
    else:
        with torch.no_grad():
            tensors[int(where[-1])][2, 3] = math.nan
    loss = SymileLoss(seed=SEED, **STRATEGIES[strategy])(tensors, scale, step=STEP)
    assert torch.isnan(loss)
    assert not any(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_is_computed_in_float32_on_a_cpu(strategy: str) -> None:
    low = draw(3, dtype=torch.bfloat16)
    wide = [tensor.detach().float().requires_grad_() for tensor in low]
    loss = SymileLoss(seed=SEED, **STRATEGIES[strategy])
    values = [loss(tensors, 1.3, step=STEP) for tensors in (low, wide)]
    assert values[0].dtype == torch.float32 and torch.equal(*values)
    for got, want in zip(torch.autograd.grad(values[0], low), torch.autograd.grad(values[1], wide), strict=True):
        assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = loss(wide, 1.3, step=STEP)
        torch.testing.assert_close(
            torch.autograd.grad(under_autocast, wide), torch.autograd.grad(loss(wide, 1.3, step=STEP), wide)
        )
    assert torch.equal(under_autocast, values[1]), "autocast changes the precision"


# -- sheets ----------------------------------------------------------------------------------------------------------


def test_sheets_estimate_every_anchors_sum_without_bias() -> None:
    """Over all draws of one sheet beside the first, the mean of the weighted sums is the cube's sum, exactly."""
    own, *others = [tensor.detach() for tensor in draw(3)]
    flags, scale = torch.tensor(MASKS["some"]), torch.tensor(1.0, dtype=torch.float64)
    own, *others = [tensor * flags[:, None] for tensor in (own, *others)]
    always = torch.tensor(True)
    want = Cube(0, flags, always).log_sum_exp(own, others, scale)
    draws = [Cube(0, flags, always, [0, t], 6.0).log_sum_exp(own, others, scale) for t in range(1, 7)]
    for place in range(2):
        mean = torch.stack([found[place].exp() for found in draws]).mean(dim=0)
        torch.testing.assert_close(mean[..., flags], want[place].exp()[..., flags], rtol=1e-12, atol=0.0)


def test_all_sheets_are_the_cube() -> None:
    for number, batch in ((3, 7), (4, 4)):
        tensors, scale = draw(number, batch), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        loss = SymileLoss("sheets", sheets=batch ** (number - 2))(tensors, scale, step=STEP)
        want = SymileLoss("n_squared")(tensors, scale)
        check(gradients(loss, scale, tensors), gradients(want, scale, tensors), 1e-12)


def test_sheets_point_where_the_cube_points() -> None:
    """Cosine of the gradients at a sixteenth of the cube, on aligned data; N negatives are far from it."""
    tensors, scale = aligned(128, 512, torch.float64), torch.tensor(150.0, dtype=torch.float64)
    full = torch.cat(torch.autograd.grad(SymileLoss("n_squared")(tensors, scale), tensors))
    cosines = {}
    for name, options in {"sheets": {"sheets": 8}, "n": {}}.items():
        found = [
            torch.cat(torch.autograd.grad(SymileLoss(name, seed=seed, **options)(tensors, scale, step=0), tensors))
            for seed in range(5)
        ]
        cosines[name] = min(float(F.cosine_similarity(g.flatten(), full.flatten(), dim=0)) for g in found)
    assert cosines["sheets"] >= 0.99, cosines
    assert cosines["n"] < cosines["sheets"], cosines


def test_sheets_are_drawn_from_seed_and_step() -> None:
    drawn, weight = draw_sheets(5, 16, 3, SEED, STEP)
    assert draw_sheets(5, 16, 3, SEED, STEP) == (drawn, weight)
    assert drawn[0] == 0 and len(set(drawn)) == 5 and max(drawn) < 16 and weight == 15 / 4
    others = {tuple(draw_sheets(5, 16, 3, seed, step)[0]) for seed in range(4) for step in range(4)}
    assert len(others) > 12
    counts = torch.zeros(16)
    for step in range(600):
        counts[draw_sheets(5, 16, 3, SEED, step)[0][1:]] += 1
    assert counts[0] == 0 and (counts[1:] - 160).abs().max() < 5 * math.sqrt(160), "some sheets are favoured"


def test_a_sample_of_a_large_population_has_no_repeats_and_no_end() -> None:
    for population in (2**20, 2**20 + 1, 10**8):
        found = sample_without_replacement(population, 3000, SEED, STEP)
        assert found == sample_without_replacement(population, 3000, SEED, STEP)
        assert len(set(found)) == 3000 and min(found) >= 0 and max(found) < population
        assert abs(sum(found) / 3000 / population - 0.5) < 0.03


# -- memory and waiting ----------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Keeps the largest tensor that any operation made, and how often a value went from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")):
            self.waits.append(name)
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and "view" not in name and "expand" not in name:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize("scale", [0.1, 900.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_n_by_n_matrix_is_made_and_the_host_reads_one_flag(
    monkeypatch: pytest.MonkeyPatch, strategy: str, scale: float
) -> None:
    batch, dimension = 512, 4
    tensors = draw(3, batch, dimension, torch.float32)
    valid = torch.ones(batch, dtype=torch.bool)
    if strategy == "n_squared":
        batch = 128
        tensors, valid = [t.detach()[:batch].requires_grad_() for t in tensors], valid[:batch]
    monkeypatch.setitem(cube.TILE_LOGITS, "cpu", 8 * batch)
    monkeypatch.setitem(permuted.LOGITS, "cpu", 8 * batch)
    monkeypatch.setattr(permuted, "COLUMNS", 64)
    with Watch() as watch:
        loss = SymileLoss(seed=SEED, **STRATEGIES[strategy])(tensors, torch.tensor(scale), step=STEP, valid=valid)
        loss.backward()
    assert watch.largest <= max(8 * batch, 2 * batch * dimension + batch, 9 * batch, 64 * dimension * 4), (
        f"{watch.largest} elements at once, a matrix of logits has {batch**2}"
    )
    # Which way the cube's sums go is read once; N negatives read nothing.
    assert len(watch.waits) == (0 if strategy == "n" else 1), watch.waits


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"negative_sampling": "n_square"}, "unknown negative_sampling 'n_square'; did you mean 'n_squared'"),
        ({"backend": "chunk"}, "unknown backend 'chunk'; did you mean 'chunks'"),
        ({"negative_sampling": "sheets"}, "needs sheets="),
        ({"negative_sampling": "sheets", "sheets": 1}, "sheets = 1 should be an integer of 2 or more"),
        ({"negative_sampling": "sheets", "sheets": 2.5}, "sheets = 2.5 should be an integer"),
        ({"negative_sampling": "n", "sheets": 4}, "sheets = 4 goes with negative_sampling='sheets', not 'n'"),
        ({"negative_sampling": "n", "backend": "triton"}, "backend 'triton' computes negative_sampling='n_squared'"),
        ({"seed": None}, "seed = None should be an integer"),
        ({"pairwise_weight": -1.0}, "pairwise_weight = -1.0 should be 0 or more"),
        ({"pairwise_weight": math.nan}, "pairwise_weight = nan should be 0 or more"),
    ],
)
def test_unknown_options_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SymileLoss(**options)


THREE = [torch.zeros(4, 3)] * 3


@pytest.mark.parametrize(
    ("options", "tensors", "arguments", "words"),
    [
        ({}, THREE, {}, r"draws its negatives from \(seed, step\): pass step="),
        ({}, THREE, {"step": 1.0}, "step should be an integer, is 1.0"),
        ({}, THREE, {"step": True}, "step should be an integer, is True"),
        ({}, THREE, {"step": 0, "logit_scale": torch.ones(2)}, r"logit_scale should be one number, .* shape \(2,\)"),
        ({}, THREE, {"step": 0, "logit_scale": torch.tensor(1)}, "logit_scale should be one number, is torch.int64"),
        ({}, THREE, {"step": 0, "logit_scale": "1"}, "logit_scale should be a number or a tensor of one, is a str"),
        ({}, THREE, {"step": 0, "present": torch.ones(4, 2, dtype=torch.bool)}, r"bool tensor of shape \(4, 3\), is"),
        ({}, THREE, {"step": 0, "valid": [True] * 4}, r"bool tensor of shape \(4,\), is a list"),
        ({}, torch.zeros(3, 4, 3), {"step": 0}, "should be a list of tensors"),
        ({}, [torch.zeros(0, 3)] * 3, {"step": 0}, r"are empty: their shape is \(0, 3\)"),
        ({"negative_sampling": "sheets", "sheets": 5}, THREE, {"step": 0}, "has 4: choose 2 to 4"),
        ({"negative_sampling": "sheets", "sheets": 2}, THREE[:2], {"step": 0}, "use negative_sampling='n_squared'"),
        ({"negative_sampling": "n_squared"}, [torch.zeros(3000, 1)] * 4, {}, "more than can be computed; use 'sheets'"),
        ({"negative_sampling": "n_squared", "backend": "triton"}, THREE, {}, "backend 'triton' needs"),
    ],
)
def test_wrong_arguments_are_told(
    options: dict[str, Any], tensors: list[Tensor], arguments: dict[str, Any], words: str
) -> None:
    scale = arguments.pop("logit_scale", 1.0)
    with pytest.raises(ValueError, match=words):
        SymileLoss(**options)(tensors, scale, **arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["objective.negative_sampling=sheets", "objective.sheets=9"], "objective 'symile': sheets = 9, .* has 8"),
        (["objective.negative_sampling=n_squared", "train.global_batch_size=200000"], "more than can be computed"),
        (["objective.missing=drop"], "missing = 'drop' should be 'placeholder' or 'exclude'"),
    ],
)
def test_a_config_is_told_before_any_work_starts(options: list[str], words: str) -> None:
    modality = "{member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6}}"
    text = f"""
    run: {{name: none}}
    data: {{train: none}}
    modalities: {{a: {modality}, b: {modality}, c: {modality}}}
    train: {{steps: 1, global_batch_size: 8}}
    """
    make_objective(parse_config(text, "config.yaml").config)
    with pytest.raises(ValueError, match=words):
        make_objective(parse_config(text, "config.yaml", options).config)
