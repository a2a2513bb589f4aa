"""Weighted point set embeddings (WPSE, ICLR 2025, arXiv 2404.19228) of two or more modalities.

An encoder emits points v_j with signed weights w_j. With unit vectors v^_j, two point sets are as alike as

    S(X, Y) = 1 / (|X| |Y|) sum_jk w_j w'_k (alpha_1 v^_j . v^'_k + alpha_2 k(v^_j, v^'_k)).

Random Fourier features phi turn this into an inner product of one vector per sample,

    z = [sqrt(alpha_1) mean_j w_j v^_j ; sqrt(alpha_2) mean_j w_j phi(v^_j)],

which is what is gathered and contrasted. More than two modalities: docs/papers/wpse.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from symile_dist.distributed import Group, check_agreement
from symile_dist.objectives.clip import sum_over_pairs
from symile_dist.objectives.contrast import as_scale, scale_problem
from symile_dist.objectives.health import contrastive_health
from symile_dist.objectives.kernels import Kernel, Waves, draw_waves, make_kernel
from symile_dist.objectives.negatives import GlobalBatch
from symile_dist.objectives.symile import SymileLoss
from symile_dist.registry import suggestion
from symile_dist.similarity import MIPSimilarity, SumSimilarity, elementwise_product
from symile_dist.types import Batch, Outputs, PointSet, Representation, StepReport

FORMS = ["pairwise", "symile"]
COSINES = {"cpu": 2**22, "cuda": 2**27}
"""Cosines (points times random features) at once, at most, unless one sample has more."""


class WPSELoss:
    """Contrasts weighted point sets of the global batch (arXiv 2404.19228).

    Args:
        group: the ranks that form the global batch; None is all of them.
        seed: of the random features and of negatives that are drawn.
        form: "pairwise": the mean over pairs of modalities of the symmetric InfoNCE, with two modalities the paper's.
            "symile": the Symile loss of features whose multilinear inner product has the kernel of all modalities as
            its mean (`objectives.kernels`); with two modalities the kernel is the paper's.
        kernel: "gaussian", exp(-r^2 / (2 sigma^2)), or "imq", c / sqrt(c^2 + r^2).
        bandwidth: sigma or c, for two modalities; "symile" widens it with their number (`make_kernel`).
        alphas: how much the linear and the kernel similarity count; one of them may be 0.
        features: D in the paper, the number of random features.
        epsilon: vectors are divided by their length or by this, whatever is larger.
        negative_sampling, sheets: of "symile", as in `SymileLoss`; None is "n".

    Raises ValueError for an option that does not exist or does not go with another.
    """

    def __init__(
        self,
        group: Group = None,
        seed: int = 0,
        *,
        form: str = "pairwise",
        kernel: str = "gaussian",
        bandwidth: float = 0.5,
        alphas: Sequence[float] = (0.667, 0.333),
        features: int = 1024,
        epsilon: float = 1e-6,
        negative_sampling: str | None = None,
        sheets: int | None = None,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"unknown form '{form}'{suggestion(str(form), FORMS)}")
        if form == "pairwise" and (negative_sampling is not None or sheets is not None):
            raise ValueError("negative_sampling and sheets go with form='symile'; 'pairwise' takes every other row")
        if len(alphas) != 2 or min(alphas) < 0 or not 0 < sum(alphas) < float("inf"):
            raise ValueError(f"alphas = {list(alphas)} should be two numbers of 0 or more, not both 0")
        if not isinstance(features, int) or isinstance(features, bool) or features < 1:
            raise ValueError(f"features = {features!r} should be an integer of 1 or more")
        if not 0 < epsilon < float("inf"):
            raise ValueError(f"epsilon = {epsilon} should be positive and finite")
        make_kernel(kernel, bandwidth)
        self.group, self.seed, self.form, self.features, self.epsilon = group, seed, form, features, epsilon
        self.kernel, self.bandwidth, self.alphas = kernel, float(bandwidth), (float(alphas[0]), float(alphas[1]))
        self.symile = SymileLoss(negative_sampling or "n", group, seed, sheets=sheets) if form == "symile" else None

    def __call__(
        self,
        representations: Sequence[Representation],
        logit_scale: Tensor | float,
        *,
        step: int | None = None,
        valid: Tensor | None = None,
        present: Tensor | None = None,
        fixed_features: bool = False,
    ) -> Tensor:
        """The global loss, the same on every rank; its gradient is exact once averaged over the ranks.

        Features are computed in float32 or more, under autocast too.

        Args:
            representations: M point sets of this rank's rows, the same n on every rank; a tensor (n, D) is a set of
                one point whose weight is 1.
            logit_scale: scalar multiplier of the logits, already exp-ed.
            step: number of the step; with the seed it decides the random features, and the negatives of "symile".
            valid: (n,) bool; rows that are neither anchor nor negative where False.
            present: (n, M) bool; where False the sample lacks the modality, and is no positive where that one takes
                part. It stays a negative. None: all are.
            fixed_features: those of evaluation, whatever the step.

        Raises ValueError, on all ranks alike, for arguments that do not fit each other or those of other ranks.
        """
        return self.with_embeddings(representations, logit_scale, step, valid, present, fixed_features)[0]

    def with_embeddings(
        self,
        representations: Sequence[Representation],
        logit_scale: Tensor | float,
        step: int | None,
        valid: Tensor | None,
        present: Tensor | None,
        fixed_features: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, and what `embed` gave. Arguments as in `__call__`."""
        problem = self._problem(representations, logit_scale, step, valid, present, fixed_features)
        check_agreement(f"WPSE: {self._options()}, step={step}, {fixed_features}", problem, self.group)
        if valid is not None:  # no value in an invalid row, not even NaN, reaches a gradient
            representations = [_without_invalid(representation, valid) for representation in representations]
        vectors = self.embed(representations, None if fixed_features else step)
        if self.symile:
            return self.symile(vectors, logit_scale, step=step, valid=valid, present=present), vectors
        batch = GlobalBatch(vectors, valid, self.group, description="WPSE")
        scale = as_scale(logit_scale, batch.own)
        pairs = len(vectors) * (len(vectors) - 1) // 2
        return (sum_over_pairs(batch, scale, present) / pairs).to(scale.dtype), vectors

    def embed(self, representations: Sequence[Representation], step: int | None) -> list[Tensor]:
        """M point sets -> z, M tensors (n, D + F), float32 or more; a block whose alpha is 0 is left out.

        Args:
            step: whose random features are taken; None: those of evaluation, always the same.
        """
        sets = [as_point_set(representation) for representation in representations]
        # The product of M factors is to have the weight alpha, hence alpha^(1/M). Of M unit vectors of equally large
        # entries and D dimensions the multilinear inner product is at most D^(1 - M/2): scaled to 1, as the kernel is.
        number, dimension = len(sets) if self.symile else 2, sets[0].vectors.shape[2]
        linear, kernel = self.alphas
        of_linear = (linear * dimension ** (number / 2 - 1)) ** (1 / number)
        of_kernel = kernel ** (1 / number)
        waves = None
        if kernel:
            key = (self.seed, "evaluation" if step is None else step)
            chosen = make_kernel(self.kernel, self.bandwidth, number)
            drawn = draw_waves(chosen, self.features, dimension, number, *key)
            waves = Waves(*(tensor.to(sets[0].vectors.device, non_blocking=True) for tensor in drawn))
        found = []
        with torch.autocast(sets[0].vectors.device.type, enabled=False):
            for m, points in enumerate(sets):
                vectors, weights = unit_points(points, self.epsilon)
                blocks = [of_linear * _weighted_sum(weights, vectors)] if linear else []
                if waves:
                    blocks.append(of_kernel * _sum_of_waves(vectors, weights, waves, m if self.symile else 0))
                found.append(torch.cat(blocks, dim=1))
        return found

    def similarity(self, representations: Sequence[Representation]) -> Tensor:
        """The exact similarity of all combinations of samples, without random features: (n_1, n_2), or for "symile"
        (n_1, ..., n_M). For reference: it takes the product of the numbers of points as memory."""
        sets = [as_point_set(representation) for representation in representations]
        kernel = make_kernel(self.kernel, self.bandwidth, len(sets))
        return point_set_similarity(sets, kernel, self.alphas, self.epsilon)

    def _options(self) -> tuple[Any, ...]:
        return self.form, self.kernel, self.bandwidth, self.alphas, self.features, self.epsilon, self.seed

    def _problem(
        self,
        representations: Sequence[Representation],
        logit_scale: Tensor | float,
        step: int | None,
        valid: Tensor | None,
        present: Tensor | None,
        fixed_features: bool,
    ) -> str | None:
        """What is wrong with the arguments, or None."""
        if len(representations) < 2:
            return f"a contrastive loss needs two or more modalities, got {len(representations)}"
        if step is None and not fixed_features:
            return "the random features are drawn from (seed, step): pass step=, or fixed_features=True"
        sizes: set[tuple[int, int]] = set()
        for m, representation in enumerate(representations):
            if problem := _point_set_problem(representation):
                return f"representation {m} {problem}"
            vectors = as_point_set(representation).vectors
            sizes.add((vectors.shape[0], vectors.shape[2]))
        if len(sizes) > 1:
            return f"all modalities need the same number of samples and the same D; got (n, D) of {sorted(sizes)}"
        (n, _) = sizes.pop()
        for name, flags, shape in (("valid", valid, (n,)), ("present", present, (n, len(representations)))):
            if flags is not None and (
                not isinstance(flags, Tensor) or flags.shape != shape or flags.dtype != torch.bool
            ):
                return f"{name} should be a bool tensor of shape {shape}"
        return scale_problem(logit_scale)


class WPSEObjective(nn.Module):
    """`WPSELoss` as the trainer calls it, with new random features in every training step and fixed ones in evaluation.

    Options as there, and

    Args:
        missing: what a sample does that lacks a modality, as in `SymileObjective`.

    Encoders emit point sets or, for a set of one point whose weight is 1, a vector.
    """

    bounds_total_correlation = True
    """log N - loss bounds the total correlation; pairwise it bounds the mean over pairs of their mutual information,
    which is no larger."""

    def __init__(
        self,
        seed: int,
        modalities: list[str] | None = None,
        global_batch_size: int | None = None,
        form: str = "pairwise",
        kernel: str = "gaussian",
        bandwidth: float = 0.5,
        alphas: Sequence[float] = (0.667, 0.333),
        features: int = 1024,
        epsilon: float = 1e-6,
        negative_sampling: str | None = None,
        sheets: int | None = None,
        missing: str = "placeholder",
    ) -> None:
        super().__init__()
        if missing not in ("placeholder", "exclude"):
            raise ValueError(f"missing = '{missing}' should be 'placeholder' or 'exclude'")
        self.exclude_missing = missing == "exclude"
        self.loss = WPSELoss(
            seed=seed,
            form=form,
            kernel=kernel,
            bandwidth=bandwidth,
            alphas=alphas,
            features=features,
            epsilon=epsilon,
            negative_sampling=negative_sampling,
            sheets=sheets,
        )
        self.similarity = MIPSimilarity() if form == "symile" else SumSimilarity()
        if self.loss.symile and modalities and global_batch_size:  # before any work starts
            problem = self.loss.symile.size_problem(global_batch_size, len(modalities))
            if problem:
                raise ValueError(f"objective 'wpse': {problem}")

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> StepReport:
        sets = [as_point_set(representation) for representation in outputs.representations.values()]
        present = batch.present if self.exclude_missing else None
        loss, vectors = self.loss.with_embeddings(
            sets, outputs.logit_scale, step, batch.valid, present, fixed_features=not self.training
        )
        with torch.no_grad():
            weights = [torch.where(batch.valid[:, None], points.weights, 0).abs().max() for points in sets]
        health = {"largest_point_weight": torch.stack(weights).max().float()}
        return StepReport(loss, contrastive_health(vectors, batch.valid) | health)

    def embeddings(self, representations: dict[str, Representation]) -> dict[str, Tensor]:
        """Modality -> (n, D + F): z with the random features of evaluation, which retrieval and export see."""
        return dict(zip(representations, self.loss.embed(list(representations.values()), None), strict=True))


def as_point_set(representation: Representation) -> PointSet:
    """A vector (n, D) as a set of one point whose weight is 1; point sets as they are."""
    if not isinstance(representation, Tensor):
        return representation
    weights = torch.ones_like(representation[:, :1])
    return PointSet(representation[:, None], weights, torch.ones_like(weights[:, 0], dtype=torch.int64))


def unit_points(points: PointSet, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Vectors of unit length (n, T, D), and weights (n, T) divided by the number of points; float32 or more."""
    kind = torch.promote_types(points.vectors.dtype, torch.float32)
    vectors = F.normalize(points.vectors.to(kind), dim=2, eps=epsilon)
    return vectors, points.weights.to(kind) / points.sizes.clamp(min=1)[:, None].to(kind)


def point_set_similarity(
    sets: Sequence[PointSet], kernel: Kernel, alphas: tuple[float, float], epsilon: float = 1e-6
) -> Tensor:
    """The similarity of all combinations of samples, by the sum over all tuples of points -> (n_1, ..., n_M).

    For M = 2 the paper's (arXiv 2404.19228, section 4); for more, the multilinear inner product, times D^(M/2 - 1), and
    the kernel of the mean over pairs of their squared distance (`objectives.kernels`).
    """
    number = len(sets)
    flat, weights = [], []
    for points in sets:
        vectors, of_points = unit_points(points, epsilon)
        flat.append(vectors.flatten(0, 1))
        weights.append(of_points.flatten())

    def along(tensor: Tensor, *axes: int) -> Tensor:
        """The tensor's dimensions at those of the M-dimensional array of all tuples."""
        return tensor.reshape([len(flat[m]) if m in axes else 1 for m in range(number)])

    squares = flat[0].new_zeros(())  # r^2 = 2 / (M (M - 1)) ((M - 1) sum_m |v_m|^2 - 2 sum_(m < k) v_m . v_k)
    for m, vectors in enumerate(flat):
        squares = squares + 2 / number * along(vectors.square().sum(dim=1), m)
    for m, k in combinations(range(number), 2):
        squares = squares - 4 / (number * (number - 1)) * along(flat[m] @ flat[k].T, m, k)
    letters = "abcdefghijk"[:number]
    products = torch.einsum(",".join(f"{letter}z" for letter in letters) + "->" + letters, *flat)
    values = alphas[0] * flat[0].shape[1] ** (number / 2 - 1) * products + alphas[1] * kernel(squares.clamp(min=0))
    values = values * elementwise_product([along(tensor, m).expand_as(values) for m, tensor in enumerate(weights)])
    shape = [size for points in sets for size in points.weights.shape]
    return values.reshape(shape).sum(dim=tuple(range(1, 2 * number, 2)))


def _point_set_problem(representation: Representation) -> str | None:
    """What is wrong with a representation, or None. Looks at shapes and types only."""
    if isinstance(representation, Tensor):
        if representation.ndim == 2 and representation.is_floating_point() and representation.numel():
            return None
        return f"is {representation.dtype} of shape {tuple(representation.shape)}; should be floats (n, D)"
    if not isinstance(representation, PointSet):
        return f"is a {type(representation).__name__}; should be a PointSet or a tensor"
    vectors, weights, sizes = representation
    if vectors.ndim != 3 or weights.shape != vectors.shape[:2] or sizes.shape != vectors.shape[:1]:
        return (
            f"has vectors {tuple(vectors.shape)}, weights {tuple(weights.shape)} and sizes {tuple(sizes.shape)}; "
            "should be (n, T, D), (n, T) and (n,)"
        )
    if not (vectors.is_floating_point() and weights.is_floating_point()) or sizes.is_floating_point():
        return f"has {vectors.dtype} vectors, {weights.dtype} weights and {sizes.dtype} sizes; sizes alone are integers"
    return None if vectors.numel() else f"is empty: its vectors are {tuple(vectors.shape)}"


def _without_invalid(representation: Representation, valid: Tensor) -> Representation:
    if isinstance(representation, Tensor):
        return torch.where(valid[:, None], representation, 0)
    vectors, weights, sizes = representation
    return PointSet(torch.where(valid[:, None, None], vectors, 0), torch.where(valid[:, None], weights, 0), sizes)


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """(n, T) and (n, T, D) -> (n, D)"""
    return (weights[:, None] @ values).squeeze(1)


def _sum_of_waves(vectors: Tensor, weights: Tensor, waves: Waves, number: int) -> Tensor:
    """(n, T, D) unit vectors, (n, T) weights -> (n, F): the weighted sums of their features.

    Some samples at a time where they are many: their cosines are then computed once more in the backward pass, and
    never are all in memory.
    """
    of_kind = Waves(*(tensor.to(vectors.dtype) for tensor in waves))

    def of_block(vectors: Tensor, weights: Tensor) -> Tensor:
        return _weighted_sum(weights, of_kind(vectors, number))

    n, length = weights.shape
    height = max(1, COSINES.get(vectors.device.type, COSINES["cuda"]) // (length * waves.phases.shape[1]))
    if height >= n:
        return of_block(vectors, weights)
    blocks = zip(vectors.split(height), weights.split(height), strict=True)
    return torch.cat([checkpoint(of_block, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks])
