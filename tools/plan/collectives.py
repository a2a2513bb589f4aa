"""Collectives as torch.distributed is handed them, and a world of any size to try an objective in.

`recorded` stands in for a process group: whoever asks gets the world's size, and collectives are written down and do
nothing. On the meta device there is nothing to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from symile_dist import distributed


class Collective(NamedTuple):
    """One call on one rank."""

    name: str
    """As torch.distributed has it."""
    dtype: str
    full_bytes: int
    """Of the gathered, reduced or to-be-scattered tensor: all ranks' parts together."""
    own_bytes: int
    """Of what a rank hands in."""
    purpose: str = "objective"

    def wire_bytes(self, world_size: int) -> float:
        """What a rank sends by the ring algorithms: what no algorithm can do with less of."""
        share = (world_size - 1) / world_size
        return {"all_reduce": 2 * share, "broadcast": 1.0}.get(self.name, share) * self.full_bytes


def element_bytes(dtype: str) -> int:
    kind = getattr(torch, dtype)
    assert isinstance(kind, torch.dtype)
    return kind.itemsize


def all_reduce(elements: int, dtype: str, purpose: str) -> Collective:
    size = elements * element_bytes(dtype)
    return Collective("all_reduce", dtype, size, size, purpose)


def broadcast(elements: int, dtype: str, purpose: str) -> Collective:
    return all_reduce(elements, dtype, purpose)._replace(name="broadcast")


def all_gather(share: int, world_size: int, dtype: str, purpose: str) -> Collective:
    """`share`: elements of a rank."""
    size = share * element_bytes(dtype)
    return Collective("all_gather_into_tensor", dtype, size * world_size, size, purpose)


def reduce_scatter(elements: int, dtype: str, purpose: str) -> Collective:
    """`elements`: of all ranks' parts."""
    size = elements * element_bytes(dtype)
    return Collective("reduce_scatter_tensor", dtype, size, size, purpose)


def summed(calls: Sequence[Collective], world_size: int) -> list[dict[str, Any]]:
    """Rows by purpose, name and dtype: calls, bytes."""
    numbers: Counter[tuple[str, str, str]] = Counter()
    full, own, wire = (Counter[tuple[str, str, str]]() for _ in range(3))
    for call in calls:
        key = (call.purpose, call.name, call.dtype)
        numbers[key] += 1
        full[key] += call.full_bytes
        own[key] += call.own_bytes
        wire[key] += round(call.wire_bytes(world_size))
    return [
        {
            "purpose": key[0],
            "collective": key[1],
            "dtype": key[2],
            "calls": number,
            "full_bytes": full[key],
            "own_bytes": own[key],
            "wire_bytes": wire[key],
        }
        for key, number in numbers.items()
    ]


# name in torch.distributed -> the arguments' places: of what is as large as all parts together, and of a rank's own
PLACES = {
    "all_reduce": (0, 0),
    "broadcast": (0, 0),
    "all_gather_into_tensor": (0, 1),
    "reduce_scatter_tensor": (1, 1),
    "all_gather": (0, 1),
    "reduce_scatter": (1, 1),
    "all_to_all_single": (1, 1),
}


def _size(value: Tensor | Sequence[Tensor]) -> int:
    tensors = [value] if isinstance(value, Tensor) else value
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _recorder(name: str, calls: list[Collective]) -> Any:
    whole, own = PLACES[name]

    def call(*arguments: Any, **options: Any) -> None:
        first = arguments[own] if isinstance(arguments[own], Tensor) else arguments[own][0]
        dtype = str(first.dtype).removeprefix("torch.")
        calls.append(Collective(name, dtype, _size(arguments[whole]), _size(arguments[own])))

    return call


@contextmanager
def recorded(world_size: int) -> Iterator[list[Collective]]:
    """Inside, this process takes itself for rank 0 of so many; gives the list that its collectives are written to."""
    calls: list[Collective] = []

    def gather_object(into: list[Any], value: Any, group: Any = None) -> None:
        into[:] = [value] * len(into)

    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "get_world_size": lambda group=None: world_size,
        "get_rank": lambda group=None: 0,
        "get_backend": lambda group=None: "gloo",
        "all_gather_object": gather_object,
        **{name: _recorder(name, calls) for name in PLACES},
    }
    with ExitStack() as patches:
        for name, function in stand_ins.items():
            patches.enter_context(patch.object(dist, name, function))
        patches.enter_context(patch.object(distributed, "host_group", lambda group=None: group))
        yield calls


__all__ = [
    "Collective",
    "all_gather",
    "all_reduce",
    "broadcast",
    "element_bytes",
    "recorded",
    "reduce_scatter",
    "summed",
]
