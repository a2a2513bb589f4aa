"""Linear probes against scikit-learn and against what was put into the features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from symile_dist.evaluation.probe import ALPHAS, C_VALUES, Split, logistic_probe, ridge_probe


def blobs(samples: int, seed: int, noise: float = 1.0) -> Split:
    """Three classes around their centers, in 6 of 12 dimensions."""
    rng = np.random.default_rng(seed)
    centers = np.concatenate([np.random.default_rng(9).standard_normal((3, 6)), np.zeros((3, 6))], axis=1)
    classes = rng.integers(0, 3, samples)
    return Split(centers[classes] + noise * rng.standard_normal((samples, 12)), [f"class {c}" for c in classes])


SPLITS = blobs(60, 0), blobs(90, 1), blobs(200, 2)


def plain(train: Any, test: Any, c: float) -> float:
    """As scikit-learn's documentation has it, from a cold start."""
    model = LogisticRegression(C=c, max_iter=1000).fit(np.asarray(train[0]), np.asarray(train[1]))
    return float((model.predict(np.asarray(test[0])) == np.asarray(test[1])).mean())


def test_the_values_of_c() -> None:
    assert len(C_VALUES) == 97 and C_VALUES[0] == 1e-6 and C_VALUES[-1] == 1e6
    assert np.allclose(np.diff(np.log10(C_VALUES)), 1 / 8)


def test_the_probe_is_the_regression_at_the_best_c() -> None:
    train, validation, test = SPLITS
    found = logistic_probe(train, validation, test)
    assert 11 <= len(found.sweep) <= 15 and found.converged
    # Warm starts change nothing.
    for c, accuracy in found.sweep.items():
        assert plain(train, validation, c) == pytest.approx(accuracy, abs=1.5 / 90), c
    best = max(found.sweep.values())
    assert found.validation_accuracy == best
    assert found.c == min(c for c, accuracy in found.sweep.items() if accuracy == best), "the smallest of equal ones"
    both = np.concatenate([train.features, validation.features]), [*train.targets, *validation.targets]
    assert found.accuracy == pytest.approx(plain(both, test, found.c), abs=1.5 / 200)
    assert found.accuracy == found.hits.mean() and found.hits.shape == (200,)
    assert found.accuracy > plain(train, test, 1e6), "neither regularisation nor the validation split helped"


def test_the_coarse_search_is_as_good_as_the_full_one() -> None:
    train, validation, test = (Split(np.asarray(s.features)[:40, :7], s.targets[:40]) for s in SPLITS)  # type: ignore[index]
    coarse, full = (logistic_probe(train, validation, test, search=search) for search in ("coarse_to_fine", "full"))
    assert len(full.sweep) == 97
    assert coarse.validation_accuracy >= full.validation_accuracy - 2 / 40
    assert set(coarse.sweep) <= set(full.sweep)


def test_standardisation() -> None:
    """Features of very unequal scale are read as well as equal ones."""
    scale = np.logspace(-3, 3, 12)
    scaled = [Split(np.asarray(split.features) * scale + 7, split.targets) for split in SPLITS]
    equal = logistic_probe(*SPLITS, standardize=True)
    assert logistic_probe(*scaled, standardize=True).accuracy == pytest.approx(equal.accuracy, abs=0.01)
    # By the training split's mean and deviation: samples of one class alone are judged as they are among the others.
    train, validation, test = SPLITS
    rows = np.asarray(test.targets) == "class 1"
    alone = Split(np.asarray(test.features)[rows], np.asarray(test.targets)[rows])
    assert np.array_equal(logistic_probe(train, validation, alone, standardize=True).hits, equal.hits[rows])


def test_classes_may_be_lacking_in_a_split() -> None:
    train, validation, test = SPLITS
    rows = [number for number, label in enumerate(train.targets) if label != "class 2"]  # type: ignore[arg-type]
    fewer = Split(np.asarray(train.features)[rows], [train.targets[row] for row in rows])  # type: ignore[index,misc]
    found = logistic_probe(fewer, validation, test)
    assert found.accuracy > 0.5, "the last fit, which has all classes, could not begin with the one of two"


def test_mistakes_are_told() -> None:
    train, validation, test = SPLITS
    with pytest.raises(ValueError, match="single class"):
        logistic_probe(Split(np.ones((3, 12)), ["x"] * 3), validation, test)
    with pytest.raises(ValueError, match="not finite"):
        logistic_probe(train, validation, Split(np.full((2, 12), np.nan), ["x", "y"]))
    with pytest.raises(ValueError, match="different D: 12, 12, 5"):
        logistic_probe(train, validation, Split(np.ones((2, 5)), ["x", "y"]))
    with pytest.raises(ValueError, match="2 features, 3 targets"):
        logistic_probe(train, validation, Split(np.ones((2, 12)), ["x", "y", "z"]))
    with pytest.raises(ValueError, match="choose coarse_to_fine or full"):
        logistic_probe(train, validation, test, search="fine")  # type: ignore[arg-type]
    numbers = Split(np.ones((4, 3)), np.ones(4))
    with pytest.raises(ValueError, match="alpha is chosen on a validation split"):
        ridge_probe(numbers, numbers)
    with pytest.raises(ValueError, match="different numbers of outputs"):
        ridge_probe(numbers, Split(np.ones((4, 3)), np.ones((4, 2))), alphas=[1.0])
    for alphas in ([], [-1.0], [np.nan]):
        with pytest.raises(ValueError, match="should be one number of 0 or more"):
            ridge_probe(numbers, numbers, numbers, alphas=alphas)


def linear(samples: int, seed: int, noise: float) -> Split:
    """Two outputs of four features, a third of none."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((samples, 4)).astype(np.float32)
    weights = np.array([[1.0, 0.0], [2.0, 1.0], [0.0, -1.0], [0.0, 0.0]])
    outputs = 3 + features @ weights + noise * rng.standard_normal((samples, 2))
    return Split(torch.from_numpy(features), np.concatenate([outputs, rng.standard_normal((samples, 1))], axis=1))


def test_ridge_is_scikit_learn_s() -> None:
    train, test = linear(50, 0, 0.5), linear(70, 1, 0.5)
    for alpha in (0.0, 0.1, 3.0):
        found = ridge_probe(train, test, alphas=[alpha], standardize=False)
        model = Ridge(alpha=alpha * 50).fit(np.asarray(train.features), np.asarray(train.targets))
        assert found.r2 == pytest.approx(model.score(np.asarray(test.features), np.asarray(test.targets)), abs=1e-6)
    assert found.alpha == 3.0


def test_ridge_reads_what_is_there_and_nothing_else() -> None:
    train, validation, test = linear(400, 0, 0.5), linear(100, 1, 0.5), linear(400, 2, 0.5)
    found = ridge_probe(train, test, validation)
    # Var 5 and 2 of the signal, 0.25 of the noise; nothing of the third.
    assert found.r2_per_output[:2] == pytest.approx([5 / 5.25, 2 / 2.25], abs=0.03)
    assert abs(found.r2_per_output[2]) < 0.03 and found.r2 == found.r2_per_output.mean()
    assert found.alpha in ALPHAS
    # Of few samples and many useless dimensions a strong regularisation is chosen: it is hardly worse than the mean.
    rng = np.random.default_rng(3)
    useless = [Split(rng.standard_normal((30, 40)), rng.standard_normal(30)) for _ in range(3)]
    assert ridge_probe(useless[0], useless[2], useless[1]).r2 > -0.2
    assert ridge_probe(useless[0], useless[2], alphas=[1e-6]).r2 < -0.2


def test_ridge_of_dependent_features() -> None:
    """Directions in which nothing varies take no part, without regularisation too."""
    split = linear(50, 0, 0.0)
    features = np.asarray(split.features)
    twice = Split(np.concatenate([features, features, np.ones((50, 1))], axis=1), np.asarray(split.targets)[:, :2])
    assert ridge_probe(twice, twice, alphas=[0.0]).r2 == pytest.approx(1.0, abs=1e-6)
    assert ridge_probe(twice, Split(twice.features, np.ones((50, 2))), alphas=[0.0]).r2 == 0.0, "a constant output"
