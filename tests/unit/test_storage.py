"""Folders on a disk, in memory and in an object store that fails now and then."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from symile_dist.config import StorageConfig
from symile_dist.errors import StorageError
from symile_dist.storage import Folder, backoff, error_words, failure_kind, without_secrets
from tests.s3 import Bucket, FaultProxy, at_random, aws_environment


@pytest.fixture(params=["local", "file", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return Folder(tmp_path / "new")
    if request.param == "file":
        return Folder(f"file://{tmp_path}/new")
    if request.param == "memory":
        return Folder(f"memory://{tmp_path.name}/new")
    bucket: Bucket = request.getfixturevalue("bucket")
    return Folder(f"{bucket.url}/{tmp_path.name}", StorageConfig(endpoint_url=bucket.endpoint))


def test_files_of_a_folder(folder: Folder, tmp_path: Path) -> None:
    folder.write("a.json", b"1")
    source = tmp_path / "source"
    source.write_bytes(b"abc" * 100_000)
    folder.put(source, "b.tar")
    assert {name: info.size for name, info in folder.list().items()} == {"a.json": 1, "b.tar": 300_000}
    assert folder.info("b.tar").size == 300_000
    folder.write("a.json", b"22")
    assert folder.read("a.json") == b"22"
    with folder.local_copy("b.tar", tmp_path) as path:
        assert path.read_bytes() == source.read_bytes()
    assert not (tmp_path / "b.tar").exists()
    folder.remove("a.json")
    folder.remove("a.json")
    assert list(folder.list()) == ["b.tar"]
    with pytest.raises(FileNotFoundError, match=r"a\.json"):
        folder.read("a.json")
    with pytest.raises(FileNotFoundError), folder.local_copy("a.json", tmp_path):
        pass
    with pytest.raises(FileNotFoundError, match="no such"):
        Folder(folder / "deeper", folder.storage).list()


@pytest.mark.parametrize("url", ["pipe:rm", "pipe://rm", "s3:bucket", "zip://a::s3://b", "s3://key:secret@bucket/a"])
def test_what_is_no_folder(url: str) -> None:
    with pytest.raises(ValueError):
        Folder(url)


def test_a_scheme_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="nonsense://a: cannot be read"):
        Folder("nonsense://a").list()


def test_naming_files_needs_no_s3fs() -> None:
    program = """
import pickle, sys
from symile_dist.storage import Folder
folder = pickle.loads(pickle.dumps(Folder("s3://bucket/train")))
assert folder / "a.tar" == "s3://bucket/train/a.tar"
assert not {"s3fs", "fsspec", "botocore"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_faults_change_nothing(bucket: Bucket, proxy: FaultProxy, tmp_path: Path) -> None:
    storage = StorageConfig(endpoint_url=proxy.url, timeout_seconds=1.0, request_bytes=64 * 1024)
    folder = pickle.loads(pickle.dumps(Folder(f"{bucket.url}/faults", storage)))
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 4000)
    proxy.fault = at_random(1, 0.1, ("503", "reset", "cut"))
    folder.put(source, "b.tar")
    for number in range(10):
        folder.write("a.json", b"%d" % number)
        assert folder.read("a.json") == b"%d" % number
        assert set(folder.list()) == {"a.json", "b.tar"}
    with folder.local_copy("b.tar", tmp_path) as path:
        assert path.read_bytes() == source.read_bytes()
    assert len(proxy.injected) == 3


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "hang"])
def test_a_store_that_stays_broken(bucket: Bucket, proxy: FaultProxy, fault: str) -> None:
    bucket.put("broken/a.json", b"1234")
    storage = StorageConfig(endpoint_url=proxy.url, timeout_seconds=0.3, give_up_seconds=0.5)
    proxy.fault = lambda number, method, path: fault
    began = time.monotonic()
    with pytest.raises(
        StorageError, match=rf"{bucket.url}/broken/a\.json: no answer from {proxy.url} for 0\.5 s; last"
    ):
        Folder(f"{bucket.url}/broken", storage).read("a.json")
    assert time.monotonic() - began < 30


def test_without_credentials(bucket: Bucket) -> None:
    bucket.put("closed/a.json", b"1")
    with aws_environment(AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""):
        folder = Folder(f"{bucket.url}/closed", StorageConfig(endpoint_url=bucket.endpoint, timeout_seconds=7.0))
        with pytest.raises(StorageError, match=r"access is denied.*AWS_PROFILE"):
            folder.read("a.json")


def _client_error(code: str, status: int) -> Exception:
    from botocore.exceptions import ClientError

    cause = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")
    error = OSError(errno.EINVAL, "translated")  # as s3fs does it
    error.__cause__ = cause
    return error


def _of_aiohttp(name: str) -> Exception:
    import aiohttp

    error: Exception = getattr(aiohttp, name)("broken off")
    return error


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: _client_error("SlowDown", 503), "transient"),
        (lambda: _client_error("RequestTimeout", 400), "transient"),
        (lambda: _client_error("InternalError", 500), "transient"),
        (lambda: _client_error("AccessDenied", 403), "denied"),
        (lambda: _client_error("NoSuchKey", 404), "missing"),
        (lambda: _client_error("PermanentRedirect", 301), "permanent"),
        (lambda: _client_error("InvalidRange", 416), "permanent"),
        (lambda: _of_aiohttp("ClientPayloadError"), "transient"),
        (lambda: _of_aiohttp("ServerDisconnectedError"), "transient"),
        (lambda: ConnectionResetError("reset"), "transient"),
        (lambda: TimeoutError(), "transient"),
        (lambda: FileNotFoundError("a"), "missing"),
        (lambda: PermissionError("a"), "denied"),
        (lambda: StorageError("a"), "permanent"),
        (lambda: TypeError("a mistake of ours"), "permanent"),
    ],
)
def test_what_may_pass(make: Callable[[], Exception], kind: str) -> None:
    assert failure_kind(make()) == kind


def test_pauses_grow_to_a_limit() -> None:
    for tries in (0, 1, 5, 1000):
        most = min(0.1 * 2**tries, 10.0) if tries < 100 else 10.0
        assert most / 2 <= backoff(tries) <= most


def test_no_secret_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    assert without_secrets("a very-secret word") == "a <AWS_SECRET_ACCESS_KEY> word"
    assert without_secrets("https://host/file?X-Amz-Signature=1&b=2 is gone") == "https://host/file?... is gone"
    assert error_words(ValueError("two\nlines  very-secret")) == "ValueError: two lines <AWS_SECRET_ACCESS_KEY>"
