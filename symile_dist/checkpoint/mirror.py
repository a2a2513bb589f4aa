"""A second home of a run's checkpoints, in an object store or another folder: RUN may be lost with its disk.

All stands in one folder, as `step-00000010.manifest.json` and `step-00000010.rank-00000.TOKEN.safetensors`: one
listing tells everything. As on the disk the manifest comes last; a store that can (S3) refuses it where there is one
already, so that of two writers the one with the higher fence wins.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from symile_dist.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    FileEntry,
    Manifest,
    folder_name,
    parse_manifest,
    read_manifest,
)
from symile_dist.config import Config
from symile_dist.distributed import barrier, gather_objects, rank
from symile_dist.failpoints import failpoint
from symile_dist.storage import Folder, error_words, sha256_of_file, write_atomic

logger = logging.getLogger(__name__)
OWNER = "owner.json"
POLL_SECONDS = 1.0
NOT_COPIED = "another rank could not copy its file"
_NAME = re.compile(r"step-(\d{8,})\.(.+)")


class Mirror:
    """The folder that `checkpoint.mirror` names."""

    def __init__(self, config: Config, holder: str = "") -> None:
        """
        Args:
            holder: what `claim` has said; where that is no longer so, nothing is written.
        """
        assert config.checkpoint.mirror is not None
        self.config, self.holder = config, holder
        self.folder = Folder(config.checkpoint.mirror, config.data.storage)
        self.give_up_seconds = config.data.storage.give_up_seconds

    def owner(self) -> dict[str, Any]:
        """Whose it is: the run's name, its config, and who has claimed it last; empty where nobody has."""
        try:
            owner = json.loads(self.folder.read(OWNER))
        except (FileNotFoundError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def claim(self) -> tuple[str, int]:
        """Takes it for this process's run: whoever had it before writes nothing more.

        Returns the holder's name, and the highest fence under which anything was committed there. Raises ValueError
        where it is another run's, StorageError or OSError where it cannot be written or does not answer.
        """
        if self.folder.path is not None:
            self.folder.path.mkdir(parents=True, exist_ok=True)
        owner = self.owner().get("run", self.config.run.name)
        if owner != self.config.run.name:
            raise ValueError(f"checkpoint.mirror: {self.folder.url} is that of run '{owner}'; choose another folder")
        fences = [0]
        for step in self.steps():
            with contextlib.suppress(CheckpointError, FileNotFoundError):  # damaged: it is passed over
                fences.append(self.manifest(step).fence)
        self.holder = secrets.token_hex(8)
        content = {"run": owner, "holder": self.holder, "config": self.config.model_dump(mode="json")}
        self.folder.write(OWNER, json.dumps(content, indent=2).encode())
        return self.holder, max(fences)

    def _check_held(self) -> None:
        if self.holder and self.owner().get("holder") != self.holder:
            raise OSError(f"{self.folder.url}: another job has claimed it")

    def steps(self) -> list[int]:
        """Those that were committed, in order. Raises StorageError where the store does not answer."""
        return sorted(step for step, names in self._names().items() if MANIFEST in names)

    def _names(self) -> dict[int, dict[str, int]]:
        """Sizes of all files of each step, by name."""
        found: dict[int, dict[str, int]] = {}
        with contextlib.suppress(FileNotFoundError):  # an object store has no empty folders
            for name, info in self.folder.list().items():
                match = _NAME.fullmatch(name)
                if match:
                    found.setdefault(int(match[1]), {})[match[2]] = info.size
        return found

    def manifest(self, step: int) -> Manifest:
        """Raises CheckpointError where it is damaged."""
        name = _name(step, MANIFEST)
        return parse_manifest(self.folder.read(name), self.folder / name)

    def put(self, step: int, path: Path) -> None:
        """Copies a rank's file there."""
        self.folder.put(path, _name(step, path.name))

    def commit(self, manifest: Manifest, folder: Path, cancelled: threading.Event) -> None:
        """Waits until all files of a checkpoint are there, and writes its manifest.

        Raises OSError where another rank's file will not come, or does not for `data.storage.give_up_seconds`; where
        another job has claimed the mirror, or a later attempt was there before.
        """
        deadline = time.monotonic() + self.give_up_seconds
        while True:
            names = self._names().get(manifest.step, {})
            if all(names.get(entry.path) == entry.size for entry in manifest.files):
                break
            if cancelled.wait(POLL_SECONDS):
                raise OSError(NOT_COPIED)
            if time.monotonic() > deadline:
                lacking = [entry.path for entry in manifest.files if names.get(entry.path) != entry.size]
                raise OSError(f"{self.folder.url}: {', '.join(lacking[:3])} did not come in {self.give_up_seconds:g} s")
        self._check_held()
        name, content = _name(manifest.step, MANIFEST), (folder / MANIFEST).read_bytes()
        if not self.folder.create(name, content):
            there = self.manifest(manifest.step)
            if there.fence > manifest.fence:
                raise OSError(f"{self.folder / name}: is of a later attempt (fence {there.fence})")
            self.folder.write(name, content)  # of one that this run has gone back from

    def copy_whole(self, folder: Path, companions: Sequence[Path] = ()) -> None:
        """Copies a checkpoint by one process, its manifest last."""
        manifest = read_manifest(folder)
        for path in [folder / entry.path for entry in manifest.files] + [path for path in companions if path.exists()]:
            self.put(manifest.step, path)
        self.commit(manifest, folder, threading.Event())

    def keep(self, kept: set[int], newest: int) -> None:
        """Removes what is neither of a step that is kept, nor on its way."""
        self._check_held()
        for step, names in self._names().items():
            if step not in kept and step <= newest:
                for name in sorted(names, key=lambda name: name != MANIFEST):
                    self.folder.remove(_name(step, name))

    def give_up_after(self, step: int) -> None:
        """Removes later checkpoints."""
        self.keep({each for each in self._names() if each <= step}, newest=max(self._names(), default=0))

    def fetch_companion(self, step: int, path: Path) -> None:
        """Copies back a file that went along with a checkpoint, unless it did not or is here."""
        with contextlib.suppress(FileNotFoundError):
            if not path.exists():
                content = self.folder.read(_name(step, path.name))
                write_atomic(path, lambda file: file.write(content))

    def fetch(self, step: int, entry: FileEntry, folder: Path) -> None:
        """Copies a file back into a checkpoint's folder. Raises CheckpointError where it is not what was saved."""
        path = folder / entry.path
        with self.folder.local_copy(_name(step, entry.path), folder) as copy:
            if sha256_of_file(copy) != entry.sha256:
                raise CheckpointError(f"{self.folder / _name(step, entry.path)}: does not match the manifest's sha256")
            if self.folder.path is None:
                copy.rename(path)
            else:
                path.write_bytes(copy.read_bytes())


class Copying(threading.Thread):
    """One checkpoint on its way to the mirror: this rank's file; on rank 0 then the manifest."""

    def __init__(self, mirror: Mirror, rank: int, step: int, path: Path, companions: Sequence[Path] = ()) -> None:
        """
        Args:
            path: this rank's file of the checkpoint, which is committed on the disk.
            companions: files that rank 0 copies with it, those that are there.
        """
        super().__init__(name="mirror", daemon=True)
        self.mirror, self.rank, self.step, self.path, self.companions = mirror, rank, step, path, companions
        self.problem: str | None = None
        self.cancelled, self.copied = threading.Event(), threading.Event()
        self.kept: set[int] | None = None
        """Steps that are kept there; rank 0 is told before `start`. None: all."""
        self.seconds = 0.0

    def run(self) -> None:
        begin = time.perf_counter()
        try:
            failpoint("mirror.begun", self.rank, self.step)
            self.mirror.put(self.step, self.path)
            for path in self.companions:
                if self.rank == 0 and path.exists():
                    self.mirror.put(self.step, path)
            self.copied.set()
            if self.rank == 0:
                self.mirror.commit(read_manifest(self.path.parent), self.path.parent, self.cancelled)
                if self.kept is not None:
                    try:
                        self.mirror.keep(self.kept | {self.step}, self.step)
                    except Exception as error:  # it is there; the next one tries again
                        logger.warning("%s: not pruned: %s", self.mirror.folder.url, error_words(error))
        except Exception as error:
            self.problem = error_words(error)
        finally:
            self.seconds = time.perf_counter() - begin
            self.copied.set()


class Mirrored(NamedTuple):
    """A checkpoint whose way to the mirror has come to an end."""

    step: int
    seconds: float
    problem: str | None
    """Why it is not there."""


class Copies:
    """A run's checkpoints on their way to its mirror, one at a time; all ranks call `next`, `drop`, `finish`, in step.

    While one is under way others go by, so that a slow store holds up nobody.
    """

    def __init__(self, mirror: Mirror, companions: Sequence[Path], alive: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            companions: files of the run's directory without which a checkpoint cannot be gone on from.
            alive: called now and then while it waits.
        """
        self.mirror, self.companions, self.alive = mirror, companions, alive
        self.under_way: Copying | None = None
        self._passed_by: tuple[int, Path] | None = None
        self._ended: list[Mirrored] = []

    def next(self, step: int, path: Path) -> Copying | None:
        """The copy of a checkpoint that is about to be saved: to be started once this rank's file, `path`, is there
        and, on rank 0, once it is committed. None where another one is under way."""
        self._passed_by = None
        if not self._is_free():
            self._passed_by = step, path
            return None
        self.under_way = Copying(self.mirror, rank(), step, path, self.companions)
        return self.under_way

    def drop(self, step: int) -> None:
        """There is no such checkpoint: it could not be saved."""
        if self.under_way and self.under_way.step == step:
            self.under_way = None

    def finish(self, kept: set[int] | None = None) -> None:
        """Waits until the mirror has what is on its way there; with `kept`, the newest checkpoint too."""
        self._wait()
        if kept is not None and self._passed_by:
            self.under_way = Copying(self.mirror, rank(), *self._passed_by, self.companions)
            self._passed_by = None
            self.under_way.kept = kept
            self.under_way.start()
            self._wait()

    def news(self) -> list[Mirrored]:
        """Those that have come to an end since the last call; no other rank is asked."""
        ended, self._ended = self._ended, []
        return ended

    def _is_free(self) -> bool:
        copying = self.under_way
        if copying is None:
            return True
        states = gather_objects((copying.copied.is_set(), not copying.is_alive(), copying.problem))
        # What comes of another rank's problem is told last.
        problems = sorted((problem for *_, problem in states if problem), key=lambda problem: NOT_COPIED in problem)
        problem = next(iter(problems), None)
        if problem:
            copying.cancelled.set()  # rank 0 may wait for a file that will not come
        if not all(copied for copied, *_ in states) or not states[0][1]:
            return False
        self._ended.append(Mirrored(copying.step, copying.seconds, problem))
        self.under_way = None
        return True

    def _wait(self) -> None:
        if self.under_way is None:
            return
        while not self.under_way.copied.wait(POLL_SECONDS):
            self.alive()
        if any(gather_objects(self.under_way.problem)):
            self.under_way.cancelled.set()
        while self.under_way.is_alive():
            self.under_way.join(POLL_SECONDS)
            self.alive()
        barrier()
        assert self._is_free()


def _name(step: int, name: str) -> str:
    return f"{folder_name(step)}.{name}"
