"""Saving, finding, verifying and pruning a run's checkpoints, by all ranks together."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

import symile_dist
from symile_dist.checkpoint.attempts import left_behind, write_attempt
from symile_dist.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointError,
    FileEntry,
    Manifest,
    checkpoint_folders,
    complete_checkpoints,
    folder_name,
    read_manifest,
    verify,
)
from symile_dist.checkpoint.mirror import Copies, Copying, Mirror, Mirrored
from symile_dist.checkpoint.shard import HostCopy
from symile_dist.checkpoint.shards import Shards
from symile_dist.config import Config
from symile_dist.distributed import barrier, broadcast_object, gather_objects, rank, world_size
from symile_dist.errors import RunStopped
from symile_dist.failpoints import failpoint
from symile_dist.storage import error_words, read_json, sync_directory, write_json

logger = logging.getLogger(__name__)
CHANGED_BY_FORWARD = ("rng", "buffers")
"""Kinds of tensors that the next forward pass changes; all others stay as they are until the next update."""
POLL_SECONDS = 0.02
CLOSE_SECONDS = 10.0
"""How long the end of a run that failed waits for a save that is on its way."""


class HasState(Protocol):
    """What the manager needs of an engine."""

    before_update: Callable[[], None]
    """Called before anything changes that `saved_state` gives."""

    def saved_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...
    def restore(self, saved: Shards) -> None: ...


def seed_everything(seed: int, rank: int, step: int = 0) -> None:
    """Seeds torch, numpy and python for what encoders draw (dropout): differently on each rank."""
    number = seed * 1_000_003 + rank + 1 + step * 7_368_787
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(f"{seed}-{rank}" if step == 0 else f"{seed}-{rank}-{step}")


def _rng_state() -> tuple[dict[str, Tensor], list[Any]]:
    """The state of every global generator: tensors, and what else there is, as JSON."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    version, words, gauss = random.getstate()
    tensors = {
        "rng/torch": torch.get_rng_state(),
        "rng/numpy": torch.from_numpy(keys.astype(np.int64)),
        "rng/python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_initialized():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors, [[str(name), int(position), int(has_gauss), float(cached)], [version, gauss]]


def _set_rng_state(tensors: dict[str, Tensor], rest: list[Any]) -> None:
    (name, *numbers), (version, gauss) = rest
    torch.set_rng_state(tensors["torch"])
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *numbers))
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    if "cuda" in tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(tensors["cuda"])


def _remove(folder: Path) -> None:
    """The manifest first: half a deletion must not look like a checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _tidy(folder: Path, kept: set[str]) -> None:
    """Removes what a committed checkpoint does not consist of: the ranks' notes, files of torn saves of its step."""
    for path in folder.iterdir():
        if path.name not in kept and path.is_file():
            path.unlink(missing_ok=True)


class Saved(NamedTuple):
    """A save that has come to its end."""

    step: int
    size: int
    """bytes of all files; of this rank's where it is not rank 0"""
    seconds: float
    """from the copy to the commit; to this rank's file on ranks other than 0"""
    stall: float
    """seconds that the step loop stood still"""
    train_state: dict[str, Any]
    """of that step"""
    problem: str | None
    """Why there is no such checkpoint."""


class _Save(threading.Thread):
    """One save behind the step loop: this rank's file; on rank 0 the manifest too, once every rank's file is there."""

    def __init__(
        self,
        copy: HostCopy,
        folder: Path,
        token: str,
        manifest: Manifest,
        superseded: Callable[[], str | None],
        committed: Callable[[], set[int]],
    ) -> None:
        """
        Args:
            token: of the files' names, which no other attempt has.
            manifest: still without files.
            superseded: as of the manager.
            committed: called by rank 0 when it is done; returns which steps are kept.
        """
        super().__init__(name="checkpoint", daemon=True)
        self.copy, self.folder, self.token = copy, folder, token
        self.manifest, self.superseded, self.committed = manifest, superseded, committed
        self.rank, self.world_size, self.step = rank(), world_size(), manifest.step
        self.begin, self.seconds, self.stall = time.perf_counter(), 0.0, 0.0
        self.size = copy.size
        self.problem: str | None = None
        self.copying: Copying | None = None
        """Its way to the mirror, which begins on rank 0 with the commit."""
        self.copied, self.written, self.cancelled = threading.Event(), threading.Event(), threading.Event()

    def file(self, number: int, suffix: str) -> Path:
        return self.folder / f"rank-{number:05d}.{self.token}.{suffix}"

    def run(self) -> None:
        try:
            try:
                self.copy.fill()
            finally:
                self.copied.set()
            self._write()
            self.written.set()
            kept = self._commit() if self.rank == 0 else None
            if self.copying:
                self.copying.kept = kept
                self.copying.start()
        except Exception as error:  # a full disk, a folder that is gone: told when the ranks next agree
            self.problem = f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                self.file(self.rank, "safetensors").unlink(missing_ok=True)
        finally:
            self.seconds = time.perf_counter() - self.begin
            self.written.set()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        failpoint("checkpoint.begun", self.rank, self.step)
        path = self.file(self.rank, "safetensors")
        digest = self.copy.write(path, lambda: failpoint("checkpoint.half_written", self.rank, self.step))
        failpoint("checkpoint.written", self.rank, self.step)
        write_json(self.file(self.rank, "json"), {"path": path.name, "size": self.copy.size, "sha256": digest})

    def _commit(self) -> set[int] | None:
        """Returns which steps are kept from now on; None where that is not known."""
        entries: list[FileEntry] = []
        while len(entries) < self.world_size:
            if self.cancelled.wait(0 if self.file(len(entries), "json").exists() else POLL_SECONDS):
                raise OSError("another rank could not write its file")
            if self.file(len(entries), "json").exists():
                entries.append(FileEntry(**read_json(self.file(len(entries), "json"))))
        self.size = sum(entry.size for entry in entries)
        sync_directory(self.folder)
        failpoint("checkpoint.before_manifest", self.rank, self.step)
        reason = self.superseded()
        if reason:
            raise OSError(reason)
        replace(self.manifest, files=tuple(entries)).write(self.folder)
        # From here on it is a checkpoint, whatever goes wrong behind it.
        try:
            sync_directory(self.folder.parent)
            failpoint("checkpoint.committed", self.rank, self.step)
            _tidy(self.folder, {MANIFEST, *(entry.path for entry in entries)})
            return self.committed()
        except OSError as error:
            logger.warning("behind checkpoint %s: %s", self.folder.name, error)
            return None

    def outcome(self) -> Saved:
        return Saved(self.step, self.size, self.seconds, self.stall, self.manifest.train_state, self.problem)


class CheckpointManager:
    """The checkpoints of one run; every method but `news` and `close` is called by all ranks, in step.

    A save: behind the step loop a thread copies what the rank keeps into the host's memory, while the next step's
    forward and backward pass run (only its update has to wait); then it writes that to a file of a name that no other
    attempt has, durably, and hashes it. When every rank's is there, rank 0 writes the manifest. Killed at any moment
    before that, the folder is no checkpoint.
    """

    def __init__(
        self,
        config: Config,
        fence: int = 0,
        superseded: Callable[[], str | None] = lambda: None,
        companions: Sequence[str] = (),
        mirror_holder: str = "",
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            fence: the number under which this process group holds the run; 0: none.
            superseded: says why this process group may commit nothing more, once that is so.
            companions: files of the run's directory without which a checkpoint cannot be gone on from; they go to the
                mirror with it.
            mirror_holder: what `Mirror.claim` has said; nothing is copied there once another has claimed it.
            alive: called now and then where waiting may take long.
        """
        self.alive = alive
        self.companions = [config.run_directory / name for name in companions]
        self.config, self.fence, self.superseded = config, fence, superseded
        self.directory = config.run_directory / CHECKPOINTS
        self._copy = HostCopy()
        self._token = broadcast_object(secrets.token_hex(4))
        self._saves = 0
        self._running: _Save | None = None
        self._ended: list[Saved] = []
        self._told = -1
        self._failures = 0
        self._copies = (
            Copies(Mirror(config, mirror_holder), self.companions, alive) if config.checkpoint.mirror else None
        )
        self.damaged_files = 0
        """That `find` has come across."""

    # -- saving ------------------------------------------------------------------------------------------------------

    def save(
        self, engine: HasState, step: int, train_state: dict[str, Any], loader_state: dict[str, Any], wait: bool = False
    ) -> float:
        """Begins a save and returns how many seconds it held up the caller; with `wait` it is done, too.

        Where the save before is still on its way, that is waited for. Raises RunStopped, on all ranks, where it was the
        last of `checkpoint.max_failures` in a row that failed.
        """
        begin = time.perf_counter()
        self.settle()
        tensors, metadata = engine.saved_state()
        rng, rest = _rng_state()
        self._copy.lay_out(tensors | rng, {key: json.dumps(value) for key, value in (metadata | {"rng": rest}).items()})
        self._copy.fill(CHANGED_BY_FORWARD)
        self._saves += 1
        manifest = Manifest(
            step=step,
            world_size=world_size(),
            zero_stage=self.config.train.zero_stage,
            precision=self.config.train.precision,
            config_digest=self.config.digest(),
            code_version=symile_dist.__version__,
            fence=self.fence,
            train_state=train_state,
            loader_state=loader_state,
            files=(),
        )
        save = _Save(
            self._copy,
            self.directory / folder_name(step),
            f"{self._token}-{self._saves}",
            manifest,
            self.superseded,
            lambda: self._prune(step, train_state.get("best_step")),
        )
        save.stall = time.perf_counter() - begin
        self._running = save
        if self._copies:
            save.copying = self._copies.next(step, save.file(rank(), "safetensors"))
        engine.before_update = self._wait_for_copy
        save.start()
        if wait:
            self.settle()
        return time.perf_counter() - begin

    @property
    def saving(self) -> bool:
        """Whether a save is under way behind the step loop of this rank."""
        return self._running is not None and self._running.is_alive()

    def _wait_for_copy(self) -> None:
        """Until what is being saved is copied: from here on it changes."""
        if self._running is not None and not self._running.copied.is_set():
            begin = time.perf_counter()
            self._running.copied.wait()
            self._running.stall += time.perf_counter() - begin

    def settle(self) -> None:
        """Waits for the save that is on its way, and agrees with the other ranks on how it ended."""
        save = self._running
        if save is None:
            return
        save.written.wait()
        problems = [problem for problem in gather_objects(save.problem) if problem]
        if problems:
            save.cancelled.set()  # rank 0 waits for a file that will not come
        save.join()
        problems += [problem for problem in gather_objects(save.problem) if problem]
        self._running = None
        self._ended.append(save.outcome()._replace(problem=problems[0] if problems else None))
        self._failures = self._failures + 1 if problems else 0
        if not problems:
            return
        if self._copies:
            self._copies.drop(save.step)
        if rank() == 0:
            logger.warning("checkpoint of step %d could not be saved: %s", save.step, problems[0])
            if not (save.folder / MANIFEST).exists():
                shutil.rmtree(save.folder, ignore_errors=True)
        if self._failures >= self.config.checkpoint.max_failures:
            raise RunStopped(
                f"step {save.step}: the last {self._failures} checkpoints could not be saved "
                f"(checkpoint.max_failures): {problems[0]}. Those before them are whole: make room in "
                f"{self.directory}, then resume"
            )

    def news(self) -> list[Saved]:
        """The saves that have come to an end since the last call; no other rank is asked."""
        ended, self._ended = self._ended, []
        if self._running is not None and not self._running.is_alive() and not self._running.problem:
            ended.append(self._running.outcome())
        fresh = [each for each in ended if each.problem or each.step != self._told]
        self._told = next((each.step for each in reversed(ended) if not each.problem), self._told)
        return fresh

    def finish(self) -> None:
        """Waits for the last save, and until the mirror has it. Raises RunStopped, on all ranks, where it failed."""
        self.settle()
        if self._failures:
            raise RunStopped(f"the last checkpoint could not be saved in {self.directory}; make room, then resume")
        if self._copies:
            self._copies.finish(kept={step for step, _ in complete_checkpoints(self.directory)})

    def news_of_mirror(self) -> list[Mirrored]:
        """The copies to the mirror that have come to an end since the last call; no other rank is asked."""
        return self._copies.news() if self._copies else []

    def close(self) -> None:
        """At the end of a run that failed: gives a save that is on its way some time to get done."""
        if self._running is not None:
            self._running.join(CLOSE_SECONDS)

    def _prune(self, step: int, best: int | None) -> set[int]:
        """Returns which steps are left: the newest `keep_last` complete checkpoints, each `keep_every`-th and the best.

        No leftovers, and none of later steps: they belong to a future that this run has left.
        """
        complete = [each for each, _ in complete_checkpoints(self.directory) if each <= step]
        every = self.config.checkpoint.keep_every
        kept = {each for each in (*complete[-self.config.checkpoint.keep_last :], best) if each is not None}
        kept |= {each for each in complete if every and each % every == 0}
        under_way = self._copies.under_way if self._copies else None
        for each, folder in checkpoint_folders(self.directory):
            if each not in kept and not (under_way and each == under_way.step):
                _remove(folder)
        return kept

    # -- loading -----------------------------------------------------------------------------------------------------

    def find(self, before: int | None = None) -> Manifest | None:
        """The newest complete checkpoint whose files all verify, from before a step if one is given; None when there is
        none yet.

        Rank 0 says which candidates there are and all ranks verify a share of the files, so all come to the same
        answer. Raises CheckpointError when there are checkpoints but none is whole: never silently from zero.
        """
        candidates = self._candidates(before)
        problems: list[str] = []
        for step, is_here in candidates:
            name = folder_name(step)
            if not is_here:
                unfetched = self._fetch(step)
                problems += unfetched
                if unfetched:
                    continue
            folder = self.directory / name
            try:
                manifest = read_manifest(folder)
                found = verify(folder, manifest.files[rank() :: world_size()])
            except CheckpointError as error:
                manifest, found = None, [str(error)]
            bad = sorted({problem for part in gather_objects(found) for problem in part})
            if not bad:
                assert manifest is not None
                if broadcast_object(left_behind(self.directory, manifest, before=self.fence)):
                    logger.warning("checkpoint %s is passed over: an attempt that was given up made it late", name)
                    continue
                return manifest
            problems += bad
            self.damaged_files += len(bad)
            if rank() == 0:
                for problem in bad:
                    logger.warning("checkpoint %s is damaged: %s", name, problem)
        if problems:
            raise CheckpointError(
                f"{self.directory}: no checkpoint is whole:\n  " + "\n  ".join(problems) + "\n"
                "To begin again from step 0, use another run directory or: symile-dist train CONFIG --fresh"
            )
        return None

    def _candidates(self, before: int | None) -> list[tuple[int, bool]]:
        """Rank 0's answer, on all ranks: (step, whether it is here, not at the mirror), the newest first; of one step
        first what is here."""
        found = [(step, True) for step, _ in complete_checkpoints(self.directory)]
        problem = None
        if self._copies and rank() == 0:
            try:
                found += [(step, False) for step in self._copies.mirror.steps()]
            except Exception as error:
                problem = error_words(error)
                logger.warning("the mirror is not asked for checkpoints: %s", problem)
        found = sorted((each for each in found if before is None or each[0] < before), reverse=True)
        found, problem = broadcast_object((found, problem))
        if problem and not found:
            raise CheckpointError(
                f"no checkpoint is in {self.directory}, and the mirror does not say whether it has one: {problem}"
            )
        return found

    def _fetch(self, step: int) -> list[str]:
        """Copies a checkpoint from the mirror; every rank a share of its files. Returns what went wrong."""
        assert self._copies is not None
        mirror = self._copies.mirror
        folder, problem = self.directory / folder_name(step), None
        fetched = self.directory / f".fetched-{folder.name}"  # what is here, damaged or not, stays until that is whole
        manifest: Manifest | None = None
        if rank() == 0:
            try:
                manifest = mirror.manifest(step)
                if left_behind(self.directory, manifest, before=self.fence):
                    raise CheckpointError("an attempt that was given up made it late")
                shutil.rmtree(fetched, ignore_errors=True)
                fetched.mkdir(parents=True)
            except Exception as error:
                manifest, problem = None, error_words(error)
        manifest, problem = broadcast_object((manifest, problem))
        if manifest is not None:
            try:
                for entry in manifest.files[rank() :: world_size()]:
                    mirror.fetch(step, entry, fetched)
                    self.alive()
            except Exception as error:
                problem = error_words(error)
        problems = [each for each in gather_objects(problem) if each]
        if manifest is not None and rank() == 0 and not problems:
            try:
                for path in self.companions:
                    mirror.fetch_companion(step, path)
                manifest.write(fetched)
                _remove(folder)
                fetched.rename(folder)
                sync_directory(self.directory)
                logger.warning("checkpoint of step %d was copied from %s", step, mirror.folder.url)
            except OSError as error:
                problems = [error_words(error)]
        problems = broadcast_object(problems)
        if rank() == 0 and problems:
            shutil.rmtree(fetched, ignore_errors=True)
        return [f"mirror, step {step}: {each}" for each in problems]

    def begin(self, step: int) -> None:
        """Writes down from which step this attempt goes on, 0 where there was no checkpoint: what a former attempt
        commits beyond it from now on comes too late."""
        if self.fence and rank() == 0:
            write_attempt(self.directory, self.fence, step)

    def give_up_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: the run goes on from this one, and they hold what it goes back from.
        No save may be on its way. Raises RunStopped, on all ranks, where the mirror keeps them."""
        assert self._running is None
        if self._copies:
            self._copies.finish()
        problem = None
        if rank() == 0:
            for each, folder in checkpoint_folders(self.directory):
                if each > step:
                    _remove(folder)
            try:
                if self._copies:
                    self._copies.mirror.give_up_after(step)
            except Exception as error:
                problem = error_words(error)
        problem = broadcast_object(problem)
        if problem:
            raise RunStopped(f"step {step}: later checkpoints cannot be removed from the mirror: {problem}")
        self._told = -1  # they will be saved anew

    def load(self, engine: HasState, manifest: Manifest) -> None:
        """Loads a checkpoint that `find` verified, of any world size and ZeRO stage.

        Bitwise: masters and moments always, random states at the same world size. Raises CheckpointError where it is of
        another model.
        """
        folder = self.directory / folder_name(manifest.step)
        saved = Shards(folder, [entry.path for entry in manifest.files], rank())
        engine.restore(saved)
        state = saved.of_rank(rank(), "rng")
        if state and manifest.world_size == world_size():
            _set_rng_state(state, saved.metadata(rank())["rng"])
        else:
            seed_everything(self.config.seed, rank(), manifest.step)
        barrier()
