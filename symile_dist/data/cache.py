"""The node's cache of remote shards, as the processes that read them see it.

    with the fetcher (symile_dist/data/fetcher.py), one process per node:     ShardCache  --Unix socket-->  fetcher
    which alone talks to the object store, keeps the budget and evicts.       reads files <--cache folder--   writes

The first process that needs the fetcher starts it: whoever gets the lock of the cache folder hands it to the process
that it starts, which keeps it until its end, however it ends. Messages are JSON behind their length in four bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import select
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from symile_dist.config import StorageConfig
from symile_dist.errors import StorageError
from symile_dist.storage import endpoint_words

PROTOCOL = 1
"""Part of the folder's name: a fetcher and its clients always speak the same."""
LENGTH = struct.Struct(">I")
BEAT_SECONDS = 5.0
"""While an answer takes long, the fetcher says so often that it is there."""
_DEAF_SECONDS = 60.0
"""Without a word for so long, a fetcher counts as hung."""
_START_SECONDS = 60.0

_logger = logging.getLogger(__name__)
_children: list[subprocess.Popen[bytes]] = []
"""Fetchers that this process started: kept so that they are reaped when they end first."""


class Piece(NamedTuple):
    """Bytes [start, end) of a remote file."""

    url: str
    """Of the whole file, e.g. s3://bucket/train/shard-00001.tar"""
    start: int
    end: int


class Segment(NamedTuple):
    """A local file that holds bytes [start, end) of a remote one, from its own offset 0 on."""

    start: int
    end: int
    path: str


def cache_root(storage: StorageConfig) -> Path:
    """The folder of all caches of this user on the node."""
    if storage.cache_directory is not None:
        return Path(storage.cache_directory).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "symile-dist"


def cache_folder(storage: StorageConfig) -> Path:
    """The folder of one fetcher. Another endpoint or another account may hold other bytes under the same URL."""
    profile = storage.profile or os.environ.get("AWS_PROFILE")
    service = [PROTOCOL, endpoint_words("s3://", storage), profile, storage.anonymous]
    return cache_root(storage) / hashlib.sha256(json.dumps(service).encode()).hexdigest()[:16]


def private_directory() -> Path:
    """The folder of the sockets, which only this user can enter. Raises StorageError when it is someone else's."""
    path = Path(tempfile.gettempdir()) / f"symile-dist-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    _check_private(path)
    return path


def _check_private(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StorageError(f"{path}: should be a folder of this user that nobody else may enter (mode 0700); remove it")


class ShardCache:
    """Remote files, by pieces, as local files. One call at a time per connection; calls from threads wait in line.

    Nothing happens before the first call. A pickled, unpickled or forked copy makes its own connection and holds
    nothing at first. Does not outlive a fetcher's death unnoticed: it starts another one and holds again what it held,
    and callers see none of it. Every call raises StorageError when no fetcher can be started or reached.
    """

    def __init__(self, storage: StorageConfig, linger_seconds: float = 10.0) -> None:
        """`linger_seconds`: how long a fetcher that is started here outlives its last client."""
        self.storage = storage
        self.linger_seconds = linger_seconds
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._wanted: dict[str, Any] | None = None  # the last hold that was granted
        self._segments: dict[str, list[Segment]] = {}
        _caches.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"storage": self.storage, "linger_seconds": self.linger_seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def hold(self, pieces: Sequence[Piece], soon: Sequence[Piece] = ()) -> dict[Piece, str]:
        """From now on these pieces are local and stay local; those held before and not named now are released.

        Blocks until each is there or has failed for good; returns the failures with their words. `soon`: what will be
        wanted next, in order, is fetched in the background as far as there is room without evicting what anybody holds
        or wants soon. Raises ValueError when what the node's processes hold at once does not fit into
        `data.storage.cache_bytes`, and StorageError when the disk is full; nothing is held then.
        """
        message = {"op": "hold", "pieces": pieces, "soon": soon}
        with self._lock:
            self._wanted, self._segments = None, {}
            reply, _ = self._exchange(message)
            if "too_much" in reply:
                raise ValueError(reply["too_much"])
            if "failed" in reply:
                raise StorageError(reply["failed"])
            self._granted(message, reply)
        return {pieces[index]: words for index, words in reply["failures"]}

    def _granted(self, message: dict[str, Any], reply: dict[str, Any]) -> None:
        folder = cache_folder(self.storage)
        self._wanted = message
        self._segments = {
            url: [Segment(start, end, str(folder / name)) for start, end, name in parts]
            for url, parts in reply["segments"].items()
        }

    def segments(self, url: str) -> list[Segment]:
        """What is held of a url, sorted by start; pieces that were asked for are covered without gaps."""
        return list(self._segments.get(url, ()))

    def read(self, url: str, fresh: bool = False) -> bytes:
        """A whole small file (manifest, index), through the cache. Raises FileNotFoundError or StorageError.

        `fresh`: asks the store again, for files that may have been replaced under their name since they were cached.
        """
        with self._lock:
            reply, body = self._exchange({"op": "read", "url": url, "fresh": fresh})
        if "missing" in reply:
            raise FileNotFoundError(reply["missing"])
        if "failed" in reply:
            raise StorageError(reply["failed"])
        return body

    def forget(self, url: str) -> None:
        """Its cached bytes proved wrong: the next `hold` fetches them again. Held files stay until released."""
        with self._lock:
            self._exchange({"op": "forget", "url": url})

    def counters(self) -> dict[str, int]:
        """Of the node since the fetcher started: bytes_fetched, requests, retries, failures, bytes_cached, ..."""
        with self._lock:
            reply, _ = self._exchange({"op": "counters"})
        return {str(name): int(value) for name, value in reply["counters"].items()}

    def close(self) -> None:
        """Releases everything. The next call connects again."""
        with self._lock:
            self._wanted, self._segments = None, {}
            self._disconnect()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._disconnect()

    # ---- the connection; all of it with the lock held

    def _exchange(self, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The answer, from another fetcher when this one dies meanwhile."""
        for _ in range(5):
            try:
                connection = self._socket or self._connect(rehold=message["op"] != "hold")
                return self._talk(connection, message)
            except (OSError, EOFError) as error:
                self._disconnect()
                _logger.warning("the connection to the node's fetcher broke (%s)", error)
        raise StorageError(f"the node's fetcher dies again and again; see {cache_folder(self.storage) / 'fetcher.log'}")

    def _talk(self, connection: socket.socket, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Raises OSError and EOFError for a connection that breaks, StorageError for a fetcher that hangs."""
        text = json.dumps(message).encode()
        try:
            connection.sendall(LENGTH.pack(len(text)) + text)
            while True:
                (length,) = LENGTH.unpack(_receive(connection, LENGTH.size))
                reply = json.loads(_receive(connection, length))
                if "wait" not in reply:
                    return reply, _receive(connection, reply.get("bytes", 0))
        except TimeoutError:
            self._disconnect()
            raise StorageError(
                f"the node's fetcher has said nothing for {_DEAF_SECONDS:g} s; see "
                f"{cache_folder(self.storage) / 'fetcher.log'}"
            ) from None
        except BaseException:  # an interrupt would leave half an answer for the next question
            self._disconnect()
            raise

    def _connect(self, rehold: bool) -> socket.socket:
        connection = _dial_or_start(self.storage, self.linger_seconds)
        self._socket = connection
        threading.Thread(target=_watch, args=(weakref.ref(self), connection), daemon=True).start()
        if rehold and self._wanted is not None:
            message = self._wanted
            reply, _ = self._talk(connection, message)
            if "segments" in reply:
                self._granted(message, reply)
            else:
                _logger.warning("not held again: %s", reply)
        return connection

    def _disconnect(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # ends the thread that watches it
            self._socket.close()
            self._socket = None

    def _after_fork(self) -> None:
        """In a forked child: the connection is the parent's, and a lock may be one that nobody will ever release."""
        if self._socket is not None:
            self._socket.close()
        self._reset()

    def _hung_up(self, connection: socket.socket) -> None:
        """The fetcher has died: what was held is held again at once, before the next one evicts it."""
        with self._lock:
            if self._socket is connection:
                self._disconnect()
                if self._wanted is not None:
                    try:
                        self._connect(rehold=True)
                    except Exception as error:  # the next call tries again, and tells
                        _logger.warning("no new fetcher yet: %s", error)


_caches: weakref.WeakSet[ShardCache] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for cache in list(_caches):
        cache._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _watch(cache: weakref.ref[ShardCache], connection: socket.socket) -> None:
    """Waits for the end of a connection, in a thread of its own."""
    poll = select.poll()
    try:
        poll.register(connection, 0)  # hang-ups and errors are told unasked
        poll.poll()
    except (OSError, ValueError):
        return  # closed already
    owner = cache()
    if owner is not None:
        owner._hung_up(connection)


def _receive(connection: socket.socket, length: int) -> bytes:
    """Raises EOFError when the connection ends before so many bytes."""
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError("it ended")
        parts += part
    return bytes(parts)


# ---- the election: whoever gets the folder's lock starts the fetcher and hands the lock to it


def _dial_or_start(storage: StorageConfig, linger_seconds: float) -> socket.socket:
    """A connection to the fetcher of this storage. Raises StorageError when there is none and none starts."""
    folder = cache_folder(storage)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: no cache can be made there ({error}); see data.storage.cache_directory"
        ) from None
    deadline = time.monotonic() + _START_SECONDS
    started: subprocess.Popen[bytes] | None = None
    while True:
        connection = _dial(folder)
        if connection is not None:
            return connection
        if started is not None and (started.poll() or 0) > 0:  # killed or ended for want of clients: start another
            errors = (folder / "fetcher.err").read_text(errors="replace").strip()
            raise StorageError(
                f"the node's fetcher did not start: {errors[-500:] or f'exit code {started.returncode}'}"
            )
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            started = _start(storage, folder, lock, linger_seconds)
        except BlockingIOError:
            pass  # it lives, or is just being started
        finally:
            os.close(lock)
        if time.monotonic() > deadline:
            raise StorageError(
                f"{folder}: its fetcher cannot be reached: {_owner(folder) or 'it has not come up'}; "
                f"see {folder / 'fetcher.log'}"
            )
        time.sleep(0.02)


def _owner(folder: Path) -> dict[str, Any]:
    """Process, host and socket of the folder's fetcher, as it says itself; {} when there is none."""
    try:
        return dict(json.loads((folder / "owner.json").read_text()))
    except (OSError, ValueError):
        return {}


def _dial(folder: Path) -> socket.socket | None:
    owner = _owner(folder)
    if not owner:
        return None
    if owner["host"] != socket.gethostname():
        try:  # an owner that has died leaves its words behind, but no lock
            with open(folder / "lock", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            raise StorageError(
                f"{folder}: is the cache of a fetcher on {owner['host']}; give data.storage.cache_directory a folder "
                "on a local disk of each machine"
            ) from None
    path = Path(owner["socket"])
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _check_private(path.parent)
        connection.settimeout(_DEAF_SECONDS)
        connection.connect(str(path))
        # One that is just ending accepts, too: only an answer shows that it serves.
        connection.sendall(LENGTH.pack(len(b'{"op": "hello"}')) + b'{"op": "hello"}')
        (length,) = LENGTH.unpack(_receive(connection, LENGTH.size))
        _receive(connection, length)
        return connection
    except TimeoutError:
        connection.close()
        raise StorageError(f"the node's fetcher (process {owner['pid']}) does not answer") from None
    except (OSError, EOFError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise


def _start(storage: StorageConfig, folder: Path, lock: int, linger_seconds: float) -> subprocess.Popen[bytes]:
    """A fresh interpreter (s3fs hangs in forked children) in a session of its own, which outlives this process."""
    _children[:] = [child for child in _children if child.poll() is None]
    address = private_directory() / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.sock"
    if len(os.fsencode(address)) > 100:
        raise StorageError(f"{address}: too long for a socket's name; set TMPDIR to a folder with a shorter path")
    # The same modules as here, wherever they were found (Ray's working_dir, a checkout).
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    arguments = ["--folder", str(folder), "--socket", str(address), "--linger-seconds", str(linger_seconds)]
    with open(folder / "fetcher.err", "wb") as errors:
        child = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "symile_dist.data.fetcher",
                *arguments,
                "--storage",
                storage.model_dump_json(),
            ],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            start_new_session=True,
            pass_fds=(lock,),
            env=environment,
        )
    _children.append(child)
    return child
