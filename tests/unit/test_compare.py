"""`symile-dist compare`: runs of all sorts side by side, in the terminal, as figures and as one page."""

from __future__ import annotations

import html.parser
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from symile_dist.cli import main
from symile_dist.config import parse_config
from symile_dist.metrics.history import HISTORY_FILE, _encoded
from symile_dist.storage import write_json, write_text
from symile_dist.tools.compare import BARS, SPARKLINE, Curve, Row, compare, sparkline, tables

CONFIG = """
run: {name: any}
data: {train: data/train}
modalities: {%s}
train: {steps: 100, global_batch_size: 8}
"""
Make = Callable[..., Path]


def train_records(count: int = 10, scale: float = 1.0, begin: float = 1e9) -> list[dict[str, Any]]:
    return [
        {
            "kind": "train",
            "step": step,
            "time": begin + 36 * step,
            "samples_seen": 8 * step,
            "loss": scale / step,
            "samples_per_second": 100.0 * scale,
            "phases": {"forward": 0.25 * scale},
        }
        for step in range(1, count + 1)
    ]


def validation(step: int, loss: float, accuracy: float, direction: str = "a_from_b_c") -> dict[str, Any]:
    record = {"kind": "validation", "step": step, "time": 1e9 + 36 * step, "samples_seen": 8 * step, "loss": loss}
    return {**record, f"accuracy/{direction}": accuracy}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(
        name: str,
        records: Iterable[dict[str, Any]] | None,
        *overrides: str,
        modalities: str = "abc",
        goodput: dict[str, float] | None = None,
        **told: Any,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        spec = "{member: npy, decoder: npy, transform: tensor, encoder: mlp}"
        text = CONFIG % ", ".join(f"{modality}: {spec}" for modality in modalities)
        write_text(directory / "config.yaml", parse_config(text, "c.yaml", list(overrides)).config.to_yaml())
        write_json(directory / "run.json", {"name": "any", "status": "finished", "code_version": "1.0", **told})
        if records is not None:
            with (directory / HISTORY_FILE).open("w") as file:
                file.writelines(json.dumps(_encoded(record)) + "\n" for record in records)
        if goodput:
            write_json(directory / "goodput.json", {"seconds": goodput, "restarts": {}})
        return directory

    return run


def shown(found: Any, width: int = 250) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tables(found))
    return console.export_text()


def row(found: Any, name: str) -> Row:
    rows = {each.name: each for each in found.rows}
    assert name in rows, f"there is no row '{name}' among {list(rows)}"
    return rows[name]


def evaluation(directory: Path, step: int, accuracy: float) -> None:
    content = {
        "split": "test",
        "step": step,
        "loss": 1.0,
        "retrieval": {"a_from_b_c": {"accuracy": accuracy}},
        "zero_shot": {"a": {"accuracy": accuracy / 2}},
        "probe": {"a+b": {"accuracy": None}},
    }
    write_json(directory / "evaluation" / f"test-step-{step:08d}.json", content)


# What is compared


def test_results_marks_and_differences(make: Make) -> None:
    one = make("one", [*train_records(), validation(5, 0.5, 0.2), validation(10, 0.7, 0.4)], "optimizer.lr=0.1",
               goodput={"productive": 90.0, "init": 10.0}, samples_seen=80, step=10, restarts=0)  # fmt: skip
    two = make(
        "two", [*train_records(20, 2.0), validation(20, 0.4, 0.4)], "optimizer.lr=0.2", "seed=3", status="failed"
    )
    evaluation(one, 5, 0.9)
    evaluation(one, 10, 0.6)
    evaluation(two, 20, 0.5)
    (two / "evaluation" / "other.json").write_text("{")
    found = compare([str(one), "two"])
    assert row(found, "status").values == ["finished", "failed"] and row(found, "step").values == [10, 20]
    assert row(found, "samples seen").values == [80, 160]
    assert row(found, "wall time").values == [100.0, 36 * 19] and row(found, "wall time").best == []
    assert row(found, "goodput").values == [0.9, None] and row(found, "goodput").shown == ["90.0%", "–"]
    assert row(found, "samples/s (median)").values == [100, 200] and row(found, "samples/s (median)").best == [1]
    assert row(found, "validation loss, best").shown == ["0.5 (step 5)", "0.4 (step 20)"]
    assert row(found, "validation loss, best").best == [1] and row(found, "validation loss, last").values == [0.7, 0.4]
    assert row(found, "validation a from b c, best").best == [], "equal values have no best"
    assert row(found, "test: step").values == [10, 20] and row(found, "test: a_from_b_c").values == [0.6, 0.5]
    assert row(found, "test: a_from_b_c").best == [0] and row(found, "test: zero-shot a").values == [0.3, 0.25]
    assert "test: probe a+b" not in {each.name for each in found.rows}
    assert found.config == {"seed": ["0", "3"], "optimizer.lr": ["0.1", "0.2"]}
    assert found.keys == ["train.loss", "validation.loss", "validation.accuracy/a_from_b_c", "train.samples_per_second"]
    assert found.notes == ["two: evaluation/other.json is no result"]
    text = shown(found)
    assert "0.4 (step 20) *" in text and "optimizer.lr" in text and BARS[-1] in text and "evaluation/other.json" in text


def test_other_modalities_lengths_and_orders(make: Make) -> None:
    make("three", [*train_records(), validation(10, 1.0, 0.5)])
    make("four", [*train_records(3), validation(3, 1.0, 0.5, "d_from_a_b_c")], modalities="abcd")
    make("turned", train_records(), modalities="cba")
    make("clip", train_records(), "objective=pairwise_clip")
    found = compare(["three", "four", "turned", "clip"])
    assert row(found, "validation a from b c, best").values == [0.5, None, None, None]
    assert row(found, "validation d from a b c, best").values == [None, 0.5, None, None]
    assert found.config["order of modalities"] == ["a, b, c", "a, b, c, d", "c, b, a", "a, b, c"]
    assert found.config["modalities.d.encoder.name"] == ["–", "mlp", "–", "–"]
    assert found.config["objective.name"][3] == "pairwise_clip"
    assert any("not comparable" in note for note in found.notes)
    assert "three" in shown(found)


def test_missing_and_damaged_files(make: Make) -> None:
    make("whole", train_records())
    make("unbegun", None)
    old = make("old", train_records(), status="running")
    (old / "config.yaml").write_text("run: {name: old}\ntrain: {steps: 7, gone_by: 1}\n")
    (old / "run.json").write_text("{torn")
    with (old / HISTORY_FILE).open("a") as file:
        file.write('{"kind": "train", "step": 11, "ti')
    found = compare(["whole", "unbegun", "old"])
    assert "unbegun: it has no history" in found.notes
    assert any(note.startswith("old: its config is not of this version") for note in found.notes)
    assert row(found, "status").shown == ["finished", "finished", "–"] and row(found, "step").values == [10, None, 10]
    assert found.config["train.steps"] == ["100", "100", "7"] and found.config["train.gone_by"] == ["–", "–", "1"]
    assert "optimizer.lr" not in found.config, "what an older config leaves out is not a difference"
    assert "–" in shown(found)


def test_neither_has_a_history(make: Make) -> None:
    make("one", None)
    make("two", None)
    found = compare(["one", "two"])
    assert found.keys == [] and "do not differ" in shown(found)
    with pytest.raises(ValueError, match="they have no history"):
        compare(["one", "two"], ["train.loss"])


def test_nan_and_steps_that_go_back(make: Make) -> None:
    records = train_records(6)
    records[3]["loss"] = math.nan
    make("odd", [*records, *train_records(5, 10.0)[2:]])  # back to step 2, then 3, 4 and 5 anew
    lost = train_records(4)
    for record in lost:
        record["loss"] = math.inf
    make("lost", lost)
    found = compare(["odd", "lost"], ["train.loss"])
    odd, gone = found.runs[0].curves["train.loss"], found.runs[1].curves["train.loss"]
    assert list(odd.steps) == [1, 2, 3, 4, 5] and odd.values[2] == 10 / 3, "the later values stand"
    assert odd.best("lower") == (2, 0.5) and gone.best("lower") is None
    assert "lost: train.loss is NaN or infinite in 4 of 4 records, first at step 1" in found.notes
    assert "×" in shown(found) and "inf" in shown(found)


def test_axes(make: Make) -> None:
    make("one", train_records(4))
    make("two", [{**record, "samples_seen": None} for record in train_records(4)])
    assert list(compare(["one", "two"], axis="samples").runs[0].curves["train.loss"].over("samples")) == [8, 16, 24, 32]
    assert "two: its history does not tell samples seen of train.loss, train.samples_per_second" in (
        compare(["one", "two"], axis="samples").notes
    )
    hours = compare(["one", "two"], axis="time").runs[1].curves["train.loss"].over("time")
    assert list(hours) == pytest.approx([0, 0.01, 0.02, 0.03])


def test_keys(make: Make) -> None:
    make("one", [*train_records(), validation(10, 1.0, 0.5)])
    make("two", train_records())
    assert compare(["one", "two"], ["train.phases.*", "validation.*"]).keys == [
        "train.phases.forward", "validation.accuracy/a_from_b_c", "validation.loss"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"train.losss: none of these runs has it; did you mean 'train.loss'\?"):
        compare(["one", "two"], ["train.losss"])
    with pytest.raises(ValueError, match=r"should be KIND\.KEY"):
        compare(["one", "two"], ["loss"])


def test_the_same_name_twice(make: Make) -> None:
    make("x/run", train_records())
    make("y/run", train_records(5))
    make("y/other", train_records(5))
    found = compare(["x/run", "y/run", "y/other"])
    assert [run.label for run in found.runs] == ["x/run", "y/run", "other"]
    with pytest.raises(ValueError, match="is named twice"):
        compare(["x/run", "y/run", "x/../y/run"])


def test_secrets_are_not_shown(make: Make) -> None:
    options = "modalities.a.encoder={name: mlp, api_key: %s}"
    make("one", train_records(), options % "hidden-1")
    make("two", train_records(), options % "hidden-2")
    found = compare(["one", "two"])
    assert found.config["modalities.a.encoder.api_key"] == ["***", "***"] and "hidden" not in shown(found)


def test_sparkline() -> None:
    curve = Curve()
    for step in range(1000):
        curve.add(step, 0, 0, float(step))
    line = sparkline(curve, "steps", (0, 999), (0, 999))
    assert len(line) == SPARKLINE and line[0] == BARS[0] and line[-1] == BARS[-1] and list(line) == sorted(line)
    assert sparkline(curve, "steps", (0, 1999), (0, 999))[SPARKLINE // 2 :].strip() == "", "it ends where the run does"
    flat = Curve()
    flat.add(5, 0, 0, 1.0)
    assert len(set(sparkline(flat, "steps", (5, 5), (1, 1)).strip())) == 1


def test_long_histories(make: Make) -> None:
    def records(count: int) -> Iterable[dict[str, Any]]:
        chance = random.Random(0)
        for step in range(count):
            yield {
                "kind": "train",
                "step": step,
                "time": 1e9 + step,
                "loss": math.exp(-step / 2e4) + chance.random() / 10,
            }

    make("long", records(100_000))
    make("short", records(1000))
    begin = time.monotonic()
    found = compare(["long", "short"])
    line = shown(found)
    assert time.monotonic() - begin < 30, "a history of 100,000 records takes too long"
    assert len(found.runs[0].curves["train.loss"].values) == 100_000 and BARS[0] in line


# The command


class Links(html.parser.HTMLParser):
    """What a page would ask for elsewhere, and whether it is well-formed."""

    VOID = frozenset({"meta", "link", "br", "img", "use", "path", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "img", "object"):
            self.asked.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action") and not (value or "").startswith(("#", "data:")):
                self.asked.append(f"{tag} {name}={value}")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_figures_and_page(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [*train_records(2000), validation(10, 1.0, 0.5)]
    records[7]["loss"] = math.nan
    make("_<b>&$x$", records)
    make("other", [*train_records(30, 2.0), validation(10, 2.0, 0.25)])
    assert main(["compare", "_<b>&$x$", "other", "--out", "new/folder", "--html"]) == 0
    told = capsys.readouterr().out
    folder = tmp_path / "new" / "folder"
    names = {"train.loss", "train.samples_per_second", "validation.loss", "validation.accuracy-a_from_b_c"}
    files = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")} | {"compare.html"}
    assert {file.name for file in folder.iterdir()} == files and all(name in told for name in files)
    for file in folder.glob("*.png"):
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 5000
    for file in folder.glob("*.svg"):
        ElementTree.parse(file)
    page = (folder / "compare.html").read_text()
    links = Links()
    links.feed(page)
    assert not links.asked and not links.open, f"{links.asked} {links.open}"
    assert "url(http" not in page and "@import" not in page and "prefers-color-scheme: dark" in page
    assert page.count("<svg") == len(names) and "<b>" not in page and "_<b>&$x$" in links.text
    assert "var(--ink)" in page and "#010203" not in page and "NaN or infinite in 1 of 2000" in links.text
    assert page.count("class=best") == 3, "samples/s, loss and accuracy each have a best"
    assert len(page) < 500_000


def test_more_runs_than_colours(make: Make, tmp_path: Path) -> None:
    names = [str(make(f"run-{number}", train_records(5, number + 1.0))) for number in range(12)]
    assert main(["compare", *names, "--key", "train.loss", "--out", "figures", "--html", "--json"]) == 0
    assert (tmp_path / "figures" / "train.loss.svg").exists()
    assert "dashed" in (tmp_path / "figures" / "compare.html").read_text()


def test_json(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    records = train_records()
    records[-1]["loss"] = math.nan
    make("one", records)
    make("two", train_records(scale=2.0), "seed=3")

    def refuse(constant: str) -> None:
        raise ValueError(f"not JSON: {constant}")

    assert main(["compare", "one", "two", "--json", "--x", "samples"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [run["label"] for run in told["runs"]] == ["one", "two"] and told["config"] == {
        "seed": {"one": "0", "two": "3"}
    }
    assert told["curves"]["train.loss"]["one"]["last"] == "NaN" and told["curves"]["train.loss"]["two"]["least"] == 0.2
    (speed,) = [each for each in told["results"] if each["name"] == "samples/s (median)"]
    assert speed["best"] == ["two"] and speed["values"] == {"one": 100.0, "two": 200.0} and told["axis"] == "samples"


def test_terminal_of_any_width(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make("one", train_records())
    make("two", train_records(scale=2.0))
    assert main(["compare", "one", "two"]) == 0
    assert "train.loss" in capsys.readouterr().out
    assert shown(compare(["one", "two"]), width=40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one", "nowhere"], "nowhere: not a run directory"),
        (["one"], "name two runs or more"),
        (["one", "one"], "is named twice"),
        (["one", "two", "--key", "train.none"], "none of these runs has it"),
        (["one", "two", "--out", "one/run.json"], "is a file; name a folder"),
    ],
)
def test_mistakes_write_nothing(
    arguments: list[str], message: str, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("one", train_records())
    make("two", train_records())
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in arguments else ["--out", "figures"]
    assert main(["compare", *arguments, *out, "--html"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_that_this_machine_does_not_see(make: Make, tmp_path: Path) -> None:
    make("one", train_records())
    with pytest.raises(ValueError, match="there is no directory"):
        compare(["one", "far"], record_of=lambda name: {"run": str(tmp_path / name)})


def test_names_of_runs(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make("runs/one", train_records())
    make("runs/two", train_records())
    assert main(["compare", "one", "two"]) == 0
    assert "train.loss" in capsys.readouterr().out


def test_html_needs_a_folder(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make("one", train_records())
    make("two", train_records())
    assert main(["compare", "one", "two", "--html"]) == 2
    assert "--out DIR" in capsys.readouterr().err


def test_printed_tables_need_no_torch() -> None:
    code = (
        "import sys, symile_dist.tools.compare, symile_dist.tools.compare_page\n"
        "sys.exit(' '.join({'torch', 'ray', 'deepspeed', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"imported: {done.stderr}"
