"""The demo, as a newcomer runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run_demo(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Runs `symile-dist demo` in an empty folder; returns its results and what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.run(
        [sys.executable, "-m", "symile_dist.cli", "demo", "--plain", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    return json.loads((folder / "runs" / "demo" / "results.json").read_text()), process.stdout


def check_what_it_leaves(folder: Path, printed: str) -> None:
    out = folder / "runs" / "demo"
    for name in ("learning_curves.png", "learning_curves.svg", "results.md"):
        assert (out / name).stat().st_size > 100, f"{name} is empty"
    for objective in ("symile", "pairwise_clip"):
        assert list((out / objective / "checkpoints").glob("step-*/manifest.json"))
        assert list((out / objective / "evaluation").glob("test-step-*.json"))
    assert "Symile" in printed and "pairwise CLIP" in printed and "chance" in printed
    for command in ("symile-dist evaluate", "symile-dist resume", "symile-dist config explain"):
        assert command in printed, f"it does not say what to try next: {command}"


def test_quick_demo_goes_through_the_whole_chain_and_again_in_the_same_folder(tmp_path: Path) -> None:
    results, printed = run_demo(tmp_path, "--quick")
    check_what_it_leaves(tmp_path, printed)
    assert [run["steps"] for run in results["runs"].values()] == [20, 20]
    again, _ = run_demo(tmp_path, "--quick")
    for objective, run in results["runs"].items():
        assert again["runs"][objective]["accuracy"] == run["accuracy"], f"{objective}: the second call differs"
        assert again["runs"][objective]["seconds"] < 5, f"{objective}: was trained again"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_demo_reaches_its_figures(tmp_path: Path) -> None:
    results, printed = run_demo(tmp_path)
    check_what_it_leaves(tmp_path, printed)
    symile, clip = results["runs"]["symile"]["accuracy"], results["runs"]["pairwise_clip"]["accuracy"]
    assert symile >= 0.80, f"Symile reached {symile:.3f}"
    assert clip <= 0.23, f"pairwise CLIP reached {clip:.3f}, above what pairs can tell"
    assert clip >= 0.05, f"pairwise CLIP reached {clip:.3f}: it did not learn at all, which is no fair comparison"
