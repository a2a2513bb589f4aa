"""SIGTERM: time to save, and the end of it."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from symile_dist.signals import SAME_SECONDS, terminated_like_interrupted, terminating


def handler() -> object:
    return signal.getsignal(signal.SIGTERM)


def test_sigterm_leaves_time_and_a_second_one_ends_it() -> None:
    before = handler()
    with pytest.raises(KeyboardInterrupt), terminating(grace_seconds=60) as terminated:
        os.kill(os.getpid(), signal.SIGTERM)
        assert terminated.wait(5)
        os.kill(os.getpid(), signal.SIGTERM)  # `timeout` sends it twice at once: that is one
        time.sleep(2 * SAME_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert handler() == before, "the handler stays"
    assert all(type(thread) is not threading.Timer or thread.finished.is_set() for thread in threading.enumerate())


def test_the_end_of_the_grace_is_a_second_sigterm() -> None:
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), terminating(grace_seconds=0.2) as terminated:
        os.kill(os.getpid(), signal.SIGTERM)
        assert terminated.wait(5)
        time.sleep(30)
    assert time.monotonic() - begin < 10


def test_what_ends_in_time_is_not_interrupted() -> None:
    with terminating(grace_seconds=0.1) as terminated:
        os.kill(os.getpid(), signal.SIGTERM)
        assert terminated.wait(5)
    time.sleep(0.3)  # past the grace: a signal now would end the test


def test_sigusr1_which_srun_passes_on_leaves_time_too() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with terminating(grace_seconds=60) as terminated:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert terminated.wait(5)
    assert signal.getsignal(signal.SIGUSR1) == before, "the handler stays"


def test_elsewhere_sigterm_is_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), terminated_like_interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_in_other_threads_nothing_is_changed() -> None:
    before, seen = handler(), []

    def enter() -> None:
        with terminating(1) as terminated:
            seen.append((handler() == before, terminated.is_set()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(True, False)]
