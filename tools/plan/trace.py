"""The encoders' part of a step on the meta device: which modules and gradients come in which order, what stays alive.

The model is built without weights and run without values, forward and backward, with hooks where DeepSpeed's ZeRO-3
has its own: so the order of events is that of a real step, branches of autograd and activation checkpointing included.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from symile_dist.config import Config
from symile_dist.encoders import recompute
from symile_dist.encoders.batch_norm import convert_batch_norms
from symile_dist.hub import weights_follow
from symile_dist.model import TrainingModule
from symile_dist.tools.plan.collectives import Collective, recorded
from symile_dist.tools.plan.meter import Meter, Operation, tensors_in, without_values
from symile_dist.tools.plan.shapes import InputShape, make_batch
from symile_dist.types import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Shapes = Mapping[str, tuple[tuple[int, ...], ...]]
"""Per modality the shapes of what its encoder emits: one, or the three of a point set; with the batch's dimension."""


class Event(NamedTuple):
    """What happened next, on the way through a step."""

    kind: str
    """`reset` (the whole module is called), `pre_forward`, `access`, `post_forward`, `pre_backward`, `post_backward`,
    `gradient` (of a parameter is complete) or `backward_end`."""
    number: int = -1
    """Of the module, in preorder; of the parameter, in the model's order, for `access` and `gradient`."""
    alive: float = 0.0
    """Bytes of activations and their gradients when it happened, without those of parameters."""
    peak: float = 0.0
    """The most since the event before."""


@dataclass
class Pass:
    """One way through the encoders: forward, or forward and backward."""

    events: list[Event]
    operations: list[Operation]
    collectives: list[Collective]
    """The encoders': of synchronized batch normalisations."""
    representations: Shapes
    """What the encoders emit."""
    forward: int
    """How many of the operations come before the way back begins."""


@dataclass(frozen=True)
class Model:
    """The model on the meta device, and its parameters by their numbers."""

    module: TrainingModule
    modules: dict[nn.Module, int]
    """In preorder, as DeepSpeed numbers them."""
    names: list[str]
    parameters: list[nn.Parameter]
    own: list[list[int]]
    """Per module, the parameters that it has itself."""

    def number(self, parameter: nn.Parameter) -> int:
        return self._numbers[id(parameter)]

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {id(parameter): number for number, parameter in enumerate(self.parameters)}

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of each parameter."""
        return [parameter.numel() for parameter in self.parameters]


def build_model(config: Config) -> Model:
    """The config's model and objective on the meta device, in the config's precision, ready to train.

    No weights are read; a pretrained encoder's config is. Raises ValueError for what cannot be had or built.
    """
    with weights_follow(), torch.device("meta"):
        module = TrainingModule(config)
    convert_batch_norms(module, config.train.sync_batch_norm)
    module.to(DTYPES[config.train.precision])
    module.train()
    for name, modality in config.modalities.items():
        if modality.freeze:
            module.model.encoders[name].eval()
    if config.train.freeze_batch_norm:
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
    named = dict(module.named_parameters())
    numbers = {id(parameter): number for number, parameter in enumerate(named.values())}
    modules: dict[nn.Module, int] = {}
    _preorder(module, modules)
    own = [sorted({numbers[id(p)] for p in part.parameters(recurse=False)}) for part in modules]
    return Model(module, modules, list(named), list(named.values()), own)


def _preorder(module: nn.Module, into: dict[nn.Module, int]) -> None:
    into[module] = len(into)
    for child in module.children():
        _preorder(child, into)


class _Accessed(dict[str, Any]):
    """In the place of a module's `_parameters`: tells who is looked at, as DeepSpeed's does."""

    told: Callable[[nn.Parameter], None]

    def __getitem__(self, key: str) -> Any:
        parameter = super().__getitem__(key)
        if parameter is not None:
            self.told(parameter)
        return parameter


class _Marked(torch.autograd.Function):
    """The same tensor; says when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, told: Callable[[], None]) -> Tensor:
        ctx.told = told
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.told()
        return gradients[0], None


class _Linear(torch.autograd.Function):
    """DeepSpeed's `LinearFunctionForZeroStage3`, which stands in for torch's at stage 3: other gradients come first."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(values, weight, bias)
        if values.dim() == 2 and bias is not None:
            return torch.addmm(bias, values, weight.t())
        output = values.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, bias = ctx.saved_tensors
        (gradient,) = gradients
        flat, of_values = gradient.reshape(-1, gradient.shape[-1]), values.reshape(-1, values.shape[-1])
        into = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        of_weight = flat.t().matmul(of_values) if ctx.needs_input_grad[1] else None
        of_bias = flat.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        return into, of_weight, of_bias


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """As DeepSpeed does it: lists, tuples and dicts, nothing else."""
    if isinstance(value, tuple | list):
        parts = [_map_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        for key in value:
            value[key] = _map_tensors(function, value[key])
        return value
    return function(value) if isinstance(value, Tensor) else value


class Recorder:
    """Runs the model and writes down what happens."""

    def __init__(self, model: Model, partitioned: bool) -> None:
        """`partitioned`: as at stage 3, where DeepSpeed puts its own linear map in the place of torch's."""
        self.model, self.partitioned = model, partitioned
        self.emitted: Shapes = {}
        self.forward: int | None = None
        self.calls: list[Collective] = []
        self._objective_calls = [0, 0]
        self.events: list[Event] = []
        self.meter = Meter("meta")
        self._remaining: collections.Counter[nn.Module] = collections.Counter()
        self._pending: collections.Counter[nn.Module] = collections.Counter()

    def tell(self, kind: str, number: int = -1) -> None:
        self.events.append(Event(kind, number, self.meter.alive, self.meter.reset_peak()))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles: list[Any] = []
        numbers = {id(parameter): number for number, parameter in enumerate(self.model.parameters)}
        kept = {module: module._parameters for module in self.model.modules}
        root, objective = self.model.module, self.model.module.objective

        def told(parameter: nn.Parameter) -> None:
            number = numbers.get(id(parameter))
            if number is not None:
                self.tell("access", number)

        def add(module: nn.Module, number: int) -> None:
            def pre_forward(part: nn.Module, arguments: Any) -> None:
                if part is root:
                    self.tell("reset")
                self.tell("pre_forward", number)
                if part is objective:
                    self.meter.paused = True
                    self._objective_calls = [len(self.calls)] * 2

            def mark_inputs(part: nn.Module, arguments: Any) -> Any:
                self._remaining[part] = 0

                def mark(tensor: Tensor) -> Tensor:
                    if tensor.requires_grad and torch.is_grad_enabled():
                        self._remaining[part] += 1
                    return _Marked.apply(tensor, after)

                def after() -> None:
                    self._remaining[part] -= 1
                    if self._remaining[part] == 0:
                        self.tell("post_backward", number)

                return _map_tensors(mark, arguments)

            def post_forward(part: nn.Module, arguments: Any, output: Any) -> None:
                self.tell("post_forward", number)
                if part is objective:
                    self.meter.paused = False
                elif part is root.model:
                    self.emitted = {
                        name: tuple(tuple(tensor.shape) for tensor in tensors_in(one))
                        for name, one in output.representations.items()
                    }

            def mark_outputs(part: nn.Module, arguments: Any, output: Any) -> Any:
                def before() -> None:
                    self.forward = len(self.meter.operations) if self.forward is None else self.forward
                    if self._pending[part] > 0:
                        if part is root:
                            self.meter.paused = True
                        elif part is root.model and self.meter.paused:
                            self.meter.paused = False
                            self._objective_calls[1] = len(self.calls)
                        self.tell("pre_backward", number)
                        self._pending[part] -= 1

                def mark(tensor: Tensor) -> Tensor:
                    self._pending[part] += 1
                    return _Marked.apply(tensor, before)

                return _map_tensors(mark, output)

            handles.append(module.register_forward_pre_hook(pre_forward))
            handles.append(module.register_forward_pre_hook(mark_inputs))
            handles.append(module.register_forward_hook(post_forward))
            handles.append(module.register_forward_hook(mark_outputs))

        for module, number in self.model.modules.items():
            seen = _Accessed(module._parameters)
            seen.told = told
            module._parameters = seen
            add(module, number)
        for number, parameter in enumerate(self.model.parameters):
            if parameter.requires_grad:

                def arrived(which: Tensor, number: int = number) -> None:
                    self.tell("gradient", number)
                    # From here on it is the engine's: it waits, or has gone into a bucket.
                    assert which.grad is not None
                    self.meter.peak -= which.grad.numel() * which.grad.element_size()
                    which.grad = None

                handles.append(parameter.register_post_accumulate_grad_hook(arrived))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, parameters in kept.items():
                module._parameters = parameters

    def run(self, call: Callable[[], Any], world_size: int) -> Pass:
        """`call` runs the model; whatever of its result has a graph is its own business."""
        kept: list[Tensor] = [*self.model.parameters, *self.model.module.buffers()]
        self.meter.ignore([tensor for tensor in kept if tensor.device.type == "meta"])
        with ExitStack() as stack:
            self.calls = stack.enter_context(recorded(world_size))
            stack.enter_context(without_values())
            # No random state is replayed: torch would look for a generator of the meta device.
            checkpoint = partial(recompute.checkpoint, preserve_rng_state=False)
            stack.enter_context(patch.object(recompute, "checkpoint", checkpoint))
            if self.partitioned:
                stack.enter_context(patch.object(nn.functional, "linear", _Linear.apply))
            stack.enter_context(self.hooked())
            stack.enter_context(self.meter)
            call()
        self.tell("end")
        operations = self.meter.operations
        forward = len(operations) if self.forward is None else self.forward
        first, last = self._objective_calls
        return Pass(self.events, operations, [*self.calls[:first], *self.calls[last:]], self.emitted, forward)


def encode(
    model: Model, inputs: Mapping[str, InputShape], rows: int, world_size: int, backward: bool, partitioned: bool
) -> Pass:
    """The encoders alone, on so many rows, as each half of the two-pass step calls them.

    Raises ValueError for encoders that cannot be run without values.
    """
    recorder = Recorder(model, partitioned)
    batch = _ignored_batch(recorder, inputs, rows)

    def call() -> None:
        with nullcontext() if backward else torch.no_grad():
            emitted = model.module(batch, None)
            if backward:
                tensors = [t for t in tensors_in(emitted.representations) if t.requires_grad]
                with recorder.meter.pause():
                    gradients = [torch.empty_like(t) for t in tensors]
                torch.autograd.backward(tensors, gradients)
                recorder.tell("backward_end")

    return _run(recorder, call, world_size)


def whole_step(model: Model, inputs: Mapping[str, InputShape], rows: int, world_size: int, partitioned: bool) -> Pass:
    """One pass: encoders, objective and the way back. What the objective itself holds does not count: `objective`."""
    from symile_dist.tools.plan.objective import tiles_once

    recorder = Recorder(model, partitioned)
    batch = _ignored_batch(recorder, inputs, rows)

    def call() -> None:
        with tiles_once("cpu", [], any_size=True):
            report = model.module(batch, 0)
            report.loss.backward()
        recorder.meter.paused = False
        recorder.tell("backward_end")

    return _run(recorder, call, world_size)


def objective_call(model: Model, emitted: Shapes, dtype: torch.dtype, trained: set[str], partitioned: bool) -> Pass:
    """The objective alone, as the two-pass step calls it: for its events.

    Args:
        trained: modalities whose representations get gradients.
    """
    from symile_dist.tools.plan.objective import make_representations, tiles_once

    recorder = Recorder(model, partitioned)
    rows = next(iter(emitted.values()))[0][0]
    made = make_representations(emitted, rows, dtype, trained)
    batch = make_batch({}, rows, modalities=list(emitted))

    def call() -> None:
        with tiles_once("cpu", [], any_size=True):
            report = model.module(batch, 0, dict(made))
            report.loss.backward()
        recorder.meter.paused = False
        recorder.tell("backward_end")

    return _run(recorder, call, 2)


def _ignored_batch(recorder: Recorder, inputs: Mapping[str, InputShape], rows: int) -> Batch:
    batch = make_batch(inputs, rows)
    recorder.meter.ignore(list(tensors_in([batch.inputs, batch.present, batch.valid, batch.sample_ids])))
    return batch


def _run(recorder: Recorder, call: Callable[[], None], world_size: int) -> Pass:
    try:
        return recorder.run(call, world_size)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        words = " ".join(str(error).split())[:300]
        raise ValueError(
            "the model cannot be run without values (on torch's meta device), so there is nothing to plan with: "
            f"{type(error).__name__}: {words}"
        ) from error


__all__ = [
    "DTYPES",
    "Event",
    "Model",
    "Pass",
    "Shapes",
    "build_model",
    "encode",
    "objective_call",
    "whole_step",
]
