"""Every collective of one training step, in its order: objective, DeepSpeed, the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from symile_dist.config import Config
from symile_dist.tools.plan.collectives import Collective, all_reduce
from symile_dist.tools.plan.objective import Objective
from symile_dist.tools.plan.shapes import InputShape
from symile_dist.tools.plan.trace import DTYPES, Event, Model, Pass, encode, objective_call, whole_step
from symile_dist.tools.plan.zero import (
    gradients_by_backward,
    groups_of,
    settings_of,
    step_collectives,
    step_collectives_of_stage_3,
)
from symile_dist.tools.plan.zero3 import Coordinator, Whole, steady_step

LOOP_NUMBERS = 3
"""What all ranks add up after every step: valid samples, and whether any wishes to stop or to save."""


class StepPasses(NamedTuple):
    """The ways through the model that a step consists of."""

    encode: Pass | None
    """Two-pass step: forward alone, without a graph."""
    objective: list[Event]
    """Two-pass step: the objective's events; they stand in `whole` else."""
    whole: Pass
    """One pass: all of it. Two passes: encoders forward and backward."""
    parts: int
    """Micro-batches; 1 for one pass."""

    def events(self) -> list[list[Event]]:
        """Of each call of the module, in order."""
        if self.encode is None:
            return [self.whole.events]
        return [*[self.encode.events] * self.parts, self.objective, *[self.whole.events] * self.parts]


def trained_modalities(config: Config) -> set[str]:
    """Whose representations hand gradients on."""
    return {name for name, one in config.modalities.items() if not config.modalities[one.encoder_of or name].freeze}


def step_passes(
    config: Config, model: Model, inputs: Mapping[str, InputShape], rows: int, partitioned: bool
) -> StepPasses:
    """The step in one pass, or in two where train.micro_batch_size asks for it, with `rows` samples at once.

    Args:
        partitioned: as stage 3 goes through it.
    """
    local = config.train.global_batch_size // config.world_size
    world = config.world_size if config.train.sync_batch_norm else 2
    if config.encoded_at_once == local:
        return StepPasses(None, [], whole_step(model, inputs, rows, world, partitioned), 1)
    first = encode(model, inputs, rows, world, False, partitioned)
    dtype = DTYPES[config.train.precision]
    objective = objective_call(model, first.representations, dtype, trained_modalities(config), partitioned)
    parts = -(-local // config.encoded_at_once)
    return StepPasses(first, objective.events, encode(model, inputs, rows, world, True, partitioned), parts)


class Communication(NamedTuple):
    calls: list[Collective]
    whole: list[Whole]
    """Stage 3: whole parameters at each event of `StepPasses.events`, one after another; else empty."""


def step_communication(config: Config, model: Model, passes: StepPasses, objective: Objective) -> Communication:
    """Of one rank in one training step that is taken, once steps are alike. None for a single rank."""
    world = config.world_size
    if world == 1:
        return Communication([], [])
    groups, sizes = groups_of(model, config), model.sizes
    events = passes.events()
    calls = [call for call in objective.collectives if call.purpose == "objective"]
    if config.train.sync_batch_norm:
        encoded = [*(passes.encode.collectives if passes.encode else []), *passes.whole.collectives] * passes.parts
        calls += [call._replace(purpose="batch normalisation") for call in encoded]
    whole: list[Whole] = []
    if config.train.zero_stage == 3:
        dtype = str(DTYPES[config.train.precision]).removeprefix("torch.")
        coordinator = Coordinator(sizes, model.own, settings_of(config), world, dtype)
        found, whole = steady_step(coordinator, [event for one in events for event in one])
        calls += [*found, *step_collectives_of_stage_3(config, groups, sizes)]
    else:
        calls += step_collectives(config, groups, sizes, gradients_by_backward(events))
    calls += [call for call in objective.collectives if call.purpose != "objective"]
    calls.append(all_reduce(LOOP_NUMBERS, "int64", "loop"))
    if config.guard.action == "skip":
        calls.append(all_reduce(1, "int64", "guard"))
    return Communication(calls, whole)


def wire_bytes(calls: Sequence[Collective], world_size: int) -> float:
    return sum(call.wire_bytes(world_size) for call in calls)


__all__ = [
    "LOOP_NUMBERS",
    "Communication",
    "StepPasses",
    "step_communication",
    "step_passes",
    "trained_modalities",
    "wire_bytes",
]
