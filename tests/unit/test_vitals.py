"""Signs of learning and of collapse, and how seldom they are looked for."""

from __future__ import annotations

import math

import pytest
import torch

from symile_dist.similarity import MIPSimilarity
from symile_dist.types import Batch, PointSet
from symile_dist.vitals import ROWS, SECOND_LOOK_SECONDS, SHARE, Vitals


def batch(rows: int, valid: int | None = None) -> Batch:
    there = torch.arange(rows) < (rows if valid is None else valid)
    return Batch({}, torch.ones(rows, 3, dtype=torch.bool), there, torch.arange(rows))


def vectors(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, 8, generator=generator) for name in "abc"}


def test_a_healthy_model() -> None:
    a, b, _ = vectors(64).values()
    found = Vitals(MIPSimilarity(), None).look({"a": a.sign(), "b": b.sign(), "c": (a * b).sign()}, batch(64))
    assert set(found) == {
        "alignment",
        *(f"{what}/{name}" for what in ("uniformity", "effective_rank") for name in "abc"),
        *(f"batch_accuracy/{x}_from_{y}" for x, y in (("a", "b_c"), ("b", "a_c"), ("c", "a_b"))),
    }
    assert found["batch_accuracy/c_from_a_b"] > 0.8 and found["effective_rank/a"] > 6 and found["uniformity/a"] < -2


def test_a_collapsed_encoder() -> None:
    same = vectors(64) | {"b": torch.ones(64, 8)}
    found = Vitals(MIPSimilarity(), None).look(same, batch(64))
    assert found["effective_rank/b"] == pytest.approx(1, abs=0.01) and found["uniformity/b"] == pytest.approx(
        0, abs=1e-6
    )
    assert found["effective_rank/a"] > 6


def test_rows_without_a_sample_do_not_count() -> None:
    spoilt = vectors(64)
    for value in spoilt.values():
        value[40:] = math.nan
    found = Vitals(MIPSimilarity(), None).look(spoilt, batch(64, valid=40))
    assert all(math.isfinite(value) for value in found.values()), found
    assert Vitals(MIPSimilarity(), None).look(spoilt, batch(64, valid=1)) == {}


def test_no_more_rows_than_are_cheap() -> None:
    many = Vitals(MIPSimilarity(), None).look(vectors(4 * ROWS), batch(4 * ROWS))
    few = Vitals(MIPSimilarity(), None).look({k: v[:ROWS] for k, v in vectors(4 * ROWS).items()}, batch(ROWS))
    assert many == few


def test_point_sets_without_vectors() -> None:
    points = PointSet(torch.ones(4, 2, 8), torch.ones(4, 2), torch.full((4,), 2))
    assert Vitals(None, None).look({"a": points, "b": points}, batch(4)) == {}
    found = Vitals(None, lambda given: {name: value.vectors[:, 0] for name, value in given.items()}).look(
        {"a": points, "b": points}, batch(4)
    )
    assert found["alignment"] == pytest.approx(0)


def test_it_looks_so_seldom_that_nobody_feels_it() -> None:
    now, cost = [0.0], [3.0]

    def clock() -> float:
        now[0] += cost[0] / 2  # asked before and after a look, each of which so takes `cost`
        return now[0]

    vitals = Vitals(MIPSimilarity(), None, clock)

    def looked(moment: float) -> bool:
        now[0] = moment
        return bool(vitals.look(vectors(8), batch(8)))

    assert looked(0), "the first"
    cost[0] = 0.02
    assert not looked(SECOND_LOOK_SECONDS - 1) and looked(SECOND_LOOK_SECONDS + 10)
    after = now[0]
    assert not looked(after + 0.9 * 0.01 / SHARE) and looked(after + 0.01 / SHARE + 1), "a slow first look counts"
