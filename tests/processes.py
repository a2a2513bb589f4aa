"""Real processes for tests: a function on every rank of a gloo process group."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankFailed(AssertionError):
    """A rank of `run_distributed` raised, died or did not end; the message holds its traceback."""


def _run_rank(rank: int, world_size: int, folder: str, timeout: float, function: Callable[..., Any], args: Any) -> None:
    outcome: tuple[str, Any]
    try:
        torch.set_num_threads(1)
        # The host's name may lead to an interface that a sandbox does not have.
        if "lo" in [name for _, name in socket.if_nameindex()]:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        outcome = ("result", function(*args))
        dist.destroy_process_group()
    except BaseException:
        outcome = ("failure", traceback.format_exc())
    part = Path(folder, f"rank-{rank}.part")
    part.write_bytes(pickle.dumps(outcome))
    part.replace(Path(folder, f"rank-{rank}"))


def _outcome(folder: Path, rank: int, process: BaseProcess) -> tuple[str, Any]:
    path = folder / f"rank-{rank}"
    if path.exists():
        kind, value = pickle.loads(path.read_bytes())  # written by this test's own child
        return kind, value
    return "failure", f"the process ended without a word (exit code {process.exitcode})"


def _first_failure(folder: Path, processes: Sequence[BaseProcess]) -> str:
    """Of several failed ranks the one that failed first: the others only lost their connection to it."""
    failures: list[tuple[int, int, str]] = []
    for rank, process in enumerate(processes):
        path = folder / f"rank-{rank}"
        if path.exists() or not process.is_alive():
            kind, value = _outcome(folder, rank, process)
            if kind == "failure":
                failures.append((path.stat().st_mtime_ns if path.exists() else 0, rank, value))
    _, rank, value = min(failures)
    return f"rank {rank} of {len(processes)} failed:\n{value}"


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `function(*args)` on every rank of a fresh gloo group; returns the results in rank order.

    The function stands at the top of a module, its arguments and results can be pickled. Starting the processes costs
    seconds: test many cases in one call. Raises RankFailed with the traceback of the rank that failed first, or with
    the ranks that had not ended after `timeout` seconds.
    """
    context = mp.get_context("spawn")
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        processes = [
            context.Process(target=_run_rank, args=(rank, world_size, temporary, timeout, function, args), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            running = dict(enumerate(processes))
            results: dict[int, Any] = {}
            while running:
                left = deadline - time.monotonic()
                ended = wait([process.sentinel for process in running.values()], timeout=max(0.0, left))
                if not ended:
                    raise RankFailed(f"{function.__name__}: ranks {list(running)} did not end in {timeout:.0f} s")
                for rank, process in list(running.items()):
                    if process.sentinel in ended:
                        process.join()
                        kind, value = _outcome(folder, rank, process)
                        if kind == "failure":
                            raise RankFailed(f"{function.__name__}: {_first_failure(folder, processes)}")
                        results[rank] = value
                        del running[rank]
        finally:
            for process in processes:
                if process.pid is not None and process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
    return [results[rank] for rank in range(world_size)]
