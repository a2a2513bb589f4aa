"""Files that are either whole or not there: atomic writes, checksums; folders on a disk or in an object store."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

from symile_dist.config import StorageConfig, local_path
from symile_dist.errors import StorageError

_logger = logging.getLogger(__name__)
T = TypeVar("T")


def sync_directory(directory: Path) -> None:
    """Makes the directory's entries durable (a rename is durable only when its directory is)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that is either whole or not there: temporary name, fsync, rename, fsync of the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises OSError when it cannot be read and ValueError, naming the file, when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileInfo(NamedTuple):
    """What a listing tells of a file."""

    size: int
    """bytes"""
    version: str
    """Changes with the file: an object store's etag, a disk's time of last change."""


class Folder:
    """The files of one folder, on a disk or at any URL that fsspec knows (`s3://bucket/prefix`, `memory://...`).

    For tools; the ranks of a run read remote data through the fetcher's cache. Object stores are reached as `storage`
    says, with the credentials of the usual AWS environment; what a store fails to answer is asked again for
    `storage.give_up_seconds`. Everything raises FileNotFoundError for what is not there and StorageError, naming the
    URL, for a store that fails.
    """

    def __init__(self, url: str | Path, storage: StorageConfig | None = None) -> None:
        """Raises ValueError for a URL that is none, or whose scheme is not to be used here (`pipe:`)."""
        self.path = local_path(str(url))
        """The folder, where it is local (or mounted); None for an object store."""
        self.url = str(url) if self.path is None else str(self.path)
        self.storage = storage or StorageConfig()

    @functools.cached_property
    def _fs(self) -> Any:
        # When first needed: a process that only names files imports no s3fs, which hangs in forked children.
        return remote_filesystem(self.url, self.storage)

    @property
    def _root(self) -> str:
        return str(self._fs._strip_protocol(self.url)).rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_fs"}

    def __truediv__(self, name: str) -> str:
        """The path or URL of a file in it, for messages."""
        return str(self.path / name) if self.path is not None else f"{self.url.rstrip('/')}/{name}"

    def list(self) -> dict[str, FileInfo]:
        """The files that stand in it, by name. One request per thousand of them at an object store."""
        if self.path is not None:
            if not self.path.is_dir():
                raise FileNotFoundError(f"{self.url}: no such folder")
            with os.scandir(self.path) as entries:
                return {
                    entry.name: FileInfo(entry.stat().st_size, str(entry.stat().st_mtime_ns))
                    for entry in entries
                    if entry.is_file()
                }
        found = self._ask(self.url, lambda: self._fs.ls(self._root, detail=True, refresh=True))
        return {
            entry["name"].rpartition("/")[2]: FileInfo(int(entry["size"]), str(entry.get("ETag") or "").strip('"'))
            for entry in found
            if entry["type"] == "file" and entry["name"].rstrip("/") != self._root
        }

    def info(self, name: str) -> FileInfo:
        if self.path is not None:
            status = (self.path / name).stat()
            return FileInfo(status.st_size, str(status.st_mtime_ns))
        entry = self._ask(self / name, lambda: self._fs.info(f"{self._root}/{name}", refresh=True))
        return FileInfo(int(entry["size"]), str(entry.get("ETag") or "").strip('"'))

    def read(self, name: str) -> bytes:
        if self.path is not None:
            return (self.path / name).read_bytes()
        return bytes(self._ask(self / name, lambda: self._fs.cat_file(f"{self._root}/{name}")))

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file: whole or not at all (a PUT is, and locally a rename)."""
        if self.path is not None:
            write_atomic(self.path / name, lambda file: file.write(content))
            return
        self._ask(self / name, lambda: self._fs.pipe_file(f"{self._root}/{name}", content))

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file unless there is one; False then. Of several writers at once one wins, on local disks and in
        stores that keep such promises (S3's If-None-Match)."""
        if self.path is not None:
            temporary = self.path / f".{name}.{os.getpid()}.{threading.get_ident()}.tmp"
            try:
                temporary.write_bytes(content)
                os.link(temporary, self.path / name)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            sync_directory(self.path)
            return True
        remote = f"{self._root}/{name}"
        conditional = self.url.partition("://")[0] in ("s3", "s3a")

        def attempt() -> bool:
            if not conditional and self._fs.exists(remote):
                return False
            try:
                self._fs.pipe_file(remote, content, **({"mode": "create"} if conditional else {}))
            except Exception as error:
                if is_refused(error):
                    return False
                raise
            return True

        return self._ask(self / name, attempt)

    def put(self, source: Path, name: str) -> None:
        """Copies a local file into it: whole or not at all."""
        if self.path is not None:
            with open(source, "rb") as file:
                write_atomic(self.path / name, lambda target: shutil.copyfileobj(file, target))
            return
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no such file")
        self._ask(self / name, lambda: self._fs.put_file(str(source), f"{self._root}/{name}"))

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        if self.path is not None:
            (self.path / name).unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            self._ask(self / name, lambda: self._fs.rm_file(f"{self._root}/{name}"))

    @contextlib.contextmanager
    def local_copy(self, name: str, scratch: Path) -> Iterator[Path]:
        """The file itself where it is local, else a copy below `scratch` that is removed at the end."""
        if self.path is not None:
            if not (self.path / name).is_file():
                raise FileNotFoundError(f"{self / name}: no such file or folder")
            yield self.path / name
            return
        url, remote, copy = self / name, f"{self._root}/{name}", scratch / name
        try:
            size = int(self._ask(url, lambda: self._fs.info(remote, refresh=True)["size"]))
            with open(copy, "wb") as file:
                # By ranges: what breaks off in the last bytes of a large shard costs one range.
                while file.tell() < size:
                    start = file.tell()
                    end = min(start + self.storage.request_bytes, size)
                    data = self._ask(url, lambda start=start, end=end: self._fs.cat_file(remote, start=start, end=end))  # type: ignore[misc]
                    if len(data) != end - start:
                        raise StorageError(f"{url}: {len(data)} bytes came for the bytes {start} to {end}")
                    file.write(data)
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def _ask(self, url: str, request: Callable[[], T]) -> T:
        """The request's result; raises what the class says, after `give_up_seconds` of answers that may yet change."""
        self._fs  # noqa: B018  (a ValueError of its making is no answer of a store)
        first_failed: float | None = None
        for tries in itertools.count():
            began = time.monotonic()
            try:
                return request()
            except Exception as error:  # aiohttp's and botocore's are neither OSError nor of one family
                kind = failure_kind(error)
                first_failed = began if first_failed is None else first_failed
                left = first_failed + self.storage.give_up_seconds - time.monotonic()
                if kind != "transient" or left <= 0:
                    raise failure(url, kind, error, self.storage) from error
                _logger.warning("%s: %s; trying again", url, error_words(error))
                time.sleep(min(backoff(tries), left))
        raise AssertionError("unreachable")


def remote_filesystem(url: str, storage: StorageConfig, attempts: int = 3, asynchronous: bool = False) -> Any:
    """fsspec's file system behind a URL. Raises ValueError where a package for its scheme is missing.

    `attempts`: requests that botocore makes before it reports an answer such as 503. s3fs retries nothing itself: its
    loops multiply (25 requests for one file), and do not tell what can pass from what cannot.
    """
    import fsspec

    options: dict[str, Any] = {"asynchronous": True, "skip_instance_cache": True} if asynchronous else {}
    scheme = url.partition("://")[0]
    try:
        if scheme in ("s3", "s3a"):
            options |= {
                "anon": storage.anonymous,
                "endpoint_url": storage.endpoint_url,
                "profile": storage.profile,
                "use_listings_cache": False,
                "config_kwargs": {
                    "connect_timeout": storage.timeout_seconds,
                    "read_timeout": storage.timeout_seconds,
                    "max_pool_connections": storage.connections,
                    "retries": {"total_max_attempts": attempts, "mode": "standard"},
                },
            }
            filesystem = fsspec.filesystem(scheme, **{k: v for k, v in options.items() if v is not None})
            filesystem.retries = 1
            return filesystem
        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(sock_connect=storage.timeout_seconds, sock_read=storage.timeout_seconds)
            return fsspec.filesystem(scheme, client_kwargs={"timeout": timeout}, **options)
        implementation = fsspec.get_filesystem_class(scheme)
        if asynchronous and not implementation.async_impl:
            from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

            return AsyncFileSystemWrapper(implementation(), asynchronous=True)
        return implementation(**options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: cannot be read: {error}") from None


FailureKind = Literal["missing", "denied", "transient", "permanent"]


def failure_kind(error: BaseException) -> FailureKind:
    """Whether asking again can help. By the HTTP status where one is known: s3fs's choice of type hides it."""
    if isinstance(error, StorageError):
        return "permanent"
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)  # botocore's ClientError
        code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        status = status or getattr(one, "status", None)  # aiohttp's ClientResponseError
        if code in ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "BadDigest"):
            return "transient"
        if isinstance(status, int):
            if status == 404:
                return "missing"
            if status in (401, 403):
                return "denied"
            if status >= 300:
                return "transient" if status in (408, 425, 429) or status >= 500 else "permanent"
    if isinstance(error, FileNotFoundError):
        return "missing"
    name = type(error).__name__
    if isinstance(error, PermissionError) or name in ("NoCredentialsError", "PartialCredentialsError"):
        return "denied"
    if name in ("ProfileNotFound", "NoRegionError", "ParamValidationError", "InvalidURL", "InvalidUrlClientError"):
        return "permanent"
    network = type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore", "fsspec")
    return "transient" if network or isinstance(error, OSError | EOFError) else "permanent"


def is_refused(error: BaseException) -> bool:
    """Whether a store has refused a conditional request, since its condition does not hold."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        if status in (409, 412):
            return True
    return isinstance(error, FileExistsError)


def backoff(tries: int) -> float:
    """Seconds until the next try: doubling from 0.1 to 10, half of it by chance, so that nodes do not go in step."""
    return min(0.1 * 2 ** min(tries, 20), 10.0) * random.uniform(0.5, 1.0)


def endpoint_words(url: str, storage: StorageConfig) -> str:
    """Who answers for a URL, for messages and to tell one service's cache from another's."""
    scheme, _, rest = url.partition("://")
    if scheme in ("s3", "s3a"):
        variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        return storage.endpoint_url or next((os.environ[name] for name in variables if os.environ.get(name)), "AWS")
    return f"{scheme}://{rest.partition('/')[0]}"


def without_secrets(text: str) -> str:
    """Words that may be logged: the environment's keys and the query strings of URLs (signatures) are cut out."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if len(os.environ.get(name, "")) >= 4:
            text = text.replace(os.environ[name], f"<{name}>")
    return re.sub(r"(://[^\s?'\"]*\?)[^\s'\"]+", r"\1...", text)


def error_words(error: BaseException) -> str:
    """An exception in one line."""
    return without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": "))


def failure(url: str, kind: FailureKind, error: BaseException, storage: StorageConfig) -> Exception:
    """What to raise for a request that failed for good."""
    name = without_secrets(url)
    if kind == "missing":
        return FileNotFoundError(f"{name}: no such file or folder")
    if kind == "denied":
        return StorageError(
            f"{name}: access is denied ({error_words(error)}); check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, "
            "or data.storage.anonymous for a public bucket)"
        )
    if kind == "transient":
        return StorageError(
            f"{name}: no answer from {endpoint_words(url, storage)} for {storage.give_up_seconds:g} s; "
            f"last: {error_words(error)}"
        )
    return error if isinstance(error, StorageError) else StorageError(f"{name}: {error_words(error)}")
