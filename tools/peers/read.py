"""One reader, measured in a process of its own: `python read.py SPEC`, both a JSON file, gives SPEC's "result" file.

Run by path, in this project's environment or in the peers', so it imports nothing but the library it measures. Every
reader brings each sample's three members, as bytes that are not decoded, into this process, the way its library is
ordinarily used for training. With loader processes all of them hand over batches of one size.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

MEMBERS = ("jpg", "flac", "txt")
RUN = "SYMILE_DIST_BENCHMARK_RUN"
Spec = dict[str, Any]
Sample = Any
"""A mapping from member to bytes, or a tuple of bytes in the order of MEMBERS."""


# -- clocks ----------------------------------------------------------------------------------------------------------


def processes_of(run: str) -> dict[int, list[str]]:
    """The living processes of a run: what /proc/PID/stat says of each, from its third field on. Linux.

    They are known by a variable in their environment, which those that leave the session or lose their parent keep.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if f"{RUN}={run}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                found[int(entry.name)] = stat.rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended, or is somebody else's
    return found


def run_cpu_seconds() -> float:
    """User and system time of this process and all of its run: those of living others in whole ticks."""
    times = os.times()
    total = time.process_time() + times.children_user + times.children_system
    others = processes_of(os.environ[RUN])
    others.pop(os.getpid(), None)
    ticks = sum(int(value) for fields in others.values() for value in fields[11:15])
    return total + ticks / os.sysconf("SC_CLK_TCK")


def proportional_mib(process: int | str) -> float:
    """Memory of a process in MiB, with pages that several share divided among them. 0 when it has ended."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


# -- readers ---------------------------------------------------------------------------------------------------------


def as_list(samples: list[Sample]) -> list[Sample]:
    """Collates nothing: the batch is the list of its samples."""
    return samples


class Flat:
    """The samples of batches, one after another."""

    def __init__(self, batches: Iterable[list[Sample]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Sample]:
        return chain.from_iterable(self.batches)


def delivered(dataset: Any, spec: Spec) -> Iterable[Sample]:
    """The dataset itself, or through torch's DataLoader with the start method that is ordinary on the system."""
    if not spec["processes"]:
        return cast(Iterable[Sample], dataset)
    loader = import_module("torch.utils.data").DataLoader
    return Flat(loader(dataset, batch_size=spec["batch"], num_workers=spec["processes"], collate_fn=as_list))


def local_path(source: str) -> bool:
    return "://" not in source


def open_any(url: str) -> Any:
    """A file, or an object as fsspec opens it. Called in the process that reads: s3fs does not survive a fork."""
    return open(url, "rb") if local_path(url) else import_module("s3fs").S3FileSystem().open(url, "rb")


def shard_urls(spec: Spec) -> list[str]:
    return [f"{spec['source']}/shard-{number:05d}.tar" for number in range(spec["shards"])]


def read_webdataset(spec: Spec) -> list[Iterable[Sample]]:
    wds = import_module("webdataset")
    if spec["source"].startswith("s3://"):
        wds.gopen_schemes["s3"] = lambda url, mode="rb", bufsize=8192, **options: open_any(url)
    dataset = wds.WebDataset(shard_urls(spec), shardshuffle=False)
    if spec["shuffle"]:
        dataset = dataset.shuffle(1000)
    return [delivered(dataset, spec)]


class TarShards:
    """tarfile's own iteration, one shard after another; loader processes share the shards out."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls

    def __iter__(self) -> Iterator[dict[str, bytes]]:
        urls = self.urls
        if "torch" in sys.modules:
            worker = sys.modules["torch"].utils.data.get_worker_info()
            urls = urls if worker is None else urls[worker.id :: worker.num_workers]
        for url in urls:
            yield from tar_samples(url)


def tar_samples(url: str) -> Iterator[dict[str, bytes]]:
    """Runs of members whose names agree up to the first dot."""
    key: str = ""
    sample: dict[str, bytes] = {}
    with open_any(url) as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
        for header in archive:
            stem, _, suffix = header.name.partition(".")
            if stem != key:
                if sample:
                    yield sample
                key, sample = stem, {}
            file = archive.extractfile(header)
            assert file is not None
            sample[suffix] = file.read()
    if sample:
        yield sample


def read_tarfile(spec: Spec) -> list[Iterable[Sample]]:
    shards: Any = TarShards(shard_urls(spec))
    if spec["processes"]:
        data = import_module("torch.utils.data")
        shards = type("IterableTarShards", (TarShards, data.IterableDataset), {})(shard_urls(spec))
    return [delivered(shards, spec)]


def read_litdata(spec: Spec) -> list[Iterable[Sample]]:
    litdata = import_module("litdata")
    options: dict[str, Any] = {}
    if not local_path(spec["source"]):
        # Its S3 client takes no plain HTTP, which a server on this machine speaks; AWS_ALLOW_HTTP does not reach it.
        import_module("litdata.streaming.downloader")._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
        options = {"cache_dir": spec["cache"], "storage_options": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}}
    dataset = litdata.StreamingDataset(spec["source"], shuffle=spec["shuffle"], **options)
    if not spec["processes"]:
        return [dataset] * spec["passes"]
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=spec["batch"], num_workers=spec["processes"], collate_fn=as_list
    )
    return [Flat(loader)] * spec["passes"]


def read_mosaicml(spec: Spec) -> list[Iterable[Sample]]:
    streaming = import_module("streaming")
    streaming.base.util.clean_stale_shared_memory()
    where = {"local": spec["source"]}
    if not local_path(spec["source"]):
        where = {"remote": spec["source"], "local": spec["cache"]}
    dataset = streaming.StreamingDataset(**where, shuffle=spec["shuffle"], batch_size=spec["batch"])
    return [delivered(dataset, spec)]


CONFIG = """
run: {{name: benchmark}}
data: {{train: "{source}", loader_processes: {processes}, storage: {{cache_directory: "{cache}"}}}}
modalities:
  image: {{member: jpg, decoder: "{decoder}", transform: tensor, encoder: {{name: mlp, input_dim: 1}}}}
  audio: {{member: flac, decoder: "{decoder}", transform: tensor, encoder: {{name: mlp, input_dim: 1}}}}
  text: {{member: txt, decoder: "{decoder}", transform: tensor, encoder: {{name: mlp, input_dim: 1}}}}
model: {{embedding_dim: 8}}
train: {{steps: {steps}, global_batch_size: {batch}}}
metrics: {{enabled: false}}
"""
"""Encoders are there because a config has them; none is made, and of `raw` no decoder is called."""
DECODER = "symile_dist.tools.peers.read:decode_first_byte"


def decode_first_byte(data: bytes) -> Any:
    """Decodes anything: ours looks at the shape of one sample when it opens the data."""
    return import_module("numpy").frombuffer(data[:1], dtype="uint8")


class Steps:
    """Batches by their number, not decoded, in one tensor each: so ours hands over what its loader processes read."""

    def __init__(self, dataset: Any, steps: range) -> None:
        self.dataset, self.steps = dataset, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[bytes]]:
        return (parts for step in self.steps for _, parts in self.dataset.read(self.dataset.locate(step)))

    def __getitem__(self, number: int) -> tuple[Any, list[list[int]]]:
        raw = self.dataset.locate(self.steps[number])
        data = import_module("symile_dist.data.handover").shared_bytes(raw.counts.bytes)
        view, end, sizes = memoryview(data.numpy()), 0, []
        for _, parts in self.dataset.read(raw):
            sizes.append(list(map(len, parts)))
            for part in parts:
                view[end : end + len(part)] = part
                end += len(part)
        return data, sizes


def unpacked(batches: Iterable[tuple[Any, list[list[int]]]]) -> Iterator[list[bytes]]:
    for tensor, sizes in batches:
        data, end = memoryview(tensor.numpy()), 0
        for image, audio, text in sizes:
            first, second, last = end + image, end + image + audio, end + image + audio + text
            yield [bytes(data[end:first]), bytes(data[first:second]), bytes(data[second:last])]
            end = last


def read_ours(spec: Spec) -> list[Iterable[Sample]]:
    """In training order: lanes x windows, CRC-checked."""
    from symile_dist.config import parse_config
    from symile_dist.data import loader

    number = spec["samples"] // spec["batch"]
    text = CONFIG.format(**spec, steps=number * spec["passes"], decoder=DECODER)
    dataset = loader.open_training(parse_config(text, "benchmark").config, rank=0, start_step=0).dataset
    epochs = [Steps(dataset, range(epoch * number, (epoch + 1) * number)) for epoch in range(spec["passes"])]
    if not spec["processes"]:
        return list(epochs)
    options = {"num_workers": spec["processes"], "multiprocessing_context": loader._process_context()}
    data = import_module("torch.utils.data")
    return [unpacked(data.DataLoader(steps, batch_size=None, **options)) for steps in epochs]


READERS: dict[str, Callable[[Spec], list[Iterable[Sample]]]] = {
    "ours": read_ours,
    "webdataset": read_webdataset,
    "tarfile": read_tarfile,
    "litdata": read_litdata,
    "mosaicml": read_mosaicml,
}


# -- the peers' own formats ------------------------------------------------------------------------------------------


def make_litdata(spec: Spec) -> None:
    import_module("litdata").optimize(
        fn=tar_samples,
        inputs=shard_urls(spec),
        output_dir=spec["target"],
        chunk_size=spec["samples"] // spec["shards"],
        num_workers=1,
        verbose=False,
    )


def make_mosaicml(spec: Spec) -> None:
    """Shards of about as many samples as the tar files have."""
    streaming = import_module("streaming")
    size = int(spec["bytes"] / spec["shards"] * 1.01) + 65536
    with streaming.MDSWriter(out=spec["target"], columns=dict.fromkeys(MEMBERS, "bytes"), size_limit=size) as writer:
        for url in shard_urls(spec):
            for sample in tar_samples(url):
                writer.write(sample)


# -- measuring -------------------------------------------------------------------------------------------------------


def digest_of(parts: Iterable[bytes]) -> int:
    """A sample's part of a digest that does not depend on the order of samples."""
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


LIBRARIES = {
    "ours": ["torch.utils.data", "symile_dist.data.loader"],
    "webdataset": ["webdataset"],
    "tarfile": [],
    "litdata": ["litdata"],
    "mosaicml": ["streaming"],
}
CLIENTS = {
    "ours": [],
    "webdataset": ["s3fs"],
    "tarfile": ["s3fs"],
    "litdata": ["boto3", "obstore"],
    "mosaicml": ["boto3"],
}


def import_libraries(spec: Spec) -> None:
    """What a training process has done long before its first epoch, and is not counted."""
    names = LIBRARIES[spec["reader"]] + (["torch.utils.data"] if spec["processes"] else [])
    if not local_path(spec["source"]):
        names = names + CLIENTS[spec["reader"]]
    for name in names:
        import_module(name)
    if spec["reader"] == "ours" and spec["processes"]:  # the server that its processes are forked from
        process = sys.modules["symile_dist.data.loader"]._process_context().Process(target=int)
        process.start()
        process.join()


def mark() -> tuple[float, float]:
    """(seconds of the wall, CPU seconds)."""
    return time.perf_counter(), run_cpu_seconds()


def consume(samples: Iterable[Sample], pick: Callable[[Sample], tuple[bytes, ...]], check: bool) -> dict[str, Any]:
    """Takes every sample. `check` adds the digest, and is not for timing."""
    count = size = digest = 0
    first = (0.0, 0.0)
    for sample in samples:
        parts = pick(sample)
        if not count:
            first = mark()
        count += 1
        size += sum(map(len, parts))
        if check:
            assert all(type(part) is bytes for part in parts), f"a sample's members are {list(map(type, parts))}"
            digest += digest_of(parts)
    return {"samples": count, "bytes": size, "digest": digest, "first": first, "end": mark()}


def measure(spec: Spec) -> dict[str, Any]:
    """Marks of every pass: `begin` before the library opens the data, `first` at the first sample, `end`."""
    import_libraries(spec)
    pick = tuple if spec["reader"] == "ours" else itemgetter(*MEMBERS)
    memory, begin = proportional_mib("self"), mark()
    passes = []
    for samples in READERS[spec["reader"]](spec):
        passes.append({"begin": begin, **consume(samples, pick, spec["check"])})
        begin = passes[-1]["end"]
    return {"memory_before_mib": memory, "passes": passes}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if spec["action"] == "make":
        {"litdata": make_litdata, "mosaicml": make_mosaicml}[spec["reader"]](spec)
    else:
        Path(spec["result"]).write_text(json.dumps(measure(spec)), encoding="utf-8")


if __name__ == "__main__":
    main()
