"""The benchmark commands: options, figures that are promised, bytes that are counted. Speed is never asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from symile_dist.cli import main
from symile_dist.tools import benchmark, negatives
from symile_dist.tools.benchmark import Case, count_traffic, counted_collectives, measure_traffic, parse_shapes
from symile_dist.tools.parity import SCHEMES, measure_parity, on_ranks
from tests.unit.test_cli import user_mistake

SMALL = Case(16, 512)


def test_shapes() -> None:
    assert parse_shapes(["256x512,384x512", "8x1"]) == [(256, 512), (384, 512), (8, 1)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shapes", "256"], "'256' should be NxD, samples by dimension, e.g. 256x512"),
        (["--shapes", "16x8,1x8"], "'1x8' should be NxD"),
        (["--shapes", "200000x8"], "more combinations than can be computed"),
        (["--shapes", "9x8"], "9 samples of 9x8 do not divide by --world-size 2"),
        (["--threads", "0"], "--threads 0: should be 1 or more"),
        (["--repeats", "0"], "--repeats 0: should be 1 or more"),
        (["--world-size", "0"], "--world-size 0: should be 1 or more"),
        (["--world-size", "65"], "64 at most"),
        (["--sheets", "1"], "--sheets 1: should be 2 to 256 for 256x512"),
        (["--out", "."], "--out .: is a folder"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_any_work(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "measure_shape", None)
    assert said in user_mistake(capsys, "benchmark", "objective", *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch sees no CUDA device" in user_mistake(capsys, "benchmark", "objective", "--device", "cuda")


def test_mistakes_of_parity(capsys: pytest.CaptureFixture[str]) -> None:
    for number in ("1", "9"):
        assert "should be 2 to 8" in user_mistake(capsys, "benchmark", "parity", "--world-size", number)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "1"], "--seeds 1: a standard error needs two or more"),
        (["--cpu-seconds", "nan"], "--cpu-seconds nan: should be more than 0"),
        (["--threads", "0"], "--threads 0: should be 1 or more"),
        (["--global-batch-size", "1"], "--global-batch-size 1: should be 2 to 2000"),
    ],
    ids=str,
)
def test_mistakes_of_negatives(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in user_mistake(capsys, "benchmark", "negatives", *words)


def test_negatives_are_told_with_their_standard_error() -> None:
    runs = [
        {"negative_sampling": strategy, "accuracy": accuracy, "steps": 10, "cpu_seconds": 5.0}
        for strategy in negatives.STRATEGIES
        for accuracy in (0.2, 0.4)
    ]
    found = negatives._summary(runs, "sheets")
    assert found["accuracy"] == pytest.approx(0.3) and found["standard_error"] == pytest.approx(0.1)
    page = negatives.negatives_markdown({"strategies": {"sheets": found}})
    assert "| `sheets` | 10 | 5 | 0.300 ± 0.100 |" in page


@pytest.mark.parametrize("words", [["--dtype", "fp8"], ["--negative-sampling", "all"], ["--shapes"]])
def test_words_that_are_no_choice(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", "objective", *words])
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


# -- figures ---------------------------------------------------------------------------------------------------------


def test_json_has_what_is_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shapes", "16x8", "--repeats", "1", "--out", str(tmp_path / "new" / "figures.json"), "--json"]
    threads = torch.get_num_threads()
    assert main(["benchmark", "objective", *words]) == 0
    assert torch.get_num_threads() == threads
    results = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == results
    assert {"processor", "device", "dtype", "threads", "repeats", "torch", "shapes"} <= set(results)
    (shape,) = results["shapes"]
    assert (shape["global_batch"], shape["dimension"]) == (16, 8)
    assert shape["mm"]["flops_per_s"] > 0 and len(shape["mm"]["shapes"]) == 3
    rows = {row["contender"]: row for row in shape["contenders"]}
    assert list(rows) == ["ours", "symile package", "einsum cube"]
    running = [row for row in rows.values() if row["skipped"] is None]
    assert {"ours", "einsum cube"} <= {row["contender"] for row in running}
    for row in running:
        assert row["loss"] == pytest.approx(rows["ours"]["loss"], rel=1e-5), "all compute the same"
        for part, work in (("forward", 2), ("forward_backward", 8)):
            assert row[f"{part}_flops_per_s"] == pytest.approx(work * 16**3 * 8 / row[f"{part}_s"])
            rate = row[f"{part}_share_of_mm"] * shape["mm"]["flops_per_s"]
            assert rate == pytest.approx(row[f"{part}_flops_per_s"])
        assert row["extra_peak_mib"] >= 0
    (traffic,) = shape["traffic"]
    assert (traffic["world_size"], traffic["negative_sampling"]) == (2, "n_squared")
    # What is printed without --json, from the same figures.
    from rich.console import Console

    Console(width=200).print(benchmark.benchmark_tables(results))
    printed = capsys.readouterr().out
    assert "| 16 x 8" in printed and "einsum cube" in printed and "of the ideal" in printed


def test_what_would_not_fit_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "free_memory", lambda device: 2.0**30)
    reasons = {c.name: benchmark.why_skip(c, Case(1024, 1024)) for c in benchmark.CONTENDERS if c.sampling != "n"}
    assert reasons["ours"] is None
    assert reasons["einsum cube"] == "needs about 32.0 GiB, 1.0 GiB are free"
    monkeypatch.setattr(benchmark, "published", None)
    reasons = {c.name: benchmark.why_skip(c, Case(8, 8)) for c in benchmark.CONTENDERS}
    assert "pip install symile" in str(reasons["symile package"])


# -- bytes -----------------------------------------------------------------------------------------------------------


def known_collectives() -> list[dict[str, Any]]:
    world = dist.get_world_size()
    own = torch.zeros(3, 5)
    with counted_collectives() as traffic:
        dist.all_gather_into_tensor(torch.zeros(3 * world, 5), own)
        dist.all_gather_into_tensor(output_tensor=torch.zeros(3 * world, 5), input_tensor=own)
        dist.reduce_scatter_tensor(own, torch.zeros(3 * world, 5))
        dist.all_reduce(torch.zeros(7, dtype=torch.float64), op=dist.ReduceOp.MAX)
    dist.all_reduce(torch.zeros(100))  # afterwards nothing is counted
    return traffic.rows()


def bytes_of_ours() -> dict[str, Any]:
    """On one rank, by strategy; and the known ones."""
    found = {sampling: count_traffic(SMALL, sampling) for sampling in ("n", "n_squared", "sheets")}
    return {"known": known_collectives(), **found}


@pytest.mark.parametrize("world", [2, 4])
def test_bytes(world: int) -> None:
    for found in on_ranks(bytes_of_ours, world):
        keys = ("collective", "dtype", "calls", "full_bytes", "own_bytes")
        assert [tuple(row[key] for key in keys) for row in found.pop("known")] == [
            ("all_gather_into_tensor", "float32", 2, 2 * world * 60, 2 * 60),
            ("all_reduce", "float64", 1, 56, 56),
            ("reduce_scatter_tensor", "float32", 1, world * 60, world * 60),
        ]
        modality = 16 * 512 * 4
        for sampling, rows in found.items():
            large = [row for row in rows if row["full_bytes"] >= modality]
            assert [(row["collective"], row["calls"], row["full_bytes"]) for row in large] == [
                ("all_gather_into_tensor", 1, 2 * modality),
                ("reduce_scatter_tensor", 1, 2 * modality),
            ], f"{sampling}: modality 0 is never gathered, and the others once"
            assert sum(row["full_bytes"] for row in rows) <= 1.01 * 4 * modality


def test_traffic_is_measured_at_a_smaller_batch_where_the_real_one_would_take_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark, "on_ranks", lambda function, world_size, *arguments: [[], []])
    assert measure_traffic(Case(4096, 1024, device="cuda"), "n_squared", 2)["global_batch"] < 400
    assert measure_traffic(Case(64, 512), "n_squared", 2)["global_batch"] == 64


# -- parity ----------------------------------------------------------------------------------------------------------


def test_parity() -> None:
    world = 2
    results = measure_parity(world)
    assert (results["world_size"], results["global_batch"]) == (world, 32) and results["left_out"]
    rows: dict[str, list[dict[str, Any]]] = {scheme.name: [] for scheme in SCHEMES}
    for row in results["rows"]:
        rows[row["scheme"]].append(row)
    assert len(rows["ours"]) == 4
    exact = [*rows["ours"], *rows["open_clip: local_loss + gather_with_grad"], *rows["open_clip: gather_with_grad"]]
    for row in exact:
        for key in ("features_ratio", "features_cosine", "logit_scale_ratio"):
            assert row[key] == pytest.approx(1.0, abs=1e-9), row
    (defaults,), (disco,), (inf,) = (rows[name] for name in ("open_clip: defaults", "DisCo-CLIP", "Inf-CL"))
    for row, features, scale in ((defaults, 1 / world, 1.0), (disco, 1 / world, 1.0), (inf, 1.0, float(world))):
        assert row["features_ratio"] == pytest.approx(features, abs=1e-9)
        assert row["logit_scale_ratio"] == pytest.approx(scale, abs=1e-9)
    (local,), (no_grad,) = rows["open_clip: local_loss"], rows["GRAM: gather under no_grad"]
    assert local["features_ratio"] < 0.99 and no_grad["features_cosine"] < 0.99
