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
from symile_dist.tools.plan.collectives import Collective
from symile_dist.tools.plan.communication import Communication, step_communication, trained_modalities
from symile_dist.tools.plan.memory import Memory, step_memory
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
CASES = [
    *STAGES,
    *([*stage, "train.micro_batch_size=3"] for stage in STAGES),
    *([*stage, "train.precision=bf16"] for stage in STAGES),
    ["objective.negative_sampling=n_squared"],
    ["objective.negative_sampling=sheets", "objective.sheets=3"],
    ["objective=pairwise_clip"],
    ["objective=pairwise_sigmoid", "optimizer.max_grad_norm=0", "train.zero_stage=0"],
    ["train.zero_stage=1", f"deepspeed={{zero_optimization: {{{BUCKETS}}}}}"],
    ["train.zero_stage=2", f"deepspeed={{zero_optimization: {{{BUCKETS}}}}}"],
    ["train.zero_stage=3", f"deepspeed={{zero_optimization: {{{COORDINATOR}}}}}"],
    ["train.zero_stage=3", f"deepspeed={{zero_optimization: {{{COORDINATOR}}}}}", "train.micro_batch_size=2"],
    ["train.zero_stage=3", "train.activation_checkpointing=true", "modalities.a.freeze=true"],
]
STEPS = 6
"""Stage 3 records its order in the first ones."""


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
    found = []
    for overrides in cases:
        config = _config(text, dist.get_world_size(), overrides)
        engine = Engine(config, torch.device("cpu"))
        batch = make_batch(_inputs(dimension), config.train.global_batch_size // config.world_size, "cpu")
        for tensor in batch.inputs.values():
            assert isinstance(tensor, torch.Tensor)
            tensor.normal_()
        for step in range(STEPS):
            with Calls() as calls:
                taken = _a_step(engine, config, batch, step)
        found.append((taken, calls.found))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_collectives_are_exact(world: int) -> None:
    ranks = run_distributed(_real_calls, world, CASES, SMALL, DIMENSION)
    for number, overrides in enumerate(CASES):
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
MEMORY_CASES = [
    *STAGES,
    *([*stage, "train.precision=bf16"] for stage in STAGES),
    *([*stage, "train.micro_batch_size=32"] for stage in STAGES),
    *([*stage, "train.global_batch_size=4096"] for stage in (STAGES[1], STAGES[3])),
    ["train.zero_stage=2", "train.global_batch_size=4096", "train.activation_checkpointing=true"],
    ["train.zero_stage=1", "train.global_batch_size=2048", "objective=pairwise_clip"],
]
TOLERANCE = 0.15


def _real_memory(cases: list[list[str]]) -> list[tuple[int, int]]:
    """Per case the bytes between steps, and at the most in a step."""
    from symile_dist.engine import Engine

    _environment()
    found = []
    for overrides in cases:
        config = _config(LARGE, dist.get_world_size(), overrides)
        with Meter("cpu") as meter:
            engine = Engine(config, torch.device("cpu"))
            batch = make_batch(_inputs(256), config.train.global_batch_size // config.world_size, "cpu")
            for step in range(3):  # moments come with the first
                gc.collect()
                meter.reset_peak()
                rest = meter.alive
                _a_step(engine, config, batch, step)
            found.append((rest, meter.peak))
        del engine, batch
        gc.collect()
    return found


def test_memory_is_within_15_percent() -> None:
    world = 2
    ranks = run_distributed(_real_memory, world, MEMORY_CASES)
    lines, wrong = [], []
    for number, overrides in enumerate(MEMORY_CASES):
        config = _config(LARGE, world, overrides)
        encoders, objective, communication = _planned(config, _inputs(256))
        memory: Memory = step_memory(config, encoders, communication, objective.held, _inputs(256), "cpu")
        rest, peak = (max(rank[number][which] for rank in ranks) for which in (0, 1))
        ratios = (sum(memory.at_rest.values()) + memory.parts["batch"]) / rest, memory.peak / peak
        lines.append(f"{' '.join(overrides)}: planned / measured {ratios[0]:.3f} at rest, {ratios[1]:.3f} at the most")
        wrong += [lines[-1] for ratio in ratios if abs(ratio - 1) > TOLERANCE]
    print("\n".join(lines))
    assert not wrong, "\n".join(wrong)
