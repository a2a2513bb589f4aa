"""Zero-shot retrieval: which candidate of one modality fits a query made of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from symile_dist.seeding import philox

Similarity = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""similarity((K, D) candidates, [(Q, D), ...] queries) -> (Q, K) scores."""


@dataclass(frozen=True)
class Direction:
    """One retrieval task: `target` from `queries`."""

    target: str
    queries: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.target}_from_{'_'.join(self.queries)}"


def directions(modalities: Sequence[str], pairs: bool) -> list[Direction]:
    """Each modality from all the others; with `pairs` also each from each single other one."""
    all_others = [Direction(target, tuple(m for m in modalities if m != target)) for target in modalities]
    singles = [Direction(target, (query,)) for query, target in permutations(modalities, 2)] if pairs else []
    return all_others + [direction for direction in singles if direction not in all_others]


def class_numbers(labels: Sequence[str]) -> Tensor:
    """(Q,) int64: equal numbers for equal labels."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels], dtype=torch.int64)


def _score_chunks(
    similarity: Similarity, candidates: Tensor, queries: Sequence[Tensor], chunk_bytes: int = 2**27
) -> Iterator[tuple[int, Tensor]]:
    """(first row, scores (q, K)) so that no more than about 128 MB of scores exist at a time."""
    rows = max(1, chunk_bytes // (4 * len(candidates)))
    for start in range(0, len(queries[0]), rows):
        yield start, similarity(candidates, [query[start : start + rows] for query in queries])


@torch.no_grad()
def retrieval_accuracy(
    similarity: Similarity, representations: dict[str, Tensor], classes: Tensor, direction: Direction
) -> float:
    """Fraction of queries whose best candidate, among **all** samples, is of the query's class (Symile-M3's measure).

    Args:
        representations: modality -> (Q, D); candidates and queries are the same samples.
        classes: (Q,) int64.
    """
    queries = [representations[name] for name in direction.queries]
    correct = 0
    for start, scores in _score_chunks(similarity, representations[direction.target], queries):
        found = classes[scores.argmax(dim=1).cpu()]
        correct += int((found == classes[start : start + len(found)]).sum())
    return correct / len(classes)


@torch.no_grad()
def bootstrap_accuracy(
    similarity: Similarity,
    representations: dict[str, Tensor],
    classes: Tensor,
    direction: Direction,
    resamples: int = 10,
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard error of `retrieval_accuracy` over test sets drawn with replacement (Symile: 10 of them).

    Each resample is a set of queries, repeated as drawn, **and** of candidates. The standard error is the bootstrap's:
    the standard deviation over the resamples.
    """
    count = len(classes)
    drawn = np.stack(
        [np.random.Generator(philox("bootstrap", seed, r)).integers(0, count, count) for r in range(resamples)]
    )
    times = torch.from_numpy(np.stack([np.bincount(d, minlength=count) for d in drawn]))  # (resamples, Q)
    queries = [representations[name] for name in direction.queries]
    correct = torch.zeros(resamples, dtype=torch.int64)
    for start, scores in _score_chunks(similarity, representations[direction.target], queries):
        for r in range(resamples):
            absent = (times[r] == 0).to(scores.device)
            found = classes[scores.masked_fill(absent, -torch.inf).argmax(dim=1).cpu()]
            hits = found == classes[start : start + len(found)]
            correct[r] += (hits * times[r, start : start + len(found)]).sum()
    accuracies = correct.double() / count
    return float(accuracies.mean()), float(accuracies.std(unbiased=True)) if resamples > 1 else 0.0
