"""Random numbers by key: pure, and not to change under anyone's feet."""

from __future__ import annotations

import numpy as np
import pytest

from symile_dist.seeding import permutation, philox

GOLDEN_PERMUTATION = [2, 4, 3, 6, 5, 9, 0, 1, 7, 8]
GOLDEN_WORDS = [3788169953269747228, 5239795085842618714]


def test_permutations_are_the_ones_that_checkpoints_rely_on() -> None:
    # Golden: a change here changes the data order and the negatives of every run that resumes.
    assert permutation(10, "shards", 0, 1).tolist() == GOLDEN_PERMUTATION
    assert [int(word) for word in np.asarray(philox("augment", 3).random_raw(2))] == GOLDEN_WORDS


@pytest.mark.parametrize("size", [0, 1, 2, 17, 1000])
def test_is_a_permutation(size: int) -> None:
    assert sorted(permutation(size, "k").tolist()) == list(range(size))


def test_pure_function_of_the_key() -> None:
    assert permutation(50, "a", 1, 2).tolist() == permutation(50, "a", 1, 2).tolist()


@pytest.mark.parametrize("other", [("a", 1, 3), ("a", 2, 2), ("b", 1, 2), ("a", 12), ("a", 1, 2, 0)])
def test_every_part_of_the_key_matters(other: tuple[int | str, ...]) -> None:
    assert permutation(50, "a", 1, 2).tolist() != permutation(50, *other).tolist()


def test_every_place_is_equally_likely() -> None:
    draws = np.stack([permutation(5, "uniform", trial) for trial in range(4000)])
    counts = np.stack([np.bincount(draws[:, place], minlength=5) for place in range(5)])
    # Each count is binomial(4000, 1/5): mean 800, standard deviation 25.3.
    assert np.abs(counts - 800).max() < 5 * 25.3, counts.tolist()
