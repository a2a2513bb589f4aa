"""From shards to the batches of one rank.

The loader's whole state is the number of batches consumed and which samples are in quarantine: `open_training(...,
start_step=t)` goes on exactly where a run that had consumed t batches stood, with any number of loader processes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.context
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from symile_dist.config import Config
from symile_dist.data.batches import StepDataset
from symile_dist.data.cache import ShardCache
from symile_dist.data.files import OpenFiles
from symile_dist.data.handover import Parcel, pack, unpack
from symile_dist.data.index import ShardError
from symile_dist.data.order import LaneStream, LanesWindowsOrder, SequentialOrder, choose_lanes
from symile_dist.data.population import Population
from symile_dist.data.quarantine import (
    QUARANTINE,
    WHOLE_SHARD,
    Exclusion,
    Quarantine,
    continued,
    parse_quarantine,
    write_quarantine,
)
from symile_dist.data.shards import CachedShards, LocalShards, open_folder
from symile_dist.errors import RunStopped
from symile_dist.storage import Folder
from symile_dist.types import Batch, Fault


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


class _Packed(Dataset[Parcel]):
    """What loader processes hand over."""

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> Parcel:
        return pack(self.dataset[step])


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


class Loader:
    """Iterates over this rank's batches, from `start_step` on; `state` is what a checkpoint keeps of it."""

    def __init__(self, dataset: StepDataset, config: Config, start_step: int, stop_step: int) -> None:
        self.dataset, self.config = dataset, config
        self.consumed, self.stop_step = start_step, stop_step
        self._stale_from: int | None = None
        self._iterator: Any = None

    def _batches(self) -> DataLoader[Any]:
        """From the next step on, with the population as it is known now: a `Batch`, or a `Parcel` from a process."""
        data = self.config.data
        processes = data.loader_processes if self.stop_step > self.consumed else 0
        return DataLoader(
            _Packed(self.dataset) if processes else self.dataset,
            batch_size=None,
            sampler=_Steps(self.consumed, self.stop_step),
            num_workers=processes,
            prefetch_factor=data.prefetch if processes else None,
            worker_init_fn=_one_thread if processes else None,
            multiprocessing_context=_process_context() if processes else None,
            pin_memory=self.config.ray.gpus_per_worker > 0,
            # Without one of its own it draws from torch's global generator, once per start: a resumed run's dropout
            # would differ from the undisturbed run's.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        while self.consumed < self.stop_step:
            self._iterator = iter(self._batches())
            for batch in self._iterator:
                if self._stale_from is not None and self.consumed >= self._stale_from:
                    # This epoch's batches were prepared before its population was known: prepare them again.
                    self._stale_from = None
                    break
                self.consumed += 1
                yield unpack(batch) if isinstance(batch, Parcel) else batch
        self._iterator = None

    def fetch_counters(self) -> dict[str, int]:
        """What the node's fetcher has done; empty where all shards are local."""
        return self.dataset.holder.counters()

    @property
    def queue_depth(self) -> int:
        """Batches that are ready and wait."""
        queue = getattr(self._iterator, "_data_queue", None)
        return int(queue.qsize()) if queue is not None else 0


class TrainingLoader(Loader):
    """A loader that leaves out, from the next epoch on, what could not be read.

    Every rank has one and makes the same changes, so their streams stay those of one run.
    """

    def __init__(
        self, dataset: StepDataset, config: Config, start_step: int, quarantine: Quarantine, persist: bool
    ) -> None:
        super().__init__(dataset, config, start_step, config.train.steps)
        assert isinstance(dataset.order, LanesWindowsOrder)
        self.order, self.quarantine, self._persist = dataset.order, quarantine, persist

    def exclude(self, faults: Sequence[Fault]) -> list[Exclusion]:
        """Writes down what could not be read in the batches consumed so far; to be called on all ranks alike, with
        the faults of all of them. Returns what is new on the list.

        Raises RunStopped when too few samples are left.
        """
        known = {(entry.dataset, entry.shard, entry.row) for entry in self.quarantine.entries if not entry.restored}
        new: dict[tuple[str, str, int], Exclusion] = {}
        for kind, dataset, shard, row, member, offset, reason in faults:
            key = (dataset, shard, row)
            if key not in known and (dataset, shard, WHOLE_SHARD) not in known:
                epoch = self.order.next_epoch(self._number(dataset), self.consumed)
                new[key] = Exclusion(dataset, shard, row, epoch, kind, member, offset, reason[:500], self.consumed)
        self._change(list(new.values()))
        if new and self._persist:
            write_quarantine(self.config.run_directory / QUARANTINE, self.quarantine.entries)
        return list(new.values())

    def names(self, sample_ids: Tensor) -> list[str]:
        """Where samples stand, for people; slots that hold none are left out."""
        populations = self.dataset.populations
        firsts = [int(population.shard_ids[0]) for population in populations]
        return [
            populations[bisect_right(firsts, number) - 1].name_of(number)
            for number in sample_ids.tolist()
            if number >= 0
        ]

    def names_of(self, step: int) -> list[str]:
        """Of the samples that this rank has in a step, without reading them."""
        return self.names(torch.from_numpy(self.dataset.locate(step).sample_ids))

    def restore(self, entries: Sequence[Exclusion]) -> None:
        """Uses again, from the next epoch on, what a person has taken off the list."""
        self._change(
            [
                entry._replace(epoch=self.order.next_epoch(self._number(entry.dataset), self.consumed))
                for entry in entries
            ]
        )

    def _number(self, dataset: str) -> int:
        return [population.name for population in self.dataset.populations].index(dataset)

    def _change(self, entries: list[Exclusion]) -> None:
        self.quarantine.add(entries)
        for dataset, epoch in sorted({(entry.dataset, entry.epoch) for entry in entries}):
            number = self._number(dataset)
            _apply(self.dataset.populations[number], self.order, number, epoch)
            first = self.order.first_step(number, epoch)
            self._stale_from = first if self._stale_from is None else min(first, self._stale_from)

    @property
    def state(self) -> dict[str, Any]:
        populations = self.dataset.populations
        rule = str(populations[0].requirement)
        return {
            "batches_consumed": self.consumed,
            "seed": self.dataset.seed,
            "global_batch_size": self.order.global_batch_size,
            "lanes": self.order.lanes,
            "window": self.order.streams[0].window,
            "index_digest": _digest([population.manifest.digest for population in populations]),
            "population": sum(sum(population.base_sizes) for population in populations),
            "require": hashlib.sha256(rule.encode()).hexdigest()[:16],
            "mixture": _digest([f"{name} {d.weight!r}" for name, d in self.config.data.train.items()])[:16]
            if len(populations) > 1
            else "",
            "quarantine": self.quarantine.state,
        }

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raises ValueError when a checkpoint's stream is not this one: going on would repeat or lose samples."""
        for key, value in self.state.items():
            if key not in ("batches_consumed", "quarantine") and saved.get(key) != value:
                raise ValueError(
                    f"the checkpoint was made with another data stream: {key} was {saved.get(key)}, now {value}; "
                    "resume with the data of the checkpoint, or begin a new run with run.init_from"
                )


def _digest(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _apply(population: Population, order: LanesWindowsOrder, dataset: int, epoch: int) -> None:
    """Has the order use what the quarantine leaves of a population from an epoch on."""
    population.forget_epochs()
    try:
        order.streams[dataset].set_population(epoch, population.sizes(epoch))
    except ValueError as error:
        raise RunStopped(
            f"{population.manifest.url}: too few samples are left without those in quarantine: {error}"
        ) from None


def open_training(
    config: Config, rank: int, start_step: int, saved: dict[str, Any] | None = None, persist: bool = False
) -> TrainingLoader:
    """The training stream of a rank.

    Args:
        start_step: batches that have been consumed.
        saved: the loader state of the checkpoint that this goes on from.
        persist: keep the run's quarantine list on disk: one rank does.

    Raises ShardError for a folder without index or without usable samples, ValueError for impossible lanes and for a
    checkpoint of another stream.
    """
    data, batch_size = config.data, config.train.global_batch_size
    cache, files = ShardCache(data.storage), OpenFiles()
    datasets = {name: open_folder(dataset.path, data.storage, cache, files) for name, dataset in data.train.items()}
    restored: list[Exclusion] = []
    if saved:
        quarantine, restored = continued(config.run_directory / QUARANTINE, saved.get("quarantine", Quarantine().state))
    else:
        quarantine = Quarantine(
            entry._replace(dataset=name, epoch=0)
            for name, shards in datasets.items()
            for entry in _own_list(shards, cache)
        )
    populations: list[Population] = []
    first_id = 0
    for name, shards in datasets.items():
        populations.append(Population(name, shards, config, quarantine, first_id, withhold=True))
        first_id += shards.manifest.samples
    number = min(sum(population.sizes(0)) for population in populations)
    lanes = data.lanes or choose_lanes(batch_size, sum(len(p.base_sizes) for p in populations), number)
    several = len(populations) > 1
    streams = []
    for population in populations:
        key = (config.seed, population.name) if several else (config.seed,)
        try:
            streams.append(LaneStream(population.sizes(0), lanes, data.window, key))
        except ValueError as error:
            raise ShardError(f"{population.manifest.url}: data.lanes: {error}") from None
        population.keep_indices(2 * (lanes // config.world_size + 2) * data.window + 16)  # of two windows per lane
    order = LanesWindowsOrder(streams, batch_size, [dataset.weight for dataset in data.train.values()])
    for number, population in enumerate(populations):
        for epoch in quarantine.epochs(population.name):
            if epoch > 0:
                _apply(population, order, number, epoch)
    dataset = StepDataset(populations, order, config, rank, True, cache, config.train.steps)
    loader = TrainingLoader(dataset, config, start_step, quarantine, persist)
    if saved:
        loader.check_state(saved)
    loader.restore(restored)
    if persist and (quarantine.entries or (config.run_directory / QUARANTINE).exists()):
        write_quarantine(config.run_directory / QUARANTINE, quarantine.entries)
    return loader


def _own_list(shards: LocalShards | CachedShards, cache: ShardCache) -> list[Exclusion]:
    """What stands in a folder's own quarantine list."""
    folder = Folder(shards.manifest.url, cache.storage)
    try:
        content = folder.read(QUARANTINE) if folder.path is not None else cache.read(folder / QUARANTINE)
    except FileNotFoundError:
        return []
    return parse_quarantine(content, folder / QUARANTINE)


def open_validation(
    config: Config,
    directory: str,
    rank: int,
    max_samples: int | None,
    withhold: bool = False,
    metadata: Sequence[str] = (),
) -> tuple[StepDataset, int]:
    """The validation batches of a rank, `dataset[0] .. dataset[steps - 1]`, and their number.

    Args:
        withhold: take modalities away as data.missing_probability says.
        metadata: keys in the metadata that the batches carry.

    Raises ShardError as `open_training` does.
    """
    cache = ShardCache(config.data.storage)
    shards = open_folder(directory, config.data.storage, cache, OpenFiles())
    quarantine = Quarantine(entry._replace(dataset="held out", epoch=0) for entry in _own_list(shards, cache))
    population = Population("held out", shards, config, quarantine, withhold=withhold)
    order = SequentialOrder(population.sizes(0), config.train.global_batch_size, max_samples)
    return StepDataset([population], order, config, rank, False, cache, order.steps, metadata), order.steps
