"""What a rank holds, in bytes: at rest, and at the most in each phase of a step. DeepSpeed 0.19's ways, by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from symile_dist.config import Config
from symile_dist.tools.plan.communication import Communication
from symile_dist.tools.plan.shapes import InputShape
from symile_dist.tools.plan.step import Encoders, Floats
from symile_dist.tools.plan.trace import DTYPES, Event
from symile_dist.tools.plan.zero import buckets, groups_of, padded, settings_of

MASTER_BYTES = 4
MOMENTS_BYTES = 8
"""Of Adam: two numbers in float32."""
STEP_COPIES = {"cpu": 2, "cuda": 1}
"""Temporaries of torch's AdamW beside a parameter: its loop makes a root and a quotient, its foreach form a root."""
CONTEXT_BYTES = 1.0 * 2**30
"""Assumed: CUDA's context and libraries on a GPU, and NCCL's buffers."""
FRAGMENTATION = 1.05
"""Assumed: what a caching allocator holds for what is used."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, the one that holds the most."""

    at_rest: dict[str, float]
    """Between steps."""
    phases: dict[str, float]
    """At the most, what is held at rest included."""
    parts: dict[str, float]
    """What the phases consist of, each at its own most."""
    host: dict[str, float]
    """In the host's memory, beside the process itself."""

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    def on_device(self, device: str) -> float:
        """What a device has to have."""
        return self.peak * FRAGMENTATION + CONTEXT_BYTES if device == "cuda" else self.peak


def own_gradients(groups: Sequence[Sequence[int]], sizes: Sequence[int], world_size: int) -> tuple[int, int]:
    """Stages 1 and 2 keep the gradients of every parameter of which a rank has a part, whole.

    Returns the elements of the rank with the most, and of the largest part.
    """
    most = np.zeros(world_size + 1, dtype=np.int64)
    largest = 0
    for group in groups:
        share = padded(sum(sizes[number] for number in group), world_size) // world_size
        offset = 0
        for number in group:
            size = sizes[number]
            first, last = offset // share, (offset + size - 1) // share
            most[first] += size
            most[last + 1] -= size
            largest = max(largest, min(size, share))
            offset += size
    return int(np.cumsum(most).max(initial=0)), largest


def step_memory(
    config: Config,
    encoders: Encoders,
    communication: Communication,
    objective_bytes: float,
    inputs: dict[str, InputShape],
    device: str,
) -> Memory:
    """Of a step like all later ones.

    Args:
        objective_bytes: what the objective holds at the most, beside the representations.
        device: kind of the device, `cpu` or `cuda`.
    """
    model, world, stage = encoders.model, config.world_size, config.train.zero_stage
    sizes, groups, settings = model.sizes, groups_of(model, config), settings_of(config)
    element = DTYPES[config.train.precision].itemsize
    halves = element < MASTER_BYTES
    trained = sum(sizes[number] for group in groups for number in group)
    frozen = sum(sizes) - trained
    shares = [padded(sum(sizes[number] for number in group), world) // world for group in groups]
    if stage == 3:
        shares = [sum(-(-sizes[number] // world) for number in group) for group in groups]
    share = trained if stage == 0 else sum(shares)
    local = config.train.global_batch_size // world
    batch_bytes = local * (sum(one.bytes for one in inputs.values()) + len(inputs) + 1 + 8)

    state = {
        "masters": float(MASTER_BYTES * share) if stage or halves else 0.0,
        "moments": float(MOMENTS_BYTES * share),
    }
    host = {"loader": float(config.data.loader_processes * config.data.prefetch * batch_bytes)}
    weights = float(element * (trained + frozen if stage == 0 else sum(shares) * world + frozen))
    if stage == 3:
        weights = float(element * sum(-(-size // world) for size in sizes))
    at_rest = {"weights": weights, "buffers": _buffers(encoders), **state}
    inner = [p.numel() for part in model.module.inner_modules().values() for p in part.parameters()]
    if inner:
        at_rest["inner modules"] = float((MASTER_BYTES + MOMENTS_BYTES) * sum(inner))
    if stage == 3:
        at_rest["gradient partitions"] = float(element * share)
        at_rest["bucket"] = float(element * settings.reduce_bucket_size)
    if config.train.offload != "none":
        host |= {"masters": at_rest.pop("masters"), "moments": at_rest.pop("moments"), "gradients": 4.0 * share}
        if "gradient partitions" in at_rest:
            host["gradient partitions"] = at_rest.pop("gradient partitions")
        if config.train.offload == "parameters":
            host["weights"] = at_rest.pop("weights")
    rest = sum(at_rest.values()) + batch_bytes

    persistent = float(element * communication.whole[-1].persistent) if communication.whole else 0.0
    if stage == 3:
        at_rest["small parameters, whole"] = persistent
    timeline = _Timeline(config, encoders, communication, objective_bytes, local, element, persistent)
    phases = {"encoders and loss": rest + timeline.run(stage, settings.reduce_bucket_size, sizes) + persistent}
    own, slice_size = own_gradients(groups, sizes, world) if stage in (1, 2) else (0, 0)
    kept = {0: element * trained, 1: element * own, 2: element * own, 3: 0}[stage]
    # Stage 2 reduces after every backward pass: the sum so far, and what the pass before left.
    summed = element * own * min(2, encoders.passes.parts - 1) if stage == 2 else 0
    outside = batch_bytes + timeline.left_over
    reduction = _reduction(stage, encoders, groups, config, kept) + timeline.whole_at_end + summed
    phases["gradient reduction"] = sum(at_rest.values()) + outside + reduction
    if config.train.offload == "none":
        update = _update(stage, halves, groups, sizes, shares, device, kept)
        phases["optimizer"] = sum(at_rest.values()) - persistent + outside + update
        if stage in (1, 2):
            norm = sum(at_rest.values()) + outside + kept + 8.0 * slice_size
            phases["gradient norm"] = norm
    parts = {
        "batch": float(batch_bytes),
        "activations": timeline.activations,
        "objective": objective_bytes,
        "representations": timeline.representations,
        "whole parameters": timeline.whole,
        "gradients": timeline.gradients,
    }
    return Memory(at_rest, phases, parts, host)


def _buffers(encoders: Encoders) -> float:
    return float(sum(buffer.numel() * buffer.element_size() for buffer in encoders.model.module.buffers()))


def _reduction(stage: int, encoders: Encoders, groups: Sequence[Sequence[int]], config: Config, kept: float) -> float:
    """The end of the backward pass: the bucket, and its copy that is reduced."""
    sizes, settings = encoders.model.sizes, settings_of(config)
    element = DTYPES[config.train.precision].itemsize
    trained = [number for group in groups for number in group]
    total = sum(sizes[number] for number in trained)
    if stage == 0:
        return 2.0 * element * min(total, 500_000_000) + element * max(0, total - 500_000_000)
    largest = max(buckets(trained, sizes, settings.reduce_bucket_size), default=0)
    if stage == 3:
        return float(element * largest)
    buffer = settings.reduce_bucket_size * (2 if settings.overlap_comm else 1)
    waiting = max(0, total - largest) if stage == 1 else 0
    return float(element * (buffer + max(largest + waiting, 0))) + (kept if largest < total else 0.0)


def _update(
    stage: int,
    halves: bool,
    groups: Sequence[Sequence[int]],
    sizes: Sequence[int],
    shares: Sequence[int],
    device: str,
    kept: float,
) -> float:
    """The optimizer's step: gradients in float32, and what AdamW makes beside them."""
    copies = STEP_COPIES[device]
    if stage == 0:
        trained = [sizes[number] for group in groups for number in group]
        whole = 4.0 * sum(trained) if halves else 0.0
        if device == "cuda":  # one group at once
            return kept + whole + 4.0 * copies * max(sum(sizes[n] for n in group) for group in groups)
        # The quotient of the parameter before is freed when the next one's takes its name.
        before = [0, *trained[:-1]]
        return kept + whole + 4.0 * max(copies * size + last for size, last in zip(trained, before, strict=True))
    largest = max(shares)
    # Once a group's gradient is one flat tensor, those that it came from are given up.
    return max(kept + 4.0 * largest, 4.0 * largest * (1 + copies))


class _Timeline:
    """Through the events of a step: activations, gradients that wait, whole parameters of stage 3."""

    def __init__(
        self,
        config: Config,
        encoders: Encoders,
        communication: Communication,
        objective_bytes: float,
        local: int,
        element: int,
        persistent: float,
    ) -> None:
        self.config, self.encoders, self.objective_bytes = config, encoders, objective_bytes
        self.whole_parameters = communication.whole
        self.element, self.local, self.persistent = element, local, persistent
        self.activations = self.whole = self.gradients = self.left_over = self.whole_at_end = 0.0
        per_row = sum(float(np.prod(shape[1:])) for shapes in encoders.representations.values() for shape in shapes)
        self.representations = per_row * local * element
        self._number = 0

    def run(self, stage: int, bucket: int, sizes: Sequence[int]) -> float:
        """The most above what is there at rest."""
        encoders, micro = self.encoders, self.config.encoded_at_once
        whole = encoders.whole
        if encoders.passes.encode is None:
            return self._pass(whole.events, whole.alive.at(micro), whole.peak.at(micro), 0.0, stage, bucket, sizes)
        assert encoders.encoding is not None
        encoding = encoders.encoding
        found = 0.0
        for _ in range(encoders.passes.parts):
            held = self.representations
            found = max(
                found,
                self._pass(
                    encoding.events, encoding.alive.at(micro), encoding.peak.at(micro), held, stage, bucket, sizes
                ),
            )
        # All parts' representations, put together while they are still there.
        found = max(found, 2 * self.representations)
        events = encoders.passes.objective
        nothing = np.zeros(len(events))
        held = self.representations
        found = max(found, self._pass(events, nothing, nothing, held, stage, bucket, sizes))
        held = 2 * self.representations  # and their gradients
        for _ in range(encoders.passes.parts):
            found = max(
                found, self._pass(whole.events, whole.alive.at(micro), whole.peak.at(micro), held, stage, bucket, sizes)
            )
        self.left_over = self.representations
        return found

    def _pass(
        self,
        events: Sequence[Event],
        alive: Floats,
        peak: Floats,
        held: float,
        stage: int,
        bucket: int,
        sizes: Sequence[int],
    ) -> float:
        objective = self.encoders.model.modules[self.encoders.model.module.objective]
        model = self.encoders.model.modules[self.encoders.model.module.model]
        everything = float(self.element * sum(p.numel() for p in self.encoders.model.parameters if p.requires_grad))
        most, waiting, in_objective, filling = 0.0, self.gradients if stage <= 1 else 0.0, False, False
        for number, event in enumerate(events):
            gathered = self._gathered()
            extra = self.objective_bytes if in_objective else 0.0
            own = float(max(alive[number], peak[number]))
            self.activations = max(self.activations, own)
            self.whole = max(self.whole, gathered)
            buffer = float(self.element * bucket) if filling and stage in (1, 2) else 0.0
            most = max(most, held + own + extra + gathered + waiting + buffer)
            if event.kind == "pre_forward" and event.number == objective:
                in_objective = True
            elif event.kind == "pre_backward" and event.number == model:
                in_objective = False
            elif event.kind == "gradient":
                filling = True
                if stage <= 1:  # once there, later passes add to it in place
                    waiting = min(waiting + self.element * sizes[event.number], everything)
            elif event.kind == "backward_end":
                in_objective, self.whole_at_end = False, gathered
        if stage <= 1:
            self.gradients = waiting
        return most

    def _gathered(self) -> float:
        if not self.whole_parameters:
            return 0.0
        one = self.whole_parameters[self._number % len(self.whole_parameters)]
        self._number += 1
        return max(0.0, float(self.element * max(one.most, one.now)) - self.persistent)


__all__ = ["CONTEXT_BYTES", "FRAGMENTATION", "Memory", "own_gradients", "step_memory"]
