"""Retrieval among all samples: known answers, the whole matrix as reference, ties, tiles and the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from symile_dist.evaluation import bootstrap as bootstrap_module
from symile_dist.evaluation import scoring
from symile_dist.evaluation.bootstrap import bootstrap_means, resample
from symile_dist.evaluation.retrieval import (
    Direction,
    Retrieval,
    class_numbers,
    directions,
    parse_directions,
    retrieve,
)
from symile_dist.evaluation.scoring import Search, distinct_rows
from symile_dist.seeding import philox
from symile_dist.similarity import AreaSimilarity, MIPSimilarity, SumSimilarity, VolumeSimilarity

A_FROM_BC = Direction("a", ("b", "c"))
SAMPLES = 41


def random_representations(samples: int = SAMPLES, dimension: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(samples, dimension, generator=generator) for name in "abc"}


def whole_representations(samples: int = SAMPLES, dimension: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Of small whole numbers: sums are exact, many rows are equal, and many scores of unequal rows too."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(-1, 2, (samples, dimension), generator=generator).float() for name in "abc"}


def accuracy(
    representations: dict[str, Tensor], classes: Tensor, direction: Direction = A_FROM_BC, similarity: Any = None
) -> float:
    return retrieve(similarity or MIPSimilarity(), representations, direction, classes).accuracy


def bootstrap(representations: dict[str, Tensor], classes: Tensor, **options: Any) -> tuple[float, float]:
    found = retrieve(MIPSimilarity(), representations, A_FROM_BC, classes, **{"resamples": 10, **options})
    assert found.accuracy_bootstrap is not None
    return found.accuracy_bootstrap


# -- directions --------------------------------------------------------------------------------------------------------


def test_directions() -> None:
    assert [str(d) for d in directions(["a", "b"])] == ["a_from_b", "b_from_a"]
    assert [str(d) for d in directions(["a", "b", "c"], "others")] == ["a_from_b_c", "b_from_a_c", "c_from_a_b"]
    three = [str(d) for d in directions(["a", "b", "c"])]
    assert three[3:] == ["a_from_b", "a_from_c", "b_from_a", "b_from_c", "c_from_a", "c_from_b"]
    four = directions(["a", "b", "c", "d"])
    assert len(four) == 4 * (1 + 3 + 3) and len(set(four)) == 28
    assert four[1] == Direction("b", ("a", "c", "d")) and Direction("b", ("a", "d")) in four
    eight = directions(list("abcdefgh"))
    assert len(eight) == 8 + 56, "of all subsets there would be 8 * 127"
    assert len(directions(list("abcde"), "all")) == 5 * 15
    assert directions(["a"]) == []


def test_directions_stay_within_one_part_of_the_modalities() -> None:
    names = ["x1.shared", "x1.unique", "x2.shared", "x2.unique", "x3.shared"]
    found = [str(d) for d in directions(names, "others")]
    assert found == [
        "x1.shared_from_x2.shared_x3.shared",
        "x2.shared_from_x1.shared_x3.shared",
        "x3.shared_from_x1.shared_x2.shared",
        "x1.unique_from_x2.unique",
        "x2.unique_from_x1.unique",
    ]


def test_directions_by_name() -> None:
    names = ["img", "img_old", "text"]
    assert parse_directions(["img_from_img_old_text"], names) == [Direction("img", ("img_old", "text"))]
    assert parse_directions(["img_from_text_img_old"], names) == [Direction("img", ("img_old", "text"))]
    assert parse_directions(["img_old_from_img"], names) == [Direction("img_old", ("img",))]
    assert parse_directions(["others", "img_from_img_old_text"], names) == directions(names, "others")
    assert parse_directions(["auto"], names) == directions(names)
    for word in ("img_from_txt", "img_from_img", "text_from_text", "everything", "img_from_text_text"):
        with pytest.raises(ValueError, match=f"no direction '{word}'"):
            parse_directions([word], names)
    with pytest.raises(ValueError, match="did you mean 'img_from_text'"):
        parse_directions(["img_from_txt"], names)


def test_class_numbers() -> None:
    assert class_numbers(["x", "y", "x", "", "y"]).tolist() == [0, 1, 0, 2, 1]


# -- known answers -----------------------------------------------------------------------------------------------------


def test_known_answers() -> None:
    eye = torch.eye(4)
    representations = {"a": eye, "b": eye, "c": torch.ones(4, 4)}
    each = torch.arange(4)
    assert accuracy(representations, each) == 1.0
    # The candidates stand one further: every query finds its neighbour ...
    shifted = {**representations, "a": eye.roll(1, dims=0)}
    assert accuracy(shifted, each) == 0.0
    # ... which is a hit where the neighbour is of the same class: queries 0 and 2 find 1 and 3.
    assert accuracy(shifted, torch.tensor([0, 0, 1, 1])) == 0.5
    # Queries 0 and 1 are right, 2 and 3 find candidate 0.
    half = {**representations, "a": torch.cat([eye[:2], torch.zeros(2, 4)]), "b": eye[[0, 1, 0, 0]]}
    assert accuracy(half, each) == 0.5


def test_xor_is_seen_by_the_product_and_not_by_the_sum() -> None:
    # a = b * c in signs: no pair tells anything, the three together everything (Symile, section 2).
    b = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    c = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    representations = {"a": b * c, "b": b, "c": c}
    classes = (b * c > 0).long().squeeze(1)
    assert accuracy(representations, classes) == 1.0
    # Right for b = c = 1 and wrong for b = c = -1; where b = -c all candidates tie, half of which are right.
    assert accuracy(representations, classes, similarity=SumSimilarity()) == 0.5


def test_ranks_of_known_answers() -> None:
    # Query i scores candidate j by table[i][j].
    table = torch.tensor([[3.0, 1.0, 2.0], [2.0, 1.0, 3.0], [1.0, 1.0, 0.0]])
    found = retrieve(MIPSimilarity(), {"a": torch.eye(3), "b": table}, Direction("a", ("b",)), recall_at=(1, 2, 3))
    # Ranks 1, 3 and 3.
    assert found.recall == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 1.0})
    assert (found.median_rank, found.mean_rank) == (3.0, pytest.approx(7 / 3, rel=1e-14))
    assert found.accuracy == pytest.approx(1 / 3) and found.chance == pytest.approx(1 / 3)
    # Candidates 0 and 1 tie in the third query; asked for by 0, its rank is 1 or 2, each half of the time.
    asked = {"a": torch.eye(3), "b": table[[2, 1, 0]]}
    found = retrieve(MIPSimilarity(), asked, Direction("a", ("b",)), recall_at=(1, 2, 3))
    assert found.recall == pytest.approx({1: 0.5 / 3, 2: 2 / 3, 3: 1.0})
    assert (found.median_rank, found.mean_rank) == (2.0, pytest.approx((1.5 + 3 + 2) / 3, rel=1e-14))


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan")])
def test_constants_are_at_chance(value: float) -> None:
    constant = {name: torch.full((20, 3), value) for name in "abc"}
    classes = torch.arange(20) % 4
    found = retrieve(MIPSimilarity(), constant, A_FROM_BC, classes, recall_at=(1, 5))
    assert found.accuracy == pytest.approx(1 / 4) == found.chance
    assert found.recall == pytest.approx({1: 1 / 20, 5: 5 / 20}) and found.median_rank == 10.5


def test_a_candidate_that_is_not_a_number_is_below_all_others() -> None:
    eye = torch.eye(4)
    broken = eye.clone()
    broken[3] = torch.nan
    found = retrieve(MIPSimilarity(), {"a": broken, "b": eye}, Direction("a", ("b",)))
    assert found.recall[1] == 0.75 and found.mean_rank == (1 + 1 + 1 + 4) / 4


def test_without_a_query_there_is_no_figure() -> None:
    representations = random_representations()
    nobody = {name: torch.zeros(SAMPLES, dtype=torch.bool) for name in "abc"}
    found = retrieve(MIPSimilarity(), representations, A_FROM_BC, present=nobody, resamples=3)
    assert np.isnan(found.accuracy) and found.as_dict()["accuracy"] is None and found.as_dict()["recall"]["5"] is None
    assert found.as_dict()["samples"] == 0


# -- the whole matrix as reference -------------------------------------------------------------------------------------


def best_share(scores: Tensor, same: Tensor, times: Tensor) -> Tensor:
    """(Q, K) scores, whether the classes agree, (K,) times -> (Q,): share of the best candidates that are right."""
    scores = scores.masked_fill(times == 0, -torch.inf)
    best = (scores == scores.amax(dim=1, keepdim=True)) & (times > 0)
    return ((best & same) * times).sum(dim=1).double() / (best * times).sum(dim=1)


def reference(
    similarity: Any,
    representations: dict[str, Tensor],
    classes: Tensor,
    present: dict[str, Tensor],
    recall_at: Sequence[int],
    resamples: int,
) -> dict[str, Any]:
    """From the whole matrix of scores, with the candidates' order at random among equal ones."""
    pool, rows = present["a"], present["a"] & present["b"] & present["c"]
    scores = similarity(representations["a"][pool], [representations[name][rows] for name in "bc"]).double()
    same = classes[rows][:, None] == classes[pool]
    own = scores[:, rows[pool]].diagonal()[:, None]
    above, tied = (scores > own).sum(dim=1), (scores == own).sum(dim=1) - 1
    recall = {}
    for k in recall_at:
        # Of each of the orders of equal candidates: is the own one among the first k?
        per_query = [
            np.mean([a + 1 + place <= k for place in range(t + 1)])
            for a, t in zip(above.tolist(), tied.tolist(), strict=True)
        ]
        recall[k] = torch.tensor(per_query, dtype=torch.float64)
    times = torch.cat([*resample(len(classes), resamples, seed=3)])
    ranks = above + 1 + tied.double() / 2
    drawn = [(best_share(scores, same, t[pool]) * t[rows])[t[rows] > 0].sum() / t[rows].sum() for t in times]
    recalled = {k: [float((values * t[rows]).sum() / t[rows].sum()) for t in times] for k, values in recall.items()}
    return {
        "accuracy": float(best_share(scores, same, torch.ones(len(scores[0]))).mean()),
        "chance": float(same.double().mean()),
        "recall": {k: float(values.double().mean()) for k, values in recall.items()},
        "median_rank": float(np.median(ranks)),
        "mean_rank": float(ranks.mean()),
        "bootstrap_mean": float(np.mean(drawn)),
        "bootstrap_standard_error": float(np.std(drawn, ddof=1)),
        "recall_bootstrap_mean": {k: float(np.mean(values)) for k, values in recalled.items()},
        "recall_bootstrap_standard_error": {k: float(np.std(values, ddof=1)) for k, values in recalled.items()},
    }


def check(found: Retrieval, want: dict[str, Any]) -> None:
    told = found.as_dict()
    for name, value in want.items():
        value = {str(k): item for k, item in value.items()} if isinstance(value, dict) else value
        assert told[name] == pytest.approx(value, abs=1e-9), name


PRESENT = {
    "all": {name: torch.ones(SAMPLES, dtype=torch.bool) for name in "abc"},
    "some": {name: torch.arange(SAMPLES) % (5 + number) != number for number, name in enumerate("abc")},
}
CASES = [
    (data, classes, present)
    for data in ("whole", "random", "repeated")
    for classes in ("each its own", "of several")
    for present in PRESENT
]


def case(data: str, classes: str) -> tuple[dict[str, Tensor], Tensor]:
    numbers = torch.arange(SAMPLES) * 7 % 5 if classes == "of several" else torch.arange(SAMPLES)
    if data == "whole":
        return whole_representations(), numbers
    representations = random_representations()
    if data == "repeated":  # equal candidates, of equal and of unequal classes
        representations["a"] = representations["a"][torch.arange(SAMPLES) % 6]
    return representations, numbers


@pytest.mark.parametrize("tile", [(5, 3), (3, 7), (256, 8192)], ids=str)
@pytest.mark.parametrize("kept", [1, 3, 32], ids=lambda kept: f"kept{kept}")
def test_equal_to_the_whole_matrix(tile: tuple[int, int], kept: int) -> None:
    """With tiles of any size, and with so few of the best kept that all must be looked at again."""
    for data, of, present in CASES:
        representations, classes = case(data, of)
        want = reference(MIPSimilarity(), representations, classes, PRESENT[present], (1, 2, 10), resamples=3)
        with patch.dict(scoring.TILE, cpu=tile), patch.object(scoring, "KEPT", kept):
            found = retrieve(
                MIPSimilarity(), representations, A_FROM_BC, classes, PRESENT[present], (1, 2, 10), resamples=3, seed=3
            )
        try:
            check(found, want)
        except AssertionError as error:
            raise AssertionError(f"{data}, classes {of}, present {present}: {error}") from None


@pytest.mark.parametrize("similarity", [SumSimilarity(), VolumeSimilarity(), AreaSimilarity(), MIPSimilarity(True)])
def test_every_similarity_is_scored_by_tiles(similarity: Any) -> None:
    representations, classes = case("random", "of several")
    want = reference(similarity, representations, classes, PRESENT["some"], (1, 5), resamples=2)
    with patch.dict(scoring.TILE, cpu=(7, 5)):
        found = retrieve(similarity, representations, A_FROM_BC, classes, PRESENT["some"], (1, 5), resamples=2, seed=3)
    check(found, want)


def test_no_more_than_a_tile_is_ever_scored() -> None:
    """And candidates that are equal once."""
    representations, classes = case("repeated", "of several")
    sizes = []

    def similarity(candidates: Tensor, queries: Sequence[Tensor]) -> Tensor:
        sizes.append((len(queries[0]), len(candidates)))
        return MIPSimilarity()(candidates, queries)

    with patch.dict(scoring.TILE, cpu=(8, 4)):
        retrieve(similarity, representations, A_FROM_BC, classes, resamples=5)
    assert max(queries for queries, _ in sizes) == 8
    assert max(candidates for _, candidates in sizes) == 8, "of a block's own candidates, otherwise of a tile"
    blocks = -(-SAMPLES // 8)
    assert len(sizes) == blocks * (1 + 2), "per block its own candidates, and six distinct ones in tiles of four"


def test_equal_rows() -> None:
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, -0.0], [2.0, 0.0], [3.0, 1.0]])
    assert distinct_rows(vectors.bfloat16()).group.tolist() == [0, 1, 0, 1, 2]
    found = distinct_rows(vectors)
    assert found.rows.tolist() == [0, 1, 4] and found.group.tolist() == [0, 1, 0, 1, 2]


# -- the bootstrap -----------------------------------------------------------------------------------------------------


def test_bootstrap_of_perfect_and_hopeless_retrieval() -> None:
    eye = torch.eye(30)
    perfect = {"a": eye, "b": eye, "c": torch.ones(30, 30)}
    each = torch.arange(30)
    # A query that was drawn is there as a candidate too: each finds itself in every resample.
    assert bootstrap(perfect, each) == (1.0, 0.0)
    hopeless = {"a": torch.ones(30, 3), "b": torch.ones(30, 3), "c": torch.ones(30, 3)}
    mean, error = bootstrap(hopeless, each, resamples=20)
    assert mean < 0.15 and error < 0.15


def test_bootstrap_candidates_are_the_drawn_ones_only() -> None:
    # Query i scores candidate i + 1 (mod 30) highest, itself next: it is right exactly where i + 1 was not drawn,
    # which happens with probability (1 - 1/30)^30 = 0.36.
    eye = torch.eye(30)
    representations = {"a": eye, "b": 2 * eye.roll(1, dims=1) + eye, "c": torch.ones(30, 30)}
    each = torch.arange(30)
    assert accuracy(representations, each) == 0.0
    mean, _ = bootstrap(representations, each, resamples=100)
    assert 0.30 < mean < 0.45


def test_bootstrap_mean_and_standard_error_are_those_of_sampling() -> None:
    # Two classes, each candidate best for its own class or not, by the query alone: accuracy 0.7 over 200 queries.
    classes = torch.arange(200) % 2
    wrong = torch.arange(200) % 10 < 3
    guess = torch.where(wrong, 1 - classes, classes)
    one_hot = torch.eye(2)
    representations = {"a": one_hot[classes], "b": one_hot[guess], "c": torch.ones(200, 2)}
    assert accuracy(representations, classes) == pytest.approx(0.7)
    mean, error = bootstrap(representations, classes, resamples=100)
    expected = (0.7 * 0.3 / 200) ** 0.5  # of a binomial
    assert abs(mean - 0.7) < 5 * expected / 100**0.5
    assert 0.7 * expected < error < 1.3 * expected


def test_resamples_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers and figures, to the last bit, however many resamples are in memory together."""
    representations, classes = whole_representations(), torch.arange(SAMPLES) % 5
    for resamples in (1, 2, 3, 10, 11):
        want = [np.random.Generator(philox("bootstrap", 3, r)).integers(0, SAMPLES, SAMPLES) for r in range(resamples)]
        figures = []
        for at_once, most in ((2**20, resamples), (3 * SAMPLES, 5), (1, 3)):
            monkeypatch.setattr(bootstrap_module, "AT_ONCE", at_once)
            parts = list(resample(SAMPLES, resamples, 3))
            assert [row.tolist() for row in torch.cat(parts)] == [
                np.bincount(d, minlength=SAMPLES).tolist() for d in want
            ]
            assert max(map(len, parts)) <= most, "more are in memory than should be"
            assert min(map(len, parts)) > 1 or resamples == 1, "a resample alone is added up in another order"
            found = retrieve(
                MIPSimilarity(), representations, A_FROM_BC, classes, resamples=resamples, seed=3
            ).as_dict()
            figures.append((found, bootstrap_means([torch.arange(SAMPLES) / 3, classes / 7], resamples, 3)))
        assert figures[0] == figures[1] == figures[2], resamples


def test_memory_does_not_grow_with_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap_module, "AT_ONCE", 4 * SAMPLES)
    sizes = []

    def hits(self: Search, times: Tensor, wanted: Tensor) -> Tensor:
        sizes.append(len(times))
        return torch.zeros(wanted.shape, dtype=torch.float64)

    monkeypatch.setattr(Search, "hits", hits)
    found = retrieve(MIPSimilarity(), random_representations(), A_FROM_BC, resamples=1000)
    assert max(sizes) == 4 and sum(sizes) == 1001 and found.accuracy_bootstrap == (0.0, 0.0)


def test_figures_of_the_bootstrap_stay() -> None:
    """As they were when all resamples were drawn at once."""
    representations, classes = whole_representations(), torch.arange(SAMPLES) % 5
    found = retrieve(MIPSimilarity(), representations, A_FROM_BC, classes, resamples=10, seed=3)
    figures = (0.23889061487060115, 0.05244895624650689)
    assert found.accuracy_bootstrap == pytest.approx(figures, abs=1e-14)
    figures = (0.3020576884943334, 0.05831648015449903)
    assert found.recall_bootstrap[10] == pytest.approx(figures, abs=1e-14)


def test_bootstrap_is_a_function_of_its_seed() -> None:
    representations, classes = random_representations(), torch.arange(SAMPLES) % 5
    first, again, other = (bootstrap(representations, classes, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert bootstrap(representations, classes, resamples=1)[1] == 0.0
