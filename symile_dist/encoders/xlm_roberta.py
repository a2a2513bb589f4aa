"""The first layers of XLM-R as a text encoder (Symile-M3)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from symile_dist.encoders.pretrained import check_model, layers_of, load_model
from symile_dist.encoders.text import check_ids
from symile_dist.types import Inputs, Padded


class XLMRobertaEncoder(nn.Module):
    """Token ids -> XLM-R's embeddings and first layer, all of it trained -> linear map -> mean over **all** positions.

    As Symile-M3 has it (arXiv 2411.01053, section 5.2): attention does not see padding, but the mean counts it. So that
    a sample does not depend on its neighbours all texts are padded to one length, `max_length`.

    Parameters:
        model: folder that `save_pretrained` wrote, or a name on the hub; only the layers in use are read.
        revision: branch, tag or commit on the hub.
        layers: how many.
        max_length: positions of a text, its special tokens and padding included. Ids that come as a tensor (n, T) are
            padded to it already, and it may be left out.
        missing_token: add the token [MISSING] to the vocabulary; it stands in a text's place where a sample has none.

    Raises ValueError for a model that is not there, lacks weights, or is not XLM-R.
    """

    loads_weights: ClassVar[bool] = True
    takes_present = True
    model: Any

    def __init__(
        self,
        embedding_dim: int,
        model: str = "FacebookAI/xlm-roberta-large",
        revision: str = "main",
        layers: int = 1,
        max_length: int | None = None,
        missing_token: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers should be 1 or more, not {layers}")
        self.check(model, revision)
        self.model = load_model(model, revision, num_hidden_layers=layers, add_pooling_layer=False)
        config = self.model.config
        self.longest = int(config.max_position_embeddings - config.pad_token_id - 1)
        if max_length is not None and not 3 <= max_length <= self.longest:
            raise ValueError(
                f"max_length should be 3 to {self.longest}, as many positions as {model} knows, not {max_length}"
            )
        self.max_length = max_length
        self.missing_id: int | None = config.vocab_size if missing_token else None
        if missing_token:
            self.model.resize_token_embeddings(config.vocab_size + 1, mean_resizing=False)
        self.projection = nn.Linear(config.hidden_size, embedding_dim)

    @staticmethod
    def check(model: str = "FacebookAI/xlm-roberta-large", revision: str = "main", **options: object) -> None:
        """Raises ValueError unless the model can be had and is XLM-R."""
        kind = check_model(model, revision).model_type
        if kind != "xlm-roberta":
            raise ValueError(f"{model}: is of the type {kind}, not xlm-roberta")

    def checkpointed(self) -> list[nn.Module]:
        """The parts that train.activation_checkpointing computes twice."""
        return layers_of(self.model)

    def forward(self, inputs: Inputs, present: Tensor | None = None) -> Tensor:
        """Ids (n, T), or `Padded`, and (n,) flags, all present when left out -> (n, embedding_dim).

        Raises TypeError for numbers that are no ids, ValueError for texts that are too long or have no common length,
        and for ids that the model does not know.
        """
        ids = self._ids(inputs)
        if self.missing_id is not None and present is not None:
            ids = torch.where(present[:, None], ids, self._missing(ids))
        mask = ids != self.model.config.pad_token_id
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        # The mean of the tokens' linear maps is the map of their mean, for a T-th of the work.
        projected: Tensor = self.projection(hidden.float().mean(1).to(hidden.dtype))
        return projected

    def _ids(self, inputs: Inputs) -> Tensor:
        """(n, max_length)"""
        padding = int(self.model.config.pad_token_id)
        ids = inputs.values if isinstance(inputs, Padded) else inputs
        if ids.is_floating_point() or ids.dim() != 2:
            raise TypeError(
                "XLMRobertaEncoder takes token ids (n, T): the transform `tokens`, or `tensor` with dtype int64"
            )
        if isinstance(inputs, Padded):
            if self.max_length is None:
                raise ValueError(
                    "XLMRobertaEncoder: its mean counts padding too, so texts of unequal length need max_length, to "
                    "which all of them are padded"
                )
            ids = ids.masked_fill(~inputs.mask(), padding)
        check_ids(ids, int(self.model.config.vocab_size))
        length = self.max_length or ids.shape[1]
        if ids.shape[1] > length:
            raise ValueError(f"XLMRobertaEncoder: texts of {ids.shape[1]} tokens, max_length is {length}")
        if not 3 <= length <= self.longest:
            raise ValueError(f"XLMRobertaEncoder: texts of {length} tokens, it knows 3 to {self.longest}")
        return nn.functional.pad(ids, (0, length - ids.shape[1]), value=padding)

    def _missing(self, ids: Tensor) -> Tensor:
        """(T,): [MISSING] as the tokenizer would write it."""
        config = self.model.config
        row = ids.new_full((ids.shape[1],), config.pad_token_id)
        row[:3] = ids.new_tensor([config.bos_token_id, self.missing_id, config.eos_token_id])
        return row


__all__ = ["XLMRobertaEncoder"]
