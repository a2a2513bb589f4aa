"""What all ranks say together, and who is behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from symile_dist.metrics.names import OWN_PHASES, PHASES
from symile_dist.metrics.ranks import gathered, slowest, summary


def phases(**seconds: float) -> dict[str, float]:
    return {**dict.fromkeys(PHASES, 0.0), **seconds}


def test_who_works_longest_is_behind_and_who_waits_is_not() -> None:
    ranks = [
        phases(forward=1.0, loss=0.1, gather=0.5),
        phases(forward=1.4, loss=0.1, gather=0.1),
        phases(forward=1.0, loss=0.1, gather=0.5),
    ]
    found = slowest(ranks)
    assert found is not None and (found["rank"], found["phase"]) == (1, "forward")
    assert found["seconds"] == pytest.approx(0.4) and found["ratio"] == pytest.approx(1.5 / 1.1)


@pytest.mark.parametrize("phase", OWN_PHASES)
def test_the_phase_in_which_it_is_behind_is_named(phase: str) -> None:
    ranks = [phases(forward=1.0, data_wait=0.1, h2d=0.1, loss=0.3) for _ in range(5)]
    ranks[3][phase] += 0.2
    found = slowest(ranks)
    assert found is not None and (found["rank"], found["phase"]) == (3, phase)


def test_nobody_is_behind() -> None:
    assert slowest([phases(forward=1.0)]) is None
    assert slowest([phases(forward=1.0), phases(forward=1.0)]) is None
    assert slowest([phases(), phases()]) is None


def test_one_rank_gathers_its_own() -> None:
    own = {
        "phases.forward": 0.25,
        "step_seconds": 0.5,
        "memory_bytes": 3e9,
        "data_bytes": 12345678901.0,
        "missing/a": 0.5,
    }
    row = gathered(own, ["a", "b"], torch.device("cpu"))[0]
    assert row["phases.forward"] == 0.25 and row["memory_bytes"] == 3e9 and row["data_bytes"] == 12345678901
    assert row["missing/a"] == 0.5 and row["missing/b"] == 0


def test_the_summary_of_a_step() -> None:
    own: list[dict[str, Any]] = [
        {"phases.forward": 1.0, "memory_bytes": 5, "data_bytes": 10, "missing/a": 0.25},
        {"phases.forward": 2.0, "memory_bytes": 7, "data_bytes": 20, "missing/a": 0.75},
    ]
    table = [gathered(each, ["a", "b"], torch.device("cpu"))[0] for each in own]
    told = summary(table, ["a", "b"])
    assert told["phases"]["forward"] == 1.5 and set(told["phases"]) == set(PHASES)
    assert (told["memory_bytes"], told["data_bytes"], told["missing/a"]) == (7, 30, 0.5)
    assert "missing/b" not in told and told["slowest"]["rank"] == 1
