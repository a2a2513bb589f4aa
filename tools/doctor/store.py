"""Checks of where the data comes from and where checkpoints are copied to."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator

from symile_dist.config import Config
from symile_dist.data.manifest import read_manifest
from symile_dist.errors import StorageError
from symile_dist.storage import Folder
from symile_dist.tools.doctor.finding import Finding, fail, ok, warn

READ_BYTES = 64 * 1024**2
READ_SECONDS = 10.0


def data_speed(config: Config) -> Iterator[Finding]:
    """How fast each folder's shards come, against nothing yet: the figure is told."""
    for name, dataset in config.data.train.items():
        check = f"data '{name}'"
        try:
            manifest = read_manifest(dataset.path, config.data.storage, check=False)
            folder = Folder(dataset.path, config.data.storage)
            begin, total, shards = time.perf_counter(), 0, 0
            for shard in manifest.shards:
                total += len(folder.read(shard.name))
                shards += 1
                if total > READ_BYTES or time.perf_counter() - begin > READ_SECONDS:
                    break
        except (StorageError, OSError, ValueError) as error:
            yield fail(check, str(error), "the folder has to be readable from every node; credentials: AWS_*")
            continue
        seconds = max(time.perf_counter() - begin, 1e-9)
        per_sample = sum(each.bytes for each in manifest.shards) / max(1, manifest.samples)
        speed = total / seconds
        words = f"{manifest.samples:,} samples in {len(manifest.shards)} shards"
        rate = f"{speed / 1e6:.0f} MB/s, {speed / max(per_sample, 1):.0f} samples/s"
        yield ok(check, f"{words}; {shards} read at {rate}")


def mirror_takes(config: Config) -> Iterator[Finding]:
    """That the mirror takes a file, and refuses a second of the same name: commits depend on it."""
    if not config.checkpoint.mirror:
        return
    folder = Folder(config.checkpoint.mirror, config.data.storage)
    name = f".doctor-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        first, second = folder.create(name, b"1"), folder.create(name, b"2")
        content = folder.read(name)
        folder.remove(name)
    except (StorageError, OSError, ValueError) as error:
        yield fail("checkpoint.mirror", str(error), "the bucket has to be there and writable; credentials: AWS_*")
        return
    if first and not second and content == b"1":
        yield ok("checkpoint.mirror", f"{folder.url}: written, and a second write refused")
    else:
        fix = "use a store with conditional writes (If-None-Match); else two jobs may both believe to have committed"
        yield warn("checkpoint.mirror", f"{folder.url}: does not refuse a second write", fix)
