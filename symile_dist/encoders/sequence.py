"""A small transformer over sequences of features, as MultiBench has it (arXiv 2107.07502, `Transformer`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symile_dist.types import Inputs, Padded


class FeatureTransformer(nn.Module):
    """(n, T, input_dim) or `Padded` -> (n, embedding_dim), what the last step has become after some layers.

    The steps are projected to embedding_dim, and have no positions beside what their features tell. Of a padded
    sequence the padding is not seen, and its own last step counts.

    Raises ValueError unless embedding_dim is a multiple of `heads`, and for what is no sequence of such features.
    """

    def __init__(
        self,
        embedding_dim: int,
        input_dim: int,
        layers: int = 5,
        heads: int = 5,
        feedforward: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if heads < 1 or embedding_dim % heads:
            raise ValueError(f"model.embedding_dim = {embedding_dim} is no multiple of heads = {heads}")
        self.projection = nn.Linear(input_dim, embedding_dim, bias=False)
        self.layers = nn.ModuleList(_Layer(embedding_dim, heads, feedforward, dropout) for _ in range(layers))

    def forward(self, inputs: Inputs) -> Tensor:
        values, width = inputs.values if isinstance(inputs, Padded) else inputs, self.projection.in_features
        if values.ndim != 3 or values.shape[1] == 0 or values.shape[2] != width:
            raise ValueError(f"FeatureTransformer: the inputs are {tuple(values.shape)}, not (n, T, {width})")
        if isinstance(inputs, Padded):
            last = inputs.lengths.clamp(min=1) - 1
            seen = torch.arange(inputs.values.shape[1], device=last.device) <= last[:, None]
            steps = self._through(inputs.values, seen)
            return steps[torch.arange(len(steps), device=last.device), last]
        return self._through(inputs, None)[:, -1]

    def _through(self, values: Tensor, seen: Tensor | None) -> Tensor:
        steps: Tensor = self.projection(values)
        for layer in self.layers:
            steps = layer(steps, seen)
        return steps


class _Layer(nn.Module):
    """Self-attention, then two linear layers, each added to what came in and normalised."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, steps: Tensor, seen: Tensor | None) -> Tensor:
        """(n, T, width) and (n, T) flags of what is no padding, if any -> (n, T, width)"""
        # (n, T, 3 width) -> three of (n, heads, T, width / heads)
        parts = self.into(steps).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if seen is None else seen[:, None, None]
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=mask, dropout_p=dropout)
        steps = self.first_norm(steps + self.dropout(self.out(attended.transpose(1, 2).flatten(2))))
        wide = self.dropout(self.wide(steps).relu())
        normalized: Tensor = self.second_norm(steps + self.dropout(self.narrow(wide)))
        return normalized
