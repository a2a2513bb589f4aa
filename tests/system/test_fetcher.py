"""The node's fetcher and its clients, as real processes, over HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import itertools
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from symile_dist.config import StorageConfig
from symile_dist.data import cache as cache_module
from symile_dist.data.cache import Piece, ShardCache, cache_folder
from symile_dist.errors import StorageError
from tests.s3 import FAULTS, SECRET, Bucket, FaultProxy, at_random

KB = 1000
BUDGET = 1024**2
"""The least that data.storage.cache_bytes may be."""


class Node:
    """What one node has: a cache folder, and clients that this process makes."""

    def __init__(self, bucket: Bucket, folder: Path) -> None:
        self.bucket = bucket
        self.folder = folder
        self._clients: list[ShardCache] = []

    def storage(self, endpoint: str, **options: Any) -> StorageConfig:
        return self.bucket.storage(self.folder, endpoint_url=endpoint, request_bytes=64 * 1024, **options)

    def client(self, storage: StorageConfig, linger_seconds: float = 5.0) -> ShardCache:
        self._clients.append(ShardCache(storage, linger_seconds))
        return self._clients[-1]

    def kill_fetchers(self) -> None:
        for owner in self.folder.glob("*/owner.json"):
            pid = cache_module._owner(owner.parent)["pid"]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        for client in self._clients:
            client.close()
        self.kill_fetchers()


@pytest.fixture
def node(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    sockets = tempfile.mkdtemp()  # a socket's name must be short; pytest's folders have long ones
    monkeypatch.setenv("TMPDIR", sockets)
    monkeypatch.setattr(tempfile, "tempdir", sockets)
    node = Node(bucket, tmp_path / "cache")
    yield node
    node.end()
    shutil.rmtree(sockets)


def content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def held(cache: ShardCache, url: str) -> bytes:
    """What a client reads of a url, segments joined."""
    segments = cache.segments(url)
    assert all(one.end == other.start for one, other in itertools.pairwise(segments))
    return b"".join(Path(segment.path).read_bytes() for segment in segments)


def fetcher_pid(storage: StorageConfig) -> int:
    return int(cache_module._owner(cache_folder(storage))["pid"])


def living(pid: int) -> bool:
    """Neither gone nor a zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def files(storage: StorageConfig, pattern: str = "*-*-*") -> list[Path]:
    return list(cache_folder(storage).glob(pattern))


class Client:
    """A client in a process of its own."""

    def __init__(self, storage: StorageConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self.process = context.Process(target=_client, args=(ShardCache(storage), other), daemon=True)
        self.process.start()
        other.close()

    def ask(self, *question: Any) -> None:
        self._pipe.send(question)

    def answer(self) -> Any:
        assert self._pipe.poll(30), "no answer"
        return self._pipe.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()


def _client(cache: ShardCache, pipe: Connection) -> None:
    while True:
        what, *arguments = pipe.recv()
        if what == "hold":
            pieces: Sequence[Piece] = arguments[0]
            failures = cache.hold(pieces)
            pipe.send((failures, [hashlib.sha256(held(cache, piece.url)).hexdigest() for piece in pieces]))
        elif what == "modules":
            pipe.send(sorted({"s3fs", "fsspec", "botocore", "aiohttp", "torch"} & set(sys.modules)))


@pytest.fixture
def clients() -> Iterator[Callable[[StorageConfig], Client]]:
    made: list[Client] = []

    def make(storage: StorageConfig) -> Client:
        made.append(Client(storage))
        return made[-1]

    yield make
    for client in made:
        client.end()


class TestFetching:
    def test_pieces_are_identical_and_only_what_is_missing_is_fetched(self, node: Node, proxy: FaultProxy) -> None:
        data = content("a", 1_500 * KB)
        url = node.bucket.put("a.tar", data)
        cache = node.client(node.storage(proxy.url, connections=4))
        assert cache.hold([Piece(url, 300 * KB, 900 * KB)]) == {}
        assert held(cache, url) == data[300 * KB : 900 * KB]
        # Two pieces around and across what is there.
        assert cache.hold([Piece(url, 100 * KB, 400 * KB), Piece(url, 800 * KB, 1_200 * KB)]) == {}
        assert held(cache, url) == data[100 * KB : 1_200 * KB]
        assert proxy.body_bytes == 1_100 * KB
        counters = cache.counters()
        assert counters["bytes_fetched"] == counters["bytes_cached"] == 1_100 * KB
        assert counters["requests"] == len(proxy.requests)
        assert counters["retries"] == counters["failures"] == counters["evictions"] == 0
        assert proxy.most_at_once <= 4
        # By ranges of storage.request_bytes, never more.
        for _, _, span in proxy.requests:
            first, _, last = span.removeprefix("bytes=").partition("-")
            assert int(last) - int(first) < 64 * 1024

    def test_whole_files(self, node: Node, proxy: FaultProxy) -> None:
        small, large = b'{"a": 1}', content("large", 3 * 64 * 1024)  # its end is the end of a range
        small_url, large_url = node.bucket.put("small", small), node.bucket.put("large", large)
        cache = node.client(node.storage(proxy.url))
        assert cache.read(small_url) == small
        assert len(proxy.requests) == 1
        assert cache.read(large_url) == large
        asked = len(proxy.requests)
        assert cache.read(small_url) == small and cache.read(large_url) == large
        assert len(proxy.requests) == asked
        node.bucket.put("small", b"replaced")
        assert cache.read(small_url) == small
        assert cache.read(small_url, fresh=True) == b"replaced" == cache.read(small_url)
        assert cache.read(node.bucket.put("empty", b"")) == b""
        with pytest.raises(FileNotFoundError, match=f"{node.bucket.url}/none: no such file"):
            cache.read(f"{node.bucket.url}/none")

    def test_what_is_wanted_now_goes_before_what_is_wanted_soon(self, node: Node, proxy: FaultProxy) -> None:
        now, soon = (node.bucket.put(name, content(name, 640 * KB)) for name in ("now", "soon"))
        storage = node.storage(proxy.url, connections=1)
        cache, other = node.client(storage), node.client(storage)
        asked, released = threading.Event(), threading.Event()

        def first_waits(number: int, method: str, path: str) -> None:
            if not asked.is_set():
                asked.set()
                released.wait(20)

        proxy.fault = first_waits
        cache.hold([], [Piece(soon, 0, 640 * KB)])
        assert asked.wait(20)
        waiting = threading.Thread(target=other.hold, args=([Piece(now, 0, 640 * KB)],))
        waiting.start()
        wait_until(lambda: len(files(storage, "*.tmp")) == 2)  # the fetcher knows of both
        released.set()
        waiting.join(20)
        names = [path.rpartition("/")[2] for _, path, _ in proxy.requests]
        assert names[:11] == ["soon", *["now"] * 10]  # one was under way
        wait_until(lambda: cache.counters()["bytes_cached"] == 1_280 * KB)

    def test_forgotten_bytes_are_fetched_again(self, node: Node) -> None:
        data = content("rot", 200 * KB)
        url = node.bucket.put("rot.tar", data)
        storage = node.storage(node.bucket.endpoint)
        cache, other = node.client(storage), node.client(storage)
        for one in (cache, other):
            one.hold([Piece(url, 0, 200 * KB)])
        path = Path(cache.segments(url)[0].path)
        path.write_bytes(bytes(200 * KB))
        cache.forget(url)
        assert path.exists()  # the other one may be reading it
        assert cache.hold([Piece(url, 0, 200 * KB)]) == {}
        assert held(cache, url) == held(other, url) == data
        assert cache.counters()["bytes_fetched"] == 400 * KB
        assert cache.counters()["bytes_cached"] == 200 * KB
        other.hold([])
        assert path.read_bytes() == data


class TestProcesses:
    def test_clients_share_one_fetcher(
        self, node: Node, proxy: FaultProxy, clients: Callable[[StorageConfig], Client]
    ) -> None:
        names = [f"shared-{number}" for number in range(4)]
        data = {name: content(name, 300 * KB) for name in names}
        pieces = [Piece(node.bucket.put(name, data[name]), 0, 300 * KB) for name in names]
        storage = node.storage(proxy.url)
        started = [clients(storage) for _ in range(3)]
        for client in started:
            client.ask("hold", pieces)
        digests = [hashlib.sha256(data[name]).hexdigest() for name in names]
        assert [client.answer() for client in started] == [({}, digests)] * 3
        assert proxy.body_bytes == 1_200 * KB
        assert node.client(storage).counters()["bytes_fetched"] == 1_200 * KB
        started[0].ask("modules")
        assert started[0].answer() == []  # clients know nothing of object stores

    def test_a_killed_client_holds_nothing(self, node: Node, clients: Callable[[StorageConfig], Client]) -> None:
        first, second = (Piece(node.bucket.put(n, content(n, 900 * KB)), 0, 900 * KB) for n in ("one", "two"))
        storage = node.storage(node.bucket.endpoint, cache_bytes=BUDGET)
        client = clients(storage)
        client.ask("hold", [first])
        assert client.answer()[0] == {}
        client.process.kill()
        assert node.client(storage).hold([second]) == {}

    def test_kill_9_of_the_fetcher_in_mid_download(self, node: Node, proxy: FaultProxy) -> None:
        data = content("mid", 1_000 * KB)
        url, kept_url = node.bucket.put("mid", data), node.bucket.put("kept", data)
        storage = node.storage(proxy.url, cache_bytes=2 * 1024**2, give_up_seconds=2.0)
        cache, other = node.client(storage), node.client(storage)
        other.hold([Piece(kept_url, 0, 500 * KB)])
        killed = fetcher_pid(storage)
        before = len(proxy.requests)
        proxy.fault = lambda number, method, path: "hang" if number >= before + 5 else None
        failures: list[dict[Piece, str]] = []
        thread = threading.Thread(target=lambda: failures.append(cache.hold([Piece(url, 0, 1_000 * KB)])))
        thread.start()
        wait_until(lambda: proxy.injected["hang"] and files(storage, "*.tmp"))
        os.kill(killed, signal.SIGKILL)
        proxy.fault = lambda number, method, path: None
        thread.join(20)
        assert failures == [{}] and held(cache, url) == data
        assert fetcher_pid(storage) != killed
        assert not files(storage, "*.tmp")
        # The other client's files are held by the new fetcher, too, though it has asked for nothing.
        wait_until(lambda: cache.counters()["bytes_fetched"] == 1_000 * KB)
        last = node.bucket.put("last", data)
        with pytest.raises(ValueError, match=r"data\.storage\.cache_bytes"):
            cache.hold([Piece(url, 0, 1_000 * KB), Piece(last, 0, 1_000 * KB)])
        assert held(other, kept_url) == data[: 500 * KB]

    def test_many_kills_go_unseen(self, node: Node) -> None:
        pieces = [Piece(node.bucket.put(n, content(n, 150 * KB)), 0, 150 * KB) for n in ("k0", "k1", "k2")]
        storage = node.storage(node.bucket.endpoint)
        cache = node.client(storage)
        for number, piece in enumerate(pieces):
            assert cache.hold([piece]) == {}
            os.kill(fetcher_pid(storage), signal.SIGKILL)
            assert held(cache, piece.url) == content(f"k{number}", 150 * KB)

    def test_a_restart_finds_the_cache(self, node: Node, proxy: FaultProxy) -> None:
        data = content("again", 400 * KB)
        url = node.bucket.put("again", data)
        storage = node.storage(proxy.url)
        first = node.client(storage)
        first.hold([Piece(url, 100 * KB, 300 * KB)])
        first.read(url)
        first.close()
        node.kill_fetchers()
        wrong = cache_folder(storage) / f"{'0' * 32}-0-100"
        wrong.write_bytes(b"short")
        wrong.with_suffix(".tmp").write_bytes(b"half")
        asked = len(proxy.requests)
        cache = node.client(storage)
        assert cache.hold([Piece(url, 150 * KB, 250 * KB)]) == {}
        assert cache.segments(url)[0][:2] == (100 * KB, 300 * KB)
        assert cache.read(url) == data
        assert len(proxy.requests) == asked
        assert not files(storage, f"{'0' * 32}*")

    def test_it_ends_without_clients_and_begins_again(self, node: Node) -> None:
        storage = node.storage(node.bucket.endpoint)
        cache = node.client(storage, linger_seconds=0.3)
        cache.counters()
        first = fetcher_pid(storage)
        assert os.getsid(first) == first  # outlives the session of whoever started it
        cache.close()
        wait_until(lambda: not files(storage, "owner.json"))
        assert cache.counters()["requests"] == 0
        assert fetcher_pid(storage) != first

    def test_copies_make_their_own_connection(self, node: Node) -> None:
        url = node.bucket.put("copy", content("copy", 100 * KB))
        cache = node.client(node.storage(node.bucket.endpoint, cache_bytes=BUDGET))
        cache.hold([Piece(url, 0, 100 * KB)])
        copy = pickle.loads(pickle.dumps(cache))
        assert copy.segments(url) == [] and copy.counters()["bytes_cached"] == 100 * KB
        copy.close()
        child = os.fork()
        if child == 0:  # what it does must not touch the parent's connection
            fine = cache.segments(url) == [] and cache.counters()["bytes_cached"] == 100 * KB
            os._exit(0 if fine else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert held(cache, url) == content("copy", 100 * KB)
        assert cache.counters()["bytes_cached"] == 100 * KB

    def test_a_fetcher_that_hangs_is_told(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache_module, "_DEAF_SECONDS", 0.5)
        storage = node.storage(node.bucket.endpoint)
        cache = node.client(storage)
        cache.counters()
        os.kill(fetcher_pid(storage), signal.SIGSTOP)
        with pytest.raises(StorageError, match=r"has said nothing for 0\.5 s"):
            cache.counters()

    def test_one_that_cannot_start_says_why(self, node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        broken = tmp_path / "python"
        broken.write_text("#!/bin/sh\necho 'no such module' >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(broken))
        with pytest.raises(StorageError, match="did not start: no such module"):
            node.client(node.storage(node.bucket.endpoint)).counters()

    def test_sockets_only_in_a_private_folder(self, node: Node) -> None:
        folder = Path(tempfile.gettempdir()) / f"symile-dist-{os.getuid()}"
        folder.mkdir(mode=0o755)
        with pytest.raises(StorageError, match="nobody else may enter"):
            node.client(node.storage(node.bucket.endpoint)).counters()

    def test_secrets_stand_nowhere(self, node: Node, proxy: FaultProxy) -> None:
        url = node.bucket.put("plain", b"x" * 1000)
        storage = node.storage(proxy.url, give_up_seconds=0.5)
        cache = node.client(storage)
        proxy.fault = at_random(1, 0.5, ("503",))
        cache.hold([Piece(url, 0, 1000), Piece(f"{node.bucket.url}/none", 0, 5)])
        cache.hold([Piece("http://127.0.0.1:9/file?X-Amz-Signature=abcdef", 0, 5)])
        secrets = [os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"], "abcdef"]
        assert "SYMILE_TEST_S3_ENDPOINT" in os.environ or secrets[0] == SECRET
        arguments = Path(f"/proc/{fetcher_pid(storage)}/cmdline").read_bytes()
        texts = [path.read_bytes() for path in cache_folder(storage).iterdir()]
        log = (cache_folder(storage) / "fetcher.log").read_text()
        assert "no answer from http://127.0.0.1:9" in log
        for secret in secrets:
            assert all(secret.encode() not in text for text in (arguments, *texts))

    def test_two_endpoints_do_not_mix(self, node: Node, proxy: FaultProxy) -> None:
        url = node.bucket.put("same", content("same", 600 * KB))
        one, two = (node.storage(e, cache_bytes=BUDGET) for e in (node.bucket.endpoint, proxy.url))
        first, second = node.client(one), node.client(two)
        first.hold([Piece(url, 0, 600 * KB)])
        second.hold([Piece(url, 0, 600 * KB)])
        assert fetcher_pid(one) != fetcher_pid(two)
        assert proxy.body_bytes == 600 * KB
        # What a fetcher that has ended leaves behind counts, and goes first where it was used first.
        pids = [fetcher_pid(one), fetcher_pid(two)]
        first.close()
        second.close()
        node.kill_fetchers()
        wait_until(lambda: not any(living(pid) for pid in pids))
        for path in files(one):
            os.utime(path, (0, 0))  # else the one counts as older whose fetcher has seen its client go last
        second = node.client(two)
        second.hold([Piece(url, 0, 600 * KB)])
        assert second.counters()["bytes_fetched"] == 0
        assert files(two) and not files(one)
        assert second.counters()["evictions"] == 1


class TestBudget:
    def put(self, node: Node, *names: str, size: int = 300 * KB) -> list[Piece]:
        return [Piece(node.bucket.put(name, content(name, size)), 0, size) for name in names]

    def test_it_is_never_exceeded(self, node: Node, proxy: FaultProxy) -> None:
        pieces = self.put(node, *(f"b{number}" for number in range(12)), size=200 * KB)
        storage = node.storage(proxy.url, cache_bytes=BUDGET, timeout_seconds=0.5)
        proxy.fault = at_random(5, 0.03)
        most = 0
        done = threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.is_set():
                size = 0
                for path in files(storage):
                    with contextlib.suppress(FileNotFoundError):
                        size += path.stat().st_size
                most = max(most, size)

        watcher = threading.Thread(target=watch)
        watcher.start()
        clients = [node.client(storage) for _ in range(2)]
        for number, piece in enumerate(pieces):
            assert clients[number % 2].hold([piece], pieces[number + 1 :]) == {}
            assert held(clients[number % 2], piece.url) == content(f"b{number}", 200 * KB)
        evictions = clients[0].counters()["evictions"]
        done.set()
        watcher.join()
        assert 800 * KB <= most <= BUDGET
        assert evictions >= 7

    def test_the_least_recently_used_goes_first(self, node: Node) -> None:
        a, b, c, d, e = self.put(node, "a", "b", "c", "d", "e")
        storage = node.storage(node.bucket.endpoint, cache_bytes=BUDGET)
        cache, other = node.client(storage), node.client(storage)
        paths = {}
        for piece in (a, b, c, a):
            cache.hold([piece])
            paths[piece] = Path(cache.segments(piece.url)[0].path)
        cache.hold([d])
        assert [paths[piece].exists() for piece in (a, b, c)] == [True, False, True]
        # What somebody wants soon stays, though it is older.
        other.hold([], [c])
        cache.hold([e])
        assert [paths[piece].exists() for piece in (a, b, c)] == [False, False, True]
        # What is held stays in any case, and what is wanted soon goes for what is wanted now.
        cache.hold([e, b])
        assert cache.counters()["evictions"] == 3
        cache.hold([e, b, a])
        assert not paths[c].exists()

    def test_back_pressure(self, node: Node, proxy: FaultProxy) -> None:
        pieces = self.put(node, *(f"p{number}" for number in range(8)), size=200 * KB)
        cache = node.client(node.storage(proxy.url, cache_bytes=BUDGET))
        cache.hold(pieces[:1], pieces[1:])
        wait_until(lambda: cache.counters()["bytes_cached"] == 1_000 * KB)
        for _ in range(20):  # nothing more is begun, and nothing goes for it
            assert cache.counters()["bytes_fetched"] == 1_000 * KB
        assert cache.counters()["evictions"] == 0
        cache.hold(pieces[2:3], pieces[3:])  # two are free now
        wait_until(lambda: cache.counters()["bytes_fetched"] == 1_400 * KB)
        assert cache.counters()["evictions"] == 2
        assert [held(cache, piece.url) for piece in pieces[2:3]] == [content("p2", 200 * KB)]

    def test_too_much_at_once_is_told(self, node: Node) -> None:
        pieces = self.put(node, "t0", "t1", "t2", "t3")
        cache = node.client(node.storage(node.bucket.endpoint, cache_bytes=BUDGET))
        with pytest.raises(ValueError, match=r"data\.storage\.cache_bytes = 1048576 .* 1200000 bytes at once"):
            cache.hold(pieces)
        assert cache.hold(pieces[:3]) == {}

    def test_clients_that_wait_for_each_other_are_told(self, node: Node) -> None:
        pieces = [*self.put(node, "w0", "w1", size=500 * KB), *self.put(node, "w2", "w3", size=250 * KB)]
        storage = node.storage(node.bucket.endpoint, cache_bytes=BUDGET)
        one, two = node.client(storage), node.client(storage)
        one.hold(pieces[:1])
        two.hold(pieces[1:2])
        outcomes: list[Any] = []

        def more(cache: ShardCache, *wanted: Piece) -> None:
            try:
                outcomes.append(cache.hold(wanted))
            except ValueError as error:
                outcomes.append(str(error))

        threads = [
            threading.Thread(target=more, args=(one, pieces[0], pieces[2])),
            threading.Thread(target=more, args=(two, pieces[1], pieces[3])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        # One of them is told, and what it held lets the other go on.
        words = [outcome for outcome in outcomes if outcome != {}]
        assert len(outcomes) == 2 and len(words) == 1
        assert "data.storage.cache_bytes" in words[0] and "1500000 bytes at once" in words[0]

    def test_waiting_for_one_that_keeps_all_ends(self, node: Node) -> None:
        first, second = self.put(node, "x0", "x1", size=600 * KB)
        storage = node.storage(node.bucket.endpoint, cache_bytes=BUDGET, give_up_seconds=0.5)
        node_keeps, waits = node.client(storage), node.client(storage)
        node_keeps.hold([first])
        began = time.monotonic()
        with pytest.raises(ValueError, match="1200000 bytes at once"):
            waits.hold([second])
        assert 0.4 < time.monotonic() - began < 5

    def test_waiting_for_one_that_lets_go(self, node: Node) -> None:
        first, second = self.put(node, "y0", "y1", size=600 * KB)
        storage = node.storage(node.bucket.endpoint, cache_bytes=BUDGET)
        keeps, waits = node.client(storage), node.client(storage)
        keeps.hold([first])
        outcomes: list[Any] = []
        thread = threading.Thread(target=lambda: outcomes.append(waits.hold([second])))
        thread.start()
        keeps.hold([])
        thread.join(20)
        assert outcomes == [{}]

    def test_a_full_disk(self, node: Node) -> None:
        node.folder.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(node.folder)], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("no small disk can be mounted here")
        try:
            pieces = self.put(node, *(f"f{number}" for number in range(6)), size=400 * KB)
            cache = node.client(node.storage(node.bucket.endpoint))
            for piece in pieces:  # what nobody holds makes room
                assert cache.hold([piece]) == {}
            assert cache.counters()["evictions"] >= 1
            with pytest.raises(StorageError, match=r"the disk is full.*cache_directory"):
                cache.hold(pieces)
            (node.folder / "other").write_bytes(bytes(node.folder.stat().st_blksize * 10))
            assert cache.hold(pieces[:1]) == {}
        finally:
            node.end()
            subprocess.run(["umount", "-l", str(node.folder)], check=True)


class TestFaults:
    @pytest.mark.parametrize("seed", [3, 4])
    def test_faults_of_every_kind_change_no_byte(self, node: Node, proxy: FaultProxy, seed: int) -> None:
        data = content("f", 4_000 * KB)
        url = node.bucket.put("faulty", data)
        cache = node.client(node.storage(proxy.url, timeout_seconds=1.0))
        proxy.fault = at_random(seed, 0.05)
        assert cache.hold([Piece(url, 0, 4_000 * KB)]) == {}
        assert held(cache, url) == data
        assert all(proxy.injected[fault] for fault in FAULTS)
        counters = cache.counters()
        assert counters["retries"] > 0 and counters["failures"] == 0
        assert counters["bytes_fetched"] == 4_000 * KB

    def test_one_fault_costs_one_request(self, node: Node, proxy: FaultProxy) -> None:
        cache = node.client(node.storage(proxy.url, timeout_seconds=2.0))
        for number, fault in enumerate(FAULTS):
            url = node.bucket.put(f"one-{fault}", content(fault, 10 * KB))
            proxy.fault = lambda n, method, path, number=number, fault=fault: fault if n == 2 * number else None  # type: ignore[misc]
            assert cache.hold([Piece(url, 0, 10 * KB)]) == {}
            assert held(cache, url) == content(fault, 10 * KB)
            assert proxy.injected[fault] == 1
            assert len(proxy.requests) == 2 * (number + 1)

    @pytest.mark.parametrize("how", ["closed", "silent", "unknown", "503", "cut"])
    def test_an_endpoint_that_stays_dead(self, node: Node, proxy: FaultProxy, how: str) -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(64)
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            if how == "closed":
                listening.close()
            elif how == "unknown":
                address = "http://nowhere.invalid"
            elif how != "silent":
                address = proxy.url
                proxy.fault = lambda number, method, path: how
            url = node.bucket.put("dead", content("dead", 300 * KB))
            storage = node.storage(address, timeout_seconds=0.5, give_up_seconds=1.5, connections=4)
            cache = node.client(storage)
            cache.counters()
            pieces = [Piece(url, start, start + 10 * KB) for start in range(0, 300 * KB, 10 * KB)]
            began = time.monotonic()
            failures = cache.hold(pieces)
            assert 1.3 < time.monotonic() - began < 1.5 + 0.5 + 2
            assert len(failures) == 30
            for words in failures.values():
                assert words.startswith(f"{url}: no answer from {address} for 1.5 s; last: ")
            # Others are told at once: they do not give up after 1.5 s of their own.
            began = time.monotonic()
            assert node.client(storage).hold(pieces) == failures
            assert time.monotonic() - began < 1.3

    def test_a_read_of_a_dead_endpoint(self, node: Node, proxy: FaultProxy) -> None:
        proxy.fault = lambda number, method, path: "reset"
        cache = node.client(node.storage(proxy.url, give_up_seconds=0.5))
        for _ in range(2):
            with pytest.raises(StorageError, match=r"none: no answer from .* for 0\.5 s; last: "):
                cache.read(f"{node.bucket.url}/none")

    def test_an_endpoint_that_comes_back(self, node: Node, proxy: FaultProxy) -> None:
        data = content("back", 100 * KB)
        url = node.bucket.put("back", data)
        cache = node.client(node.storage(proxy.url, give_up_seconds=0.5))
        proxy.fault = lambda number, method, path: "503"
        assert list(cache.hold([Piece(url, 0, 100 * KB)])) == [Piece(url, 0, 100 * KB)]
        proxy.fault = lambda number, method, path: None
        wait_until(lambda: not cache.hold([Piece(url, 0, 100 * KB)]))
        assert held(cache, url) == data

    def test_one_bad_file_does_not_stop_the_others(self, node: Node, proxy: FaultProxy) -> None:
        good, bad = (node.bucket.put(name, content(name, 500 * KB)) for name in ("good", "bad"))
        cache = node.client(node.storage(proxy.url, connections=2, give_up_seconds=1.0))
        proxy.fault = lambda number, method, path: "503" if path.endswith("bad") else None
        failures = cache.hold([Piece(bad, 0, 500 * KB), Piece(good, 0, 500 * KB)])
        assert list(failures) == [Piece(bad, 0, 500 * KB)]
        assert held(cache, good) == content("good", 500 * KB)
        assert cache.segments(bad) == []
        assert cache.counters()["failures"] == 1

    def test_what_cannot_succeed_fails_at_once(self, node: Node) -> None:
        url = node.bucket.put("short", content("short", 100 * KB))
        cache = node.client(node.storage(node.bucket.endpoint))
        missing = Piece(f"{node.bucket.url}/missing", 0, 100)
        cut, beyond = Piece(url, 90 * KB, 110 * KB), Piece(url, 200 * KB, 300 * KB)
        other = Piece("nonsense://bucket/file", 0, 100)
        began = time.monotonic()
        failures = cache.hold([missing, cut, beyond, other], [missing])
        assert time.monotonic() - began < 5
        assert failures[missing] == f"{missing.url}: no such file or folder"
        assert failures[cut] == f"{url}: ends after 100000 bytes, 110000 were expected"
        assert re.fullmatch(rf"{url}: ends before byte (200000|265536), which was expected", failures[beyond])
        assert "nonsense" in failures[other]

    def test_no_credentials(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        url = node.bucket.put("open", b"x" * 100)
        words = node.client(node.storage(node.bucket.endpoint)).hold([Piece(url, 0, 100)])
        assert "access is denied (NoCredentialsError" in words[Piece(url, 0, 100)]
        assert "AWS_PROFILE" in words[Piece(url, 0, 100)]


class _Plain(http.server.BaseHTTPRequestHandler):
    """A server without ranges."""

    def do_GET(self) -> None:
        body = b"0123456789"
        self.send_response(200 if self.path == "/file" else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def test_other_schemes(node: Node) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Plain)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_address[1]}"
        cache = node.client(node.storage(node.bucket.endpoint))
        assert cache.read(f"{base}/file") == b"0123456789"
        failures = cache.hold([Piece(f"{base}/file", 2, 5), Piece(f"{base}/other", 2, 5)])
        assert "ignores ranges" in failures[Piece(f"{base}/file", 2, 5)]
        assert "access is denied" in failures[Piece(f"{base}/other", 2, 5)]
    finally:
        server.shutdown()
        server.server_close()
