"""`symile-dist evaluate` on a run directory, in one process: what it measures, writes, exports and refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symile_dist.cli import main
from symile_dist.config import Config, parse_config
from symile_dist.data.manifest import index_directory
from symile_dist.errors import RunFailed
from symile_dist.evaluation.embeddings import load_embeddings
from symile_dist.evaluation.probe import Split, logistic_probe
from symile_dist.evaluation.retrieval import class_numbers, directions, retrieve
from symile_dist.evaluation.statistics import alignment, effective_rank, uniformity
from symile_dist.model import TrainingModule
from symile_dist.similarity import MIPSimilarity
from symile_dist.tools import evaluate
from symile_dist.tools.checkpoints import find_checkpoint
from symile_dist.tools.evaluate import evaluate_run
from symile_dist.tools.prompts import read_task
from symile_dist.tools.trained import find_device, load_trained
from symile_dist.types import Batch, Outputs, StepReport
from symile_dist.validate import HeldOut, accuracies
from tests.shards import CLASSES, config_text, key_of, npy_bytes, sample_array, write_shards, write_tar
from tests.untrained import untrained_run

SIZES = (9, 4, 16)
SAMPLES = sum(SIZES)
LACKING = {3: ["b"], 10: ["a", "c"], 20: ["c"]}


class Parts(nn.Module):
    """An objective with embeddings of its own."""

    similarity: Any = MIPSimilarity()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        return StepReport(self.weight.sum() * 2, {})

    def embeddings(self, representations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {f"{name}.shared": vectors[:, :4] for name, vectors in representations.items()}
        return found | {f"{name}.unique": vectors[:, 4:] for name, vectors in representations.items() if name != "c"}


class Incomparable(Parts):
    similarity = None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    for split in ("train", "val"):
        index_directory(write_shards(root / split, SIZES))
    index_directory(write_shards(root / "lacking", SIZES, without=LACKING))
    return root


def configured(data: Path, folder: Path, *overrides: str) -> Config:
    always = [f"run.directory={folder / 'run'}", f"data.validation={data / 'val'}"]
    return parse_config(config_text(data / "train"), "test.yaml", [*always, *overrides]).config


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    return untrained_run(configured(data, tmp_path))


def test_the_command_prints_writes_and_draws(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--probe", "a", "--recall-at", "1,3"]) == 0
    printed = capsys.readouterr().out
    assert f"run test, step 4, test split: {SAMPLES} samples of {CLASSES} classes (chance 0.200)" in printed
    for words in (
        "| a from b + c |",
        "| c from b ",
        "|    R@1 |    R@3 |",
        "linear probe",
        "effective rank",
        "alignment",
    ):
        assert words in printed, words
    written = {path.name for path in (run / "evaluation").iterdir()}
    assert written == {f"test-step-00000004.{suffix}" for suffix in ("json", "md", "png", "svg")}
    assert (run / "evaluation" / "test-step-00000004.md").read_text() == printed
    results = json.loads((run / "evaluation" / "test-step-00000004.json").read_text())
    assert set(results["retrieval"]) == {str(direction) for direction in directions(list("abc"))}
    row = results["retrieval"]["a_from_b_c"]
    assert (row["target"], row["queries"], row["samples"], row["candidates"]) == ("a", ["b", "c"], SAMPLES, SAMPLES)
    assert {"accuracy", "bootstrap_mean", "bootstrap_standard_error", "chance", "median_rank"} <= set(row)
    assert set(row["recall"]) == {"1", "3"}
    assert (
        main(["evaluate", str(run), "--directions", "b_from_a", "--resamples", "3", "--json", "--metrics", "retrieval"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert list(found["retrieval"]) == ["b_from_a"] and set(found["retrieval"]["b_from_a"]["recall"]) == {
        "1",
        "5",
        "10",
    }
    assert "statistics" not in found


def test_figures_are_those_of_the_library_on_the_exported_embeddings(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "embeddings.parquet"
    results = evaluate_run(run, export=file, metadata=["number"], probe=["all"], resamples=4)
    assert results["export"] == {"path": str(file), "samples": SAMPLES}
    found = load_embeddings(file)
    assert found.metadata["number"] == [str(number) for number in range(SAMPLES)]
    assert found.labels == [f"class-{number % CLASSES}" for number in range(SAMPLES)]
    assert (found.shards[-1], found.rows[-1]) == ("shard-00002.tar", SIZES[-1] - 1)
    config = configured(run.parent, run.parent, "train.steps=4")
    assert found.about["step"] == 4 and found.about["similarity"] == "MIPSimilarity"
    assert found.about["objective"] == config.objective.name and len(found.about["config_digest"]) == 64
    vectors = {name: torch.from_numpy(values) for name, values in found.vectors.items()}
    for direction in directions(list("abc")):
        want = retrieve(MIPSimilarity(), vectors, direction, class_numbers(found.labels), resamples=4).as_dict()
        assert results["retrieval"][str(direction)] == want
    statistics = results["statistics"]["embeddings"]["b"]
    assert statistics["dimension"] == 8 and statistics["effective_rank"] == effective_rank(vectors["b"])
    # All splits hold the same samples here.
    split = Split(found.vectors["c"], found.labels)
    assert results["probe"]["c"]["accuracy"] == logistic_probe(split, split, split).accuracy
    assert results["probe"]["c"]["samples"] == {"train": SAMPLES, "validation": SAMPLES, "test": SAMPLES}


def test_statistics_are_those_of_the_samples_that_have_the_modality(data: Path, tmp_path: Path) -> None:
    config = configured(data, tmp_path, f"data.test={data / 'lacking'}", "data.require=1")
    found = evaluate_run(untrained_run(config), export=tmp_path / "e.parquet", metrics=["statistics"])["statistics"]
    vectors = {name: torch.from_numpy(v) for name, v in load_embeddings(tmp_path / "e.parquet").vectors.items()}
    there = {name: ~values.isnan().any(dim=1) for name, values in vectors.items()}
    assert not any(flags.all() for flags in there.values())
    for name, values in vectors.items():
        assert found["embeddings"][name]["effective_rank"] == pytest.approx(effective_rank(values[there[name]]))
        assert found["embeddings"][name]["uniformity"] == pytest.approx(uniformity(values[there[name]]))
    for one, other in combinations(vectors, 2):
        both = there[one] & there[other]
        want = alignment(vectors[one][both], vectors[other][both])
        assert found["alignment"][f"{one}-{other}"] == pytest.approx(want)


def test_a_probe_that_is_fitted_to_what_it_is_judged_by_is_warned_of(
    data: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for options, seen in (
        ({}, "validation"),  # the config names no test split
        ({"split": "train"}, "train"),
        ({"shards": str(data / "train" / "..") + "/val"}, "validation"),
        ({"shards": str(data / "lacking"), "probe": ["b"]}, None),
    ):
        caplog.clear()
        evaluate_run(run, metrics=(), write=False, **{"probe": ["a"], **options})  # type: ignore[arg-type]
        told = [record.getMessage() for record in caplog.records if "--probe" in record.getMessage()]
        assert [f"holds the {seen} samples, to which the probe itself is fitted" in words for words in told] == (
            [True] if seen else []
        )


def test_an_export_alone_keeps_nothing_in_memory(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    joined = evaluate.joined
    monkeypatch.setattr(
        evaluate, "joined", lambda parts: kept.extend(len(p.representations) for p in parts) or joined(parts)
    )
    results = evaluate_run(run, metrics=(), export=tmp_path / "embeddings.parquet", max_samples=20)
    assert kept == [0, 0] and results["export"]["samples"] == 20
    assert not (run / "evaluation").exists(), "an export alone leaves the results as they were"
    assert "retrieval" not in results and results["loss"] > 0


def test_samples_that_lack_a_modality(data: Path, tmp_path: Path) -> None:
    """They are neither queries nor candidates where it is needed, and have no embedding of it."""
    run = untrained_run(configured(data, tmp_path, f"data.test={data / 'lacking'}", "data.require=1"))
    file = tmp_path / "embeddings.parquet"
    results = evaluate_run(run, export=file)
    rows = results["retrieval"]
    assert (rows["a_from_b"]["samples"], rows["a_from_b"]["candidates"]) == (SAMPLES - 2, SAMPLES - 1)
    assert (rows["c_from_a_b"]["samples"], rows["c_from_a_b"]["candidates"]) == (SAMPLES - 3, SAMPLES - 2)
    found = load_embeddings(file)
    for name in "abc":
        lacking = np.flatnonzero(np.isnan(found.vectors[name]).all(axis=1))
        assert lacking.tolist() == [number for number, names in LACKING.items() if name in names], name
    assert results["statistics"]["embeddings"]["c"]["effective_rank"] is not None


def test_validation_leaves_them_out_too() -> None:
    eye = torch.eye(4)
    vectors = {"a": eye, "b": torch.cat([eye[:3], eye[:1]])}
    present = torch.ones(4, 2, dtype=torch.bool)
    held_out = HeldOut(0.0, None, vectors, list("wxyz"), present, torch.arange(4), [])
    assert accuracies(MIPSimilarity(), held_out, ["a", "b"])["accuracy/a_from_b"] == 0.75
    present[3, 1] = False  # its query is a placeholder
    assert accuracies(MIPSimilarity(), held_out, ["a", "b"])["accuracy/a_from_b"] == 1.0
    assert accuracies(None, held_out, ["a", "b"]) == {}


def test_an_objective_with_embeddings_of_its_own(data: Path, tmp_path: Path) -> None:
    run = untrained_run(configured(data, tmp_path, f"objective.name={__name__}:Parts"))
    results = evaluate_run(run, export=tmp_path / "embeddings.parquet", probe=["c.shared", "a.shared+c.shared"])
    assert set(results["retrieval"]) == {
        str(d) for d in directions(["a.shared", "b.shared", "c.shared"]) + directions(["a.unique", "b.unique"])
    }
    assert set(results["statistics"]["alignment"]) == {
        "a.shared-b.shared",
        "a.shared-c.shared",
        "b.shared-c.shared",
        "a.unique-b.unique",
    }
    assert set(results["probe"]) == {"c.shared", "a.shared+c.shared"}
    found = load_embeddings(tmp_path / "embeddings.parquet")
    vectors = found.vectors
    both = Split(np.concatenate([vectors["a.shared"], vectors["c.shared"]], axis=1), found.labels)
    assert results["probe"]["a.shared+c.shared"]["accuracy"] == logistic_probe(both, both, both).accuracy
    assert {name: values.shape[1] for name, values in vectors.items()} == dict.fromkeys(
        ["a.shared", "b.shared", "c.shared", "a.unique", "b.unique"], 4
    )


def test_an_objective_that_compares_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = untrained_run(configured(data, tmp_path, f"objective.name={__name__}:Incomparable"))
    assert main(["evaluate", str(run), "--probe", "a.unique"]) == 0
    printed = capsys.readouterr().out
    assert "no retrieval" in printed and "| a.unique " in printed
    assert not list((run / "evaluation").glob("*.png"))


# -- candidates that the split names (Symile-MIMIC) --------------------------------------------------------------------


def write_candidates(folder: Path, queries: int = 8, candidates: int = 4) -> Path:
    """One shard whose samples are candidates of queries, in mixed order."""
    members = []
    order = np.random.default_rng(0).permutation(queries * candidates).tolist()
    for row, number in enumerate(order):
        facts = {
            "hadm_id": number,
            "label_hadm_id": number - number % candidates,
            "label": int(number % candidates == 0),
        }
        for name in "abc":
            members.append((f"{key_of(row)}.{name}.npy", npy_bytes(sample_array(name, number))))
        members.append((f"{key_of(row)}.json", json.dumps({**facts, "class": str(number)}).encode()))
    write_tar(folder / "shard-00000.tar", members)
    index_directory(folder)
    return folder


def test_candidates_of_the_split(data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_candidates(tmp_path / "val_retrieval")
    named = "evaluation.candidates={query: label_hadm_id, positive: label}"
    arguments = [str(run), "--shards", str(folder), "--directions", "a_from_b_c", named, "--no-figure"]
    assert main(["evaluate", *arguments, "--export", str(tmp_path / "e.parquet"), "--metadata", "hadm_id"]) == 0
    printed = capsys.readouterr().out
    assert "val_retrieval split: 32 samples" in printed and "8 queries, each among its own 4 candidates" in printed
    results = json.loads((run / "evaluation" / "val_retrieval-step-00000004.json").read_text())
    row = results["retrieval"]["a_from_b_c"]
    assert results["protocol"] == "candidates" and results["queries_left_out"] == 0
    assert (row["samples"], row["candidates"], row["chance"]) == (8, 4, pytest.approx(0.25))
    found = load_embeddings(tmp_path / "e.parquet")
    place = {int(admission or -1): number for number, admission in enumerate(found.metadata["hadm_id"])}
    hits = 0
    for query in range(0, 32, 4):
        own = found.vectors["b"][place[query]] * found.vectors["c"][place[query]]
        hits += int(np.argmax([found.vectors["a"][place[query + k]] @ own for k in range(4)]) == 0)
    assert row["accuracy"] == hits / 8
    # The same from a table, which names queries of one split in the metadata of another.
    table = tmp_path / "table.csv"
    lines = [f"{number},{number - number % 4},{int(number % 4 == 0)}" for number in range(32)]
    table.write_text("\n".join(["hadm_id,label_hadm_id,label", *lines]))
    by_table = f"evaluation.candidates={{query: label_hadm_id, positive: label, file: {table}, sample: hadm_id}}"
    assert main(["evaluate", *arguments[:-2], by_table, "--json", "--no-figure"]) == 0
    again = json.loads(capsys.readouterr().out)["retrieval"]["a_from_b_c"]
    assert again["accuracy"] == row["accuracy"] and again["recall"] == row["recall"]
    # Other lists of candidates are another task: its figures do not join those of the first.
    others = tmp_path / "others.csv"
    others.write_text("\n".join(["hadm_id,label_hadm_id,label", *lines[:16]]))
    by_others = by_table.replace(str(table), str(others))
    by_direction = [*arguments[:4], "b_from_a_c", "--no-figure"]
    assert main(["evaluate", *by_direction, by_others]) == 0
    results = json.loads((run / "evaluation" / "val_retrieval-step-00000004.json").read_text())
    assert list(results["retrieval"]) == ["b_from_a_c"] and results["candidates"]["file"] == str(others)
    assert main(["evaluate", str(run), named]) == 2
    assert "a sample's metadata has no 'label_hadm_id'" in capsys.readouterr().err
    # Of all samples afterwards: what was said of the candidates goes.
    assert main(["evaluate", *arguments[:-2], "--no-figure"]) == 0
    results = json.loads((run / "evaluation" / "val_retrieval-step-00000004.json").read_text())
    assert results["protocol"] == "all" and "queries_left_out" not in results


def test_wrong_candidates_are_told_before_the_pass(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("hadm_id,label_hadm_id,label\n0,0,1\n1,0\n")
    export = tmp_path / "e.parquet"
    for source, words in (
        (f"file: {table}, sample: hadm_id", "table.csv: line 3: has no 'label'"),
        (f"file: {tmp_path / 'nowhere.csv'}, sample: hadm_id", "nowhere.csv: no such file"),
    ):
        named = f"evaluation.candidates={{query: label_hadm_id, positive: label, {source}}}"
        with pytest.raises(ValueError, match=words):
            evaluate_run(run, overrides=[named], export=export)
    with pytest.raises(ValueError, match="a sample's metadata has no 'label_hadm_id'"):
        evaluate_run(run, overrides=["evaluation.candidates={query: label_hadm_id, positive: label}"], export=export)
    assert not export.exists()


# -- zero-shot classification ------------------------------------------------------------------------------------------

NAMES = {"class-0": "zero", "class-1": ["one", "uno"], "class-2": "two", "class-3": "three"}
TEMPLATES = ["{}", "a picture of {}"]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of arrays with texts of unequal length; the last class has no name."""
    root = tmp_path_factory.mktemp("named")
    members: list[tuple[str, bytes]] = []
    for number in range(SAMPLES):
        for name in "ab":
            members.append((f"{key_of(number)}.{name}.npy", npy_bytes(sample_array(name, number))))
        members.append((f"{key_of(number)}.txt", f"text {number}".encode()))
        members.append((f"{key_of(number)}.json", json.dumps({"class": f"class-{number % CLASSES}"}).encode()))
    write_tar(root / "train" / "shard-00000.tar", members)
    index_directory(root / "train")
    return root


def text_run(named: Path, folder: Path, *overrides: str) -> tuple[Path, Config]:
    text = config_text(named / "train", ("a", "b")).replace(
        "model:",
        "  t: {member: txt, decoder: text, transform: characters, encoder: {name: text_convnet, width: 8, pooled: 8}}\n"
        "model:",
    )
    config = parse_config(text, "test.yaml", [f"run.directory={folder / 'run'}", *overrides]).config
    return untrained_run(config), config


def write_yaml(folder: Path, **changes: Any) -> Path:
    path = folder / "classes.yaml"
    path.write_text(json.dumps({"templates": TEMPLATES, "classes": NAMES, **changes}))
    return path


@pytest.mark.parametrize("normalize", [False, True, None])
def test_zero_shot_classification(named: Path, tmp_path: Path, normalize: bool | None) -> None:
    normalization = "model.normalization=l2" if normalize is None else "model.normalization=layer_norm"
    run, config = text_run(named, tmp_path, "objective=pairwise_clip", normalization)
    changes: dict[str, Any] = {} if normalize is None else {"normalize": normalize}
    file = write_yaml(tmp_path, queries=["a", ["a", "b"]], **changes)
    results = evaluate_run(run, split="train", zero_shot_file=file, metrics=(), export=tmp_path / "e.parquet")
    assert set(results["zero_shot"]) == {"a", "a_b"} and (run / "evaluation").exists()
    # By hand, prompt by prompt: their lengths differ, so they are padded when they come together.
    module = load_trained(config, find_checkpoint(config, "latest"))
    means = []
    for label in NAMES:
        words = NAMES[label] if isinstance(NAMES[label], list) else [NAMES[label]]
        prompts = [template.replace("{}", word) for word in words for template in TEMPLATES]
        features = torch.cat([encoded_text(module, prompt) for prompt in prompts])
        if normalize is not False:
            features = F.normalize(features, dim=1)
        means.append(features.mean(dim=0) if normalize is False else F.normalize(features.mean(dim=0), dim=0))
    found = load_embeddings(tmp_path / "e.parquet")
    kept = [number for number, label in enumerate(found.labels) if label in NAMES]
    truth = np.array([list(NAMES).index(found.labels[number]) for number in kept])
    for name, queries in (("a", found.vectors["a"]), ("a_b", found.vectors["a"] + found.vectors["b"])):
        scores = queries[kept] @ torch.stack(means).detach().numpy().T
        row = results["zero_shot"][name]
        assert row["accuracy"] == pytest.approx((scores.argmax(axis=1) == truth).mean(), abs=1e-9), name
        assert (row["samples"], row["classes"], row["chance"]) == (len(kept), 4, 0.25)


def test_prompts_are_normalised_where_the_objective_normalises(named: Path, tmp_path: Path) -> None:
    run, _ = text_run(named, tmp_path, "objective=gram", "model.normalization=layer_norm")
    results = evaluate_run(run, split="train", zero_shot_file=write_yaml(tmp_path, queries=["a"]), metrics=())
    assert results["zero_shot"]["a"]["normalize"] is True


def encoded_text(module: TrainingModule, text: str) -> Tensor:
    from symile_dist.data.batches import collate
    from symile_dist.data.transforms import CharacterTransform

    inputs = collate([CharacterTransform()(text, None)], variable_length=True)
    encoded = module.model.encode("t", inputs, torch.ones(1, dtype=torch.bool))
    assert isinstance(encoded, Tensor)
    return encoded.detach()


def test_mistakes_in_the_file_of_classes(named: Path, tmp_path: Path) -> None:
    run, _ = text_run(named, tmp_path)
    for changes, words in (
        ({"class": {}}, "unknown key 'class'; did you mean 'classes'"),
        ({"text": "txt"}, "no modality 'txt'"),
        ({"queries": ["t"]}, "other than 't'"),
        ({"templates": ["a photo"]}, "each with {} where the name goes"),
        ({"queries": []}, "should be a list of modalities"),
        ({"queries": [{"a": 1}]}, "should be a list of modalities"),
        ({"classes": ["one"]}, "two or more"),
        ({"classes": [["one"], ["two"]]}, "two or more"),
        ({"classes": {"class-0": "zero", "class-1": []}}, "'class-1' should have a name"),
        ({"normalize": "maybe"}, "should be true or false"),
        ({"classes": ["red", "blue"]}, "no sample has a label of the classes"),
    ):
        with pytest.raises(ValueError) as error:
            evaluate_run(run, split="train", zero_shot_file=write_yaml(tmp_path, **changes), metrics=())
        assert words in str(error.value), changes
    with pytest.raises(ValueError, match="no such file"):
        evaluate_run(run, split="train", zero_shot_file=tmp_path / "nowhere.yaml")


def test_labels_and_names_are_texts_as_they_stand_in_the_file(named: Path, tmp_path: Path) -> None:
    _, config = text_run(named, tmp_path)
    path = tmp_path / "classes.yaml"
    path.write_text("classes: {01: one, 1.0: [no, null], yes: on}\nnormalize: false\nqueries: [[b, a], a, [a, b]]")
    task = read_task(path, config)
    assert task.labels == ("01", "1.0", "yes") and task.prompts == (("one",), ("no", "null"), ("on",))
    # In the order of the config, whatever that of the file: a similarity of one direction takes them in that order.
    assert task.queries == (("a", "b"), ("a",)) and task.normalize is False


def test_prompts_reach_embeddings_that_take_all_modalities(named: Path, tmp_path: Path) -> None:
    """Those of Symile-WPSE depend on a modality's place among the others."""
    run, _ = text_run(named, tmp_path, f"objective.name={__name__}:Placed")
    file = write_yaml(tmp_path, queries=["a"])
    Placed.seen.clear()
    results = evaluate_run(run, split="train", zero_shot_file=file, metrics=())
    assert results["zero_shot"]["a"]["accuracy"] is not None
    assert Placed.seen[0] == [("a", False), ("b", False), ("t", True)], "the prompts come before the samples"


class Placed(Parts):
    seen: ClassVar[list[list[tuple[str, bool]]]] = []

    def embeddings(self, representations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        differ = {name: bool((vectors != vectors[:1]).any()) for name, vectors in representations.items()}
        self.seen.append(list(differ.items()))
        return dict(representations)


# -- what is written, and what could not be read -----------------------------------------------------------------------


def test_a_later_evaluation_leaves_the_earlier_results(data: Path, run: Path, tmp_path: Path) -> None:
    folder = run / "evaluation"
    evaluate_run(run, figure=True)
    evaluate_run(run, metrics=["statistics"], max_samples=5)
    assert json.loads((folder / "test-first-5-step-00000004.json").read_text())["samples"] == 5
    evaluate_run(run, metrics=(), probe=["a"])
    results = json.loads((folder / "test-step-00000004.json").read_text())
    assert {"retrieval", "statistics", "probe"} <= set(results) and results["samples"] == SAMPLES
    assert (folder / "test-step-00000004.png").exists() and len(results["retrieval"]) == len(directions(list("abc")))
    text = (folder / "test-step-00000004.md").read_text()
    assert "linear probe" in text and "a from b + c" in text
    evaluate_run(run, metrics=["retrieval"], directions=["a_from_b"], resamples=3)
    results = json.loads((folder / "test-step-00000004.json").read_text())
    assert len(results["retrieval"]) == len(directions(list("abc")))
    assert not (folder / "test-step-00000004.png").exists(), "a figure of other results than the table's"
    evaluate_run(run, figure=True)
    evaluate_run(run, metrics=["statistics"], overrides=["objective.negative_sampling=n_squared"])
    assert "retrieval" not in json.loads((folder / "test-step-00000004.json").read_text()), "found with another loss"
    assert not (folder / "test-step-00000004.png").exists()
    # Another folder of the same name: neither takes the other's place.
    other = write_shards(tmp_path / "test", (8,))
    index_directory(other)
    evaluate_run(run, metrics=["statistics"], shards=str(other))
    assert json.loads((folder / "test-step-00000004.json").read_text())["samples"] == SAMPLES
    (beside,) = [file for file in folder.glob("test-*-step-*.json") if "first" not in file.name]
    assert json.loads(beside.read_text())["samples"] == 8


def test_figures_of_one_label_are_not_put_beside_those_of_another(run: Path) -> None:
    file = run / "evaluation" / "test-step-00000004.json"
    evaluate_run(run, metrics=["retrieval"], probe=["a"])
    evaluate_run(run, metrics=["retrieval"], directions=["a_from_b"], overrides=["data.label=number"])
    results = json.loads(file.read_text())
    assert results["label"] == "number" and results["classes"] == SAMPLES
    assert list(results["retrieval"]) == ["a_from_b"] and "probe" not in results


def test_a_label_that_is_null_is_none(tmp_path: Path) -> None:
    for split in ("train", "val"):
        members = []
        for number in range(12):
            facts = {"json": json.dumps({"class": "one" if number < 5 else None}).encode()}
            every = {f"{name}.npy": npy_bytes(sample_array(name, number)) for name in "abc"} | facts
            members += [(f"{key_of(number)}.{suffix}", content) for suffix, content in every.items()]
        write_tar(tmp_path / split / "shard-00000.tar", members)
        index_directory(tmp_path / split)
    results = evaluate_run(untrained_run(configured(tmp_path, tmp_path)), metrics=["retrieval"], write=False)
    assert results["classes"] == 1 + 7, "a sample without a label is a class of its own"


def test_a_probe_of_samples_without_labels_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "joined", lambda parts: pytest.fail("before the pass"))
    for label in ("klass", "null"):
        assert main(["evaluate", str(run), "--probe", "a", f"data.label={label}"]) == 2
        assert "--probe reads the label, and the samples of" in capsys.readouterr().err
    assert not list((run / "evaluation").iterdir())


def test_a_probe_of_what_no_sample_of_a_split_has_says_which(data: Path, tmp_path: Path) -> None:
    """Each sample has one of the two modalities, none has both."""
    lacking = {number: "ab"[number % 2] for number in range(8)}
    index_directory(write_shards(tmp_path / "either", (4, 4), without=lacking))
    options = [f"data.validation={tmp_path / 'either'}", f"data.test={data / 'val'}", "data.require=1"]
    run = untrained_run(configured(data, tmp_path, *options))
    with pytest.raises(ValueError, match=r"--probe a\+b: no sample of the validation split has a and b"):
        evaluate_run(run, metrics=(), probe=["a+b"], write=False)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Of 20 samples the last four cannot be read."""
    folder = tmp_path / "damaged"
    index_directory(write_shards(folder, (16, 4)))
    shard = folder / "shard-00001.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    return folder


def test_figures_of_a_part_are_not_taken_for_those_of_the_split(
    damaged: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    export = tmp_path / "e.parquet"
    command = ["evaluate", str(run), "--shards", str(damaged), "--metrics", "statistics", "--export", str(export)]
    assert main(command) == 1
    assert "4 of 20 samples could not be read" in capsys.readouterr().err
    assert not export.exists() and not list((run / "evaluation").iterdir())
    assert main([*command, "data.max_bad_fraction=1"]) == 0
    assert "16 samples (4 more could not be read)" in capsys.readouterr().out
    assert "4 of 20 samples could not be read" in caplog.text
    assert load_embeddings(export).vectors["a"].shape[0] == 16
    (file,) = (run / "evaluation").glob("*.json")
    assert json.loads(file.read_text())["unreadable"] == 4
    with pytest.raises(RunFailed, match=r"data\.on_error = stop"):
        evaluate_run(run, shards=str(damaged), overrides=["data.max_bad_fraction=1", "data.on_error=stop"])


def test_progress_is_told(run: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate_run(run, probe=["a"], progress=lambda *told: seen.append(told))
    assert {stage for stage, _, _ in seen} == {
        "encoding",
        "encoding train",
        "encoding validation",
        "retrieval",
        "probes",
    }
    of_pass = [done for stage, done, _ in seen if stage == "encoding"]
    assert of_pass == list(range(len(of_pass))) and seen[0][2] == of_pass[-1]


def test_names_that_hold_a_plus(data: Path, tmp_path: Path) -> None:
    """FactorCL's one against the rest: `b+c` is one embedding, not b beside c."""
    lacks = [f"data.test={data / 'lacking'}", "data.require=1"]
    config = configured(data, tmp_path, f"objective.name={__name__}:OneAgainstTheRest", *lacks)
    file = tmp_path / "e.parquet"
    results = evaluate_run(untrained_run(config), export=file, probe=["b+c.shared", "a.shared+b+c.shared"], metrics=())
    found = load_embeddings(file).vectors
    lacking = np.isnan(found["b+c.shared"]).any(axis=1)
    assert lacking.nonzero()[0].tolist() == sorted(LACKING), "a sample that lacks b or c has no b+c"
    there = ~lacking & ~np.isnan(found["a.shared"]).any(axis=1)
    assert results["probe"]["b+c.shared"]["samples"]["test"] == (~lacking).sum()
    assert results["probe"]["a.shared+b+c.shared"]["samples"]["test"] == there.sum()
    with pytest.raises(ValueError, match=r"--probe a\.shared\+c\.shared: there is no such embedding"):
        evaluate_run(config.run_directory, probe=["a.shared+c.shared"])


class OneAgainstTheRest(Parts):
    similarity = None

    def embeddings(self, representations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "a.shared": representations["a"],
            "b+c.shared": torch.cat([representations["b"], representations["c"]], dim=1)[:, :7],
        }


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_are_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, words in (
        ({"metrics": ["recall"]}, "--metrics recall: choose some of retrieval, statistics"),
        ({"resamples": 1}, "--resamples 1"),
        ({"resamples": 10**9}, "evaluation.resamples: should be less than or equal to 100000 (got 1000000000)"),
        ({"directions": ["a_from_d"]}, "no direction 'a_from_d'; did you mean"),
        ({"recall_at": [0]}, "evaluation.recall_at"),
        ({"max_samples": -3}, "--max-samples -3: should be 1 or more"),
        ({"probe": ["a"], "probe_samples": 0}, "--probe-samples 0: should be 1 or more"),
        ({"directions": []}, "--directions names none"),
        ({"export": run, "metrics": ()}, "is a folder; name a file"),
        ({"export": run / "run.json", "metrics": ()}, "is no Parquet file; name another file"),
        ({"device": "tpu"}, "should be auto, cpu or cuda"),
        ({"probe": ["d"]}, "--probe d: there is no such embedding; choose some of a, b, c, or all"),
        ({"step": "3"}, "no checkpoint of step 3; there are: 4"),
        (
            {"overrides": ["evaluation.candidates={query: q, positive: p, file: x.csv}"]},
            "`file` and `sample` go together",
        ),
    ):
        with pytest.raises(ValueError) as error:
            evaluate_run(run, **options)  # type: ignore[arg-type]
        assert words in str(error.value), options
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        evaluate_run(run, device="cuda")
    assert str(find_device("auto")) == "cpu"


def test_results_that_cannot_be_written_are_told_before_the_pass(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "evaluation").write_text("a file in its place")
    monkeypatch.setattr(evaluate, "joined", lambda parts: pytest.fail("samples were encoded in vain"))
    assert main(["evaluate", str(run)]) == 2
    assert "evaluation: File exists" in capsys.readouterr().err


def test_a_model_that_diverged_still_gives_json(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(data, tmp_path)
    weights = {"model.logit_scale": torch.full((1,), torch.nan)}
    assert main(["evaluate", str(untrained_run(config, weights)), "--json", "--no-figure"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["loss"] is None and found["total_correlation_bound"] is None


@pytest.mark.parametrize(
    ("objective", "factor"),
    [("n", None), ("n_squared", 12), ("sheets, sheets: 3", 3), ("n_squared, pairwise_weight: 0.1", None)],
)
def test_more_candidates_than_the_batch_give_an_estimate(run: Path, objective: str, factor: int | None) -> None:
    """Beside the bound, which holds for N of them."""
    section = f"objective={{name: symile, negative_sampling: {objective}}}"
    found = evaluate_run(run, overrides=[section], metrics=["statistics"])
    # Of the whole batches alone, which have as many negatives: two of twelve samples, of 29.
    whole = evaluate_run(run, overrides=[section], metrics=["statistics"], max_samples=24)["loss"]
    bound = found["total_correlation_ceiling"] - whole
    assert found["total_correlation_bound"] == pytest.approx(bound) != pytest.approx(math.log(12) - found["loss"])
    if factor is None:
        assert "total_correlation_estimate" not in found
    else:
        more = found["total_correlation_estimate"] - found["total_correlation_bound"]
        assert more == pytest.approx(math.log(factor))


def test_what_is_evaluated_does_not_make_another_run(data: Path, tmp_path: Path) -> None:
    """The `evaluation` section is no part of what a checkpoint depends on."""
    plain, other = configured(data, tmp_path), configured(data, tmp_path, "evaluation.directions=others")
    assert plain.digest() == other.digest() and other.evaluation.directions == ["others"]
    untrained_run(plain)
    from symile_dist.run_directory import prepare

    assert prepare(other, fresh=False, resume=False), "was taken for another run"
    assert math.isfinite(evaluate_run(plain.run_directory)["loss"])
    assert len(evaluate_run(plain.run_directory)["retrieval"]) == 3, "the config's directions"
