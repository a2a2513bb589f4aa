"""Retrieval among the candidates that a split names for each query (Symile-MIMIC)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from symile_dist.evaluation.bootstrap import resample
from symile_dist.evaluation.candidates import (
    CandidateLists,
    Entry,
    candidate_lists,
    entries_of_csv,
    entries_of_metadata,
    retrieve_among,
)
from symile_dist.evaluation.retrieval import Direction
from symile_dist.similarity import MIPSimilarity

A_FROM_BC = Direction("a", ("b", "c"))
QUERIES, CANDIDATES = 18, 5


def mimic_rows() -> list[dict[str, Any]]:
    """As val_retrieval and test are packed: a query's candidates in any order, one of them its own."""
    order = np.random.default_rng(0).permutation(QUERIES * CANDIDATES)
    return [
        {
            "hadm_id": 20_000 + int(number),
            "label_hadm_id": 20_000 + int(number) // CANDIDATES * CANDIDATES,
            "label": int(number % CANDIDATES == 0),
        }
        for number in order
    ]


def random_representations(rows: int, whole: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if whole:  # with ties
        return {name: torch.randint(-1, 2, (rows, 2), generator=generator).float() for name in "abc"}
    return {name: torch.randn(rows, 4, generator=generator) for name in "abc"}


def test_lists_of_metadata() -> None:
    rows = mimic_rows()
    lists = candidate_lists(entries_of_metadata(rows, "label_hadm_id", "label"))
    assert lists.candidates.shape == (QUERIES, CANDIDATES) and lists.left_out == 0
    for found in lists.candidates.tolist():
        facts = [rows[row] for row in found]
        assert [fact["label"] for fact in facts] == [1] + [0] * (CANDIDATES - 1), "the positive stands first"
        assert len({fact["label_hadm_id"] for fact in facts}) == 1
        assert facts[0]["hadm_id"] == facts[0]["label_hadm_id"]


def test_lists_of_a_table(tmp_path: Path) -> None:
    """The same from a CSV, for a split that holds each admission once."""
    rows = mimic_rows()
    path = tmp_path / "test.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["hadm_id", "label_hadm_id", "label", "comment"])
        writer.writeheader()
        writer.writerows({**row, "comment": "with, comma", "label": float(row["label"])} for row in rows)
    ids = [{"hadm_id": row["hadm_id"]} for row in rows]
    found = candidate_lists(entries_of_csv(path, ids, "label_hadm_id", "label", "hadm_id"))
    want = candidate_lists(entries_of_metadata(rows, "label_hadm_id", "label"))
    assert torch.equal(found.candidates, want.candidates)
    # A sample that could not be read: as a positive it takes its query along, as a negative itself alone.
    positive, negative = (next(n for n, row in enumerate(rows) if row["label"] == label) for label in (1, 0))
    same = rows[positive]["label_hadm_id"] == rows[negative]["label_hadm_id"]
    assert not same, "choose another seed"
    fewer = [row for number, row in enumerate(ids) if number not in (positive, negative)]
    found = candidate_lists(entries_of_csv(path, fewer, "label_hadm_id", "label", "hadm_id"))
    assert len(found.candidates) == QUERIES - 1 and found.left_out == 1
    assert int((found.candidates < 0).sum()) == 1


def test_mistakes_are_told(tmp_path: Path) -> None:
    rows = mimic_rows()
    with pytest.raises(ValueError, match=r"no 'label_hadm'.*val_retrieval"):
        entries_of_metadata(rows, "label_hadm", "label")
    with pytest.raises(ValueError, match=r"'hadm_id' in the metadata is 20.*should be 1"):
        entries_of_metadata(rows, "label_hadm_id", "hadm_id")
    # Null is no query: samples that have none would be one query, its positive among them.
    with pytest.raises(ValueError, match="no 'label_hadm_id'"):
        entries_of_metadata([*rows, {"label_hadm_id": None, "label": 1}], "label_hadm_id", "label")
    with pytest.raises(ValueError, match="query 'q' has two positives"):
        candidate_lists([Entry("q", 0, True), Entry("q", 1, True)])
    with pytest.raises(ValueError, match="none of the 2 queries"):
        candidate_lists([Entry("q", 0, True), Entry("r", 1, False)])
    path = tmp_path / "test.csv"
    with pytest.raises(ValueError, match="no such file"):
        entries_of_csv(path, rows, "query", "positive", "sample")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"test\.csv: is no text in UTF-8"):
        entries_of_csv(path, rows, "query", "positive", "sample")
    path.write_text("query,positive,sample\n1,1,5\n1,0,6\n")
    with pytest.raises(ValueError, match="no column 'label'; its columns are: query, positive, sample"):
        entries_of_csv(path, rows, "query", "label", "sample")
    with pytest.raises(ValueError, match="none of its 2 candidates is among the samples by 'sample'"):
        entries_of_csv(path, rows, "query", "positive", "sample")
    path.write_text("query,positive,sample\n1,1,None\n1,0,6\n")
    named = [{"sample": None}, {"sample": 6}]
    assert [entry.row for entry in entries_of_csv(path, named, "query", "positive", "sample")] == [-1, 1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            'q,pos,s\n1,1,5\n1,0,"6\n' + "1,0,7\n" * 50_000,
            "line 3: not readable as CSV: field larger than .* not closed",
        ),
        (
            'q,pos,s\n1,1,5\n1,0,"6\n1,0,7\n',
            "line 3: not readable as CSV: unexpected end of data; is a quote not closed",
        ),
        ('"q,pos,s\n1,1,5\n', "line 1: not readable as CSV: unexpected end of data"),
        ("q,s,pos\n1,5,1\n\n1,6\n", r"line 4: has no 'pos' \(2 fields, the header has 3 columns\); .* needs q, pos, s"),
        ("q,s,pos\n1,5,1\n,6,0\n", "line 3: has no 'q'"),
        ("q,s,pos\n1,5,1\n1,6,\n", "line 3: has no 'pos'"),
        ("q,s,pos\n1,5,1\n1,6,yes\n", "line 3: 'pos' is 'yes'; should be 1 for the positive and 0"),
        ('q,c,s,pos\n1,"two\nlines",5,1\n1,,6,7\n', "line 4: 'pos' is '7'"),
        ("", "has no column 'q'"),
    ],
)
def test_rows_of_a_table_that_are_none(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "test.csv").write_text(content)
    with pytest.raises(ValueError, match=r"test\.csv: " + told):
        entries_of_csv(tmp_path / "test.csv", [{"s": 5}, {"s": 6}], "q", "pos", "s")


def test_a_table_may_lack_what_is_not_needed(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("q,pos,s,comment\n1,1,5\n\n1,0,6,a,b\n")
    entries = entries_of_csv(tmp_path / "test.csv", [{"s": 5}, {"s": 6}], "q", "pos", "s")
    assert entries == [Entry("1", 0, True), Entry("1", 1, False)]


def one_by_one(representations: dict[str, Tensor], lists: CandidateLists) -> tuple[list[int], list[int]]:
    """(candidates above the positive, candidates that tie with it) of each query."""
    above, tied = [], []
    for found in lists.candidates.tolist():
        query = representations["b"][found[0]] * representations["c"][found[0]]
        scores = [float(query.double() @ representations["a"][row].double()) for row in found if row >= 0]
        above.append(sum(score > scores[0] for score in scores))
        tied.append(sum(score == scores[0] for score in scores) - 1)
    return above, tied


def test_equal_to_one_query_after_the_other() -> None:
    lists = candidate_lists(entries_of_metadata(mimic_rows(), "label_hadm_id", "label"))
    representations = random_representations(QUERIES * CANDIDATES, whole=False)
    found = retrieve_among(MIPSimilarity(), representations, A_FROM_BC, lists, recall_at=(1, 3), resamples=4, seed=2)
    above, tied = one_by_one(representations, lists)
    assert not any(tied)
    hits = np.array(above) == 0
    assert found.accuracy == found.recall[1] == hits.mean() and 0 < found.accuracy < 1
    assert found.recall[3] == (np.array(above) < 3).mean()
    assert found.median_rank == np.median(above) + 1
    assert (found.queries, found.candidates) == (QUERIES, CANDIDATES) and found.chance == pytest.approx(1 / CANDIDATES)
    # Queries are drawn, each with its candidates.
    times = torch.cat([*resample(QUERIES, 4, 2)]).numpy()
    drawn = (times * hits).sum(axis=1) / QUERIES
    assert found.accuracy_bootstrap == pytest.approx((drawn.mean(), drawn.std(ddof=1)))


def test_of_candidates_that_tie_one_is_taken_at_random_by_the_seed() -> None:
    lists = candidate_lists(entries_of_metadata(mimic_rows(), "label_hadm_id", "label"))
    representations = random_representations(QUERIES * CANDIDATES, whole=True)
    above, tied = one_by_one(representations, lists)
    assert sum(tied) > QUERIES / 2, "nothing ties"
    found = [
        retrieve_among(MIPSimilarity(), representations, A_FROM_BC, lists, recall_at=(1, 2), seed=seed).recall
        for seed in range(150)
    ]
    again = retrieve_among(MIPSimilarity(), representations, A_FROM_BC, lists, recall_at=(1, 2), seed=5).recall
    assert again == found[5], "not a function of the seed"
    for k in (1, 2):
        want = np.mean([min(max((k - a) / (t + 1), 0), 1) for a, t in zip(above, tied, strict=True)])
        values = [recall[k] for recall in found]
        assert abs(np.mean(values) - want) < 4 * np.std(values) / len(values) ** 0.5 and np.std(values) > 0, k


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_constants_are_at_chance(value: float) -> None:
    count = 400
    entries = [Entry(str(query), query * 10 + place, place == 0) for query in range(count) for place in range(10)]
    constant = {name: torch.full((count * 10, 3), value) for name in "abc"}
    found = retrieve_among(MIPSimilarity(), constant, A_FROM_BC, candidate_lists(entries))
    assert abs(found.accuracy - 0.1) < 4 * (0.1 * 0.9 / count) ** 0.5, "the positive stands first, but is not preferred"


def test_what_lacks_a_modality_is_left_out() -> None:
    lists = candidate_lists(entries_of_metadata(mimic_rows(), "label_hadm_id", "label"))
    representations = random_representations(QUERIES * CANDIDATES, whole=False)
    present = {name: torch.ones(QUERIES * CANDIDATES, dtype=torch.bool) for name in "abc"}
    table = lists.candidates
    present["b"][table[0, 0]] = False  # a query without a query
    present["a"][table[1, 0]] = False  # without its positive
    present["a"][table[2, 1:]] = False  # without a negative
    present["a"][table[3, 2]] = False  # with one candidate less
    present["b"][table[4, 2]] = False  # a candidate needs the target alone
    found = retrieve_among(MIPSimilarity(), representations, A_FROM_BC, lists, present)
    kept = table[3:].clone()
    kept[0, 2] = -1
    above, _ = one_by_one(representations, CandidateLists(kept, 0))
    assert found.queries == QUERIES - 3 and found.accuracy == np.mean([a == 0 for a in above])
    assert found.chance == pytest.approx((1 / 4 + (QUERIES - 4) / 5) / (QUERIES - 3))
    nobody = {name: torch.zeros(QUERIES * CANDIDATES, dtype=torch.bool) for name in "abc"}
    assert np.isnan(retrieve_among(MIPSimilarity(), representations, A_FROM_BC, lists, nobody).accuracy)
