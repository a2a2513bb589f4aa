"""How fast ranks exchange tensors: all-reduce and all-gather, between processes here or between a cluster's nodes."""

from __future__ import annotations

import datetime
import multiprocessing
import socket
import time
from collections.abc import Iterator
from typing import Any

from symile_dist.tools.doctor.finding import Finding, fail, ok, warn

MEGABYTES = 32
REPEATS = 3
TIMEOUT_SECONDS = 60.0
SLOW_GIGABYTES = 0.1


def measure(rank: int, world_size: int, address: str, backend: str) -> dict[str, float]:
    """Bytes per second of one rank's share, by collective: what each collective moves divided by its time.

    An all-reduce moves 2 (W - 1) / W times its tensor through each rank, an all-gather (W - 1) / W times its result.
    """
    import torch
    import torch.distributed as dist

    from symile_dist.distributed import all_gather

    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
    timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=world_size, timeout=timeout)
    try:
        count = MEGABYTES * 1024**2 // 4 // world_size * world_size
        whole, part = torch.ones(count, device=device), torch.ones(count // world_size, device=device)
        share = (world_size - 1) / world_size * whole.nbytes
        found = {}
        for name, moved, call in (
            ("all-reduce", 2 * share, lambda: dist.all_reduce(whole)),
            ("all-gather", share, lambda: all_gather(part)),
        ):
            call()
            if backend == "nccl":
                torch.cuda.synchronize()
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(REPEATS):
                call()
            if backend == "nccl":
                torch.cuda.synchronize()
            found[name] = REPEATS * moved / max(time.perf_counter() - begin, 1e-9)
        return found
    finally:
        dist.destroy_process_group()


def _process(rank: int, world_size: int, address: str, backend: str, results: Any) -> None:
    if backend == "nccl":
        import torch

        torch.cuda.set_device(rank)
    results.put(measure(rank, world_size, address, backend))


def between_processes(world_size: int, gpus: bool) -> Iterator[Finding]:
    """Of this machine."""
    import torch

    ranks = min(world_size, torch.cuda.device_count() if gpus else 4)
    if ranks < 2:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    backend = "nccl" if gpus else "gloo"
    processes = [context.Process(target=_process, args=(r, ranks, address, backend, results)) for r in range(ranks)]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=TIMEOUT_SECONDS * 2) for _ in processes]
    except Exception:
        yield fail("bandwidth", f"{ranks} processes do not reach each other over {backend}", "see their messages above")
        return
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    yield from told(found, f"{ranks} processes of this machine, {backend}")


def told(found: list[dict[str, float]], between: str) -> Iterator[Finding]:
    """A finding per collective, of the slowest rank."""
    for name in found[0]:
        speed = min(each[name] for each in found) / 1e9
        words = f"{speed:.2f} GB/s between {between}"
        if speed < SLOW_GIGABYTES:
            yield warn(name, words, "is it the right network? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose it")
        else:
            yield ok(name, words)
