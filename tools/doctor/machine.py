"""Checks of one machine: they run here, or on every node of a cluster."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from symile_dist.config import Config, local_path
from symile_dist.tools.doctor.finding import Finding, checked, fail, ok, warn

GIB = 1024**3
TESTED = {"torch": "2.8", "deepspeed": "0.19", "ray": "2.60"}
"""The oldest version that may work; of deepspeed and ray the only minor one."""
OPEN_FILES = 8192
SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def machine(config: Config | None, several_nodes: bool) -> list[Finding]:
    """Everything about the machine that this process runs on."""
    ranks_here = 1 if config is None else max(1, config.world_size)
    gpus = 0 if config is None else config.ray.gpus_per_worker
    found = [
        *checked("packages", packages),
        *checked("GPUs", lambda: devices(gpus, ranks_here, several_nodes)),
        *checked("shared memory", shared_memory),
        *checked("open files", open_files),
        *checked("memory", host_memory),
        *checked("network", lambda: network(several_nodes)),
        *checked("InfiniBand", fabric),
    ]
    if config is not None:
        found += checked("disk", lambda: disks(config)) + checked("ports", lambda: ports(config))
    host = socket.gethostname()
    return [Finding(each.check, each.level, each.found, each.fix, host) for each in found]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def packages() -> Iterator[Finding]:
    """Versions of Python and of what the training is built on."""
    yield ok("Python", ".".join(map(str, sys.version_info[:3])))
    for name, least in TESTED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield fail(name, "is not installed", "pip install -e . in the environment that the job uses")
            continue
        exact = name != "torch"
        fits = _version(version)[:2] == _version(least) if exact else _version(version) >= _version(least)
        if fits:
            yield ok(name, version)
        else:
            yield fail(
                name, version, f"{least}{'' if exact else ' or newer'} is needed: pip install -c constraints.txt -e ."
            )


def devices(gpus_per_worker: int, world_size: int, several_nodes: bool) -> Iterator[Finding]:
    """GPUs, and CUDA, driver and NCCL against each other."""
    import torch

    if not gpus_per_worker:
        if torch.cuda.is_available():
            yield warn("GPUs", f"{torch.cuda.device_count()} are here, the config uses none", "ray.gpus_per_worker=1")
        else:
            yield ok("GPUs", "none, and none is asked for")
        return
    if torch.version.cuda is None:
        yield fail("CUDA", f"torch {torch.__version__} is a CPU build", "install a CUDA build of torch (README)")
        return
    driver = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        yield fail(
            "GPUs",
            f"torch sees none (CUDA {torch.version.cuda}, driver {driver or 'not found'})",
            "nvidia-smi has to work here; CUDA_VISIBLE_DEVICES must not be empty; the driver has to be new enough for "
            "torch's CUDA",
        )
        return
    count = torch.cuda.device_count()
    names = {torch.cuda.get_device_name(index) for index in range(count)}
    if not several_nodes and count < world_size:
        yield fail("GPUs", f"{count} for {world_size} ranks", f"ray.num_workers={count}, or more nodes")
    else:
        yield ok("GPUs", f"{count} x {', '.join(sorted(names))}")
    if len(names) > 1:
        yield warn("GPUs", "are of several kinds", "every step waits for the slowest: use one kind")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    if nccl is None:
        yield fail("NCCL", "torch has none", "install a build of torch with NCCL")
    else:
        yield ok("CUDA", f"torch's {torch.version.cuda}, driver {driver or '?'}, NCCL {nccl}")
    errors = _nvidia_smi("--query-gpu=ecc.errors.uncorrected.volatile.total", "--format=csv,noheader")
    if re.search(r"[1-9]", errors):
        yield fail("GPU memory", f"uncorrected errors: {errors}", "take the node out of the cluster")


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(dict.fromkeys(done.stdout.split("\n")[:-1])) if done.returncode == 0 else ""


def shared_memory() -> Iterator[Finding]:
    """Batches pass from the loader's processes through it, and Ray's objects."""
    if not Path("/dev/shm").is_dir():
        yield warn("shared memory", "there is no /dev/shm", "Linux with a tmpfs there is what this is made for")
        return
    free = shutil.disk_usage("/dev/shm").free
    words = f"{free / GIB:.1f} GiB free"
    fix = "docker run --shm-size=16g; Kubernetes: an emptyDir of medium Memory at /dev/shm"
    yield (
        ok("shared memory", words)
        if free > 2 * GIB
        else (warn if free > GIB / 4 else fail)("shared memory", words, fix)
    )


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= OPEN_FILES:
        yield ok("open files", f"limit {soft}")
    else:
        yield warn("open files", f"limit {soft} (at most {hard})", f"ulimit -n {min(hard, 65536) or OPEN_FILES}")


def host_memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    words = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB are free"
    limit = _cgroup_limit()
    if limit and limit < memory.total:
        words += f"; this container may take {limit / GIB:.1f} GiB"
    least = min(memory.available, limit or memory.available)
    if least > 2 * GIB:
        yield ok("memory", words)
    else:
        yield warn("memory", words, "a rank with its loader takes about 1 GiB beside the model's state")


def _cgroup_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() and int(text) < 2**60 else None
    return None


def network(several_nodes: bool) -> Iterator[Finding]:
    """That the host's name leads to an address which others can use, and that interfaces which are named are there."""
    interfaces = psutil.net_if_addrs()
    for variable in SOCKET_VARIABLES:
        given = os.environ.get(variable)
        if not given:
            continue
        names = given.lstrip("^=").split(",")
        missing = [name for name in names if not any(each.startswith(name) for each in interfaces)]
        if missing and not given.startswith("^"):
            yield fail(
                variable, f"there is no interface {', '.join(missing)}", f"there are {', '.join(sorted(interfaces))}"
            )
        else:
            yield ok(variable, given)
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        told = fail if several_nodes and not os.environ.get("GLOO_SOCKET_IFNAME") else warn
        yield told("host name", f"{host} leads nowhere", "put it into /etc/hosts or DNS, or set GLOO_SOCKET_IFNAME")
        return
    if several_nodes and address.startswith("127.") and not os.environ.get("GLOO_SOCKET_IFNAME"):
        fix = "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface between the nodes"
        yield warn("host name", f"{host} leads to {address}, which other nodes cannot reach", fix)
    else:
        yield ok("host name", f"{host} is {address}")


def fabric() -> Iterator[Finding]:
    """InfiniBand and EFA, where the environment asks for them."""
    devices = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    wants_efa = os.environ.get("FI_PROVIDER", "").lower() == "efa"
    wants = os.environ.get("NCCL_IB_HCA") or wants_efa
    if devices and os.environ.get("NCCL_IB_DISABLE") == "1":
        yield warn("InfiniBand", f"{', '.join(devices)}, and NCCL_IB_DISABLE=1", "unset it: NCCL would use sockets")
    elif wants and not devices:
        what = "FI_PROVIDER=efa" if wants_efa else f"NCCL_IB_HCA={os.environ['NCCL_IB_HCA']}"
        yield fail("InfiniBand", f"{what}, and no such device is here", "give the container its devices, or unset it")
    elif devices:
        yield ok("InfiniBand", ", ".join(devices))


def disks(config: Config) -> Iterator[Finding]:
    """Room for the run's checkpoints and for fetched shards."""
    directory = config.run_directory.absolute()
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield fail(
            "run directory", f"{there} is not a folder that this user may write to", "choose another run.directory"
        )
        return
    usage = shutil.disk_usage(there)
    words = f"{usage.free / GIB:.1f} GiB free at {there}"
    if usage.free < 2 * GIB:
        yield warn("run directory", words, "make room: a checkpoint holds three times the weights, in float32")
    else:
        yield ok("run directory", words)
    remote = [data.path for data in config.data.train.values() if local_path(data.path) is None]
    if remote:
        cache = Path(config.data.storage.cache_directory or Path.home() / ".cache" / "symile-dist").expanduser()
        base = next(parent for parent in (cache, *cache.parents) if parent.exists())
        free = shutil.disk_usage(base).free
        asked = config.data.storage.cache_bytes
        words = f"{free / GIB:.1f} GiB free at {base}, data.storage.cache_bytes is {asked / GIB:.1f}"
        if free < asked:
            yield warn("shard cache", words, "set data.storage.cache_bytes to what the disk holds")
        else:
            yield ok("shard cache", words)


def ports(config: Config) -> Iterator[Finding]:
    """Those that the config names."""
    if not config.metrics.enabled or not config.metrics.port:
        return
    taken = []
    for port in range(config.metrics.port, config.metrics.port + config.world_size):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.metrics.address, port))
            except OSError:
                taken.append(port)
    if taken:
        fix = "choose another metrics.port, or 0, which lets the system choose"
        yield fail("ports", f"{', '.join(map(str, taken))} are taken", fix)
    else:
        yield ok("ports", f"metrics {config.metrics.port} to {config.metrics.port + config.world_size - 1}")


def clock() -> float:
    """Seconds since 1970, by this machine."""
    return time.time()
