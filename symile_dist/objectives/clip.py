"""The pairwise CLIP baseline on the global batch: the sum over pairs of modalities of the symmetric InfoNCE."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor, nn

from symile_dist.distributed import Group
from symile_dist.objectives.health import contrastive_health
from symile_dist.objectives.negatives import GlobalBatch
from symile_dist.similarity import SumSimilarity
from symile_dist.types import Batch, Outputs, StepReport


class PairwiseClipLoss:
    """The sum over pairs of (CE of rows + CE of columns) / 2, as Symile's baseline has it (arXiv 2411.01053).

    Args:
        group: the ranks that form the global batch; None is all of them.
    """

    def __init__(self, group: Group = None) -> None:
        self.group = group

    def __call__(
        self,
        representations: list[Tensor],
        logit_scale: Tensor | float,
        *,
        step: int | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The global loss on every rank, with gradients exact under averaging; arguments as in `SymileLoss`.

        `step` is not used: every other row of the batch is a negative.
        """
        batch = GlobalBatch(representations, valid, self.group)
        own = torch.arange(batch.local_size, device=batch.valid.device)
        columns = own + batch.rows.start
        total = representations[0].new_zeros(())
        # Each ordered pair is one direction: this rank's rows of one modality against all rows of the other.
        for first, second in permutations(range(len(representations)), 2):
            logits = representations[first] @ batch.gathered[second].T  # (n, N)
            positive = (representations[first] * representations[second]).sum(dim=1)
            # Scaled before the mask, for the gradient of the scale would be 0 * -inf = nan after it. The positive goes
            # in after the mask: so an invalid row, which is left out below, stays finite.
            scaled_positive = positive * logit_scale
            scaled = (logits * logit_scale).masked_fill(~batch.valid, -torch.inf)
            losses = scaled.index_put((own, columns), scaled_positive).logsumexp(dim=1) - scaled_positive
            total = total + torch.where(batch.local_valid, losses, 0.0).sum()
        return batch.finish(total / 2)


class PairwiseClipObjective(nn.Module):
    """`PairwiseClipLoss` as the trainer calls it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.similarity = SumSimilarity()
        self.loss = PairwiseClipLoss()

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        representations = [tensor.float() for tensor in outputs.representations.values()]
        loss = self.loss(representations, outputs.logit_scale.float(), valid=batch.valid)
        return StepReport(loss, contrastive_health(representations, batch.valid))
