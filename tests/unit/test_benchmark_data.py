"""`symile-dist benchmark data`: every reader brings every byte, and bytes on the network are counted. Never speed."""

from __future__ import annotations

import functools
import http.server
import json
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from symile_dist.cli import main
from symile_dist.data.manifest import read_manifest
from symile_dist.tools import benchmark_data
from symile_dist.tools.benchmark_data import (
    CONTENDERS,
    HOST,
    PEERS_PYTHON,
    Contender,
    Mode,
    ReaderFailed,
    Workload,
    benchmark_data_tables,
    make_format,
    make_workload,
    moto_python,
    read_spec,
    run_reader,
)
from symile_dist.tools.peers.server import CountingProxy, s3_server
from tests.unit.test_cli import user_mistake

SMALL = Workload(samples=320, shards=4, sizes=(600, 400, 20))
needs_peers = pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="the peers are not installed: make peers")
needs_moto = pytest.mark.skipif(moto_python() is None, reason="moto is not installed: make peers")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A folder with the small workload, and what every reader should bring."""
    folder = tmp_path_factory.mktemp("workload")
    return folder, make_workload(SMALL, folder, lambda done, total: None)


def contender(name: str) -> Contender:
    return next(one for one in CONTENDERS if one.name == name)


def brought(reader: Contender, mode: Mode, folder: Path, endpoint: str | None = None) -> dict[str, Any]:
    """Samples, bytes and digest of each pass are the same, or this fails; those of the first."""
    spec = {**read_spec(reader, mode, SMALL, folder, endpoint), "check": True}
    result = run_reader(reader, spec, folder, endpoint, watch=True)
    assert result["peak_mib"] >= 0 and result["memory_before_mib"] > 0
    for part in result["passes"]:
        assert part["begin"] <= part["first"] <= part["end"]
    first, *others = [{key: part[key] for key in ("samples", "bytes", "digest")} for part in result["passes"]]
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sizes", "1,2"], "should be three numbers of bytes (image, audio, text), e.g. 4096,4096,200"),
        (["--sizes", "1,2,x"], "--sizes '1,2,x'"),
        (["--samples", "0"], "--samples 0: should be 1 or more"),
        (["--samples", "401"], "--samples 401: does not divide by --shards 20"),
        (["--samples", "40"], "does not divide into four or more batches of 16 to 256"),
        (["--repeats", "0"], "--repeats 0: should be 1 or more"),
        (["--processes", "65"], "--processes 65: should be 0 (only in one process) to 64"),
        (["--peers", "petastorm"], "'petastorm' is none of webdataset, tarfile, litdata, mosaicml"),
        (["--out", "."], "--out .: is a folder; name a file"),
        (["--work", __file__], "is not a folder"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_any_work(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_data, "make_workload", None)
    assert said in user_mistake(capsys, "benchmark", "data", *words)


def test_the_workload_is_the_same_every_time(made: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    folder, expected = made
    assert make_workload(SMALL, tmp_path, lambda done, total: None) == expected
    assert read_manifest(tmp_path / "tar").digest == read_manifest(folder / "tar").digest
    samples = [SMALL.sample(number) for number in range(SMALL.samples)]
    assert expected["bytes"] == sum(len(data) for sample in samples for data in sample.values())
    assert all(450 <= len(sample["jpg"]) <= 750 for sample in samples)
    assert make_workload(SMALL, folder, lambda done, total: pytest.fail("made again")) == expected
    with pytest.raises(ValueError, match="holds another workload"):
        make_workload(Workload(640, 4, SMALL.sizes), folder, lambda done, total: None)


@pytest.mark.parametrize(
    ("name", "processes"),
    [("ours, training order", 0), ("ours, training order", 2), ("webdataset, shuffle(1000)", 2), ("tarfile", 0)],
)
def test_every_reader_brings_every_byte(name: str, processes: int, made: tuple[Path, dict[str, int]]) -> None:
    folder, expected = made
    assert brought(contender(name), Mode("local", processes), folder) == expected


@needs_peers
@pytest.mark.parametrize(("name", "processes"), [("LitData, shuffle", 0), ("MosaicML", 2)])
def test_every_peer_brings_every_byte(name: str, processes: int, made: tuple[Path, dict[str, int]]) -> None:
    folder, expected = made
    make_format(contender(name), SMALL, folder, expected["bytes"])
    assert brought(contender(name), Mode("local", processes), folder) == expected


@needs_moto
def test_bytes_from_an_s3_server_are_counted(made: tuple[Path, dict[str, int]]) -> None:
    folder, expected = made
    python = moto_python()
    assert python is not None
    with s3_server(python, {"tar": folder / "tar"}) as proxy:
        endpoint = f"http://{HOST}:{proxy.port}"
        assert brought(contender("ours, training order"), Mode("s3", 0), folder, endpoint) == expected
        on_disk = sum(file.stat().st_size for file in (folder / "tar").iterdir())
        assert expected["bytes"] <= proxy.received < on_disk + 100_000  # each file once, and headers


def test_the_proxy_counts_what_it_passes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1_000_000))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer((HOST, 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        proxy = CountingProxy(server.server_address[1])
        with urllib.request.urlopen(f"http://{HOST}:{proxy.port}/file") as answer:
            assert len(answer.read()) == 1_000_000
        proxy.close()
        server.shutdown()
    assert 1_000_000 < proxy.received < 1_001_000


def test_a_reader_that_fails_says_why(tmp_path: Path) -> None:
    tarfile = contender("tarfile")
    spec = {**read_spec(tarfile, Mode("local", 0), SMALL, tmp_path, None), "check": True}
    with pytest.raises(ReaderFailed, match=r"FileNotFoundError: .*shard-00000\.tar"):
        run_reader(tarfile, spec, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_figures_and_tables(
    made: tuple[Path, dict[str, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, expected = made
    monkeypatch.setattr(benchmark_data, "PEERS_PYTHON", tmp_path / "none")
    words = ["--samples", "320", "--shards", "4", "--sizes", "600,400,20", "--repeats", "1", "--processes", "0"]
    words += ["--peers", "tarfile", "litdata", "--skip-s3", "--work", str(folder), "--out", str(tmp_path / "out.json")]
    assert main(["benchmark", "data", "--json", *words]) == 0
    results = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out.json").read_text()) == results
    assert results["workload"] == {"samples": 320, "shards": 4, "sizes": [600, 400, 20], **expected}
    assert "make peers" in results["missing"]["litdata"] and "--skip-s3" in results["missing"]["s3"]
    assert results["batch"] == 80
    (mode,) = results["modes"]
    ours = "ours, training order"
    assert [row["name"] for row in mode["rows"]] == [ours, f"{ours}, second pass", "tarfile"]
    for row in mode["rows"]:
        assert row["failed"] is None and row["same_bytes"] and row["samples"] == 320
        assert row["seconds"] > 0 and row["cpu_seconds"] >= 0 and row["mb_per_s"] > 0
        assert row["samples_per_s_to_webdataset"] is None  # it was not asked for
    assert len(benchmark_data_tables(results).renderables) == 1 + 4 + 2
