"""A rank's clock: each second in one phase."""

from __future__ import annotations

import threading
import time

import pytest

from symile_dist import spans
from symile_dist.spans import Spans


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    moment = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: moment[0])
    return moment


def test_a_phase_within_another_takes_its_time_from_it(now: list[float]) -> None:
    clock = Spans()
    now[0] += 1
    with clock.phase("loss"):
        now[0] += 2
        with clock.collective("all_gather"):
            now[0] += 4
        now[0] += 8
    now[0] += 16
    assert clock.take() == ({"other": 17, "loss": 10, "gather": 4}, {"all_gather": 4})
    assert clock.take() == ({"other": 0}, {})


def test_a_look_from_within_a_phase(now: list[float]) -> None:
    clock = Spans()
    with clock.phase("forward"):
        now[0] += 3
        assert clock.take()[0] == {"other": 0, "forward": 3}
        now[0] += 5
    assert clock.take()[0] == {"forward": 5, "other": 0}


def test_validation_is_not_divided(now: list[float]) -> None:
    clock = Spans()
    with clock.phase("eval"), clock.phase("forward"), clock.collective("barrier"):
        now[0] += 3
    assert clock.take() == ({"other": 0, "eval": 3}, {})


def test_an_exception_ends_its_phases(now: list[float]) -> None:
    clock = Spans()
    with pytest.raises(RuntimeError), clock.phase("backward"), clock.phase("gather"):
        raise RuntimeError
    now[0] += 1
    assert clock.take()[0]["other"] == 1


@pytest.mark.parametrize(("phase", "seen"), [("backward", True), ("loss", False)])
def test_other_threads_count_only_in_the_backward_pass(phase: str, seen: bool) -> None:
    clock = Spans()

    def autograd() -> None:
        with clock.collective("reduce_scatter"):
            pass

    with clock.phase(phase):
        thread = threading.Thread(target=autograd)
        thread.start()
        thread.join()
    assert ("reduce_scatter" in clock.take()[1]) == seen


def test_marks_of_a_profiler_are_entered() -> None:
    clock, entered = Spans(), []

    class Mark:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            entered.append(self.name)

        def __exit__(self, *error: object) -> None:
            entered.append(f"end of {self.name}")

    clock.annotate = Mark
    with clock.phase("forward"), clock.phase("h2d"):
        pass
    assert entered == ["forward", "h2d", "end of h2d", "end of forward"]


def test_without_a_clock_nothing_is_timed() -> None:
    spans.use(None)
    with spans.phase("forward"), spans.collective("all_gather"):
        pass
