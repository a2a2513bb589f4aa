"""ZeRO 0-2: flat groups, their shares and buckets, and what DeepSpeed 0.19 hands to collectives in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from symile_dist.config import Config
from symile_dist.optim import parameter_groups
from symile_dist.tools.plan.collectives import Collective, all_gather, all_reduce
from symile_dist.tools.plan.trace import DTYPES, Event, Model
from symile_dist.tools.plan.zero3 import Settings

STAGE_0_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once without ZeRO."""
ALIGNMENT = 2
"""Elements per rank that a flat group is padded to."""


def settings_of(config: Config) -> Settings:
    """What the config says under `deepspeed.zero_optimization`, which may have `stage3_` before a name.

    Raises ValueError for settings that change what is communicated in ways that are not modelled here.
    """
    said: dict[str, Any] = dict(config.deepspeed.get("zero_optimization", {}))
    for key, usual in (
        ("reduce_scatter", True),
        ("contiguous_gradients", True),
        ("round_robin_gradients", False),
        ("use_multi_rank_bucket_allreduce", True),
        ("zero_quantized_weights", False),
        ("zero_quantized_gradients", False),
        ("zero_hpz_partition_size", 1),
        ("parameter_alignment", False),
        ("use_all_reduce_for_fetch_params", False),
        ("allgather_sequential", False),
        ("module_granularity_threshold", 0),
    ):
        if said.get(key, said.get(f"stage3_{key}", usual)) != usual:
            raise ValueError(f"deepspeed.zero_optimization.{key}: plan knows only {usual!r}")
    for key in ("communication_data_type", "data_types", "torch_autocast"):
        if key in config.deepspeed:
            raise ValueError(f"deepspeed.{key}: plan does not know what it changes")
    values: dict[str, Any] = {}
    for one in fields(Settings):
        given = said.get(one.name, said.get(f"stage3_{one.name}"))
        if given is not None:
            values[one.name] = bool(given) if isinstance(one.default, bool) else int(given)
    values.setdefault("overlap_comm", config.train.zero_stage == 3)
    return Settings(**values)


def groups_of(model: Model, config: Config) -> list[list[int]]:
    """Numbers of the trained parameters, group by group, as the optimizer has them."""
    return [[model.number(p) for p in group["params"]] for group in parameter_groups(model.module, config)]


def padded(elements: int, world_size: int) -> int:
    """Of a flat group, to a multiple of what all ranks' shares are aligned to."""
    alignment = ALIGNMENT * world_size
    return -(-elements // alignment) * alignment


def buckets(parameters: Sequence[int], sizes: Sequence[int], limit: int) -> list[int]:
    """Elements of each reduction: parameters are put together as long as they fit; a large one goes alone."""
    found: list[int] = []
    for number in parameters:
        if found and found[-1] + sizes[number] <= limit:
            found[-1] += sizes[number]
        else:
            found.append(sizes[number])
    return found


def gradients_by_backward(passes: Sequence[Sequence[Event]]) -> list[list[int]]:
    """Per backward pass, the parameters whose gradients it completes, in order."""
    found: list[list[int]] = []
    arrived: list[int] = []
    for events in passes:
        for event in events:
            if event.kind == "gradient":
                arrived.append(event.number)
            elif event.kind == "backward_end":
                found.append(arrived)
                arrived = []
    return found


def step_collectives(
    config: Config, groups: Sequence[Sequence[int]], sizes: Sequence[int], backward: Sequence[Sequence[int]]
) -> list[Collective]:
    """DeepSpeed's calls in one step at stages 0, 1 and 2.

    Args:
        backward: per backward pass, the parameters whose gradients it completes, in order.
    """
    stage, world = config.train.zero_stage, config.world_size
    dtype = str(DTYPES[config.train.precision]).removeprefix("torch.")
    settings = settings_of(config)
    trained = [number for group in groups for number in group]
    calls: list[Collective] = []
    if stage == 0:
        elements, reduced = 0, []
        for number in sorted(trained):  # those without a gradient come as zeros
            elements += sizes[number]
            if elements > STAGE_0_BUCKET:
                reduced.append(elements)
                elements = 0
        calls = [all_reduce(n, dtype, "gradients") for n in [*reduced, *([elements] if elements else [])]]
        if config.train.precision == "fp32" and config.optimizer.max_grad_norm > 0:
            calls.append(all_reduce(1, "float32", "gradient norm"))
        return calls
    if stage == 1:
        arrived = {number for one in backward for number in one}
        order = [[number for number in trained if number in arrived]]
        if settings.overlap_comm:
            order = [list(one) for one in backward if one]
    else:
        order = [list(one) for one in backward if one]
    for one in order:
        calls += [all_reduce(n, dtype, "gradients") for n in buckets(one, sizes, settings.reduce_bucket_size)]
    if config.train.precision != "fp32":
        calls.append(all_reduce(1, "uint8", "overflow"))
    calls += [all_reduce(1, "float32", "gradient norm") for _ in groups]
    for group in groups:
        share = padded(sum(sizes[number] for number in group), world) // world
        calls.append(all_gather(share, world, dtype, "parameters"))
    return calls


def step_collectives_of_stage_3(
    config: Config, groups: Sequence[Sequence[int]], sizes: Sequence[int]
) -> list[Collective]:
    """What the optimizer's step adds to the coordinator's calls: the norms."""
    world, limit = config.world_size, settings_of(config).sub_group_size
    calls = [all_reduce(1, "uint8", "overflow")] if config.train.precision == "fp16" else []
    kind = "float64" if config.train.offload == "none" else "float32"
    for group in groups:
        calls += [all_reduce(1, kind, "gradient norm")] * len(sub_groups(group, sizes, world, limit))
    return calls


def sub_groups(group: Sequence[int], sizes: Sequence[int], world_size: int, limit: int) -> list[int]:
    """Elements of a rank's share of each part that stage 3 steps on its own."""
    shares = [-(-sizes[number] // world_size) for number in group]
    if sum(shares) <= limit:
        return [sum(shares)]
    found: list[int] = []
    elements = 0
    for number, share in enumerate(shares):
        elements += share
        if elements >= limit or number == len(shares) - 1:
            found.append(elements)
            elements = 0
    return found


__all__ = [
    "ALIGNMENT",
    "STAGE_0_BUCKET",
    "buckets",
    "gradients_by_backward",
    "groups_of",
    "padded",
    "settings_of",
    "step_collectives",
    "step_collectives_of_stage_3",
    "sub_groups",
]
