"""Retrieval: known answers, its bootstrap, and scores in chunks."""

from __future__ import annotations

import pytest
import torch

from symile_dist.evaluation import retrieval
from symile_dist.evaluation.retrieval import (
    Direction,
    bootstrap_accuracy,
    class_numbers,
    directions,
    retrieval_accuracy,
)
from symile_dist.similarity import MIPSimilarity, SumSimilarity

A_FROM_BC = Direction("a", ("b", "c"))


def random_representations(samples: int = 40, dimension: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(samples, dimension, generator=generator) for name in "abc"}


def test_directions() -> None:
    assert [str(d) for d in directions(["a", "b"], pairs=True)] == ["a_from_b", "b_from_a"]
    assert [str(d) for d in directions(["a", "b", "c"], pairs=False)] == ["a_from_b_c", "b_from_a_c", "c_from_a_b"]
    three = [str(d) for d in directions(["a", "b", "c"], pairs=True)]
    assert three[3:] == ["b_from_a", "c_from_a", "a_from_b", "c_from_b", "a_from_c", "b_from_c"]
    four = directions(["a", "b", "c", "d"], pairs=True)
    assert len(four) == 4 + 12 and len(set(four)) == 16
    assert four[1] == Direction("b", ("a", "c", "d"))


def test_class_numbers() -> None:
    assert class_numbers(["x", "y", "x", "", "y"]).tolist() == [0, 1, 0, 2, 1]


def test_known_answers() -> None:
    eye = torch.eye(4)
    representations = {"a": eye, "b": eye, "c": torch.ones(4, 4)}
    each = torch.arange(4)
    assert retrieval_accuracy(MIPSimilarity(), representations, each, A_FROM_BC) == 1.0
    # The candidates stand one further: every query finds its neighbour ...
    shifted = {**representations, "a": eye.roll(1, dims=0)}
    assert retrieval_accuracy(MIPSimilarity(), shifted, each, A_FROM_BC) == 0.0
    # ... which is a hit where the neighbour is of the same class: queries 0 and 2 find 1 and 3.
    assert retrieval_accuracy(MIPSimilarity(), shifted, torch.tensor([0, 0, 1, 1]), A_FROM_BC) == 0.5
    # Queries 0 and 1 are right, 2 and 3 find candidate 0.
    half = {**representations, "a": torch.cat([eye[:2], torch.zeros(2, 4)]), "b": eye[[0, 1, 0, 0]]}
    assert retrieval_accuracy(MIPSimilarity(), half, each, A_FROM_BC) == 0.5


def test_xor_is_seen_by_the_product_and_not_by_the_sum() -> None:
    # a = b * c in signs: no pair tells anything, the three together everything (Symile, section 2).
    b = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    c = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    representations = {"a": b * c, "b": b, "c": c}
    classes = (b * c > 0).long().squeeze(1)
    assert retrieval_accuracy(MIPSimilarity(), representations, classes, A_FROM_BC) == 1.0
    # b = c = -1 finds a = -1, and is wrong; b = -c finds whatever comes first.
    assert retrieval_accuracy(SumSimilarity(), representations, classes, A_FROM_BC) <= 0.75


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 40 * 7, 2**27])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    representations, classes = random_representations(), torch.arange(40) % 5
    calls = 0

    def similarity(candidates: torch.Tensor, queries: list[torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return MIPSimilarity()(candidates, queries)

    whole = similarity(representations["a"], [representations["b"], representations["c"]])
    expected = float((classes[whole.argmax(dim=1)] == classes).double().mean())
    monkeypatch.setattr(retrieval._score_chunks, "__defaults__", (chunk_bytes,))
    calls = 0
    assert retrieval_accuracy(similarity, representations, classes, A_FROM_BC) == expected  # type: ignore[arg-type]
    assert calls == {1: 40, 4 * 40 * 7: 6, 2**27: 1}[chunk_bytes]
    bootstrap = bootstrap_accuracy(MIPSimilarity(), representations, classes, A_FROM_BC)
    monkeypatch.undo()
    assert bootstrap == bootstrap_accuracy(MIPSimilarity(), representations, classes, A_FROM_BC)


def test_bootstrap_of_perfect_and_hopeless_retrieval() -> None:
    eye = torch.eye(30)
    perfect = {"a": eye, "b": eye, "c": torch.ones(30, 30)}
    each = torch.arange(30)
    # A query that was drawn is there as a candidate too: each finds itself in every resample.
    assert bootstrap_accuracy(MIPSimilarity(), perfect, each, A_FROM_BC) == (1.0, 0.0)
    hopeless = {"a": torch.ones(30, 3), "b": torch.ones(30, 3), "c": torch.ones(30, 3)}
    mean, error = bootstrap_accuracy(MIPSimilarity(), hopeless, each, A_FROM_BC, resamples=20)
    assert mean < 0.15 and error < 0.15


def test_bootstrap_candidates_are_the_drawn_ones_only() -> None:
    # Query i scores candidate i + 1 (mod 30) highest, itself next: it is right exactly where i + 1 was not drawn,
    # which happens with probability (1 - 1/30)^30 = 0.36.
    eye = torch.eye(30)
    representations = {"a": eye, "b": 2 * eye.roll(1, dims=1) + eye, "c": torch.ones(30, 30)}
    each = torch.arange(30)
    assert retrieval_accuracy(MIPSimilarity(), representations, each, A_FROM_BC) == 0.0
    mean, _ = bootstrap_accuracy(MIPSimilarity(), representations, each, A_FROM_BC, resamples=100)
    assert 0.30 < mean < 0.45


def test_bootstrap_mean_and_standard_error_are_those_of_sampling() -> None:
    # Two classes, each candidate best for its own class or not, by the query alone: accuracy 0.7 over 200 queries.
    classes = torch.arange(200) % 2
    wrong = torch.arange(200) % 10 < 3
    guess = torch.where(wrong, 1 - classes, classes)
    one_hot = torch.eye(2)
    representations = {"a": one_hot[classes], "b": one_hot[guess], "c": torch.ones(200, 2)}
    assert retrieval_accuracy(MIPSimilarity(), representations, classes, A_FROM_BC) == pytest.approx(0.7)
    mean, error = bootstrap_accuracy(MIPSimilarity(), representations, classes, A_FROM_BC, resamples=100)
    expected = (0.7 * 0.3 / 200) ** 0.5  # of a binomial
    assert abs(mean - 0.7) < 5 * expected / 100**0.5
    assert 0.7 * expected < error < 1.3 * expected


def test_bootstrap_is_a_function_of_its_seed() -> None:
    representations, classes = random_representations(), torch.arange(40) % 5
    first, again, other = (
        bootstrap_accuracy(MIPSimilarity(), representations, classes, A_FROM_BC, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert bootstrap_accuracy(MIPSimilarity(), representations, classes, A_FROM_BC, resamples=1)[1] == 0.0
