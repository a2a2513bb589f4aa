"""The all-gather negative sampler: the global batch on every rank, and negatives that all ranks draw alike."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from symile_dist.distributed import (
    Group,
    all_gather,
    all_gather_with_gradient,
    all_reduce_sum,
    check_agreement,
    rank,
    world_size,
)
from symile_dist.seeding import permutation
from symile_dist.similarity import check_same_shape, unit_rows


@lru_cache(maxsize=4)
def _permutations(num_modalities: int, batch: int, seed: int, step: int) -> Tensor:
    """(M, M, N): one permutation of the global batch per anchor and other modality, from (seed, step) alone."""
    table = torch.arange(batch).repeat(num_modalities, num_modalities, 1)
    for anchor in range(num_modalities):
        for other in range(num_modalities):
            if other != anchor:
                table[anchor, other] = torch.from_numpy(permutation(batch, "negatives", seed, step, anchor, other))
    return table


def draw_permutations(
    num_modalities: int, batch: int, seed: int, step: int, valid: Tensor | None = None, device: Any = None
) -> Tensor:
    """(M, M, N) int64 on the device (valid's by default): entry [anchor, other] permutes the rows of `other`.

    A pure function of its arguments, hence the same on every rank and for every world size; the diagonal is not used.
    Valid rows are permuted among themselves and invalid ones among themselves, so that no valid negative holds an
    invalid part: the valid entries, in the order in which the permutation names them, fill the valid rows from the
    first on. Done by sorting, so that nothing waits for the device to tell how many rows are valid.
    """
    drawn = _permutations(num_modalities, batch, seed, step)
    device = torch.device(device or (valid.device if valid is not None else "cpu"))
    if device.type == "cuda":
        drawn = drawn.pin_memory().to(device, non_blocking=True)  # without waiting for the device
    else:
        drawn = drawn.to(device)
    if valid is None:
        return drawn
    rows = torch.argsort((~valid).to(torch.uint8), stable=True)
    order = torch.argsort((~valid[drawn]).to(torch.uint8), dim=-1, stable=True)
    permuted = torch.empty_like(drawn)
    permuted[..., rows] = torch.gather(drawn, -1, order)
    return permuted


class GlobalBatch:
    """The global batch as this rank sees it: its own rows of the first modality, all rows of the others.

    So much is enough for every anchor's negatives: whatever has a row of the first modality as a factor belongs to the
    rank that owns the row. Gradients that reach gathered rows are summed over the ranks in the backward pass. Invalid
    rows become zeros, so that no value in them, not even NaN, reaches loss or gradients.

    Raises ValueError, on all ranks alike, for tensors that do not fit each other or those of other ranks.
    """

    def __init__(
        self,
        representations: list[Tensor],
        valid: Tensor | None,
        group: Group,
        *,
        description: str = "",
        problem: str | None = None,
        normalize: bool = False,
    ) -> None:
        """
        Args:
            representations: M tensors (n, D), this rank's rows.
            valid: (n,) bool, or None: all are.
            description: of whatever else all ranks have to agree on.
            problem: a mistake that the caller has found, to be told on all ranks.
            normalize: L2-normalise the rows.
        """
        problem = find_problem(representations, valid) or problem
        check_agreement(f"{describe(representations)}, {description}", problem, group)
        self.group = group
        self.world_size = world_size(group)
        self.local_size = representations[0].shape[0]
        self.size = self.local_size * self.world_size
        self.offset = rank(group) * self.local_size
        self.rows = slice(self.offset, self.offset + self.local_size)
        self.valid: Tensor | None = None
        """(N,) bool, or None where all rows are known to be valid."""
        if valid is not None:
            representations = [torch.where(valid[:, None], tensor, 0) for tensor in representations]
        if normalize:
            representations = [unit_rows(tensor).to(tensor.dtype) for tensor in representations]
        if valid is not None or self.world_size > 1:
            local = torch.ones_like(representations[0][:, 0], dtype=torch.uint8) if valid is None else valid.byte()
            self.valid = all_gather(local, group).bool()
        self.own = representations[0]
        """(n, D): this rank's rows of modality 0."""
        self.others = list(representations[1:])
        """M - 1 tensors (N, D)."""
        if self.world_size > 1:
            # One collective for all: (n, M - 1, D) -> (N, M - 1, D).
            gathered = all_gather_with_gradient(torch.stack(self.others, dim=1), group)
            self.others = list(gathered.unbind(dim=1))

    @property
    def local_valid(self) -> Tensor | None:
        """(n,) bool: of this rank's rows."""
        return None if self.valid is None else self.valid[self.rows]

    def gather_all(self) -> list[Tensor]:
        """M tensors (N, D), modality 0 too: for objectives that need it whole. Called on all ranks."""
        return [all_gather_with_gradient(self.own, self.group), *self.others]

    def mean(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """From this rank's values to their mean over the global batch, with gradients exact under averaging.

        Trainers average gradients over ranks (DDP, ZeRO). The mean is the sum of the ranks' shares, so each rank
        back-propagates world_size times its share: for features and logit scale alike the average is then the
        gradient of the mean. The value is the global one on every rank.

        Args:
            values: (A, n) per-sample values, for each of A anchors.
            weights: (A, n), (n,) bool or None: which of them count. Each anchor's mean is over those that do, zero
                where none does; the result is the mean over anchors.
        """
        if weights is None:
            share = values.sum() / values[:1].numel() / self.world_size
        else:
            weights = weights.expand(values.shape)
            counts = all_reduce_sum(weights.sum(dim=1), self.group).clamp(min=1)
            share = (torch.where(weights, values, 0.0) / counts[:, None]).sum()
        share = share / values.shape[0]
        total = all_reduce_sum(share, self.group)
        scaled = share * self.world_size
        return total + (scaled - scaled.detach())  # to the last bit the same on every rank


def describe(representations: list[Tensor]) -> str:
    """What all ranks must have in common, in words."""
    if not is_list_of_tensors(representations):
        return "no representations"
    first = representations[0]
    # Ranks that differ in these would differ in the collectives of their backward passes.
    gradients = [torch.is_grad_enabled() and tensor.requires_grad for tensor in representations]
    return (
        f"{len(representations)} representations of shape {tuple(first.shape)} and {first.dtype}, requiring gradients: "
        f"{gradients}"
    )


def is_list_of_tensors(representations: object) -> bool:
    return (
        isinstance(representations, list | tuple)
        and len(representations) > 0
        and all(isinstance(tensor, Tensor) for tensor in representations)
    )


def find_problem(representations: list[Tensor], valid: Tensor | None) -> str | None:
    """What is wrong with this rank's arguments, or None. Looks at shapes and types only, so no device is waited for."""
    if not is_list_of_tensors(representations) and representations != []:
        return "representations should be a list of tensors (n, D), one per modality"
    if len(representations) < 2:
        return f"a contrastive loss needs two or more modalities, got {len(representations)}"
    try:
        check_same_shape(representations)
    except ValueError as error:
        return str(error)
    first = representations[0]
    if not first.numel():
        return f"the representations are empty: their shape is {tuple(first.shape)}"
    if valid is not None and not (
        isinstance(valid, Tensor) and valid.shape == first.shape[:1] and valid.dtype == torch.bool
    ):
        kind = f"{valid.dtype} {tuple(valid.shape)}" if isinstance(valid, Tensor) else f"a {type(valid).__name__}"
        return f"valid should be a bool tensor of shape ({first.shape[0]},), is {kind}"
    if valid is not None and valid.device != first.device:
        return f"valid is on {valid.device}, the representations are on {first.device}"
    return None
