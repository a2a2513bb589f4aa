"""The losses as the papers write them, with all logits in memory: what fast paths are tested against.

They see the whole global batch. `SymileLoss(backend="reference")` calls them on what it has gathered.
"""

from __future__ import annotations

import math
from itertools import combinations, product

import torch
import torch.nn.functional as F
from torch import Tensor

from symile_dist.objectives.cube import draw_sheets
from symile_dist.objectives.negatives import draw_permutations
from symile_dist.similarity import elementwise_product, multilinear_inner_product


def symile_loss_reference(
    representations: list[Tensor],
    logit_scale: Tensor,
    seed: int = 0,
    step: int = 0,
    valid: Tensor | None = None,
    *,
    negative_sampling: str = "n",
    sheets: int | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Symile's loss (arXiv 2411.01053, section 3): the mean over anchors of the cross-entropy of their logits.

    Args:
        representations: M tensors (N, D), the whole global batch.
        logit_scale: what logits are multiplied with.
        valid: (N,) bool; invalid rows are neither anchor nor negative.
        negative_sampling, sheets, present: as in `SymileLoss`.
    """
    number, batch = len(representations), representations[0].shape[0]
    valid = torch.ones(batch, dtype=torch.bool, device=representations[0].device) if valid is None else valid
    positive = logit_scale * multilinear_inner_product(representations)
    losses = []
    for anchor in range(number):
        if negative_sampling == "n":
            negatives = _permuted(representations, anchor, logit_scale, seed, step, valid)
        else:
            negatives = _cube(representations, anchor, logit_scale, seed, step, valid, sheets)
        logits = torch.cat([positive[:, None], negatives], dim=1)
        own = F.cross_entropy(logits, torch.zeros(batch, dtype=torch.int64, device=logits.device), reduction="none")
        counts = valid if present is None else valid & present[:, anchor]
        losses.append(own[counts].sum() / counts.sum().clamp(min=1))
    return torch.stack(losses).mean()


def _permuted(
    representations: list[Tensor], anchor: int, logit_scale: Tensor, seed: int, step: int, valid: Tensor
) -> Tensor:
    """(N, N) logits of the anchor with N combinations of the others, each permuted by itself (algorithm 1).

    -inf on the diagonal, where algorithm 1 has the positive, and for invalid combinations.
    """
    number, batch = len(representations), len(valid)
    permutations = draw_permutations(number, batch, seed, step, valid)[anchor]
    others = [representations[m][permutations[m]] for m in range(number) if m != anchor]
    logits = logit_scale * representations[anchor] @ elementwise_product(others).T
    return logits.masked_fill(torch.eye(batch, dtype=torch.bool, device=valid.device) | ~valid, -torch.inf)


def _cube(
    representations: list[Tensor],
    anchor: int,
    logit_scale: Tensor,
    seed: int,
    step: int,
    valid: Tensor,
    sheets: int | None,
) -> Tensor:
    """(N, N^(M - 1)) logits of the anchor with all combinations of the others, the positive's own being -inf.

    With `sheets`, a combination that lies in no drawn sheet is -inf, and one in a drawn sheet but the first counts
    `weight` times, hence has log(weight) added.
    """
    number, batch = len(representations), len(valid)
    letters = "abcdefghijk"[:number]
    equation = ",".join(f"{letter}z" for letter in letters) + "->" + letters
    cube = logit_scale * torch.einsum(equation, *representations)  # (N, ..., N), one dimension per modality
    drawn, weight = draw_sheets(sheets, batch, number, seed, step) if sheets else (range(batch ** (number - 2)), 1.0)
    log_weight = {sheet: 0.0 if place == 0 else math.log(weight) for place, sheet in enumerate(drawn)}
    added = torch.full(cube.shape, -torch.inf, dtype=cube.dtype)
    allowed = valid.tolist()
    for rows in product(range(batch), repeat=number):
        if len(set(rows)) == 1 or not all(allowed[row] for row in rows):
            continue
        sheet = sum((rows[m + 1] - rows[0]) % batch * batch**m for m in range(number - 2))
        if sheet in log_weight:
            added[rows] = log_weight[sheet]
    return (cube + added.to(cube.device)).movedim(anchor, 0).flatten(1)


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
