"""What surrounds the experiments: their data, what is known exactly of it, reports, and the page of all results."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from symile_dist.cli import main
from symile_dist.data.manifest import read_manifest
from symile_dist.errors import RunFailed, RunStopped
from symile_dist.tools.reproduce import xor
from symile_dist.tools.reproduce.experiments import Outcome, show
from symile_dist.tools.reproduce.lab import Lab
from symile_dist.tools.reproduce.m3_digits import word_tokenizer
from symile_dist.tools.reproduce.names import EXPERIMENTS
from symile_dist.tools.reproduce.publish import publish
from symile_dist.tools.reproduce.report import Check, Report, Table, markdown, mean_error
from symile_dist.tools.reproduce.samples import Split, write_dataset
from symile_dist.tools.reproduce.trial import seconds_of_steps
from symile_dist.tools.reproduce.xor import bayes_accuracy, information, parity_split, xor_split


@pytest.mark.parametrize("p_hat", [0.0, 0.3, 1.0])
def test_c_is_a_xor_b_as_often_as_it_should_be(p_hat: float) -> None:
    arrays, classes = xor_split(p_hat, 20_000, "train")
    a, b, c = (arrays[name].astype(int) for name in "abc")
    flipped = (c == a ^ b).all(axis=1)
    same = (c == a).all(axis=1)
    assert (flipped | same).all(), "c is neither a nor a XOR b: it is drawn once per sample, not per bit"
    # Where b is 0 both hold.
    assert flipped.mean() == pytest.approx(p_hat + (1 - p_hat) / 32, abs=0.01)
    assert classes is not None and classes[7] == "".join(map(str, b[7]))
    assert not np.array_equal(xor_split(p_hat, 100, "test")[0]["a"], arrays["a"][:100]), "test samples are training's"


def test_information_agrees_with_counting() -> None:
    # Two bits in place of five would need another formula: so count with all 2^10 pairs (a, b) and both values of i.
    p_hat, joint = 0.4, {}
    for a in range(32):
        for b in range(32):
            for c, weight in ((a ^ b, p_hat), (a, 1 - p_hat)):
                joint[a, b, c] = joint.get((a, b, c), 0.0) + weight / 1024

    def entropy(keep: tuple[int, ...]) -> float:
        marginal: dict[tuple[int, ...], float] = {}
        for values, weight in joint.items():
            key = tuple(values[k] for k in keep)
            marginal[key] = marginal.get(key, 0.0) + weight
        return -sum(w * math.log(w) for w in marginal.values() if w > 0)

    total = sum(entropy((k,)) for k in range(3)) - entropy((0, 1, 2))
    pair = entropy((0,)) + entropy((2,)) - entropy((0, 2))
    found = information(p_hat)
    assert found["total_correlation"] == pytest.approx(total)
    assert found["pair"] == pytest.approx(pair)
    assert found["conditional"] == pytest.approx(entropy((0, 1)) + entropy((0, 2)) - entropy((0,)) - entropy((0, 1, 2)))
    best = sum(max(joint.get((a, b, c), 0.0) for b in range(32)) for a in range(32) for c in range(32))
    assert bayes_accuracy(p_hat) == pytest.approx(best)


def test_seven_of_eight_bits_tell_nothing_and_all_tell_the_last() -> None:
    arrays, classes = parity_split(4_000, "train")
    bits = np.concatenate([arrays[name] for name in "abcdefgh"], axis=1).astype(int)
    assert (bits.sum(axis=1) % 2 == 0).all()
    assert np.abs(np.corrcoef(bits.T) - np.eye(8)).max() < 0.06
    assert classes is not None and set(classes) == {"0", "1"}


def test_a_dataset_is_made_once_and_anew_where_it_would_differ(tmp_path: Path) -> None:
    def make(size: int) -> Path:
        return write_dataset(
            tmp_path / "data",
            {"size": size},
            lambda split: ({"x": np.arange(size, dtype=np.float32)[:, None]}, [f"class-{n}" for n in range(size)]),
            ["train", "test"],
        )

    make(5)
    stamp = (tmp_path / "data" / "train" / "shard-00000.tar").stat().st_mtime_ns
    make(5)
    assert (tmp_path / "data" / "train" / "shard-00000.tar").stat().st_mtime_ns == stamp
    make(7)
    assert read_manifest(tmp_path / "data" / "test").samples == 7
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "something was left behind"


def one_column(split: str) -> Split:
    return {"x": np.zeros((3, 1), dtype=np.float32)}, None


@pytest.mark.parametrize("damage", ["a shard is gone", "a shard is cut", "parameters.json is none"])
def test_a_damaged_dataset_is_made_anew(damage: str, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", {}, one_column, ["train"])
    shard = folder / "train" / "shard-00000.tar"
    whole = shard.read_bytes()
    if damage == "a shard is gone":
        shard.unlink()
    elif damage == "a shard is cut":
        shard.write_bytes(whole[: len(whole) // 2])
    else:
        (folder / "parameters.json").write_text("{")
    write_dataset(tmp_path / "data", {}, one_column, ["train"])
    assert shard.stat().st_size == len(whole) and read_manifest(folder / "train").samples == 3


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something that is not this dataset; name another folder by --out"):
        write_dataset(tmp_path / "data", {}, one_column, ["train"])
    assert [path.name for path in tmp_path.rglob("*.*")] == ["thesis.txt"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid in (gone.pid, os.getppid()):
        (tmp_path / f".data.building-{pid}").mkdir()
    write_dataset(tmp_path / "data", {}, one_column, ["train"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".data.building-{os.getppid()}", "data"]


def test_the_making_of_data_shows_progress(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    write_dataset(tmp_path / "data", {}, one_column, ["train"], lambda *told: seen.append(told))
    assert seen == [("making data", 0, 3), ("making data", 3, 3)]


def test_a_dataset_that_another_experiment_made_meanwhile_is_left_to_it(tmp_path: Path) -> None:
    made = []

    def make_meanwhile(split: str) -> Split:
        shutil.copytree(write_dataset(tmp_path / "other", {}, one_column, ["train"]), tmp_path / "data")
        made.append((tmp_path / "data" / "train" / "shard-00000.tar").stat().st_ino)
        return one_column(split)

    write_dataset(tmp_path / "data", {}, make_meanwhile, ["train"])
    assert [(tmp_path / "data" / "train" / "shard-00000.tar").stat().st_ino] == made, "was replaced under its reader"


def test_a_word_is_one_token(tmp_path: Path) -> None:
    from symile_dist.data.tokens import TokensTransform

    size = word_tokenizer(tmp_path / "words")
    ids = TokensTransform(str(tmp_path / "words"))("four seven_τέσσερα δύο_よん なな", None).tolist()
    assert len(ids) == 8 and ids[2] == ids[5] and len(set(ids)) == 7
    assert 1 not in ids and max(ids) < size, "a word of a number is not in the vocabulary"


def test_a_terminal_shows_what_stands_in_brackets(tmp_path: Path) -> None:
    table = Table("of [ws; w1]", ["x[0]"], [["[0, 1]"]])
    report = Report("x", "[a]", "x1 = [ws; w1] T1", tables=[table], checks=[Check("in [0, 1]", "[0.5]", True)])
    report.notes.append("a note [1]")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show(Outcome(report, {"seconds": 60.0}, tmp_path / "[out]")))
    shown = console.export_text()
    for words in ("[a]", "x1 = [ws; w1] T1", "of [ws; w1]", "x[0]", "[0, 1]", "[0.5]", "a note [1]", "[out]"):
        assert words in shown


def test_a_trial_s_seconds_are_those_of_all_calls(tmp_path: Path) -> None:
    assert seconds_of_steps(tmp_path / "history.jsonl") == 0.0
    records = [
        {"kind": "start", "step": 1},
        {"kind": "train", "step": 10, "step_seconds": 2.0},
        {"kind": "validation", "step": 10},
        {"kind": "start", "step": 6},  # killed, and on from the checkpoint of step 5
        {"kind": "train", "step": 10, "step_seconds": 3.0},
        {"kind": "train", "step": 12, "step_seconds": 1.0},
    ]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert seconds_of_steps(tmp_path / "history.jsonl") == 20 + 15 + 2


def test_mean_and_error_over_seeds() -> None:
    assert str(mean_error([0.5])) == "0.500"
    assert mean_error([0.4, 0.6]).error == pytest.approx(0.1)
    assert str(mean_error([0.4, 0.6])) == "0.500 ± 0.100"


def report() -> Report:
    return Report(
        "xor",
        "Binary XOR",
        "A paper.",
        tables=[Table("Accuracy", ["p", "Symile"], [["0", "0.031"]])],
        checks=[Check("Symile ≥ 0.9", "0.031", False)],
        figures=["xor.png"],
        notes=["Quick."],
    )


def test_a_page_says_what_does_not_hold() -> None:
    page = markdown(report(), "Made by `symile-dist reproduce xor`.")
    assert "| 0 | 0.031 |" in page and "| Symile ≥ 0.9 | 0.031 | **does not hold** |" in page
    assert json.loads(json.dumps(report().data))["holds"] is False


def test_a_bar_within_a_cell_begins_no_other() -> None:
    page = report()
    page.tables.append(Table("Error", ["|x|", "y"], [["p(a | b)", "1"]]))
    page.checks.append(Check("|loss - CLIP's| ≤ 1e-6", "0", True))
    written = markdown(page, "Made.")
    for line in (r"| \|x\| | y |", r"| p(a \| b) | 1 |", r"| \|loss - CLIP's\| ≤ 1e-6 | 0 | holds |"):
        assert line in written.splitlines()


def test_all_results_become_one_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results yet"):
        publish(tmp_path / "out", tmp_path / "docs" / "results.md")
    folder = tmp_path / "out" / "xor"
    folder.mkdir(parents=True)
    (folder / "results.md").write_text(markdown(report(), "Made."), encoding="utf-8")
    for suffix in ("png", "svg"):
        (folder / f"xor.{suffix}").write_bytes(b"picture")
    assert publish(tmp_path / "out", tmp_path / "docs" / "results.md") == ["xor"]
    page = (tmp_path / "docs" / "results.md").read_text(encoding="utf-8")
    assert "## Binary XOR" in page and "](results/xor.png)" in page
    assert (tmp_path / "docs" / "results" / "xor.svg").read_bytes() == b"picture"


@pytest.mark.parametrize(
    "wrong",
    [
        ["xor", "--seeds", "0"],
        ["xor", "--processes", "-1"],
        ["xor", "--publish", "results"],
        ["xor", "--publish", str(Path(__file__).parent)],
        ["xor", "--publish", "/proc/results.md"],
        ["xor", "--publish", str(Path(__file__) / "results.md")],
        ["xor", "--seeds", "1000000000"],
        ["nothing"],
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["reproduce", *wrong, "--out", str(tmp_path / "out")]))
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err


@pytest.mark.parametrize(("out", "words"), [("", "should name a folder"), (__file__, "is a file, not a folder")])
def test_a_folder_that_cannot_be_one(out: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "xor", "--out", out]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("smaller", [["--quick", "--seeds", "3"], ["--seeds", "2"]])
def test_results_are_not_replaced_by_smaller_ones(
    smaller: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(xor, "run", lambda lab: report())
    main(["reproduce", "xor", "--out", str(tmp_path)])
    before = (tmp_path / "xor" / "results.json").read_bytes()
    for name in ("xor", "all"):
        assert main(["reproduce", name, *smaller, "--out", str(tmp_path)]) == 2
        assert "holds what `symile-dist reproduce xor` has found, with 3 seeds; name another" in capsys.readouterr().err
    assert (tmp_path / "xor" / "results.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["xor"]
    main(["reproduce", "xor", "--seeds", "4", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "xor" / "results.json").read_text())["seeds"] == 4, "more seeds may take their place"


def test_sigterm_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(lab: Lab) -> Report:
        def make(split: str) -> Split:
            os.kill(os.getpid(), signal.SIGTERM)
            return one_column(split)

        lab.dataset("data", {}, make, ["train"])
        return report()

    monkeypatch.setattr(xor, "run", ended)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as code:
        main(["reproduce", "xor", "--out", str(tmp_path)])
    assert code.value.code == 75 and "the same command again goes on" in capsys.readouterr().err
    assert not list((tmp_path / "data").glob("*")) and not list((tmp_path / "data").glob(".*"))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("error", [RunStopped, RunFailed])
def test_a_trial_that_cannot_go_on_ends_in_one_line(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(lab: Lab) -> Report:
        raise pickle.loads(pickle.dumps(error("the loss was not finite 10 times in a row")))  # as from another process

    monkeypatch.setattr(xor, "run", stops)
    assert main(["reproduce", "xor", "--json", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.out == "" and "failed: the loss was not finite 10 times in a row" in told.err


def test_every_experiment_is_there() -> None:
    import importlib

    for name, place in EXPERIMENTS.items():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name
