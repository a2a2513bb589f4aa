"""Which rank an actor becomes, by where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """Where an actor stands: its node, and its GPU there, as Ray names it."""

    node: str
    gpu: str | None


class Position(NamedTuple):
    """Of a rank among all ranks."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    gpus: tuple[str, ...]
    """Of all ranks of its node, by local rank: they reach each other's memory only where they see all devices."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables of torchrun, for DeepSpeed and for the user's own code."""
        names = ("rank", "world_size", "local_rank", "local_world_size", "node_rank")
        found = {name.upper(): str(getattr(self, name)) for name in names}
        return found | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})


def positions(places: Sequence[Place]) -> list[Position]:
    """Of each actor, in the order given: a node's ranks follow each other, in the order of their GPUs."""
    nodes: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        nodes.setdefault(place.node, []).append(index)
    found: dict[int, Position] = {}
    for node_rank, members in enumerate(nodes.values()):
        members.sort(key=lambda index: (len(places[index].gpu or ""), places[index].gpu or ""))
        gpus = tuple(gpu for index in members if (gpu := places[index].gpu) is not None)
        for local_rank, index in enumerate(members):
            found[index] = Position(len(found), len(places), local_rank, len(members), node_rank, gpus)
    return [found[index] for index in range(len(places))]
