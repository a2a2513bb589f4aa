"""Reading samples: one read per sample, every member checked against its CRC-32.

A sample's **span** runs from its first wanted member to the end of its last one. Spans are computed for a whole batch
at once and read one by one, each just before it is decoded: its bytes are then still in the processor's cache, and a
batch of large samples never stands in memory as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32

from symile_dist.data.index import ABSENT, BLOCK, ShardIndex

Read = Callable[[int, int], bytes]
"""read(length, offset) -> bytes of a shard: fewer where the file ends early. Raises OSError."""


class BadMember(NamedTuple):
    """Why a sample could not be read."""

    kind: str
    """`truncated`, `checksum` or `open`"""
    member: str
    offset: int
    """Of the member's data in the tar file, bytes."""
    reason: str


@dataclass(frozen=True)
class Spans:
    """Where the wanted members of n samples lie in their shards."""

    members: Sequence[str]
    """Names of the F wanted members."""
    offsets: list[int]
    """(n,) where each span begins in its shard."""
    lengths: list[int]
    """(n,) bytes"""
    slices: list[tuple[list[int], list[int]]]
    """Per member the (n,) begins and ends within the spans; an absent one is empty."""
    checksums: list[list[int]]
    """(F, n)"""

    @classmethod
    def of(cls, places: NDArray[np.uint32], members: Sequence[str]) -> Spans:
        """Of (n, 3, F) places, rows of `ShardIndex.places`."""
        begins, sizes = places[:, 0].astype(np.int64) * BLOCK, places[:, 1].astype(np.int64)
        checksums, there = places[:, 2], sizes != ABSENT
        if there.size and there.all():
            offsets = begins.min(axis=1)
            begins -= offsets[:, None]
        else:  # an absent member is an empty slice at the beginning of the span
            never = np.iinfo(np.int64).max
            offsets = np.where(there, begins, never).min(axis=1, initial=never)
            offsets[~there.any(axis=1)] = 0
            begins = np.where(there, begins - offsets[:, None], 0)
            sizes = np.where(there, sizes, 0)
            checksums = np.where(there, checksums, 0)  # the CRC-32 of nothing is 0
        ends = begins + sizes
        lengths = ends.max(axis=1, initial=0).tolist()
        slices = list(zip(begins.T.tolist(), ends.T.tolist(), strict=True))
        return cls(members, offsets.tolist(), lengths, slices, checksums.T.tolist())

    def read(self, reads: Sequence[Read], first: int = 0) -> Iterator[list[bytes] | BadMember]:
        """The members of each sample from `first` on, b"" for an absent one, or why they are not what the index says.

        `reads`: (n,) of the samples' shards.
        """
        slices = zip(*(zip(begins[first:], ends[first:], strict=True) for begins, ends in self.slices), strict=True)
        checksums = zip(*(column[first:] for column in self.checksums), strict=True)
        # A loop of few steps: this is where a loader process spends its time, 5 microseconds a sample.
        for number, (wanted, expected) in enumerate(zip(slices, checksums, strict=True), first):
            length = self.lengths[number]
            try:
                span = reads[number](length, self.offsets[number])
            except OSError as error:
                reason = f"the disk gives an error for these bytes: {error.strerror or error}"
                yield BadMember("open", "", self.offsets[number], reason)
                continue
            parts = [span[begin:end] for begin, end in wanted]
            if tuple(map(crc32, parts)) == expected and len(span) == length:
                yield parts
            else:
                yield self._why(number, span)

    def _why(self, number: int, span: bytes) -> BadMember:
        for member, (begins, ends), checksums in zip(self.members, self.slices, self.checksums, strict=True):
            begin, end = begins[number], ends[number]
            offset = self.offsets[number] + begin
            if len(span) < end:
                last = self.offsets[number] + len(span)
                return BadMember(
                    "truncated", member, offset, f"the file ends at byte {last}{'' if span else ' or before'}"
                )
            if crc32(span[begin:end]) != checksums[number]:
                return BadMember("checksum", member, offset, "its bytes do not match their checksum")
        raise AssertionError("every member is as the index says")


def read_rows(
    read: Read, index: ShardIndex, rows: NDArray[np.int64], columns: Sequence[int]
) -> list[list[bytes] | BadMember]:
    """The wanted members of some rows of one shard, as `Spans.read` gives them."""
    spans = Spans.of(index.places[rows][:, :, list(columns)], [index.members[column] for column in columns])
    return list(spans.read([read] * len(rows)))
