"""`symile-dist benchmark data`: reading shards with ours, webdataset, tarfile, LitData and MosaicML Streaming.

Every reader gets the same samples and brings their members' bytes, not decoded, into the training process, each as its
library is ordinarily used for training. Each measurement is a process of its own (`tools/peers/read.py`), by turns; a
first run, which is not timed, compares a digest of all bytes with the written ones and watches the memory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from symile_dist.storage import read_json, write_json
from symile_dist.tools.benchmark import processor
from symile_dist.tools.peers.read import MEMBERS, RUN, digest_of, processes_of, proportional_mib
from symile_dist.tools.peers.server import BUCKET, CREDENTIALS, HOST, CountingProxy, s3_server
from symile_dist.tools.progress import progress_bar

SEED = 0
SMALLEST_BATCH, LARGEST_BATCH = 16, 256
READ = Path(__file__).with_name("peers") / "read.py"
PEERS_PYTHON = Path(__file__).resolve().parent.parent / ".peers" / "bin" / "python"
HOW_TO_GET_PEERS = "not installed; `make peers` in the repository puts it into .peers"
TIME_LIMIT = 900.0
"""Seconds of one measurement."""


@dataclass(frozen=True)
class Contender:
    """One way to read, a row of each table; `passes` give a row each."""

    reader: str
    """A name of read.READERS."""
    name: str
    format: str = "tar"
    shuffle: bool = False
    passes: int = 1
    modes: tuple[str, ...] = ("local", "s3")
    over_http: bool = False
    """On S3: by URLs of HTTP in place of s3://."""

    @property
    def in_peers(self) -> bool:
        return self.format != "tar"


OURS, BASELINE = "ours", "webdataset"
CONTENDERS = [
    Contender("ours", "ours, training order", shuffle=True, passes=2),
    Contender("webdataset", "webdataset"),
    Contender("webdataset", "webdataset, shuffle(1000)", shuffle=True, modes=("local",)),
    Contender("webdataset", "webdataset over curl", modes=("s3",), over_http=True),
    Contender("tarfile", "tarfile"),
    Contender("litdata", "LitData", format="litdata", passes=2),
    Contender("litdata", "LitData, shuffle", format="litdata", shuffle=True, passes=2),
    Contender("mosaicml", "MosaicML", format="mds"),
    Contender("mosaicml", "MosaicML, shuffle", format="mds", shuffle=True),
]
PEERS = ("webdataset", "tarfile", "litdata", "mosaicml")
DISTRIBUTIONS = {
    "ours": "symile-dist",
    "webdataset": "webdataset",
    "litdata": "litdata",
    "mosaicml": "mosaicml-streaming",
}


@dataclass(frozen=True)
class Mode:
    """Where the data lies, and the number of loader processes (0: the training process reads)."""

    where: str
    processes: int

    @property
    def title(self) -> str:
        place = {"local": "local files, cached by the system", "s3": "local S3 server (moto), empty cache"}[self.where]
        return f"{place}; " + (f"{self.processes} loader processes" if self.processes else "one process")


# -- the workload ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What is read: fixed by its numbers, the same bytes every time."""

    samples: int
    shards: int
    sizes: tuple[int, ...]

    @property
    def batch(self) -> int:
        """The largest batch that divides the samples, into four or more: ours reads whole global batches."""
        largest = min(LARGEST_BATCH, self.samples // 4)
        return max((size for size in range(1, largest + 1) if self.samples % size == 0), default=1)

    def sample(self, number: int) -> dict[str, bytes]:
        """Suffix -> bytes; each size is drawn within a quarter of the nominal one."""
        drawn = random.Random(f"{SEED} {number}")
        return {
            member: drawn.randbytes(drawn.randint(size - size // 4, size + size // 4))
            for member, size in zip(MEMBERS, self.sizes, strict=True)
        }


def make_workload(workload: Workload, folder: Path, advance: Callable[[int, int], None]) -> dict[str, int]:
    """Tar shards and their index in folder/tar, if not there already; {"samples", "bytes", "digest"}."""
    from symile_dist.data.manifest import index_directory

    done = folder / "workload.json"
    made = {"samples": workload.samples, "shards": workload.shards, "sizes": list(workload.sizes), "seed": SEED}
    if done.exists():
        found = read_json(done)
        if found["made"] != made:
            raise ValueError(f"--work {folder}: holds another workload; name an empty folder")
        return dict(found["expected"])
    size = digest = 0
    per_shard = workload.samples // workload.shards
    (folder / "tar").mkdir(parents=True, exist_ok=True)
    for shard in range(workload.shards):
        with tarfile.open(folder / "tar" / f"shard-{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(shard * per_shard, (shard + 1) * per_shard):
                sample = workload.sample(number)
                digest += digest_of(sample.values())
                for member, data in sample.items():
                    header = tarfile.TarInfo(f"{number:08d}.{member}")
                    header.size = len(data)
                    size += len(data)
                    archive.addfile(header, BytesIO(data))
        advance(shard + 1, workload.shards)
    index_directory(folder / "tar")
    expected = {"samples": workload.samples, "bytes": size, "digest": digest}
    write_json(done, {"made": made, "expected": expected})
    return expected


def make_format(contender: Contender, workload: Workload, folder: Path, size: int) -> None:
    """The same samples in a peer's own format, written by the peer."""
    target = folder / contender.format
    if (target / "index.json").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    run_reader(
        contender,
        {
            "action": "make",
            "source": str(folder / "tar"),
            "target": str(target),
            "samples": workload.samples,
            "shards": workload.shards,
            "bytes": size,
        },
        folder,
    )


# -- one measurement -------------------------------------------------------------------------------------------------


class ReaderFailed(RuntimeError):
    """A reader's process ended badly; the message is its last line."""


def python_of(contender: Contender) -> Path:
    return PEERS_PYTHON if contender.in_peers else Path(sys.executable)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder for what a library leaves: its cache, its temporary files, its home."""
    scratch = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_reader(
    contender: Contender, spec: dict[str, Any], folder: Path, endpoint: str | None = None, watch: bool = False
) -> dict[str, Any]:
    """Runs read.py; with `watch`, asks ten times a second for the memory of all that it starts.

    Raises ReaderFailed.
    """
    with _scratch(folder) as scratch:
        result, errors = scratch / "result.json", scratch / "stderr"
        spec = {"reader": contender.reader, "result": str(result), "cache": str(scratch / "cache"), **spec}
        (scratch / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        own = {"TMPDIR": str(scratch), "HOME": str(scratch), "NO_PROXY": HOST, RUN: scratch.name}
        environment = {**os.environ, **CREDENTIALS, **own}
        if endpoint is not None:
            environment |= {"AWS_ENDPOINT_URL": endpoint, "S3_ENDPOINT_URL": endpoint}
        with open(errors, "wb") as stderr:
            process = subprocess.Popen(
                [python_of(contender), str(READ), str(scratch / "spec.json")],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment,
                start_new_session=True,  # Ctrl-C comes to this process, which ends them all
            )
            peak = _wait(process, scratch.name, watch)
        if process.returncode or (spec["action"] == "read" and not result.exists()):
            raise ReaderFailed(_complaint(errors.read_text(encoding="utf-8", errors="replace"), process.returncode))
        return {**(read_json(result) if result.exists() else {}), "peak_mib": peak}


def _complaint(errors: str, code: int) -> str:
    """The last line that names an exception, or the last one."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return [f"exit code {code}", *lines[-1:], *named[-1:]][-1]


def _wait(process: subprocess.Popen[bytes], run: str, watch: bool) -> float | None:
    """Waits for the end, and ends what is left; the highest memory of all of the run in MiB."""
    until, peak = time.monotonic() + TIME_LIMIT, 0.0
    try:
        while True:
            try:
                process.wait(0.1 if watch else max(0.0, until - time.monotonic()))
                return peak if watch else None
            except subprocess.TimeoutExpired:
                if time.monotonic() >= until:
                    raise ReaderFailed(f"took longer than {TIME_LIMIT:.0f} s") from None
                peak = max(peak, sum(proportional_mib(number) for number in processes_of(run)))
    finally:
        for number in processes_of(run):  # ours leaves its fetcher for a next run, for a while
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait()


def figures_of(result: dict[str, Any], number: int, mode: Mode, first: int) -> dict[str, float]:
    """Rates of a pass. Of local files: from the first delivery of `first` samples on; of S3: from the very beginning.

    What is fetched ahead of the first sample is most of the work on S3, and start-up is most of it on local files.
    """
    part = result["passes"][number]
    begin, skipped = (part["first"], first) if mode.where == "local" else (part["begin"], 0)
    seconds, cpu = (end - start for end, start in zip(part["end"], begin, strict=True))
    samples = part["samples"] - skipped
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "samples_per_s": samples / seconds,
        "samples_per_cpu_s": samples / cpu if cpu > 0 else 0.0,
        "mb_per_s": part["bytes"] * samples / part["samples"] / seconds / 1e6,
        "first_sample_s": part["first"][0] - part["begin"][0],
    }


# -- a mode ----------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """A contender in a mode, as it is measured."""

    contender: Contender
    spec: dict[str, Any]
    checked: dict[str, Any]
    runs: list[dict[str, Any]]
    fetched: list[int]
    failed: str | None = None


def measure_mode(
    mode: Mode,
    contenders: Sequence[Contender],
    workload: Workload,
    expected: dict[str, int],
    folder: Path,
    repeats: int,
    proxy: CountingProxy | None,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Every contender's rows in a mode."""
    endpoint = None if proxy is None else f"http://{HOST}:{proxy.port}"
    everyone = [
        Measured(contender, read_spec(contender, mode, workload, folder, endpoint), {}, [], [])
        for contender in contenders
    ]
    for repeat in range(repeats + 1):
        for measured in everyone:
            if measured.failed is None:
                before = 0 if proxy is None else proxy.received
                spec = {**measured.spec, "check": repeat == 0}
                # Into the system's cache, each time: some systems soon take back what nobody reads.
                for file in sorted((folder / measured.contender.format).rglob("*")):
                    if file.is_file():
                        file.read_bytes()
                try:
                    result = run_reader(measured.contender, spec, folder, endpoint, watch=repeat == 0)
                except ReaderFailed as error:
                    measured.failed = str(error)
                    result = {}
                if repeat == 0:
                    measured.checked = result
                else:
                    measured.runs.append(result)
                    measured.fetched.append(0 if proxy is None else proxy.received - before)
            advance()
    rows = [row for measured in everyone for row in rows_of(measured, mode, expected)]
    baseline = next((row for row in rows if row["name"] == BASELINE and row["failed"] is None), None)
    for row in rows:
        for key in ("samples_per_s", "samples_per_cpu_s"):
            known = baseline is not None and row["failed"] is None
            row[f"{key}_to_webdataset"] = row[key] / baseline[key] if known and baseline else None
    return {"where": mode.where, "processes": mode.processes, "title": mode.title, "rows": rows}


def read_spec(
    contender: Contender, mode: Mode, workload: Workload, folder: Path, endpoint: str | None
) -> dict[str, Any]:
    source = str(folder / contender.format)
    if mode.where == "s3":
        source = f"{endpoint}/{BUCKET}" if contender.over_http else f"s3://{BUCKET}"
        source += f"/{contender.format}"
    return {
        "action": "read",
        "source": source,
        "shards": workload.shards,
        "samples": workload.samples,
        "batch": workload.batch,
        "processes": mode.processes,
        "shuffle": contender.shuffle,
        "passes": contender.passes if mode.where == "local" else 1,
    }


def rows_of(measured: Measured, mode: Mode, expected: dict[str, int]) -> list[dict[str, Any]]:
    """A row per pass: medians over the repeats."""
    contender = measured.contender
    row: dict[str, Any] = {
        "reader": contender.reader,
        "name": contender.name,
        "shuffle": contender.shuffle,
        "failed": measured.failed,
    }
    if measured.failed is not None:
        return [row]
    rows = []
    batched = mode.processes or contender.reader == OURS
    first = measured.spec["batch"] if batched else 1
    for number in range(measured.spec["passes"]):
        runs = [figures_of(result, number, mode, first) for result in measured.runs]
        checked = measured.checked["passes"][number]
        rates = [run["samples_per_s"] for run in runs]
        rows.append(
            {
                **row,
                "name": contender.name + (", second pass" if number else ""),
                "samples": checked["samples"],
                "bytes": checked["bytes"],
                "same_bytes": all(checked[key] == expected[key] for key in expected),
                **{key: statistics.median(run[key] for run in runs) for key in runs[0]},
                "samples_per_s_range": [min(rates), max(rates)],
                "peak_mib": measured.checked["peak_mib"],
                "extra_mib": max(0.0, measured.checked["peak_mib"] - measured.checked["memory_before_mib"]),
                "fetched_to_needed": (
                    statistics.median(measured.fetched) / expected["bytes"] if mode.where == "s3" else None
                ),
            }
        )
    return rows


# -- the whole -------------------------------------------------------------------------------------------------------


def parse_sizes(text: str) -> tuple[int, ...]:
    """ "4096,4096,200" -> (4096, 4096, 200). Raises ValueError for what is not three sizes."""
    words = text.split(",")
    if len(words) != len(MEMBERS) or not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"--sizes '{text}': should be three numbers of bytes (image, audio, text), e.g. 4096,4096,200")
    return tuple(map(int, words))


def check_options(
    workload: Workload, repeats: int, processes: int, peers: Sequence[str], work: Path | None, out: Path | None
) -> None:
    """Raises ValueError for what does not go, before anything is made."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise ValueError("benchmark data counts CPU time and memory from Linux's /proc, which is not here")
    for name, number in (("--samples", workload.samples), ("--shards", workload.shards), ("--repeats", repeats)):
        if number < 1:
            raise ValueError(f"{name} {number}: should be 1 or more")
    if not 0 <= processes <= 64:
        raise ValueError(f"--processes {processes}: should be 0 (only in one process) to 64")
    if workload.samples % workload.shards:
        raise ValueError(f"--samples {workload.samples}: does not divide by --shards {workload.shards}")
    if workload.batch < SMALLEST_BATCH:
        raise ValueError(
            f"--samples {workload.samples}: does not divide into four or more batches of {SMALLEST_BATCH} to "
            f"{LARGEST_BATCH}; take a round number"
        )
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"--peers: '{peer}' is none of {', '.join(PEERS)}")
    for name, path in (("--work", work), ("--out", out)):
        if path is not None and path.exists() and path.is_dir() != (name == "--work"):
            raise ValueError(f"{name} {path}: is {'a folder; name a file' if path.is_dir() else 'not a folder'}")


def moto_python() -> Path | None:
    """The Python that has moto's server."""
    if all(importlib.util.find_spec(name) for name in ("moto", "flask", "flask_cors")):
        return Path(sys.executable)
    return PEERS_PYTHON if PEERS_PYTHON.exists() else None


def versions_of(readers: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": importlib.metadata.version("torch")}
    for reader in readers:
        if reader in ("ours", "webdataset"):
            found[reader] = importlib.metadata.version(DISTRIBUTIONS[reader])
        elif reader in DISTRIBUTIONS:
            script = f"from importlib.metadata import version; print(version('{DISTRIBUTIONS[reader]}'))"
            answer = subprocess.run([PEERS_PYTHON, "-c", script], check=True, capture_output=True, text=True)
            found[reader] = answer.stdout.strip()
    return found


def benchmark_data(
    *,
    samples: int = 20_000,
    shards: int = 20,
    sizes: str = "4096,4096,200",
    repeats: int = 3,
    processes: int = 2,
    peers: Sequence[str] = PEERS,
    skip_s3: bool = False,
    work: str | Path | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Figures of every reader in every mode; written to `out` too, as JSON.

    Raises ValueError for arguments that do not go, before anything is made.
    """
    workload = Workload(samples, shards, parse_sizes(sizes))
    target = None if out is None else Path(out)
    check_options(workload, repeats, processes, peers, None if work is None else Path(work), target)
    missing: dict[str, str] = {}
    wanted = [contender for contender in CONTENDERS if contender.reader in (OURS, *peers)]
    for contender in wanted:
        if contender.in_peers and not PEERS_PYTHON.exists():
            missing[contender.reader] = HOW_TO_GET_PEERS
    wanted = [contender for contender in wanted if contender.reader not in missing]
    if shutil.which("curl") is None:
        wanted = [contender for contender in wanted if not contender.over_http]
    modes = [Mode(where, number) for where in ("local", "s3") for number in dict.fromkeys((0, processes))]
    server = None if skip_s3 else moto_python()
    if server is None:
        modes = [mode for mode in modes if mode.where == "local"]
        missing["s3"] = "left out (--skip-s3)" if skip_s3 else "moto is not installed; `make peers` brings it"
    readers = list(dict.fromkeys(contender.reader for contender in wanted))
    with ExitStack() as stack:
        if work is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="symile-dist-benchmark-")))
        else:
            folder = Path(work).absolute()
            folder.mkdir(parents=True, exist_ok=True)
        progress = stack.enter_context(progress_bar("benchmark"))
        expected = make_workload(workload, folder, lambda done, total: progress("making data", done, total))
        for contender in {contender.format: contender for contender in wanted if contender.in_peers}.values():
            make_format(contender, workload, folder, expected["bytes"])
        results: dict[str, Any] = {
            "processor": processor("cpu"),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "system": platform.system(),
            "versions": versions_of(readers),
            "workload": {"samples": samples, "shards": shards, "sizes": list(workload.sizes), **expected},
            "batch": workload.batch,
            "repeats": repeats,
            "missing": missing,
            "modes": [],
        }
        proxy: CountingProxy | None = None
        if server is not None:
            formats = dict.fromkeys(contender.format for contender in wanted)
            proxy = stack.enter_context(s3_server(server, {name: folder / name for name in formats}))
        for mode in modes:
            here = [contender for contender in wanted if mode.where in contender.modes]
            total, done = len(here) * (repeats + 1), 0

            def advance(title: str = mode.title, total: int = total) -> None:
                nonlocal done
                done += 1
                progress(title, done, total)

            used = proxy if mode.where == "s3" else None
            results["modes"].append(measure_mode(mode, here, workload, expected, folder, repeats, used, advance))
    if target is not None:
        write_json(target, results)
    return results


# -- tables ----------------------------------------------------------------------------------------------------------


def benchmark_data_tables(results: dict[str, Any]) -> Group:
    """Markdown: a table per mode, and what is missing."""
    work, versions = results["workload"], results["versions"]
    where = (
        f"{results['processor']}, {results['cores']} cores, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {work['samples']:,} samples of {' + '.join(str(size) for size in work['sizes'])} bytes, about, in "
        f"{work['shards']} shards; batches of {results['batch']}; median of {results['repeats']}"
    )
    parts: list[Any] = [where]
    for mode in results["modes"]:
        parts += ["", mode["title"], "", _mode_table(mode)]
    parts += [f"\n{name}: {reason}" for name, reason in results["missing"].items()]
    return Group(*parts)


def _mode_table(mode: dict[str, Any]) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column("reader")
    s3 = mode["where"] == "s3"
    columns = ["samples/s", "to webdataset", "samples per CPU s", "to webdataset", "MB/s", "CPU s", "extra memory, MiB"]
    for column in [*columns, *(["first sample, s", "fetched / needed"] if s3 else [])]:
        table.add_column(column, justify="right")
    for row in mode["rows"]:
        if row["failed"] is not None:
            table.add_row(row["name"], f"failed: {row['failed']}")
            continue
        ratios = [
            "" if ratio is None else f"{ratio:.2f}"
            for ratio in (row["samples_per_s_to_webdataset"], row["samples_per_cpu_s_to_webdataset"])
        ]
        cells = [
            f"{row['samples_per_s']:,.0f}",
            ratios[0],
            f"{row['samples_per_cpu_s']:,.0f}",
            ratios[1],
            f"{row['mb_per_s']:.0f}",
            f"{row['cpu_seconds']:.2f}",
            f"{row['extra_mib']:.0f}",
        ]
        if s3:
            cells += [f"{row['first_sample_s']:.2f}", f"{row['fetched_to_needed']:.2f}"]
        table.add_row(row["name"] + ("" if row["same_bytes"] else f" ({row['samples']:,} samples)"), *cells)
    return table
