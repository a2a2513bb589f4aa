"""How representations lie in space: alignment, uniformity, effective rank."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from symile_dist.seeding import permutation

PAIRS_AT_ONCE = 2**22
ROWS_AT_ONCE = 2**14


def alignment(first: Tensor, second: Tensor, alpha: float = 2.0) -> float:
    """E |x - y|^alpha over positive pairs: two (n, D), L2-normalised here. 0 is perfect, 2 is chance at alpha = 2.

    Wang & Isola 2020, arXiv 2005.10242, equation 4. NaN without samples.
    """
    total = 0.0
    for x, y in zip(first.split(ROWS_AT_ONCE), second.split(ROWS_AT_ONCE), strict=True):
        distances = (F.normalize(x.double(), dim=1) - F.normalize(y.double(), dim=1)).norm(dim=1)
        total += float((distances**alpha).sum())
    return total / len(first) if len(first) else math.nan


def uniformity(
    vectors: Tensor, t: float = 2.0, max_samples: int = 4096, seed: int = 0, device: torch.device | None = None
) -> float:
    """log E exp(-t |x - y|^2) over pairs of different samples of (n, D), L2-normalised here; lower is more uniform.

    Wang & Isola 2020, arXiv 2005.10242, equation 5. Of more than `max_samples` so many are drawn. NaN for fewer than
    two samples, and where one is not finite.
    """
    if len(vectors) > max_samples:
        vectors = vectors[torch.from_numpy(np.sort(permutation(len(vectors), "uniformity", seed)[:max_samples]))]
    if len(vectors) < 2:
        return math.nan
    units = F.normalize(vectors.to(device, torch.float32), dim=1)
    height = max(1, PAIRS_AT_ONCE // len(units))
    total = 0.0
    for start in range(0, len(units), height):
        squares = (2 - 2 * units[start : start + height] @ units.T).clamp_(min=0)
        kernel = torch.exp(-t * squares)
        kernel[torch.arange(len(kernel)), torch.arange(start, start + len(kernel))] = 0.0
        total += float(kernel.double().sum())
    pairs = len(units) * (len(units) - 1)
    return -math.inf if total == 0 else math.log(total / pairs)


def effective_rank(vectors: Tensor, device: torch.device | None = None) -> float:
    """exp of the entropy of the singular values of (n, D), scaled to the sum 1: from 1 to min(n, D).

    Roy & Vetterli 2007, definition 2. Of the vectors as they are, neither centred nor normalised. NaN where there is
    nothing but zeros.
    """
    if len(vectors) < vectors.shape[1]:
        matrix = vectors.to(device, torch.float64)
        gram = matrix @ matrix.T
    else:
        gram = torch.zeros((vectors.shape[1], vectors.shape[1]), dtype=torch.float64, device=device or vectors.device)
        for rows in vectors.split(ROWS_AT_ONCE):
            wide = rows.to(device, torch.float64)
            gram += wide.T @ wide
    if not gram.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if not values.sum() > 0:
        return math.nan
    shares = values / values.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))
