"""Every option of training that saves memory or time, switched on over two real processes: none changes the outcome.

Offload, partitioned construction, activation checkpointing, torch.compile; fp16 and its loss scale; batch normalisation
over ranks. All of it runs on the CPU, fp16 too; what a CPU cannot show is how much memory and time they save on a GPU.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from symile_dist.config import Config, parse_config
from symile_dist.types import Batch
from tests.pretrained import save_text
from tests.processes import run_distributed
from tests.shards import write_shards

BATCH, INPUT, STEPS, POISONED = 12, 6, 3, 1
TEXT = f"""
run: {{name: options}}
data: {{train: none}}
modalities:
  a: {{member: npy, decoder: npy, transform: tensor, encoder: "{__name__}:Normalized"}}
  b: {{member: npy, decoder: npy, transform: tensor, encoder: {{name: xlm_roberta, missing_token: true}}}}
  c: {{member: npy, decoder: npy, transform: tensor, encoder: {{name: features, input_dim: 6, fill: learned}}}}
model: {{embedding_dim: 16, logit_scale_init: -1}}
optimizer: {{lr: 1e-2, max_grad_norm: 1, warmup_steps: 2}}
train: {{steps: 8, global_batch_size: 12}}
"""
STAGE_3 = "train.zero_stage=3"
TWO_PASSES = ("train.micro_batch_size=4", "train.freeze_batch_norm=true")
# Case -> overrides; the first of each group is what the others must equal.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "one pass": {
        "plain": ("train.zero_stage=0",),
        "stage 2, optimizer offloaded": ("train.zero_stage=2", "train.offload=optimizer"),
        "stage 3, parameters offloaded": (STAGE_3, "train.offload=parameters"),
        "stage 3, partitioned when built": (STAGE_3, "train.partitioned_init=true"),
        "stage 3, all of it": (
            STAGE_3, "train.offload=parameters", "train.partitioned_init=true", "train.activation_checkpointing=true",
        ),
        "stage 0, recomputed": ("train.zero_stage=0", "train.activation_checkpointing=true"),
        "stage 1, compiled": ("train.zero_stage=1", "train.compile=true"),
        "stage 1, compiled and recomputed": (
            "train.zero_stage=1", "train.compile=true", "train.activation_checkpointing=true",
        ),
    },
    "two passes": {
        "plain": ("train.zero_stage=1", *TWO_PASSES),
        "stage 1, optimizer offloaded": ("train.zero_stage=1", "train.offload=optimizer", *TWO_PASSES),
        "stage 2, optimizer offloaded": ("train.zero_stage=2", "train.offload=optimizer", *TWO_PASSES),
        "stage 3, parameters offloaded": (STAGE_3, "train.offload=parameters", *TWO_PASSES),
        "stage 2, recomputed": ("train.zero_stage=2", "train.activation_checkpointing=true", *TWO_PASSES),
    },
    "bf16": {
        "plain": (STAGE_3, "train.precision=bf16"),
        "partitioned when built": (STAGE_3, "train.precision=bf16", "train.partitioned_init=true"),
    },
    "fp16": {
        "plain": ("train.zero_stage=1", "train.precision=fp16", "deepspeed.fp16.initial_scale_power=8"),
        "stage 2, offloaded": (
            "train.zero_stage=2", "train.precision=fp16", "deepspeed.fp16.initial_scale_power=8",
            "train.offload=optimizer",
        ),
        "stage 3": (STAGE_3, "train.precision=fp16", "deepspeed.fp16.initial_scale_power=8"),
    },
    "fp16, two passes": {
        "plain": ("train.zero_stage=1", "train.precision=fp16", "deepspeed.fp16.initial_scale_power=8", *TWO_PASSES),
        "stage 3": (STAGE_3, "train.precision=fp16", "deepspeed.fp16.initial_scale_power=8", *TWO_PASSES),
    },
}  # fmt: skip
CASES = [(group, case) for group, cases in GROUPS.items() for case in cases]


class Normalized(nn.Sequential):
    """Its output depends on the neighbours and on the random state."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__(
            nn.Linear(INPUT, 24, bias=False),
            nn.BatchNorm1d(24),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(24, embedding_dim),
        )


def configured(text_model: str, *overrides: str, world_size: int) -> Config:
    fixed = [f"ray.num_workers={world_size}", f"modalities.b.encoder.model={text_model}"]
    return parse_config(TEXT, "options.yaml", [*fixed, *overrides]).config


def batch_of(step: int, poisoned: bool = False) -> Batch:
    """This rank's rows of a global batch: some lack a modality, one slot holds no sample."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    generator = torch.Generator().manual_seed(step)
    inputs: dict[str, Any] = {name: torch.randn(BATCH, INPUT, generator=generator)[rows] for name in "ac"}
    ids = torch.randint(4, 19, (BATCH, 5), generator=generator)
    ids[:, 0], ids[:, 4] = 0, 2
    inputs["b"] = ids[rows]
    if poisoned and rank == world_size - 1:
        inputs["a"] = torch.full_like(inputs["a"], torch.nan)
    present = (torch.rand(BATCH, 3, generator=generator) < 0.8)[rows]
    valid = (torch.arange(BATCH) != 3)[rows]
    return Batch(inputs, present, valid, torch.arange(len(valid)))


def started(text_model: str, *overrides: str) -> Any:
    from symile_dist.engine import Engine

    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    torch.manual_seed(7)  # dropout: the same on all ranks, and in all cases
    return Engine(configured(text_model, *overrides, world_size=world_size), torch.device("cpu"))


def weights_of(engine: Any) -> dict[str, Tensor]:
    """Whole master weights and running statistics."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if engine.config.train.zero_stage else None
        found[name] = (parameter if master is None else master).detach().float().clone()
    return found | {name: buffer.float().clone() for name, buffer in engine.module.named_buffers() if "running" in name}


def take_step(engine: Any, step: int, poisoned: bool = False) -> tuple[float, Any]:
    from symile_dist.gradcache import forward_backward

    batch, size = batch_of(step, poisoned), engine.config.encoded_at_once
    if size < len(batch):
        report = forward_backward(engine, batch, step, size)
    else:
        report = engine.forward(batch, step)
        engine.backward(report.loss)
    return float(report.loss.detach()), engine.step(step)


def run(text_model: str, *overrides: str, poisoned: bool = False) -> dict[str, Any]:
    engine = started(text_model, *overrides)
    first = weights_of(engine)
    steps, before, after = [], {}, {}
    for step in range(STEPS):
        poison = poisoned and step == POISONED
        before = weights_of(engine) if poison else before
        loss, result = take_step(engine, step, poison)
        after = weights_of(engine) if poison else after
        steps.append((loss, result.applied, result.grad_norm, result.rescaled))
    found = {"first": first, "steps": steps, "weights": weights_of(engine), "before": before, "after": after}
    return found


def every_case(text_model: str, directory: str) -> dict[str, Any]:
    """What a rank finds, in one start of the processes."""
    import torch._dynamo

    # The real compiler takes half a minute; what it is given, and where it is switched on, is seen without it.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for group, case in CASES:
        torch._dynamo.reset()  # what was compiled for one case would do for another
        torch._dynamo.utils.counters.clear()
        found[f"{group}: {case}"] = run(text_model, *GROUPS[group][case])
        found[f"{group}: {case}"]["compiled"] = torch._dynamo.utils.counters["frames"]["ok"]
    fp16 = ("train.precision=fp16", "deepspeed.fp16.initial_scale_power=8")
    for stage in (1, 3):
        found[f"poisoned fp16 {stage}"] = run(text_model, f"train.zero_stage={stage}", *fp16, poisoned=True)
    offloaded = ("train.zero_stage=2", "train.offload=optimizer", *TWO_PASSES)
    found["poisoned, offloaded, two passes"] = run(text_model, *offloaded, poisoned=True)
    for stage in (2, 3):
        found[f"overflow {stage}"] = overflow(text_model, stage)
    found["statistics"] = shared_statistics(text_model)
    found["checkpoints"] = {stage: checkpoints(text_model, Path(directory), stage) for stage in (0, 2, 3)}
    found["warm start"] = warm_start(text_model)
    found["synchronized"] = synchronized(text_model)
    found["products"] = [products(text_model, precision) for precision in ("medium", "high", "highest")]
    return found


def alone(text_model: str, directory: str) -> dict[str, Any]:
    """What one process finds, without others."""
    return {"synchronized": synchronized(text_model), "loop": train_with_overflow(directory)}


def products(text_model: str, precision: str) -> str:
    """How float32 matrices are multiplied once an engine is there."""
    started(text_model, f"train.float32_matmul_precision={precision}")
    return torch.get_float32_matmul_precision()


def overflow(text_model: str, stage: int) -> dict[str, Any]:
    """Begins with a scale that no gradient survives and with one halving left."""
    scale = ("deepspeed.fp16={initial_scale_power: 31, hysteresis: 1, min_loss_scale: 1073741824}",)
    engine = started(text_model, "train.precision=fp16", f"train.zero_stage={stage}", *scale)
    before, steps = weights_of(engine), []
    for step in range(STEPS):
        _, result = take_step(engine, step)
        steps.append((result.applied, result.rescaled, engine.loss_scale()))
    after = weights_of(engine)
    parameters = dict(engine.module.named_parameters())
    return {"steps": steps, "unchanged": all(torch.equal(before[name], after[name]) for name in parameters)}


def shared_statistics(text_model: str) -> dict[str, Any]:
    """A rank's running statistics in training and as evaluation begins."""
    engine = started(text_model)
    take_step(engine, 0)
    name = "model.encoders.a.1.running_mean"
    own = weights_of(engine)[name]
    engine.train(False)
    return {"own": own, "in evaluation": weights_of(engine)[name]}


def checkpoints(text_model: str, directory: Path, stage: int) -> dict[str, Any]:
    """Saves after a step, goes on; loads into a new engine, goes on: the same. What evaluation reads of it."""
    from symile_dist.checkpoint.manager import CheckpointManager
    from symile_dist.checkpoint.reshape import consolidated_weights

    more = ("train.precision=fp16", "train.offload=optimizer", "modalities.c.freeze=true") if stage == 2 else ()
    overrides = (f"train.zero_stage={stage}", f"run.directory={directory}/stage-{stage}", *more)
    engine = started(text_model, *overrides)
    manager = CheckpointManager(engine.config)
    take_step(engine, 0)
    manager.save(engine, 1, {}, {})
    at_save, scale = weights_of(engine), engine.loss_scale()
    take_step(engine, 1)  # while the save is on its way
    manager.finish()
    other = started(text_model, *overrides)
    manifest = manager.find()
    assert manifest is not None
    manager.load(other, manifest)
    same_scale = other.loss_scale() == scale
    take_step(other, 1)
    consolidated = consolidated_weights(manager.directory / "step-00000001")
    parameters = [name for name, _ in engine.module.named_parameters()]
    return {
        "resumed": all(torch.equal(weights_of(engine)[name], weights_of(other)[name]) for name in parameters),
        "same scale": same_scale,
        "saved": at_save,
        "consolidated": consolidated,
    }


def warm_start(text_model: str) -> dict[str, Any]:
    """Another run's weights into parameters that are partitioned already."""
    from symile_dist.engine import Engine

    source = {name: torch.full_like(tensor, 0.25) for name, tensor in weights_of(started(text_model)).items()}
    config = configured(text_model, STAGE_3, "train.partitioned_init=true", world_size=dist.get_world_size())
    engine = Engine(config, torch.device("cpu"), {name: source[name] for name in list(source)[::2]})
    found = weights_of(engine)
    return {
        "named": [name for name, _ in engine.module.named_parameters() if name in list(source)[::2]],
        "told": engine.warm_started,
        "copied": all(bool((found[name] == 0.25).all()) for name in engine.warm_started),
    }


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_text(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def ranks(text_model: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(every_case, 2, text_model, str(tmp_path_factory.mktemp("runs")), timeout=290.0)


def difference(name: str, found: Tensor, expected: Tensor) -> float:
    """Relative; none of what no gradient reaches, as softmax sees no shift: there the optimizer follows rounding."""
    if name.endswith("key.bias"):
        return 0.0
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))


@pytest.fixture(scope="module")
def lone_rank(text_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = run_distributed(alone, 1, text_model, str(tmp_path_factory.mktemp("alone")))
    return dict(found)


@pytest.mark.parametrize(("group", "case"), CASES)
def test_no_option_changes_what_is_learned(ranks: list[Any], group: str, case: str) -> None:
    reference, found = ranks[0][f"{group}: plain"], ranks[0][f"{group}: {case}"]
    tolerance = 5e-3 if "fp16" in group else 2e-5  # half precision rounds sums in another order otherwise
    for name, weights in reference["first"].items():
        assert torch.equal(found["first"][name], weights), f"{name} begins otherwise"
    for step, ((loss, _, norm, _), (other, applied, other_norm, _)) in enumerate(
        zip(reference["steps"], found["steps"], strict=True)
    ):
        assert applied, f"step {step} was skipped"
        assert other == pytest.approx(loss, rel=tolerance), f"loss of step {step}"
        assert other_norm == pytest.approx(norm, rel=3 * tolerance), f"gradient norm of step {step}"
    for name, weights in reference["weights"].items():
        error = difference(name, found["weights"][name], weights)
        assert error < 10 * tolerance, f"{name}: relative error {error:.1e}"
    for name, weights in found["weights"].items():
        if "running" not in name:  # those are a rank's own
            assert torch.equal(weights, ranks[1][f"{group}: {case}"]["weights"][name]), f"{name}: the ranks differ"


@pytest.mark.parametrize("passes", ["one pass", "two passes"])
def test_fp16_differs_from_fp32_by_its_rounding_only(ranks: list[Any], passes: str) -> None:
    half = ranks[0]["fp16: plain" if passes == "one pass" else "fp16, two passes: plain"]
    for (loss, _, norm, _), (other, applied, other_norm, _) in zip(
        ranks[0][f"{passes}: plain"]["steps"], half["steps"], strict=True
    ):
        assert applied and other == pytest.approx(loss, rel=2e-2) and other_norm == pytest.approx(norm, rel=3e-2)


def test_all_encoders_are_compiled(ranks: list[Any]) -> None:
    found = {case: ranks[0][f"{group}: {case}"]["compiled"] for group, case in CASES if group == "one pass"}
    assert found["stage 1, compiled"] >= 3 and found["stage 1, compiled and recomputed"] >= 3
    assert not any(frames for case, frames in found.items() if "compiled" not in case)


def test_an_encoder_s_weights_are_trained_ones_whatever_the_construction(ranks: list[Any], text_model: str) -> None:
    from safetensors.torch import load_file

    trained = load_file(Path(text_model) / "model.safetensors")["embeddings.word_embeddings.weight"]
    for case in ("one pass: plain", "one pass: stage 3, partitioned when built"):
        found = ranks[0][case]["first"]["model.encoders.b.model.embeddings.word_embeddings.weight"]
        assert found.shape == (51, 16) and torch.equal(found[:50], trained), case


@pytest.mark.parametrize("case", ["poisoned fp16 1", "poisoned fp16 3", "poisoned, offloaded, two passes"])
def test_a_poisoned_step_is_skipped_by_all(ranks: list[Any], case: str) -> None:
    for found in (rank[case] for rank in ranks):
        assert [step[1] for step in found["steps"]] == [step != POISONED for step in range(STEPS)]
        assert not any(step[3] for step in found["steps"]), "its loss was not finite: no matter of fp16's range"
        assert math.isnan(found["steps"][POISONED][0]) and math.isfinite(found["steps"][POISONED + 1][0])
        for name, weights in found["before"].items():
            assert "running" in name or torch.equal(weights, found["after"][name]), name
        assert all(tensor.isfinite().all() for name, tensor in found["weights"].items() if "running" not in name)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_overflow_lowers_the_scale_on_all_ranks_alike(ranks: list[Any], stage: int) -> None:
    for rank in ranks:
        found = rank[f"overflow {stage}"]
        # At the lowest scale an overflow is a skip like any other: it counts against guard.patience.
        assert found["steps"] == [(False, True, 2.0**30), (False, False, 2.0**30), (False, False, 2.0**30)]
        assert found["unchanged"]


def test_evaluation_begins_with_the_running_statistics_of_rank_0(ranks: list[Any]) -> None:
    first, second = (rank["statistics"] for rank in ranks)
    assert not torch.equal(first["own"], second["own"]), "each rank's are of its own rows"
    assert torch.equal(first["in evaluation"], first["own"]) and torch.equal(second["in evaluation"], first["own"])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_holds_running_statistics_and_goes_on_bitwise(ranks: list[Any], stage: int) -> None:
    first = ranks[0]["checkpoints"][stage]
    assert all(rank["checkpoints"][stage]["resumed"] and rank["checkpoints"][stage]["same scale"] for rank in ranks)
    for name, tensor in first["saved"].items():
        assert torch.equal(first["consolidated"][name], tensor), name
    assert first["consolidated"]["model.encoders.a.1.running_mean"].any(), "zero is where it begins"


def test_a_warm_start_of_partitioned_parameters(ranks: list[Any]) -> None:
    found = ranks[0]["warm start"]
    assert found["told"] == found["named"] and found["told"] and found["copied"]


# -- batch normalisation over all ranks -------------------------------------------------------------------------------


def synchronized(text_model: str) -> dict[str, Any]:
    """Without dropout, which ranks draw for their own rows."""
    overrides = ("train.sync_batch_norm=true", "train.zero_stage=0")
    engine = started(text_model, *overrides)
    for part in engine.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return {"steps": [take_step(engine, step)[0] for step in range(STEPS)], "weights": weights_of(engine)}


def test_two_ranks_normalise_like_one(ranks: list[Any], lone_rank: dict[str, Any]) -> None:
    expected = lone_rank["synchronized"]
    for found in (rank["synchronized"] for rank in ranks):
        assert found["steps"] == pytest.approx(expected["steps"], rel=1e-5)
        for name, weights in expected["weights"].items():
            error = difference(name, found["weights"][name], weights)
            assert error < 1e-4, f"{name}: relative error {error:.1e}"


def test_precision_of_products_is_the_configured_one(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["products"] == ["medium", "high", "highest"]


# -- the loop ---------------------------------------------------------------------------------------------------------


def train_with_overflow(directory: str) -> dict[str, Any]:
    from symile_dist.data.manifest import index_directory
    from symile_dist.metrics.recorder import Recorder
    from symile_dist.rank import train_rank
    from tests.shards import config_text

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    data = write_shards(Path(directory) / "train", [12, 12])
    index_directory(data)
    overrides = [
        f"run.directory={directory}/run", "train.precision=fp16", "deepspeed.fp16.initial_scale_power=36",
        "deepspeed.fp16.hysteresis=1", "guard.patience=2", "train.steps=5", "train.log_every=1",
    ]  # fmt: skip
    config = parse_config(config_text(data), "overflow.yaml", overrides).config
    (Path(directory) / "run").mkdir()
    state = train_rank(config, 0, torch.device("cpu"), Recorder(None))
    history = [json.loads(line) for line in (Path(directory) / "run/history.jsonl").read_text().splitlines()]
    return {
        "skipped": state.skipped_steps,
        "consecutive": state.guard.consecutive_skips,
        "scales": [math.log2(record["loss_scale"]) for record in history if record["kind"] == "train"],
        "told": sum("gradients exceed fp16's range" in record.get("message", "") for record in history),
    }


def test_lowering_the_scale_is_counted_but_does_not_end_the_run(lone_rank: dict[str, Any]) -> None:
    assert lone_rank["loop"] == {"skipped": 5, "consecutive": 0, "scales": [35, 34, 33, 32, 31], "told": 5}


# -- the real compiler ------------------------------------------------------------------------------------------------


def compiled(text_model: str) -> list[list[Any]]:
    import torch._inductor.config

    torch._inductor.config.fallback_random = True  # dropout as without it
    return [
        run(text_model, "train.zero_stage=1", *more)["steps"]
        for more in ((), ("train.compile=true",), ("train.compile=true", "train.activation_checkpointing=true"))
    ]


@pytest.mark.slow
def test_compiled_by_inductor(text_model: str) -> None:
    (found,) = run_distributed(compiled, 1, text_model, timeout=290.0)
    for other in found[1:]:
        for (loss, _, norm, _), (other_loss, applied, other_norm, _) in zip(found[0], other, strict=True):
            assert (
                applied and other_loss == pytest.approx(loss, rel=1e-4) and other_norm == pytest.approx(norm, rel=1e-3)
            )
