"""Process groups, gathers with gradients, and decisions that all ranks agree on.

Everything works without a process group too, as a world of one.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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
    dist.all_gather_into_tensor(gathered, tensor, group=group)
    return gathered


def reduce_scatter(tensor: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks of (world_size * n, ...); each rank gets its own n rows."""
    world = world_size(group)
    if world == 1:
        return tensor
    tensor = tensor.contiguous()
    share = tensor.shape[0] // world
    if dist.get_backend(group) == "gloo":  # has no reduce-scatter of tensors on every release
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor[rank(group) * share : (rank(group) + 1) * share]
    scattered = tensor.new_empty((share, *tensor.shape[1:]))
    dist.reduce_scatter_tensor(scattered, tensor, group=group)
    return scattered


def all_reduce_sum(tensor: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks, in a new tensor; without gradients."""
    total = tensor.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


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
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, on every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(problem: str | None) -> None:
    """Raises ValueError on every rank if any rank has a problem, with the first one's words on all."""
    problems = [f"rank {r}: {p}" for r, p in enumerate(gather_objects(problem)) if p]
    if problems:
        raise ValueError(problems[0])


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
