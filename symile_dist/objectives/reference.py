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
from symile_dist.similarity import SMALLEST_DETERMINANT, elementwise_product, multilinear_inner_product


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


def pairwise_sigmoid_loss_reference(
    representations: list[Tensor], logit_scale: Tensor, logit_bias: Tensor, valid: Tensor | None = None
) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343, section 3.2), summed over the pairs of modalities.

    Args:
        logit_bias: what is added to the logits. The others as above.
    """
    if valid is not None:
        representations = [tensor[valid] for tensor in representations]
    size = len(representations[0])
    signs = 2 * torch.eye(size, dtype=representations[0].dtype) - 1
    total = representations[0].new_zeros(())
    for first, second in combinations(representations, 2):
        total = total - F.logsigmoid(signs * (logit_scale * first @ second.T + logit_bias)).sum() / size
    return total


def gram_loss_reference(
    representations: list[Tensor],
    logit_scale: Tensor,
    valid: Tensor | None = None,
    *,
    anchor: int = 0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """GRAM's loss (arXiv 2412.11959), with the determinant of every Gram matrix; arguments as in `GramLoss`."""
    anchors, others = _anchors_and_others(representations, valid, anchor)
    # (N, N, M, D): entry [i, j] holds anchor i and the vectors of tuple j.
    vectors = torch.stack(
        [anchors[:, None].expand(-1, len(anchors), -1), *(o.expand(len(o), -1, -1) for o in others)], 2
    )
    determinants = torch.linalg.det(vectors @ vectors.mT)
    return _symmetric_cross_entropy(-logit_scale * determinants.clamp(min=SMALLEST_DETERMINANT).sqrt(), label_smoothing)


def triangle_loss_reference(
    representations: list[Tensor],
    logit_scale: Tensor,
    valid: Tensor | None = None,
    *,
    anchor: int = 0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """TRIANGLE's loss, with every triangle's sides; arguments as in `TriangleLoss`."""
    anchors, (first, second) = _anchors_and_others(representations, valid, anchor)
    u, w = anchors[:, None] - first, anchors[:, None] - second  # (N, N, D)
    area = (u.square().sum(-1) * w.square().sum(-1) - (u * w).sum(-1).square()) / 2
    return _symmetric_cross_entropy(-logit_scale * area, label_smoothing)


def _anchors_and_others(
    representations: list[Tensor], valid: Tensor | None, anchor: int
) -> tuple[Tensor, list[Tensor]]:
    """Valid rows, L2-normalised: of the anchor modality, and of the others."""
    if valid is not None:
        representations = [tensor[valid] for tensor in representations]
    normalized = [F.normalize(tensor, dim=1) for tensor in representations]
    return normalized[anchor], normalized[:anchor] + normalized[anchor + 1 :]


def _symmetric_cross_entropy(logits: Tensor, label_smoothing: float) -> Tensor:
    """(N, N) logits whose positives are on the diagonal -> the mean of the cross-entropies of rows and columns."""
    labels = torch.arange(len(logits))
    of_rows = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return (of_rows + F.cross_entropy(logits.T, labels, label_smoothing=label_smoothing)) / 2
