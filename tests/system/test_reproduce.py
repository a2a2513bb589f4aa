"""The papers' experiments, each as small as it can be: every line runs, though nothing is learned in so few steps."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from symile_dist.tools.reproduce.experiments import reproduce
from symile_dist.tools.reproduce.lab import Lab
from symile_dist.tools.reproduce.m3_digits import TINY_TRAIN, digits_data
from symile_dist.tools.reproduce.names import EXPERIMENTS
from tests.processes import run_distributed

# Figures that take no training, or so little that they hold even here.
HOLD: dict[str, list[str]] = {}


def tiny(out: str, name: str, seeds: int) -> dict[str, Any]:
    return reproduce(Lab(Path(out), name, seeds=seeds, quick=True, tiny=True, processes=0)).data


def run_all(out: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """In a process of one rank: what torch and DeepSpeed take to import is paid once."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # DeepSpeed asks for them
    return {name: tiny(out, name, seeds=1) for name in names}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce")
    # Speaking takes processes of its own, which a process of `run_distributed` must not have.
    digits_data(Lab(folder, "m3-digits", seeds=1, tiny=True), 2, TINY_TRAIN)
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, dict[str, Any]]:
    (found,) = run_distributed(run_all, 1, str(out), list(EXPERIMENTS), timeout=280)
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_ends_in_a_table_checks_and_a_figure(
    results: dict[str, dict[str, Any]], out: Path, name: str
) -> None:
    result = results[name]
    assert result["tables"], "no table"
    assert result["checks"], "nothing is checked"
    for table in result["tables"]:
        assert all(len(row) == len(table["header"]) for row in table["rows"]), f"a ragged table: {table['title']}"
    page = (out / name / "results.md").read_text(encoding="utf-8")
    assert f"symile-dist reproduce {name} --quick" in page, "the page does not name its command"
    for figure in result["figures"]:
        assert f"]({figure})" in page
        assert (out / name / figure).read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / name / figure).with_suffix(".svg").read_text(encoding="utf-8")[:2000]
    assert result["trials"] == len(list((out / name / "runs").glob("*/trial.json"))) and result["trial_seconds"] > 0
    assert json.loads((out / name / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    for claim in HOLD.get(name, []):
        check = next(check for check in result["checks"] if claim in check["claim"])
        assert check["holds"], check


def twice(out: str) -> list[Any]:
    """Runs an experiment, runs it again, then with a trial's result taken away."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    first = tiny(out, "xor-8", seeds=1)
    runs = Path(out, "xor-8", "runs")
    stamps = {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/trial.json")}
    second = tiny(out, "xor-8", seeds=1)
    same = {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/trial.json")} == stamps
    shutil.copytree(
        runs / "symile-seed0", runs / "symile-seed0.before-19700101-000000"
    )  # of other settings, moved aside
    (runs / "symile-seed0" / "trial.json").unlink()
    history = (runs / "symile-seed0" / "history.jsonl").read_text(encoding="utf-8")
    third = tiny(out, "xor-8", seeds=1)
    kept = (runs / "symile-seed0" / "history.jsonl").read_text(encoding="utf-8").startswith(history)
    return [first["values"], second["values"], third["values"], same, kept, third["trials"]]


def test_what_is_finished_is_not_done_again_and_what_is_not_goes_on(tmp_path: Path) -> None:
    (found,) = run_distributed(twice, 1, str(tmp_path), timeout=200)
    first, second, third, same, kept, trials = found
    assert first == second == third, "another result of the same seed"
    assert same, "a finished trial was trained again"
    assert kept, "a trial began anew in place of going on from its checkpoint"
    assert trials == 2, "what is not in the report was counted"
