"""Kernels on vectors, and random Fourier features whose inner products approximate them.

For two vectors (Rahimi and Recht, NeurIPS 2007): with W drawn from the kernel's spectral density and b uniform,

    k(u - v) = E[ 2 cos(W u + b) cos(W v + b) ].

For M vectors one phase for all will not do: a product of M cosines is a sum of cosines of all signed sums of their
arguments, and for an odd M none of these sums is free of b, so that the product's mean is zero. Here every vector has
frequencies W_m and phases b_m of its own, with

    sum_m W_m = 0,   sum_m b_m = 0,

and otherwise alike and independent. Then the plain sum of the arguments (and its negative) is the only one without a
phase:

    prod_m cos(W_m v_m + b_m) = 2^-(M-1) sum over signs e (e_1 = 1) of cos(sum_m e_m (W_m v_m + b_m))
    E[prod_m cos(W_m v_m + b_m)] = 2^-(M-1) E[cos(sum_m W_m v_m)] = 2^-(M-1) k(r),
    r^2 = the mean over the pairs of the M vectors of their squared distance,

so F features (2^(M-1) / F)^(1/M) cos(W_m v_m + b_m) have a product whose sum is, on average, k(r): 1 where all M
vectors are equal, and the less the farther they are from each other, in whatever order they come. For M = 2 it is
k(u - v), and these are the features above.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from math import pi, sqrt
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symile_dist.registry import suggestion
from symile_dist.seeding import philox


@dataclass(frozen=True)
class Kernel(ABC):
    """A positive definite function of the distance r between two vectors, 1 where they are equal.

    Of more than two, r is the root of their pairs' mean squared distance.
    """

    bandwidth: float

    @abstractmethod
    def __call__(self, squares: Tensor) -> Tensor:
        """r^2 -> the kernel's values."""

    @abstractmethod
    def frequencies(self, random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        """(K, F, D): for each of F features K vectors of D dimensions.

        E[cos(sum_k w_k . x_k)] = k(r) with r^2 = sum_k |x_k|^2, whatever the K vectors x_k.
        """


class Gaussian(Kernel):
    """exp(-r^2 / (2 sigma^2)), whose frequencies are N(0, 1 / sigma^2)."""

    def __call__(self, squares: Tensor) -> Tensor:
        return (squares / (-2 * self.bandwidth**2)).exp()

    def frequencies(self, random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, dtype=np.float32) / np.float32(self.bandwidth)


class InverseMultiquadric(Kernel):
    """c / sqrt(c^2 + r^2), a mixture of Gaussians: E[exp(-s r^2 / c^2)] with s ~ Gamma(1/2, 1).

    So a feature's frequencies are N(0, 2s / c^2), and 2s is the square of a standard normal number.
    """

    def __call__(self, squares: Tensor) -> Tensor:
        return (1 + squares / self.bandwidth**2).rsqrt()

    def frequencies(self, random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        drawn = random.standard_normal(shape, dtype=np.float32)
        return drawn * (random.standard_normal((shape[1], 1), dtype=np.float32) / np.float32(self.bandwidth))


_KERNELS: dict[str, type[Kernel]] = {"gaussian": Gaussian, "imq": InverseMultiquadric}


def make_kernel(name: str, bandwidth: float, number: int = 2) -> Kernel:
    """A kernel of `number` vectors.

    Args:
        name: `gaussian` or `imq`.
        bandwidth: sigma or c for two vectors. For M it is sqrt(M / 2) times as wide: M points that lie about at random
            are seldom all near each other, and where the kernel is flat nothing is learned.

    Raises ValueError for a kernel that does not exist, and a bandwidth that is not positive.
    """
    if name not in _KERNELS:
        raise ValueError(f"unknown kernel '{name}'{suggestion(str(name), list(_KERNELS))}")
    if not 0 < bandwidth < float("inf"):
        raise ValueError(f"bandwidth = {bandwidth} should be positive and finite")
    return _KERNELS[name](bandwidth * sqrt(number / 2))


class Waves(NamedTuple):
    """A draw of F random features for M vectors of dimension D: feature f of vector m is
    amplitude * cos(frequencies[m, f] . v_m + phases[m, f])."""

    frequencies: Tensor
    """(M, F, D)"""
    phases: Tensor
    """(M, F)"""

    @property
    def amplitude(self) -> float:
        number, features = self.phases.shape
        return float((2 ** (number - 1) / features) ** (1 / number))

    def __call__(self, vectors: Tensor, number: int = 0) -> Tensor:
        """(..., D) vectors of modality `number` -> (..., F) features."""
        return self.amplitude * (vectors @ self.frequencies[number].T + self.phases[number]).cos()


@lru_cache(maxsize=2)
def draw_waves(kernel: Kernel, features: int, dimension: int, number: int, *key: int | str) -> Waves:
    """Features of a kernel of `number` vectors, float32 on the CPU: a pure function of the arguments.

    Whoever calls it with the same key gets the same, on every rank, and nobody else's random numbers are touched. (Not
    under every release of numpy: its normal numbers may change.)
    """
    random = np.random.Generator(philox("random Fourier features", *key))
    phases = random.uniform(0, 2 * pi, (number, features))
    phases[-1] = -phases[:-1].sum(axis=0)
    drawn = kernel.frequencies(random, number - 1, features, dimension)
    # W_m = sum_k c_mk w_k. As c c^T = 2/(M-1) (1 - 1/M): sum_k |sum_m c_mk v_m|^2 = r^2, the mean over pairs.
    frequencies = np.zeros((number, features, dimension), dtype=np.float32)
    for corner, of_vector in zip(simplex(number).astype(np.float32), frequencies, strict=True):
        for coordinate, rows in zip(corner, drawn, strict=True):
            of_vector += coordinate * rows
    return Waves(torch.from_numpy(frequencies), torch.from_numpy(phases.astype(np.float32)))


def simplex(number: int) -> NDArray[np.float64]:
    """(M, M - 1): corners c_m of a regular simplex around 0, with c_m . c_n = 2 / (M - 1) ([m = n] - 1 / M).

    For two the numbers 1 and -1.
    """
    corners = np.zeros((number, number - 1))
    for k in range(1, number):  # Helmert's matrix
        corners[:k, k - 1] = 1.0
        corners[k, k - 1] = -k
        corners[:, k - 1] *= (2 / ((number - 1) * k * (k + 1))) ** 0.5
    return corners
