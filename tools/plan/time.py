"""From work and bytes to seconds, and from seconds to hours, money, interruptions and goodput."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from symile_dist.checkpoint.interval import DEVICE_HOURS, LEAST_COST, LONGEST_MTTF, MOST_OVERHEAD
from symile_dist.config import Config
from symile_dist.tools.plan.collectives import Collective
from symile_dist.tools.plan.hardware import Device, peak_of
from symile_dist.tools.plan.objective import Objective
from symile_dist.tools.plan.step import Encoders, Work
from symile_dist.tools.plan.zero import groups_of, padded

RESTART_SECONDS = 240.0
"""Assumed: from a failure to the next step (OLMo-core's median recovery is under 4 minutes)."""
CHECKPOINT_BYTES = 12
"""Per trained parameter: master weight and two moments, float32."""
FROZEN_BYTES = 4
ADAM_BYTES = 28
"""That AdamW passes per parameter: reads weight, gradient and moments, writes weight and moments; float32."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, part by part."""

    forward_backward: float
    """The encoders."""
    second_forward: float
    """Of the two-pass step."""
    objective: float
    optimizer: float
    communication: float
    """Of all collectives, one after another."""
    exposed: float
    """Of those, what the encoders do not hide."""
    host: float
    """What the host takes once per step."""

    @property
    def total(self) -> float:
        compute = self.forward_backward + self.second_forward + self.objective + self.optimizer
        return compute + self.exposed + self.host


def operators_seconds(work: Work, rows: int, device: Device, precision: str, matmul_precision: str) -> float:
    """Every operator takes as long as the slower of its arithmetic and its bytes, and as the host takes to start it."""
    matmul = peak_of(device.matmul_flops, precision, matmul_precision, device.name)
    convolution = peak_of(device.convolution_flops, precision, matmul_precision, device.name)
    rates = np.where(work.is_convolution, convolution, matmul)
    busy = np.maximum(work.flops.at(rows) / rates, work.bytes.at(rows) / device.memory_bandwidth)
    if device.synchronous:
        return float((busy + device.operator_seconds).sum())
    return float(max(busy.sum(), device.operator_seconds * len(busy)))


def collective_seconds(call: Collective, config: Config, device: Device, gpus_per_node: int) -> float:
    """Ring and tree: bytes over the narrowest link that they pass, and a latency that grows with log2 of the ranks.

    A ring through several nodes passes each of them once with all its NICs.
    """
    world = config.world_size
    within = world <= gpus_per_node
    bandwidth = device.node_bandwidth
    if not within:
        bandwidth = min(bandwidth, gpus_per_node * device.network_bandwidth)
    bandwidth = device.collective_bandwidth.get(call.name, bandwidth) if within else bandwidth
    latency = device.latency["node" if within else "nodes"] * math.log2(world)
    return latency + call.wire_bytes(world) / bandwidth


def step_time(
    config: Config,
    encoders: Encoders,
    objective: Objective,
    calls: Sequence[Collective],
    device: Device,
    gpus_per_node: int,
) -> StepTime:
    train = config.train
    rows, parts, share = config.encoded_at_once, encoders.passes.parts, device.batch_share

    def seconds(work: Work) -> float:
        alone = operators_seconds(work, rows, device, train.precision, train.float32_matmul_precision)
        return parts * alone / share

    whole = seconds(encoders.work)
    again = seconds(encoders.forward) if encoders.passes.encode else 0.0
    others = sum(max(one.bytes / device.memory_bandwidth, device.operator_seconds) for one in objective.operations)
    rate = peak_of(device.loss_flops, train.precision, train.float32_matmul_precision, device.name)
    loss = (objective.tile_flops / rate + others) / share
    sizes, groups = encoders.model.sizes, groups_of(encoders.model, config)
    elements = [sum(sizes[number] for number in group) for group in groups]
    if train.zero_stage:
        elements = [padded(number, config.world_size) // config.world_size for number in elements]
    update = ADAM_BYTES * sum(elements) / device.optimizer_bytes / device.state_share
    every = [
        (one.purpose, collective_seconds(one, config, device, gpus_per_node) / device.state_share) for one in calls
    ]
    communication = sum(taken for _, taken in every)
    # Stage 3 fetches parameters and reduces gradients beside the encoders' work; nothing else is overlapped.
    beside = sum(taken for purpose, taken in every if purpose in ("parameters", "gradients"))
    hidden = min(beside, whole + again) if train.zero_stage == 3 and not device.synchronous else 0.0
    return StepTime(whole, again, loss, update, communication, communication - hidden, device.step_seconds)


@dataclass(frozen=True)
class Checkpoints:
    bytes: float
    """Of one, over all ranks."""
    seconds: float
    """To write it, behind the loop."""
    stall_seconds: float
    """That the loop stands still for."""
    interval_seconds: float


def checkpoints(config: Config, encoders: Encoders, device: Device, step_seconds: float, nodes: int) -> Checkpoints:
    """Size and times of a save, and how often one is made: as the config says, else as often as costs least."""
    sizes = encoders.model.sizes
    trained = sum(sizes[number] for group in groups_of(encoders.model, config) for number in group)
    size = float(CHECKPOINT_BYTES * trained + FROZEN_BYTES * (sum(sizes) - trained))
    stall = size / config.world_size / device.host_copy_bytes
    cost = max(LEAST_COST, stall)
    best = max(math.sqrt(2 * cost * mean_time_to_failure(config.world_size)), cost / MOST_OVERHEAD)
    said = [config.checkpoint.every * step_seconds] if isinstance(config.checkpoint.every, int) else []
    said += [config.checkpoint.every_minutes * 60] if config.checkpoint.every_minutes else []
    return Checkpoints(size, size / nodes / device.write_bytes, stall, min(said, default=best))


def mean_time_to_failure(world_size: int) -> float:
    """Seconds, before any failure was seen: 8,000 device hours, and never more than a day."""
    return min(LONGEST_MTTF, DEVICE_HOURS * 3600 / world_size)


@dataclass(frozen=True)
class RunTime:
    steps: int
    hours: float
    """Of undisturbed training."""
    hours_with_interruptions: float
    interruptions: float
    """Expected."""
    goodput: float
    """Of the time, for steps that count."""
    cost: float | None


def run_time(
    config: Config, steps: int, step_seconds: float, saves: Checkpoints, price_per_gpu_hour: float | None
) -> RunTime:
    """A failure costs half an interval of lost work, on average, and the restart; a save what the loop stands still."""
    failure = mean_time_to_failure(config.world_size)
    saving = max(LEAST_COST, saves.stall_seconds) / saves.interval_seconds
    lost = (saves.interval_seconds / 2 + RESTART_SECONDS) / failure
    goodput = 1 / (1 + saving + lost)
    hours = steps * step_seconds / 3600
    disturbed = hours / goodput
    cost = None if price_per_gpu_hour is None else disturbed * config.world_size * price_per_gpu_hour
    return RunTime(steps, hours, disturbed, disturbed * 3600 / failure, goodput, cost)


__all__ = [
    "RESTART_SECONDS",
    "Checkpoints",
    "RunTime",
    "StepTime",
    "checkpoints",
    "collective_seconds",
    "mean_time_to_failure",
    "operators_seconds",
    "run_time",
    "step_time",
]
