"""What a person asks of a folder of shards: is it whole, what is in it, what has been left out of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symile_dist.config import StorageConfig
from symile_dist.data.decode import decode_npy
from symile_dist.data.files import OpenFile
from symile_dist.data.index import ShardError, build_index, parse_index
from symile_dist.data.manifest import Manifest, ShardEntry, differences, executor, read_manifest
from symile_dist.data.quarantine import (
    NEXT_EPOCH,
    QUARANTINE,
    WHOLE_SHARD,
    Exclusion,
    parse_quarantine,
    read_quarantine,
    write_quarantine,
)
from symile_dist.data.spans import BadMember, Spans
from symile_dist.storage import Folder
from symile_dist.types import Fault

Progress = Callable[[int, int], None]


def verify_folder(
    url: str,
    storage: StorageConfig | None = None,
    quick: bool = False,
    processes: int = 1,
    progress: Progress | None = None,
) -> list[Fault]:
    """Everything that is not as the manifest and the indices say: a fault per bad sample, or per shard.

    Reads every byte again and compares it with its checksum; with `quick` compares sizes only. Raises ShardError
    without a manifest, StorageError for an object store that fails.
    """
    folder = Folder(url, storage)
    manifest = read_manifest(url, storage, check=False)
    wrong = differences(manifest, folder.list())
    faults = [_whole(name, words) for name, words in wrong.items()]
    if quick:
        return faults
    there = [entry for entry in manifest.shards if "not in the folder" not in wrong.get(entry.name, "")]
    with executor(processes) as pool:
        jobs = [pool.submit(_verify_shard, folder.url, folder.storage, entry) for entry in there]
        for done, (entry, job) in enumerate(zip(there, jobs, strict=True), start=1):
            found = job.result()
            # Which samples a shard of another size has lost says more than that it has another size.
            if any(fault.row >= 0 for fault in found):
                faults = [fault for fault in faults if fault.shard != entry.name]
            faults += found
            if progress:
                progress(done, len(jobs))
    return sorted(faults, key=lambda fault: (fault.shard, fault.row))


def _whole(shard: str, reason: str, kind: str = "open") -> Fault:
    return Fault(kind, "", shard, WHOLE_SHARD, "", -1, reason)


def _verify_shard(url: str, storage: StorageConfig, entry: ShardEntry) -> list[Fault]:
    folder = Folder(url, storage)
    try:
        content = folder.read(f"{entry.name}.idx")
        index = parse_index(content, folder / f"{entry.name}.idx", url, entry.index_sha256)
    except (ShardError, FileNotFoundError) as error:
        return [_whole(entry.name, str(error), "index")]
    with tempfile.TemporaryDirectory() as scratch, folder.local_copy(entry.name, Path(scratch)) as shard:
        file, spans = OpenFile(str(shard)), Spans.of(index.places, index.members)
        faults = [
            Fault(part.kind, "", entry.name, row, part.member, part.offset, part.reason)
            for row, part in enumerate(spans.read([file.read] * len(index)))
            if isinstance(part, BadMember)
        ]
        try:
            build_index(shard, folder / entry.name)
        except ShardError as error:
            if not faults:  # the samples are whole, but other programs will not read them
                faults = [_whole(entry.name, str(error), "truncated")]
    return faults


def mean_of(
    url: str,
    member: str,
    storage: StorageConfig | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> tuple[NDArray[np.float64], int]:
    """Mean of a .npy member over all samples that have it, in float64, and their number.

    Raises ShardError for a folder without such a member, for arrays of different shapes and for damaged ones.
    """
    folder, manifest = Folder(url, storage), read_manifest(url, storage)
    member = member.lower()
    if member not in manifest.members or not member.endswith("npy"):
        arrays = ", ".join(name for name in manifest.members if name.endswith("npy"))
        raise ShardError(f"{folder.url}: has no .npy member '{member}'; it has {arrays or 'none'}")
    total: NDArray[np.float64] | None = None
    count = 0
    with executor(processes) as pool:
        jobs = [pool.submit(_sum_shard, folder.url, folder.storage, entry, member) for entry in manifest.shards]
        for done, job in enumerate(jobs, start=1):  # in the order of the shards: always the same last digits
            part, number = job.result()
            if number and total is not None and total.shape != part.shape:
                raise ShardError(f"{folder.url}: '{member}' is {part.shape} in one shard and {total.shape} in others")
            if number:
                total = part if total is None else total + part
            count += number
            if progress:
                progress(done, len(jobs))
    if total is None:
        raise ShardError(f"{folder.url}: no sample has the member '{member}'")
    return total / count, count


def _sum_shard(url: str, storage: StorageConfig, entry: ShardEntry, member: str) -> tuple[NDArray[np.float64], int]:
    folder = Folder(url, storage)
    index = parse_index(folder.read(f"{entry.name}.idx"), folder / f"{entry.name}.idx", url, entry.index_sha256)
    if member not in index.members:
        return np.zeros(0), 0
    column = index.members.index(member)
    rows = np.flatnonzero(index.present[:, column])
    total: NDArray[np.float64] | None = None
    with tempfile.TemporaryDirectory() as scratch, folder.local_copy(entry.name, Path(scratch)) as shard:
        file, spans = OpenFile(str(shard)), Spans.of(index.places[rows][:, :, [column]], (member,))
        for row, parts in zip(rows.tolist(), spans.read([file.read] * len(rows)), strict=True):
            place = f"{folder / entry.name}, sample {row}, member '{member}'"
            if isinstance(parts, BadMember):
                raise ShardError(f"{place}: {parts.reason}")
            try:
                array = decode_npy(parts[0]).astype(np.float64)
            except ValueError as error:
                raise ShardError(f"{place}: {error}") from None
            if total is not None and total.shape != array.shape:
                raise ShardError(f"{place}: is {array.shape} where others are {total.shape}")
            total = array if total is None else total + array
    return (np.zeros(0) if total is None else total), len(rows)


def stats_of(url: str, storage: StorageConfig | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Counts, presence and sizes of a folder's members, from its indices. Raises ShardError."""
    folder = Folder(url, storage)
    manifest = read_manifest(url, storage)
    sizes: dict[str, list[np.ndarray[Any, Any]]] = {member: [] for member in manifest.members}
    for done, entry in enumerate(manifest.shards, start=1):
        index = parse_index(folder.read(f"{entry.name}.idx"), folder / f"{entry.name}.idx", url, entry.index_sha256)
        for column, member in enumerate(index.members):
            sizes[member].append(index.sizes[index.present[:, column], column])
        if progress:
            progress(done, len(manifest.shards))
    return {
        "folder": folder.url,
        "shards": len(manifest.shards),
        "samples": manifest.samples,
        "bytes": sum(entry.bytes for entry in manifest.shards),
        "samples_per_shard": _spread(np.array([entry.samples for entry in manifest.shards])),
        "left_out": sum(entry.left_out for entry in manifest.shards),
        "skipped_shards": dict(manifest.skipped),
        "digest": manifest.digest,
        "members": {
            member: {
                "present": sum(map(len, parts)),
                "missing": manifest.samples - sum(map(len, parts)),
                "bytes": _spread(np.concatenate(parts).astype(np.int64)),
            }
            for member, parts in sizes.items()
        },
        "combinations": _combinations(manifest),
    }


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    if not len(values):
        return {"total": 0, "min": 0, "median": 0, "mean": 0, "max": 0}
    return {
        "total": int(values.sum()),
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": int(values.max()),
    }


def _combinations(manifest: Manifest) -> dict[str, int]:
    """Which members samples have together -> how many."""
    counts: dict[str, int] = {}
    for entry in manifest.shards:
        for mask, count in entry.presence:
            names = "+".join(member for bit, member in enumerate(manifest.members) if mask >> bit & 1)
            counts[names] = counts.get(names, 0) + count
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def format_stats(stats: dict[str, Any]) -> str:
    """A table for people."""
    lines = [
        f"{stats['folder']}: {stats['samples']} samples in {stats['shards']} shards, {stats['bytes'] / 1e6:.1f} MB",
        f"samples per shard: {stats['samples_per_shard']['min']} to {stats['samples_per_shard']['max']}",
    ]
    if stats["left_out"]:
        lines.append(f"files that belong to no sample: {stats['left_out']}")
    lines += [f"skipped as damaged: {name}: {why}" for name, why in stats["skipped_shards"].items()]
    width = max([6, *map(len, stats["members"])])
    lines.append(
        f"\n{'member':<{width}} {'present':>10} {'missing':>10} {'MB':>10} {'mean B':>9} {'min B':>9} {'max B':>9}"
    )
    for member, row in stats["members"].items():
        size = row["bytes"]
        lines.append(
            f"{member:<{width}} {row['present']:>10} {row['missing']:>10} {size['total'] / 1e6:>10.1f} "
            f"{size['mean']:>9.0f} {size['min']:>9} {size['max']:>9}"
        )
    lines.append("\nmembers that samples have together:")
    lines += [f"{count:>10}  {names or '(none)'}" for names, count in stats["combinations"].items()]
    return "\n".join(lines)


def draw_stats(stats: dict[str, Any], path: str | Path) -> None:
    """Presence and sizes of the members, as PNG, SVG or PDF by the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    members = list(stats["members"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 1.5 + 0.4 * len(members)), layout="constrained")
    present = [stats["members"][member]["present"] / max(1, stats["samples"]) for member in members]
    left.barh(members, present, color="#4477aa")
    left.set(xlim=(0, 1), xlabel=f"share of {stats['samples']} samples that have it")
    megabytes = [stats["members"][member]["bytes"]["total"] / 1e6 for member in members]
    right.barh(members, megabytes, color="#ee6677")
    right.set(xlabel="MB in all")
    figure.suptitle(stats["folder"])
    figure.savefig(path)
    pyplot.close(figure)


def quarantine_of(place: str, storage: StorageConfig | None = None) -> list[Exclusion]:
    """The list of a run's directory or of a folder of shards: what is left out now. Raises ShardError."""
    folder = Folder(place, storage)
    try:
        entries = parse_quarantine(folder.read(QUARANTINE), folder / QUARANTINE)
    except (FileNotFoundError, NotADirectoryError):
        if folder.path is not None and not folder.path.is_dir():
            raise ShardError(f"{place}: no such folder (a run's directory, or a folder of shards)") from None
        return []
    left: dict[tuple[str, str, int], Exclusion] = {}
    for entry in entries:
        if not entry.restored:
            left[entry.dataset, entry.shard, entry.row] = entry
            continue
        for key in [key for key in left if key[:2] == (entry.dataset, entry.shard)]:
            if entry.row in (WHOLE_SHARD, key[2]):
                del left[key]
    return list(left.values())


def quarantine_folder(url: str, faults: list[Fault], storage: StorageConfig | None = None) -> int:
    """Puts faults on a folder's own list, which new runs begin with. Returns how many are new."""
    folder = Folder(url, storage)
    known = quarantine_of(url, storage)
    names = {(entry.shard, entry.row) for entry in known}
    new = [
        Exclusion("", fault.shard, fault.row, 0, fault.kind, fault.member, fault.offset, fault.reason)
        for fault in faults
        if (fault.shard, fault.row) not in names
    ]
    folder.write(QUARANTINE, "".join(entry.to_line() for entry in [*known, *new]).encode())
    return len(new)


def clear_quarantine(place: str, shard: str | None = None, storage: StorageConfig | None = None) -> int:
    """Takes a shard's entries, or all, off a list: of a folder at once, of a run from its next epoch on.

    Returns how many. Raises ValueError when the run is running.
    """
    entries = [entry for entry in quarantine_of(place, storage) if shard in (None, entry.shard)]
    folder = Folder(place, storage)
    if not entries:
        return 0
    if folder.path is None or not (folder.path / "run.json").exists():
        kept = [entry for entry in quarantine_of(place, storage) if shard not in (None, entry.shard)]
        folder.write(QUARANTINE, "".join(entry.to_line() for entry in kept).encode())
        return len(entries)
    from symile_dist.checkpoint.manifest import CHECKPOINTS, complete_checkpoints
    from symile_dist.checkpoint.manifest import read_manifest as read_checkpoint
    from symile_dist.health.lease import locked

    with locked(folder.path):
        complete = complete_checkpoints(folder.path / CHECKPOINTS)
        known = read_checkpoint(complete[-1][1]).loader_state["quarantine"]["entries"] if complete else 0
        # What the checkpoint does not know will be found again; what it knows is never rewritten.
        kept = read_quarantine(folder.path / QUARANTINE)[:known]
        restored = {(entry.dataset, entry.shard) for entry in entries}
        lines = [Exclusion(dataset, name, WHOLE_SHARD, NEXT_EPOCH, restored=True) for dataset, name in sorted(restored)]
        write_quarantine(folder.path / QUARANTINE, [*kept, *lines] if known else [])
    return len(entries)
