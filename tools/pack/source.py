"""What a packer needs of a source: how many bytes each sample takes, and the samples themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
"""Bytes: a tar file holds each member as a header and data, both in whole blocks."""
LARGEST_MEMBER = 2**32 - 2
"""Bytes: the index of a shard holds sizes as u32, of which the last means absent."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""
ReadSample = Callable[[int, int, int], tuple[str, dict[str, bytes]]]
"""(row, first byte, last byte + 1 of the row in its table) -> key, {suffix: bytes}"""


class Row(NamedTuple):
    """One sample that is to be packed."""

    number: int
    """From 0, in the order of the source."""
    start: int
    end: int
    """Where it stands in its table, in bytes; 0 where the source is no table."""
    tar_bytes: int
    """What its members take in a shard."""


@dataclass
class Survey:
    """What a walk over the whole source found, before anything is written."""

    starts: NDArray[np.int64]
    """(n + 1,): byte at which each row of the table begins, and its end; zeros where the source is no table."""
    tar_bytes: NDArray[np.int64]
    """(n,): what the sample takes in a shard; 0 where it is skipped."""
    members: dict[str, int] = field(default_factory=dict)
    """Suffix -> samples that have it."""
    absent: dict[str, int] = field(default_factory=dict)
    """Column -> packed samples without its member, because it is empty or its file is missing."""
    skipped: int = 0
    """Samples left out."""
    remarks: list[str] = field(default_factory=list)
    """What the user should know."""


class Source(Protocol):
    """Travels to other processes: holds names and paths, no open files."""

    def parameters(self) -> dict[str, Any]:
        """Everything that determines the samples, as JSON: never a path of this machine, but digests of the inputs."""

    def survey(self, progress: Progress) -> Survey:
        """Raises ValueError for whatever is wrong with the inputs."""

    def open(self) -> AbstractContextManager[ReadSample]:
        """Opens the inputs. What is yielded raises ValueError or OSError for what cannot be read."""


def tar_bytes(sizes: Iterable[int]) -> int:
    """Bytes that members of these sizes take in a tar file."""
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes)


def key_of(row: int) -> str:
    return f"{row:08d}"


def json_bytes(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()
