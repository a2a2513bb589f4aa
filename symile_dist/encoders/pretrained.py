"""Hugging Face models as encoders: images, token ids or Whisper's features -> one vector per sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from symile_dist.encoders.image import check_channels
from symile_dist.encoders.text import check_ids
from symile_dist.hub import import_transformers, reads_weights, unavailable, weights_in
from symile_dist.types import Inputs, Padded

Pooling = Literal["pooler", "cls", "mean", "none"]
_PARTS = {"vision": "vision_model", "text": "text_model", "encoder": "encoder"}


class PretrainedEncoder(nn.Module):
    """A model of Hugging Face's transformers, its output pooled, then mapped to the embedding.

    Takes what its model takes: images (n, C, H, W) from the transform `image`, token ids from `tokens`, log-mel frames
    from `whisper_features`. Weights are read from safetensors only: nothing is unpickled, and no code that a model
    brings along is run.

    Parameters:
        model: folder that `save_pretrained` wrote, or a name on the hub (which is asked where it is not cached).
        revision: branch, tag or commit on the hub: a commit keeps the weights what they are.
        part: of a model of several parts the one that encodes: `vision` or `text` of CLIP, `encoder` of Whisper.
        pooling: `pooler` (the model's own), `cls` (the first position), `mean` (over the positions that hold data), or
            `none` (all positions: for `symile-dist shards encode`, and for `points`).
        projection: a linear map to the embedding; without it the output has the model's own width.
        frozen: the model's weights stay as they are, in evaluation mode, and only the projection is trained.

    Raises ValueError for a model that is not there, lacks weights, or does not go with the options.
    """

    loads_weights: ClassVar[bool] = True
    """Its weights are trained ones: `symile-dist shards encode` need not warn."""
    model: Any

    def __init__(
        self,
        embedding_dim: int,
        model: str,
        revision: str = "main",
        part: Literal["vision", "text", "encoder"] | None = None,
        pooling: Pooling = "mean",
        projection: bool = True,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in ("pooler", "cls", "mean", "none"):
            raise ValueError(f"pooling must be pooler, cls, mean or none, not '{pooling}'")
        if pooling == "none" and projection:
            raise ValueError("pooling=none emits sequences: set projection=false (for `shards encode` or `points`)")
        if part is not None and part not in _PARTS:
            raise ValueError(f"part must be vision, text or encoder, not '{part}'")
        self.pooling, self.frozen = pooling, frozen
        self.model = load_model(model, revision, part, pooling)
        self.input = str(self.model.main_input_name)
        if self.input not in ("pixel_values", "input_ids", "input_features"):
            raise ValueError(f"{model}: takes '{self.input}': only images, token ids and Whisper's features are known")
        width = int(self.model.config.hidden_size)
        self.projection = nn.Linear(width, embedding_dim) if projection else nn.Identity()
        if frozen:
            self.model.requires_grad_(False).eval()

    @staticmethod
    def check(model: str, revision: str = "main", **options: object) -> None:
        """Raises ValueError unless the model can be had."""
        check_model(model, revision)

    def checkpointed(self) -> list[nn.Module]:
        """The parts that train.activation_checkpointing computes twice."""
        return layers_of(self.model)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(self, inputs: Inputs) -> Tensor | Padded:
        """Images (n, C, H, W), or `Padded` ids (n, T) or frames (n, T, mels) -> (n, embedding_dim).

        Without projection (n, width); without pooling also all positions, (n, T, width), `Padded` where the inputs are.
        Raises TypeError for inputs that the model does not take.
        """
        with torch.no_grad() if self.frozen else nullcontext():
            features = self._features(inputs)
        if isinstance(features, Padded):
            return features
        projected: Tensor = self.projection(features)
        return projected

    def _features(self, inputs: Inputs) -> Tensor | Padded:
        arguments, lengths = self._arguments(inputs)
        output = self.model(**arguments)
        if self.pooling == "pooler":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ValueError(f"{type(self.model).__name__} has no pooler: choose pooling=cls or mean")
            return pooled
        hidden: Tensor = output.last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        if lengths is None:
            return hidden if self.pooling == "none" else hidden.float().mean(1).to(hidden.dtype)
        if self.pooling == "none":
            return Padded(hidden, lengths)
        mask = torch.arange(hidden.shape[1], device=hidden.device)[None, :] < lengths[:, None]
        total = (hidden.float() * mask[:, :, None]).sum(1)
        return (total / lengths.clamp(min=1)[:, None]).to(hidden.dtype)

    def _arguments(self, inputs: Inputs) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the model is called with, and the true lengths of its output; None where every position holds data."""
        if self.input == "pixel_values":
            if isinstance(inputs, Padded):
                raise TypeError("PretrainedEncoder: the model takes images of one size (a tensor), not sequences")
            check_channels(inputs, int(getattr(self.model.config, "num_channels", 3)))
            return {"pixel_values": inputs}, None
        if self.input == "input_ids":
            if not isinstance(inputs, Padded) or inputs.values.is_floating_point():
                raise TypeError(
                    "PretrainedEncoder: the model takes token ids (types.Padded): use the transform `tokens`"
                )
            mask = inputs.mask()
            padding = self.model.config.pad_token_id
            ids = inputs.values.masked_fill(~mask, 0 if padding is None else padding)
            check_ids(ids, int(self.model.get_input_embeddings().num_embeddings))
            _check_lengths(self.model, inputs.lengths)
            return {"input_ids": ids, "attention_mask": mask.long()}, inputs.lengths
        frames, mels = 2 * int(self.model.config.max_source_positions), int(self.model.config.num_mel_bins)
        given = inputs.values if isinstance(inputs, Padded) else inputs
        if given.dim() != 3 or given.shape[2] != mels:
            raise ValueError(
                f"PretrainedEncoder: the inputs are {tuple(given.shape)}, the model takes (n, T, {mels}) frames: use "
                "the transform `whisper_features` of the same model"
            )
        if not isinstance(inputs, Padded):
            return {"input_features": inputs.transpose(1, 2)}, None
        return {"input_features": _whole_window(inputs, frames)}, (inputs.lengths + 1) // 2


def _check_lengths(model: nn.Module, lengths: Tensor) -> None:
    """Raises ValueError for texts with more tokens than the model has embeddings of positions.

    An embedding would say "index out of range", and on a GPU end the process.
    """
    if torch.compiler.is_compiling() or lengths.numel() == 0:
        return
    for name, module in model.named_modules():
        known = name.endswith(("position_embeddings", "position_embedding", "embed_positions", "wpe"))
        if known and isinstance(module, nn.Embedding):
            # RoBERTa's positions begin behind that of padding.
            positions = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            if (longest := int(lengths.max())) > positions:
                raise ValueError(
                    f"PretrainedEncoder: a text of {longest} tokens, the model knows {positions} positions: set the "
                    f"transform's max_length to {positions} at most"
                )


def _whole_window(inputs: Padded, frames: int) -> Tensor:
    """(n, T, mels) frames -> (n, mels, frames): after a clip's end what Whisper's features are of silence there.

    They are (log10(max(power, 1e-10)) + 4) / 4, and at least the clip's highest value less 8 / 4.
    """
    values = inputs.values[:, :frames]
    mask = inputs.mask()[:, :frames, None]
    highest = values.masked_fill(~mask, -1.5).amax((1, 2))
    silence = (highest - 2.0).clamp(min=-1.5)[:, None, None]
    whole = silence.expand(len(values), frames, values.shape[2]).clone()
    whole[:, : values.shape[1]] = torch.where(mask, values, silence)
    return whole.transpose(1, 2)


def check_model(name: str, revision: str) -> Any:
    """A model's config. Raises ValueError unless it can be had, with what to do about it; reads no weights."""
    from transformers import AutoConfig

    _check_folder(name)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # OSError for most, but also what the hub's client raises
        raise unavailable(name, "cannot be loaded", error) from error


def _check_folder(name: str) -> None:
    folder = Path(name)
    if folder.is_dir() and reads_weights():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{name}: holds no .safetensors weights; other formats run code when they are read")
        for file in files:
            weights_in(file)
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise ValueError(f"{name}: no such folder; a model that save_pretrained wrote is needed there")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of one of transformers' models."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the table of weights that are not used: those of layers that are left away on purpose."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _trained(name: str, revision: str, options: dict[str, Any]) -> tuple[Any, list[str]]:
    """A model with its weights, and the names of those that lack."""
    with _quietly():
        model, told = import_transformers().AutoModel.from_pretrained(
            name,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    return model, list(told["missing_keys"])


def _built(name: str, revision: str, options: dict[str, Any]) -> Any:
    """A model of a config alone, with weights that are to be overwritten (`hub.weights_follow`)."""
    transformers = import_transformers()
    config, rest = transformers.AutoConfig.from_pretrained(
        name, revision=revision, trust_remote_code=False, return_unused_kwargs=True, **options
    )
    return transformers.AutoModel.from_config(config, trust_remote_code=False, **rest)


def load_model(name: str, revision: str, part: str | None = None, pooling: str = "none", **options: Any) -> nn.Module:
    """One of transformers' models, or a part of it, in float32; within `hub.weights_follow` of its config alone.

    Args:
        pooling: weights of a pooler may lack unless it is `pooler`.
        options: of its config, or of its class, that differ from what is saved.

    Raises ValueError for a model that cannot be had, lacks weights or has no such part.
    """
    _check_folder(name)
    try:
        whole, missing = _trained(name, revision, options) if reads_weights() else (_built(name, revision, options), [])
    except Exception as error:  # OSError for most, but also what safetensors and the hub's client raise
        raise unavailable(name, "cannot be loaded", error) from error
    model: Any = whole
    prefix = ""
    if part is not None:
        model, prefix = getattr(whole, _PARTS[part], None), f"{_PARTS[part]}."
        if not hasattr(model, "main_input_name"):
            raise ValueError(f"{name}: has no part '{part}' ({type(whole).__name__})")
    elif not hasattr(whole.config, "hidden_size") or getattr(whole.config, "is_encoder_decoder", False):
        has = [each for each, key in _PARTS.items() if hasattr(getattr(whole, key, None), "main_input_name")]
        raise ValueError(f"{name}: is made of several parts: set part to {' or '.join(has)}")
    missing = [key for key in missing if key.startswith(prefix)]
    missing = [key for key in missing if pooling == "pooler" or "pooler" not in key]
    if missing:
        raise ValueError(
            f"{name}: lacks weights ({missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''})"
        )
    loaded: nn.Module = model.float()  # some are stored in half precision
    return loaded


__all__ = ["PretrainedEncoder", "check_model", "layers_of", "load_model"]
