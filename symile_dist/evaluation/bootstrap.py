"""The bootstrap: how far a figure would vary over test sets of the same size (Symile: 10 of them)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from symile_dist.seeding import philox

AT_ONCE = 2**20
"""Numbers of `resample` that are in memory together, of 500,000 samples two resamples: what is computed of these needs
several times as much."""


class Estimate(NamedTuple):
    """A figure over resamples."""

    mean: float
    standard_error: float
    """The bootstrap's: the standard deviation over the resamples; 0 for a single one."""


def resample(samples: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """(resamples, samples) int64: how often each sample is drawn, with replacement. A function of its arguments.

    It comes in parts, a few resamples each, in order.
    """
    # Never one resample alone where there are several: torch may add up one row in another order than each of many.
    parts = max(1, resamples // max(2, AT_ONCE // max(1, samples)))
    for numbers in np.array_split(np.arange(resamples), parts):
        times = np.empty((len(numbers), samples), np.int64)
        for row, number in enumerate(numbers.tolist()):
            drawn = np.random.Generator(philox("bootstrap", seed, number)).integers(0, samples, samples)
            times[row] = np.bincount(drawn, minlength=samples)
        yield torch.from_numpy(times)


def estimate(values: Tensor) -> Estimate:
    """Mean and standard error of (resamples,) figures; NaN, which a resample without queries gives, is left out."""
    found = values[values.isfinite()].double()
    if len(found) == 0:
        return Estimate(float("nan"), float("nan"))
    return Estimate(float(found.mean()), float(found.std(unbiased=True)) if len(found) > 1 else 0.0)


def bootstrap_means(values: Sequence[Tensor], resamples: int, seed: int) -> list[Estimate]:
    """Of the mean of each of some (n,) values over test sets that `resample` draws."""
    means = [[weighted_means(v, times) for v in values] for times in resample(len(values[0]), resamples, seed)]
    return [estimate(torch.cat(parts)) for parts in zip(*means, strict=True)]


def weighted_means(values: Tensor, times: Tensor) -> Tensor:
    """(n,) or (resamples, n) values, (resamples, n) times -> (resamples,) means, NaN where nothing was drawn."""
    return (values.double() * times).sum(dim=1) / times.sum(dim=1)
