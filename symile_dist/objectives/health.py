"""Cheap signs of whether a contrastive model learns or collapses, from this rank's rows."""

from __future__ import annotations

import torch
from torch import Tensor

from symile_dist.similarity import multilinear_inner_product


@torch.no_grad()
def contrastive_health(representations: list[Tensor], valid: Tensor) -> dict[str, Tensor]:
    """Mean MIP of positives, and of negatives made by shifting each modality by another number of rows: of a single
    row, shifted, there are none, and their mean is zero.

    Args:
        representations: M tensors (n, D).
        valid: (n,) bool.
    """
    # Sums of products lose their digits in bf16. A row that does not count may hold NaN, which times zero is NaN.
    representations = [torch.where(valid[:, None], tensor.float(), 0.0) for tensor in representations]
    weights = valid.to(representations[0].dtype)
    shifted = [tensor.roll(m, dims=0) for m, tensor in enumerate(representations)]
    shifted_weights = torch.stack([weights.roll(m) for m in range(len(representations))]).prod(dim=0)
    shifted_weights *= len(weights) > 1
    return {
        "positive_score": (multilinear_inner_product(representations) * weights).sum() / weights.sum().clamp(min=1),
        "negative_score": (multilinear_inner_product(shifted) * shifted_weights).sum()
        / shifted_weights.sum().clamp(min=1),
    }
