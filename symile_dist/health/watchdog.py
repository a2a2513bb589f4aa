"""Watches the ranks of a node from a process of its own: a rank that is stuck cannot watch itself.

Where the ranks give no sign of life for too long, their stacks go into the run's logs, and they are killed: the driver
sees that they are lost, and restarts the group.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from symile_dist.health.beat import HEALTH, SignOfLife, signs_of_life

POLL_SECONDS = 0.5
FLIGHT_RECORD_SECONDS = 5.0
"""For writing it."""


def start_watchdog(run_directory: Path, fence: int, place: str, hang_seconds: float) -> subprocess.Popen[bytes]:
    """Watches this node's ranks of an attempt as long as the calling process lives."""
    arguments = [str(run_directory), str(fence), place, str(hang_seconds), str(os.getpid())]
    return subprocess.Popen([sys.executable, "-m", "symile_dist.health.watchdog", *arguments])


def flight_recorder(run_directory: Path, fence: int) -> dict[str, str]:
    """The environment in which NCCL's process groups remember their last collectives, and write them to the run's logs
    when one times out or the watchdog asks for it (PyTorch's ProcessGroupNCCL environment variables)."""
    prefix = str(_flight_record(run_directory, fence, ""))
    return {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": prefix,
    }


def _flight_record(run_directory: Path, fence: int, end: str) -> Path:
    return run_directory / "logs" / f"nccl-{fence:06d}-rank-{end}"


def hang_of(run_directory: Path, fence: int) -> str | None:
    """What the watchdog of an attempt found, in words; None where it found nothing."""
    found = sorted((run_directory / HEALTH).glob(f"hang-{fence:06d}-*.txt"))
    return found[0].read_text().strip() if found else None


def watch(run_directory: Path, fence: int, place: str, hang_seconds: float, parent: int) -> None:
    """Returns when the parent has ended, or when the ranks were stuck and have been killed."""
    counts: dict[int, int] = {}
    changed: dict[int, float] = {}
    while os.getppid() == parent:
        ranks = [sign for sign in signs_of_life(run_directory, fence).values() if sign.place == place]
        now = time.monotonic()
        for sign in ranks:
            if counts.get(sign.rank) != sign.signs:
                counts[sign.rank], changed[sign.rank] = sign.signs, now
        # All ranks wait for the slowest: when one is stuck, so are all. The first to have fallen silent is told.
        if ranks and all(now - changed[sign.rank] > hang_seconds for sign in ranks):
            _end(run_directory, fence, place, ranks, hang_seconds)
            return
        time.sleep(POLL_SECONDS)


def _end(run_directory: Path, fence: int, place: str, ranks: list[SignOfLife], hang_seconds: float) -> None:
    try:
        _tell(run_directory, fence, place, ranks, hang_seconds)
    finally:  # a full disk, say, which may be what they hang in
        for sign in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(sign.pid, signal.SIGKILL)


def _tell(run_directory: Path, fence: int, place: str, ranks: list[SignOfLife], hang_seconds: float) -> None:
    ranks = sorted(ranks)
    first = min(sign.step for sign in ranks)
    behind = [str(sign.rank) for sign in ranks if sign.step == first]
    stacks = run_directory / "logs" / f"stacks-{fence:06d}-{place}.txt"
    stacks.parent.mkdir(parents=True, exist_ok=True)
    with open(stacks, "wb") as file:
        for sign in ranks:
            file.write(f"== rank {sign.rank}, process {sign.pid}, in step {sign.step + 1}\n".encode())
            file.write(_stack(sign.pid))
    pipes = [_flight_record(run_directory, fence, f"{sign.rank}.pipe") for sign in ranks]
    if sum(_ask_for_flight_record(pipe) for pipe in pipes):
        time.sleep(FLIGHT_RECORD_SECONDS)
    which = f" (behind: rank {', '.join(behind)})" if len(behind) < len(ranks) else ""
    words = f"no step was finished for {hang_seconds:g} s on {place}{which}; stacks in {stacks}"
    (run_directory / HEALTH / f"hang-{fence:06d}-{place}.txt").write_text(words)


def _ask_for_flight_record(pipe: Path) -> bool:
    """Whether there is a process group of NCCL's to ask."""
    try:
        with open(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "w") as file:
            file.write("1\n")
    except OSError:  # no pipe: gloo; nobody reads it: the rank is stopped
        return False
    return True


def _stack(pid: int) -> bytes:
    """What a process is doing, by py-spy: it asks nothing of the process itself."""
    command = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    try:
        # --nonblocking: a stopped process is looked at as it is.
        found = subprocess.run([command, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"(no stack: {error})\n\n".encode()
    if found.returncode:  # it may not look, in a container without ptrace: the rank's own handler writes to its log
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
        return b"(py-spy may not look at it: " + found.stderr.strip() + b"; see the rank's own log)\n\n"
    return found.stdout + b"\n"


if __name__ == "__main__":
    directory, number, name, limit, pid = sys.argv[1:]
    watch(Path(directory), int(number), name, float(limit), int(pid))
