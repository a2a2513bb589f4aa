"""Lease, signs of life, restarts, save interval, failpoints: the decisions, without a run."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from symile_dist.checkpoint.interval import FIRST_SECONDS, MOST_OVERHEAD, SaveInterval
from symile_dist.config import CheckpointConfig
from symile_dist.errors import RunFailed
from symile_dist.failpoints import VARIABLE, failpoint
from symile_dist.health import lease as lease_module
from symile_dist.health.beat import Beat, signs_of_life
from symile_dist.health.lease import current_fence, lease_file, locked, superseded
from symile_dist.health.restarts import LONGEST_WAIT, Failure, Restarts
from symile_dist.health.watchdog import watch

# -- lease -----------------------------------------------------------------------------------------------------------


def holder(directory: Path, code: str) -> subprocess.Popen[str]:
    """A process that holds the directory's lease, says so, and then runs some code."""
    program = (
        "import pathlib, sys, time\nfrom symile_dist.health.lease import locked\n"
        f"with locked(pathlib.Path(sys.argv[1])) as lease:\n    print('held', flush=True)\n    {code}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_second_job_is_refused_in_words_and_a_dead_owners_lease_taken_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    other = holder(run, "time.sleep(600)")
    try:
        fence = current_fence(run)
        # Stopped, it still holds it: it may wake up.
        for number in (None, signal.SIGSTOP):
            if number:
                other.send_signal(number)
            with (
                pytest.raises(ValueError, match=rf"process {other.pid} on {socket.gethostname()} trains here already"),
                locked(run),
            ):
                pass
        assert current_fence(run) == fence, "a refused job changed the lease"
    finally:
        other.kill()
        other.wait()
    with locked(run) as lease:
        assert lease.fence == fence + 1
        assert superseded(run, fence) and f"fence {fence + 1}" in str(superseded(run, fence))
        assert superseded(run, lease.fence) is None
        # What was started under a former number may commit nothing, even of the same process.
        former = lease.fence
        assert lease.advance() == former + 1 and superseded(run, former)


def test_a_holder_on_another_machine_counts_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lease_module, "SILENT_SECONDS", 0.2)
    content = {"fence": 7, "process": 1, "host": "elsewhere", "beat": 3, "released": False}
    lease_file(run).write_text(json.dumps(content))
    reads = iter(range(100))
    real = lease_module._read

    def alive(path: Path) -> dict[str, object]:
        return {**real(path), "beat": next(reads)}

    with monkeypatch.context() as patch:
        patch.setattr(lease_module, "_read", alive)
        with pytest.raises(ValueError, match="process 1 on elsewhere trains here already"), locked(run):
            pass
    with locked(run) as lease:  # silent: dead
        assert lease.fence == 8


def test_a_lease_that_ends_is_given_back(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        pass
    assert json.loads(lease_file(tmp_path / "run").read_text())["released"] is True


def test_an_owner_that_was_taken_for_dead_notices_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked(run) as lease:
        # On another machine, whose locks this one does not see, somebody has found it silent.
        taken = {"fence": lease.fence + 1, "process": 1, "host": "elsewhere", "beat": 1, "released": False}
        lease_file(run).write_text(json.dumps(taken).ljust(512))
        with pytest.raises(RunFailed, match="process 1 on elsewhere has taken the run over"):
            lease.advance()
    assert json.loads(lease_file(run).read_text()) == taken, "it wrote over the new owner's"


# -- signs of life -----------------------------------------------------------------------------------------------------


def test_signs_of_life_are_those_of_one_attempt(tmp_path: Path) -> None:
    Beat(tmp_path, rank=1, fence=4, place="here-0")(99)
    beats = [Beat(tmp_path, rank, fence=5, place="here-0") for rank in (0, 1)]
    beats[0](12)
    beats[0](13)
    found = signs_of_life(tmp_path, 5)
    assert {rank: (sign.step, sign.signs, sign.pid) for rank, sign in found.items()} == {
        0: (13, 3, os.getpid()),
        1: (-1, 1, os.getpid()),
    }
    assert signs_of_life(tmp_path, 6) == {}


def test_a_watchdog_that_cannot_write_kills_nevertheless(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom symile_dist.health.beat import Beat\n"
        "Beat(Path(sys.argv[1]), 0, 1, 'here-0')(3)\nprint('up', flush=True)\ntime.sleep(60)"
    )
    rank = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout and rank.stdout.readline() == "up\n"
        (tmp_path / "logs").write_text("no folder can be here")
        with pytest.raises(OSError):
            watch(tmp_path, 1, "here-0", hang_seconds=0.1, parent=os.getppid())
        assert rank.wait(10) == -signal.SIGKILL
    finally:
        rank.kill()


# -- restarts ----------------------------------------------------------------------------------------------------------


def lost(step: int | None, checkpoint: int, cause: str = "rank_lost", node: str | None = "n") -> Failure:
    return Failure(cause, "rank 1 was lost", step, 1, node, checkpoint)


def after(restarts: Restarts, *failures: Failure) -> Restarts:
    for failure in failures:
        assert restarts.failures == [] or restarts.gives_up() is None, "it had given up before"
        restarts.add(failure)
    return restarts


def test_failures_with_progress_between_them_are_survived_for_ever() -> None:
    restarts = after(Restarts(2, 3, 0), *(lost(10 * k + k % 7, 10 * k) for k in range(50)))
    assert restarts.gives_up() is None and restarts.wait_seconds() == 0


def test_failures_without_progress_wait_longer_and_end_the_run() -> None:
    restarts = Restarts(3, 0, 0)
    waits = []
    for step in (1, 2, 3):
        waits.append(after(restarts, lost(step, 0)).wait_seconds())
    assert waits == [0, 1, 2]
    assert "failed 4 times without a new checkpoint" in str(after(restarts, lost(4, 0)).gives_up())
    unlimited = after(Restarts(-1, 0, 0), *(lost(step, 0) for step in range(40)))
    assert unlimited.gives_up() is None and unlimited.wait_seconds() == LONGEST_WAIT


def test_a_step_that_always_fails_is_to_blame_but_not_for_a_lost_node() -> None:
    again = after(Restarts(-1, 3, 0), *(lost(57, 50, "other") for _ in range(3)))
    assert again.gives_up() == "step 57 failed 3 times (ray.max_repeats)"
    assert after(Restarts(-1, 3, 0), lost(57, 50), lost(58, 50), lost(57, 50)).gives_up() is None
    assert after(Restarts(-1, 3, 0), *(lost(57, 50, "node_lost") for _ in range(3))).gives_up() is None
    assert after(Restarts(-1, 3, 0), *(lost(None, 50) for _ in range(9))).gives_up() is None


def test_a_node_that_keeps_failing_is_left_out() -> None:
    restarts = after(Restarts(-1, 0, 2), lost(1, 0, node="a"), lost(2, 0, node="b"), lost(3, 0, node="a"))
    assert restarts.left_out() == {"a"}
    assert after(Restarts(-1, 0, 0), *(lost(k, 0, node="a") for k in range(9))).left_out() == set()


# -- save interval -----------------------------------------------------------------------------------------------------


def test_saves_are_due_by_steps_minutes_or_both() -> None:
    by_steps = SaveInterval(CheckpointConfig(every=10), 1, now=0.0)
    assert [step for step in range(1, 31) if by_steps.due(step, 1e9)] == [10, 20, 30]
    both = SaveInterval(CheckpointConfig(every=10, every_minutes=2), 1, now=1000.0)
    assert not both.due(7, 1119.0) and both.due(7, 1120.0) and both.due(10, 1001.0)
    both.saved(1120.0, 0.1)
    assert not both.due(11, 1121.0) and both.due(11, 1240.0)
    assert not SaveInterval(CheckpointConfig(), 1, now=0.0).due(10, 1e9)


def test_the_automatic_interval_is_youngs_and_never_costs_much() -> None:
    interval = SaveInterval(CheckpointConfig(every="auto"), 1024, now=0.0)
    assert interval.mean_time_to_failure == pytest.approx(7.8 * 3600, rel=0.02)
    assert interval.seconds() == FIRST_SECONDS
    interval.saved(60.0, 0.5)
    assert interval.seconds() == pytest.approx(math.sqrt(2 * 0.5 * 8000 * 3600 / 1024))
    # It fails once an hour: more often; a long stall: no more than half a percent of the time.
    failing = SaveInterval(CheckpointConfig(every="auto"), 1024, now=0.0, failures=24, hours=24)
    failing.saved(0.0, 0.5)
    assert (failing.seconds() or 0) < (interval.seconds() or 0)
    slow = SaveInterval(CheckpointConfig(every="auto"), 16384, now=0.0)
    slow.saved(0.0, 30.0)
    assert 30.0 / (slow.seconds() or 0) <= MOST_OVERHEAD


def test_a_save_costs_what_steps_beside_it_are_slower() -> None:
    interval = SaveInterval(CheckpointConfig(every="auto"), 1024, now=0.0)
    for seconds in (0.9, 0.2, 0.21, 0.19, 0.2):  # the first step is no measure
        interval.stepped(seconds, saving=False)
    interval.saved(60.0, 0.1)
    for _ in range(4):
        interval.stepped(0.3, saving=True)
    expected = math.sqrt(2 * (0.1 + 4 * 0.1) * 8000 * 3600 / 1024)
    assert interval.seconds() == pytest.approx(max(expected, 0.5 / MOST_OVERHEAD))
    interval.stepped(0.2, saving=False)
    assert interval.seconds() == pytest.approx(max(expected, 0.5 / MOST_OVERHEAD)), "it is over"
    # Steps that happen to be faster make no save free: the interval does not vanish.
    lucky = SaveInterval(CheckpointConfig(every="auto"), 8, now=0.0)
    lucky.stepped(0.2, saving=False)
    lucky.saved(60.0, 0.01)
    lucky.stepped(0.1, saving=True)
    assert (lucky.seconds() or 0) >= 10


# -- failpoints --------------------------------------------------------------------------------------------------------


def test_a_failpoint_acts_where_and_when_it_was_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failpoint("here", 0, 0)  # without the variable nothing happens
    once = tmp_path / "once"
    fault = {"at": "here", "rank": 1, "step": 20, "do": "raise", "once": str(once)}
    monkeypatch.setenv(VARIABLE, json.dumps([fault]))
    for at, rank, step in (("there", 1, 20), ("here", 0, 20), ("here", 1, 19)):
        failpoint(at, rank, step)
    with pytest.raises(OSError, match="No space left"):
        failpoint("here", 1, 20)
    failpoint("here", 1, 20)  # once
    assert once.exists()
