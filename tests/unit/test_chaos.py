"""Chaos: what it refuses, whom it kills, what it counts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from symile_dist.config import Config
from symile_dist.health.beat import Beat, place_of
from symile_dist.health.lease import locked
from symile_dist.metrics.history import History
from symile_dist.run_directory import prepare, update_run
from symile_dist.tools.chaos import disturb, summary
from tests.unit.test_checkpoint_manager import config

__all__ = ["config"]


def history(run: Path, *steps: int, step_seconds: float) -> None:
    records = History(run, resume_step=steps[0] - 1)
    for step in steps:
        records.write("train", step, loss=1.0, step_seconds=step_seconds)
    records.close()


@pytest.fixture
def run(config: Config) -> Path:
    prepare(config, fresh=False, resume=False)
    return config.run_directory


@pytest.mark.parametrize(
    ("every", "faults", "words"),
    [
        ((0, 1), ("kill",), "--kill-every 0-1: should be two numbers of seconds, the smaller first"),
        ((5, 2), ("kill",), "--kill-every 5-2: should be"),
        ((1, 2), ("explode",), "unknown fault 'explode'; there are kill, stop"),
        ((1, 2), (), "unknown fault"),
        ((1, 2), ("kill",), "no rank of it trains on this machine; start it first"),
    ],
)
def test_what_cannot_be_disturbed_is_told(
    run: Path, every: tuple[float, float], faults: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        disturb(run, every, 1, faults=faults)


@pytest.mark.parametrize("seconds", [0, -5, float("nan"), float("inf")])
def test_seconds_are_a_number(run: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="--seconds"):
        disturb(run, (1, 2), seconds)


def test_it_kills_nobody_whose_number_a_dead_run_has_left(run: Path) -> None:
    with locked(run):
        Beat(run, 0, 1, place_of("node"))(10)  # this process's number, in a run that nobody holds any more
    with pytest.raises(ValueError, match="no rank of it trains"):
        disturb(run, (0.01, 0.02), 1)


def test_it_ends_in_time(run: Path) -> None:
    with locked(run) as lease:
        Beat(run, 0, lease.fence, place_of("node"))(10)
        begin = time.monotonic()
        assert disturb(run, (8, 9), 0.5)["disturbances"] == []
    assert time.monotonic() - begin < 5


def test_it_kills_a_rank_and_counts_each_surviving_step_once(run: Path) -> None:
    history(run, *range(1, 11), step_seconds=0.5)  # before chaos began: does not count
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom symile_dist.health.beat import Beat, place_of\n"
        "beat = Beat(Path(sys.argv[1]), 0, 1, place_of('node'))\nbeat(10)\nprint('up', flush=True)\ntime.sleep(60)"
    )
    with locked(run) as lease:
        rank = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
        assert rank.stdout and rank.stdout.readline() == "up\n"
        told: list[str] = []

        def tell(words: str) -> None:
            """What the driver would do when it has lost a rank: another attempt, which ends the run."""
            told.append(words)
            assert rank.wait(10) == -9
            second = Beat(run, 0, lease.advance(), place_of("node"))
            second(10)
            history(run, *range(11, 15), step_seconds=0.01)
            update_run(run, status="finished")
            os.utime(run)

        begin = time.monotonic()
        result = disturb(run, (0.05, 0.1), 30, tell=tell)
        assert time.monotonic() - begin < 20, "it did not end with the run"
    (done,) = result["disturbances"]
    assert (done["fault"], done["rank"], done["step"]) == ("kill", 0, 11) and "kill of rank 0 in step 11" in told[0]
    assert result["steps"] == 4 and result["status"] == "finished"
    assert result["goodput"] == pytest.approx(4 * 0.01 / result["seconds"])
    assert "1 disturbances" in summary(result) and "4 steps" in summary(result)
