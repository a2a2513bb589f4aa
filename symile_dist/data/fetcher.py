"""The process that fetches for a node: the only one that talks to the object store (see symile_dist/data/cache.py).

    python -m symile_dist.data.fetcher --folder CACHE --socket PATH --storage JSON  (started by ShardCache, not by hand)

Bytes [start, end) of a url that one local file holds are an *extent*. Extents of a url that are in use do not overlap:
a piece that somebody asks for is covered by those that are there, and new extents are fetched for the gaps only. An
extent is first waiting (for room in the budget), then being fetched, then here; nothing is fetched before its bytes
fit into the budget, and only extents that nobody holds are evicted.

Everything runs in one thread, in asyncio; only writes to the disk leave it.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import logging.handlers
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from symile_dist.config import StorageConfig
from symile_dist.data.cache import BEAT_SECONDS, LENGTH, Piece
from symile_dist.errors import StorageError
from symile_dist.storage import (
    backoff,
    endpoint_words,
    error_words,
    failure,
    failure_kind,
    remote_filesystem,
    without_secrets,
    write_json,
)

_logger = logging.getLogger("symile_dist.data.fetcher")
_NAME = re.compile(r"([0-9a-f]{32})-(\d+)-(\d+)")
_SHORT_TRIES = 3
Rank = Callable[[], tuple[int, int]]
"""When a request's turn is, against the others: lower goes first. May change while it waits."""


# ---- requests: slots, and the only retry loop


class Slots:
    """So many at once; who waits goes by rank."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._waiting: list[tuple[Rank, asyncio.Future[None]]] = []

    @contextlib.asynccontextmanager
    async def one(self, rank: Rank) -> AsyncIterator[None]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((rank, turn))
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was granted just before
                self._free_one()
            raise
        try:
            yield
        finally:
            self._free_one()

    def _free_one(self) -> None:
        # Not at once: who has just finished may want another of a higher rank than all who wait.
        self._free += 1
        asyncio.get_running_loop().call_soon(self._grant)

    def _grant(self) -> None:
        while self._free and self._waiting:
            one = min(self._waiting, key=lambda one: one[0]())
            self._waiting.remove(one)
            if not one[1].cancelled():
                self._free -= 1
                one[1].set_result(None)


class GaveUp(StorageError):
    """Tried for `give_up_seconds`."""


@dataclass
class _Server:
    """What is known of the health of one endpoint."""

    silent_since: float | None = None
    """When the first of a row of failed tries, of whatever file, began."""
    gave_up: float = float("-inf")
    """When it was last found silent for `give_up_seconds`."""
    words: str = ""

    def answered(self) -> None:
        self.silent_since, self.gave_up = None, float("-inf")

    def failed(self, began: float) -> None:
        self.silent_since = began if self.silent_since is None else self.silent_since

    def is_silent(self, now: float, patience: float) -> bool:
        """Also for a while after it was found so: then a single try shows it."""
        long = self.silent_since is not None and now - self.silent_since >= patience
        return long or now - self.gave_up < patience


class Requests:
    """Ranged requests, tried until they succeed or cannot."""

    def __init__(self, storage: StorageConfig) -> None:
        self.storage = storage
        self.counts = {"bytes_fetched": 0, "requests": 0, "retries": 0}
        self._slots = Slots(storage.connections)
        self._filesystems: dict[str, Any] = {}
        self._servers: dict[str, _Server] = {}

    def _filesystem(self, url: str) -> Any:
        scheme = url.partition("://")[0]
        if scheme not in self._filesystems:
            try:
                self._filesystems[scheme] = remote_filesystem(url, self.storage, attempts=1, asynchronous=True)
            except Exception as error:
                raise StorageError(error_words(error)) from None
        return self._filesystems[scheme]

    async def ask(
        self,
        url: str,
        start: int,
        end: int,
        rank: Rank,
        asked: float,
        exact: bool = True,
        keep: Callable[[bytes], Awaitable[None]] | None = None,
        pausing: Callable[[bool], None] = lambda begins: None,
    ) -> bytes:
        """Bytes [start, end) of a file; fewer where it ends, unless `exact`.

        Tries again, with growing pauses, what may yet succeed, until this range has failed for `give_up_seconds`, or
        until nothing at all has come from its endpoint for so long: whatever else was wanted of a silent endpoint
        (`asked`: since when, by time.monotonic()) then fails with it, and for a while later requests get one try each.
        `keep` is called with the bytes, `pausing(True)` and `pausing(False)` around pauses. Raises FileNotFoundError,
        GaveUp and StorageError.
        """
        filesystem = self._filesystem(url)
        server = self._servers.setdefault(endpoint_words(url, self.storage), _Server())
        name, patience = without_secrets(url), self.storage.give_up_seconds
        first_failed: float | None = None
        short = 0
        for tries in itertools.count():
            async with self._slots.one(rank):
                if server.gave_up > asked:
                    raise GaveUp(f"{name}: {server.words}")
                began = time.monotonic()
                left = patience if first_failed is None else first_failed + patience - began
                self.counts["requests"] += 1
                self.counts["retries"] += tries > 0
                try:
                    # The file system's own time limits are for silence; this one ends what only trickles.
                    async with asyncio.timeout(max(self.storage.timeout_seconds, left)):
                        data = await filesystem._cat_file(filesystem._strip_protocol(url), start=start, end=end)
                    server.answered()
                    short += len(data) < end - start
                    if len(data) > end - start and (exact or start > 0):
                        raise StorageError(f"{name}: its server ignores ranges: it sent {len(data)} bytes")
                    if len(data) < end - start and exact:
                        # A body that broke off is tried again; an object that is shorter stays so.
                        words = f"{name}: ends after {start + len(data)} bytes, {end} were expected"
                        raise StorageError(words) if short >= _SHORT_TRIES else EOFError(words)
                    self.counts["bytes_fetched"] += len(data)
                    if keep is not None:
                        await keep(data)  # before the slot is free: what is in memory is bounded by the slots
                    return bytes(data)
                except Exception as error:  # aiohttp's and botocore's are neither OSError nor of one family
                    caught = error
            kind = failure_kind(caught)
            if kind != "transient":
                server.answered()
                if not _past_the_end(caught):
                    raise failure(url, kind, caught, self.storage)
                if exact:
                    raise StorageError(f"{name}: ends before byte {start}, which was expected")
                return b""
            now = time.monotonic()
            first_failed = began if first_failed is None else first_failed
            if not isinstance(caught, EOFError):
                server.failed(began)
            if server.is_silent(now, patience) or now - first_failed >= patience:
                words = str(failure(url, kind, caught, self.storage)).removeprefix(f"{name}: ")
                if server.is_silent(now, patience):
                    server.gave_up, server.words = now, words
                raise GaveUp(f"{name}: {words}")
            _logger.warning("%s [%d, %d): try %d: %s", name, start, end, tries + 1, error_words(caught))
            pausing(True)
            try:
                await asyncio.sleep(min(backoff(tries), max(0.0, first_failed + patience - now)))
            finally:
                pausing(False)
        raise AssertionError("unreachable")


def _past_the_end(error: BaseException) -> bool:
    """Whether a server says that a range begins after a file's last byte."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict) and response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
            return True
        if getattr(one, "status", None) == 416:
            return True
    return False


# ---- extents: what is where, and what may go


@dataclass(eq=False)
class Extent:
    """Bytes [start, end) of a url, in a local file."""

    key: str
    """Of the url: its hash."""
    url: str
    """Empty for what was found on the disk: nothing is asked of it any more."""
    start: int
    end: int
    name: str
    """Of the file, in the cache folder."""
    state: Literal["waiting", "fetching", "here", "gone"] = "waiting"
    holders: set[Connection] = field(default_factory=set)
    last_used: float = 0.0
    """Seconds since 1970: survives a restart as the file's time."""
    asked: float = field(default_factory=time.monotonic)
    """When somebody first wanted it."""
    written: int = 0
    stale: bool = False
    """Proved wrong, but somebody still holds it."""
    words: str = ""
    """Why it failed."""
    settled: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done once it is here or has failed."""

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(eq=False)
class Connection:
    """A client, and what it refers to."""

    held: set[Extent] = field(default_factory=set)
    soon: list[Piece] = field(default_factory=list)
    refused: asyncio.Future[Exception] | None = None
    """While it waits in `hold`: set when there will be no room for it."""

    def waits(self) -> bool:
        return any(not extent.settled.done() for extent in self.held)


def _key(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def _whole(url: str) -> str:
    """The key of a file that is cached as a whole: its one extent is all of it."""
    return _key(f"whole {url}")


class Fetcher:
    """The state of a node's cache, and what its clients ask of it."""

    def __init__(self, folder: Path, storage: StorageConfig) -> None:
        self.folder = folder
        self.storage = storage
        self.requests = Requests(storage)
        self.connections: list[Connection] = []
        self.extents: dict[str, list[Extent]] = {}
        """By key of the url: sorted by start, without overlaps."""
        self.aside: set[Extent] = set()
        """Files that count but are no longer given out: stale ones, and those of other folders' idle fetchers."""
        self.waiting: list[Extent] = []
        self.used = 0
        """Bytes of the files here and of those being fetched, all of them counted from the start."""
        self.workers = 0
        """Coroutines that ask for ranges, but for those in a pause."""
        self.counts = {"failures": 0, "evictions": 0}
        self._failed: list[tuple[str, int, int, float, str]] = []  # key, start, end, until when, words
        self._reading: dict[str, asyncio.Task[bytes]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._no_room_since: float | None = None
        self._load()

    def _load(self) -> None:
        """Finds the whole extents of an earlier fetcher; removes its temporaries."""
        for path in self.folder.glob("*.tmp"):
            path.unlink(missing_ok=True)
        for path in sorted(self.folder.iterdir()):
            extent = self._found(path, path.name)
            if extent is not None:
                before = self._cover(extent.key, extent.start, extent.end)[0]
                if before:  # a stale one and its successor: either may be the good one, and checksums will tell
                    path.unlink()
                else:
                    bisect.insort(self.extents.setdefault(extent.key, []), extent, key=lambda one: one.start)
                    self.used += extent.size
        # Fetchers of other endpoints that have ended: what they left counts, and goes when room is wanted.
        for lock in self.folder.parent.glob("*/lock"):
            if lock.parent != self.folder and _idle(lock):
                for path in lock.parent.iterdir():
                    extent = self._found(path, f"../{lock.parent.name}/{path.name}")
                    if extent is not None:
                        self.aside.add(extent)
                        self.used += extent.size
        _logger.info("found %d files, %d bytes", len(self._all("here")) + len(self.aside), self.used)
        self._make_room(0, urgent=True)  # the budget may have been lowered

    def _found(self, path: Path, name: str) -> Extent | None:
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        status = path.stat()
        key, start, end = match[1], int(match[2]), int(match[3])
        if status.st_size != end - start:
            path.unlink()
            return None
        extent = Extent(key, "", start, end, name, "here", last_used=status.st_mtime)
        extent.settled.set_result(None)
        return extent

    def _cover(self, key: str, start: int, end: int) -> tuple[list[Extent], list[tuple[int, int]]]:
        """The extents that hold some of the bytes, and the gaps between them."""
        cover: list[Extent] = []
        gaps: list[tuple[int, int]] = []
        at = start
        for extent in self.extents.get(key, ()):
            if extent.end <= start or extent.start >= end:
                continue
            if extent.start > at:
                gaps.append((at, extent.start))
            cover.append(extent)
            at = extent.end
        if at < end:
            gaps.append((at, end))
        return cover, gaps

    def _add(self, piece: Piece, start: int, end: int) -> Extent:
        key = _key(piece.url)
        extent = Extent(key, piece.url, start, end, f"{key}-{start}-{end}", last_used=time.time())
        bisect.insort(self.extents.setdefault(key, []), extent, key=lambda one: one.start)
        return extent

    def _remove(self, extent: Extent) -> None:
        """Out of the books; its file, if any, is the caller's business."""
        if extent.state in ("fetching", "here"):
            self.used -= extent.size
        extent.state = "gone"
        self.aside.discard(extent)
        if extent in self.waiting:
            self.waiting.remove(extent)
        siblings = self.extents.get(extent.key, [])
        if extent in siblings:
            siblings.remove(extent)
            if not siblings:
                del self.extents[extent.key]
        for holder in extent.holders:
            holder.held.discard(extent)
        extent.holders.clear()

    def _delete(self, extent: Extent) -> None:
        self._remove(extent)
        (self.folder / extent.name).unlink(missing_ok=True)

    def _release(self, extent: Extent, connection: Connection) -> None:
        extent.holders.discard(connection)
        connection.held.discard(extent)
        extent.last_used = time.time()
        if extent.holders:
            return
        if extent.state == "waiting":
            self._remove(extent)
        elif extent.stale:
            self._delete(extent)
        elif extent.state == "here":
            with contextlib.suppress(OSError):
                os.utime(self.folder / extent.name, (extent.last_used, extent.last_used))

    def _soon(self) -> list[Piece]:
        """What the clients want next: everybody's first, then everybody's second, ..."""
        rounds = itertools.zip_longest(*(connection.soon for connection in self.connections))
        return [piece for pieces in rounds for piece in pieces if piece is not None]

    # ---- the budget

    def _excess(self, size: int) -> int:
        """By how many bytes so many more would exceed the budget, or the disk."""
        unwritten = sum(one.size - one.written for one in self._all("fetching"))
        return max(self.used + size - self.storage.cache_bytes, size + unwritten - self._disk_free())

    def _disk_free(self) -> int:
        """Bytes of the disk that the cache may still take: others need some, too (the last 5 %, at most 1 GiB)."""
        disk = os.statvfs(self.folder)
        return disk.f_bavail * disk.f_frsize - min(disk.f_blocks * disk.f_frsize // 20, 1 << 30)

    def _all(self, state: str) -> list[Extent]:
        return [one for ones in self.extents.values() for one in ones if one.state == state]

    def _make_room(self, size: int, urgent: bool) -> bool:
        """Evicts until `size` more bytes fit; False, with nothing evicted, when that cannot be.

        Extents that nobody holds go, the least recently used first. Those that somebody wants soon go only for what is
        wanted now (`urgent`), the last wanted first.
        """
        excess = self._excess(size)
        if excess <= 0:
            return True
        soon: dict[Extent, int] = {}
        for rank, piece in enumerate(self._soon()):
            for extent in self._cover(_key(piece.url), piece.start, piece.end)[0]:
                soon.setdefault(extent, rank)
        idle = [one for one in (*self._all("here"), *self.aside) if not one.holders]
        idle.sort(key=lambda one: (1, -soon[one]) if one in soon else (0, one.last_used))
        victims: list[Extent] = []
        for extent in idle:
            if excess <= 0 or (extent in soon and not urgent):
                break
            if extent.name.startswith("../") and not _idle((self.folder / extent.name).parent / "lock"):
                self._remove(extent)  # its fetcher is back, and counts it itself
            else:
                victims.append(extent)
            excess -= extent.size
        if excess > 0:
            return False
        for extent in victims:
            self._delete(extent)
        self.counts["evictions"] += len(victims)
        return True

    def _check_stuck(self) -> None:
        """Refuses a client for which there will be no room, when everybody waits or nobody has moved for long."""
        if not self.waiting or self._all("fetching"):
            self._no_room_since = None
            return
        now = time.monotonic()
        if self._no_room_since is None:
            self._no_room_since = now
            asyncio.get_running_loop().call_later(self.storage.give_up_seconds + 0.1, self.pump)
        everybody_waits = all(connection.waits() for connection in self.connections if connection.held)
        if not everybody_waits and now - self._no_room_since < self.storage.give_up_seconds:
            return
        self._no_room_since = None
        holders = self.waiting[-1].holders
        last = max((one for one in self.connections if one in holders), key=self.connections.index)
        if last.refused is not None and not last.refused.done():
            last.refused.set_result(self._no_room())

    def _no_room(self) -> Exception:
        held = {extent for connection in self.connections for extent in connection.held}
        need = sum(extent.size for extent in held)
        if need > self.storage.cache_bytes:
            return self._too_much(need)
        return StorageError(
            f"{self.folder}: the disk is full: {max(0, self._disk_free())} more bytes may be used, {need} are needed "
            "at once; free some, or set data.storage.cache_directory to another disk"
        )

    def _too_much(self, need: int) -> ValueError:
        return ValueError(
            f"data.storage.cache_bytes = {self.storage.cache_bytes} is too little: the processes of this node need "
            f"{need} bytes at once; raise it, or lower data.window or the number of lanes"
        )

    # ---- what is fetched next

    def pump(self) -> None:
        """Starts what can be started: what is wanted now first, in the order in which it was asked for."""
        most = 2 * self.storage.connections  # as many again stand ready, so that no slot is ever idle
        while self.waiting and self.workers < most and self._make_room(self.waiting[0].size, urgent=True):
            self._start(self.waiting.pop(0))
        if not self.waiting:
            for piece in self._soon():
                if self._remembered(piece):
                    continue
                for start, end in self._cover(_key(piece.url), piece.start, piece.end)[1]:
                    if self.workers >= most or not self._make_room(end - start, urgent=False):
                        return
                    self._start(self._add(piece, start, end))
        self._check_stuck()

    def _start(self, extent: Extent) -> None:
        extent.state = "fetching"
        self.used += extent.size
        task = asyncio.create_task(self._fetch(extent, next(_numbers)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Counted here: the task itself has not begun.
        self.workers += self._workers_of(extent)

    def _workers_of(self, extent: Extent) -> int:
        return min(self.storage.connections, -(-extent.size // self.storage.request_bytes))

    async def _fetch(self, extent: Extent, number: int) -> None:
        """Brings an extent to the disk; whole, or not at all."""
        path, temporary = self.folder / extent.name, self.folder / f"{extent.name}.tmp"
        starts = iter(range(extent.start, extent.end, self.storage.request_bytes))

        def rank() -> tuple[int, int]:
            return (0 if extent.holders else 1, number)

        def pausing(begins: bool) -> None:
            self.workers += -1 if begins else 1
            if begins:
                self.pump()  # others need not wait for one that is out of order

        async def work() -> None:
            for start in starts:
                end = min(start + self.storage.request_bytes, extent.end)
                keep = functools.partial(write, start - extent.start)
                await self.requests.ask(extent.url, start, end, rank, extent.asked, keep=keep, pausing=pausing)

        async def write(offset: int, data: bytes) -> None:
            await asyncio.to_thread(_write_at, temporary, data, offset)
            extent.written += len(data)

        try:
            with _disk_words(temporary):
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                temporary.touch(mode=0o600)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._workers_of(extent)):
                        group.create_task(work())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            with _disk_words(temporary):
                if temporary.stat().st_size != extent.size:
                    raise StorageError(f"{temporary}: {temporary.stat().st_size} bytes instead of {extent.size}")
                os.replace(temporary, path)
            for old in [one for one in self.aside if one.name == extent.name]:
                self._remove(old)  # a stale one: its file has just been replaced
            extent.state = "here"
            extent.last_used = time.time()
            extent.settled.set_result(None)
        except Exception as error:
            temporary.unlink(missing_ok=True)
            known = isinstance(error, StorageError | FileNotFoundError)
            extent.words = str(error) if known else f"{without_secrets(extent.url)}: {error_words(error)}"
            _logger.error("failed: %s", extent.words, exc_info=None if known else error)
            self.counts["failures"] += 1
            self._remember(extent.key, extent.start, extent.end, error, extent.words)
            self._remove(extent)
            extent.settled.set_result(None)
        finally:
            self.workers -= self._workers_of(extent)
        self.pump()

    def _remember(self, key: str, start: int, end: int, error: Exception, words: str) -> None:
        """So that not every client waits for the same again; for long only where waiting took long."""
        seconds = self.storage.give_up_seconds
        until = time.monotonic() + (seconds if isinstance(error, GaveUp) else min(10.0, seconds))
        self._failed.append((key, start, end, until, words))

    def _remembered(self, piece: Piece) -> str:
        """Why bytes of it could not be had a while ago."""
        now = time.monotonic()
        self._failed = [failed for failed in self._failed if failed[3] > now]
        key = _key(piece.url)
        return next((f[4] for f in self._failed if f[0] == key and f[1] < piece.end and piece.start < f[2]), "")

    # ---- what clients ask

    async def hold(self, connection: Connection, pieces: Sequence[Piece], soon: Sequence[Piece]) -> dict[str, Any]:
        before, connection.held = connection.held, set()
        connection.soon = list(soon)
        covers: list[list[Extent]] = []
        failures: dict[int, str] = {}
        for index, piece in enumerate(pieces):
            cover, gaps = self._cover(_key(piece.url), piece.start, piece.end)
            words = self._remembered(piece) if gaps else ""
            if words:
                failures[index] = words
            else:
                new = [self._add(piece, start, end) for start, end in gaps]
                self.waiting += new
                cover = cover + new
            for extent in cover:
                extent.holders.add(connection)
                extent.last_used = time.time()
                connection.held.add(extent)
            covers.append(cover)
        for extent in before - connection.held:
            self._release(extent, connection)
        need = sum(extent.size for extent in connection.held)
        refused = connection.refused = asyncio.get_running_loop().create_future()
        if need > self.storage.cache_bytes:
            refused.set_result(self._too_much(need))
        else:
            self.pump()
        pending = {extent.settled for extent in connection.held}
        while pending and not refused.done():
            await asyncio.wait({*pending, refused}, return_when=asyncio.FIRST_COMPLETED)
            pending = {one for one in pending if not one.done()}
        connection.refused = None
        if refused.done():
            _logger.error("%s", refused.result())
            self.let_go(connection)
            kind = "too_much" if isinstance(refused.result(), ValueError) else "failed"
            return {kind: str(refused.result())}
        segments: dict[str, list[tuple[int, int, str]]] = {}
        for index, (piece, cover) in enumerate(zip(pieces, covers, strict=True)):
            words = next((extent.words for extent in cover if extent.words), "")
            if words:
                failures[index] = words
            parts = segments.setdefault(piece.url, [])
            parts += [(one.start, one.end, one.name) for one in cover if one.state == "here"]
        return {
            "segments": {url: sorted(set(parts)) for url, parts in segments.items()},
            "failures": sorted(failures.items()),
        }

    def let_go(self, connection: Connection) -> None:
        """Everything that a client held or wanted."""
        connection.soon = []
        for extent in list(connection.held):
            self._release(extent, connection)
        self.pump()

    async def read(self, url: str, fresh: bool) -> bytes:
        if fresh:
            self._forget(_whole(url))
        for extent in self.extents.get(_whole(url), ()):
            with contextlib.suppress(OSError):
                data = (self.folder / extent.name).read_bytes()
                extent.last_used = time.time()
                return data
        remembered = self._remembered(Piece(f"whole {url}", 0, 1))
        if remembered:
            raise StorageError(remembered)
        if url not in self._reading:
            self._reading[url] = asyncio.create_task(self._read(url))
            self._reading[url].add_done_callback(lambda task: self._reading.pop(url, None))
        return await asyncio.shield(self._reading[url])  # others may wait for it when this client is gone

    async def _read(self, url: str) -> bytes:
        """Range by range until one comes short: a small file costs one request, and none for its size."""
        parts: list[bytes] = []
        step, asked = self.storage.request_bytes, time.monotonic()
        try:
            while not parts or len(parts[-1]) == step:
                start = sum(map(len, parts))
                parts.append(await self.requests.ask(url, start, start + step, lambda: (0, 0), asked, exact=False))
        except GaveUp as error:
            self.counts["failures"] += 1
            self._remember(_whole(url), 0, 1, error, str(error))
            raise
        data = b"".join(parts)
        key = _whole(url)
        self._forget(key)
        if data and self._make_room(len(data), urgent=False):  # else it is given out without being kept
            extent = Extent(key, url, 0, len(data), f"{key}-0-{len(data)}", "here", last_used=time.time())
            extent.settled.set_result(None)
            path = self.folder / extent.name
            try:
                path.with_suffix(".tmp").write_bytes(data)
                os.replace(path.with_suffix(".tmp"), path)
                self.extents[key] = [extent]
                self.used += extent.size
            except OSError as error:
                path.with_suffix(".tmp").unlink(missing_ok=True)
                _logger.warning("%s: not kept: %s", without_secrets(url), error)
        return data

    def forget(self, url: str) -> None:
        _logger.warning("forgotten, its bytes were wrong: %s", without_secrets(url))
        self._forget(_key(url))
        self._forget(_whole(url))

    def _forget(self, key: str) -> None:
        self._failed = [failed for failed in self._failed if failed[0] != key]
        for extent in [one for one in self.extents.get(key, ()) if one.state == "here"]:
            if extent.holders:
                extent.stale = True
                self.extents[key].remove(extent)
                self.aside.add(extent)
            else:
                self._delete(extent)
        if not self.extents.get(key, True):
            del self.extents[key]

    def counters(self) -> dict[str, int]:
        return {**self.requests.counts, **self.counts, "bytes_cached": sum(one.size for one in self._all("here"))}


_numbers: Iterator[int] = itertools.count(1)


def _idle(lock: Path) -> bool:
    """Whether no fetcher lives in a cache folder."""
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False


def _write_at(path: Path, data: bytes, offset: int) -> None:
    # Opened for each write: one that is still on its way when its extent has failed cannot hit another file.
    with _disk_words(path):
        descriptor = os.open(path, os.O_WRONLY)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _disk_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some, or set data.storage.cache_directory to another disk"
        raise StorageError(
            f"{path.parent}: " + (f"the disk is full; {remedy}" if full else f"cannot be written: {error}")
        ) from None


# ---- the socket


async def _receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message; None at the end."""
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return dict(json.loads(await reader.readexactly(length)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


async def _answer(fetcher: Fetcher, connection: Connection, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    match message["op"]:
        case "hold":
            pieces, soon = ([Piece(*piece) for piece in message[name]] for name in ("pieces", "soon"))
            return await fetcher.hold(connection, pieces, soon), b""
        case "read":
            try:
                data = await fetcher.read(message["url"], message["fresh"])
                return {"bytes": len(data)}, data
            except FileNotFoundError as error:
                return {"missing": str(error)}, b""
            except StorageError as error:
                return {"failed": str(error)}, b""
        case "forget":
            fetcher.forget(message["url"])
        case "counters":
            return {"counters": fetcher.counters()}, b""
    return {}, b""


class Service:
    """Serves clients until there has been none for `linger_seconds`."""

    def __init__(self, fetcher: Fetcher, linger_seconds: float) -> None:
        self.fetcher = fetcher
        self.linger_seconds = linger_seconds
        self.ended = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._wait_for_clients()

    def _wait_for_clients(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.fetcher.connections:
            self._timer = asyncio.get_running_loop().call_later(self.linger_seconds, self.ended.set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, from its first message to its end, which may come while it waits for an answer."""
        connection = Connection()
        self.fetcher.connections.append(connection)
        self._wait_for_clients()
        following: asyncio.Task[dict[str, Any] | None] | None = None
        try:
            message = await _receive(reader)
            while message is not None:
                work = asyncio.create_task(_answer(self.fetcher, connection, message))
                following = asyncio.create_task(_receive(reader))
                while not work.done():
                    await asyncio.wait({work, following}, timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    if following.done():  # a client asks one thing at a time: this is its end
                        work.cancel()
                        return
                    if not work.done():
                        await _send(writer, {"wait": 1}, b"")
                await _send(writer, *work.result())
                message = await following
        except ConnectionError:
            pass
        except Exception:
            _logger.exception("a client's request failed")
        finally:
            connection.refused = None
            self.fetcher.connections.remove(connection)
            self.fetcher.let_go(connection)
            self._wait_for_clients()
            if following is not None:
                following.cancel()
            writer.close()


async def _send(writer: asyncio.StreamWriter, message: dict[str, Any], body: bytes) -> None:
    text = json.dumps(message).encode()
    writer.write(LENGTH.pack(len(text)) + text + body)
    await writer.drain()


async def _main(folder: Path, address: Path, storage: StorageConfig, linger_seconds: float) -> None:
    fetcher = Fetcher(folder, storage)
    service = Service(fetcher, linger_seconds)
    address.unlink(missing_ok=True)  # of one that was killed: this one has its lock
    server = await asyncio.start_unix_server(service.serve, str(address))
    os.chmod(address, 0o600)
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "socket": str(address)}
    write_json(folder / "owner.json", owner)
    _logger.info("serving; %s; at most %d bytes", endpoint_words("s3://", storage), storage.cache_bytes)
    await service.ended.wait()
    # Clients that come in this moment lose their connection, and start another fetcher.
    (folder / "owner.json").unlink(missing_ok=True)
    server.close()
    address.unlink(missing_ok=True)
    _logger.info("no client for %g s: the end; %s", linger_seconds, fetcher.counters())
    logging.shutdown()
    os._exit(0)  # without requests that nobody waits for any more, and threads that still look up a name


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="symile_dist.data.fetcher", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--storage", type=StorageConfig.model_validate_json, required=True)
    parser.add_argument("--linger-seconds", type=float, required=True)
    options = parser.parse_args(arguments)
    handler = logging.handlers.RotatingFileHandler(options.folder / "fetcher.log", maxBytes=512 * 1024, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logger = logging.getLogger("symile_dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    asyncio.run(_main(options.folder, options.socket, options.storage, options.linger_seconds))


if __name__ == "__main__":
    main()
