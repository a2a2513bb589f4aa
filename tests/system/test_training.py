"""Whole runs on real Ray and DeepSpeed: resume, validation, skipped steps, damage, warm start, evaluation."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from symile_dist.checkpoint.manifest import FileEntry, complete_checkpoints, read_manifest
from symile_dist.checkpoint.reshape import consolidated_weights
from symile_dist.errors import RunFailed
from symile_dist.health.lease import locked
from symile_dist.storage import sha256_of_file
from symile_dist.tools.evaluate import evaluate_run
from tests.system.conftest import MakeConfig
from tests.system.runs import assert_each_sample_once, checkpoint_folder, history, losses, state_digests, train

pytestmark = pytest.mark.usefixtures("shared_ray")


def test_a_run_learns_and_keeps_what_it_says(make_config: MakeConfig) -> None:
    config = make_config("train.steps=60", "validation.every=30", "checkpoint.every=30", "train.log_every=5")
    result = train(config)
    assert (result["status"], result["step"], result["restarts"]) == ("finished", 60, 0)
    curve = losses(config)
    assert list(curve) == list(range(5, 61, 5))
    assert curve[60] < curve[5] - 0.3, f"the loss did not fall: {curve}"
    directory = config.run_directory
    assert [step for step, _ in complete_checkpoints(directory / "checkpoints")] == [30, 60]
    assert json.loads((directory / "run.json").read_text())["status"] == "finished"
    assert len(json.loads((directory / "ranks.json").read_text())) == 2
    assert list((directory / "tensorboard").glob("events.*"))
    assert history(config)[-1]["samples_seen"] == 60 * 16
    _first, last = history(config, "validation")
    assert set(last) >= {"loss", "accuracy/a_from_b_c", "accuracy/b_from_a_c", "accuracy/c_from_a_b"}
    assert last["total_correlation_ceiling"] == pytest.approx(math.log(16))

    results = evaluate_run(directory)
    assert results["samples"] == 40 and len(results["retrieval"]) == 3 + 6
    assert (directory / "evaluation" / "test-step-00000060.json").exists()
    # In-loop validation and `evaluate`, one with 2 ranks, one alone, see the same model.
    again = evaluate_run(directory, split="validation")
    assert again["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert again["retrieval"]["c_from_a_b"]["accuracy"] == pytest.approx(last["accuracy/c_from_a_b"], abs=0.03)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_resume_is_bitwise_and_validation_leaves_no_trace(make_config: MakeConfig, zero_stage: int) -> None:
    stage = f"train.zero_stage={zero_stage}"
    straight = make_config(stage, "validation.every=null", name="straight")
    train(straight)
    # The same with validation every other step, in two pieces.
    first = make_config(stage, "train.steps=6", "validation.every=2", name="pieces")
    train(first)
    both = make_config(stage, "train.steps=12", "validation.every=2", name="pieces")
    train(both, resume=True)
    assert losses(both) == losses(straight)
    assert state_digests(both, 12) == state_digests(straight, 12)
    assert [record["step"] for record in history(both, "event")] == [6], "it did not go on from step 6"


def test_a_run_directory_of_another_config_is_refused_and_fresh_moves_it_aside(make_config: MakeConfig) -> None:
    config = make_config("train.steps=3")
    train(config)
    other = make_config("train.steps=3", "optimizer.lr=0.5")
    with pytest.raises(ValueError, match=r"another config.*optimizer\.lr: 0\.01 -> 0\.5.*--fresh"):
        train(other)
    assert losses(config).keys() == {1, 2, 3}, "the refused run touched the old one"
    train(other, fresh=True)
    aside = list(config.run_directory.parent.glob("tiny.before-*"))
    assert len(aside) == 1 and (aside[0] / "history.jsonl").exists(), "the old run was not kept"


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_step_not_finite_on_one_rank_is_skipped_by_all(make_config: MakeConfig, value: str) -> None:
    config = make_config(
        "objective.name=tests.system.faulty:PoisonedSymile",
        f"objective.value=.{value}",
        "objective.first=3",
        "objective.last=3",
        "train.steps=4",
        "checkpoint.every=1",
        "checkpoint.keep_last=4",
        "train.zero_stage=2",
    )
    train(config)
    before, after, later = (consolidated_weights(checkpoint_folder(config, step)) for step in (3, 4, 2))
    assert all(torch.equal(before[name], after[name]) for name in before), "the skipped step changed weights"
    assert any(not torch.equal(before[name], later[name]) for name in before), "the step before changed nothing"
    assert history(config)[-1]["skipped_steps"] == 1
    assert any("skipped" in record["message"] for record in history(config, "event"))


def test_too_many_skipped_steps_stop_the_run_with_a_clear_error(make_config: MakeConfig) -> None:
    config = make_config(
        "objective={name: 'tests.system.faulty:PoisonedSymile', first: 4, last: 100}", "guard.patience=3"
    )
    with pytest.raises(RunFailed, match=r"step 7: .*3 steps in a row \(guard\.patience\).*There is no checkpoint"):
        train(config)
    run = json.loads((config.run_directory / "run.json").read_text())
    assert run["status"] == "stopped" and run.get("restarts", 0) == 0, "a restart cannot mend this"


def test_damage_falls_back_to_the_checkpoint_before_and_never_to_zero(make_config: MakeConfig) -> None:
    config = make_config("train.steps=6")
    train(config)
    expected = state_digests(config, 6)
    newest = next(checkpoint_folder(config, 6).glob("rank-00001*.safetensors"))
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(bytes(damaged))
    # Asked for more steps, it goes on from step 3, since 6 is damaged, and makes 6 again.
    longer = make_config("train.steps=7", "checkpoint.every=6", "checkpoint.keep_last=3")
    train(longer, resume=True)
    assert [record["step"] for record in history(longer, "event")] == [3]
    assert state_digests(longer, 6) == expected
    for _, folder in complete_checkpoints(config.run_directory / "checkpoints"):
        next(folder.glob("rank-00000*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint is whole(.|\n)*rank-00000"):
        train(make_config("train.steps=8"), resume=True)


def test_warm_start_begins_with_the_other_runs_weights(make_config: MakeConfig) -> None:
    source = make_config("train.steps=6", name="source")
    train(source)
    warm = make_config(
        f"run.init_from={source.run_directory}", "train.steps=1", "optimizer.lr=1e-30", "checkpoint.every=1",
        "train.zero_stage=3", "optimizer.weight_decay=0", name="warm",
    )  # fmt: skip
    train(warm)
    expected = consolidated_weights(checkpoint_folder(source, 6))
    found = consolidated_weights(checkpoint_folder(warm, 1))
    assert expected.keys() == found.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_a_run_goes_on_at_other_world_sizes_and_stages(make_config: MakeConfig, tmp_path: Path) -> None:
    common = ["checkpoint.every=4", "validation.every=null"]
    undisturbed = make_config(*common, "train.steps=16", "train.zero_stage=1", "ray.num_workers=4", name="undisturbed")
    train(undisturbed)
    objective = f"objective={{name: 'tests.system.faulty:RecordedSymile', folder: {tmp_path / 'seen'}}}"
    for steps, world_size, stage in ((4, 4, 1), (8, 2, 3), (12, 1, 2), (16, 4, 1)):
        overrides = [f"train.steps={steps}", f"ray.num_workers={world_size}", f"train.zero_stage={stage}"]
        moved = make_config(*common, *overrides, objective, name="moved")
        train(moved, resume=True)
    expected, found = losses(undisturbed), losses(moved)
    assert found.keys() == expected.keys()
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), f"step {step}"
    assert_each_sample_once(tmp_path / "seen", 16, 16, 256)


def test_more_workers_than_the_cluster_holds_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="the run needs 2000 CPUs"):
        train(make_config("ray.cpus_per_worker=1000"))


def test_a_mistake_that_one_rank_sees_ends_all_with_its_words(make_config: MakeConfig) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match="only rank 1 saw this"):
        train(make_config("objective=tests.system.faulty:MistakenOnOneRank"))
    assert time.monotonic() - begin < 120, "rank 0 waited for the collective's timeout"


def test_a_run_goes_on_with_other_steps_but_not_with_another_model(make_config: MakeConfig) -> None:
    config = make_config("train.steps=3")
    train(config)
    written = (config.run_directory / "config.yaml").read_text()
    for override in ("model.normalization=none", "modalities.a.freeze=true", "modalities.b.lr=0.5"):
        with pytest.raises(ValueError, match="cannot go on with another model"):
            train(make_config("train.steps=6", override), resume=True)
    # Whoever holds the lock is named; nothing is written meanwhile.
    with locked(config.run_directory):
        code = "import pathlib, sys, symile_dist.health.lease as r\nwith r.locked(pathlib.Path(sys.argv[1])): pass"
        command = [sys.executable, "-c", code, str(config.run_directory)]
        other = subprocess.run(command, capture_output=True, text=True)
        assert f"process {os.getpid()} on" in other.stderr and "trains here already" in other.stderr, other.stderr
    assert (config.run_directory / "config.yaml").read_text() == written, "a refused resume changed the config"


def test_a_pickle_in_a_checkpoint_is_never_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("train.steps=3")
    train(config)
    folder, mark = checkpoint_folder(config, 3), tmp_path / "it-was-run"
    bomb = b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
    for name in ("mp_rank_00_model_states.pt", ".metadata", "data.pkl"):
        (folder / name).write_bytes(bomb)
    evaluate_run(config.run_directory)
    # In the place of a rank's file, under a manifest that says so.
    manifest = read_manifest(folder)
    path = folder / manifest.files[0].path
    path.write_bytes(bomb)
    entry = FileEntry(path.name, len(bomb), sha256_of_file(path))
    dataclasses.replace(manifest, files=(entry, *manifest.files[1:])).write(folder)
    with pytest.raises(ValueError, match=r"rank-00000.*cannot be read"):
        evaluate_run(config.run_directory)
    assert not mark.exists()
