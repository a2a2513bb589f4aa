"""Samples that could not be read: written down as they are found, left out from the next epoch on.

The list is a file of JSON lines that only grows while a run trains, so a checkpoint names the part that it knows by
its length and digest. Two places have one: a run's directory (what the run found, and from which epoch it holds) and,
optionally, a folder of shards (`symile-dist shards verify --quarantine`), whose list every new run begins with.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from symile_dist.data.index import ShardError
from symile_dist.storage import write_atomic

QUARANTINE = "quarantine.jsonl"
WHOLE_SHARD = -1
NEXT_EPOCH = -1


class Exclusion(NamedTuple):
    """A line of the list."""

    dataset: str
    """Name in the config; empty in a folder's own list."""
    shard: str
    row: int
    """Of the shard's index; WHOLE_SHARD for all of them."""
    epoch: int
    """From which on it holds. NEXT_EPOCH where a person asked for it: the first that begins when the run goes on."""
    kind: str = ""
    member: str = ""
    offset: int = -1
    reason: str = ""
    step: int = 0
    """At which it was found."""
    restored: bool = False
    """The sample (or with WHOLE_SHARD the shard and all its samples) is used again."""

    def to_line(self) -> str:
        return json.dumps(self._asdict(), sort_keys=True, ensure_ascii=False) + "\n"


class Quarantine:
    """The list of one run, in memory: the same on every rank."""

    def __init__(self, entries: Iterable[Exclusion] = ()) -> None:
        self.entries: list[Exclusion] = []
        self._digest = hashlib.sha256()
        self.add(entries)

    def add(self, entries: Iterable[Exclusion]) -> None:
        for entry in entries:
            self.entries.append(entry)
            self._digest.update(entry.to_line().encode())

    def __getstate__(self) -> list[Exclusion]:
        return self.entries  # a hash under way cannot be pickled

    def __setstate__(self, entries: list[Exclusion]) -> None:
        self.__init__(entries)  # type: ignore[misc]

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"entries": len(self.entries), "sha256": self._digest.hexdigest()}

    def excluded(self, dataset: str, epoch: int) -> dict[str, set[int]]:
        """Shard -> rows that are left out in an epoch (WHOLE_SHARD among them: all)."""
        rows: defaultdict[str, set[int]] = defaultdict(set)
        for entry in self.entries:
            if entry.dataset != dataset or entry.epoch > epoch:
                continue
            if not entry.restored:
                rows[entry.shard].add(entry.row)
            elif entry.row == WHOLE_SHARD:
                rows[entry.shard].clear()
            else:
                rows[entry.shard].discard(entry.row)
        return {shard: found for shard, found in rows.items() if found}

    def epochs(self, dataset: str) -> list[int]:
        """The epochs at which the population changes."""
        return sorted({entry.epoch for entry in self.entries if entry.dataset == dataset})

    def worst_shards(self, count: int = 3) -> list[tuple[str, int]]:
        """The shards with the most entries."""
        return Counter(entry.shard for entry in self.entries if not entry.restored).most_common(count)


def parse_quarantine(content: bytes, name: str) -> list[Exclusion]:
    """Raises ShardError for a list that is damaged. A last line that a killed process left unfinished is no damage."""
    entries = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            entry = Exclusion(**json.loads(line))
            if not (isinstance(entry.row, int) and isinstance(entry.epoch, int) and isinstance(entry.shard, str)):
                raise ValueError("a field is of another type")
        except (ValueError, TypeError) as error:
            raise ShardError(f"{name}:{number}: damaged quarantine list: {error}") from None
        entries.append(entry)
    return entries


def read_quarantine(path: Path) -> list[Exclusion]:
    """The lines of a list; none where there is no file. Raises ShardError for a damaged one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return parse_quarantine(content, str(path))


def write_quarantine(path: Path, entries: Sequence[Exclusion]) -> None:
    content = "".join(entry.to_line() for entry in entries).encode()
    write_atomic(path, lambda file: file.write(content))


def continued(path: Path, saved: dict[str, Any]) -> tuple[Quarantine, list[Exclusion]]:
    """The part of a run's list that a checkpoint knows, and what a person has restored since.

    What the run itself found after the checkpoint is left out: it will be found again. Raises ShardError when the file
    is not the one that the checkpoint was made with.
    """
    entries = read_quarantine(path)
    known = Quarantine(entries[: saved["entries"]])
    if known.state != saved:
        raise ShardError(
            f"{path}: is not the list that the checkpoint was made with; put it back, or begin a new run with "
            "run.init_from"
        )
    return known, list(takewhile(lambda entry: entry.restored, entries[saved["entries"] :]))
