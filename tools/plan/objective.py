"""The objective on the meta device: what it hands to collectives, what it holds, and how much it multiplies.

It really runs, for any world size, with every tensor of its real shape; only of its tiles the first one stands for all
(they use the same memory one after another), and their work is counted by formula.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from symile_dist.objectives import contrast, cube, permuted, symile
from symile_dist.tools.plan.collectives import Collective, all_reduce, recorded
from symile_dist.tools.plan.meter import Meter, Operation, tensors_in, without_values
from symile_dist.tools.plan.shapes import make_batch
from symile_dist.tools.plan.trace import DTYPES, Model, Shapes
from symile_dist.types import Outputs, PointSet, Representation

FORWARD_WORK, BACKWARD_WORK = 2.0, 6.0
"""Operations per logit and dimension: the logit; its recomputation and two gradients."""


@dataclass
class Objective:
    """One rank's part of the objective, forward and backward."""

    collectives: list[Collective]
    held: int
    """Bytes at the most: gathered representations, tiles, gradients."""
    tile_flops: float
    """Of the tiles of contrastive losses, which run at the rate of the loss."""
    operations: list[Operation]
    """All others: without products."""


@contextmanager
def tiles_once(device: str, work: list[float], any_size: bool = False) -> Iterator[None]:
    """Inside, tiles of logits are those of a device's kind, and only the first of them is computed.

    Args:
        work: gets the operations of all of them.
        any_size: where no more than the order of events is asked for, a batch may be too small for its sheets.
    """
    rows, logits, permuted_logits = (
        {"meta": table.get(device, table["cuda"])} for table in (cube.TILE_ROWS, cube.TILE_LOGITS, permuted.LOGITS)
    )
    tiles, columns, blocks = cube.Cube.tiles, permuted.Permuted._columns, permuted.Permuted._row_blocks

    def few_tiles(self: cube.Cube, own: Tensor, others: list[Tensor]) -> Iterator[cube.Tile]:
        return itertools.islice(tiles(self, own, others), 2)

    def few_columns(self: permuted.Permuted, anchor: int, n: int, size: int) -> Iterator[Tensor]:
        return itertools.islice(columns(self, anchor, n, size), 1)

    def few_blocks(self: permuted.Permuted, rows: Tensor, columns: int) -> list[slice]:
        return blocks(self, rows, columns)[:1]

    def counted(function: Any, per_logit: float, logits: Any) -> Any:
        def call(self: Any, own: Tensor, others: list[Tensor], *rest: Any) -> Any:
            work.append(per_logit * logits(self, own, others) * own.shape[1])
            return function(self, own, others, *rest)

        return call

    def of_cube(self: cube.Cube, own: Tensor, others: list[Tensor]) -> float:
        size = others[0].shape[0]
        planes = float(size) ** (len(others) - 1) if self.drawn is None else len(self.drawn)
        return planes * len(own) * size

    def of_permuted(self: permuted.Permuted, own: Tensor, others: list[Tensor]) -> float:
        return float(len(others) + 1) * len(own) * others[0].shape[0]

    def permutations(number: int, batch: int, seed: int, step: int, valid: Any = None, device: Any = None) -> Tensor:
        return torch.empty((number, number, batch), dtype=torch.int64, device="meta")

    def sheets(number: int, size: int, modalities: int, seed: int, step: int) -> tuple[list[int], float]:
        return list(range(number)), 1.0 + (size ** (modalities - 2) - 1) / (number - 1)

    def as_on_the_device(tensor: Tensor) -> Tensor:
        fast = tensor.dtype == torch.bfloat16 and device == "cuda"
        return tensor if fast or tensor.dtype.itemsize >= 4 else tensor.float()

    with ExitStack() as patches:
        for table, entry in ((cube.TILE_ROWS, rows), (cube.TILE_LOGITS, logits), (permuted.LOGITS, permuted_logits)):
            patches.enter_context(patch.dict(table, entry))
        for owner, name, value in (
            (cube.Cube, "tiles", few_tiles),
            # Which way is taken depends on values. Both multiply alike; this one is the rule.
            (cube.Cube, "is_plain", True),
            (cube.Cube, "log_sum_exp", counted(cube.Cube.log_sum_exp, FORWARD_WORK, of_cube)),
            (cube.Cube, "gradients", counted(cube.Cube.gradients, BACKWARD_WORK, of_cube)),
            (permuted.Permuted, "_columns", few_columns),
            (permuted.Permuted, "_row_blocks", few_blocks),
            (permuted.Permuted, "log_sum_exp", counted(permuted.Permuted.log_sum_exp, FORWARD_WORK, of_permuted)),
            (permuted.Permuted, "gradients", counted(permuted.Permuted.gradients, BACKWARD_WORK, of_permuted)),
            (symile, "draw_permutations", permutations),
            (symile, "draw_sheets", sheets),
            (contrast, "in_compute_precision", as_on_the_device),
        ):
            patches.enter_context(patch.object(owner, name, value))
        if any_size:
            patches.enter_context(patch.object(symile, "sheets_problem", lambda number, size, modalities: None))
        yield


def make_representations(
    emitted: Shapes, rows: int, dtype: torch.dtype, trained: set[str]
) -> dict[str, Representation]:
    """`rows` of what the encoders emit, on the meta device; those of `trained` modalities are leaves with gradients."""
    made: dict[str, Representation] = {}
    for name, shapes in emitted.items():
        tensors = [torch.empty((rows, *shape[1:]), dtype=dtype, device="meta") for shape in shapes]
        for tensor in tensors[:2]:
            tensor.requires_grad_(name in trained)
        if len(tensors) == 1:
            made[name] = tensors[0]
        else:
            made[name] = PointSet(tensors[0], tensors[1], torch.empty(rows, dtype=torch.int64, device="meta"))
    return made


def run_objective(
    model: Model,
    representations: Shapes,
    precision: str,
    trained: set[str],
    rows: int,
    world_size: int,
    device: str,
) -> Objective:
    """The objective of `rows` samples on each of so many ranks.

    Args:
        representations: per modality the shapes that its encoder emits; their first dimension does not matter.
        trained: modalities whose representations get gradients.
        device: kind of the device whose tiles are taken, `cpu` or `cuda`.

    Raises ValueError for an objective that cannot be run without values, or not with so many samples.
    """
    made = make_representations(representations, rows, DTYPES[precision], trained)
    batch = make_batch({}, rows, modalities=list(made))
    scale = torch.ones((), device="meta", requires_grad=True)
    meter, work = Meter("meta"), list[float]()
    meter.ignore([*model.parameters, *model.module.buffers(), *tensors_in(list(made.values())), scale])
    inner = model.module.inner_modules()
    parameters = [parameter for module in inner.values() for parameter in module.parameters()]
    try:
        with recorded(world_size) as calls, tiles_once(device, work), without_values(), meter:
            report = model.module.objective(Outputs(made, scale), batch, 0)
            report.loss.backward()
            if report.inner_loss is not None and parameters:
                torch.autograd.grad(report.inner_loss(), parameters, materialize_grads=True)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        words = " ".join(str(error).split())[:300]
        raise ValueError(f"the objective cannot be run without values: {type(error).__name__}: {words}") from error
    finally:
        for parameter in (*model.parameters, *parameters):
            parameter.grad = None
    if parameters:
        calls.append(all_reduce(sum(p.numel() for p in parameters), "float32", "inner optimizer"))
    # Operations within the tiles that ran stand for no more than themselves: their work is in `work`.
    others = [operation for operation in meter.operations if operation.flops == 0]
    if not work:
        work = [sum(operation.flops for operation in meter.operations)]
    return Objective(calls if world_size > 1 else [], meter.peak, sum(work), others)


__all__ = ["Objective", "make_representations", "run_objective", "tiles_once"]
