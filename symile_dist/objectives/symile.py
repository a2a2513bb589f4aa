"""The Symile loss on the global batch (NeurIPS 2024, arXiv 2411.01053)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from symile_dist.distributed import Group
from symile_dist.objectives.health import contrastive_health
from symile_dist.objectives.negatives import GlobalBatch, draw_permutations
from symile_dist.registry import suggestion
from symile_dist.similarity import MIPSimilarity, elementwise_product, multilinear_inner_product
from symile_dist.types import Batch, Outputs, StepReport

NEGATIVE_SAMPLING = ["n"]


class SymileLoss:
    """Contrasts each anchor's multilinear inner product with those of N permuted combinations of the others.

    The mean over the M anchors of the cross-entropy of `logit_scale * MIP`, with the positive on the diagonal
    (arXiv 2411.01053, section 3, algorithm 1). The permutations are drawn over the **global** batch from (seed, step),
    so the loss is the same for every number of ranks. Works with any M >= 2.

    Args:
        negative_sampling: "n": as many negatives per anchor as the global batch has samples.
        group: the ranks that form the global batch; None is all of them.
        seed: of the permutations.

    Raises ValueError for an unknown negative_sampling.
    """

    def __init__(self, negative_sampling: str = "n", group: Group = None, seed: int = 0) -> None:
        if negative_sampling not in NEGATIVE_SAMPLING:
            raise ValueError(
                f"unknown negative_sampling '{negative_sampling}'{suggestion(negative_sampling, NEGATIVE_SAMPLING)}"
            )
        self.negative_sampling, self.group, self.seed = negative_sampling, group, seed

    def __call__(
        self, representations: list[Tensor], logit_scale: Tensor | float, *, step: int, valid: Tensor | None = None
    ) -> Tensor:
        """The global loss, the same on every rank; its gradient is exact once averaged over the ranks.

        Args:
            representations: M tensors (n, D), this rank's rows; the same n on every rank.
            logit_scale: scalar multiplier of the logits, already exp-ed.
            step: number of the step; with the seed it decides the negatives.
            valid: (n,) bool; rows that are neither anchor nor negative where False. The normaliser is the global
                number of valid rows.

        Raises ValueError for tensors of unequal shape, type or device.
        """
        batch = GlobalBatch(representations, valid, self.group)
        number = len(representations)
        permutations = draw_permutations(number, batch.size, self.seed, step, batch.valid)
        positive = multilinear_inner_product(representations)
        own = torch.arange(batch.local_size, device=positive.device)
        columns = own + batch.rows.start
        total = positive.new_zeros(())
        for anchor in range(number):
            others = [m for m in range(number) if m != anchor]
            negatives = elementwise_product([batch.gathered[m][permutations[anchor, m]] for m in others])
            logits = representations[anchor] @ negatives.T  # (n, N)
            # Scaled before the mask, for the gradient of the scale would be 0 * -inf = nan after it. The positive goes
            # in after the mask: so an invalid row, which is left out below, stays finite.
            scaled_positive = positive * logit_scale
            scaled = (logits * logit_scale).masked_fill(~batch.valid, -torch.inf)
            losses = scaled.index_put((own, columns), scaled_positive).logsumexp(dim=1) - scaled_positive
            total = total + torch.where(batch.local_valid, losses, 0.0).sum()
        return batch.finish(total / number)


class SymileObjective(nn.Module):
    """`SymileLoss` as the trainer calls it. Options as there."""

    bounds_total_correlation = True
    """log N - loss bounds the total correlation (arXiv 2411.01053, section 3)."""

    def __init__(self, seed: int, negative_sampling: str = "n") -> None:
        super().__init__()
        self.similarity = MIPSimilarity()
        self.loss = SymileLoss(negative_sampling, seed=seed)

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        # The objective is computed in fp32 whatever the encoders' precision: products of M small numbers underflow
        # and sums of N exponentials lose digits in bf16.
        representations = [tensor.float() for tensor in outputs.representations.values()]
        logit_scale = outputs.logit_scale.float()
        loss = self.loss(representations, logit_scale, step=step, valid=batch.valid)
        return StepReport(loss, contrastive_health(representations, batch.valid))
