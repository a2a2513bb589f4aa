"""The all-gather negative sampler: the global batch on every rank, and negatives that all ranks draw alike."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from symile_dist.distributed import Group, all_gather, all_gather_with_gradient, all_reduce_sum, rank, world_size
from symile_dist.seeding import permutation
from symile_dist.similarity import check_same_shape


@lru_cache(maxsize=4)
def _permutations(num_modalities: int, batch: int, seed: int, step: int) -> Tensor:
    """(M, M, N): one permutation of the global batch per anchor and other modality, from (seed, step) alone."""
    table = torch.empty((num_modalities, num_modalities, batch), dtype=torch.int64)
    for anchor in range(num_modalities):
        for other in range(num_modalities):
            table[anchor, other] = torch.from_numpy(permutation(batch, "negatives", seed, step, anchor, other))
    return table


def draw_permutations(num_modalities: int, batch: int, seed: int, step: int, valid: Tensor) -> Tensor:
    """(M, M, N) int64 on valid's device: entry [anchor, other] permutes the rows of `other` for that anchor.

    A pure function of its arguments, hence the same on every rank and for every world size. Valid rows are permuted
    among themselves and invalid ones among themselves, so that no valid negative holds an invalid part: the valid
    entries, in the order in which the permutation names them, fill the valid rows from the first on. Done by sorting,
    so that nothing waits for the device to tell how many rows are valid.
    """
    drawn = _permutations(num_modalities, batch, seed, step).to(valid.device)
    rows = torch.argsort((~valid).to(torch.uint8), stable=True)
    order = torch.argsort((~valid[drawn]).to(torch.uint8), dim=-1, stable=True)
    permuted = torch.empty_like(drawn)
    permuted[..., rows] = torch.gather(drawn, -1, order)
    return permuted


class GlobalBatch:
    """The global batch as this rank sees it: all rows of every modality, and which rows are its own.

    Gradients that reach the gathered rows are summed over the ranks in the backward pass.
    """

    def __init__(self, representations: list[Tensor], valid: Tensor | None, group: Group) -> None:
        check_same_shape(representations)
        if len(representations) < 2:
            raise ValueError(f"a contrastive loss needs two or more modalities, got {len(representations)}")
        self.group = group
        self.world_size = world_size(group)
        self.local_size = representations[0].shape[0]
        if valid is None:
            valid = torch.ones(self.local_size, dtype=torch.bool, device=representations[0].device)
        if valid.shape != (self.local_size,) or valid.dtype != torch.bool:
            raise ValueError(f"valid should be bool ({self.local_size},), is {valid.dtype} {tuple(valid.shape)}")
        self.size = self.local_size * self.world_size
        first_row = rank(group) * self.local_size
        self.rows = slice(first_row, first_row + self.local_size)
        self.local = representations
        self.local_valid = valid
        # One collective for all modalities: (n, M, D) -> (N, M, D).
        gathered = all_gather_with_gradient(torch.stack(representations, dim=1), group)
        self.gathered = list(gathered.unbind(dim=1))
        self.valid = all_gather(valid.to(torch.uint8), group).bool()
        self.num_valid = self.valid.sum()

    def finish(self, local_sum: Tensor) -> Tensor:
        """From this rank's sum over its valid rows to the global loss, with gradients exact under averaging.

        Trainers average gradients over ranks (DDP, ZeRO). The global loss is the sum of the ranks' shares, so each
        rank back-propagates world_size times its share: for features and logit scale alike the average is then the
        gradient of the global loss. The value is the global one on every rank.
        """
        share = local_sum / self.num_valid.clamp(min=1)
        total = all_reduce_sum(share, self.group)
        scaled = share * self.world_size
        return scaled + (total - scaled).detach()
