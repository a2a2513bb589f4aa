"""Which rank stands where, and what it is told of it."""

from __future__ import annotations

import random

import pytest

from symile_dist.positions import Place, positions


def test_ranks_of_a_node_follow_each_other_in_the_order_of_their_gpus() -> None:
    places = [Place("b", "10"), Place("a", "1"), Place("b", "2"), Place("a", "0"), Place("b", "0")]
    found = positions(places)
    assert [each.rank for each in found] == [2, 4, 1, 3, 0]
    assert [each.local_rank for each in found] == [2, 1, 1, 0, 0]
    assert [each.node_rank for each in found] == [0, 1, 0, 1, 0]
    assert [each.local_world_size for each in found] == [3, 2, 3, 2, 3]
    # A rank's device is its local rank among what it sees: the GPU that is its own.
    assert all(each.gpus[each.local_rank] == place.gpu for each, place in zip(found, places, strict=True))
    assert found[0].environment == {
        "RANK": "2",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "3",
        "NODE_RANK": "0",
        "CUDA_VISIBLE_DEVICES": "0,2,10",
    }


def test_without_gpus_no_devices_are_hidden() -> None:
    (alone,) = positions([Place("a", None)])
    assert alone.gpus == () and "CUDA_VISIBLE_DEVICES" not in alone.environment
    assert (alone.rank, alone.world_size, alone.local_rank, alone.local_world_size) == (0, 1, 0, 1)


@pytest.mark.parametrize("seed", range(5))
def test_every_rank_once_and_local_ranks_without_gaps(seed: int) -> None:
    generator = random.Random(seed)
    places = [Place(f"node-{node}", str(gpu)) for node in range(3) for gpu in generator.sample(range(16), 5)]
    generator.shuffle(places)
    found = positions(places)
    assert sorted(each.rank for each in found) == list(range(15))
    for node in {place.node for place in places}:
        ranks = sorted(each.rank for each, place in zip(found, places, strict=True) if place.node == node)
        local = sorted(each.local_rank for each, place in zip(found, places, strict=True) if place.node == node)
        assert ranks == list(range(ranks[0], ranks[0] + 5)) and local == list(range(5))
