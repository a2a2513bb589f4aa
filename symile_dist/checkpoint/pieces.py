"""Which stretch of every parameter a rank keeps, at any ZeRO stage, and where the optimizer has it.

A parameter flattened is a line of numbers, of which ZeRO gives each rank a stretch; what it keeps whole on every rank
is dealt out here. So a checkpoint is the same at every stage and number of ranks: stretches of lines, by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

WEIGHTS = "weights"


class Piece(NamedTuple):
    """A stretch of a parameter, and of what the optimizer remembers of it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """Of the stretch, in the flattened parameter."""
    length: int
    home: Tensor
    """The tensor that holds the stretch's master values, and that the optimizer steps."""
    first: int
    """Of the stretch, in its home."""

    def within(self, values: Tensor) -> Tensor:
        """(length,): the stretch's place in a tensor that is laid out like its home; no copy."""
        return values.detach().view(-1)[self.first : self.first + self.length]


class Reads(Protocol):
    """What `restore` asks of a checkpoint."""

    def kinds(self, name: str) -> set[str]: ...
    def read(self, kind: str, name: str, start: int, into: Tensor) -> None: ...
    def scalar(self, kind: str, name: str) -> float: ...


def pieces_of(module: nn.Module, optimizer: Any, rank: int, world_size: int, dealt: bool) -> Iterator[Piece]:
    """This rank's pieces, of frozen parameters too.

    Args:
        optimizer: DeepSpeed's, around torch's.
        dealt: what every rank keeps whole is dealt out over the ranks, as for saving; else each rank has all of it.
    """
    masters = {id(weights): master for weights, master in _masters(optimizer)}
    parameter: Any  # with what DeepSpeed has hung on it
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):  # stage 3: equal shares of every parameter, the last ones padded
            shape, numel = tuple(parameter.ds_shape), parameter.ds_numel
            home, first, share = parameter.ds_tensor, 0, parameter.ds_tensor.numel()
            if parameter.requires_grad:
                group, first, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
                home = optimizer.fp32_partitioned_groups_flat[group]
            start = rank * share
            length = min(share, numel - start)
        elif getattr(parameter, "_hp_mapping", False) is not False:  # stages 1 and 2: a share of all in a line
            mapping = parameter._hp_mapping
            if mapping is None:
                continue  # other ranks' alone
            shape, start = tuple(parameter.shape), mapping.lp_fragment_address.start
            length = mapping.lp_fragment_address.numel
            home = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            first = mapping.hp_fragment_address.start
        else:
            shape, numel = tuple(parameter.shape), parameter.numel()
            home = masters.get(id(parameter), parameter)
            start, end = (numel * rank // world_size, numel * (rank + 1) // world_size) if dealt else (0, numel)
            first, length = start, end - start
        if length > 0:
            yield Piece(name, shape, start, length, home, first)


def _masters(optimizer: Any) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter, master) of DeepSpeed's optimizer for bf16 at stage 0."""
    if not hasattr(optimizer, "fp32_groups"):
        return []
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return [pair for parameters, masters in groups for pair in zip(parameters, masters, strict=True)]


def optimizer_state(optimizer: Any) -> Any:
    """home -> {name: tensor}, of torch's optimizer."""
    return getattr(optimizer, "optimizer", optimizer).state


def saved_tensors(pieces: list[Piece], optimizer: Any) -> dict[str, Tensor]:
    """`KIND/NAME` -> (length,), or (1,) for what is one number for a whole home; views of what is trained on."""
    state = optimizer_state(optimizer)
    found = {}
    for piece in pieces:
        found[f"{WEIGHTS}/{piece.name}"] = piece.within(piece.home)
        for kind, value in state.get(piece.home, {}).items():
            if isinstance(value, Tensor):
                found[f"{kind}/{piece.name}"] = value.view(1) if value.dim() == 0 else piece.within(value)
    return found


@torch.no_grad()
def restore(pieces: list[Piece], optimizer: Any, saved: Reads) -> None:
    """Reads masters, moments and counts into their places; call `spread_weights` afterwards."""
    state = optimizer_state(optimizer)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    counts: dict[tuple[int, str], float] = {}
    for piece in pieces:
        saved.read(WEIGHTS, piece.name, piece.start, piece.within(piece.home))
        kinds = saved.kinds(piece.name) - {WEIGHTS}
        for kind, value in state.get(piece.home, {}).items():
            # Saved before the parameter's first step, loaded into an optimizer that has taken some.
            if kind not in kinds and isinstance(value, Tensor) and (id(piece.home), kind) not in counts:
                (value if value.dim() == 0 else piece.within(value)).zero_()
        for kind in sorted(kinds):
            own = state[piece.home]
            if kind == "step":
                # ZeRO has one count for a home of many parameters: that of those that have always taken part.
                key = (id(piece.home), kind)
                counts[key] = max(counts.get(key, 0.0), saved.scalar(kind, piece.name))
                device = piece.home.device if fused else "cpu"
                own[kind] = torch.tensor(counts[key], dtype=torch.float32, device=device)
            else:
                if kind not in own:
                    own[kind] = torch.zeros_like(piece.home)
                saved.read(kind, piece.name, piece.start, piece.within(own[kind]))


@torch.no_grad()
def spread_weights(optimizer: Any) -> None:
    """Gives the model the masters' values, in its precision and on all ranks; all of them call it."""
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = optimizer.persistent_parameters  # small ones, which stage 3 keeps whole on every rank
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    else:
        for weights, master in _masters(optimizer):
            weights.data.copy_(master.data)
