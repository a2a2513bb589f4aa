"""Retrieval among a few candidates that the split names for each query (Symile-MIMIC: one positive, nine negatives)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from symile_dist.evaluation.bootstrap import bootstrap_means
from symile_dist.evaluation.retrieval import CPU, RECALL_AT, Direction, Retrieval
from symile_dist.evaluation.scoring import distinct_rows
from symile_dist.seeding import philox
from symile_dist.similarity import Similarity, towards

QUERIES_AT_ONCE = 16


class Entry(NamedTuple):
    """A candidate of a query."""

    query: str
    """Equal for all candidates of one query."""
    row: int
    """Of the sample among those evaluated; -1: it is not there."""
    positive: bool
    """The candidate is the query's own: its sample is the query."""


@dataclass(frozen=True)
class CandidateLists:
    """q queries with up to k candidates each."""

    candidates: Tensor
    """(q, k) int64 rows of samples, the positive first, then the negatives; -1 where a query has fewer"""
    left_out: int
    """Queries without their positive or without a negative (samples that could not be read)."""

    @property
    def queries(self) -> Tensor:
        """(q,) rows of samples"""
        return self.candidates[:, 0]


def candidate_lists(entries: Iterable[Entry]) -> CandidateLists:
    """Groups candidates by query, in the order in which the queries appear.

    Raises ValueError for a query with two positives, and where no query has a positive and a negative.
    """
    positives: dict[str, int] = {}
    negatives: dict[str, list[int]] = {}
    for query, row, positive in entries:
        negatives.setdefault(query, [])
        if positive and query in positives:
            raise ValueError(f"query '{query}' has two positives among its candidates; it should have one")
        if positive:
            positives[query] = row
        elif row >= 0:
            negatives[query].append(row)
    whole = [query for query, others in negatives.items() if others and positives.get(query, -1) >= 0]
    if not whole:
        raise ValueError(f"none of the {len(negatives)} queries has its positive and a negative among the samples")
    found = torch.full((len(whole), 1 + max(len(negatives[query]) for query in whole)), -1, dtype=torch.int64)
    for number, query in enumerate(whole):
        rows = torch.tensor([positives[query], *negatives[query]])
        found[number, : len(rows)] = rows
    return CandidateLists(found, len(negatives) - len(whole))


def entries_of_metadata(metadata: Sequence[Mapping[str, Any]], query: str, positive: str) -> list[Entry]:
    """Where every sample is a candidate of one query and says so: its keys `query` and `positive` (1, or 0).

    Raises ValueError where a sample lacks a key, or has null there, or the flag is neither.
    """
    entries = []
    for row, facts in enumerate(metadata):
        for key in (query, positive):
            if facts.get(key) is None:  # null would make one query, called None, of all samples that have none
                raise ValueError(
                    f"evaluation.candidates: a sample's metadata has no '{key}'; pack the split that names candidates "
                    "(of Symile-MIMIC val_retrieval or test)"
                )
        entries.append(Entry(str(facts[query]), row, _flag(facts[positive], f"'{positive}' in the metadata")))
    return entries


def entries_of_csv(
    path: str | Path, metadata: Sequence[Mapping[str, Any]], query: str, positive: str, sample: str
) -> list[Entry]:
    """From a table with columns `query`, `positive` and `sample`, the last being the candidate's key in the metadata.

    Raises ValueError as `read_candidates` does, and where none of the candidates is among the samples.
    """
    rows: dict[str, int] = {}
    for row, facts in enumerate(metadata):
        if facts.get(sample) is not None:
            rows.setdefault(str(facts[sample]), row)
    candidates = read_candidates(path, query, positive, sample)
    entries = [Entry(asked, rows.get(named, -1), own) for asked, named, own in candidates]
    if all(entry.row < 0 for entry in entries):
        raise ValueError(f"{path}: none of its {len(entries)} candidates is among the samples by '{sample}'")
    return entries


def read_candidates(path: str | Path, query: str, positive: str, sample: str) -> list[tuple[str, str, bool]]:
    """(query, sample, whether it is the query's own) of every row of such a table.

    Raises ValueError for a table that is no CSV or lacks a column, and for a row that lacks a value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"evaluation.candidates.file: {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"evaluation.candidates.file: {path}: is no text in UTF-8: {error}") from None
    table = _records(path, text)
    _, names = next(table, (0, []))
    wanted = (query, positive, sample)
    lacking = [name for name in wanted if name not in names]
    if lacking:
        raise ValueError(f"{path}: has no column '{lacking[0]}'; its columns are: {', '.join(names)}")
    found = []
    for line, fields in table:
        values = dict(zip(names, fields, strict=False))
        lacking = [name for name in wanted if not values.get(name)]
        if lacking:
            raise ValueError(
                f"{path}: line {line}: has no '{lacking[0]}' ({len(fields)} fields, the header has {len(names)} "
                f"columns); a candidate needs {', '.join(wanted)}"
            )
        own = _flag(values[positive], f"{path}: line {line}: '{positive}'")
        found.append((values[query], values[sample], own))
    return found


def _records(path: str | Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, fields) of every record of a CSV, the header's too; blank lines are passed over.

    Raises ValueError for what is no CSV.
    """
    # Strict: after a quote that is not closed the rest of the table would be one field.
    reader = csv.reader(io.StringIO(text), strict=True)
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}: line {line}: not readable as CSV: {error}; is a quote not closed?") from None


def _flag(value: Any, place: str) -> bool:
    try:
        flag = float(value)
    except (TypeError, ValueError):
        flag = math.nan
    if flag not in (0.0, 1.0):
        raise ValueError(f"{place} is {value!r}; should be 1 for the positive and 0 for a negative")
    return flag == 1.0


@torch.no_grad()
def retrieve_among(
    similarity: Similarity,
    representations: Mapping[str, Tensor],
    direction: Direction,
    lists: CandidateLists,
    present: Mapping[str, Tensor] | None = None,
    recall_at: Sequence[int] = RECALL_AT,
    resamples: int = 0,
    seed: int = 0,
    device: torch.device = CPU,
) -> Retrieval:
    """Retrieval of each query's positive among its own candidates, as Symile-MIMIC is evaluated.

    Of candidates that score the same one is taken at random, by the seed. The bootstrap draws queries, each with its
    candidates. Queries that lack a modality of the direction, and candidates that lack the target, are left out.
    """
    similarity = towards(similarity, direction.target, direction.queries)
    target, queries = representations[direction.target], [representations[name] for name in direction.queries]
    table = lists.candidates
    if present is not None:
        table = table.masked_fill(~present[direction.target][table.clamp(min=0)], -1)
        asked = torch.stack([present[name][lists.queries] for name in (direction.target, *direction.queries)])
        table = table[asked.all(dim=0)]
        table = table[(table[:, 1:] >= 0).any(dim=1)]
    if len(table) == 0:
        nothing = dict.fromkeys(recall_at, math.nan)
        return Retrieval(direction, 0, 0, math.nan, math.nan, nothing, math.nan, math.nan)
    scores = torch.cat([_scores(similarity, target, queries, block, device) for block in table.split(QUERIES_AT_ONCE)])
    there = table >= 0
    scores = scores.masked_fill(~there | scores.isnan(), -torch.inf)
    above = (scores > scores[:, :1]).sum(dim=1)
    tied = ((scores == scores[:, :1]) & there).sum(dim=1) - 1
    words = np.asarray(philox("ties", seed, str(direction)).random_raw(len(table)), dtype=np.uint64)
    place = torch.from_numpy(words / 2.0**64) * (tied + 1)
    ranks = above + 1 + place.long()
    hits = {k: (ranks <= k).double() for k in {1, *recall_at}}
    sizes = there.sum(dim=1)
    spread = dict(zip(hits, bootstrap_means(list(hits.values()), resamples, seed), strict=True)) if resamples else {}
    return Retrieval(
        direction,
        queries=len(table),
        candidates=int(sizes.max()),
        accuracy=float(hits[1].mean()),
        chance=float((1 / sizes.double()).mean()),
        recall={k: float(hits[k].mean()) for k in recall_at},
        median_rank=float(np.median(ranks.numpy())),
        mean_rank=float(ranks.double().mean()),
        accuracy_bootstrap=spread.get(1),
        recall_bootstrap={k: spread[k] for k in recall_at} if resamples else {},
    )


def _scores(
    similarity: Similarity, target: Tensor, queries: Sequence[Tensor], table: Tensor, device: torch.device
) -> Tensor:
    """(q, k) scores of the candidates in a (q, k) table of rows; of equal candidates the same score."""
    rows = table.clamp(min=0).flatten()
    distinct = distinct_rows(target[rows])
    candidates = target[rows[distinct.rows]].to(device)
    of_all = similarity(candidates, [query[table[:, 0]].to(device) for query in queries]).cpu()
    return of_all.gather(1, distinct.group.view(table.shape))
