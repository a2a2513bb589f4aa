"""The capacity planner: its formulas against numbers worked out by hand, and every wrong use told in one message.

Beside real steps of the engine: tests/distributed/test_plan.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from symile_dist.checkpoint.interval import SaveInterval
from symile_dist.config import Config, parse_config
from symile_dist.model import TrainingModule
from symile_dist.tools.plan import calibrate, calibrate_command, command
from symile_dist.tools.plan.collectives import Collective
from symile_dist.tools.plan.communication import step_communication, step_passes, trained_modalities
from symile_dist.tools.plan.hardware import GPUS, device_named, device_of
from symile_dist.tools.plan.memory import own_gradients
from symile_dist.tools.plan.objective import run_objective
from symile_dist.tools.plan.planner import parse_sweep
from symile_dist.tools.plan.shapes import InputShape, data_facts
from symile_dist.tools.plan.step import Encoders, run_encoders
from symile_dist.tools.plan.time import (
    Checkpoints,
    collective_seconds,
    mean_time_to_failure,
    run_time,
)
from symile_dist.tools.plan.trace import build_model
from symile_dist.tools.plan.zero import buckets, padded
from symile_dist.tools.plan.zero3 import Coordinator, Settings, steady_step

WIDTHS = (6, 10, 16)
TEXT = """
run: {name: plan}
data: {train: none}
modalities:
  a: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  b: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  c: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
model: {embedding_dim: 16, logit_scale_init: -1}
train: {steps: 100, global_batch_size: 64}
"""
INPUTS = {name: InputShape((6,), torch.float32, False, "test") for name in "abc"}
MEASURED: dict[str, Any] = {
    "processor": "a machine",
    "device": "cpu",
    "ranks": 2,
    "threads": 1,
    "torch": torch.__version__,
    "memory_bytes": 4e9,
    "matmul_flops_per_s": {"fp32": 5e10, "bf16": 1e11},
    "convolution_flops_per_s": {"fp32": 4e10, "bf16": 4e10},
    "memory_bytes_per_s": 5e9,
    "loss_flops_per_s": {"fp32": 2e10, "bf16": 2e10},
    "optimizer_bytes_per_s": 4e9,
    "operator_s": 1e-5,
    "step_s": 2e-3,
    "batch_share": 0.8,
    "state_share": 0.5,
    "write_bytes_per_s": 1e9,
    "collectives": {
        name: {"latency_s": 1e-4, "bytes_per_s": 1e9}
        for name in ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor")
    },
}


def _config(*overrides: str) -> Config:
    return parse_config(TEXT, "plan.yaml", overrides).config


def _options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "plan.yaml"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def calibration(tmp_path: Path) -> str:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(MEASURED))
    return str(path)


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return run_encoders(_config(), INPUTS)


# -- the model without values ----------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_real_model(encoders: Encoders) -> None:
    module = TrainingModule(_config())
    real = {name: parameter.numel() for name, parameter in module.named_parameters()}
    assert dict(zip(encoders.model.names, encoders.model.sizes, strict=True)) == real
    assert all(parameter.device.type == "meta" for parameter in encoders.model.parameters)


def test_work_of_linear_maps_is_what_it_is_on_paper(encoders: Encoders) -> None:
    forward = 3 * 2 * sum(i * o for i, o in pairwise(WIDTHS))
    # Backward: the weights' gradients as much again, the inputs' too but for the first layers.
    backward = forward + 3 * 2 * WIDTHS[1] * WIDTHS[2]
    assert encoders.forward_flops == forward
    assert encoders.model_flops == forward + backward


def test_any_number_of_rows_is_concluded_from_two(encoders: Encoders) -> None:
    at_once = run_encoders(_config(), INPUTS, (32,))
    for which in ("alive", "peak"):
        concluded = getattr(encoders.whole, which).at(32)
        assert np.array_equal(concluded, getattr(at_once.whole, which).at(32)), which
    assert np.array_equal(encoders.work.flops.at(32), at_once.work.flops.at(32))
    assert encoders.representations["a"][0][1:] == (16,)


def test_activation_checkpointing_costs_work_and_saves_memory(encoders: Encoders) -> None:
    again = run_encoders(_config("train.activation_checkpointing=true"), INPUTS)
    assert again.model_flops == encoders.model_flops, "what is computed twice is no work of the model"
    # Of each encoder the first layer: nobody needs what the last one gives.
    twice = 3 * 2 * WIDTHS[0] * WIDTHS[1]
    assert again.work.flops.at(64).sum() == 64 * (encoders.model_flops + twice)
    most = (one.whole.peak.at(1000).max() for one in (again, encoders))
    assert next(most) < next(most)


def test_an_encoder_that_looks_at_values_is_told_of() -> None:
    config = _config("modalities.c.encoder={name: one_hot, classes: 6}", "modalities.a.freeze=false")
    with pytest.raises(ValueError, match=r"cannot be run without values|modality 'c'"):
        run_encoders(config, {**INPUTS, "c": InputShape((1,), torch.int64, False, "test")})


# -- shapes ----------------------------------------------------------------------------------------------------------


def test_shapes_come_from_the_data_where_it_is_there(shards: Path, make_config: Callable[..., Config]) -> None:
    facts = data_facts(make_config(shards), {})
    assert facts.samples == 37 and facts.bytes_per_sample is not None and facts.bytes_per_sample > 3 * 16
    assert {name: (one.shape, one.assumed) for name, one in facts.inputs.items()} == dict.fromkeys("abc", ((4,), False))
    assert "shard-00000.tar" in facts.inputs["a"].source


def test_shapes_come_from_options_else_and_are_called_assumed() -> None:
    facts = data_facts(_config(), {"b": "2x3"})
    assert facts.samples is None
    assert facts.inputs["a"].shape == (6,) and facts.inputs["a"].assumed and "encoder" in facts.inputs["a"].source
    assert facts.inputs["b"].shape == (2, 3) and facts.inputs["b"].source == "--shape"


# -- collectives -----------------------------------------------------------------------------------------------------


def _calls(config: Config) -> list[Collective]:
    model = build_model(config)
    passes = step_passes(config, model, INPUTS, 4, config.train.zero_stage == 3)
    emitted = (passes.encode or passes.whole).representations
    local = config.train.global_batch_size // config.world_size
    objective = run_objective(model, emitted, "fp32", trained_modalities(config), local, config.world_size, "cpu")
    return step_communication(config, model, passes, objective).calls


@pytest.mark.parametrize("world", [2, 4096])
def test_what_goes_over_the_network(world: int) -> None:
    batch, dimension = 2 * world, 16
    calls = _calls(_config(f"ray.num_workers={world}", f"train.global_batch_size={batch}"))
    parameters = sum(build_model(_config()).sizes)
    of = {
        (call.purpose, call.name): call.full_bytes
        for call in calls
        if call.dtype == "float32" and call.name != "all_gather_into_tensor"
    }
    # Two modalities of three gathered, and their gradients reduced and scattered.
    assert of["objective", "reduce_scatter_tensor"] == 2 * batch * dimension * 4
    assert of["gradients", "all_reduce"] == 4 * parameters
    gathered = [call for call in calls if call.name == "all_gather_into_tensor"]
    assert [c.full_bytes for c in gathered if c.purpose == "objective" and c.dtype == "float32"] == [
        2 * batch * dimension * 4
    ]
    whole = sum(call.full_bytes for call in gathered if call.purpose == "parameters")
    assert 4 * parameters <= whole < 4 * (parameters + 2 * 2 * world)
    assert all(call.own_bytes * world == call.full_bytes for call in gathered)


def test_one_rank_sends_nothing() -> None:
    assert _calls(_config("ray.num_workers=1")) == []


def test_buckets() -> None:
    sizes = [5, 5, 20, 1, 1]
    assert buckets([0, 1, 2, 3, 4], sizes, 10) == [10, 20, 2]
    assert buckets([0, 1, 2, 3, 4], sizes, 100) == [32]
    assert padded(33, 4) == 40 and padded(40, 4) == 40


def test_gradients_that_a_rank_keeps_whole() -> None:
    sizes = [3, 5, 2, 6]
    world, share = 4, padded(sum(sizes), 4) // 4
    ends = np.cumsum([0, *sizes])
    by_hand = [
        sum(n for n, first in zip(sizes, ends, strict=False) if first < (r + 1) * share and first + n > r * share)
        for r in range(world)
    ]
    assert own_gradients([[0, 1, 2, 3]], sizes, world) == (max(by_hand), share)


def test_ring_bytes() -> None:
    calls = {name: Collective(name, "float32", 800, 800) for name in ("all_reduce", "reduce_scatter_tensor")}
    assert calls["all_reduce"].wire_bytes(4) == 2 * 0.75 * 800
    assert calls["reduce_scatter_tensor"].wire_bytes(4) == 0.75 * 800


def test_stage_3_keeps_or_fetches_again_as_it_is_told(encoders: Encoders) -> None:
    model = encoders.model
    events = step_passes(_config("train.zero_stage=3"), model, INPUTS, 4, True).whole.events

    def gathers(settings: Settings) -> list[Collective]:
        coordinator = Coordinator(model.sizes, model.own, settings, 8, "float32")
        calls, whole = steady_step(coordinator, events)
        assert max(one.most for one in whole) >= max(model.sizes) and len(whole) == len(events)
        return [call for call in calls if call.purpose == "parameters"]

    def padded_bytes(times: int) -> int:
        return times * sum(-(-size // 8) * 8 * 4 for size in model.sizes)

    small = gathers(Settings())
    assert len(small) == len(model.sizes) and sum(c.full_bytes for c in small) == padded_bytes(1), "all are small"
    kept = gathers(Settings(param_persistence_threshold=0))
    assert sum(call.full_bytes for call in kept) == padded_bytes(1), "what is used again soon is kept"
    nothing = Settings(param_persistence_threshold=0, max_reuse_distance=0, prefetch_bucket_size=0)
    fetched = gathers(nothing)
    assert padded_bytes(1) < sum(call.full_bytes for call in fetched) <= padded_bytes(2), "in both directions"


# -- time and money --------------------------------------------------------------------------------------------------


def test_a_collective_is_as_fast_as_its_narrowest_link() -> None:
    device, call = device_named("H200"), Collective("all_reduce", "float32", 10**9, 10**9)
    within, between = (
        collective_seconds(call, _config(f"ray.num_workers={world}", "train.global_batch_size=512"), device, 8)
        for world in (8, 16)
    )
    assert within == pytest.approx(2 * 7 / 8 * 1e9 / device.node_bandwidth + 3 * device.latency["node"])
    slow = min(device.node_bandwidth, 8 * device.network_bandwidth)
    assert between == pytest.approx(2 * 15 / 16 * 1e9 / slow + 4 * device.latency["nodes"])


def test_hours_interruptions_and_cost() -> None:
    config = _config("ray.num_workers=1024", "train.global_batch_size=1024")
    assert mean_time_to_failure(1024) == SaveInterval(config.checkpoint, 1024, 0.0).mean_time_to_failure
    assert mean_time_to_failure(1024) == pytest.approx(7.8 * 3600, rel=0.01)
    saves = Checkpoints(bytes=1e12, seconds=60, stall_seconds=2, interval_seconds=400)
    run = run_time(config, 100_000, 1.0, saves, price_per_gpu_hour=3.0)
    assert run.hours == pytest.approx(100_000 / 3600)
    lost = 2 / 400 + (200 + 240) / mean_time_to_failure(1024)
    assert run.goodput == pytest.approx(1 / (1 + lost))
    assert run.hours_with_interruptions == pytest.approx(run.hours * (1 + lost))
    assert run.cost == pytest.approx(run.hours_with_interruptions * 1024 * 3)
    assert run.interruptions == pytest.approx(run.hours_with_interruptions * 3600 / mean_time_to_failure(1024))


# -- the command -----------------------------------------------------------------------------------------------------


def test_a_plan_has_what_is_promised(file: str) -> None:
    plan, text = command.run(
        _options(file, "train.precision=bf16", "--nodes", "8", "--gpu", "h200", "--samples", "6400", "--epochs", "2")
    )
    assert json.loads(json.dumps(plan)) == plan, "as JSON"
    assert (plan["world_size"], plan["train"]["local_batch_size"]) == (64, 1)
    assert plan["run"]["steps"] == 200 and plan["run"]["epochs"] == 2
    assert [row["zero_stage"] for row in plan["memory"]["by_stage"]] == [0, 1, 2, 3]
    assert plan["memory"]["peak_bytes"] == max(plan["memory"]["phases"].values()) > 0
    parts = ("forward_backward_s", "second_forward_s", "objective_s", "optimizer_s", "exposed_s", "host_s")
    assert plan["time"]["step_s"] == pytest.approx(sum(plan["time"][part] for part in parts))
    rate = plan["flops"]["model_per_rank"] / plan["time"]["step_s"]
    assert plan["time"]["mfu"] == pytest.approx(rate / GPUS["H200"].halves / 1e12)
    assert plan["communication"]["calls"] == sum(row["calls"] for row in plan["communication"]["collectives"])
    for word in ("parameters", "MFU", "goodput", "all_gather_into_tensor", "assumed, not measured", "ZeRO stage"):
        assert word in text()


def test_two_passes_bound_activations_and_cost_a_forward_pass(file: str) -> None:
    words = (file, "train.global_batch_size=8192")
    one, two = (
        command.run(_options(*words, *more, "--gpus-per-node", "1", "--gpu", "A100"))[0]
        for more in ((), ("train.micro_batch_size=512",))
    )
    assert two["train"]["passes"] == 2
    assert two["memory"]["parts"]["activations"] < one["memory"]["parts"]["activations"] / 4
    forward = one["flops"]["per_sample_forward"] * 8192
    assert two["flops"]["done_per_rank"] == pytest.approx(one["flops"]["done_per_rank"] + forward)
    assert two["flops"]["model_per_rank"] == one["flops"]["model_per_rank"]
    assert two["time"]["second_forward_s"] > 0 == one["time"]["second_forward_s"]


def test_a_calibrated_machine_takes_the_place_of_the_table(file: str, calibration: str) -> None:
    plan, _ = command.run(_options(file, "--gpu", "cpu", "--calibration", calibration))
    assert plan["world_size"] == 2, "as many ranks as were measured"
    assert plan["device"]["name"] == "a machine" and plan["time"]["host_s"] == 2e-3
    faster = {**MEASURED, "operator_s": 0.0}
    Path(calibration).write_text(json.dumps(faster))
    again, _ = command.run(_options(file, "--gpu", "cpu", "--calibration", calibration))
    assert again["time"]["forward_backward_s"] < plan["time"]["forward_backward_s"] / 5


def test_sweep_table_and_figure(file: str, tmp_path: Path) -> None:
    figure = tmp_path / "sweep.svg"
    result, text = command.run(
        _options(
            file,
            *("--gpu", "H100", "--price-per-gpu-hour", "2.5", "--figure", str(figure)),
            *("--sweep", "batch=4096,4095", "zero_stage=1,3", "nodes=1,512"),
        )
    )
    assert len(result["rows"]) == 8 and json.loads(json.dumps(result)) == result
    gone = [row for row in result["rows"] if "problem" in row]
    assert {row["batch"] for row in gone} == {4095} and len(gone) == 4
    assert all("not divisible by ray.num_workers" in row["problem"] for row in gone)
    small, *_, large = [row for row in result["rows"] if "problem" not in row]
    assert (small["world_size"], large["world_size"]) == (8, 4096)
    assert small["goodput"] > large["goodput"] and small["mfu"] > large["mfu"]
    assert small["steps"] == large["steps"] == 100 * 64 / 4096 // 1 + 1, "the same number of samples for all"
    assert "does not go" in text() and figure.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "H2000"], r"--gpu H2000: not in the table; did you mean 'H200'\? \(it has V100"),
        ([], "--gpu: name a device"),
        (["--gpu", "cpu"], "measure one by `symile-dist benchmark calibrate"),
        (["--gpu", "H200", "--nodes", "3"], "64 is not divisible by ray.num_workers = 24; use 48 or 72"),
        (["--gpu", "H200", "--nodes", "0"], "--nodes 0: should be 1 or more"),
        (["--gpu", "H200", "--gpus-per-node", "0"], "--gpus-per-node 0"),
        (["--gpu", "H200", "--epochs", "-1"], "--epochs -1.0: should be more than 0"),
        (["--gpu", "H200", "--epochs", "2"], "say --samples too"),
        (["--gpu", "H200", "--shape", "d=3"], "--shape d=...: the config has no such modality"),
        (["--gpu", "H200", "--shape", "a=x"], "--shape a=x: should be sizes such as 3x224x224"),
        (["--gpu", "H200", "--shape", "a"], "--shape a: should be MODALITY=SIZES"),
        (["--gpu", "H200", "--shape", "a=7"], "modality 'a': MLP: a sample has 7 values, input_dim is 6"),
        (["--gpu", "H200", "--sweep", "size=1"], "--sweep size=1: write batch=..., micro_batch_size=..."),
        (["--gpu", "H200", "--sweep", "nodes=a"], "'a' should be whole numbers"),
        (["--gpu", "H200", "--sweep", "batch=63,65"], "--sweep: no combination goes; the first: .*not divisible"),
        (["--gpu", "H200", "--figure", "a.png"], "--figure draws a sweep"),
        (["--gpu", "H200", "--figure", "a.pdf", "--sweep", "nodes=1"], "should end in .png or .svg"),
        (["--gpu", "H200", "--figure", "none/a.png", "--sweep", "nodes=1"], "there is no folder none"),
        (["--calibration", "none.json"], "--calibration none.json: no such file; make it"),
    ],
    ids=str,
)
def test_mistakes(words: list[str], said: str, file: str) -> None:
    with pytest.raises(ValueError, match=said):
        command.run(_options(file, *words))


def test_mistakes_of_the_config(file: str) -> None:
    with pytest.raises(ValueError, match="V100 has no such arithmetic"):
        command.run(_options(file, "train.precision=bf16", "--gpu", "V100"))
    with pytest.raises(ValueError, match=r"deepspeed.zero_optimization.reduce_scatter: plan knows only True"):
        command.run(_options(file, "deepspeed={zero_optimization: {reduce_scatter: false}}", "--gpu", "H200"))
    with pytest.raises(ValueError, match="modality 'a': the data cannot be read here"):
        command.run(_options(file, "modalities.a.encoder=identity", "--gpu", "H200"))
    with pytest.raises(ValueError, match="no such file"):
        command.run(_options("none.yaml", "--gpu", "H200"))


def test_a_file_that_is_no_calibration(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for text in ("[1]", "{}", "not json", json.dumps({**MEASURED, "collectives": 3})):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not what `symile-dist benchmark calibrate` writes"):
            command.run(_options("plan.yaml", "--calibration", str(path)))


def test_parse_sweep() -> None:
    assert parse_sweep(["stage=0,3", "batch=8"]) == {"zero_stage": [0, 3], "batch": [8]}


def test_the_table_has_a_source_for_every_device() -> None:
    for name, sheet in GPUS.items():
        assert sheet.source and sheet.fp32 <= sheet.halves and sheet.link >= sheet.network, name
        assert device_named(name).memory_bytes == sheet.memory * 1e9


def test_the_command_imports_nothing_heavy_until_it_runs() -> None:
    code = (
        "import sys, symile_dist.tools.plan.command, symile_dist.tools.plan.calibrate_command\n"
        "sys.exit(' '.join(sorted({'torch', 'numpy', 'deepspeed', 'ray'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# -- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_is_what_plan_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With figures in the place of those that processes measure."""
    figures = {key: value for key, value in MEASURED.items() if key.endswith("_s") or key == "collectives"}

    def on_ranks(function: Any, ranks: int, *arguments: Any) -> list[Any]:
        return [figures if function is calibrate._measure else {"clock_s": 0.5, "cpu_s": 0.25}] * ranks

    monkeypatch.setattr(calibrate, "on_ranks", on_ranks)
    out = tmp_path / "new" / "machine.json"
    options = argparse.Namespace(out=str(out), ranks=2, threads=1, device="cpu", no_check=False)
    found, text = calibrate_command.run(options)
    assert json.loads(out.read_text()) == found
    assert device_of(found).matmul_flops == MEASURED["matmul_flops_per_s"]
    assert 0 < found["step_s"] < 0.5, "what is left of a measured step that has next to no work"
    assert len(found["check"]) == len(calibrate.CASES)
    for one in found["check"]:
        assert one["measured_s"] == 0.5 and one["ratio"] == pytest.approx(one["predicted_s"] / 0.5)
        assert one["ratio_to_cpu"] == pytest.approx(2 * one["ratio"])
    assert "plan beside training" in text() and f"--calibration {out}" in text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"ranks": 0}, "--ranks 0: should be 1 or more"),
        ({"ranks": 65}, "64 at most"),
        ({"threads": 0}, "--threads 0"),
        ({"out": "."}, "--out .: is a folder"),
    ],
    ids=str,
)
def test_mistakes_of_calibration(words: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "on_ranks", None)
    with pytest.raises(ValueError, match=said):
        calibrate.calibrate(**{"out": "machine.json", **words})
