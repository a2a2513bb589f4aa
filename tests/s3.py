"""An object store for tests (moto's server, or a real one), and a proxy before it that injects faults.

With SYMILE_TEST_S3_ENDPOINT in the environment, beside the usual AWS variables, the tests use that service.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from symile_dist.config import StorageConfig

SECRET = "not-a-real-secret-key"
"""AWS_SECRET_ACCESS_KEY in tests with moto: to be looked for where it must not stand."""

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # ends with the process that started it, however that ends
"""


@contextlib.contextmanager
def aws_environment(**values: str) -> Iterator[None]:
    """The usual variables with made-up keys, and nothing of this machine's own configuration."""
    made_up = {
        "AWS_ACCESS_KEY_ID": "TESTACCESSKEYID",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    if "SYMILE_TEST_S3_ENDPOINT" not in os.environ:
        for name in before:
            del os.environ[name]
        os.environ.update(made_up)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(before)


@dataclass
class Bucket:
    """A bucket of its own."""

    endpoint: str
    name: str
    client: Any

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def put(self, key: str, content: bytes) -> str:
        """Its URL."""
        self.client.put_object(Bucket=self.name, Key=key, Body=content)
        return f"{self.url}/{key}"

    def upload(self, folder: Path, prefix: str) -> str:
        """The URL of the uploaded folder."""
        for path in sorted(folder.iterdir()):
            if path.is_file():
                self.put(f"{prefix}/{path.name}", path.read_bytes())
        return f"{self.url}/{prefix}"

    def storage(self, cache: Path, **options: Any) -> StorageConfig:
        """How it is reached, with the cache in that folder and little patience."""
        defaults = {"endpoint_url": self.endpoint, "timeout_seconds": 5.0, "give_up_seconds": 20.0}
        return StorageConfig(**{**defaults, "cache_directory": str(cache), **options})


@contextlib.contextmanager
def s3_endpoint() -> Iterator[str]:
    """The address of an object store, with the AWS environment set for it."""
    given = os.environ.get("SYMILE_TEST_S3_ENDPOINT")
    with aws_environment():
        if given:
            yield given
            return
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert server.stdin is not None and server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.stdin.close()
            server.kill()
            server.wait()
            server.stdout.close()


@contextlib.contextmanager
def new_bucket(endpoint: str) -> Iterator[Bucket]:
    """A fresh bucket; what was put into it is removed at the end."""
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint)
    bucket = Bucket(endpoint, f"symile-test-{uuid.uuid4().hex[:12]}", client)
    client.create_bucket(Bucket=bucket.name)
    try:
        yield bucket
    finally:
        while objects := client.list_objects_v2(Bucket=bucket.name).get("Contents"):
            keys = [{"Key": one["Key"]} for one in objects]
            client.delete_objects(Bucket=bucket.name, Delete={"Objects": keys})
        client.delete_bucket(Bucket=bucket.name)


FAULTS = ("503", "reset", "cut", "hang")
Fault = Callable[[int, str, str], str | None]
"""fault(number of the request, method, path) -> one of FAULTS, or None."""


def at_random(seed: int, rate: float, faults: tuple[str, ...] = FAULTS) -> Fault:
    """Each of the faults with this rate, by the number of the request."""

    def fault(number: int, method: str, path: str) -> str | None:
        draw = random.Random(seed * 1_000_003 + number).random()
        return faults[int(draw / rate)] if draw < rate * len(faults) else None

    return fault


class FaultProxy:
    """An HTTP proxy on loopback before an endpoint, in a thread of its own; one request per connection.

    `fault` may be changed while it runs. `503`: an answer with that status; `reset`: the connection is reset in place
    of an answer; `cut`: half of the body, and the end; `hang`: no answer, until the client gives up or the proxy ends.
    """

    def __init__(self, upstream: str, fault: Fault = lambda number, method, path: None) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self.fault = fault
        self.requests: list[tuple[str, str, str]] = []
        """(method, path, range) of each, in order."""
        self.body_bytes = 0
        """Of answers passed on, counted before they are: a client that has its answer finds it counted."""
        self.injected: Counter[str] = Counter()
        self._unanswered = 0
        self.most_at_once = 0
        """Requests that waited for their answers together."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *exception: object) -> None:
        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self._unanswered += 1
            self.most_at_once = max(self.most_at_once, self._unanswered)
            try:
                answer = await self._answer(reader, writer)
            finally:
                self._unanswered -= 1  # before the answer goes out: it may be followed by a request at once
            writer.write(answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        fault = self.fault(len(self.requests), method, path)
        self.requests.append((method, path, headers.get("range", "")))
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            lines = [line for line in lines if not line.lower().startswith("expect:")]
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if fault is not None:
            self.injected[fault] += 1
        if fault == "hang":
            await reader.read()  # until the client goes
            return b""
        if fault == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return b""
        if fault == "503":
            return b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        kept = [line for line in lines if not line.lower().startswith("connection:")]
        from_store, to_store = await asyncio.open_connection(*self._upstream)
        try:
            to_store.write("\r\n".join([first, *kept, "Connection: close", "", ""]).encode("latin-1") + body)
            await to_store.drain()
            answer = await from_store.read()
        finally:
            to_store.close()
        answer_head, _, content = answer.partition(b"\r\n\r\n")
        if fault == "cut":
            content = content[: len(content) // 2]
        self.body_bytes += len(content)
        return answer_head + b"\r\n\r\n" + content
