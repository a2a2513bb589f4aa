"""What operators cost, seen one by one as they run: bytes that stay alive, bytes that are moved, floating-point work.

It sees the meta device, where nothing is computed, as it sees a real one. So the same meter says beforehand what a
step will hold, and measures afterwards what it held.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten: Any = torch.ops.aten


class Operation(NamedTuple):
    """One operator that ran."""

    flops: float
    """Two per multiplication and addition of matrix products, convolutions and attention; 0 for all others."""
    bytes: float
    """Read and written, once each."""
    is_convolution: bool


class Meter(TorchDispatchMode):
    """Inside, counts the bytes of every storage that comes out of an operator, until it is freed, and the operators.

    What a kernel allocates within itself, and what an allocator keeps in reserve, is not seen. Tensors that were there
    before count once an operator has given them out again, unless they were told by `ignore`.
    """

    def __init__(self, device: str) -> None:
        """`device`: kind of the device whose storages count, `meta`, `cpu` or `cuda`."""
        super().__init__()
        self.device = device
        self.alive = 0
        """Bytes."""
        self.peak = 0
        """The most since `reset_peak`."""
        self.operations: list[Operation] = []
        self.paused = False
        """What comes to be in the meantime does not count."""
        self._known: dict[int, weakref.ref[Any]] = {}
        self._ignored: set[int] = set()
        self._kept: list[Any] = []

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Their storages do not count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._kept.append(storage)  # so that no other one gets its address
            self._ignored.add(storage._cdata)

    def reset_peak(self) -> int:
        """Returns the peak so far; from here on a new one is looked for."""
        peak, self.peak = self.peak, self.alive
        return peak

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            made = False
            for tensor in tensors_in(out):
                made |= self._see(tensor)
            self._count(func, args, kwargs or {}, out, made)
        return out

    def _see(self, tensor: Tensor) -> bool:
        """Whether its storage is new."""
        if tensor.device.type != self.device or tensor.layout != torch.strided:
            return False
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._ignored or size == 0:
            return False

        def freed(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.alive -= size

        self._known[key] = weakref.ref(storage, freed)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        return True

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, made: bool) -> None:
        count = COUNTS.get(func.overloadpacket)
        in_place = func.overloadpacket.__name__.endswith("_") or func.is_view
        if count is None and func.is_view:
            return
        if not made and count is None and not in_place:
            return
        moved = sum(t.numel() * t.element_size() for t in (*tensors_in(args), *tensors_in(out)))
        flops = float(count(*args, **kwargs, out_val=out)) if count else 0.0
        self.operations.append(Operation(flops, float(moved), func.overloadpacket in CONVOLUTIONS))


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> float:
    return float(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> float:
    return float(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


COUNTS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
CONVOLUTIONS = {aten.convolution, aten._convolution, aten.convolution_backward}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested sequences and maps."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch does it on CPUs and GPUs, without keeping a matrix of all pairs; the meta device has no choice."""
    if dropout_p or enable_gqa or query.dim() != 4:
        return PLAIN_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zero, hidden = (torch.scalar_tensor(number, dtype=query.dtype, device="meta") for number in (0.0, -torch.inf))
        attn_mask = torch.where(attn_mask, zero, hidden)
    found: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return found


PLAIN_ATTENTION = nn.functional.scaled_dot_product_attention


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, modules run on the meta device that would look at values, or ask for what that device lacks."""
    with ExitStack() as patches:
        # Checks of values (is every id in the vocabulary?) are left out by whoever compiles: there are none here.
        patches.enter_context(patch.object(torch.compiler, "is_compiling", lambda: True))
        patches.enter_context(patch.object(nn.functional, "scaled_dot_product_attention", _fused_attention))
        patches.enter_context(patch.object(torch, "autocast", lambda *arguments, **options: nullcontext()))
        yield


__all__ = ["Meter", "Operation", "tensors_in", "without_values"]
