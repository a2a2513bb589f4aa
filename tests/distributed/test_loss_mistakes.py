"""Arguments that do not fit those of other ranks: one ValueError on all ranks alike, before anything can hang.

And what goes over the network when all is well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from symile_dist.objectives import PairwiseClipLoss, SymileLoss
from tests.processes import run_distributed

N_LOCAL, DIMENSION = 8, 256


def tensors(n: int = N_LOCAL, dimension: int = DIMENSION, number: int = 3, dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(n, dimension, generator=generator).to(dtype).requires_grad_() for _ in range(number)]


def last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


# What only the last rank does otherwise, and what all ranks are to be told.
MISTAKES: dict[str, tuple[Callable[[], Tensor], str]] = {
    "one row more": (
        lambda: SymileLoss()(tensors(N_LOCAL + last()), 1.0, step=0),
        r"the ranks disagree: rank 0 has 3 representations of shape \(8, 256\) .* rank 1 has .*\(9, 256\)",
    ),
    "another dimension": (lambda: SymileLoss()(tensors(dimension=DIMENSION + last()), 1.0, step=0), r"\(8, 257\)"),
    "another type": (
        lambda: SymileLoss()(tensors(dtype=torch.float64 if last() else torch.float32), 1.0, step=0),
        "rank 1 has .* torch.float64",
    ),
    "a modality more": (lambda: SymileLoss()(tensors(number=3 + last()), 1.0, step=0), "rank 1 has 4 representations"),
    "unequal modalities": (
        lambda: SymileLoss()([*tensors(), *tensors(N_LOCAL + last(), number=1)], 1.0, step=0),
        r"rank 1: representation 3 has shape torch.Size\(\[9, 256\]\)",
    ),
    "no tensors": (lambda: SymileLoss()([] if last() else tensors(), 1.0, step=0), "rank 1: .* two or more modalities"),
    "another strategy": (
        lambda: SymileLoss("n_squared" if last() else "n")(tensors(), 1.0, step=0),
        "rank 0 has .*negative_sampling='n'.* rank 1 has .*negative_sampling='n_squared'",
    ),
    "another number of sheets": (
        lambda: SymileLoss("sheets", sheets=2 + last())(tensors(), 1.0, step=0),
        "rank 0 has .*sheets=2.* rank 1 has .*sheets=3",
    ),
    "another step": (lambda: SymileLoss()(tensors(), 1.0, step=int(last())), "step=0.* rank 1 has .*step=1"),
    "another seed": (lambda: SymileLoss(seed=int(last()))(tensors(), 1.0, step=0), "the ranks disagree"),
    "a mask of another length": (
        lambda: SymileLoss()(tensors(), 1.0, step=0, valid=torch.ones(N_LOCAL + last(), dtype=torch.bool)),
        r"rank 1: valid should be a bool tensor of shape \(8,\), is torch.bool \(9,\)",
    ),
    "a scale of two": (
        lambda: SymileLoss("n_squared")(tensors(), torch.ones(1 + last())),
        r"rank 1: logit_scale should be one number",
    ),
    "pairwise, one row more": (lambda: PairwiseClipLoss()(tensors(N_LOCAL + last()), 1.0), r"\(9, 256\)"),
    "a map": (
        lambda: SymileLoss()(dict(enumerate(tensors())) if last() else tensors(), 1.0, step=0),  # type: ignore[arg-type]
        "rank 1: representations should be a list of tensors",
    ),
    "a sparse tensor": (
        lambda: SymileLoss()([t.detach().to_sparse() for t in tensors()] if last() else tensors(), 1.0, step=0),
        "rank 1: representation 0 is torch.sparse_coo; should be dense",
    ),
    "no gradients": (
        lambda: SymileLoss()([t.detach() for t in tensors()] if last() else tensors(), 1.0, step=0),
        r"requiring gradients: \[True, True, True\].* rank 1 has .*\[False, False, False\]",
    ),
    "another number as scale": (lambda: SymileLoss()(tensors(), 1.0 + last(), step=0), "rank 1 has .*logit_scale=2.0"),
    "too many sheets": (lambda: SymileLoss("sheets", sheets=17)(tensors(), 1.0, step=0), "has 16: choose 2 to 16"),
}


@contextmanager
def counted_bytes(counts: Counter[str]) -> Iterator[None]:
    """Counts the bytes of the whole tensor of every collective, by what it does."""

    def watch(name: str, whole: int) -> Any:
        original = getattr(dist, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            tensor = arguments[whole]
            counts[f"{name} {tensor.dtype}"] += tensor.numel() * tensor.element_size()
            return original(*arguments, **keywords)

        return patch.object(dist, name, call)

    with watch("all_gather_into_tensor", 0), watch("reduce_scatter_tensor", 1), watch("all_reduce", 0):
        yield


def every_case() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (call, _) in MISTAKES.items():
        try:
            call()
            found[name] = None
        except ValueError as error:
            found[name] = str(error)
    for name, loss in {
        "n": SymileLoss(),
        "n_squared": SymileLoss("n_squared"),
        "sheets": SymileLoss("sheets", sheets=4),
        "clip": PairwiseClipLoss(),
    }.items():
        counts: Counter[str] = Counter()
        valid = torch.ones(N_LOCAL, dtype=torch.bool)
        with counted_bytes(counts):
            loss(tensors(dimension=8192), 0.01, step=0, valid=valid).backward()
        found[f"bytes {name}"] = dict(counts)
    for partly in (True, False):  # one rank knows that all its rows are valid, another passes no mask
        valid_or_none = torch.ones(N_LOCAL, dtype=torch.bool) if partly and last() else None
        found[f"mask {partly}"] = float(SymileLoss()(tensors(), 0.01, step=0, valid=valid_or_none))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(every_case, 2)


@pytest.mark.parametrize("name", MISTAKES)
def test_all_ranks_are_told_the_same(ranks: list[dict[str, Any]], name: str) -> None:
    for found in ranks:
        assert found[name] is not None, "no error"
        with pytest.raises(ValueError, match=MISTAKES[name][1]):
            raise ValueError(found[name])
    assert ranks[0][name] == ranks[1][name]


@pytest.mark.parametrize("strategy", ["n", "n_squared", "sheets", "clip"])
def test_all_but_one_modality_are_gathered_and_little_else(ranks: list[dict[str, Any]], strategy: str) -> None:
    """The tensors handed to collectives: all rows of M - 1 modalities, their gradients, and some numbers per sample."""
    one_way = 2 * (2 * N_LOCAL) * 8192 * 4
    for found in ranks:
        counts = found[f"bytes {strategy}"]
        assert counts["all_gather_into_tensor torch.float32"] == one_way
        assert counts["reduce_scatter_tensor torch.float32"] == one_way
        assert sum(counts.values()) <= 1.01 * 2 * one_way, counts


def test_a_rank_without_a_mask_counts_all_its_rows(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["mask True"] == ranks[0]["mask False"] == ranks[1]["mask True"]
