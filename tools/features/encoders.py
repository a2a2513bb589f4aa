"""The frozen encoders of a recipe: built, identified by their weights, run over a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from symile_dist.data.batches import collate
from symile_dist.errors import RunFailed
from symile_dist.model import in_precision_of
from symile_dist.registry import ENCODERS, build
from symile_dist.seeding import philox
from symile_dist.tools.features.recipe import Recipe
from symile_dist.types import Padded


class FrozenEncoders:
    """One encoder per modality of a recipe, in evaluation mode."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises ValueError for an encoder that cannot be built or whose weights are not there."""
        self.recipe = recipe
        self.device = torch.device(recipe.device)
        precision = torch.bfloat16 if recipe.config.train.precision == "bf16" else torch.float32
        self.encoders: dict[str, nn.Module] = {}
        for name in recipe.modalities:
            component = recipe.config.modalities[name].encoder
            # Of each modality its own seed: its weights, where random, do not depend on which others are encoded.
            torch.manual_seed(int(philox("encode", recipe.config.seed, name).random_raw() >> 1))
            encoder = build(
                component.name,
                recipe.encoder_options(name),
                ENCODERS,
                "encoder",
                embedding_dim=recipe.config.model.embedding_dim,
            )
            self.encoders[name] = encoder.eval().requires_grad_(False).to(self.device, precision)
        # cuDNN may otherwise choose another algorithm in another process, with other last digits.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True

    def digests(self) -> dict[str, str]:
        """Per modality the sha256 of its encoder's weights."""
        found = {}
        for name, encoder in self.encoders.items():
            digest = hashlib.sha256()
            for key, tensor in encoder.state_dict().items():
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            found[name] = digest.hexdigest()
        return found

    def encode(self, modality: str, keys: Sequence[str], samples: list[Tensor], variable: bool) -> list[NDArray[Any]]:
        """One array per sample: (D,), or whatever shape the encoder emits; of sequences the true length alone.

        The samples have one shape, but for the first dimension where they are `variable`. Raises RunFailed, naming the
        samples, where the encoder fails or emits what no feature can be.
        """
        encoder = self.encoders[modality]
        inputs = collate(samples, variable)
        if isinstance(inputs, Padded):
            inputs = Padded(inputs.values.to(self.device), inputs.lengths.to(self.device))
        else:
            inputs = inputs.to(self.device)
        place = f"modality '{modality}', samples '{keys[0]}' to '{keys[-1]}'"
        try:
            with torch.inference_mode():
                emitted = encoder(in_precision_of(encoder, inputs))
        except Exception as error:  # whatever an encoder of one's own may raise, memory that is too small included
            raise RunFailed(f"{place}: the encoder fails: {type(error).__name__}: {error}") from error
        if isinstance(emitted, Padded):
            lengths = emitted.lengths.tolist()
            values = emitted.values.float().cpu().numpy()
            arrays = [values[row, :length] for row, length in enumerate(lengths)]
        elif isinstance(emitted, Tensor) and len(emitted) == len(samples):
            arrays = list(emitted.float().cpu().numpy())
        else:
            raise RunFailed(f"{place}: the encoder emits {type(emitted).__name__}, not one feature per sample")
        return [self._feature(modality, key, array) for key, array in zip(keys, arrays, strict=True)]

    def _feature(self, modality: str, key: str, array: NDArray[np.float32]) -> NDArray[Any]:
        if not np.isfinite(array).all():
            raise RunFailed(f"modality '{modality}', sample '{key}': the encoder emits values that are not finite")
        with np.errstate(over="ignore"):
            feature = array.astype(self.recipe.dtype)
        if not np.isfinite(feature).all():
            raise RunFailed(
                f"modality '{modality}', sample '{key}': the encoder emits {np.abs(array).max():.4g}, more than "
                "float16 holds: use --dtype float32"
            )
        return feature
