"""Linear probes: what a linear map can read from frozen representations.

`logistic_probe` for classes, `ridge_probe` for numbers. Both choose their regularisation on a validation split.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

C_VALUES = tuple(float(c) for c in np.logspace(-6, 6, 97))
"""Eight per decade (CLIP, arXiv 2103.00020, appendix A.3; WPSE has the same)."""

ALPHAS = tuple(float(alpha) for alpha in np.logspace(-6, 6, 25))

Search = Literal["coarse_to_fine", "full"]


class Split(NamedTuple):
    """Representations and what is to be read from them."""

    features: ArrayLike
    """(n, D)"""
    targets: ArrayLike | Sequence[str]
    """(n,) classes, of any type; for `ridge_probe` (n,) or (n, K) numbers"""

    @property
    def samples(self) -> int:
        return len(np.asarray(self.targets))


@dataclass(frozen=True)
class LogisticProbe:
    """What `logistic_probe` found."""

    accuracy: float
    """On the test split, refitted to training and validation split together."""
    hits: NDArray[np.bool_]
    """(n,) which test samples are right: what a bootstrap resamples"""
    c: float
    """The chosen inverse strength of the regularisation."""
    validation_accuracy: float
    """Of the fit to the training split alone, at that C."""
    sweep: dict[float, float]
    """C -> accuracy on the validation split, for all that were tried."""
    converged: bool
    """Whether the last fit ended before `max_iter` iterations."""


def logistic_probe(
    train: Split,
    validation: Split,
    test: Split,
    standardize: bool = False,
    search: Search = "coarse_to_fine",
    max_iter: int = 1000,
) -> LogisticProbe:
    """Logistic regression by L-BFGS on frozen features (CLIP, arXiv 2103.00020, appendix A.3).

    C is chosen from C_VALUES by the accuracy on the validation split, the smallest of equal ones; then the fit is made
    again to training and validation split together. `coarse_to_fine`, as in CLIP, begins with the powers of a hundred
    and halves the distance around the best until it is an eighth of a decade: at most 15 fits in the place of the 97
    of `full`. Each fit begins where that of the next smaller C ended.

    Args:
        standardize: bring each feature to mean 0 and variance 1 first, by the training split's figures.

    Raises ValueError for splits that do not fit together, for features that are not finite, and where the training
    split has a single class.
    """
    train_x, validation_x, test_x = _features(train, validation, test)
    train_y, validation_y, test_y = (_classes(split) for split in (train, validation, test))
    if len(np.unique(train_y)) < 2:
        raise ValueError("the training split has a single class: there is nothing to tell apart")
    if standardize:
        train_x, validation_x, test_x = _standardized(train_x, validation_x, test_x)
    fits: dict[int, _Fit] = {}
    sweep: dict[float, float] = {}

    def try_all(numbers: Sequence[int]) -> None:
        for number in sorted(set(numbers) - set(fits)):
            smaller = max((known for known in fits if known < number), default=None)
            start = None if smaller is None else fits[smaller]
            fits[number] = _fit(train_x, train_y, C_VALUES[number], max_iter, start)
            sweep[C_VALUES[number]] = float((fits[number].model.predict(validation_x) == validation_y).mean())

    if search == "full":
        try_all(range(len(C_VALUES)))
    elif search == "coarse_to_fine":
        step = 16
        try_all(range(0, len(C_VALUES), step))
        while step > 1:
            step //= 2
            best = _best(fits, sweep)
            try_all([number for number in (best - step, best + step) if 0 <= number < len(C_VALUES)])
    else:
        raise ValueError(f"search '{search}': choose coarse_to_fine or full")
    best = _best(fits, sweep)
    both_x, both_y = np.concatenate([train_x, validation_x]), np.concatenate([train_y, validation_y])
    same_classes = len(np.unique(both_y)) == len(np.unique(train_y))
    last = _fit(both_x, both_y, C_VALUES[best], max_iter, fits[best] if same_classes else None)
    hits = np.asarray(last.model.predict(test_x) == test_y)
    return LogisticProbe(
        accuracy=float(hits.mean()),
        hits=hits,
        c=C_VALUES[best],
        validation_accuracy=sweep[C_VALUES[best]],
        sweep=dict(sorted(sweep.items())),
        converged=last.converged,
    )


class _Fit(NamedTuple):
    model: Any
    converged: bool


def _fit(features: NDArray[Any], classes: NDArray[Any], c: float, max_iter: int, start: _Fit | None) -> _Fit:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, solver="lbfgs", max_iter=max_iter, warm_start=start is not None)
    if start is not None:
        model.coef_, model.intercept_ = start.model.coef_.copy(), start.model.intercept_.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by `converged`
        model.fit(features, classes)
    return _Fit(model, bool(model.n_iter_.max() < max_iter))


def _best(fits: dict[int, _Fit], sweep: dict[float, float]) -> int:
    return max(sorted(fits), key=lambda number: sweep[C_VALUES[number]])


@dataclass(frozen=True)
class RidgeProbe:
    """What `ridge_probe` found."""

    r2: float
    """Coefficient of determination on the test split, the mean over the outputs; below 0 where the mean does better."""
    r2_per_output: NDArray[np.float64]
    """(K,)"""
    alpha: float
    """The chosen strength of the regularisation."""


def ridge_probe(
    train: Split,
    test: Split,
    validation: Split | None = None,
    alphas: Sequence[float] = ALPHAS,
    standardize: bool = True,
) -> RidgeProbe:
    """Linear regression with an intercept, |y - x B|^2 + alpha n |B|^2 over the n training samples.

    alpha is chosen by R^2 on the validation split; without one give a single alpha (0: ordinary least squares). One
    eigendecomposition serves all of them.

    Raises ValueError for splits that do not fit together, values that are not finite, several alphas without a
    validation split, and alphas below 0.
    """
    if len(alphas) == 0 or not min(alphas) >= 0:
        raise ValueError(f"alphas = {list(alphas)} should be one number of 0 or more, or several")
    if validation is None and len(alphas) != 1:
        raise ValueError("alpha is chosen on a validation split: give one, or a single alpha")
    splits = [split for split in (train, validation, test) if split is not None]
    features = _features(*splits)
    targets = [_numbers(split) for split in splits]
    if len({y.shape[1] for y in targets}) > 1:
        raise ValueError(f"the splits have different numbers of outputs: {', '.join(str(y.shape[1]) for y in targets)}")
    if standardize:
        features = _standardized(*features)
    center, mean = features[0].mean(axis=0), targets[0].mean(axis=0)
    x, y = features[0] - center, targets[0] - mean
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    projected = vectors.T @ (x.T @ y) / len(x)

    def r2(alpha: float, split: int) -> NDArray[np.float64]:
        damped = values + alpha
        # Directions in which the features do not vary take no part.
        inverse = np.where(damped > values[-1] * 1e-12, 1 / np.maximum(damped, np.finfo(float).tiny), 0.0)
        predicted = (features[split] - center) @ (vectors @ (inverse[:, None] * projected)) + mean
        return _r2(targets[split], predicted)

    best = max(sorted(alphas), key=lambda alpha: r2(alpha, 1).mean()) if len(alphas) > 1 else alphas[0]
    found = r2(best, -1)
    return RidgeProbe(float(found.mean()), found, best)


def _r2(truth: NDArray[np.float64], predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,): 1 - residual over total variance; of a constant output 0, as nothing is to be explained."""
    residual = ((truth - predicted) ** 2).sum(axis=0)
    total = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    return np.asarray(np.where(total > 0, 1 - residual / np.where(total > 0, total, 1.0), 0.0))


def _features(*splits: Split) -> list[NDArray[np.float64]]:
    found = []
    for split in splits:
        values = np.asarray(split.features, dtype=np.float64)
        if values.ndim != 2 or len(values) == 0:
            raise ValueError(f"features have shape {values.shape}; should be (n, D), n at least 1")
        if len(values) != split.samples:
            raise ValueError(f"{len(values)} features, {split.samples} targets")
        if not np.isfinite(values).all():
            raise ValueError("features that are not finite; samples that lack the modality should be left out")
        found.append(values)
    if len({values.shape[1] for values in found}) > 1:
        raise ValueError(f"the splits have different D: {', '.join(str(values.shape[1]) for values in found)}")
    return found


def _classes(split: Split) -> NDArray[Any]:
    classes = np.asarray(split.targets)
    if classes.ndim != 1:
        raise ValueError(f"classes have shape {classes.shape}; should be (n,)")
    return classes


def _numbers(split: Split) -> NDArray[np.float64]:
    numbers = np.asarray(split.targets, dtype=np.float64)
    if numbers.ndim not in (1, 2) or not np.isfinite(numbers).all():
        raise ValueError(f"targets of shape {numbers.shape}; should be (n,) or (n, K) finite numbers")
    return numbers.reshape(len(numbers), -1)


def _standardized(train: NDArray[np.float64], *others: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation[deviation == 0] = 1.0
    return [(values - mean) / deviation for values in (train, *others)]
