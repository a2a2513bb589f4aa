"""Encoders of weighted point sets: shapes, true sizes, bounded weights, and that no neighbour changes a sample's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from symile_dist.encoders import ENCODERS
from symile_dist.encoders.points import PointHead, Points, ViTPoints
from symile_dist.encoders.recompute import recompute_parts
from symile_dist.objectives import WPSELoss
from symile_dist.registry import build
from symile_dist.types import Inputs, Padded, PointSet
from tests.pretrained import save_clip, save_text

DIM = 6
VIT = {"image_size": [8, 16], "patch_size": 4, "channels": 1, "width": 16, "layers": 2, "heads": 2}
TEXT = {"vocabulary": 60, "context_length": 12, "width": 16, "layers": 2, "heads": 2}


def images() -> Tensor:
    return torch.randn(5, 1, 8, 16, generator=torch.Generator().manual_seed(0))


def features() -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def texts() -> Padded:
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(1, 60, (length,), generator=generator) for length in (1, 12, 5, 7, 2)]
    return Padded(pad_sequence(sequences, batch_first=True), torch.tensor([len(s) for s in sequences]))


# name, options, inputs, what every set has as its size (None: as the text is long)
CASES: dict[str, tuple[str, dict[str, Any], Callable[[], Inputs], int | None]] = {
    "image": ("image_points", {"widths": [8, 16], "grid": [2, 4], "hidden": 16}, images, 8),
    "text": ("text_points", {"width": 16, "hidden": 16}, texts, None),
    "vit": ("vit_points", VIT, images, 9),
    "transformer": ("text_transformer_points", TEXT, texts, 12),
    "transformer, uncounted": ("text_transformer_points", {**TEXT, "count_padding": False}, texts, None),
    "of a vector": ("points", {"encoder": "image_convnet", "width": 16, "points": 3}, images, 3),
    "of features as they are": ("points", {"encoder": "identity", "width": 16, "points": 3}, features, 3),
    "of a text": ("points", {"encoder": {"name": "text_convnet", "width": 16}, "width": 16, "points": 3}, texts, 3),
}


def make(case: str) -> nn.Module:
    name, options, *_ = CASES[case]
    torch.manual_seed(0)
    encoder: nn.Module = build(name, options, ENCODERS, "encoder", embedding_dim=DIM)
    return encoder


def rows(inputs: Inputs, row: int) -> Inputs:
    """One sample, without the padding that its neighbours brought."""
    if isinstance(inputs, Padded):
        length = int(inputs.lengths[row])
        return Padded(inputs.values[row : row + 1, :length], inputs.lengths[row : row + 1])
    return inputs[row : row + 1]


@pytest.mark.parametrize("case", CASES)
def test_sets_have_their_true_sizes_and_bounded_weights(case: str) -> None:
    inputs, size = CASES[case][2](), CASES[case][3]
    vectors, weights, sizes = make(case)(inputs)
    lengths = inputs.lengths.tolist() if isinstance(inputs, Padded) else []
    assert sizes.dtype == torch.int64 and sizes.tolist() == (lengths if size is None else [size] * 5)
    assert vectors.shape == (5, max(sizes.tolist()), DIM) and weights.shape == vectors.shape[:2]
    for row, length in enumerate(sizes.tolist()):
        assert weights[row, :length].all() and not weights[row, length:].any()
    assert weights.min() < 0 < weights.max() and weights.abs().max() < 100
    spread = vectors.flatten(0, 1)[weights.flatten() != 0].std(dim=0)
    assert spread.min() > 1e-3, "all points are the same"


@pytest.mark.parametrize("case", CASES)
def test_no_neighbour_changes_a_samples_features(case: str) -> None:
    encoder, inputs = make(case), CASES[case][2]()
    loss = WPSELoss(features=16)
    together = loss.embed([encoder(inputs)], None)[0]
    alone = torch.cat([loss.embed([encoder(rows(inputs, row))], None)[0] for row in range(5)])
    assert (together - alone).abs().max() < 1e-5
    assert together.std(dim=0).max() > 1e-2, "all samples are the same"


@pytest.mark.parametrize("case", CASES)
def test_all_precisions(case: str) -> None:
    encoder, inputs = make(case), CASES[case][2]()
    loss = WPSELoss(features=16)
    want = loss.embed([encoder(inputs)], None)[0].detach()
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.1)):
        cast = inputs if isinstance(inputs, Padded) else inputs.to(dtype)
        emitted = encoder.to(dtype)(cast)
        assert emitted.vectors.dtype == emitted.weights.dtype == dtype
        found = loss.embed([emitted], None)[0]
        assert (found - want).abs().max() < tolerance * max(1.0, float(want.abs().max()))
        found.square().sum().backward()
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        encoder.zero_grad(set_to_none=True)


@pytest.mark.parametrize("case", CASES)
def test_the_weights_alone_are_saved(case: str) -> None:
    encoder = make(case)
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in encoder.modules())


@pytest.mark.parametrize("case", ["vit", "transformer"])
def test_layers_can_be_computed_twice(case: str) -> None:
    inputs = CASES[case][2]()

    def gradients(encoder: nn.Module) -> list[Tensor]:
        emitted: PointSet = encoder(inputs)
        return list(
            torch.autograd.grad(emitted.vectors.square().sum() + emitted.weights.sum(), [*encoder.parameters()])
        )

    plain, twice = make(case), make(case)
    assert recompute_parts(twice)
    for want, found in zip(gradients(plain), gradients(twice), strict=True):
        assert torch.equal(want, found)


def test_weights_follow_the_formula() -> None:
    head = PointHead(4, DIM, largest_weight=2.0)
    tokens = 3 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    vectors, weights, _ = head(tokens)
    raw = (tokens @ head.weights.weight.T).squeeze(2)
    assert torch.allclose(weights, 2 * torch.tanh(raw / 2)) and weights.abs().max() <= 2
    assert torch.allclose(vectors, tokens @ head.vectors.weight.T)


def test_landmarks_are_the_same_in_every_encoder_and_stay() -> None:
    options: dict[str, Any] = {"width": 8, "points": 5, "landmarks": True}
    first = Points(DIM, {"name": "mlp", "input_dim": 3}, **options)
    second = Points(DIM, {"name": "mlp", "input_dim": 4, "hidden": [6]}, **options)
    one, other = first(torch.randn(2, 3)), second(torch.randn(7, 4))
    assert one.vectors.shape == (2, 5, DIM) and one.sizes.tolist() == [5, 5]
    assert torch.equal(one.vectors[0], other.vectors[-1]) and torch.equal(one.vectors[0], one.vectors[1])
    assert torch.allclose(one.vectors[0].norm(dim=1), torch.ones(5))
    assert torch.pdist(one.vectors[0]).min() > 0.1
    assert [name for name, _ in first.head.named_parameters()] == ["weights.weight"]
    assert "head.vectors.vectors" not in first.state_dict()
    with torch.device("meta"):
        empty = Points(DIM, {"name": "mlp", "input_dim": 3}, **options)
    for again in (empty.to_empty(device="cpu"), first.bfloat16().float()):
        assert torch.equal(again.head.vectors(torch.zeros(1, 5, 8)), one.vectors[:1])


def test_published_padding_counts_and_has_embeddings_of_its_own() -> None:
    encoder, (values, _) = make("transformer"), texts()
    short, longer = (Padded(values[1:2], torch.tensor([length])) for length in (5, 6))
    embedding = encoder.model.get_input_embeddings()
    assert embedding.num_embeddings == 60 + 12
    encoder(short).vectors.sum().backward()
    used = {row for row in range(72) if embedding.weight.grad[row].any()}
    assert used == {*values[1, :5].tolist(), *range(60, 67)}, "padding position k has the embedding 60 + k"
    assert not torch.allclose(encoder(short).vectors[:, 5:], encoder(longer).vectors[:, 5:])


def test_positions_matter() -> None:
    text, (values, lengths) = make("text"), texts()
    reversed_ = Padded(values[1:2].flip(1), lengths[1:2])
    loss = WPSELoss(features=16)
    forward, backward = (loss.embed([text(p)], None)[0] for p in (Padded(values[1:2], lengths[1:2]), reversed_))
    assert (forward - backward).abs().max() > 1e-3
    left = torch.zeros(2, 1, 8, 16)
    left[0, 0, 2:6, 2:6] = left[1, 0, 2:6, 10:14] = 1
    for case in ("image", "vit"):
        first, second = loss.embed([make(case)(left)], None)[0]
        assert (first - second).abs().max() > 1e-3, case


def test_a_pretrained_model_of_sequences(tmp_path: Path) -> None:
    inputs = texts()
    inputs = Padded(inputs.values % 50, inputs.lengths)
    of_text = {"name": "pretrained", "model": str(save_text(tmp_path / "text")), "pooling": "none", "projection": False}
    Points.check(encoder=of_text, width=16)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        Points.check(encoder={**of_text, "model": "./nowhere"})
    with pytest.raises(ValueError, match="unknown option 'pool'"):
        Points.check(encoder={**of_text, "pool": "none"})
    encoder = build("points", {"encoder": of_text, "width": 16, "points": None}, ENCODERS, "encoder", embedding_dim=DIM)
    vectors, weights, sizes = encoder(inputs)
    assert vectors.shape == (5, 12, DIM) and sizes.tolist() == [1, 12, 5, 7, 2] and not weights[0, 1:].any()
    of_images = {**of_text, "model": str(save_clip(tmp_path / "clip")), "part": "vision"}
    encoder = build(
        "points", {"encoder": of_images, "width": 24, "points": None}, ENCODERS, "encoder", embedding_dim=DIM
    )
    assert encoder(torch.randn(2, 3, 16, 16)).vectors.shape == (2, 5, DIM) and encoder.checkpointed()


def test_what_does_not_go_together_is_told() -> None:
    for case, inputs, words in [
        ("image", texts(), "ImagePoints"),
        ("vit", texts(), "ViTPoints"),
        ("text", images(), "TextPoints"),
        ("transformer", images(), "TextTransformerPoints"),
    ]:
        with pytest.raises(TypeError, match=words):
            make(case)(inputs)
    with pytest.raises(
        ValueError, match="a text of 13 tokens, context_length is 12: set the transform's max_length to 12"
    ):
        make("transformer")(Padded(torch.ones(1, 13).long(), torch.tensor([13])))
    # One id more would be the embedding of a padding position.
    transformer = make("transformer")
    with pytest.raises(ValueError, match=f"the encoder knows 0 to {transformer.vocabulary - 1}"):
        transformer(Padded(torch.full((1, 2), transformer.vocabulary), torch.tensor([2])))
    with pytest.raises(ValueError, match="a multiple of patch_size"):
        ViTPoints(DIM, image_size=30, patch_size=16, width=16, layers=1, heads=2)
    for options, words in [
        ({"encoder": "image_convnet", "points": None}, "the encoder emits a vector, set how many points"),
        ({"encoder": {"name": "image_convnet", "grid": [1]}}, "grid must be"),
        ({"encoder": {"width": 3}}, "should be a name, or a map with a name"),
        ({"encoder": "image_convnt"}, "did you mean 'image_convnet'"),
        ({"encoder": "image_convnet", "points": 0}, "points must be at least 1"),
        ({"encoder": "image_convnet", "points": None, "landmarks": True}, "landmarks go with a number of points"),
        ({"encoder": "image_convnet", "landmarks": "yes"}, "landmarks = 'yes' should be true or false"),
        ({"encoder": "image_convnet", "largest_weight": 0}, "largest_weight must be positive"),
        ({"encoder": "image_convnet", "largest_weight": float("inf")}, "largest_weight must be positive and finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            build("points", options, ENCODERS, "encoder", embedding_dim=DIM)(images())
    for name in ("vit_points", "text_transformer_points"):
        with pytest.raises(ValueError, match="multiple of heads"):
            build(name, {"width": 10, "heads": 3}, ENCODERS, "encoder", embedding_dim=DIM)
