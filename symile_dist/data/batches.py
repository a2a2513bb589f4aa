"""One rank's share of a global batch: from slots to bytes, from bytes to tensors.

Whatever is wrong with a shard, a batch keeps its size: a sample that cannot be read leaves its slot marked invalid, so
the order never shifts and all ranks stay in step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from symile_dist.config import Config, ModalityConfig
from symile_dist.data.cache import ShardCache
from symile_dist.data.holder import UNREADABLE, Holder
from symile_dist.data.index import BLOCK, BadMember, ShardError, read_rows
from symile_dist.data.order import Order
from symile_dist.data.population import Population
from symile_dist.data.shards import CachedShards
from symile_dist.errors import StorageError
from symile_dist.registry import DECODERS, TRANSFORMS, build, check_options, resolve
from symile_dist.seeding import philox
from symile_dist.types import Batch, Fault, Inputs, Padded, ReadCounts

UNDECODABLE = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, MemoryError)
"""What a decoder or transform may raise over bytes from anywhere; one's own decoder is not expected to be careful."""


@dataclass(frozen=True)
class _Reader:
    """How one modality comes from its member's bytes to a tensor."""

    name: str
    member: str
    decode: Any
    decode_options: dict[str, Any]
    transform: Any

    @classmethod
    def from_config(cls, name: str, modality: ModalityConfig) -> _Reader:
        decode = resolve(modality.decoder.name, DECODERS, "decoder")
        check_options(decode, {"data": b"", **modality.decoder.options}, "decoder", modality.decoder.name)
        transform = build(modality.transform.name, modality.transform.options, TRANSFORMS, "transform")
        return cls(name, modality.member.lower(), decode, modality.decoder.options, transform)

    def __call__(self, data: bytes, rng: np.random.Generator | None) -> torch.Tensor:
        tensor = self.transform(self.decode(data, **self.decode_options), rng)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"the transform of '{self.name}' gives {type(tensor).__name__}, not a tensor")
        return tensor

    @property
    def variable_length(self) -> bool:
        return bool(getattr(self.transform, "variable_length", False))

    def differs(self, tensor: torch.Tensor, example: torch.Tensor) -> str | None:
        """Why a tensor cannot stand in a batch with the example, or None."""
        skipped = 1 if self.variable_length else 0
        if tensor.dtype == example.dtype and tensor.shape[skipped:] == example.shape[skipped:]:
            return None
        return (
            f"is {tensor.dtype} {tuple(tensor.shape)} where others are {example.dtype} {tuple(example.shape)}: set a "
            "size in the transform, or give the transform `variable_length = True`"
        )


def collate(samples: list[torch.Tensor], variable_length: bool) -> Inputs:
    """Stacks samples of one shape, or pads their first dimension with zeros."""
    if not variable_length:
        return torch.stack(samples)
    lengths = torch.tensor([len(sample) for sample in samples], dtype=torch.int64)
    first = samples[0]
    values = first.new_zeros((len(samples), int(lengths.max()), *first.shape[1:]))
    for row, sample in enumerate(samples):
        values[row, : len(sample)] = sample
    return Padded(values, lengths)


@dataclass
class RawBatch:
    """One rank's share of a global batch, as bytes."""

    samples: list[list[bytes] | None]
    """Per slot the bytes of each of `StepDataset.members`, b"" for an absent one; None: no sample, or unreadable."""
    present: NDArray[np.bool_]
    """(n, M)"""
    sample_ids: NDArray[np.int64]
    """(n,): -1 where the slot holds no sample"""
    places: list[tuple[int, int, int, int]]
    """(dataset, shard, row, epoch) per slot; row -1 where it is not known."""
    faults: list[Fault]
    counts: ReadCounts


class StepDataset(Dataset[Batch]):
    """`dataset[t]` is this rank's share of global batch t. Map-style, so that batches come back in order.

    Raises ShardError when no sample can be read that shows what shape each modality has.
    """

    def __init__(
        self,
        populations: Sequence[Population],
        order: Order,
        config: Config,
        rank: int,
        train: bool,
        cache: ShardCache,
        stop_step: int,
    ) -> None:
        self.populations, self.order, self.rank, self.train = list(populations), order, rank, train
        self.holder, self.seed = Holder(self.populations, order, cache, stop_step), config.seed
        self.label = None if train else config.data.label
        self.metadata_member = config.data.metadata_member
        self.readers = [_Reader.from_config(name, modality) for name, modality in config.modalities.items()]
        wanted = [reader.member for reader in self.readers]
        self.members = list(dict.fromkeys([*wanted, self.metadata_member] if self.label else wanted))
        share = order.global_batch_size // config.world_size
        self.low, self.high = rank * share, (rank + 1) * share
        self.examples = self._find_examples()
        """A tensor of each modality."""

    # -- bytes ---------------------------------------------------------------------------------------------------

    def raw(self, step: int) -> RawBatch:
        """The bytes of this rank's share of a global batch. Never raises for what a shard holds: see `faults`."""
        slots = self.order.slots(step, self.low, self.high)
        size = self.high - self.low
        raw = RawBatch(
            [None] * size,
            np.ones((size, len(self.readers)), dtype=bool),
            np.full(size, -1, dtype=np.int64),
            [(-1, -1, -1, -1)] * size,
            [],
            ReadCounts(),
        )
        unreachable = self.holder.hold(step, self.low, self.high)
        opened = sum(population.shards.opened for population in self.populations)
        # Slot numbers by (dataset, shard, epoch): each group is read in one go.
        keys = np.stack([slots.dataset, slots.shard, slots.epoch])
        groups, member = np.unique(keys[:, slots.shard >= 0], axis=1, return_inverse=True)
        numbers = np.flatnonzero(slots.shard >= 0)
        ends = np.cumsum(np.bincount(member.ravel(), minlength=groups.shape[1]))
        by_group = np.split(numbers[np.argsort(member.ravel(), kind="stable")], ends)[:-1]
        for (dataset, shard, epoch), at in zip(groups.T.tolist(), by_group, strict=True):
            self._read_group(raw, dataset, shard, epoch, at, slots.row[at], unreachable.get((dataset, shard)))
        names = [population.name for population in self.populations]
        raw.counts.samples = dict(Counter(names[dataset] for dataset in slots.dataset[slots.shard >= 0].tolist()))
        raw.counts.shards_opened = sum(population.shards.opened for population in self.populations) - opened
        return raw

    def _read_group(
        self,
        raw: RawBatch,
        dataset: int,
        shard: int,
        epoch: int,
        at: NDArray[np.int64],
        places: NDArray[np.int64],
        unreachable: str | None,
    ) -> None:
        """Reads the samples of one shard into their slots."""
        population = self.populations[dataset]
        name = population.manifest.shards[shard].name
        rows = None
        try:
            if unreachable is not None:
                raise StorageError(unreachable)
            rows = population.rows(shard, epoch)[places]
            index = population.index(shard)
            present = population.present(shard, rows)
            columns = [index.members.index(m) for m in self.members if m in index.members]
            parts = self._read_rows(dataset, shard, rows, columns)
        except UNREADABLE as error:
            kind = "index" if isinstance(error, ShardError) else "open"
            raw.faults.append(Fault(kind, population.name, name, -1, "", -1, str(error)))
            for number, slot in enumerate(at.tolist()):
                row = -1 if rows is None else int(rows[number])
                raw.places[slot] = (dataset, shard, row, epoch)
                raw.sample_ids[slot] = population.shard_ids[shard] + row if row >= 0 else -1
            return
        raw.sample_ids[at] = population.shard_ids[shard] + rows
        raw.present[at] = present
        absent = [number for number, m in enumerate(self.members) if m not in index.members]
        for slot, row, found in zip(at.tolist(), rows.tolist(), parts, strict=True):
            raw.places[slot] = (dataset, shard, row, epoch)
            if isinstance(found, BadMember):
                raw.faults.append(
                    Fault(found.kind, population.name, name, row, found.member, found.offset, found.reason)
                )
                continue
            for number in absent:
                found.insert(number, b"")
            raw.samples[slot] = found
            raw.counts.bytes += sum(map(len, found))

    def _read_rows(
        self, dataset: int, shard: int, rows: NDArray[np.int64], columns: list[int]
    ) -> list[list[bytes] | BadMember]:
        """`read_rows`; what a cache gives wrongly is fetched again once, and a disk's error spoils no other row."""
        population = self.populations[dataset]
        index, shards = population.index(shard), population.shards
        again = isinstance(shards, CachedShards)
        read = shards.read(shard)
        try:
            parts = read_rows(read, index, rows, columns)
            again = again and any(isinstance(part, BadMember) for part in parts)
        except OSError:
            if not again and len(rows) > 1:
                return [self._read_rows(dataset, shard, rows[i : i + 1], columns)[0] for i in range(len(rows))]
            if not again:
                offset = int(index.row_starts[rows[0]])
                return [BadMember("open", "", offset, "the disk gives an error for these bytes")]
        if again:
            assert isinstance(shards, CachedShards)
            shards.forget(shard)
            reasons = self.holder.hold_again()
            if (dataset, shard) in reasons:
                raise StorageError(reasons[dataset, shard])
            parts = read_rows(shards.read(shard), index, rows, columns)
        return parts

    # -- tensors -------------------------------------------------------------------------------------------------

    def __getitem__(self, step: int) -> Batch:
        raw = self.raw(step)
        samples: list[list[torch.Tensor] | None] = []
        labels: list[str] = []
        for slot, parts in enumerate(raw.samples):
            tensors, label = None, ""
            if parts is not None:
                try:
                    tensors, label = self._decode(raw, slot, parts)
                except _Undecodable as error:
                    dataset, shard, row, _ = raw.places[slot]
                    population = self.populations[dataset]
                    name = population.manifest.shards[shard].name
                    offset = _offset_of(population, shard, row, error.member)
                    raw.faults.append(Fault("decode", population.name, name, row, error.member, offset, str(error)))
            samples.append(tensors)
            labels.append(label)
        filled = [sample if sample is not None else self.examples for sample in samples]
        inputs = {
            reader.name: collate([tensors[m] for tensors in filled], reader.variable_length)
            for m, reader in enumerate(self.readers)
        }
        valid = torch.tensor([sample is not None for sample in samples])
        raw.counts.missing = {
            reader.name: count
            for m, reader in enumerate(self.readers)
            if (count := int((~raw.present[valid.numpy(), m]).sum()))
        }
        return Batch(
            inputs,
            torch.from_numpy(raw.present),
            valid,
            torch.from_numpy(raw.sample_ids),
            labels,
            raw.faults,
            raw.counts,
        )

    def _decode(self, raw: RawBatch, slot: int, parts: list[bytes]) -> tuple[list[torch.Tensor], str]:
        """The tensors and the label of one sample: zeros in the place of a modality that it lacks."""
        sample_id, epoch = int(raw.sample_ids[slot]), raw.places[slot][3]
        data = dict(zip(self.members, parts, strict=True))
        rng = np.random.Generator(philox("augment", self.seed, epoch, sample_id)) if self.train else None
        tensors = []
        for m, reader in enumerate(self.readers):
            example = self.examples[m]
            if not raw.present[slot, m]:
                tensors.append(torch.zeros_like(example))
                continue
            try:
                tensor = reader(data[reader.member], rng)
            except UNDECODABLE as error:
                raise _Undecodable(reader.member, str(error) or type(error).__name__) from error
            problem = reader.differs(tensor, example)
            if problem:
                raise _Undecodable(reader.member, problem)
            tensors.append(tensor)
        return tensors, self._label(data, sample_id)

    def _label(self, data: dict[str, bytes], sample_id: int) -> str:
        label = f"sample {sample_id}"  # a class of its own, which no label of another sample equals
        if self.label is None or not data.get(self.metadata_member):
            return label
        try:
            metadata = json.loads(data[self.metadata_member])
        except (ValueError, RecursionError) as error:
            raise _Undecodable(self.metadata_member, f"not JSON: {error}") from error
        if not isinstance(metadata, dict):
            raise _Undecodable(self.metadata_member, "is not a JSON object")
        return str(metadata.get(self.label, label))

    def _find_examples(self) -> list[torch.Tensor]:
        """A tensor of each modality, of the shape that most of the first readable samples have."""
        found: list[list[torch.Tensor]] = [[] for _ in self.readers]
        reason: Exception | str = "none of the first samples has it"
        for population in self.populations:
            for shard in range(min(8, len(population.manifest.shards))):
                try:
                    rows = population.rows(shard, 0)
                    native = population.native(shard)[rows]
                    # The first of the shard, and the first that have what is still wanted.
                    wanted = {int(row) for m in range(len(self.readers)) for row in rows[native[:, m]][:3]}
                    picked = np.array(sorted(wanted), dtype=np.int64)
                    index = population.index(shard)
                    columns = [index.members.index(m) for m in self.members if m in index.members]
                    names = [index.members[column] for column in columns]
                    self.holder.hold_rows(population, shard, picked)
                    parts = read_rows(population.shards.read(shard), index, picked, columns)
                except UNREADABLE as error:
                    reason = error
                    continue
                for part in parts:
                    if isinstance(part, BadMember):
                        reason = f"{part.member}: {part.reason}"
                        continue
                    data = dict(zip(names, part, strict=True))
                    for m, reader in enumerate(self.readers):
                        try:
                            if data.get(reader.member):
                                found[m].append(reader(data[reader.member], None))
                        except UNDECODABLE as error:
                            reason = error
                if all(len(examples) >= 3 for examples in found):
                    break
        for reader, examples in zip(self.readers, found, strict=True):
            if not examples:
                raise ShardError(
                    f"{self.populations[0].manifest.url}: no readable sample found for modality '{reader.name}' "
                    f"({reason}); the decoder or transform may not fit the data, or the shards are damaged"
                )
        return [_most_common(reader, examples) for reader, examples in zip(self.readers, found, strict=True)]


class _Undecodable(ValueError):
    """A member whose bytes are whole but not what the decoder or transform takes."""

    def __init__(self, member: str, reason: str) -> None:
        super().__init__(reason)
        self.member = member


def _offset_of(population: Population, shard: int, row: int, member: str) -> int:
    index = population.index(shard)
    return int(index.block_offsets[row, index.members.index(member)]) * BLOCK if member in index.members else -1


def _most_common(reader: _Reader, examples: list[torch.Tensor]) -> torch.Tensor:
    """The first example of which most others do not differ."""
    agree = [sum(reader.differs(other, example) is None for other in examples) for example in examples]
    return examples[agree.index(max(agree))]
