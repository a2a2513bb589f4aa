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

    The argsort of n 64-bit words; `stable` settles the (n^2 / 2^65 likely) ties the same way everywhere.
    """
    words = np.asarray(philox(*key).random_raw(n), dtype=np.uint64)
    return np.argsort(words, kind="stable").astype(np.int64)
