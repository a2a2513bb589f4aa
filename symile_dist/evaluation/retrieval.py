"""Retrieval: which candidate of one modality fits a query made of others, among all samples of a split.

Two measures, both of which the literature calls zero-shot retrieval: `accuracy` asks that the best candidate is of the
query's class (Symile-M3), `recall` and rank ask for the query's own candidate.

Candidates that score the same are told apart by nothing, so one of them counts as the better at random: every figure is
the expectation over their order. A model that emits constants is at chance, and not at 1 or 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symile_dist.evaluation.bootstrap import Estimate, estimate, resample, weighted_means
from symile_dist.evaluation.scoring import Search
from symile_dist.registry import suggestion
from symile_dist.similarity import Similarity, towards

RECALL_AT = (1, 5, 10)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Direction:
    """One retrieval task: `target` from `queries`."""

    target: str
    queries: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.target}_from_{'_'.join(self.queries)}"


def directions(names: Sequence[str], which: str = "auto") -> list[Direction]:
    """From each number of others: `all` subsets of them, `others` (all of them at once) and `singles`.

    `auto` is `all` for up to four modalities, `others` and `singles` beyond. Embeddings that have a part of a modality
    in their names (`image.shared`, `image.unique`) are compared with those of the same part.
    """
    found: list[Direction] = []
    for group in _parts(names):
        last = len(group) - 1
        sizes = {"all": range(last, 0, -1), "others": [last], "singles": [1]}
        sizes["auto"] = sizes["all"] if len(group) <= 4 else [last, 1]
        for size in sizes[which] if last else []:
            for target in group:
                others = [name for name in group if name != target]
                found += [Direction(target, queries) for queries in combinations(others, size)]
    return list(dict.fromkeys(found))


def _parts(names: Sequence[str]) -> list[list[str]]:
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.partition(".")[2], []).append(name)
    return list(parts.values())


def parse_directions(words: Sequence[str], names: Sequence[str]) -> list[Direction]:
    """`auto`, `all`, `others`, `singles`, or directions by name, such as `image_from_audio_text`.

    Raises ValueError for anything else.
    """
    found: list[Direction] = []
    for word in words:
        if word in ("auto", "all", "others", "singles"):
            found += directions(names, word)
            continue
        named = next(_readings(word, names), None)
        if named is None:
            known = ["auto", "all", "others", "singles", *map(str, directions(names))]
            raise ValueError(f"no direction '{word}'{suggestion(word, known)}")
        found.append(named)
    return list(dict.fromkeys(found))


def _readings(word: str, names: Sequence[str]) -> Iterator[Direction]:
    """Names may hold '_' themselves, and the queries may be in any order."""

    def split(rest: str, left: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name in left:
            others = tuple(other for other in left if other != name)
            if rest == name:
                yield (name,)
            elif rest.startswith(f"{name}_"):
                yield from ((name, *more) for more in split(rest[len(name) + 1 :], others))

    for target in names:
        if word.startswith(f"{target}_from_"):
            others = tuple(name for name in names if name != target)
            for queries in split(word[len(target) + 6 :], others):
                yield Direction(target, tuple(name for name in names if name in queries))


def class_numbers(labels: Sequence[str]) -> Tensor:
    """(Q,) int64: equal numbers for equal labels."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels], dtype=torch.int64)


@dataclass(frozen=True)
class Retrieval:
    """What retrieval in one direction gives; NaN where there is no query."""

    direction: Direction
    queries: int
    candidates: int
    """Of each query."""
    accuracy: float
    """Fraction of the queries whose best candidate is of their class."""
    chance: float
    """The accuracy of a candidate taken at random."""
    recall: dict[int, float]
    """k -> fraction of the queries whose own candidate is among the best k."""
    median_rank: float
    """Of the queries' own candidates; 1 is the best."""
    mean_rank: float
    accuracy_bootstrap: Estimate | None = None
    recall_bootstrap: dict[int, Estimate] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN: None in its place."""
        values: dict[str, Any] = {
            "target": self.direction.target,
            "queries": list(self.direction.queries),
            "samples": self.queries,
            "candidates": self.candidates,
            "accuracy": number(self.accuracy),
            "chance": number(self.chance),
            "recall": {str(k): number(value) for k, value in self.recall.items()},
            "median_rank": number(self.median_rank),
            "mean_rank": number(self.mean_rank),
        }
        if self.accuracy_bootstrap is not None:
            values["bootstrap_mean"] = number(self.accuracy_bootstrap.mean)
            values["bootstrap_standard_error"] = number(self.accuracy_bootstrap.standard_error)
            values["recall_bootstrap_mean"] = {str(k): number(e.mean) for k, e in self.recall_bootstrap.items()}
            values["recall_bootstrap_standard_error"] = {
                str(k): number(e.standard_error) for k, e in self.recall_bootstrap.items()
            }
        return values


def number(value: float) -> float | None:
    """None for what is not finite."""
    return value if math.isfinite(value) else None


@torch.no_grad()
def retrieve(
    similarity: Similarity,
    representations: Mapping[str, Tensor],
    direction: Direction,
    classes: Tensor | None = None,
    present: Mapping[str, Tensor] | None = None,
    recall_at: Sequence[int] = RECALL_AT,
    resamples: int = 0,
    seed: int = 0,
    device: torch.device = CPU,
    across_ranks: bool = False,
    report: Callable[[int], None] | None = None,
) -> Retrieval:
    """Retrieval among **all** samples: candidates and queries are the same samples.

    A sample that lacks the target is no candidate, and one that lacks any modality of the direction no query. Memory
    is that of the representations and of one tile of scores, for any number of samples and resamples (see `scoring`);
    the result is the same for every number of ranks.

    The bootstrap of the accuracy draws test sets with replacement, their queries **and** their candidates (Symile);
    that of recall draws queries alone, as a rank among fewer candidates would be another figure.

    Args:
        representations: embedding -> (Q, D), on any device.
        classes: (Q,) int64; without them each sample is its own class.
        present: embedding -> (Q,) bool; all of them without it.
        resamples: of the bootstrap; 0: none.
        device: where scores are computed.
        across_ranks: all ranks call this with the same arguments, and share the queries.
        report: called with the number of queries that are done.
    """
    similarity = towards(similarity, direction.target, direction.queries)
    target, queries = representations[direction.target], [representations[name] for name in direction.queries]
    everyone = torch.ones(len(target), dtype=torch.bool)
    there = {name: everyone if present is None else present[name] for name in (direction.target, *direction.queries)}
    pool = there[direction.target].nonzero().squeeze(1)
    asked = torch.stack(list(there.values())).all(dim=0)
    rows = asked.nonzero().squeeze(1)
    if len(rows) == 0:
        nothing = dict.fromkeys(recall_at, math.nan)
        return Retrieval(direction, 0, len(pool), math.nan, math.nan, nothing, math.nan, math.nan)
    classes = torch.arange(len(target)) if classes is None else classes
    position = torch.full((len(target),), -1)
    position[pool] = torch.arange(len(pool))
    search = Search(
        similarity,
        target if len(pool) == len(target) else target[pool],
        [query if len(rows) == len(query) else query[rows] for query in queries],
        position[rows],
        (classes[rows], classes[pool]),
        device,
        across_ranks,
        several=resamples > 0,
    )
    above, tied = search.places(report)
    recall = {k: _recall(above, tied, k) for k in recall_at}
    ranks = above + 1 + tied.double() / 2
    once = torch.ones((1, len(target)), dtype=torch.int64)
    accuracy = float(search.hits(once[:, pool], once[:, rows] > 0)[0].mean())
    accuracies: list[Tensor] = []
    recalls: dict[int, list[Tensor]] = {k: [] for k in recall}
    for times in resample(len(target), resamples, seed) if resamples else ():
        drawn = times[:, rows]
        accuracies.append(weighted_means(search.hits(times[:, pool], drawn > 0), drawn))
        for k, values in recall.items():
            recalls[k].append(weighted_means(values, drawn))
    return Retrieval(
        direction,
        queries=len(rows),
        candidates=len(pool),
        accuracy=accuracy,
        chance=_chance(classes[rows], classes[pool]),
        recall={k: float(values.mean()) for k, values in recall.items()},
        median_rank=float(np.median(ranks.numpy())),
        mean_rank=float(ranks.mean()),
        accuracy_bootstrap=estimate(torch.cat(accuracies)) if resamples else None,
        recall_bootstrap={k: estimate(torch.cat(means)) for k, means in recalls.items()} if resamples else {},
    )


def _recall(above: Tensor, tied: Tensor, k: int) -> Tensor:
    """(Q,) float64: probability that the own candidate is among the best k, those that tie being in random order."""
    return ((k - above).double() / (tied + 1)).clamp(0, 1)


def _chance(queries: Tensor, candidates: Tensor) -> float:
    size = 1 + int(max(queries.max(), candidates.max()))
    both = queries.bincount(minlength=size).double() * candidates.bincount(minlength=size)
    return float(both.sum()) / (len(queries) * len(candidates))
