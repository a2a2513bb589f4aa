"""Options of encoders are looked at before a worker starts, without the memory and the weights that they ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from symile_dist.config import Config
from symile_dist.preflight import preflight
from symile_dist.registry import ENCODERS
from tests.pretrained import save_clip, save_text, save_whisper

MakeConfig = Callable[..., Config]


class OfOnesOwn(nn.Module):
    """Cannot be built without memory."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, embedding_dim)
        self.scale = float(self.linear.weight.abs().sum())

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, 4) -> (n, D)"""
        emitted: Tensor = self.linear(inputs)
        return emitted


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_clip(folder / "clip")
    save_text(folder / "xlm-r")
    save_whisper(folder / "whisper")
    return folder


def looked_at(make_config: MakeConfig, shards: Path, models: Path, name: str, options: dict[str, Any]) -> None:
    """Raises ValueError where `preflight` finds something wrong with an encoder; `model` is a folder in `models`."""
    given = {key: f"{models}/{value}" if key == "model" else value for key, value in options.items()}
    preflight(make_config(shards, f"modalities.a.encoder={json.dumps({'name': name, **given})}"), fresh=True)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet", {"depth": 19}, "depth must be one of 18, 34, 50, 101, 152, not 19"),
        ("resnet", {"depth": 18, "width": -4}, "encoder 'resnet'"),
        ("resnet", {"depth": 18, "channels": 0}, r"encoder 'resnet': a size is 0: 'conv1\.weight'"),
        ("mlp", {"input_dim": "4"}, "encoder 'mlp'.*right type"),
        ("mlp", {"input_dim": 4, "activation": "tanh"}, "should be gelu or relu"),
        ("features", {"input_dim": -1}, "encoder 'features'"),
        ("one_hot", {"classes": 9}, "classes = 9 should be 2 to"),
        ("vit_points", {"image_size": 225}, "image_size = 225 should be a multiple"),
        ("text_transformer_points", {"heads": 0}, "encoder 'text_transformer_points'.*zero"),
        ("points", {"encoder": {"name": "mlp", "input_dim": 4}, "points": 0}, "points must be at least 1"),
        ("points", {"encoder": {"name": "mlp", "input_dim": 4, "activation": "x"}}, "should be gelu or relu"),
        ("pretrained", {"model": "clip", "part": "vision", "pooling": "max"}, "pooling must be pooler, cls"),
        ("pretrained", {"model": "clip"}, "set part to vision or text"),
        ("pretrained", {"model": "xlm-r", "part": "text"}, "has no part 'text'"),
        ("pretrained", {"model": "xlm-r", "frozen": "some"}, "frozen = 'some' should be true or false"),
        ("xlm_roberta", {"model": "xlm-r", "layers": 0}, "layers should be 1 or more"),
        ("xlm_roberta", {"model": "xlm-r", "max_length": 99}, "max_length should be 3 to 38"),
    ],
)
def test_options_that_cannot_be(
    make_config: MakeConfig, shards: Path, models: Path, name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=f"modality 'a': .*{words}"):
        looked_at(make_config, shards, models, name, options)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ({"name": "tensor", "dtype": "float31"}, "modality 'b': 'float31' is not a type of torch"),
        (
            {"name": "tokens", "model": "./nowhere"},
            "modality 'b': ./nowhere: no tokenizer can be loaded: no such folder",
        ),
    ],
)
def test_a_wrong_transform_is_told_once(
    make_config: MakeConfig, shards: Path, transform: dict[str, str], words: str
) -> None:
    with pytest.raises(ValueError) as told:
        preflight(make_config(shards, f"modalities.b.transform={json.dumps(transform)}"), fresh=True)
    assert str(told.value) == words


GOOD: dict[str, dict[str, Any]] = {
    "mlp": {"input_dim": 4},
    "feature_transformer": {"input_dim": 4, "heads": 2},
    "one_hot": {"classes": 3},
    "features": {"input_dim": 4, "fill": "learned"},
    "xlm_roberta": {"model": "xlm-r", "missing_token": True},
    "pretrained": {"model": "clip", "part": "vision", "pooling": "pooler", "frozen": True},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_can_be_built_without_memory(
    make_config: MakeConfig, shards: Path, models: Path, name: str
) -> None:
    options = GOOD.get(name, {})
    if name == "points":
        held = {"name": "pretrained", "model": f"{models}/whisper", "part": "encoder"}
        options = {"encoder": {**held, "pooling": "none", "projection": False}, "points": None, "width": 16}
    looked_at(make_config, shards, models, name, options)


@pytest.mark.parametrize("name", ["own", "points"])
def test_encoders_of_one_s_own_are_not_built(make_config: MakeConfig, shards: Path, models: Path, name: str) -> None:
    own = f"{__name__}:OfOnesOwn"
    looked_at(make_config, shards, models, *((name, {"encoder": own}) if name == "points" else (own, {})))
