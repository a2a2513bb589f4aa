"""One rank's share of a global batch: from slots to bytes, from bytes to tensors.

Whatever is wrong with a shard, a batch keeps its size: a sample that cannot be read leaves its slot marked invalid, so
the order never shifts and all ranks stay in step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from symile_dist.config import Config, ModalityConfig
from symile_dist.data.cache import ShardCache
from symile_dist.data.holder import Holder
from symile_dist.data.index import ABSENT, BLOCK, UNREADABLE, ShardError, ShardIndex
from symile_dist.data.order import Order, Slots
from symile_dist.data.population import Population
from symile_dist.data.shards import CachedShards
from symile_dist.data.spans import BadMember, Read, Spans, read_rows
from symile_dist.errors import StorageError
from symile_dist.registry import DECODERS, TRANSFORMS, build, check_options, resolve
from symile_dist.seeding import philox
from symile_dist.types import Batch, Fault, Inputs, Padded, ReadCounts

UNDECODABLE = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, MemoryError)
"""What a decoder or transform may raise over bytes from anywhere; one's own decoder is not expected to be careful."""


@dataclass(frozen=True)
class Reader:
    """How one modality comes from its member's bytes to a tensor."""

    name: str
    member: str
    decode: Any
    decode_options: dict[str, Any]
    transform: Any

    @classmethod
    def from_config(cls, name: str, modality: ModalityConfig) -> Reader:
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
    longest = max(1, int(lengths.max()))  # convolutions and attention take no tensor of nothing
    values = first.new_zeros((len(samples), longest, *first.shape[1:]))
    for row, sample in enumerate(samples):
        values[row, : len(sample)] = sample
    return Padded(values, lengths)


@dataclass
class RawBatch:
    """One rank's share of a global batch: n slots, and where in the shards their bytes lie."""

    slots: Slots
    rows: NDArray[np.int64]
    """(n,) of the shards' indices; -1 where it is not known"""
    sample_ids: NDArray[np.int64]
    """(n,): -1 where the slot holds no sample"""
    present: NDArray[np.bool_]
    """(n, M)"""
    faults: list[Fault]
    """What could not be found; of what cannot be read, once it has been tried."""
    counts: ReadCounts
    to_read: list[int]
    """Slots, shard by shard."""
    reads: list[Read]
    """from the shard of each of them"""
    spans: Spans
    """of each of them"""
    fetched_again: dict[tuple[int, int], str | None] = field(default_factory=dict)
    """(dataset, shard) that proved wrong in the cache -> why it could not be fetched again, if it could not"""


class _Group(NamedTuple):
    """Slots whose samples lie in one shard and are of one epoch."""

    dataset: int
    shard: int
    epoch: int
    slots: NDArray[np.int64]


def _groups(slots: Slots) -> Iterator[_Group]:
    """All slots that hold a sample."""
    order = np.lexsort((slots.epoch, slots.shard, slots.dataset))
    keys = np.stack([slots.dataset[order], slots.shard[order], slots.epoch[order]])
    firsts = [0, *(np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0)) + 1).tolist()]
    for (dataset, shard, epoch), first, end in zip(
        keys[:, firsts].T.tolist(), firsts, [*firsts[1:], len(order)], strict=True
    ):
        if shard >= 0:
            yield _Group(dataset, shard, epoch, order[first:end])


def own_class(sample_id: int) -> str:
    """The class of a sample without a label, which no other sample is of."""
    return f"sample {sample_id}"


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
        metadata: Sequence[str] = (),
    ) -> None:
        """`metadata`: keys in the metadata that held-out batches carry beside the label."""
        self.populations, self.order, self.rank, self.train = list(populations), order, rank, train
        self.files = self.populations[0].shards.files
        self.holder, self.seed = Holder(self.populations, order, cache, stop_step), config.seed
        self.label = None if train else config.data.label
        self.metadata_member, self.metadata = config.data.metadata_member, tuple(metadata)
        self.readers = [Reader.from_config(name, modality) for name, modality in config.modalities.items()]
        # Making a generator takes 20 microseconds: as long as reading a sample of features.
        self.augments = train and any(getattr(reader.transform, "uses_rng", True) for reader in self.readers)
        wanted = [reader.member for reader in self.readers]
        self.members = tuple(dict.fromkeys([*wanted, self.metadata_member] if self.label or metadata else wanted))
        share = order.global_batch_size // config.world_size
        self.low, self.high = rank * share, (rank + 1) * share
        self.examples = self._find_examples()
        """A tensor of each modality."""

    # -- bytes ---------------------------------------------------------------------------------------------------

    def locate(self, step: int) -> RawBatch:
        """Where this rank's share of a global batch lies. Never raises for what a shard holds: see `faults`."""
        slots, size = self.order.slots(step, self.low, self.high), self.high - self.low
        opened = self.files.opened
        unreachable = self.holder.hold(step, self.low, self.high)
        rows, sample_ids = np.full((2, size), -1, dtype=np.int64)
        present = np.ones((size, len(self.readers)), dtype=bool)
        faults: list[Fault] = []
        to_read: list[int] = []
        reads: list[Read] = []
        places: list[NDArray[np.uint32]] = []
        for dataset, shard, epoch, at in _groups(slots):
            population = self.populations[dataset]
            try:
                if (dataset, shard) in unreachable:
                    raise StorageError(unreachable[dataset, shard])
                found = population.rows(shard, epoch)[slots.row[at]]
                rows[at], sample_ids[at] = found, population.shard_ids[shard] + found
                index = population.index(shard)
                read = population.shards.read(shard)
            except UNREADABLE as error:
                kind = "index" if isinstance(error, ShardError) else "open"
                name = population.manifest.shards[shard].name
                faults.append(Fault(kind, population.name, name, -1, "", -1, str(error)))
                continue
            if not population.complete(shard):
                present[at] = population.present(shard, found)
            places.append(self._places(index, found))
            to_read += at.tolist()
            reads += [read] * len(at)
        names = [population.name for population in self.populations]
        by_dataset = np.bincount(slots.dataset[slots.shard >= 0])
        spans = Spans.of(np.concatenate(places or [self._no_places(0)]), self.members)
        counts = ReadCounts(
            bytes=sum(spans.lengths),
            shards_opened=self.files.opened - opened,
            samples={names[number]: count for number, count in enumerate(by_dataset.tolist()) if count},
        )
        return RawBatch(slots, rows, sample_ids, present, faults, counts, to_read, reads, spans)

    def _no_places(self, number: int) -> NDArray[np.uint32]:
        return np.full((number, 3, len(self.members)), ABSENT, dtype=np.uint32)

    def _places(self, index: ShardIndex, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        """(n, 3, F): of the members that are wanted, among those that the shard has."""
        places = index.places.take(rows, axis=0)
        known = [number for number, member in enumerate(self.members) if member in index.members]
        columns = [index.members.index(self.members[number]) for number in known]
        if len(known) == len(self.members):
            return places[:, :, columns]
        found = self._no_places(len(rows))
        found[:, :, known] = places[:, :, columns]
        return found

    def read(self, raw: RawBatch) -> Iterator[tuple[int, list[bytes]]]:
        """(slot, the bytes of each of `members`) of all samples that can be read, one after the other: the other ones
        are told in `faults`. An absent member is b""."""
        for number, parts in enumerate(raw.spans.read(raw.reads)):
            if isinstance(parts, BadMember):
                parts = self._read_again(raw, number, parts)
                if isinstance(parts, BadMember):
                    raw.faults.append(self._fault(raw, raw.to_read[number], parts))
                    continue
            yield raw.to_read[number], parts

    def _read_again(self, raw: RawBatch, number: int, why: BadMember) -> list[bytes] | BadMember:
        """What a cache gives wrongly is fetched again, once per shard and batch."""
        slot = raw.to_read[number]
        key = dataset, shard = int(raw.slots.dataset[slot]), int(raw.slots.shard[slot])
        shards = self.populations[dataset].shards
        if not isinstance(shards, CachedShards):
            return why
        if key not in raw.fetched_again:
            shards.forget(shard)
            raw.fetched_again[key] = self.holder.hold_again().get(key)
            if raw.fetched_again[key] is None:
                return next(raw.spans.read(raw.reads, number))
        reason = raw.fetched_again[key]
        return why if reason is None else why._replace(kind="open", reason=reason)

    def _fault(self, raw: RawBatch, slot: int, why: BadMember) -> Fault:
        population = self.populations[int(raw.slots.dataset[slot])]
        name = population.manifest.shards[int(raw.slots.shard[slot])].name
        return Fault(why.kind, population.name, name, int(raw.rows[slot]), why.member, why.offset, why.reason)

    # -- tensors -------------------------------------------------------------------------------------------------

    def __getitem__(self, step: int) -> Batch:
        raw, size = self.locate(step), self.high - self.low
        samples: list[list[torch.Tensor] | None] = [None] * size
        labels = [""] * size
        metadata: list[dict[str, Any]] = [{} for _ in range(size if self.metadata else 0)]
        for slot, parts in self.read(raw):
            try:
                samples[slot], labels[slot], found = self._decode(raw, slot, parts)
                if metadata:
                    metadata[slot] = found
            except _Undecodable as error:
                why = BadMember("decode", error.member, self._offset(raw, slot, error.member), str(error))
                raw.faults.append(self._fault(raw, slot, why))
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
            metadata,
        )

    def _offset(self, raw: RawBatch, slot: int, member: str) -> int:
        """Of a member's data in its shard."""
        index = self.populations[int(raw.slots.dataset[slot])].index(int(raw.slots.shard[slot]))
        return int(index.block_offsets[raw.rows[slot], index.members.index(member)]) * BLOCK

    def _decode(self, raw: RawBatch, slot: int, parts: list[bytes]) -> tuple[list[torch.Tensor], str, dict[str, Any]]:
        """Tensors, label and metadata of one sample: zeros in the place of a modality that it lacks."""
        sample_id, epoch = int(raw.sample_ids[slot]), int(raw.slots.epoch[slot])
        data = dict(zip(self.members, parts, strict=True))
        rng = None
        if self.augments:
            rng = np.random.Generator(philox("augment", self.seed, epoch, sample_id))
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
        return tensors, *self._facts(data, sample_id)

    def _facts(self, data: dict[str, bytes], sample_id: int) -> tuple[str, dict[str, Any]]:
        """Label and metadata: of the latter the keys that are wanted and there."""
        label = own_class(sample_id)
        if not (self.label or self.metadata) or not data.get(self.metadata_member):
            return label, {}
        try:
            metadata = json.loads(data[self.metadata_member])
        except (ValueError, RecursionError) as error:
            raise _Undecodable(self.metadata_member, f"not JSON: {error}") from error
        if not isinstance(metadata, dict):
            raise _Undecodable(self.metadata_member, "is not a JSON object")
        wanted = {key: metadata[key] for key in self.metadata if key in metadata}
        found = metadata.get(self.label)
        return label if found is None else str(found), wanted

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


def _most_common(reader: Reader, examples: list[torch.Tensor]) -> torch.Tensor:
    """The first example of which most others do not differ."""
    agree = [sum(reader.differs(other, example) is None for other in examples) for example in examples]
    return examples[agree.index(max(agree))]
