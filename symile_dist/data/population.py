"""Which samples of a folder of shards are used: those with the required modalities, less those in quarantine.

Their number is known from the manifest alone. An index is read when a sample of its shard is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from symile_dist.config import Config
from symile_dist.data.index import UNREADABLE, ShardError, ShardIndex, parse_index
from symile_dist.data.quarantine import WHOLE_SHARD, Quarantine
from symile_dist.data.recent import Recent
from symile_dist.data.shards import CachedShards, LocalShards
from symile_dist.seeding import philox

BoolArray = NDArray[np.bool_]
Int64Array = NDArray[np.int64]


class Requirement:
    """Says of samples whether they have the modalities that `data.require` asks for."""

    def __init__(self, config: Config) -> None:
        names = list(config.modalities)
        require = config.data.require
        self.members = [modality.member.lower() for modality in config.modalities.values()]
        """Of each modality; two may read the same one."""
        self.named = [names.index(name) for name in require] if isinstance(require, list) else []
        self.at_least = len(names) if require == "all" else require if isinstance(require, int) else 1

    def accepts(self, present: BoolArray) -> BoolArray:
        """(n, M) which modalities are there -> (n,)"""
        return np.asarray(present[:, self.named].all(axis=1) & (present.sum(axis=1) >= self.at_least))

    def __str__(self) -> str:
        if self.named:
            return "the members " + ", ".join(self.members[m] for m in self.named)
        every = self.at_least == len(self.members)
        return f"{'all' if every else f'{self.at_least}'} of the members {', '.join(dict.fromkeys(self.members))}"


class Population:
    """The samples of one dataset that are used, shard by shard.

    Args:
        name: of the dataset in the config.
        shards: where its bytes come from.
        first_id: number of its first sample among those of all datasets.
        withhold: take modalities away as `data.missing_probability` says.

    Raises ShardError when no sample has a modality's member, or none is used.
    """

    def __init__(
        self,
        name: str,
        shards: LocalShards | CachedShards,
        config: Config,
        quarantine: Quarantine,
        first_id: int = 0,
        withhold: bool = False,
    ) -> None:
        self.name, self.shards, self.quarantine = name, shards, quarantine
        self.manifest = shards.manifest
        self.requirement = Requirement(config)
        _check_members(self, list(config.modalities))
        self.shard_numbers = {shard.name: number for number, shard in enumerate(self.manifest.shards)}
        counts = [shard.samples for shard in self.manifest.shards]
        self.shard_ids = first_id + np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        """Number of each shard's first sample, stable over epochs, world sizes and restarts."""
        self._seed = config.seed
        self._withheld = _probabilities(config) if withhold else None
        self._indices: Recent[int, ShardIndex] = Recent(64)
        self._rows: Recent[tuple[int, frozenset[int]], Int64Array] = Recent(64)
        # Of small data a run has a hundred thousand epochs: not one entry for each of them.
        self._excluded: Recent[int, dict[int, frozenset[int]]] = Recent(64)
        accepted = [self._accepted_patterns(number) for number in range(len(counts))]
        self.base_sizes = [sum(count for count, used in patterns if used) for patterns in accepted]
        """Samples per shard that have what is required, in quarantine or not."""
        self._uniform = [all(used for _, used in patterns) for patterns in accepted]
        wanted = sum(1 << number for number, m in enumerate(self.manifest.members) if m in self.requirement.members)
        self._complete = [all(mask & wanted == wanted for mask, _ in entry.presence) for entry in self.manifest.shards]
        if not sum(self.base_sizes):
            raise ShardError(f"{self.manifest.url}: none of the {self.manifest.samples} samples has {self.requirement}")

    def _accepted_patterns(self, shard: int) -> list[tuple[int, bool]]:
        """(samples, used) for every combination of members that occurs in a shard."""
        bits = {member: 1 << number for number, member in enumerate(self.manifest.members)}
        entry = self.manifest.shards[shard]
        if not entry.presence:
            return []
        present = np.array(
            [[bool(mask & bits.get(m, 0)) for m in self.requirement.members] for mask, _ in entry.presence]
        )
        used = self.requirement.accepts(present).tolist()
        return [(count, bool(is_used)) for (_, count), is_used in zip(entry.presence, used, strict=True)]

    def name_of(self, sample_id: int) -> str:
        """Where a sample of `Batch.sample_ids` stands, for people."""
        shard = int(np.searchsorted(self.shard_ids, sample_id, side="right")) - 1
        return f"{self.manifest.shards[shard].name}, sample {sample_id - int(self.shard_ids[shard])}"

    def keep_indices(self, number: int) -> None:
        """How many are held in memory."""
        self._indices.limit = self._rows.limit = number

    # -- per epoch -----------------------------------------------------------------------------------------------

    def forget_epochs(self) -> None:
        """The quarantine has changed for epochs to come."""
        self._excluded.clear()

    def _excluded_in(self, epoch: int) -> dict[int, frozenset[int]]:
        """Shard -> rows that are left out in an epoch."""
        return self._excluded.get(
            epoch,
            lambda: {
                self.shard_numbers[shard]: frozenset(rows)
                for shard, rows in self.quarantine.excluded(self.name, epoch).items()
                if shard in self.shard_numbers
            },
        )

    def sizes(self, epoch: int) -> list[int]:
        """Samples used per shard. Opens the indices of those shards of which single samples are left out and not all
        samples have what is required."""
        sizes = list(self.base_sizes)
        for shard, rows in self._excluded_in(epoch).items():
            if WHOLE_SHARD in rows:
                sizes[shard] = 0
            elif self._uniform[shard]:
                sizes[shard] -= sum(row < self.manifest.shards[shard].samples for row in rows)
            else:
                try:
                    sizes[shard] = len(self.rows(shard, epoch))
                except UNREADABLE:  # here and now, perhaps not on other ranks: what training leaves out was used
                    sizes[shard] -= len(rows)
        return sizes

    def rows(self, shard: int, epoch: int) -> Int64Array:
        """Rows of the shard's index that are used in an epoch, in their order. Raises what `index` does."""
        excluded = self._excluded_in(epoch).get(shard, frozenset())
        if WHOLE_SHARD in excluded:
            return np.empty(0, dtype=np.int64)
        return self._rows.get((shard, excluded), lambda: self._used_rows(shard, excluded))

    def _used_rows(self, shard: int, excluded: frozenset[int]) -> Int64Array:
        rows = np.arange(self.manifest.shards[shard].samples, dtype=np.int64)
        if not self._uniform[shard]:
            rows = rows[self.requirement.accepts(self.native(shard))]
        return rows[~np.isin(rows, np.fromiter(excluded, dtype=np.int64))] if excluded else rows

    # -- per shard -----------------------------------------------------------------------------------------------

    def index(self, shard: int) -> ShardIndex:
        """Raises ShardError for an index that is damaged or of another shard, FileNotFoundError or StorageError."""
        return self._indices.get(shard, lambda: self._read_index(shard))

    def _read_index(self, shard: int) -> ShardIndex:
        entry = self.manifest.shards[shard]
        name = f"{self.manifest.url}/{entry.name}.idx"
        index = parse_index(self.shards.index(shard), name, self.manifest.url, entry.index_sha256)
        if len(index) != entry.samples:
            raise ShardError(
                f"{name}: has {len(index)} samples, the manifest says {entry.samples}; make them with: symile-dist "
                f"shards index {self.manifest.url} --force"
            )
        return index

    def native(self, shard: int) -> BoolArray:
        """(n, M) which modalities the samples of a shard have."""
        index = self.index(shard)
        there = index.present
        none = np.zeros(len(index), dtype=bool)
        columns = [
            there[:, index.members.index(member)] if member in index.members else none
            for member in self.requirement.members
        ]
        return np.stack(columns, axis=1)

    def complete(self, shard: int) -> bool:
        """Whether every sample of a shard comes with every modality."""
        return self._complete[shard] and self._withheld is None

    def present(self, shard: int, rows: Int64Array) -> BoolArray:
        """(len(rows), M): what is there, less what is withheld for the experiment. A sample always lacks the same."""
        present = self.native(shard)[rows]
        if self._withheld is None:
            return present
        entry = self.manifest.shards[shard]
        words = philox("missing", self._seed, self.name, entry.name).random_raw(entry.samples * present.shape[1])
        drawn = np.asarray(words, dtype=np.uint64).reshape(entry.samples, -1)[rows] / 2.0**64
        return np.asarray(present & (drawn >= self._withheld))


def _probabilities(config: Config) -> NDArray[np.float64] | None:
    """(M,) with which each modality is withheld; None where none is."""
    given = config.data.missing_probability
    found = [given.get(name, 0.0) if isinstance(given, dict) else given for name in config.modalities]
    return np.array(found) if any(found) else None


def _check_members(population: Population, modalities: Sequence[str]) -> None:
    known: Sequence[str] = population.manifest.members
    for modality, member in zip(modalities, population.requirement.members, strict=True):
        if member not in known:
            raise ShardError(
                f"{population.manifest.url}: no sample has a member '{member}' (modality '{modality}'); its members "
                f"are: {', '.join(known)}"
            )
