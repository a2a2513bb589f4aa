"""Gated Symile (arXiv 2604.05834): each candidate decides how much of every other modality enters the product.

A product is as bad as its worst factor: one modality that tells nothing of a sample spoils the score. So a gate, by
attention of the candidate to the modality against a NULL option, moves the modality's unit vector r towards a learned
neutral direction u: g r + (1 - g) u. The paper's text leaves the form of the attention open; here it is a sigmoid of
(W_q candidate) . (W_k r) / sqrt(H) less a learned logit of NULL, one for each ordered pair of modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from symile_dist.objectives.contrast import as_scale
from symile_dist.objectives.health import contrastive_health
from symile_dist.objectives.negatives import GlobalBatch, draw_permutations
from symile_dist.similarity import Similarity, elementwise_product, unit_rows
from symile_dist.types import Batch, Outputs, StepReport

MAX_MODALITIES = 6
"""A score is a sum over 2^(M - 1) products."""


class Projection(nn.Linear):
    """(n, D) -> (n, H) in the precision of what comes in, also where an engine holds the weight in halves."""

    def __init__(self, embedding_dim: int, hidden: int) -> None:
        super().__init__(embedding_dim, hidden, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        return F.linear(vectors, self.weight.to(vectors.dtype))


class Gate(nn.Module):
    """The gates of all ordered pairs of modalities, and their neutral directions.

    Args:
        hidden: H, the width of the attention.
        null_init: of NULL's logits; below zero, gates begin open.
    """

    def __init__(self, number: int, embedding_dim: int, hidden: int, null_init: float) -> None:
        super().__init__()
        self.queries = nn.ModuleList([Projection(embedding_dim, hidden) for _ in range(number)])
        self.keys = nn.ModuleList([Projection(embedding_dim, hidden) for _ in range(number)])
        self.null = nn.Parameter(torch.full((number, number), float(null_init)))
        # The direction of ones leaves a product as it is but for a factor: a modality of which nothing is taken.
        self.neutral = nn.Parameter(torch.ones(number, embedding_dim))

    def forward(self, target: int, candidates: Tensor, others: Mapping[int, Tensor]) -> Tensor:
        """Scores of unit vectors: (K, D) candidates of the target modality, {modality: (Q, D)} -> (K, Q).

        A modality that is not among `others` is neutral. Computed in the vectors' precision, under autocast too: a
        factor as large as D^((M - 1) / 2) multiplies the scores.
        """
        return self._scores(target, candidates, others, torch.matmul)

    def of_rows(self, target: int, candidates: Tensor, others: Mapping[int, Tensor]) -> Tensor:
        """Of rows of one number: (n, D), {modality: (n, D)} -> (n,)."""

        def row_products(left: Tensor, right: Tensor) -> Tensor:
            return (left * right.mT).sum(dim=1)

        return self._scores(target, candidates, others, row_products)

    def _scores(
        self,
        target: int,
        candidates: Tensor,
        others: Mapping[int, Tensor],
        multiply: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        with torch.autocast(candidates.device.type, enabled=False):
            asked = self.queries[target](candidates)
            units = unit_rows(self.neutral).to(candidates.dtype)
            numbers = [k for k in range(len(self.keys)) if k != target]
            gates: dict[int, Tensor] = {}
            for k, vectors in others.items():
                attention = multiply(asked, self.keys[k](vectors).mT) / asked.shape[1] ** 0.5
                gates[k] = torch.sigmoid(attention - self.null[target, k])
            total: Tensor | None = None
            for taken in product(*[(True, False) if k in others else (False,) for k in numbers]):
                choice = dict(zip(numbers, taken, strict=True))
                vectors = elementwise_product([others[k] if choice[k] else units[k : k + 1] for k in numbers])
                weight = [gates[k] if choice[k] else 1 - gates[k] for k in others]
                term = multiply(candidates, vectors.mT)
                term = term * elementwise_product(weight) if weight else term
                total = term if total is None else total + term
        assert total is not None
        return total


class GatedSimilarity:
    """Gated scores: of every direction its own, in which modalities that are not among the queries are neutral."""

    normalize = True

    def __init__(self, gate: Gate, modalities: list[str]) -> None:
        self.gate, self.modalities = gate, modalities

    def __call__(self, candidates: Tensor, queries: Sequence[Tensor]) -> Tensor:
        raise TypeError("a gated score depends on the direction: call towards(target, queries) first")

    def towards(self, target: str, queries: Sequence[str]) -> Similarity:
        number, numbers = self.modalities.index(target), [self.modalities.index(name) for name in queries]

        def gated(candidates: Tensor, vectors: Sequence[Tensor]) -> Tensor:
            others = {k: unit_rows(vector) for k, vector in zip(numbers, vectors, strict=True)}
            scores: Tensor = self.gate(number, unit_rows(candidates), others).T
            return scores

        return gated


class GatedSymileObjective(nn.Module):
    """Symile's loss on gated scores of unit vectors times D^((M - 1) / 2), with "n" negatives drawn from (seed, step).

    The paper's embedding has 256 dimensions and its logit scale begins at one: `logit_scale_init: 0`. Halves are
    computed in float32, under autocast too.

    Args:
        modalities: their names, in order.
        hidden: width of the gates' attention.
        null_init: of the logits of NULL: gates begin at sigmoid(-null_init).

    Raises ValueError for fewer than three modalities, or more than six, and a width that is none.
    """

    bounds_total_correlation = True

    def __init__(
        self, seed: int, modalities: list[str], embedding_dim: int, hidden: int = 64, null_init: float = -2.0
    ) -> None:
        super().__init__()
        if not 3 <= len(modalities) <= MAX_MODALITIES:
            raise ValueError(f"Gated Symile is for 3 to {MAX_MODALITIES} modalities, got {len(modalities)}")
        if hidden < 1:
            raise ValueError(f"hidden = {hidden} should be 1 or more")
        self.seed, self.modalities = seed, modalities
        self.factor = embedding_dim ** ((len(modalities) - 1) / 2)
        self.gate = Gate(len(modalities), embedding_dim, hidden, null_init)
        self.similarity = GatedSimilarity(self.gate, modalities)

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        representations = list(outputs.representations.values())
        whole = GlobalBatch(
            representations,
            batch.valid,
            None,
            description=f"Gated Symile, seed={self.seed}, step={step}",
        )
        scale = as_scale(outputs.logit_scale, whole.own) * self.factor
        vectors = [unit_rows(vector) for vector in whole.gather_all()]
        permutations = draw_permutations(
            len(vectors), whole.size, self.seed, step, whole.valid, device=whole.own.device
        )
        losses = torch.stack(
            [
                checkpoint(
                    self._losses, m, whole, vectors, permutations, scale, use_reentrant=False, preserve_rng_state=False
                )
                for m in range(len(vectors))
            ]
        )
        loss = whole.mean(losses, whole.local_valid).to(scale.dtype)
        return StepReport(loss, contrastive_health(representations, batch.valid))

    def _losses(
        self, anchor: int, batch: GlobalBatch, vectors: list[Tensor], permutations: Tensor, scale: Tensor
    ) -> Tensor:
        """(n,) float64: the cross-entropy of this rank's rows of one modality."""
        own, others = vectors[anchor][batch.rows], [k for k in range(len(vectors)) if k != anchor]
        negatives = {k: vectors[k][permutations[anchor, k]] for k in others}
        logits = scale * self.gate(anchor, own, negatives)
        positives = scale * self.gate.of_rows(anchor, own, {k: vectors[k][batch.rows] for k in others})
        columns = torch.arange(len(own), device=own.device) + batch.offset
        logits = logits.scatter(1, columns[:, None], positives[:, None].to(logits.dtype))
        if batch.valid is not None:
            hidden = ~batch.valid.expand_as(logits)
            hidden = hidden.scatter(1, columns[:, None], False)
            logits = logits.masked_fill(hidden, -torch.inf)
        return F.cross_entropy(logits.double(), columns, reduction="none")
