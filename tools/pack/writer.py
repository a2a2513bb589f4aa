"""Writes the shards of a plan, in parts and processes; whatever was whole before a kill is kept."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from symile_dist.data.index import write_index
from symile_dist.data.manifest import index_directory
from symile_dist.errors import RunFailed
from symile_dist.storage import write_atomic
from symile_dist.tools.pack.plan import LOCK, Plan, Shard, check_folder, make_plan
from symile_dist.tools.pack.source import Progress, Row, Source, tar_bytes
from symile_dist.tools.shard_folder import check_space, not_complete, parse_part, tidy, work_in

SHARD_BYTES = 256_000_000
"""Some seconds of reading; small enough that an epoch's shuffle has many of them."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def pack(
    source: Source,
    out: str | Path,
    *,
    shard_bytes: int | str = SHARD_BYTES,
    max_samples: int | None = None,
    seed: int | None = 0,
    part: str = "1/1",
    processes: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Packs a source into `out`/shard-*.tar, each with its index; the manifest when all shards are there.

    The bytes depend on the source, `shard_bytes`, `max_samples` and `seed` alone: not on parts, processes or kills.
    Calling it again goes on where a killed call stopped.

    Args:
        shard_bytes: bytes, or such as "256MB": a shard's samples take no more, unless one alone does (the end mark of
            the tar file comes on top: at most 11 KB).
        max_samples: samples that a shard does not exceed.
        seed: of the samples' order; None keeps the source's order, which a table sorted by class should not have.
        part: "i/n": write every n-th shard only, beginning with the i-th; the parts may run at once, on any machines
            that share `out`.
        processes: of this machine. Child processes are spawned: a script that calls this needs the usual
            `if __name__ == "__main__":`.
        progress: called with (stage, done, total) from the calling thread.

    Returns a summary: samples, shards, what is missing, "complete", "message".

    Raises ValueError for a user's mistake, before anything is written where it can be known then; RunFailed where a
    child process is killed.
    """
    started = time.monotonic()
    report = progress or (lambda stage, done, total: None)
    size, (mine, parts) = parse_bytes(shard_bytes), parse_part(part)
    for name, number in (("max_samples", max_samples), ("processes", processes)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    if "://" in str(out):
        raise ValueError(f"{out}: pack into a local or mounted folder, then copy it to the object store")
    plan = make_plan(
        source, Path(out).absolute(), shard_bytes=size, max_samples=max_samples, seed=seed, progress=report
    )
    check_folder(plan)
    share = plan.shards[mine - 1 :: parts]
    with open(plan.folder / LOCK, "ab") as lock:
        work_in(plan.folder, lock, {shard.name for shard in share})
        todo = [shard for shard in share if not plan.is_complete(shard)]
        check_space(plan.folder, sum(shard.bytes for shard in todo))
        total = sum(shard.last - shard.first for shard in share)
        done = total - sum(shard.last - shard.first for shard in todo)
        report("samples", done, total)
        for shard in _write_all(source, plan, todo, min(processes, len(todo))):
            done += shard.last - shard.first
            report("samples", done, total)
        missing = [shard for shard in plan.shards if not plan.is_complete(shard)]
        summary = _summary(plan, missing, parts)
        if not missing:
            check_folder(plan)
            manifest = index_directory(plan.folder, progress=lambda done, total: report("manifest", done, total))
            summary["digest"] = manifest.digest
            tidy(plan.folder, lock)
    summary.update(written=len(todo), seconds=time.monotonic() - started)
    return {**summary, "message": _message(summary)}


def parse_bytes(size: int | str) -> int:
    """ "256MB" -> 256000000. Raises ValueError for what is no size, or none above zero."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", str(size).strip())
    if found is None or found[2].upper() not in _UNITS or float(found[1]) * _UNITS[found[2].upper()] < 1:
        raise ValueError(f"'{size}' is no size; write bytes, or such as 256MB, 1GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _write_all(source: Source, plan: Plan, shards: list[Shard], processes: int) -> Iterator[Shard]:
    """Writes the shards and yields each as it is done."""
    if processes <= 1:
        for shard in shards:
            _write_shard(source, plan.folder, shard, _rows(plan, shard))
            yield shard
        return
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_die_with_parent)
    waiting: dict[Future[None], Shard] = {}
    rest = iter(shards)
    try:
        while True:
            # Few at a time: a task holds the rows of its shard.
            for shard in islice(rest, 2 * processes - len(waiting)):
                waiting[executor.submit(_write_shard, source, plan.folder, shard, _rows(plan, shard))] = shard
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                future.result()
                yield waiting.pop(future)
    except BrokenProcessPool:
        raise RunFailed(
            "a packing process was killed (out of memory?); the same command goes on from the whole shards"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _die_with_parent() -> None:
    """A pool's process whose parent was killed would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which lets begun shards end
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _rows(plan: Plan, shard: Shard) -> list[Row]:
    rows = plan.order[shard.first : shard.last]
    starts, sizes = plan.survey.starts, plan.survey.tar_bytes
    table = np.stack([rows, starts[rows], starts[rows + 1], sizes[rows]], axis=1)
    return [Row(*numbers) for numbers in table.tolist()]


def _write_shard(source: Source, folder: Path, shard: Shard, rows: list[Row]) -> None:
    from webdataset.writer import TarWriter

    def write(file: BinaryIO) -> None:
        # Without fixed times and owners two runs would differ.
        with (
            source.open() as read,
            TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar,
        ):
            for row in rows:
                key, members = read(row.number, row.start, row.end)
                if tar_bytes(map(len, members.values())) != row.tar_bytes:
                    raise ValueError(
                        f"sample '{key}' (row {row.number + 1}) has changed since the plan was made: restore its "
                        "files, or pack into another folder"
                    )
                tar.write({"__key__": key, **members})
        if file.tell() != shard.bytes:
            raise RuntimeError(f"{shard.name} has {file.tell()} bytes, planned were {shard.bytes}")

    path = folder / shard.name
    if not path.exists():
        write_atomic(path, write)
    write_index(path)


def _summary(plan: Plan, missing: list[Shard], parts: int) -> dict[str, Any]:
    survey = plan.survey
    by_part: dict[str, int] = {}
    for shard in missing:
        name = f"{shard.number % parts + 1}/{parts}"
        by_part[name] = by_part.get(name, 0) + 1
    return {
        "directory": str(plan.folder),
        "complete": not missing,
        "rows": len(survey.tar_bytes),
        "samples": len(plan.order),
        "skipped": survey.skipped,
        "members": survey.members,
        "absent": survey.absent,
        "remarks": survey.remarks,
        "shards": len(plan.shards),
        "bytes": sum(shard.bytes for shard in plan.shards),
        "missing_shards": len(missing),
        "missing_parts": by_part,
    }


def _message(summary: dict[str, Any]) -> str:
    counts = f"{summary['samples']} samples in {summary['shards']} shards"
    if summary["skipped"]:
        counts += f", {summary['skipped']} skipped"
    lines = [f"{summary['directory']}: {counts}, members {', '.join(summary['members'])}"]
    lines += [f"  {count} samples lack {column}" for column, count in summary["absent"].items()]
    lines += [f"  {remark}" for remark in summary["remarks"]]
    if summary["missing_shards"]:
        lines.append(not_complete(summary["missing_shards"], summary["missing_parts"]))
    return "\n".join(lines)
