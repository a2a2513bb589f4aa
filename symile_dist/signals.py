"""What a process does when it is told to end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


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
def terminating(grace_seconds: float) -> Iterator[threading.Event]:
    """SIGTERM, which Slurm, Kubernetes and `timeout` send, sets the event: there is time to save. A second one, or the
    end of the grace, raises KeyboardInterrupt."""
    terminated = threading.Event()
    over = threading.Timer(grace_seconds, os.kill, (os.getpid(), signal.SIGTERM))
    over.daemon = True

    def ask(number: int, frame: object) -> None:
        terminated.set()
        signal.signal(signal.SIGTERM, _interrupt)
        over.start()

    # (SIGINT: Ray Train leaves a handler of its own behind.)
    with _handled_as_before(signal.SIGTERM, signal.SIGINT) as here:
        if here:
            signal.signal(signal.SIGTERM, ask)
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
