"""Text -> token ids, by a tokenizer of Hugging Face's."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from symile_dist.hub import unavailable


class TokensTransform:
    """Text -> int64 (T,): the ids of a tokenizer, its special tokens included, at most `max_length`.

    Parameters:
        model: folder that holds the tokenizer's files, or a name on the hub.
        revision: branch, tag or commit on the hub.
        max_length: longer texts are cut.

    Raises ValueError for a tokenizer that is not there or has no vocabulary, and for a `max_length` that its special
    tokens alone take.
    """

    uses_rng: ClassVar[bool] = False
    variable_length: ClassVar[bool] = True

    def __init__(self, model: str, revision: str = "main", max_length: int = 128) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self.model, self.revision, self.max_length = model, revision, max_length
        self._tokenizer = self._load()
        special = int(self._tokenizer.num_special_tokens_to_add())
        if max_length <= special:
            raise ValueError(f"max_length = {max_length}: {model} adds {special} special tokens, it should be more")

    def _load(self) -> Any:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model, revision=self.revision, trust_remote_code=False)
        except Exception as error:  # OSError for most, but also what the hub's client raises
            raise unavailable(self.model, "no tokenizer can be loaded", error) from error
        # Where a model has no tokenizer's files transformers makes an empty one, to which all words are unknown.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError(
                f"{self.model}: holds no tokenizer, whose files (tokenizer.json, or its vocabulary) stand beside the "
                "model's where its own save_pretrained wrote them"
            )
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Loaded anew in a loader process: not every tokenizer can be pickled.
        self.__dict__.update(state)
        self._tokenizer = self._load()

    def __call__(self, decoded: str, rng: np.random.Generator | None) -> Tensor:
        ids = self._tokenizer(decoded, truncation=True, max_length=self.max_length)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)
