"""Encoders that emit weighted point sets (WPSE, arXiv 2404.19228): one point, with a signed weight, per token.

Their vectors need no normalisation at the end: the objective brings every point to unit length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from symile_dist.encoders.image import ImageConvNet, check_channels
from symile_dist.encoders.masked import length_mask
from symile_dist.encoders.pretrained import layers_of
from symile_dist.encoders.text import TextConvNet, check_ids
from symile_dist.hub import import_transformers
from symile_dist.registry import ENCODERS, build, check_options, resolve
from symile_dist.seeding import philox
from symile_dist.types import Inputs, Padded, PointSet


class Landmarks(nn.Module):
    """Places that do not depend on the sample: the j-th point is at the j-th of `count` fixed unit vectors.

    They lie about at random, and are the same in every encoder that has as many of the same dimension.
    """

    vectors: Tensor

    def __init__(self, count: int, embedding_dim: int) -> None:
        super().__init__()
        self.count, self.embedding_dim = count, embedding_dim
        self.register_buffer("vectors", torch.empty(0), persistent=False)
        self._fill(torch.empty(0).device)

    def _fill(self, device: torch.device) -> None:
        drawn = np.random.Generator(philox("landmarks")).standard_normal((self.count, self.embedding_dim))
        unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        self.vectors = torch.from_numpy(unit.astype(np.float32)).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Module.bfloat16() would round them, and to_empty() would lose them: they are made anew.
        super()._apply(fn, recurse)
        self._fill(self.vectors.device)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, count, width) tokens -> (n, count, D)."""
        return self.vectors.to(tokens.dtype).expand(len(tokens), -1, -1)


class PointHead(nn.Module):
    """Tokens x_j -> points v_j = W_v x_j with weights w_j = a tanh(W_w x_j / a), a being the largest weight.

    arXiv 2404.19228, section 5; initialised as the authors' public code has it. With `landmarks`, their number, the
    tokens give the weights alone.
    """

    def __init__(
        self, width: int, embedding_dim: int, largest_weight: float = 100.0, landmarks: int | None = None
    ) -> None:
        super().__init__()
        if not 0 < largest_weight < float("inf"):  # infinity times tanh(w / infinity) is not a number
            raise ValueError(f"largest_weight must be positive and finite, not {largest_weight}")
        self.largest_weight = float(largest_weight)
        self.vectors = Landmarks(landmarks, embedding_dim) if landmarks else nn.Linear(width, embedding_dim, bias=False)
        self.weights = nn.Linear(width, 1, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=width**-0.5)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> PointSet:
        """(n, T, width) tokens, of which the first (n,) `lengths` count, all of them when left out."""
        vectors = self.vectors(tokens)
        weights = self.largest_weight * torch.tanh(self.weights(tokens).squeeze(2) / self.largest_weight)
        if lengths is None:
            return PointSet(vectors, weights, lengths_of(tokens))
        mask = length_mask(lengths, tokens.shape[1]).squeeze(1)
        return PointSet(vectors, weights.masked_fill(~mask, 0.0), lengths)


def lengths_of(tokens: Tensor) -> Tensor:
    """(n, T, ...) -> (n,) int64: T."""
    return torch.full((len(tokens),), tokens.shape[1], dtype=torch.int64, device=tokens.device)


class Points(nn.Module):
    """Any other encoder with a head of points.

    Of one that emits a vector as many points are made as `points` says, each of which sees the whole sample. Of one
    that emits a sequence (`pretrained` with pooling none and projection false), every position is a point.

    Parameters:
        encoder: name of the other encoder, or its name and options as in the config.
        width: length of the vectors that it emits.
        points: how many of a vector; null for an encoder that emits a sequence.
        largest_weight: in absolute value.
        landmarks: the points of a vector stay at fixed places, the same in all modalities, and only their weights are
            learned. Points that learn their places tend to gather in one, where they can say one thing only.
    """

    def __init__(
        self,
        embedding_dim: int,
        encoder: str | Mapping[str, Any],
        width: int = 256,
        points: int | None = 8,
        largest_weight: float = 100.0,
        landmarks: bool = False,
    ) -> None:
        super().__init__()
        if points is not None and points < 1:
            raise ValueError(f"points must be at least 1, not {points}")
        if landmarks and points is None:
            raise ValueError(
                "landmarks go with a number of points: positions of a sequence have no places of their own"
            )
        name, options = _name_and_options(encoder)
        self.encoder = build(name, options, ENCODERS, "encoder", embedding_dim=width)
        self.takes_float32 = getattr(self.encoder, "takes_float32", False)
        self.takes_present = getattr(self.encoder, "takes_present", False)
        self.width = width
        self.tokens = None
        if points:
            self.tokens = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, points * width), nn.GELU())
        self.head = PointHead(width, embedding_dim, largest_weight, points if landmarks else None)

    @staticmethod
    def check(encoder: str | Mapping[str, Any], **options: object) -> None:
        """Raises ValueError unless the other encoder can be had."""
        name, own = _name_and_options(encoder)
        target = resolve(name, ENCODERS, "encoder")
        check_options(target, own, "encoder", name, ("embedding_dim",))
        if hasattr(target, "check"):
            target.check(**own)

    def checkpointed(self) -> list[nn.Module]:
        """The parts that train.activation_checkpointing computes twice: those of the encoder, if it names any."""
        parts: list[nn.Module] = self.encoder.checkpointed() if hasattr(self.encoder, "checkpointed") else []
        return parts

    def forward(self, inputs: Inputs, *present: Tensor) -> PointSet:
        """What the encoder takes -> n sets of `points` points, or of as many as a sequence has positions.

        Raises ValueError where `width` or `points` does not go with what the encoder emits.
        """
        emitted = self.encoder(inputs, *present)
        tokens, lengths = emitted if isinstance(emitted, Padded) else (emitted, None)
        if tokens.shape[-1] != self.width:
            raise ValueError(
                f"encoder 'points': width is {self.width}, the encoder emits vectors of {tokens.shape[-1]}"
            )
        if (tokens.ndim == 2) != (self.tokens is not None):
            raise ValueError(
                "encoder 'points': the encoder emits a vector, set how many points it makes"
                if tokens.ndim == 2
                else "encoder 'points': the encoder emits a sequence, whose positions are the points: set points=null"
            )
        tokens = tokens.to(self.head.weights.weight.dtype)  # encoders without weights emit float32 beside halves
        if self.tokens is not None:
            tokens = self.tokens(tokens).unflatten(1, (-1, self.width))
        return self.head(tokens, lengths)


def _name_and_options(encoder: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    options = {"name": encoder} if isinstance(encoder, str) else dict(encoder)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError("encoder: should be a name, or a map with a name and the encoder's options")
    return name, options


class ImagePoints(nn.Module):
    """Convolutions over a small image -> a grid of tokens, a point each.

    A token is made of its place in the grid, what is there, and the mean over the image.
    """

    def __init__(
        self,
        embedding_dim: int,
        channels: int = 1,
        widths: Sequence[int] = (32, 64),
        grid: Sequence[int] = (4, 8),
        hidden: int = 128,
        largest_weight: float = 100.0,
    ) -> None:
        super().__init__()
        net = ImageConvNet(1, channels, widths, grid)
        self.stages, self.pool, self.channels = net.stages, net.pool, channels
        self.local = nn.Linear(widths[-1], hidden)
        self.whole = nn.Linear(widths[-1] * int(grid[0]) * int(grid[1]), hidden, bias=False)
        self.positions = nn.Parameter(0.5 * torch.randn(int(grid[0]) * int(grid[1]), hidden))
        self.mix = nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.head = PointHead(hidden, embedding_dim, largest_weight)

    def forward(self, inputs: Inputs) -> PointSet:
        """(n, channels, H, W) -> n sets of rows * columns of the grid.

        Raises TypeError for `Padded`, ValueError for other channels.
        """
        if isinstance(inputs, Padded):
            raise TypeError("ImagePoints takes images of one size (a tensor), not sequences of unequal length")
        check_channels(inputs, self.channels)
        features = self.pool(self.stages(inputs)).flatten(2)  # (n, C, T)
        tokens = self.local(features.transpose(1, 2)) + self.whole(features.flatten(1))[:, None] + self.positions
        return self.head(self.mix(tokens))


class TextPoints(nn.Module):
    """Convolutions over characters, a point per character; options as of `TextConvNet`."""

    def __init__(
        self,
        embedding_dim: int,
        width: int = 64,
        kernel: int = 3,
        dilations: Sequence[int] = (1, 2, 4, 8),
        hidden: int = 128,
        largest_weight: float = 100.0,
    ) -> None:
        super().__init__()
        net = TextConvNet(1, width=width, kernel=kernel, dilations=dilations, pooled=hidden)
        self.embedding, self.layers = net.embedding, net.layers
        self.norm = nn.LayerNorm(hidden)
        self.head = PointHead(hidden, embedding_dim, largest_weight)

    def forward(self, inputs: Inputs) -> PointSet:
        """`Padded` of (n, T) int64 character ids -> n sets, of a point per character.

        Raises TypeError for a tensor, ValueError for an id that it does not know.
        """
        if not isinstance(inputs, Padded):
            raise TypeError("TextPoints takes sequences of unequal length (types.Padded), not a tensor")
        check_ids(inputs.values, self.embedding.num_embeddings)
        values, lengths = self.embedding(inputs.values).transpose(1, 2), inputs.lengths
        values = values * length_mask(lengths, values.shape[2]).to(values.dtype)
        for layer in self.layers:
            values, lengths = layer(values, lengths)
        return self.head(self.norm(values.transpose(1, 2)), lengths)


class ViTPoints(nn.Module):
    """A vision transformer from scratch, a point per patch and one for the class token.

    The defaults are ViT-B/16 at 224 pixels, with 197 points, as arXiv 2404.19228 has it.
    """

    model: Any

    def __init__(
        self,
        embedding_dim: int,
        image_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        channels: int = 3,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        largest_weight: float = 100.0,
    ) -> None:
        super().__init__()
        transformers = import_transformers()
        if width % heads:
            raise ValueError(f"width = {width} should be a multiple of heads = {heads}")
        sizes = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sizes) != 2 or any(size < patch_size or size % patch_size for size in sizes):
            raise ValueError(f"image_size = {image_size} should be a multiple of patch_size = {patch_size}")
        config = transformers.ViTConfig(
            image_size=sizes,
            patch_size=patch_size,
            num_channels=channels,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            layer_norm_eps=1e-6,
        )
        self.model = transformers.ViTModel(config, add_pooling_layer=False)
        self.head = PointHead(width, embedding_dim, largest_weight)

    def checkpointed(self) -> list[nn.Module]:
        """The parts that train.activation_checkpointing computes twice."""
        return layers_of(self.model)

    def forward(self, inputs: Inputs) -> PointSet:
        """(n, channels, H, W) -> n sets of 1 + H W / patch_size^2 points.

        Raises TypeError for `Padded`, ValueError for another size or other channels.
        """
        if isinstance(inputs, Padded):
            raise TypeError("ViTPoints takes images of one size (a tensor), not sequences of unequal length")
        check_channels(inputs, self.model.config.num_channels)
        return self.head(self.model(pixel_values=inputs).last_hidden_state)


class TextTransformerPoints(nn.Module):
    """CLIP's text transformer from scratch, with causal attention, a point per position.

    The defaults are those of arXiv 2404.19228, where all 77 positions count, padding included, whose positions have
    embeddings of their own, by their distance from the text's end. Texts are padded to `context_length` whatever their
    neighbours' lengths are, so that a sample does not depend on them.

    Parameters:
        vocabulary: number of ids, those of CLIP's tokenizer by default.
        context_length: positions, special tokens and padding included.
        count_padding: padding makes points as well, as published; else a text has as many as it has tokens.
    """

    model: Any

    def __init__(
        self,
        embedding_dim: int,
        vocabulary: int = 49408,
        context_length: int = 77,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        count_padding: bool = True,
        largest_weight: float = 100.0,
    ) -> None:
        super().__init__()
        transformers = import_transformers()
        if width % heads:
            raise ValueError(f"width = {width} should be a multiple of heads = {heads}")
        self.vocabulary, self.context_length, self.count_padding = vocabulary, context_length, count_padding
        config = transformers.CLIPTextConfig(
            vocab_size=vocabulary + (context_length if count_padding else 0),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=context_length,
            layer_norm_eps=1e-6,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=vocabulary - 1,
        )
        self.model = transformers.CLIPTextModel(config)
        self.head = PointHead(width, embedding_dim, largest_weight)

    def checkpointed(self) -> list[nn.Module]:
        """The parts that train.activation_checkpointing computes twice."""
        return layers_of(self.model)

    def forward(self, inputs: Inputs) -> PointSet:
        """`Padded` of (n, T) int64 ids -> n sets of points.

        Raises TypeError for a tensor, ValueError for texts longer than `context_length` and ids beyond `vocabulary`.
        """
        if not isinstance(inputs, Padded) or inputs.values.is_floating_point():
            raise TypeError("TextTransformerPoints takes token ids (types.Padded): use the transform `tokens`")
        values, lengths = inputs
        check_ids(values, self.vocabulary)
        missing = self.context_length - values.shape[1]
        if missing < 0:
            raise ValueError(
                f"TextTransformerPoints: a text of {values.shape[1]} tokens, context_length is {self.context_length}: "
                f"set the transform's max_length to {self.context_length}"
            )
        ids = nn.functional.pad(values, (0, missing))
        beyond = torch.arange(self.context_length, device=ids.device) - lengths[:, None]
        ids = torch.where(beyond < 0, ids, self.vocabulary + beyond if self.count_padding else 0)
        tokens = self.model(input_ids=ids).last_hidden_state
        return self.head(tokens, None if self.count_padding else lengths)


__all__ = [
    "ImagePoints",
    "Landmarks",
    "PointHead",
    "Points",
    "TextPoints",
    "TextTransformerPoints",
    "ViTPoints",
    "lengths_of",
]
