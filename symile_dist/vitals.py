"""Whether a contrastive model learns or collapses, seen from a rank's rows of a training batch, beside its losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import combinations
from statistics import fmean

import torch
from torch import Tensor

from symile_dist.evaluation.retrieval import directions, retrieve
from symile_dist.evaluation.statistics import alignment, effective_rank, uniformity
from symile_dist.similarity import Similarity
from symile_dist.types import Batch, Representation

ROWS = 256
SHARE = 1 / 1000
"""Of the time, that may be spent here."""
SECOND_LOOK_SECONDS = 5.0
"""After the first look, which takes longer than any other and tells nothing of them."""


class Vitals:
    """Looks as often as it may without being felt: where a look takes 20 ms, every 20 seconds."""

    def __init__(
        self,
        similarity: Similarity | None,
        embeddings: Callable[[dict[str, Representation]], dict[str, Tensor]] | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """As of `validate.similarity_of` and `validate.embeddings_of`."""
        self._similarity, self._embeddings, self._clock = similarity, embeddings, clock
        self._next, self._cheapest = -math.inf, math.inf

    @torch.no_grad()
    def look(self, representations: dict[str, Representation], batch: Batch) -> dict[str, float]:
        """`alignment`, `uniformity/<modality>`, `effective_rank/<modality>`, `batch_accuracy/<target>_from_<queries>`.

        Of the first rows that hold a sample; nothing where it is too early, or there are no vectors to look at.
        """
        begin = self._clock()
        if begin < self._next:
            return {}
        rows = batch.valid.nonzero().flatten()[:ROWS]
        found = representations if self._embeddings is None else self._embeddings(representations)
        vectors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        values: dict[str, float] = {}
        if vectors and len(rows) > 1:
            vectors = {name: value[rows.to(value.device)].detach().float().cpu() for name, value in vectors.items()}
            values = self._values(vectors)
        end = self._clock()
        first, self._cheapest = math.isinf(self._cheapest), min(self._cheapest, end - begin)
        self._next = end + (SECOND_LOOK_SECONDS if first else self._cheapest / SHARE)
        return values

    def _values(self, vectors: dict[str, Tensor]) -> dict[str, float]:
        values: dict[str, float] = {}
        if len({value.shape[1] for value in vectors.values()}) == 1 and len(vectors) > 1:
            values["alignment"] = fmean(alignment(first, second) for first, second in combinations(vectors.values(), 2))
        for name, value in vectors.items():
            values[f"uniformity/{name}"] = uniformity(value)
            values[f"effective_rank/{name}"] = effective_rank(value)
        if self._similarity is not None:
            count = len(next(iter(vectors.values())))
            classes, present = torch.arange(count), {name: torch.ones(count, dtype=torch.bool) for name in vectors}
            for direction in directions(list(vectors), "others"):
                got = retrieve(self._similarity, vectors, direction, classes, present, ())
                values[f"batch_accuracy/{direction}"] = got.accuracy
        return values
