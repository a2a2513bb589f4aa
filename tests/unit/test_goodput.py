"""Goodput: every second in one state, whatever happens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from symile_dist.metrics.goodput import PENDING, Goodput, read_goodput, write_goodput


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, goodput: Goodput, seconds: float) -> None:
        """In steps of a quarter of a second, as the driver looks."""
        for _ in range(round(seconds / 0.25)):
            self.now += 0.25
            goodput.seconds()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_steps_wait_for_their_checkpoint(clock: Clock) -> None:
    goodput = Goodput(clock=clock, date=clock)
    clock.passes(goodput, 10)
    goodput.stepping()
    clock.passes(goodput, 20)
    assert goodput.seconds() == pytest.approx({**dict.fromkeys(goodput.seconds(), 0), "init": 10, PENDING: 20})
    goodput.spent("eval", 3)
    goodput.spent("checkpoint", 1)
    clock.passes(goodput, 4)
    goodput.saved(seconds_ago=4)
    seconds = goodput.seconds()
    assert (seconds["productive"], seconds["eval"], seconds["checkpoint"]) == pytest.approx((16, 3, 1))
    assert seconds[PENDING] == pytest.approx(4), "what came after the save began is not saved"


def test_a_failure_loses_what_is_not_saved(clock: Clock) -> None:
    goodput = Goodput(clock=clock, date=clock)
    goodput.stepping()
    clock.passes(goodput, 8)
    goodput.saved(0)
    clock.passes(goodput, 5)
    goodput.failed("rank_lost")
    clock.passes(goodput, 6)
    goodput.stepping()
    clock.passes(goodput, 7)
    goodput.end()
    seconds = goodput.seconds()
    assert seconds["productive"] == pytest.approx(8)
    assert seconds["lost"] == pytest.approx(5)
    assert seconds["restart"] == pytest.approx(6)
    assert seconds["checkpoint"] == pytest.approx(7), "the end waits for the last save"
    assert goodput.restarts == {"rank_lost": 1}


def test_a_run_that_goes_back_loses_its_steps(clock: Clock) -> None:
    goodput = Goodput(clock=clock, date=clock)
    goodput.stepping()
    clock.passes(goodput, 5)
    goodput.went_back()
    clock.passes(goodput, 2)
    goodput.saved(0)
    assert (goodput.seconds()["lost"], goodput.seconds()["productive"]) == pytest.approx((5, 2))


@pytest.mark.parametrize("ended", [True, False])
def test_the_next_driver_counts_on(clock: Clock, tmp_path: Path, ended: bool) -> None:
    goodput = Goodput(clock=clock, date=clock)
    goodput.stepping()
    clock.passes(goodput, 10)
    goodput.saved(4)
    goodput.failed("hang")
    goodput.stepping()
    clock.passes(goodput, 3)
    if ended:
        goodput.end()
    write_goodput(tmp_path, goodput.told(ended))
    clock.now += 100
    other = Goodput(read_goodput(tmp_path), clock=clock, date=clock)
    clock.passes(other, 2)
    seconds = other.seconds()
    assert seconds["productive"] == pytest.approx(6, abs=0.5)
    assert other.restarts == {"hang": 1}
    if ended:  # nobody wanted it to run in between
        assert sum(seconds.values()) == pytest.approx(15, abs=0.01)
        assert seconds["init"] == pytest.approx(2)
    else:  # its driver was killed
        assert sum(seconds.values()) == pytest.approx(115, abs=0.01)
        assert seconds["restart"] == pytest.approx(102)
        assert seconds["lost"] == pytest.approx(7, abs=0.5)


@pytest.mark.parametrize("seed", range(20))
def test_every_second_counts_once(clock: Clock, seed: int) -> None:
    draw = random.Random(seed)
    goodput = Goodput(clock=clock, date=clock)
    for _ in range(200):
        clock.passes(goodput, draw.choice([0, 0.25, 1, 17]))
        draw.choice(
            [
                goodput.stepping,
                lambda: goodput.spent("eval", draw.random() * 30),
                lambda: goodput.spent("checkpoint", draw.random()),
                lambda: goodput.saved(draw.random() * 5),
                lambda: goodput.failed("other"),
                goodput.went_back,
                goodput.restarting,
            ]
        )()
        seconds = goodput.seconds()
        assert min(seconds.values()) >= 0
        assert sum(seconds.values()) == pytest.approx(clock.now - 1000)


@pytest.mark.parametrize("content", ["", "[]", '{"seconds": 3}', "nothing"])
def test_an_account_that_cannot_be_read_is_begun_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "goodput.json").write_text(content)
    assert read_goodput(tmp_path) == {}
