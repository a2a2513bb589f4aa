"""The model: what stands for a modality that a sample lacks, and the scale of the logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symile_dist.config import Config, parse_config
from symile_dist.model import MissingEmbedding, MultimodalModel
from symile_dist.optim import parameter_groups
from symile_dist.types import Batch, Inputs, Padded, PointSet

TEXT = """
run: {name: model}
data: {train: none}
modalities:
  a: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 3}, missing_embedding: true, lr: .5}
  b: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 3}}
  c: {member: npy, decoder: npy, transform: tensor, encoder: "tests.unit.test_model:Flagged"}
model: {embedding_dim: 4, normalization: l2}
train: {steps: 1, global_batch_size: 4}
"""
PRESENT = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 0]]).bool()


class Flagged(nn.Module):
    """An encoder that emits what it was told of presence."""

    takes_present = True

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.ones(embedding_dim))

    def forward(self, inputs: Inputs, present: Tensor) -> Tensor:
        return torch.where(present[:, None], self.direction, -self.direction)


def config() -> Config:
    return parse_config(TEXT, "model.yaml").config


def batch() -> Batch:
    inputs: dict[str, Inputs] = {name: torch.randn(4, 3) for name in "abc"}
    return Batch(inputs, PRESENT, torch.ones(4, dtype=torch.bool), torch.arange(4))


def test_a_learned_vector_stands_where_a_sample_lacks_the_modality() -> None:
    torch.manual_seed(0)
    model, given = MultimodalModel(config()), batch()
    found = model(given).representations
    encoded = F.normalize(model.encoders["a"](given.inputs["a"]), dim=-1)
    learned = F.normalize(model.missing_embeddings["a"].vector, dim=-1)
    for row, there in enumerate(PRESENT[:, 0].tolist()):
        torch.testing.assert_close(found["a"][row], encoded[row] if there else learned)
    torch.testing.assert_close(found["b"], F.normalize(model.encoders["b"](given.inputs["b"]), dim=-1))
    assert list(model.missing_embeddings) == ["a"], "a vector that nobody asked for"


def test_the_learned_vector_is_trained_at_its_modality_s_rate() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = MultimodalModel(config())

    module = Module()
    groups = parameter_groups(module, config())  # type: ignore[arg-type]
    vector = module.model.missing_embeddings["a"].vector
    (rate,) = [group["lr"] for group in groups if any(parameter is vector for parameter in group["params"])]
    assert rate == 0.5


def test_an_encoder_that_asks_is_told_what_is_present() -> None:
    found = MultimodalModel(config())(batch()).representations["c"]
    assert (found[:, 0] > 0).tolist() == PRESENT[:, 2].tolist()


def test_inputs_that_an_encoder_does_not_take_are_the_user_s_mistake() -> None:
    """A ValueError: after anything else a worker would be restarted, in vain."""
    model, values = MultimodalModel(config()), torch.randn(4, 3)
    sequences: Inputs = Padded(values, torch.full((4,), 3))
    for wrong, words in ((values[:, :2], "modality 'b': MLP: a sample has 2"), (sequences, "modality 'b': MLP takes")):
        with pytest.raises(ValueError, match=words):
            model.encode("b", wrong, PRESENT[:, 1])


def test_in_a_point_set_the_learned_vector_stands_alone() -> None:
    learned = MissingEmbedding(4)
    points = PointSet(torch.randn(2, 3, 4), torch.randn(2, 3), torch.tensor([3, 2]))
    vectors, weights, sizes = learned(points, torch.tensor([True, False]))
    torch.testing.assert_close(vectors[0], points.vectors[0])
    torch.testing.assert_close(weights[0], points.weights[0])
    torch.testing.assert_close(vectors[1, 0], learned.vector)
    assert weights[1].tolist() == [1, 0, 0] and sizes.tolist() == [3, 1]


# -- the scale of the logits -------------------------------------------------------------------------------------------


def scaled(init: float, **options: object) -> MultimodalModel:
    content = config().model_dump(mode="json")
    content["model"] |= {"logit_scale_init": init, **options}
    return MultimodalModel(Config.model_validate(content))


def test_the_scale_is_learned_as_a_logarithm_or_as_it_is() -> None:
    for model, want, slope in [
        (scaled(2.0), math.exp(2.0), math.exp(2.0)),
        (scaled(3.0, logit_scale_form="raw"), 3.0, 1.0),
    ]:
        assert model.multiplier().shape == () and model.multiplier().item() == pytest.approx(want)
        model.multiplier().backward()
        assert model.logit_scale.grad is not None and model.logit_scale.grad.item() == pytest.approx(slope)


def test_the_scale_stays_in_its_range_and_finds_back_into_it() -> None:
    model = scaled(50.0, logit_scale_form="raw", logit_scale_range=[1, 100])
    # (value, direction in which the multiplier is to go) -> multiplier, gradient that passes
    for value, wanted, multiplier, passes in [
        (120.0, 1, 100.0, False),
        (120.0, -1, 100.0, True),
        (0.5, -1, 1.0, False),
        (0.5, 1, 1.0, True),
        (7.0, 1, 7.0, True),
    ]:
        model.logit_scale.data.fill_(value)
        model.zero_grad()
        found = model.multiplier()
        (-wanted * found).backward()
        assert found.item() == multiplier and model.logit_scale.grad is not None
        assert bool(model.logit_scale.grad.any()) == passes, f"{value} {wanted}"


def test_a_scale_that_begins_wrongly_is_told() -> None:
    for options, words in [
        ({"logit_scale_range": [1, 100]}, "begins outside of logit_scale_range"),
        ({"logit_scale_form": "raw"}, "the multiplier itself .* is positive, not -4"),
        ({"logit_scale_range": [2, 1]}, "2 is more than 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            scaled(-4.0, **options)
