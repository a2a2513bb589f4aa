"""Children, and theirs, to the last of them; and what a job has printed."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

POLL_SECONDS = 0.2
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """Grandchildren whose parents have ended become children of this process (Linux): `end_descendants` finds them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def sigterm_with_parent() -> None:
    """In a child, before it becomes another program: SIGTERM comes when its parent ends, however that ends (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def end_descendants(seconds: float = 5.0) -> None:
    """Ends every descendant of this process: asked first, killed after so many seconds."""
    me = psutil.Process()
    asked: set[int] = set()
    deadline = time.monotonic() + seconds
    while living := [child for child in me.children(recursive=True) if _lives(child)]:
        late = time.monotonic() > deadline
        for child in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                if late:
                    child.kill()
                elif child.pid not in asked:
                    asked.add(child.pid)
                    child.terminate()
        psutil.wait_procs(living, timeout=POLL_SECONDS)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return False


def identity(pid: int) -> dict[str, float]:
    """What tells a process from a later one of the same number."""
    return {"pid": pid, "started": psutil.Process(pid).create_time()}


def found(who: dict[str, float]) -> psutil.Process | None:
    """The process, if it still runs on this machine."""
    try:
        process = psutil.Process(int(who["pid"]))
        return process if abs(process.create_time() - who["started"]) < 1 and _lives(process) else None
    except psutil.NoSuchProcess:
        return None


def output_of(arguments: list[str], what: str, text: str | None = None, seconds: float = 60) -> str:
    """Standard output of a command. Raises ValueError, with what the command said, where it fails."""
    try:
        done = subprocess.run(arguments, input=text, capture_output=True, text=True, timeout=seconds, check=False)
    except FileNotFoundError:
        raise ValueError(f"{what}: the command {arguments[0]} is not here") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{what}: {arguments[0]} does not answer within {seconds:g} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise ValueError(f"{what}: {arguments[0]}: {said}")
    return done.stdout


def pieces_of(path: Path, follow: bool, ended: Callable[[], bool], ask_seconds: float = 0.0) -> Iterator[str]:
    """What a file holds, and with `follow` what is added to it until `ended`, which is asked every `ask_seconds`."""
    last, asked = not follow, -math.inf

    def over() -> bool:
        nonlocal asked
        if time.monotonic() - asked < ask_seconds:
            return False
        asked = time.monotonic()
        return ended()

    while not path.exists():
        if last:
            return
        last = over()
        time.sleep(POLL_SECONDS)
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        while True:
            piece = file.read(65536)
            if piece:
                yield piece
            elif last:
                return
            else:
                last = over()  # what was written until then is read once more
                time.sleep(0 if last else POLL_SECONDS)


def ends_with_parent(process: subprocess.Popen[bytes], asked_to_end: Callable[[], bool]) -> int | None:
    """Waits for a child; None where this process was asked to end, or its own parent has gone, before the child did."""
    parent = os.getppid()
    while process.poll() is None:
        if asked_to_end() or os.getppid() != parent:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
        reap_orphans(process)
    return process.returncode


def reap_orphans(child: subprocess.Popen[bytes]) -> None:
    """Takes leave of adopted processes that have ended, but for the child: whoever started that asks for its code."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != child.pid:
            os.waitpid(ended.si_pid, os.WNOHANG)


class Asked:
    """Remembers that the process was asked to end, by SIGTERM, SIGINT or, as srun passes on no other, SIGUSR2; ignores
    SIGUSR1, which is the driver's."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._ask)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _ask(self, number: int, frame: object) -> None:
        self.is_set = True

    def __call__(self) -> bool:
        return self.is_set
