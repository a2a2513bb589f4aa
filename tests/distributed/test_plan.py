"""What plan says of a step, beside steps of the real engine: collectives to the byte, memory within 15%.

Collectives are counted as torch's operators (`c10d::...`), below torch.distributed: whatever is called there, by us or
by DeepSpeed, passes them. Memory is counted as the storages that operators make, while they are alive (`Meter`).
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from symile_dist.config import Config, parse_config
from symile_dist.distributed import all_reduce_sum
from symile_dist.tools.plan.calibrate import CONVNETS, SHAPES
from symile_dist.tools.plan.collectives import Collective
from symile_dist.tools.plan.communication import Communication, step_communication, trained_modalities
from symile_dist.tools.plan.memory import step_memory
from symile_dist.tools.plan.meter import Meter, tensors_in
from symile_dist.tools.plan.objective import Objective, run_objective
from symile_dist.tools.plan.shapes import InputShape, make_batch
from symile_dist.tools.plan.step import Encoders, run_encoders
from tests.processes import run_distributed

DIMENSION = 6
SMALL = """
run: {name: plan}
data: {train: none}
modalities:
  a: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  b: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6, hidden: [10]}}
  c: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 6}, lr: 2e-2,
      missing_embedding: true}
model: {embedding_dim: 16, logit_scale_init: -1}
train: {steps: 100, global_batch_size: 16}
"""
BUCKETS = "reduce_bucket_size: 200"
COORDINATOR = (
    f"{BUCKETS}, stage3_param_persistence_threshold: 50, stage3_prefetch_bucket_size: 150, "
    "stage3_max_reuse_distance: 100, stage3_max_live_parameters: 300"
)
STAGES = [[f"train.zero_stage={stage}"] for stage in range(4)]
# At both world sizes; the others at two ranks.
AT_ALL = [
    *STAGES,
    *([*stage, "train.micro_batch_size=3"] for stage in STAGES),
    ["objective.negative_sampling=n_squared"],
    ["objective.negative_sampling=sheets", "objective.sheets=3"],
    ["objective=pairwise_clip"],
]
CASES = [
    *AT_ALL,
    *([*stage, "train.precision=bf16"] for stage in STAGES),
    ["objective=pairwise_sigmoid", "optimizer.max_grad_norm=0", "train.zero_stage=0"],
    ["train.zero_stage=1", f"deepspeed={{zero_optimization: {{{BUCKETS}}}}}"],
    ["train.zero_stage=2", f"deepspeed={{zero_optimization: {{{BUCKETS}}}}}", "train.offload=optimizer"],
    ["train.zero_stage=3", f"deepspeed={{zero_optimization: {{{COORDINATOR}}}}}"],
    ["train.zero_stage=3", f"deepspeed={{zero_optimization: {{{COORDINATOR}}}}}", "train.micro_batch_size=2"],
    ["train.zero_stage=3", "train.activation_checkpointing=true", "modalities.a.freeze=true"],
]
STEPS = {0: 2, 1: 2, 2: 2, 3: 4}
"""By stage; stage 3 records its order in the first ones."""


def _config(text: str, world: int, overrides: list[str]) -> Config:
    return parse_config(text, "plan.yaml", [*overrides, f"ray.num_workers={world}", "guard.action=skip"]).config


def _inputs(dimension: int) -> dict[str, InputShape]:
    return {name: InputShape((dimension,), torch.float32, False, "test") for name in "abc"}


def _planned(config: Config, inputs: dict[str, InputShape]) -> tuple[Encoders, Objective, Communication]:
    encoders = run_encoders(config, inputs, (config.encoded_at_once,))
    local = config.train.global_batch_size // config.world_size
    objective = run_objective(
        encoders.model,
        encoders.representations,
        config.train.precision,
        trained_modalities(config),
        local,
        config.world_size,
        "cpu",
    )
    return encoders, objective, step_communication(config, encoders.model, encoders.passes, objective)


Call = tuple[str, str, int, int]
"""Name, dtype, bytes of all ranks' parts, own bytes."""
NAMES = {
    # operator -> name in torch.distributed, and the places of both tensors among its tensors
    "c10d::allreduce_": ("all_reduce", 0, 0),
    "c10d::broadcast_": ("broadcast", 0, 0),
    "c10d::_allgather_base_": ("all_gather_into_tensor", 0, 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter_tensor", 1, 1),
}


class Calls(TorchDispatchMode):
    """Every collective inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func._schema.name
        if operator.startswith("c10d::"):
            name, whole, own = NAMES[operator]
            tensors = list(tensors_in(args))
            sizes = [tensors[place].numel() * tensors[place].element_size() for place in (whole, own)]
            self.found[name, str(tensors[own].dtype).removeprefix("torch."), *sizes] += 1
        return func(*args, **(kwargs or {}))


def _calls(planned: list[Collective]) -> Counter[Call]:
    return Counter((call.name, call.dtype, call.full_bytes, call.own_bytes) for call in planned)


def _environment() -> None:
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")


def _a_step(engine: Any, config: Config, batch: Any, step: int) -> bool:
    """A step as the loop takes it, with the guard asked and the samples counted; whether it was taken."""
    from symile_dist.health.guard import Guard, GuardState
    from symile_dist.metrics.recorder import Recorder
    from symile_dist.step import train_step
    from symile_dist.train import TrainState, _count

    recorder, loader = Recorder(), SimpleNamespace(queue_depth=0)
    trained = train_step(engine, batch, step, recorder, Guard(config.guard, GuardState()).admits)
    if dist.get_backend() == "fake":  # nothing is added up there: the loop would miss the other ranks' samples
        all_reduce_sum(torch.zeros(3, dtype=torch.int64))
        return trained.result.applied
    wishes = {"stop": False, "save": False}
    _count(config, engine, TrainState(), batch, None, loader, recorder, 0.1, wishes)  # type: ignore[arg-type]
    return trained.result.applied


def _real_calls(cases: list[list[str]], text: str, dimension: int) -> list[tuple[bool, Counter[Call]]]:
    from symile_dist.engine import Engine

    _environment()
    found, linear = [], torch.nn.functional.linear
    for overrides in cases:
        config = _config(text, dist.get_world_size(), overrides)
        engine = Engine(config, torch.device("cpu"))
        batch = make_batch(_inputs(dimension), config.train.global_batch_size // config.world_size, "cpu")
        for tensor in batch.inputs.values():
            assert isinstance(tensor, torch.Tensor)
            tensor.normal_()
        for step in range(STEPS[config.train.zero_stage]):
            with Calls() as calls:
                taken = _a_step(engine, config, batch, step)
        found.append((taken, calls.found))
        torch.nn.functional.linear = linear  # stage 3 leaves its own behind
    return found


@pytest.mark.parametrize(("world", "cases"), [(2, CASES), (4, AT_ALL)], ids=["2", "4"])
def test_collectives_are_exact(world: int, cases: list[list[str]]) -> None:
    ranks = run_distributed(_real_calls, world, cases, SMALL, DIMENSION)
    for number, overrides in enumerate(cases):
        config = _config(SMALL, world, overrides)
        expected = _calls(_planned(config, _inputs(DIMENSION))[2].calls)
        for rank in range(world):
            taken, found = ranks[rank][number]
            assert taken, f"{overrides}: the step was skipped: its collectives are others"
            assert found == expected, (
                f"{overrides}, rank {rank}: only real {found - expected}, only planned {expected - found}"
            )


def _calls_of_many(world: int, cases: list[list[str]], text: str, dimension: int) -> list[tuple[bool, Counter[Call]]]:
    """Rank 0 of a world whose collectives do nothing: a single process."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from symile_dist import distributed, engine

    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    distributed.host_group = engine.host_group = lambda group=None: dist.group.WORLD  # type: ignore
    return _real_calls(cases, text, dimension)


def test_collectives_of_many_ranks_are_exact() -> None:
    world = 96
    cases = [[*case, "train.global_batch_size=384"] for case in (*STAGES, [*STAGES[3], "train.micro_batch_size=2"])]
    (found,) = run_distributed(_calls_of_many, 1, world, cases, SMALL, DIMENSION)
    for overrides, (_, calls) in zip(cases, found, strict=True):
        expected = _calls(_planned(_config(SMALL, world, overrides), _inputs(DIMENSION))[2].calls)
        assert calls == expected, f"{overrides}: only real {calls - expected}, only planned {expected - calls}"


# -- memory ----------------------------------------------------------------------------------------------------------

LARGE = """
run: {name: plan}
data: {train: none, loader_processes: 0}
modalities:
  a: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 256, hidden: [512, 512]}}
  b: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 256, hidden: [512]}}
  c: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 256, hidden: [512]}}
model: {embedding_dim: 64, logit_scale_init: -1}
train: {steps: 100, global_batch_size: 256}
deepspeed: {zero_optimization: {reduce_bucket_size: 1000000}}
"""
# A bucket of DeepSpeed's default size, 2 GB, would hide everything else.
MLP_CASES = [
    *STAGES,
    *([*stage, "train.micro_batch_size=32"] for stage in STAGES),
    ["train.zero_stage=0", "train.precision=bf16"],
    ["train.zero_stage=1", "train.precision=bf16"],
    ["train.zero_stage=3", "train.precision=bf16"],
    ["train.zero_stage=2", "train.global_batch_size=2048", "train.activation_checkpointing=true"],
    ["train.zero_stage=1", "train.global_batch_size=2048", "objective=pairwise_clip"],
]
SEQUENCES = """
run: {name: plan}
data: {train: none, loader_processes: 0}
modalities:
  a: {member: npy, decoder: npy, transform: tensor, encoder: {name: feature_transformer, input_dim: 64, layers: 2,
      heads: 4, feedforward: 256, dropout: 0.0}}
  b: {member: npy, decoder: npy, transform: tensor, encoder: {name: feature_transformer, input_dim: 64, layers: 2,
      heads: 4, feedforward: 256, dropout: 0.1}}
  c: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 64}}
model: {embedding_dim: 64, logit_scale_init: -1}
train: {steps: 100, global_batch_size: 64}
deepspeed: {zero_optimization: {reduce_bucket_size: 1000000}}
"""
MODELS = {
    "mlps": (LARGE, _inputs(256)),
    "convnets": (CONVNETS, SHAPES["convnets"]),
    "sequences": (
        SEQUENCES,
        {**dict.fromkeys("ab", InputShape((50, 64), torch.float32, False, "test")), "c": _inputs(64)["c"]},
    ),
}
MEASURED = [
    *(("mlps", case) for case in MLP_CASES),
    ("convnets", ["train.zero_stage=1"]),
    ("convnets", ["train.zero_stage=2", "train.micro_batch_size=32", "train.precision=bf16"]),
    ("sequences", ["train.zero_stage=1"]),
]
TOLERANCE = 0.15


def _real_memory(cases: list[tuple[str, list[str]]]) -> list[tuple[int, int]]:
    """Per case the bytes between steps, and at the most in a step."""
    from symile_dist.engine import Engine

    _environment()
    found, linear = [], torch.nn.functional.linear
    for name, overrides in cases:
        text, inputs = MODELS[name]
        config = _config(text, dist.get_world_size(), overrides)
        with Meter("cpu") as meter:
            engine = Engine(config, torch.device("cpu"))
            batch = make_batch(inputs, config.train.global_batch_size // config.world_size, "cpu")
            for step in range(2):  # moments come with the first
                gc.collect()
                meter.reset_peak()
                rest = meter.alive
                _a_step(engine, config, batch, step)
            found.append((rest, meter.peak))
        del engine, batch
        gc.collect()
        torch.nn.functional.linear = linear
    return found


def test_memory_is_within_15_percent() -> None:
    world = 2
    ranks = run_distributed(_real_memory, world, MEASURED)
    lines, wrong = [], []
    for number, (name, overrides) in enumerate(MEASURED):
        text, inputs = MODELS[name]
        config = _config(text, world, overrides)
        encoders, objective, communication = _planned(config, inputs)
        memory = step_memory(config, encoders, communication, objective.held, inputs, "cpu")
        rest, peak = (max(rank[number][which] for rank in ranks) for which in (0, 1))
        ratios = (sum(memory.at_rest.values()) + memory.parts["batch"]) / rest, memory.peak / peak
        told = f"{name} {' '.join(overrides)}: {peak / 1e6:.1f} MB at the most"
        lines.append(f"{told}, planned / measured {ratios[1]:.3f}; at rest {ratios[0]:.3f}")
        wrong += [lines[-1] for ratio in ratios if abs(ratio - 1) > TOLERANCE]
    print("\n".join(lines))
    assert not wrong, "\n".join(wrong)
