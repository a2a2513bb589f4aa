"""Process groups, gathers with gradients, and decisions that all ranks agree on.

Everything works without a process group too, as a world of one.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from symile_dist.spans import collective

Group = dist.ProcessGroup | None
T = TypeVar("T")


def world_size(group: Group = None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def all_gather(tensor: Tensor, group: Group = None) -> Tensor:
    """(n, ...) of every rank -> (world_size * n, ...), in rank order; without gradients."""
    world = world_size(group)
    if world == 1:
        return tensor
    tensor = tensor.contiguous()
    gathered = tensor.new_empty((world * tensor.shape[0], *tensor.shape[1:]))
    with collective("all_gather"):
        dist.all_gather_into_tensor(gathered, tensor, group=group)
    return gathered


def reduce_scatter(tensor: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks of (world_size * n, ...); each rank gets its own n rows."""
    world = world_size(group)
    if world == 1:
        return tensor
    tensor = tensor.contiguous()
    share = tensor.shape[0] // world
    scattered = tensor.new_empty((share, *tensor.shape[1:]))
    with collective("reduce_scatter"):
        dist.reduce_scatter_tensor(scattered, tensor, group=group)
    return scattered


def all_reduce_sum(tensor: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks, in a new tensor; without gradients."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def all_reduce_max(tensor: Tensor, group: Group = None) -> Tensor:
    """The maximum over ranks, in a new tensor; without gradients. A NaN may get lost: collectives promise nothing."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


def _all_reduce(tensor: Tensor, operation: Any, group: Group) -> Tensor:
    reduced = tensor.detach().clone()
    if world_size(group) > 1:
        with collective("all_reduce"):
            dist.all_reduce(reduced, op=operation, group=group)
    return reduced


class _AllGatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(gradients[0], ctx.group), None


def all_gather_with_gradient(tensor: Tensor, group: Group = None) -> Tensor:
    """Like `all_gather`; the backward pass sums, over the ranks, the gradients of this rank's rows.

    So if each rank back-propagates its share of a sum, every row receives the gradient of the whole sum.
    """
    if world_size(group) == 1:
        return tensor
    return _AllGatherWithGradient.apply(tensor, group)


def broadcast_object(value: T, source: int = 0) -> T:
    """Rank `source`'s value on every rank (plain data: it is pickled between processes of one job)."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    with collective("broadcast"):
        dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, on every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with collective("all_gather"):
        dist.all_gather_object(values, value)
    return values


_host_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def host_group(group: Group = None) -> dist.ProcessGroup:
    """The same ranks over gloo: what they agree on there waits for no device. All of them make the first call."""
    group = group or dist.group.WORLD
    assert group is not None
    if dist.get_backend(group) == "gloo":
        return group
    if group not in _host_groups:
        # Looked up in the module: the engine puts a timeout there.
        _host_groups[group] = dist.new_group(
            dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True
        )
    return _host_groups[group]


def check_agreement(description: str, problem: str | None, group: Group = None) -> None:
    """Raises ValueError on every rank of the group alike, if one has a problem or the descriptions differ.

    Three integers over the host's network: no device is waited for, and ranks that are about to call collectives of
    unequal sizes learn it before they hang.
    """
    if world_size(group) == 1:
        if problem:
            raise ValueError(problem)
        return
    host = host_group(group)
    digest = int.from_bytes(hashlib.blake2b(description.encode(), digest_size=7).digest(), "big")
    found = torch.tensor([digest, -digest, problem is not None])
    with collective("all_reduce"):  # the first in which a rank waits for slower ones
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=host)
    highest, negated_lowest, any_problem = found.tolist()
    if highest == -negated_lowest and not any_problem:
        return
    said: list[Any] = [None] * world_size(group)
    dist.all_gather_object(said, (description, problem), group=host)
    for number, (_, told) in enumerate(said):
        if told:
            raise ValueError(f"rank {number}: {told}")
    other = next(number for number, (text, _) in enumerate(said) if text != said[0][0])
    raise ValueError(f"the ranks disagree: rank 0 has {said[0][0]}; rank {other} has {said[other][0]}")


def raise_together(problem: str | None) -> None:
    """Raises ValueError on every rank if any rank has a problem, with the first one's words on all."""
    problems = [f"rank {r}: {p}" for r, p in enumerate(gather_objects(problem)) if p]
    if problems:
        raise ValueError(problems[0])


def barrier() -> None:
    if world_size() > 1:
        with collective("barrier"):
            dist.barrier()
