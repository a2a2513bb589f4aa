"""Convolutions over characters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from symile_dist.encoders.masked import MaskedConv, MaskedPool, length_mask
from symile_dist.types import CHARACTER_VOCABULARY, Inputs, Padded


def check_ids(ids: Tensor, known: int) -> None:
    """Raises ValueError unless all ids are 0 to known - 1.

    An embedding would say "index out of range", and on a GPU end the process; or take another's row for it.
    """
    if torch.compiler.is_compiling() or ids.numel() == 0:
        return
    lowest, highest = (int(found) for found in torch.aminmax(ids))
    if lowest < 0 or highest >= known:
        raise ValueError(
            f"an id is {lowest if lowest < 0 else highest}, the encoder knows 0 to {known - 1}: is it the tokenizer's?"
        )


class TextConvNet(nn.Module):
    """Character embedding -> dilated convolutions -> masked pooling -> linear.

    A position sees 1 + (kernel - 1) * sum(dilations) characters: with the defaults 31, enough for a two-word name in
    any script, so that one position can bind the script, the first and the second word.
    """

    def __init__(
        self,
        embedding_dim: int,
        vocabulary_size: int = CHARACTER_VOCABULARY,
        width: int = 64,
        kernel: int = 3,
        dilations: Sequence[int] = (1, 2, 4, 8),
        pooled: int = 256,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width, padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.layers = nn.ModuleList([MaskedConv(width, width, kernel, dilation=dilation) for dilation in dilations])
        # As many detectors as there are things to tell apart: the pooling forgets where each of them fired.
        self.layers.append(MaskedConv(width, pooled, 1))
        self.pool = MaskedPool(pooled)
        self.projection = nn.Linear(2 * pooled, embedding_dim)

    def forward(self, inputs: Inputs) -> Tensor:
        """`Padded` of (n, T) int64 character ids -> (n, embedding_dim).

        Raises TypeError for a plain tensor, ValueError for an id that it does not know.
        """
        if not isinstance(inputs, Padded):
            raise TypeError("TextConvNet takes sequences of unequal length (types.Padded), not a tensor")
        check_ids(inputs.values, self.embedding.num_embeddings)
        lengths = inputs.lengths
        values = self.embedding(inputs.values).transpose(1, 2)
        values = values * length_mask(lengths, values.shape[2]).to(values.dtype)
        for layer in self.layers:
            values, lengths = layer(values, lengths)
        return self.projection(self.pool(values, lengths))
