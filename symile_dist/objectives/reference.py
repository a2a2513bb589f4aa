"""The losses as the papers write them, for one process, in plain sight: what the fast paths are tested against."""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from symile_dist.objectives.negatives import draw_permutations
from symile_dist.similarity import elementwise_product, multilinear_inner_product


def symile_loss_reference(
    representations: list[Tensor], logit_scale: Tensor, seed: int, step: int, valid: Tensor | None = None
) -> Tensor:
    """Symile's loss with N negatives per anchor (arXiv 2411.01053, section 3 and algorithm 1).

    For each anchor modality m: row i's logits are the MIPs of anchor i with N combinations of the other modalities,
    each permuted by itself; the diagonal is replaced by the positive. The loss is the mean over rows and anchors.

    Args:
        representations: M tensors (N, D), the whole global batch.
        logit_scale: what logits are multiplied with.
        valid: (N,) bool; invalid rows are neither anchor nor negative.
    """
    number, batch = len(representations), representations[0].shape[0]
    valid = torch.ones(batch, dtype=torch.bool) if valid is None else valid
    permutations = draw_permutations(number, batch, seed, step, valid)
    positive = multilinear_inner_product(representations)
    losses = []
    for anchor in range(number):
        others = [m for m in range(number) if m != anchor]
        negatives = elementwise_product([representations[m][permutations[anchor][m]] for m in others])
        logits = representations[anchor] @ negatives.T
        logits = torch.where(torch.eye(batch, dtype=torch.bool), positive[:, None], logits) * logit_scale
        logits = logits[valid][:, valid]
        losses.append(F.cross_entropy(logits, torch.arange(len(logits))))
    return torch.stack(losses).mean()


def pairwise_clip_loss_reference(
    representations: list[Tensor], logit_scale: Tensor, valid: Tensor | None = None
) -> Tensor:
    """The pairwise CLIP baseline of Symile: the sum over pairs of the symmetric InfoNCE. Arguments as above."""
    if valid is not None:
        representations = [tensor[valid] for tensor in representations]
    labels = torch.arange(len(representations[0]))
    total = representations[0].new_zeros(())
    for first, second in combinations(representations, 2):
        logits = logit_scale * first @ second.T
        total = total + (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return total
