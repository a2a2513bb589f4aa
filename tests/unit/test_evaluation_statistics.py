"""Alignment, uniformity, effective rank and zero-shot classification: known answers and plain formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from symile_dist.evaluation import statistics, zero_shot
from symile_dist.evaluation.statistics import alignment, effective_rank, uniformity
from symile_dist.evaluation.zero_shot import class_features
from symile_dist.similarity import MIPSimilarity


def vectors(samples: int, dimension: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, dimension, generator=torch.Generator().manual_seed(seed))


def test_alignment() -> None:
    x = vectors(50, 4)
    assert alignment(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert alignment(x, -x) == pytest.approx(4)
    assert alignment(x, -x, alpha=1) == pytest.approx(2)
    independent = alignment(vectors(20_000, 4), vectors(20_000, 4, seed=1))
    assert independent == pytest.approx(2, abs=0.03), "of independent directions, in more than one part"
    assert math.isnan(alignment(x[:0], x[:0]))


def test_uniformity(monkeypatch: pytest.MonkeyPatch) -> None:
    x = vectors(30, 3)
    units = F.normalize(x.double(), dim=1)
    pairs = [
        math.exp(-2 * float((units[i] - units[j]).square().sum())) for i, j in itertools.combinations(range(30), 2)
    ]
    want = math.log(sum(pairs) / len(pairs))
    assert uniformity(x) == pytest.approx(want, abs=1e-6)
    monkeypatch.setattr(statistics, "PAIRS_AT_ONCE", 70)
    assert uniformity(x) == pytest.approx(want, abs=1e-6)
    assert uniformity(torch.ones(10, 3)) == pytest.approx(0, abs=1e-6)
    # Two clusters at opposite ends: 4 pairs of 9 at the distance 0 each, of 2 otherwise.
    ends = torch.tensor([[1.0, 0.0]] * 5 + [[-1.0, 0.0]] * 5)
    assert uniformity(ends) == pytest.approx(math.log(4 / 9 + 5 / 9 * math.exp(-8)), abs=1e-6)
    assert math.isnan(uniformity(x[:1]))
    x[3, 1] = math.nan
    assert math.isnan(uniformity(x)), "minus infinity would be the most uniform of all"


def test_uniformity_of_many_samples_is_that_of_some() -> None:
    x = vectors(3000, 8)
    some = uniformity(x, max_samples=1000)
    assert some == pytest.approx(uniformity(x), abs=0.03) and some == uniformity(x, max_samples=1000)
    assert some != uniformity(x, max_samples=1000, seed=1)


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 3)) == pytest.approx(1, abs=1e-5)
    for shape in ((40, 6), (6, 40)):
        x = vectors(*shape)
        values = torch.linalg.svdvals(x.double())
        shares = values / values.sum()
        assert effective_rank(x) == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-6)
    assert math.isnan(effective_rank(torch.zeros(4, 3))) and math.isnan(effective_rank(torch.full((4, 3), math.nan)))


# -- zero-shot classification ------------------------------------------------------------------------------------------


def test_class_features_are_means_over_prompts() -> None:
    prompts = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, -2.0]])
    classes = torch.tensor([1, 1, 0])
    assert class_features(prompts, classes, normalize=False).tolist() == [[0.0, -2.0], [1.5, 0.5]]
    found = class_features(prompts, classes, normalize=True)
    assert found.tolist() == [[0.0, -1.0], pytest.approx([0.5**0.5, 0.5**0.5])], "each prompt counts alike"
    with pytest.raises(ValueError, match="class 1 has no prompt"):
        class_features(prompts, torch.tensor([0, 2, 2]), normalize=False)


def test_zero_shot_takes_the_best_class(monkeypatch: pytest.MonkeyPatch) -> None:
    features, x, y = vectors(7, 3), vectors(50, 3, 1), vectors(50, 3, 2)
    classes = torch.arange(50) * 3 % 6  # of the last class there is no sample
    scores = (x * y) @ features.T
    right = (scores.argmax(dim=1) == classes).double()
    five = (scores.topk(5, dim=1).indices == classes[:, None]).any(dim=1).double()
    for size in (4096, 9):
        monkeypatch.setattr(zero_shot, "QUERIES_AT_ONCE", size)
        found = zero_shot.zero_shot(MIPSimilarity(), features, [x, y], classes, resamples=20)
        assert torch.equal(found.hits, right) and found.accuracy == float(right.mean())
        assert found.top5 == pytest.approx(float(five.mean()))
        assert found.mean_per_class == pytest.approx(sum(float(right[classes == c].mean()) for c in (0, 3)) / 2)
        assert (found.samples, found.classes) == (50, 7)
        assert found.accuracy_bootstrap is not None
        assert found.accuracy_bootstrap.mean == pytest.approx(found.accuracy, abs=0.1)
        assert found.accuracy_bootstrap.standard_error == pytest.approx(float(right.std()) / 50**0.5, rel=0.6)


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_zero_shot_of_constants_is_at_chance(value: float) -> None:
    found = zero_shot.zero_shot(MIPSimilarity(), torch.full((10, 3), value), [torch.ones(20, 3)], torch.arange(20) % 10)
    assert found.accuracy == pytest.approx(0.1) and found.top5 == pytest.approx(0.5)
    nobody = zero_shot.zero_shot(MIPSimilarity(), torch.ones(10, 3), [torch.ones(0, 3)], torch.arange(0), resamples=3)
    assert math.isnan(nobody.accuracy) and nobody.as_dict()["accuracy"] is None
