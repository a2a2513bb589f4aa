"""The two-pass step: encoders in micro-batches, the loss on the whole global batch, and the gradients of one pass.

GradCache (arXiv 2101.06983): pass one encodes micro-batch after micro-batch without keeping a graph; the objective sees
all representations at once, and its backward pass gives their gradients; pass two encodes each micro-batch again, with
a graph, and hands those gradients on. Memory is that of one micro-batch, the price is a second forward pass.

It is exact as long as an encoder gives a sample the same representation in both passes, and whatever its neighbours:
the random state of pass one (dropout) is replayed in pass two, and batch normalisation is refused in training mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symile_dist.engine import Engine
from symile_dist.spans import phase
from symile_dist.types import Batch, Outputs, PointSet, Representation, StepReport


class RandomState(NamedTuple):
    """torch's generators, as encoders draw from them."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


class Encoded(NamedTuple):
    """What pass one leaves for pass two."""

    micro_batches: list[Batch]
    states: list[RandomState]
    """The random state with which each micro-batch was encoded."""
    representations: dict[str, Representation]
    """Of the whole batch: leaves, which receive the objective's gradients."""


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """The batch in rows of at most `size`."""
    return [batch.rows(slice(first, first + size)) for first in range(0, len(batch), size)]


def forward(
    encode: Callable[[Batch], Outputs],
    objective: Callable[[Batch, int, dict[str, Representation]], StepReport],
    batch: Batch,
    step: int,
    size: int,
) -> tuple[StepReport, dict[str, Representation]]:
    """Report and representations for evaluation: the encoders see `size` samples at once. Call without gradients."""
    found = [encode(part).representations for part in micro_batches(batch, size)]
    representations = {name: _joined([one[name] for one in found]) for name in found[0]}
    return objective(batch, step, representations), representations


def encode(engine: Engine, batch: Batch, size: int) -> Encoded:
    """Pass one: all representations, without a graph."""
    parts = micro_batches(batch, size)
    states, found = [], []
    with torch.no_grad(), phase("forward"):
        for part in parts:
            states.append(RandomState.now(engine.device))
            found.append(engine.encode(part).representations)
    leaves = {name: _joined([one[name] for one in found]) for name in found[0]}
    for representation in leaves.values():
        for tensor in _tensors(representation):
            if tensor.is_floating_point():
                tensor.requires_grad_()
    return Encoded(parts, states, leaves)


def forward_backward(engine: Engine, batch: Batch, step: int, size: int) -> StepReport:
    """Both passes: afterwards the engine holds the gradients of the whole step, ready for `engine.step`.

    Args:
        size: samples of this rank that the encoders see at once (train.micro_batch_size).
    """
    try:
        return _forward_backward(engine, batch, step, size)
    except BaseException:
        engine.break_off()
        raise


def _forward_backward(engine: Engine, batch: Batch, step: int, size: int) -> StepReport:
    encoded = encode(engine, batch, size)
    report = engine.objective(batch, step, encoded.representations)
    engine.backward(report.loss, last=False)
    after = RandomState.now(engine.device)
    for number, (part, state) in enumerate(zip(encoded.micro_batches, encoded.states, strict=True)):
        state.restore(engine.device)
        with phase("forward"):
            emitted = engine.encode(part).representations
        rows = slice(number * size, number * size + len(part))
        pairs = [
            (tensor, _unpadded(leaf.grad[rows], tensor))
            for name, representation in emitted.items()
            for tensor, leaf in zip(_tensors(representation), _tensors(encoded.representations[name]), strict=True)
            if tensor.requires_grad and leaf.grad is not None
        ]
        handed_on = _HandOn.apply([gradient for _, gradient in pairs], *(tensor for tensor, _ in pairs))
        engine.backward(handed_on, last=number == len(encoded.micro_batches) - 1, scaled=True)
    after.restore(engine.device)
    return report


class _HandOn(torch.autograd.Function):
    """Zero, whose backward pass gives each tensor a gradient that is known already."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient * incoming[0].to(gradient.dtype) for gradient in ctx.gradients)


def _tensors(representation: Representation) -> list[Tensor]:
    return [representation] if isinstance(representation, Tensor) else list(representation)


def _joined(parts: list[Representation]) -> Representation:
    """The rows of all parts; point sets are padded to the largest."""
    joined = []
    for tensors in zip(*map(_tensors, parts), strict=True):
        longest = max((tensor.shape[1:2] for tensor in tensors), default=())
        joined.append(torch.cat([_padded(tensor, *longest) for tensor in tensors]))
    return joined[0] if isinstance(parts[0], Tensor) else PointSet(*joined)


def _padded(tensor: Tensor, length: int = 0) -> Tensor:
    """(n, T, ...) -> (n, length, ...), zeros at the end."""
    if tensor.ndim < 2 or tensor.shape[1] == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((len(tensor), length - tensor.shape[1], *tensor.shape[2:]))], dim=1)


def _unpadded(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of what `_padded` made of a tensor -> the tensor's own."""
    return gradient[:, : like.shape[1]]
