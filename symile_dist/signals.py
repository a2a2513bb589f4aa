"""What a process does when it is told to end."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator

SAME_SECONDS = 0.5
"""Signals that come within so long are one."""


@contextlib.contextmanager
def _handled_as_before(*numbers: signal.Signals) -> Iterator[bool]:
    """Sets handlers back at the end. False outside the main thread, where there are none to set."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    before = {each: signal.getsignal(each) for each in numbers}
    try:
        yield True
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """What runs inside may set handlers of its own for SIGINT and SIGTERM, as Ray does, and leave them behind."""
    with _handled_as_before(signal.SIGTERM, signal.SIGINT):
        yield


@contextlib.contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Processes that are started inside are deaf to SIGTERM: `timeout`, systemd and Slurm send it to all of a job's,
    and this one is to end them, once everything is saved."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def terminating(grace_seconds: float) -> Iterator[threading.Event]:
    """SIGTERM, which Slurm, Kubernetes and `timeout` send, sets the event: there is time to save. A second one, or the
    end of the grace, raises KeyboardInterrupt. (`timeout` sends it twice, to the process and to its group.) SIGUSR1
    does the same: Slurm's srun passes it on, and not SIGTERM."""
    terminated = threading.Event()
    ends_at = math.inf

    def ask(number: int, frame: object) -> None:
        nonlocal ends_at
        if not terminated.is_set():
            ends_at = time.monotonic() + min(SAME_SECONDS, grace_seconds)
            terminated.set()
            over.start()
        elif time.monotonic() >= ends_at:
            raise KeyboardInterrupt

    over = threading.Timer(grace_seconds, os.kill, (os.getpid(), signal.SIGTERM))
    over.daemon = True
    with _handled_as_before(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) as here:
        if here:
            signal.signal(signal.SIGTERM, ask)
            signal.signal(signal.SIGUSR1, ask)
        try:
            yield terminated
        finally:
            over.cancel()


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does; Ray's own handler aborts."""
    with _handled_as_before(signal.SIGTERM, signal.SIGINT) as here:
        if here:
            signal.signal(signal.SIGTERM, _interrupt)
        yield
