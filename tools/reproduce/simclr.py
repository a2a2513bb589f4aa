"""SimCLR between two modalities, as FactorCL's authors compare with it on their synthetic data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symile_dist.objectives.factorcl import Head
from symile_dist.objectives.negatives import GlobalBatch
from symile_dist.types import Batch, Outputs, StepReport


class SimCLRObjective(nn.Module):
    """NT-Xent (arXiv 2002.05709, eq. 1) with the two modalities of a sample as its views, through heads.

    Each of the 2N heads' outputs is contrasted with the 2N - 1 others. As in FactorCL's code they are not normalised,
    and the temperature is 0.07. Modalities beyond the first two are not looked at.
    """

    similarity = None

    def __init__(self, embedding_dim: int, head_layers: int = 2, temperature: float = 0.07) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(embedding_dim, embedding_dim, head_layers) for _ in range(2))
        self.temperature = temperature

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        # No value of an invalid row, not even NaN, may reach a head's gradient.
        vectors = [torch.where(batch.valid[:, None], v, 0.0) for v in list(outputs.representations.values())[:2]]
        everyone = GlobalBatch(
            [head(v).float() for head, v in zip(self.heads, vectors, strict=True)], batch.valid, None
        )
        views = everyone.gather_all()
        counts = torch.cat([batch.valid.new_ones(everyone.size) if everyone.valid is None else everyone.valid] * 2)
        place = torch.arange(everyone.size, device=counts.device)[everyone.rows]
        losses = []
        for own, view in enumerate(views):
            logits = view[everyone.rows] @ torch.cat(views).T / self.temperature
            itself = F.one_hot(place + own * everyone.size, len(counts)).bool()
            logits = logits.masked_fill(itself | ~counts, -torch.inf)
            losses.append(F.cross_entropy(logits, place + (1 - own) * everyone.size, reduction="none"))
        return StepReport(everyone.mean(torch.stack(losses), everyone.local_valid), {})

    def embeddings(self, representations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`x1.encoder`: what the encoder emits, before the head."""
        return {f"{name}.encoder": vectors for name, vectors in list(representations.items())[:2]}
