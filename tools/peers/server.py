"""A local S3 server (moto) behind a proxy that counts what it sends."""

from __future__ import annotations

import asyncio
import http.client
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HOST = "127.0.0.1"
BUCKET = "benchmark"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}


class CountingProxy:
    """Passes TCP on to a port of this machine, and counts the bytes that come back."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.received = 0
        """Bytes from the server, headers included."""
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._connect, HOST, 0))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection(HOST, self.target)
        except OSError:
            writer.close()
            return
        with suppress(asyncio.CancelledError):  # the end, which asyncio would complain of
            await asyncio.gather(self._pass_on(reader, to_server, False), self._pass_on(from_server, writer, True))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: bool) -> None:
        try:
            while data := await reader.read(2**18):
                if count:
                    self.received += len(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _put(port: int, path: str, body: bytes = b"") -> None:
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    connection.request("PUT", path, body, {"x-amz-acl": "public-read"})  # curl signs nothing
    answer = connection.getresponse()
    answer.read()
    connection.close()
    if answer.status != 200:
        raise OSError(f"the S3 server answered {answer.status} {answer.reason} to PUT {path}")


def _wait_for(port: int, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                raise OSError(f"moto's server did not start on port {port}") from None
            time.sleep(0.1)


@contextmanager
def s3_server(python: Path, folders: dict[str, Path]) -> Iterator[CountingProxy]:
    """Serves the files of folders as s3://benchmark/NAME/..., through the proxy that is yielded."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    command = [str(python), "-m", "moto.server", "-H", HOST, "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        _put(port, f"/{BUCKET}")
        for name, folder in folders.items():
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                _put(port, f"/{BUCKET}/{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        proxy = CountingProxy(port)
        try:
            yield proxy
        finally:
            proxy.close()
    finally:
        process.terminate()
        process.wait()
