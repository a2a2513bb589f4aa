"""Random numbers that are a pure function of their key, on every machine and in every release of numpy.

numpy promises the stream of a bit generator (NEP 19) but not that of `Generator.permutation`, and torch promises
neither. So permutations are made here from the raw Philox stream: an order that a checkpoint relies on cannot change
under an upgrade.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def philox(*key: int | str) -> np.random.Philox:
    """A counter-based bit generator keyed on any number of integers and strings."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))


def permutation(n: int, *key: int | str) -> NDArray[np.int64]:
    """A uniform permutation of range(n), a pure function of (n, key).

    64-bit words, whose lowest bits are replaced with their place, are sorted: the order of their high bits is the
    permutation, and the place settles ties the same way everywhere. (Sorting is several times faster than argsort.)
    """
    words = np.asarray(philox(*key).random_raw(n), dtype=np.uint64)
    mask = np.uint64((1 << max(0, n - 1).bit_length()) - 1)
    return (np.sort((words & ~mask) | np.arange(n, dtype=np.uint64)) & mask).astype(np.int64)
