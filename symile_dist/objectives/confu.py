"""Contrastive fusion (ConFu, arXiv 2511.21331): pairs of modalities, and each with the fusion of all others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from symile_dist.distributed import Group
from symile_dist.objectives.clip import Pair, sum_over_pairs
from symile_dist.objectives.contrast import as_scale, scale_problem
from symile_dist.objectives.health import contrastive_health
from symile_dist.objectives.negatives import GlobalBatch, is_list_of_tensors
from symile_dist.similarity import Similarity, SumSimilarity, unit_rows
from symile_dist.types import Batch, Outputs, StepReport


class ConFuLoss:
    """The weighted mean of symmetric InfoNCEs of unit vectors: fused_weight * sum over modalities k of (fusion of all
    others, k), and (1 - fused_weight) * sum over pairs, divided by the number of terms (6 of three modalities).

    Args:
        group: the ranks that form the global batch; None is all of them.
        fused_weight: lambda of the paper, 0 to 1.

    Raises ValueError for a weight outside that range.
    """

    def __init__(self, group: Group = None, *, fused_weight: float = 0.5) -> None:
        if not 0 <= fused_weight <= 1:
            raise ValueError(f"fused_weight = {fused_weight} should be from 0 to 1")
        self.group, self.fused_weight = group, fused_weight

    def __call__(
        self,
        representations: list[Tensor],
        fused: list[Tensor],
        logit_scale: Tensor | float,
        *,
        step: int | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The global loss on every rank, with gradients exact under averaging; arguments as in `SymileLoss`, and

        Args:
            fused: M tensors (n, D); number k is the fusion of all modalities but k.
            step: not used: every other row of the batch is a negative.
        """
        problem = scale_problem(logit_scale)
        if is_list_of_tensors(representations) and len(fused) != len(representations):
            problem = f"{len(representations)} modalities need as many fusions, got {len(fused)}"
        batch = GlobalBatch(
            [*representations, *fused],
            valid,
            self.group,
            description=f"ConFu, fused_weight={self.fused_weight}",
            problem=problem,
            normalize=True,
        )
        number = len(representations)
        pairs = [Pair(*pair, 1 - self.fused_weight) for pair in combinations(range(number), 2)]
        pairs += [Pair(k, number + k, self.fused_weight) for k in range(number)]
        scale = as_scale(logit_scale, batch.own)
        return (sum_over_pairs(batch, scale, pairs=pairs) / len(pairs)).to(scale.dtype)


class ConFuSimilarity:
    """How ConFu's representations are compared: with all others at hand, the candidate with their fusion."""

    normalize = True

    def __init__(self, objective: ConFuObjective) -> None:
        self.objective, self.pairs = objective, SumSimilarity(normalize=True)

    def __call__(self, candidates: Tensor, queries: Sequence[Tensor]) -> Tensor:
        """(K, D) candidates and (Q, D) queries -> (Q, K): the sum of inner products of unit vectors."""
        return self.pairs(candidates, queries)

    def towards(self, target: str, queries: Sequence[str]) -> Similarity:
        """The similarity of one direction: with some of the others only, the sum of inner products."""
        if list(queries) != [name for name in self.objective.modalities if name != target]:
            return self

        def with_fusion(candidates: Tensor, vectors: Sequence[Tensor]) -> Tensor:
            fused = self.objective.fuse(target, [unit_rows(vector) for vector in vectors])
            units = unit_rows(candidates)
            return unit_rows(fused).to(units.dtype) @ units.T

        return with_fusion


class ConFuObjective(nn.Module):
    """`ConFuLoss` with its fusions, each an MLP of two layers. ConFu's scale is 1 / 0.07: `logit_scale_init: 2.66`.

    Args:
        modalities: their names, in order.
        fused_weight: as in `ConFuLoss`.
        hidden: width of the fusions; twice the embedding when left out.

    Raises ValueError for fewer than three modalities, and a width that is none.
    """

    def __init__(
        self, modalities: list[str], embedding_dim: int, fused_weight: float = 0.5, hidden: int | None = None
    ) -> None:
        super().__init__()
        if len(modalities) < 3:
            raise ValueError(f"a fusion is of two modalities or more, beside a third: got {len(modalities)} in all")
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden = {hidden} should be 1 or more")
        self.modalities = modalities
        self.loss, self.similarity = ConFuLoss(fused_weight=fused_weight), ConFuSimilarity(self)
        width = hidden or 2 * embedding_dim
        self.fusions = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear((len(modalities) - 1) * embedding_dim, width), nn.ReLU(), nn.Linear(width, embedding_dim)
                )
                for name in modalities
            }
        )

    def fuse(self, target: str, others: Sequence[Tensor]) -> Tensor:
        """Unit vectors (n, D) of all modalities but the target, in order -> (n, D)."""
        first: nn.Linear = self.fusions[target][0]  # type: ignore[index]
        fused: Tensor = self.fusions[target](torch.cat(list(others), dim=1).to(first.weight.dtype))
        return fused

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        # No value of an invalid row, not even NaN, may reach a fusion's gradient.
        representations = [torch.where(batch.valid[:, None], r, 0.0) for r in outputs.representations.values()]
        units = [unit_rows(vector) for vector in representations]
        fused = [
            self.fuse(name, [unit for m, unit in enumerate(units) if m != number]).to(representations[number].dtype)
            for number, name in enumerate(self.modalities)
        ]
        loss = self.loss(representations, fused, outputs.logit_scale, valid=batch.valid)
        return StepReport(loss, contrastive_health(representations, batch.valid))
