"""FactorCL: critics and terms against the definitions, estimates on Gaussians, labels, views and their config."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from symile_dist.config import Config, ConfigError, InnerOptimizerConfig, parse_config
from symile_dist.data.augment import FeaturesTransform
from symile_dist.encoders.identity import Identity, OneHot
from symile_dist.inner import InnerOptimizer
from symile_dist.model import TrainingModule
from symile_dist.objectives import factorcl_critics
from symile_dist.objectives.factorcl import FactorCLObjective
from symile_dist.objectives.factorcl_critics import PairCritic, Pairs
from symile_dist.types import Batch, Padded
from tests.factorcl import CASES, DIMENSION, SSL, SUP, batch_of, drawn, make, outputs_of, reference

SIZE = 11


def number(value: Tensor) -> float:
    return float(value.detach())


def gradients(value: Tensor, of: list[Tensor]) -> list[Tensor]:
    return [g.clone() for g in torch.autograd.grad(value, of, materialize_grads=True, retain_graph=True)]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda text, n=number: f"tensor {n}: {text}")


# -- the critic ------------------------------------------------------------------------------------------------------


def critic_case(rows: int = SIZE, columns: int = SIZE) -> tuple[PairCritic, Tensor, Tensor, Pairs]:
    torch.manual_seed(1)
    critic = PairCritic(4, 3, hidden=10).double()
    x = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(columns, 3, dtype=torch.float64, requires_grad=True)
    return critic, x, y, Pairs.all_of(rows, x.detach())


@pytest.mark.parametrize("at_once", [10_000, 3 * SIZE, SIZE, 4], ids=lambda n: f"{n} pairs at once")
def test_both_bounds_are_the_definition_s_whatever_the_tiles(at_once: int) -> None:
    critic, x, y, pairs = critic_case()
    scores = critic.scores(x, y)
    nce = (scores.diagonal() - scores.logsumexp(dim=1) + math.log(SIZE)).mean()
    club = scores.diagonal().mean() - scores.mean()
    everything = [x, y, *critic.parameters()]
    with patch.dict(factorcl_critics.PAIRS, cpu=at_once):
        found = critic(x, y, pairs)
        upper, inner = critic.upper_bound(x, y, pairs)
    assert number(found) == pytest.approx(-number(nce), rel=1e-12)
    assert number(upper) == pytest.approx(number(club), rel=1e-12)
    assert number(inner) == pytest.approx(-number(nce), rel=1e-12)
    assert_close(gradients(found, everything), gradients(-nce, everything))
    assert_close(gradients(upper, [x, y]), gradients(club, [x, y]))
    assert_close(gradients(inner, list(critic.parameters())), gradients(-nce, list(critic.parameters())))


def test_the_upper_bound_reaches_the_inputs_alone_and_its_critic_s_loss_the_critic_alone() -> None:
    critic, x, y, pairs = critic_case()
    upper, inner = critic.upper_bound(x, y, pairs)
    upper.backward()
    assert x.grad is not None and y.grad is not None
    assert all(parameter.grad is None for parameter in critic.parameters())
    x.grad = y.grad = None
    inner.backward()
    assert x.grad is None and y.grad is None
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_rows_and_columns_that_do_not_count_are_as_if_they_were_not_there() -> None:
    critic, x, y, _ = critic_case(rows=6, columns=4)
    # Rows 0 and 3 do not count; column 1 stands for none, column 3 for three samples.
    positive = torch.tensor([0, 2, 3, 1, 3, 0])
    weights = torch.tensor([0.0, 0.2, 0.3, 0.0, 0.4, 0.1], dtype=torch.float64)
    copies = torch.tensor([[2.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    columns = [0, 0, 2, 3, 3, 3]
    scores = critic.scores(x, y)
    own = scores.gather(1, positive[:, None])[:, 0]
    contrasted = scores[:, columns]
    nce = (weights * (own - contrasted.logsumexp(dim=1) + math.log(6))).sum()
    club = (weights * (own - contrasted.mean(dim=1))).sum()
    pairs = Pairs(positive, weights, copies)
    everything = [x, y, *critic.parameters()]
    found, (upper, _) = critic(x, y, pairs), critic.upper_bound(x, y, pairs)
    assert number(found) == pytest.approx(-number(nce), rel=1e-12) and number(upper) == pytest.approx(
        number(club), rel=1e-12
    )
    assert_close(gradients(found, everything), gradients(-nce, everything))
    assert_close(gradients(upper, [x, y]), gradients(club, [x, y]))


def test_a_learned_positive_keeps_its_digits_in_float32() -> None:
    scores = torch.full((2, 2), -30.0) + torch.diag(torch.full((2,), 30.0))
    value, gradient = factorcl_critics._nce_rows(scores, Pairs.all_of(2, scores))
    assert number(value) + math.log(2) == pytest.approx(math.exp(-30), rel=1e-2, abs=0)
    assert float(gradient[0, 0]) == pytest.approx(-math.exp(-30) / 2, rel=1e-4, abs=0)


def test_without_gradients_values_are_the_same() -> None:
    critic, x, y, pairs = critic_case()
    want = [critic(x, y, pairs), *critic.upper_bound(x, y, pairs)]
    with torch.no_grad():
        got = [critic(x, y, pairs), *critic.upper_bound(x, y, pairs)]
    assert [number(value) for value in got] == [number(value) for value in want]


@pytest.mark.parametrize("has_bfloat16", [True, False], ids=["CPU with bfloat16", "CPU without"])
def test_medium_precision_costs_digits_only(has_bfloat16: bool) -> None:
    torch.manual_seed(0)
    critic, x = PairCritic(DIMENSION, DIMENSION, 64), torch.randn(SIZE, DIMENSION, requires_grad=True)
    y = x.detach() + 0.1 * torch.randn(SIZE, DIMENSION)
    pairs = Pairs.all_of(SIZE, x)

    def found() -> tuple[float, Tensor]:
        upper, inner = critic.upper_bound(x, y, pairs)
        total = upper + inner
        return number(total), torch.cat([each.flatten() for each in gradients(total, [x, *critic.parameters()])])

    (exact, exact_gradient), before = found(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with patch.object(factorcl_critics, "_multiplies_bfloat16", lambda: has_bfloat16):
            value, gradient = found()
    finally:
        torch.set_float32_matmul_precision(before)
    assert value == pytest.approx(exact, abs=1e-3)
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.999
    if has_bfloat16:
        # (Float32's own products differ by 1e-6 from one setting to another.)
        assert (gradient - exact_gradient).norm() > 1e-4 * exact_gradient.norm(), "no product was of bfloat16"


# -- the objective ---------------------------------------------------------------------------------------------------

FLAGS = {
    "all": (torch.ones(SIZE, dtype=torch.bool), 0),
    "some invalid": (torch.arange(SIZE) % 4 != 1, 0),
    "some invalid, some lacking": (torch.arange(SIZE) % 4 != 1, 1),
    "none": (torch.zeros(SIZE, dtype=torch.bool), 0),
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_paper_s(case: str, flags: str) -> None:
    objective, vectors = make(case), drawn(case, SIZE)
    valid, lacking = FLAGS[flags]
    present = torch.ones(SIZE, len(vectors), dtype=torch.bool)
    if lacking:
        present = torch.rand(present.shape, generator=torch.Generator().manual_seed(0)) > 0.2
    leaves = {name: vector.clone().requires_grad_(name != "y") for name, vector in vectors.items()}
    poisoned = {
        name: torch.where((valid & present[:, m])[:, None], leaf, torch.nan)
        for m, (name, leaf) in enumerate(leaves.items())
    }
    report = objective(outputs_of(poisoned), batch_of(present, valid), 0)
    clean = {name: vector.clone().requires_grad_(name != "y") for name, vector in vectors.items()}
    loss, inner_loss = reference(objective, clean, present, valid)
    assert number(report.loss) == pytest.approx(number(loss), rel=1e-10, abs=1e-12)
    assert report.inner_loss is not None
    assert number(report.inner_loss()) == pytest.approx(number(inner_loss), rel=1e-10, abs=1e-12)
    outer = list(objective.parameters())
    if loss.requires_grad:
        want = gradients(loss, [*(leaf for name, leaf in clean.items() if name != "y"), *outer])
        assert_close(gradients(report.loss, [*(leaf for name, leaf in leaves.items() if name != "y"), *outer]), want)
        critics = [p for module in objective.inner_modules().values() for p in module.parameters()]
        assert_close(gradients(report.inner_loss(), critics), gradients(inner_loss, critics))
    assert all(torch.isfinite(value) for value in report.metrics.values())


def test_six_terms_with_the_paper_s_signs() -> None:
    terms = {term.name: (term.bound, term.part) for term in make("SUP").terms}
    assert terms == {
        "nce-x1-x2": ("nce", "shared"),
        "club-x1-x2-given": ("club", "shared"),
        "nce-x1-y": ("nce", "unique"),
        "nce-x2-y": ("nce", "unique"),
        "club-x1-x2": ("club", "unique"),
        "nce-x1-x2-given": ("nce", "unique"),
    }
    objective, vectors = make("SUP"), drawn("SUP", SIZE)
    everyone = torch.ones(SIZE, dtype=torch.bool)
    report = objective(outputs_of(vectors), batch_of(everyone[:, None].expand(-1, 3), everyone), 0)
    nats = {name: float(report.metrics[f"nats/{name}"]) for name in terms}
    shared = nats["nce-x1-x2"] - nats["club-x1-x2-given"]
    unique = nats["nce-x1-y"] + nats["nce-x2-y"] - nats["club-x1-x2"] + nats["nce-x1-x2-given"]
    assert number(report.loss) == pytest.approx(-(shared + unique), rel=1e-9)


def test_terms_of_one_modality_count_once_in_all_pairs_and_against_the_rest() -> None:
    of_three = {"modalities": ["a", "b", "c", "y"], "label": "y", "embedding_dim": 4, "hidden": 4}
    names = [term.name for term in FactorCLObjective(**of_three).terms]  # type: ignore[arg-type]
    assert len(names) == len(set(names)) == 3 * 4 + 3
    names = [term.name for term in FactorCLObjective(**of_three, pairing="one_vs_rest").terms]  # type: ignore[arg-type]
    assert len(names) == 3 * 6 and "nce-a-b+c" in names and "nce-b+c-y" in names


def test_embeddings_are_the_heads_of_each_part() -> None:
    objective, vectors = make("SUP"), drawn("SUP", SIZE)
    found = objective.embeddings(vectors)
    assert {name: tuple(vector.shape) for name, vector in found.items()} == {
        "x1": (SIZE, 5 * DIMENSION),
        "x2": (SIZE, 5 * DIMENSION),
        **{f"{name}.encoder": (SIZE, DIMENSION) for name in ("x1", "x2")},
        **{f"{name}.shared": (SIZE, 2 * DIMENSION) for name in ("x1", "x2")},
        **{f"{name}.unique": (SIZE, 3 * DIMENSION) for name in ("x1", "x2")},
    }
    heads = objective.heads["nce-x1-y"]["x1"], objective.heads["club-x1-x2"]["x1"]  # type: ignore[index]
    torch.testing.assert_close(found["x1.unique"][:, : 2 * DIMENSION], torch.cat([h(vectors["x1"]) for h in heads], 1))
    assert objective.similarity is None
    rest = make("SSL, one against the rest")
    assert "x2+x3.shared" in rest.embeddings(drawn("SSL, one against the rest", SIZE))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"modalities": ["x1", "x2"]}, "needs a task"),
        ({"modalities": ["x1", "x2"], "views": "x2"}, "views = 'x2' should be a map"),
        ({**SUP, "views": {"x1": "x2"}}, "needs a task"),
        ({**SUP, "label": "z"}, "'z' is no modality"),
        ({**SSL, "views": {"x1": "v1", "x2": "v3"}}, "'v3' is no modality"),
        ({**SSL, "views": {"x1": "v1"}}, "should give each of x1, x2, v2 a view of its own"),
        ({"modalities": ["x1", "y"], "label": "y"}, "two or more modalities beside"),
        ({**SUP, "pairing": "every"}, "pairing = 'every'"),
        ({**SSL, "negatives": "same_label"}, "needs a label"),
        ({**SUP, "missing": "drop"}, "missing = 'drop'"),
        ({**SUP, "hidden": 0}, "hidden = 0 should be 1 or more"),
        ({**SUP, "head_layers": -1}, "head_layers = -1 0 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match="objective 'factorcl'") as raised:
        FactorCLObjective(embedding_dim=4, **options)
    assert told in str(raised.value)


def test_point_sets_are_refused() -> None:
    vectors: dict[str, Any] = drawn("SUP", SIZE) | {"x1": (torch.zeros(2), torch.zeros(2))}
    everyone = torch.ones(SIZE, dtype=torch.bool)
    with pytest.raises(ValueError, match="list of tensors"):
        make("SUP")(outputs_of(vectors), batch_of(everyone[:, None].expand(-1, 3), everyone), 0)


# -- what the estimates are worth ------------------------------------------------------------------------------------


def gaussians(size: int, information: float, dimension: int) -> tuple[Tensor, Tensor]:
    """Pairs of vectors with so many nats in common."""
    correlation = math.sqrt(1 - math.exp(-2 * information / dimension))
    x, noise = torch.randn(2, size, dimension)
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


def test_the_truth_lies_between_both_bounds_on_gaussians() -> None:
    torch.manual_seed(0)
    size, information, dimension = 48, 1.5, 2
    critic = PairCritic(dimension, dimension, hidden=48)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    lower, upper = [], []
    for step in range(200):
        x, y = gaussians(size, information, dimension)
        club, nce = critic.upper_bound(x, y, Pairs.all_of(size, x))
        optimizer.zero_grad()
        nce.backward()
        optimizer.step()
        if step >= 120:
            lower.append(-number(nce))
            upper.append(number(club))
    assert information - 0.5 < np.mean(lower) < information + 0.1
    assert np.mean(upper) > information - 0.1


# -- the second optimizer --------------------------------------------------------------------------------------------


def test_the_inner_optimizer_is_adam_and_takes_no_step_that_is_not_finite() -> None:
    torch.manual_seed(0)
    module, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(module.state_dict())
    inner = InnerOptimizer({"m": module}, InnerOptimizerConfig(lr=1e-2))
    adam = torch.optim.Adam(other.parameters(), lr=1e-2)
    for step in range(3):
        x = torch.full((4, 3), float(step + 1))
        assert inner.step(module(x).square().sum())
        adam.zero_grad()
        other(x).square().sum().backward()
        adam.step()
    before = [p.detach().clone() for p in module.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, other.parameters(), strict=True))
    assert not inner.step(module(x).square().sum() * torch.inf)
    assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))


def test_hyperparameters_are_the_config_s_after_a_resume() -> None:
    module = torch.nn.Linear(2, 1)
    inner = InnerOptimizer({"m": module}, InnerOptimizerConfig(lr=1e-2))
    inner.step(module(torch.ones(1, 2)).sum())
    other = InnerOptimizer({"m": module}, InnerOptimizerConfig(lr=5e-4, betas=(0.5, 0.9)))
    other.load_tensors(inner.tensors())
    (group,) = other.adam.param_groups
    assert group["lr"] == 5e-4 and group["betas"] == (0.5, 0.9)
    assert float(other.adam.state[module.weight]["step"]) == 1


# -- labels and views ------------------------------------------------------------------------------------------------


def test_identity_fills_up_with_zeros() -> None:
    encoder = Identity(embedding_dim=4)
    assert encoder(torch.tensor([[1, 2], [3, 4]])).tolist() == [[1, 2, 0, 0], [3, 4, 0, 0]]
    assert encoder(torch.tensor([1.5, 2.5])).tolist() == [[1.5, 0, 0, 0], [2.5, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"5 values, more than model.embedding_dim = 4"):
        encoder(torch.zeros(2, 5))
    with pytest.raises(TypeError, match="unequal length"):
        encoder(Padded(torch.zeros(1, 1), torch.ones(1, dtype=torch.int64)))


def test_one_hot_refuses_what_is_no_label() -> None:
    encoder = OneHot(embedding_dim=4, classes=3)
    for labels in (torch.tensor([2, 0]), torch.tensor([[2.0], [0.0]]), torch.tensor([2, 0], dtype=torch.uint8)):
        assert encoder(labels).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    for wrong in (3, -1, 0.5):
        with pytest.raises(ValueError, match=rf"a label is {wrong}, not one of 0 to 2"):
            encoder(torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="one class number per sample"):
        encoder(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="classes = 5 should be 2 to"):
        OneHot(embedding_dim=4, classes=5)


def augmented(values: np.ndarray[Any, Any], draws: int = 200, **options: Any) -> list[Tensor]:
    transform = FeaturesTransform(**options)
    rng = np.random.default_rng(0)
    return [transform(values, rng) for _ in range(draws)]


def test_each_augmentation_does_what_its_name_says() -> None:
    values = np.arange(1, 21, dtype=np.float32)
    plain = torch.from_numpy(values)
    (swapped,) = augmented(values[:5], 1, augment=["swap"])
    assert swapped.tolist() == [3, 4, 5, 1, 2]
    noise = torch.stack(augmented(values, augment=["noise"], noise=0.1)) - plain
    assert noise.std() == pytest.approx(0.1, rel=0.05) and abs(noise.mean()) < 0.01
    for dropped in augmented(values, 20, augment=["drop"], drop=0.1):
        assert (dropped == 0).sum() == 2 and torch.equal(dropped[dropped != 0], plain[dropped != 0])
    (permuted,) = augmented(values, 1, augment=["permute"])
    assert not torch.equal(permuted, plain) and torch.equal(permuted.sort()[0], plain)
    assert all(torch.equal(same, plain) for same in augmented(values, 5, augment=["identity"]))
    assert all(torch.equal(same, plain) for same in augmented(values, 5, augment=[]))


def test_one_of_four_is_drawn_and_none_in_evaluation() -> None:
    values = np.arange(1, 101, dtype=np.float32)
    plain = torch.from_numpy(values)
    kinds = {"swap": 0, "drop": 0, "identity": 0, "noise": 0}
    for changed in augmented(values, 400):
        if torch.equal(changed, plain):
            kinds["identity"] += 1
        elif torch.equal(changed, plain.roll(-50)):
            kinds["swap"] += 1
        else:
            kinds["drop" if (changed == 0).any() else "noise"] += 1
    assert all(60 < count < 140 for count in kinds.values()), kinds
    assert torch.equal(FeaturesTransform()(values, None), plain)


def test_sequences_are_augmented_step_by_step_and_what_is_kept_is_not() -> None:
    steps = np.arange(1, 31, dtype=np.float32).reshape(10, 3)
    (dropped,) = augmented(steps, 1, augment=["drop"], drop=0.2, variable_length=True)
    assert (dropped == 0).all(dim=1).sum() == 2 and (dropped == 0).sum() == 6
    for changed in augmented(steps, 20, augment=["permute"], keep=[2, 6]):
        assert torch.equal(changed[2:6], torch.from_numpy(steps[2:6]))
    with pytest.raises(ValueError, match=r"keep = \[2, 12\): there are 10"):
        augmented(steps, 1, augment=["swap"], keep=[2, 12])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"augment": ["swop"]}, "did you mean 'swap'"),
        ({"drop": 2}, "drop = 2 a fraction"),
        ({"keep": [3, 3]}, "first, end"),
        ({"dtype": "int64"}, "floating-point"),
    ],
)
def test_augmentations_that_make_no_sense_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FeaturesTransform(**options)


VIEWS = """
run: {name: views}
data: {train: none}
modalities:
  x1: {member: x1.npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  x2: {member: x2.npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6}}
  v1: {member: x1.npy, decoder: npy, transform: features, encoder_of: x1}
  v2: {member: x2.npy, decoder: npy, transform: features, encoder_of: x2}
model: {embedding_dim: 8, normalization: none}
objective: {name: factorcl, views: {x1: v1, x2: v2}, hidden: 16}
train: {steps: 2, global_batch_size: 6}
"""


def configured(*overrides: str) -> Config:
    return parse_config(VIEWS, "views.yaml", list(overrides)).config


def test_a_view_passes_through_the_encoder_of_the_other() -> None:
    module = TrainingModule(configured("modalities.x1.missing_embedding=true"))
    assert list(module.model.encoders) == list(module.model.normalizations) == ["x1", "x2"]
    inputs: dict[str, Any] = {name: torch.randn(6, 6) for name in ("x1", "x2")}
    inputs |= {"v1": inputs["x1"], "v2": inputs["x2"] + 1}
    present = torch.ones(6, 4, dtype=torch.bool)
    present[0, [0, 2]] = False
    found = module(Batch(inputs, present, present[:, 1], torch.arange(6)), None).representations
    assert list(found) == ["x1", "x2", "v1", "v2"]
    assert torch.equal(found["x1"], found["v1"]) and not torch.equal(found["x2"], found["v2"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("modalities.v1.encoder_of=y1", "views.*'y1' is no other modality"),
        ("modalities.v1.encoder_of=v1", "'v1' is no other modality"),
        ("modalities.v1.encoder_of=v2", "'v2' has no encoder of its own: name x2"),
        ("modalities.v1.encoder=mlp", "is the encoder of x1 .encoder_of.: leave it out"),
        ("modalities.v1.lr=1", "set modalities.x1.lr"),
        ("modalities.v1.freeze=true", "set modalities.x1.freeze"),
        ("modalities.v1.encoder_of=null", "modalities.v1.encoder: is missing"),
    ],
)
def test_encoder_of_is_checked(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told if not told.startswith("views") else told.removeprefix("views.*")):
        configured(override)


def test_a_saved_config_shares_encoders_as_the_first_did(tmp_path: Path) -> None:
    config = configured()
    assert parse_config(config.to_yaml(), "saved.yaml").config == config == Config.model_validate(config.model_dump())
    changed = parse_config(config.to_yaml(), "saved.yaml", ["modalities.x1.encoder.hidden=[7]"]).config
    assert changed.modalities["v1"].encoder.options["hidden"] == [7]
    with pytest.raises(ConfigError, match="every encoder is frozen"):
        configured("modalities.x1.freeze=true", "modalities.x2.freeze=true")


def test_the_schema_knows_configs_with_views() -> None:
    import jsonschema
    import yaml

    schema = Config.model_json_schema()
    jsonschema.validate(yaml.safe_load(VIEWS), schema)
    content = yaml.safe_load(VIEWS)
    del content["modalities"]["x1"]["encoder"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


# -- weights ---------------------------------------------------------------------------------------------------------


def test_inner_modules_are_no_parameters_follow_to_devices_and_keep_their_precision() -> None:
    module = TrainingModule(configured())
    inner = [p for part in module.inner_modules().values() for p in part.parameters()]
    assert inner and not {id(p) for p in inner} & {id(p) for p in module.parameters()}
    before = [p.detach().clone() for p in inner]
    module.bfloat16()
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    assert all(torch.equal(p, q) for p, q in zip(inner, before, strict=True))
    module.to("meta")
    assert all(p.device.type == "meta" for part in module.inner_modules().values() for p in part.parameters())
    module.eval()
    assert not any(part.training for part in module.inner_modules().values())


def test_weights_hold_the_inner_modules_too() -> None:
    torch.manual_seed(0)
    module, other = TrainingModule(configured()), TrainingModule(configured())
    weights = {**module.state_dict(), **module.inner_state()}
    name = "objective.inner.club-x1-x2.weight_x"
    assert other.load_weights(weights | {"w": torch.zeros(1)}) == ([], ["w"])
    assert other.load_weights({key: w for key, w in weights.items() if key != name}) == ([name], [])
    assert not torch.equal(other.inner_state()[name], weights[name]), "copied although a weight is lacking"
    assert other.load_weights(weights) == ([], [])
    assert all(torch.equal(tensor, weights[key]) for key, tensor in other.inner_state().items())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in other.state_dict().items())
