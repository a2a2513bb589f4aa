"""The cube of logits of three modalities in fused kernels (Triton): its log-sum-exps and its gradients.

The cube L[i,j,k] = s * sum_d a[i,d] b[j,d] c[k,d] holds all negatives of all three anchors ("n_squared" of Symile,
arXiv 2411.01053): the anchors' log-sum-exps run over (j,k), (i,k) and (i,j). It is never stored: tiles of it are
made on chip, and made again for the gradients. A rank owns rows i of the cube; the positives (i, offset+i, offset+i)
are left out of all sums, for the caller to add without a difference of large numbers.

Logits are kept in units of log 2 within the kernels, for exp2 is what the hardware computes. Results are the same bits
in every run: partial sums are written to a place of their own each and added in a fixed order, never by atomics.

Triton is optional: without it this module imports, and `available` tells.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symile_dist.objectives.exponentials import Weight

try:
    import triton  # type: ignore
    import triton.language as tl  # type: ignore
except ImportError:
    triton = None

LOG2E = math.log2(math.e)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs the kernels in Python on the CPU: it reads the same variable when a kernel is declared."""


class Blocks(NamedTuple):
    """Sizes of what one program of the kernels works on; powers of two, all but `slabs` and `stages` 16 or more."""

    rows: int
    """Rows i of a tile."""
    columns: int
    """Columns k of a tile."""
    depth: int
    """How much of D is multiplied at a time."""
    slabs: int
    """Most j that one program of the forward kernel goes through."""
    warps: int
    stages: int
    """How many chunks of depth are on their way to shared memory at a time."""


# An accumulator of 128 x 256 is half of the registers of 8 warps; a stage takes 48 KiB of the 227 KiB of a Hopper SM.
HALF_BLOCKS = Blocks(rows=128, columns=256, depth=64, slabs=128, warps=8, stages=4)
# fp32 without loss of digits (no TF32) goes through the ordinary units: more than this does not fit the registers.
FLOAT_BLOCKS = Blocks(rows=64, columns=64, depth=32, slabs=128, warps=8, stages=2)

# The reduction of the backward pass only streams through memory: small tiles for many programs.
REDUCE_ROWS, REDUCE_COLUMNS = 16, 64

WORKSPACE_BYTES = 64 * 2**20
"""Bound of the partial sums of one launch of the forward kernel."""
GROUP_BYTES = 32 * 2**20
"""Bound of the stored part of the cube's gradient, and of its products: so that they stay in the L2 cache (50 MB)."""

FLOOR = -1e20
"""Below all logits, above what is left out of the sums."""

# The stored gradient of a logit lies within 3 before it is multiplied with this and mostly near 1 / N^2: fp16, whose
# normal numbers are 6e-5 to 65504, needs both ends.
GRADIENT_GAIN = 2.0**14
GRADIENT_LIMIT = 60000.0


def available() -> bool:
    """Whether Triton is installed, without which `log_sum_exp` and `gradients` raise ValueError."""
    return triton is not None


def why_not(representation: Tensor) -> str | None:
    """Why the kernels cannot work on a tensor like this one, or None."""
    if not available():
        return "backend 'triton' needs Triton (pip install triton); use backend='auto'"
    if representation.device.type != "cuda" and not INTERPRETED:
        return f"backend 'triton' needs a CUDA device, the representations are on {representation.device}"
    if representation.dtype.itemsize > 4:
        return f"backend 'triton' is for bf16, fp16 and fp32, not {representation.dtype}; use backend='chunks'"
    return None


# Triton compiles anew for an integer that is 1 or a multiple of 16: not for these, which change from launch to launch.
NOT_SPECIALIZED = ["n", "offset", "i_first", "i_count", "j_first", "j_count", "ranges", "span"]


def _kernel(function: Any) -> Any:
    """`triton.jit` where there is Triton. Its decorated functions are no longer Python: hence the Any."""
    return function if triton is None else triton.jit(function, do_not_specialize=NOT_SPECIALIZED)


# -- kernels ---------------------------------------------------------------------------------------------------------
#
# `own` is a (n, D), `second` is b (N, D), `third` is c (N, D), all contiguous. Offsets are 32 bit: `_check` sees to it.


@_kernel
def _logits(
    own: tl.tensor,
    slab: tl.tensor,
    third: tl.tensor,
    scale: tl.tensor,
    start: tl.tensor,
    i: tl.tensor,
    k: tl.tensor,
    j: tl.tensor,
    offset: tl.tensor,
    n: tl.tensor,
    size: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tl.tensor:
    """A tile (ROWS, COLUMNS) fp32 of slab j of the cube, in units of log 2: `slab` points to b[j].

    What is to be left out comes in as elements of -1 in `start`, which is 0 else, and leaves as -1e30 times the scale's
    size, as the positives do: marked before the products are added, where registers are free, and exp2 of it is 0.
    """
    factor = tl.load(scale) * 1.4426950408889634
    # Few tiles hold positives: the others are spared the comparison of each element.
    if (tl.min(i, 0) + offset <= j) & (j <= tl.max(i, 0) + offset) & (tl.min(k, 0) <= j) & (j <= tl.max(k, 0)):
        start = tl.where((i[:, None] + offset == j) & (k[None, :] == j), -1.0, start)
    tile = start * tl.where(factor < 0, -1e30, 1e30)
    # Rows past the end are read as the last one and left out by `start`: cheaper than to mask each load.
    own_at = own + tl.minimum(i, n - 1)[:, None] * D
    third_at = third + tl.minimum(k, size - 1)[None, :] * D
    for first in range(0, D, DEPTH):
        d = first + tl.arange(0, DEPTH)
        if D % DEPTH == 0:
            a = tl.load(own_at + d[None, :])
            b = tl.load(slab + d)
            c = tl.load(third_at + d[:, None])
        else:
            a = tl.load(own_at + d[None, :], mask=d[None, :] < D, other=0.0)
            b = tl.load(slab + d, mask=d < D, other=0.0)
            c = tl.load(third_at + d[:, None], mask=d[:, None] < D, other=0.0)
        # The interpreter computes in bf16 as if its bits were integers: to fp32 right after the load, on all machines.
        product = (a.to(tl.float32) * b.to(tl.float32)[None, :]).to(a.dtype)
        if INTERPRET:
            product, c = product.to(tl.float32), c.to(tl.float32)
        tile = tl.dot(product, c, tile, input_precision="ieee")
    return tile * factor


@_kernel
def _forward_kernel(
    own: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    valid: tl.tensor,
    scale: tl.tensor,
    bounded: tl.tensor,
    row_parts: tl.tensor,
    slab_parts: tl.tensor,
    column_parts: tl.tensor,
    n: tl.tensor,
    size: tl.tensor,
    offset: tl.tensor,
    i_first: tl.tensor,
    i_count: tl.tensor,
    j_first: tl.tensor,
    j_count: tl.tensor,
    ranges: tl.tensor,
    span: tl.tensor,
    D: tl.constexpr,
    BOUNDED: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLABS: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:
    """A program goes through ROWS rows i, `span` slabs j and all columns k, and writes its sums over two of the three.

    `*_parts` are (2, P, length) fp32: log-2 maxima (BOUNDED leaves the zeros that are there) and sums of exp2. P counts
    the ranges of j, the blocks of rows, and the programs.
    """
    # Both variants are launched, and the flag on the device says which one has work: the host need not wait for it.
    if tl.load(bounded) != BOUNDED:
        return
    program = tl.program_id(0)
    block, part = program // ranges, program % ranges
    row = block * ROWS + tl.arange(0, ROWS)
    i = i_first + row
    place = tl.arange(0, SLABS)
    j_low = j_first + part * span
    j_high = tl.minimum(j_low + span, j_first + j_count)
    i_start = tl.load(valid + offset + i, mask=i < n, other=0.0) - 1.0

    # Maxima start at a floor above what is left out: so exp2 of that is 0, and nothing becomes inf - inf.
    row_sum = tl.zeros((ROWS,), tl.float32)
    slab_sum = tl.zeros((SLABS,), tl.float32)
    row_top = tl.full((ROWS,), FLOOR, tl.float32)
    slab_top = tl.full((SLABS,), FLOOR, tl.float32)
    for k_first in range(0, size, COLUMNS):
        k = k_first + tl.arange(0, COLUMNS)
        k_start = tl.load(valid + k, mask=k < size, other=0.0) - 1.0
        column_sum = tl.zeros((COLUMNS,), tl.float32)
        column_top = tl.full((COLUMNS,), FLOOR, tl.float32)
        for j in range(j_low, j_high):
            # In this order: of a sum that is the same for all j, the compiler would keep a whole tile in local memory.
            start = (i_start + (tl.load(valid + j) - 1.0))[:, None] + k_start[None, :]
            tile = _logits(
                own,
                second + j * D,
                third,
                scale,
                start,
                i,
                k,
                j,
                offset,
                n,
                size,
                D,
                ROWS,
                COLUMNS,
                DEPTH,
                INTERPRET,
            )
            here = place == j - j_low
            if BOUNDED:
                tile = tl.exp2(tile)
                sums = tl.sum(tile, 1)
                row_sum += sums
                slab_sum += tl.where(here, tl.sum(sums, 0), 0.0)
                column_sum += tl.sum(tile, 0)
            else:
                top = tl.maximum(tl.max(tile, 1), FLOOR)
                sums = tl.sum(tl.exp2(tile - top[:, None]), 1)

                new = tl.maximum(row_top, top)
                row_sum = row_sum * tl.exp2(row_top - new) + sums * tl.exp2(top - new)
                row_top = new

                slab_one = tl.max(top, 0)
                slab_sums = tl.sum(sums * tl.exp2(top - slab_one), 0)
                added = tl.where(here, slab_one, FLOOR)
                new = tl.maximum(slab_top, added)
                slab_sum = slab_sum * tl.exp2(slab_top - new)
                slab_sum += tl.where(here, slab_sums, 0.0) * tl.exp2(added - new)
                slab_top = new

                new = tl.maximum(column_top, tl.max(tile, 0))
                column_sum = column_sum * tl.exp2(column_top - new) + tl.sum(tl.exp2(tile - new[None, :]), 0)
                column_top = new
        column_at = column_parts + program * size + k
        tl.store(column_at + tl.num_programs(0) * size, column_sum, mask=k < size)
        if not BOUNDED:
            tl.store(column_at, column_top, mask=k < size)

    row_at = row_parts + part * i_count + row
    tl.store(row_at + ranges * i_count, row_sum, mask=row < i_count)
    slab = part * span + place
    slab_at = slab_parts + block * j_count + slab
    mask = (place < span) & (slab < j_count)
    tl.store(slab_at + (tl.num_programs(0) // ranges) * j_count, slab_sum, mask=mask)
    if not BOUNDED:
        tl.store(row_at, row_top, mask=row < i_count)
        tl.store(slab_at, slab_top, mask=mask)


@_kernel
def _cube_gradient_kernel(
    own: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    scale: tl.tensor,
    bounded: tl.tensor,
    weights: tl.tensor,
    shifts: tl.tensor,
    gradient: tl.tensor,
    n: tl.tensor,
    size: tl.tensor,
    offset: tl.tensor,
    i_first: tl.tensor,
    i_count: tl.tensor,
    j_first: tl.tensor,
    LIMIT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> None:
    """A program writes a tile of one slab of `gradient` (slabs, i_count, N). `weights` and `shifts` are (n + 2 N)."""
    program = tl.program_id(0)
    columns = tl.cdiv(size, COLUMNS)
    row_blocks = tl.cdiv(i_count, ROWS)
    k_first = program % columns * COLUMNS
    slab = program // columns // row_blocks
    j = j_first + slab
    row = program // columns % row_blocks * ROWS + tl.arange(0, ROWS)
    i = i_first + row
    k = k_first + tl.arange(0, COLUMNS)
    start = tl.zeros((ROWS, COLUMNS), tl.float32)
    tile = _logits(
        own, second + j * D, third, scale, start, i, k, j, offset, n, size, D, ROWS, COLUMNS, DEPTH, INTERPRET
    )
    i_weight = tl.load(weights + i, mask=i < n, other=0.0)
    j_weight = tl.load(weights + n + j)
    k_weight = tl.load(weights + n + size + k, mask=k < size, other=0.0)
    if tl.load(bounded) != 0:
        tile = tl.exp2(tile - tl.load(shifts)) * ((i_weight + j_weight)[:, None] + k_weight[None, :])
    else:
        i_shift = tl.load(shifts + i, mask=i < n, other=0.0)
        j_shift = tl.load(shifts + n + j)
        k_shift = tl.load(shifts + n + size + k, mask=k < size, other=0.0)
        # A logit exceeds no sum that it is in. Those of invalid rows, which are in none, may: finite all the same.
        tile = (
            tl.exp2(tl.minimum(tile - i_shift[:, None], 16.0)) * i_weight[:, None]
            + tl.exp2(tl.minimum(tile - j_shift, 16.0)) * j_weight
            + tl.exp2(tl.minimum(tile - k_shift[None, :], 16.0)) * k_weight[None, :]
        )
    # For invalid rows again: their vectors are zero, and inf * 0 would be nan.
    tile = tl.minimum(tl.maximum(tile, -LIMIT), LIMIT)
    at = gradient + (slab * i_count + row)[:, None] * size + k[None, :]
    tl.store(at, tile.to(gradient.dtype.element_ty), mask=(row[:, None] < i_count) & (k[None, :] < size))


@_kernel
def _reduce_kernel(
    own: tl.tensor,
    second: tl.tensor,
    product: tl.tensor,
    own_gradient: tl.tensor,
    second_parts: tl.tensor,
    i_first: tl.tensor,
    i_count: tl.tensor,
    j_first: tl.tensor,
    j_count: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Reads `product` M (j_count, i_count, D) once: own_gradient[i] += sum_j b_j M_j[i], and sum_i a_i M_j[i].

    The latter over the program's rows only, into `second_parts` (row blocks, j_count, D).
    """
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row[:, None] < i_count) & (d[None, :] < D)
    at = (i_first + row)[:, None] * D + d[None, :]
    a = tl.load(own + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(own_gradient + at, mask=mask, other=0.0)
    for slab in range(0, j_count):
        m = tl.load(product + (slab * i_count + row)[:, None] * D + d[None, :], mask=mask, other=0.0)
        b = tl.load(second + (j_first + slab) * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += b[None, :] * m
        tl.store(second_parts + (block * j_count + slab) * D + d, tl.sum(a * m, 0), mask=d < D)
    tl.store(own_gradient + at, total, mask=mask)


# -- the functions ---------------------------------------------------------------------------------------------------


def log_sum_exp(
    own: Tensor, others: Sequence[Tensor], scale: Tensor, valid: Tensor | None, offset: int, bounded: Tensor
) -> tuple[Tensor, Tensor]:
    """This rank's share of the three anchors' log-sum-exps over their negatives, in natural logarithm.

    Args:
        own: a (n, D), this rank's rows, bf16, fp16 or fp32; row i is row offset + i of the global batch. In fp16 the
            products a * b must stay within its range.
        others: [b, c], each (N, D), of the same type.
        scale: 0-dim: multiplier of the logits.
        valid: (N,) fp32 of 0 and 1, or None for all ones: rows that are negatives of nobody where 0. They must be
            zero vectors in own and others.
        offset: see own.
        bounded: 0-dim bool on the device, which the host never reads: True where exp(logit), and sums of N * 128 of
            them, lie within the range of fp32, so that a maximum need not be looked for.

    Returns own_lse (n,) float64: over (j,k); and others_lse (2, N) float64: over this rank's (i,k) and (i,j). Sums
    without any term, thus all of an invalid anchor's, are -inf.

    Raises ValueError for other than three modalities, tensors that do not go together, and without Triton.
    """
    blocks = _check(own, others)
    (n, depth), size, device = own.shape, others[0].shape[0], own.device
    own, second, third = own.contiguous(), others[0].contiguous(), others[1].contiguous()
    scale, flag = scale.detach().float(), bounded.to(torch.int32)
    valid = torch.ones(size, dtype=torch.float32, device=device) if valid is None else valid.float()

    # The slabs are cut into as many ranges as fill the processors in as few waves as possible.
    row_blocks, processors = _ceil(n, blocks.rows), _processors(device)
    ranges = _ceil(size, blocks.slabs)
    ranges = max(ranges, _ceil(row_blocks * ranges, processors) * processors // row_blocks)
    span = _ceil(size, ranges)
    ranges = _ceil(size, span)
    # All ranges at once, unless the workspace gets too large.
    programs = max(1, WORKSPACE_BYTES // (2 * 4 * (size + blocks.rows + blocks.slabs)))
    block_step = min(row_blocks, programs)
    range_step = min(ranges, programs // block_step)

    own_lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
    others_lse = torch.full((2, size), -torch.inf, dtype=torch.float64, device=device)
    for first_block in range(0, row_blocks, block_step):
        for first_range in range(0, ranges, range_step):
            block_count = min(block_step, row_blocks - first_block)
            range_count = min(range_step, ranges - first_range)
            i_first, j_first = first_block * blocks.rows, first_range * span
            i_count = min(block_count * blocks.rows, n - i_first)
            j_count = min(range_count * span, size - j_first)
            parts = [
                torch.zeros((2, number, length), dtype=torch.float32, device=device)
                for number, length in (
                    (range_count, i_count),
                    (block_count, j_count),
                    (block_count * range_count, size),
                )
            ]
            for variant in (1, 0):
                _forward_kernel[(block_count * range_count,)](
                    own,
                    second,
                    third,
                    valid,
                    scale,
                    flag,
                    *parts,
                    n,
                    size,
                    offset,
                    i_first,
                    i_count,
                    j_first,
                    j_count,
                    range_count,
                    span,
                    D=depth,
                    BOUNDED=variant,
                    FLOOR=FLOOR,
                    ROWS=blocks.rows,
                    COLUMNS=blocks.columns,
                    DEPTH=blocks.depth,
                    SLABS=blocks.slabs,
                    INTERPRET=INTERPRETED,
                    num_warps=blocks.warps,
                    num_stages=blocks.stages,
                )
            slots = own_lse[i_first : i_first + i_count], others_lse[0, j_first : j_first + j_count], others_lse[1]
            for slot, (tops, sums) in zip(slots, parts, strict=True):
                slot.copy_(torch.logaddexp(slot, _combined(tops, sums)))
    return own_lse, others_lse


def gradients(
    own: Tensor,
    others: Sequence[Tensor],
    scale: Tensor,
    offset: int,
    bounded: Tensor,
    weights: Sequence[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """Gradients of the loss with respect to own and others, through the log-sum-exps, without the factor `scale`.

    With G[i,j,k] = sum over the three anchors of lse_grad * exp(logit - lse), and 0 at the positives: sum_jk G b_j c_k,
    sum_ik G a_i c_k and sum_ij G a_i b_j. Those of others are this rank's share.

    Args:
        own, others, scale, offset, bounded: as in `log_sum_exp`.
        weights: for a, b and c the loss's gradient with respect to the anchors' log-sum-exps and these themselves,
            float64: (n,), (N,), (N,), reduced over all ranks. Where lse is -inf, lse_grad counts as 0.

    Returns fp32: (n, D), (N, D), (N, D). They are finite at invalid rows too, and of no meaning there.

    Raises ValueError for other than three modalities, tensors that do not go together, and without Triton.
    """
    blocks = _check(own, others)
    (n, depth), size, device = own.shape, others[0].shape[0], own.device
    own, second, third = own.contiguous(), others[0].contiguous(), others[1].contiguous()
    scale, flag = scale.detach().float(), bounded.to(torch.int32)
    factors, shifts, unit = _factors(weights, bounded)

    # A group of whole slabs, or where not even one fits, of some rows of a slab.
    lines = max(1, GROUP_BYTES // max(size * own.element_size(), depth * 4))
    row_step = min(n, max(blocks.rows, lines // blocks.rows * blocks.rows))
    slab_step = min(size, max(1, lines // row_step))

    own_gradient = torch.zeros((n, depth), dtype=torch.float32, device=device)
    second_gradient = torch.zeros((size, depth), dtype=torch.float32, device=device)
    third_gradient = torch.zeros((size, depth), dtype=torch.float32, device=device)
    for i_first in range(0, n, row_step):
        i_count = min(row_step, n - i_first)
        own_rows = own[i_first : i_first + i_count]
        for j_first in range(0, size, slab_step):
            j_count = min(slab_step, size - j_first)
            slabs = slice(j_first, j_first + j_count)
            cube_gradient = torch.empty((j_count * i_count, size), dtype=own.dtype, device=device)
            _cube_gradient_kernel[(j_count * _ceil(i_count, blocks.rows) * _ceil(size, blocks.columns),)](
                own,
                second,
                third,
                scale,
                flag,
                factors,
                shifts,
                cube_gradient,
                n,
                size,
                offset,
                i_first,
                i_count,
                j_first,
                LIMIT=GRADIENT_LIMIT,
                D=depth,
                ROWS=blocks.rows,
                COLUMNS=blocks.columns,
                DEPTH=blocks.depth,
                INTERPRET=INTERPRETED,
                num_warps=blocks.warps,
                num_stages=blocks.stages,
            )
            product = _matmul(cube_gradient, third)
            pairs = (second[slabs, None] * own_rows[None]).view(-1, depth)
            third_gradient += _matmul(cube_gradient.T, pairs)
            row_blocks = _ceil(i_count, REDUCE_ROWS)
            second_parts = torch.empty((row_blocks, j_count, depth), dtype=torch.float32, device=device)
            _reduce_kernel[(row_blocks, _ceil(depth, REDUCE_COLUMNS))](
                own,
                second,
                product,
                own_gradient,
                second_parts,
                i_first,
                i_count,
                j_first,
                j_count,
                D=depth,
                ROWS=REDUCE_ROWS,
                COLUMNS=REDUCE_COLUMNS,
                num_warps=4,
                num_stages=3,
            )
            second_gradient[slabs] += second_parts.sum(0)
    return [gradient.mul_(unit) for gradient in (own_gradient, second_gradient, third_gradient)]


@dataclass
class TritonCube:
    """`cube.Cube` of three modalities by the fused kernels. The host waits for nothing: the device reads `bounded`.

    Raises ValueError as `log_sum_exp` does.
    """

    offset: int
    valid: Tensor | None
    bounded: Tensor

    def log_sum_exp(self, own: Tensor, others: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        flags = None if self.valid is None else self.valid.float()
        return log_sum_exp(own, others, scale, flags, self.offset, self.bounded)

    def gradients(
        self, own: Tensor, others: list[Tensor], scale: Tensor, weights: list[Weight]
    ) -> tuple[Tensor, list[Tensor]]:
        grad_own, *grad_others = gradients(own, others, scale, self.offset, self.bounded, weights)
        return grad_own, grad_others


def _combined(tops: Tensor, sums: Tensor) -> Tensor:
    """log sum_P sums * 2^tops -> float64, natural logarithm. Both (P, length) fp32; `tops` is overwritten."""
    top = tops.amax(dim=0)
    # In place and with a sum that widens as it reads: the workspace is as large as it may be.
    total = tops.sub_(top).exp2_().mul_(sums).sum(dim=0, dtype=torch.float64)
    return (total.log2() + top) / LOG2E


def _factors(weights: Sequence[tuple[Tensor, Tensor]], bounded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel multiplies exponentials with and subtracts from logits, (n + 2 N) fp32 each; and the unit.

    The unit is float64, 0-dim: what to multiply the resulting gradients with. One exponential per logit will do where
    it is bounded: exp(logit - shift) * sum of lse_grad * exp(shift - lse), with one shift in the middle of the lse, so
    that neither factor leaves the range of fp32.
    """
    grad = torch.cat([grad.detach().double() for grad, _ in weights])
    lse = torch.cat([lse.detach().double() for _, lse in weights]) * LOG2E
    used = torch.isfinite(lse) & (grad != 0)
    largest = grad.abs().amax()
    grad = torch.where(used, grad / torch.where(largest > 0, largest, 1.0), 0.0) * GRADIENT_GAIN
    low, high = torch.where(used, lse, torch.inf).amin(), torch.where(used, lse, -torch.inf).amax()
    shift = torch.where(used.any(), (low + high) / 2, 0.0)
    lse = torch.where(used, lse, shift)
    factors = torch.where(bounded, grad * torch.exp2(shift - lse), grad)
    shifts = torch.where(bounded, shift, lse)
    return factors.float(), shifts.float(), largest / GRADIENT_GAIN


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y in fp32: accumulated and kept, whatever the type of x and y."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.mm(x.float(), y.float())


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _processors(device: torch.device) -> int:
    """Number of streaming multiprocessors; an H100's where there is no GPU, so that the interpreter does likewise."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _check(own: Tensor, others: Sequence[Tensor]) -> Blocks:
    """The block sizes for the inputs' type. Raises ValueError for what the kernels cannot do."""
    if triton is None:
        raise ValueError("the fused kernels need Triton, which is not installed: pip install triton")
    if own.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"the fused kernels need a CUDA device, not {own.device} (or TRITON_INTERPRET=1, for tests)")
    if len(others) != 2:
        raise ValueError(f"the fused kernels are for 3 modalities, not {1 + len(others)}")
    if own.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"the fused kernels are for bf16, fp16 and fp32, not {own.dtype}")
    if own.ndim != 2 or 0 in own.shape:
        raise ValueError(f"own rows have shape {tuple(own.shape)}; should be (n, D), with n and D 1 or more")
    for tensor in others:
        if tensor.dtype != own.dtype or tensor.device != own.device:
            raise ValueError(
                f"own rows are {own.dtype} on {own.device}, the others {tensor.dtype} on {tensor.device}; "
                "should be the same"
            )
        if tensor.shape != (len(others[0]), own.shape[1]) or len(tensor) < len(own):
            raise ValueError(
                f"own rows have shape {tuple(own.shape)}, the others {[tuple(other.shape) for other in others]}; "
                "should be (n, D) and (N, D), with n <= N"
            )
    # The kernels count elements of these, and of G's groups, in 32 bits.
    if others[0].numel() >= 2**31:
        raise ValueError(f"others have {others[0].numel()} elements each; the fused kernels count to 2^31 - 1")
    return FLOAT_BLOCKS if own.dtype == torch.float32 else HALF_BLOCKS
