"""The table of what bounds the phases of a profiled step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from symile_dist.metrics.profiling import Operation, Phase, StepProfiler, as_text, kind_of, segments, table
from symile_dist.metrics.recorder import Recorder
from symile_dist.spans import OTHER


def test_the_innermost_phase_of_every_moment() -> None:
    phases = [Phase("loss", 10, 50), Phase("gather", 20, 30), Phase("gather", 30, 35), Phase("backward", 60, 70)]
    assert segments(phases)[1:] == [
        (10, "loss"),
        (20, "gather"),
        (30, "loss"),
        (30, "gather"),
        (35, "loss"),
        (50, OTHER),
        (60, "backward"),
        (70, OTHER),
    ]


def test_a_phase_around_hundreds_of_others() -> None:
    inner = [Phase("forward", 10 * i + 1, 10 * i + 4) for i in range(300)]
    rows = {row["phase"]: row for row in table([Phase("backward", 0, 3000), *inner], [], [], steps=2)}
    assert rows["forward"]["seconds"] == pytest.approx(300 * 3 / 2 / 1e6)
    assert rows["backward"]["seconds"] == pytest.approx((3000 - 900) / 2 / 1e6)


def test_what_bounds_a_phase() -> None:
    phases = [Phase("forward", 0, 100), Phase("optimizer", 100, 200), Phase("data_wait", 200, 300)]
    host = [Operation("aten::mm", 1, 60), Operation("aten::add", 70, 20), Operation("aten::add", 110, 10)]
    rows = {row["phase"]: row for row in table(phases, host, [], steps=1)}
    assert "products" in rows["forward"]["bound_by"]
    assert "the host" in rows["optimizer"]["bound_by"]
    assert "data" in rows["data_wait"]["bound_by"]
    device = [Operation("ampere_sgemm", 10, 20), Operation("ncclDevKernel_AllGather", 40, 50)]
    rows = {row["phase"]: row for row in table(phases, host, device, steps=1)}
    assert "collectives" in rows["forward"]["bound_by"]
    assert "idle" in rows["optimizer"]["bound_by"]


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::convolution_backward", "products"),
        ("c10d::allreduce_", "collectives"),
        ("Memcpy HtoD", "copies"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::gelu", "elements"),
    ],
)
def test_kinds_of_operators(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


def test_the_steps_asked_for_are_profiled_and_no_others(tmp_path: Path) -> None:
    train = SimpleNamespace(profile_steps=(2, 3), profile_ranks=[0])
    config: Any = SimpleNamespace(train=train, run_directory=tmp_path)
    recorder = Recorder()
    profiler, other = StepProfiler(config, 0, recorder), StepProfiler(config, 1, recorder)
    for step in range(1, 6):
        profiler.before(step)
        other.before(step)
        with recorder.phase("forward"):
            torch.randn(64, 64) @ torch.randn(64, 64)
        profiler.after(step)
        other.after(step)
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    stem = "rank-00000-steps-2-3"
    assert names == [f"{stem}.json", f"{stem}.md", f"{stem}.trace.json.gz"]
    told = json.loads((tmp_path / "profile" / f"{stem}.json").read_text())
    assert "forward" in {row["phase"] for row in told["phases"]}
    assert "| forward |" in (tmp_path / "profile" / f"{stem}.md").read_text()


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    train = SimpleNamespace(profile_steps=(1, 1), profile_ranks=[0])
    config: Any = SimpleNamespace(train=train, run_directory=tmp_path)
    profiler = StepProfiler(config, 0, Recorder())
    profiler.before(1)
    profiler.after(1)
    profiler.before(1)


def test_the_text_of_a_table() -> None:
    rows = [{"phase": "loss", "seconds": 0.25, "bound_by": "x", "operators": {"aten::mm": 0.1}}]
    assert "| loss | 250.00 | 50% | x | aten::mm 100.00 |" in as_text(rows, "Rank 0", 0.5)


def test_what_was_profiled_before_the_loop_ended_is_kept(tmp_path: Path) -> None:
    train = SimpleNamespace(profile_steps=(2, 9), profile_ranks=[0])
    config: Any = SimpleNamespace(train=train, run_directory=tmp_path)
    profiler = StepProfiler(config, 0, Recorder())
    profiler.finish(1)
    for step in (2, 3):
        profiler.before(step)
        profiler.after(step)
    profiler.finish(3)
    assert (tmp_path / "profile" / "rank-00000-steps-2-3.md").exists()
