"""Features that a frozen encoder computed beforehand, some of them missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from symile_dist.hub import reads_weights
from symile_dist.types import Inputs, Padded


class FeatureEncoder(nn.Module):
    """A feature vector, or a stand-in where the sample lacks it, and a flag that says which -> linear map.

    Symile-M3 with missing modalities (arXiv 2411.01053, section 5.2): a missing vector is replaced by the mean over the
    split, and either is joined by one of two learned vectors of its own length, [0 observed, 1 missing].

    Parameters:
        input_dim: h, length of a feature vector.
        fill: what stands for a missing vector: `zeros`, `learned`, or a .npy file of (h,), such as the means that
            `symile-dist shards mean` writes.

    Raises ValueError for a file that is not there or holds anything else.
    """

    takes_present = True
    fill: Tensor

    def __init__(self, embedding_dim: int, input_dim: int, fill: str = "zeros") -> None:
        super().__init__()
        self.input_dim = input_dim
        if fill == "learned":
            self.fill = nn.Parameter(torch.zeros(input_dim))
        else:
            given = fill != "zeros" and reads_weights()
            vector = torch.from_numpy(read_vector(fill, input_dim)) if given else torch.zeros(input_dim)
            # Saved with the weights: the model stays the one that was trained, whatever becomes of the file.
            self.register_buffer("fill", vector)
        self.indicator = nn.Embedding(2, input_dim)
        self.projection = nn.Linear(2 * input_dim, embedding_dim)

    @staticmethod
    def check(input_dim: int, fill: str = "zeros", **options: object) -> None:
        """Raises ValueError unless `fill` can be read."""
        if fill not in ("zeros", "learned"):
            read_vector(fill, input_dim)

    def forward(self, inputs: Inputs, present: Tensor | None = None) -> Tensor:
        """(n, ...), flattened to (n, h), and (n,) flags, all present when left out -> (n, embedding_dim).

        Raises TypeError for `Padded`, ValueError for another number of values.
        """
        if isinstance(inputs, Padded):
            raise TypeError("FeatureEncoder takes feature vectors of one size (a tensor), not sequences")
        features = inputs.flatten(1)
        if features.shape[1] != self.input_dim:
            raise ValueError(f"FeatureEncoder: a sample has {features.shape[1]} values, input_dim is {self.input_dim}")
        if present is None:
            present = torch.ones(len(features), dtype=torch.bool, device=features.device)
        features = torch.where(present[:, None], features, self.fill.to(features.dtype))
        projected: Tensor = self.projection(torch.cat([features, self.indicator((~present).long())], dim=1))
        return projected


def read_vector(path: str, length: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """(length,) float32 from a .npy file. Raises ValueError for anything else."""
    told = f"fill: {path}: a .npy file of ({length},) numbers is needed (symile-dist shards mean writes one)"
    try:
        vector = np.load(Path(path).expanduser(), allow_pickle=False)
    except Exception as error:  # a damaged header may raise almost anything (TokenError, MemoryError)
        raise ValueError(f"{told}; {str(error)[:300]}") from None
    if not isinstance(vector, np.ndarray) or vector.shape != (length,) or vector.dtype.kind not in "fiu":
        raise ValueError(f"{told}, it holds {getattr(vector, 'shape', 'several arrays')}")
    with np.errstate(over="ignore"):
        made: np.ndarray[tuple[int], np.dtype[np.float32]] = vector.astype(np.float32)
    if not np.isfinite(made).all():
        raise ValueError(f"{told}; it holds NaN, infinity or what float32 cannot hold")
    return made


__all__ = ["FeatureEncoder", "read_vector"]
