"""From a folder of shards to the batches of one rank.

The loader's whole state is the number of batches consumed: `Loader(..., start_step=t)` goes on exactly where a run
that had consumed t batches stood, with any number of loader processes.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.context
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from symile_dist.config import Config, DataConfig, ModalityConfig
from symile_dist.data.index import ABSENT, ShardError, ShardIndex, read_index, read_member_bytes
from symile_dist.data.manifest import Manifest, read_manifest
from symile_dist.data.order import LanesWindowsOrder, Order, SequentialOrder, choose_lanes
from symile_dist.registry import DECODERS, TRANSFORMS, build, check_options, resolve
from symile_dist.seeding import philox
from symile_dist.types import Batch, Inputs, Padded


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
        return self.transform(self.decode(data, **self.decode_options), rng)


def collate(samples: list[torch.Tensor], variable_length: bool) -> Inputs:
    """Stacks samples of one shape, or pads their first dimension with zeros.

    Raises ValueError when shapes differ for a transform that promised one shape.
    """
    if not variable_length:
        shapes = {tuple(sample.shape) for sample in samples}
        if len(shapes) > 1:
            raise ValueError(
                f"samples of unequal shapes {sorted(shapes)[:3]}: set a size in the transform, or give the transform "
                "`variable_length = True`"
            )
        return torch.stack(samples)
    lengths = torch.tensor([len(sample) for sample in samples], dtype=torch.int64)
    first = samples[0]
    values = first.new_zeros((len(samples), int(lengths.max()), *first.shape[1:]))
    for row, sample in enumerate(samples):
        values[row, : len(sample)] = sample
    return Padded(values, lengths)


def _wanted_members(config: Config) -> list[str]:
    return list(dict.fromkeys(modality.member.lower() for modality in config.modalities.values()))


def _check_members(manifest: Manifest, config: Config) -> None:
    for name, modality in config.modalities.items():
        if modality.member.lower() not in manifest.members:
            raise ShardError(
                f"{manifest.directory}: no sample has a member '{modality.member}' (modality '{name}'); "
                f"its members are: {', '.join(manifest.members)}"
            )


class Population:
    """The samples of a folder that have every modality's member, shard by shard.

    Raises ShardError when none is left.
    """

    def __init__(self, manifest: Manifest, config: Config) -> None:
        _check_members(manifest, config)
        self.manifest = manifest
        self._wanted = _wanted_members(config)
        self._open: OrderedDict[int, tuple[ShardIndex, np.ndarray]] = OrderedDict()
        self.shard_starts = np.concatenate([[0], np.cumsum([s.samples for s in manifest.shards])]).astype(np.int64)
        self.sizes = [len(self.rows(shard)) for shard in range(len(manifest.shards))]
        self.num_samples = sum(self.sizes)
        if self.num_samples == 0:
            raise ShardError(
                f"{manifest.directory}: none of the {manifest.samples} samples has all of the members "
                f"{', '.join(self._wanted)}"
            )

    def _shard(self, shard: int) -> tuple[ShardIndex, np.ndarray]:
        if shard not in self._open:
            entry = self.manifest.shards[shard]
            index = read_index(self.manifest.directory / entry.name, entry.index_sha256)
            if len(index) != entry.samples:
                raise ShardError(
                    f"{self.manifest.directory / entry.name}: its index has {len(index)} samples, the manifest says "
                    f"{entry.samples}; make them with: symile-dist shards index {self.manifest.directory} --force"
                )
            missing = [member for member in self._wanted if member not in index.members]
            columns = [index.members.index(member) for member in self._wanted if member in index.members]
            complete = (index.sizes[:, columns] != ABSENT).all(axis=1)
            if missing:
                complete[:] = False
            self._open[shard] = (index, np.flatnonzero(complete))
            while len(self._open) > 256:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def index(self, shard: int) -> ShardIndex:
        return self._shard(shard)[0]

    def rows(self, shard: int) -> np.ndarray:
        """Rows of the shard's index that belong to the population."""
        return self._shard(shard)[1]


class StepDataset(Dataset[Batch]):
    """`dataset[t]` is this rank's share of global batch t. Map-style, so that batches come back in order."""

    def __init__(self, population: Population, order: Order, config: Config, rank: int, train: bool) -> None:
        self.population, self.order, self.rank, self.train = population, order, rank, train
        self.seed, self.label, self.metadata_member = config.seed, config.data.label, config.data.metadata_member
        self.readers = [_Reader.from_config(name, modality) for name, modality in config.modalities.items()]
        share = order.global_batch_size // config.world_size
        self.low, self.high = rank * share, (rank + 1) * share
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors do not travel to loader processes

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            path = self.population.manifest.directory / self.population.manifest.shards[shard].name
            self._files[shard] = os.open(path, os.O_RDONLY)
            while len(self._files) > 64:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def _sample(self, shard: int, row: int, epoch: int) -> tuple[list[torch.Tensor], str, int]:
        """The tensors, the label and the bytes of one sample. Raises ShardError, OSError or ValueError."""
        index = self.population.index(shard)
        members = list(dict.fromkeys([*(reader.member for reader in self.readers), self.metadata_member]))
        columns = {member: index.members.index(member) for member in members if member in index.members}
        parts = read_member_bytes(self._descriptor(shard), index, row, list(columns.values()))
        data = dict(zip(columns, parts, strict=True))
        sample_id = int(self.population.shard_starts[shard]) + row
        rng = np.random.Generator(philox("augment", self.seed, epoch, sample_id)) if self.train else None
        tensors = [reader(data[reader.member], rng) for reader in self.readers]
        label = f"sample {sample_id}"  # a class of its own, which no label of another sample equals
        if self.label is not None and not self.train and data.get(self.metadata_member):
            metadata = json.loads(data[self.metadata_member])
            if not isinstance(metadata, dict):
                raise ValueError(f"member '{self.metadata_member}' is not a JSON object")
            label = str(metadata.get(self.label, label))
        return tensors, label, sum(map(len, parts))

    def __getitem__(self, step: int) -> Batch:
        slots = self.order.slots(step, self.low, self.high)
        size = self.high - self.low
        samples: list[list[torch.Tensor] | None] = []
        labels: list[str] = []
        ids = torch.full((size,), -1, dtype=torch.int64)
        faults: Counter[str] = Counter()
        details: list[str] = []
        bytes_read = 0
        for slot, (shard, place, epoch) in enumerate(zip(*(part.tolist() for part in slots), strict=True)):
            if shard < 0:
                samples.append(None)
                labels.append("")
                continue
            row = int(self.population.rows(shard)[place])
            ids[slot] = int(self.population.shard_starts[shard]) + row
            try:
                tensors, label, count = self._sample(shard, row, epoch)
                samples.append(tensors)
                labels.append(label)
                bytes_read += count
            except (ShardError, OSError, ValueError, RecursionError, zlib.error) as error:
                # The slot stays, marked invalid: the order never shifts, so all ranks stay in step.
                kind = (
                    "checksum" if isinstance(error, ShardError) else "open" if isinstance(error, OSError) else "decode"
                )
                faults[kind] += 1
                if len(details) < 3:
                    details.append(f"{self.population.manifest.shards[shard].name}, row {row}: {error}")
                samples.append(None)
                labels.append("")
        valid = torch.tensor([sample is not None for sample in samples])
        filler = next((sample for sample in samples if sample is not None), None)
        if filler is None:
            filler = self.first_readable()
        filled = [sample if sample is not None else filler for sample in samples]
        inputs = {
            reader.name: collate(
                [tensors[m] for tensors in filled], getattr(reader.transform, "variable_length", False)
            )
            for m, reader in enumerate(self.readers)
        }
        present = torch.ones((size, len(self.readers)), dtype=torch.bool)
        return Batch(inputs, present, valid, ids, labels, dict(faults), details, bytes_read)

    def first_readable(self) -> list[torch.Tensor]:
        """The tensors of the first readable sample among the first of the first shards.

        Raises ShardError, with the last reason, when none is readable: decoder or transform then do not fit the data.
        """
        reason: Exception | None = None
        for shard in range(min(8, len(self.population.sizes))):
            for row in self.population.rows(shard)[:4]:
                try:
                    return self._sample(shard, int(row), 0)[0]
                except (ShardError, OSError, ValueError, RecursionError) as error:
                    reason = error
        raise ShardError(
            f"{self.population.manifest.directory}: no readable sample found ({reason}); the decoder or transform may "
            "not fit the data, or the shards are damaged"
        )


class _Steps(Sampler[int]):
    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return max(0, self.stop - self.start)


def _process_context() -> multiprocessing.context.ForkServerContext:
    """Processes forked from a server that has imported this module once: safe, and each starts in a tenth of a second.

    A child forked from this process itself would inherit the locks of threads that do not exist in it (gloo, Ray).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", __name__])
    return context


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


class Loader:
    """Iterates over this rank's batches, from `start_step` on; `state` is what a checkpoint keeps of it."""

    def __init__(
        self, dataset: StepDataset, data: DataConfig, start_step: int, stop_step: int, pin_memory: bool = False
    ) -> None:
        self.dataset = dataset
        self.consumed = start_step
        processes = data.loader_processes if stop_step > start_step else 0
        self._loader: DataLoader[Batch] = DataLoader(
            dataset,
            batch_size=None,
            sampler=_Steps(start_step, stop_step),
            num_workers=processes,
            prefetch_factor=data.prefetch if processes else None,
            worker_init_fn=_one_thread if processes else None,
            multiprocessing_context=_process_context() if processes else None,
            pin_memory=pin_memory,
            # Without one of its own it draws from torch's global generator, once per start: a resumed run's dropout
            # would differ from the undisturbed run's.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self.consumed += 1
            yield batch

    @property
    def state(self) -> dict[str, Any]:
        order = self.dataset.order
        state: dict[str, Any] = {
            "batches_consumed": self.consumed,
            "seed": self.dataset.seed,
            "global_batch_size": order.global_batch_size,
            "index_digest": self.dataset.population.manifest.digest,
            "population": self.dataset.population.num_samples,
        }
        if isinstance(order, LanesWindowsOrder):
            state |= {"lanes": order.lanes, "window": order.window}
        return state

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raises ValueError when a checkpoint's stream is not this one: going on would repeat or lose samples."""
        for key, value in self.state.items():
            if key != "batches_consumed" and saved.get(key) != value:
                raise ValueError(
                    f"the checkpoint was made with another data stream: {key} was {saved.get(key)}, now {value}; "
                    "resume with the data of the checkpoint, or begin a new run with run.init_from"
                )


def open_training(config: Config, rank: int, start_step: int) -> Loader:
    """The training stream of a rank. Raises ShardError for a folder without index, ValueError for impossible lanes."""
    population = Population(read_manifest(config.data.train), config)
    lanes = config.data.lanes or choose_lanes(
        config.train.global_batch_size, len(population.sizes), population.num_samples
    )
    order = LanesWindowsOrder(population.sizes, config.train.global_batch_size, lanes, config.data.window, config.seed)
    return Loader(
        StepDataset(population, order, config, rank, train=True),
        config.data,
        start_step,
        config.train.steps,
        config.ray.gpus_per_worker > 0,
    )


def open_validation(config: Config, directory: str, rank: int, max_samples: int | None) -> tuple[StepDataset, int]:
    """The validation batches of a rank, `dataset[0] .. dataset[steps - 1]`, and their number."""
    population = Population(read_manifest(directory), config)
    order = SequentialOrder(population.sizes, config.train.global_batch_size, max_samples)
    return StepDataset(population, order, config, rank, train=False), order.steps
