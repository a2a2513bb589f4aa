"""How alike vectors of several modalities are: what objectives and evaluation share.

The multilinear inner product (MIP), the sum of pairwise inner products, and two measures of geometry: the volume that
the vectors span and the area between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_DETERMINANT = 1e-12
"""Gram determinants of unit vectors are clamped to it, hence volumes to 1e-6.

The square root has no gradient at zero, where the vectors are linearly dependent (all modalities equal, say), and
rounding takes the determinant below. A clamped volume has the gradient zero: it is as small as it can be.
"""
SCORES_AT_ONCE = 2**22

Similarity = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""similarity((K, D) candidates, [(Q, D), ...] queries) -> (Q, K) scores.

An attribute `normalize` that is true says that vectors are L2-normalised first, so that their lengths do not matter.
"""


def towards(similarity: Similarity, target: str, queries: Sequence[str]) -> Similarity:
    """The similarity for one direction: some depend on which modality is looked for, and by which others.

    Those have a method `towards(target, queries)`, of the modalities' names, the queries in the order of the config.
    """
    directed = getattr(similarity, "towards", None)
    return similarity if directed is None else directed(target, queries)


FLOATING_POINT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def elementwise_product(tensors: Sequence[Tensor]) -> Tensor:
    """The product of tensors of one shape, element by element."""
    return reduce(torch.mul, tensors)


def multilinear_inner_product(representations: Sequence[Tensor]) -> Tensor:
    """sum_d prod_m r_m[d] of M tensors (..., D) -> (...). Symile, arXiv 2411.01053, section 3."""
    return elementwise_product(representations).sum(dim=-1)


class MIPSimilarity:
    """Scores of candidates of one modality for queries made of all the others.

    Not a torch module: ZeRO-3 hooks every module of a model, and expects all ranks to call them in the same order.

    The score is the MIP of the query's representations and the candidate (Symile, arXiv 2411.01053, section 3). The
    query stands for whatever number of modalities is at hand: one gives the inner product of two vectors.

    Args:
        normalize: L2-normalise all of them first.
    """

    def __init__(self, normalize: bool = False) -> None:
        self.normalize = normalize

    def __call__(self, candidates: Tensor, queries: Sequence[Tensor]) -> Tensor:
        """(K, D) candidates and one or more (Q, D) query representations -> (Q, K) scores.

        Raises ValueError without queries or with unequal shapes.
        """
        check_same_shape(list(queries))
        if candidates.shape[-1] != queries[0].shape[-1]:
            raise ValueError(f"candidates have D = {candidates.shape[-1]}, queries D = {queries[0].shape[-1]}")
        if self.normalize:
            candidates, *queries = (F.normalize(tensor, dim=-1) for tensor in (candidates, *queries))
        return elementwise_product(list(queries)) @ candidates.T


class SumSimilarity:
    """Scores of candidates by the sum of pairwise inner products: zero-shot scoring for pairwise objectives (CLIP).

    Args:
        normalize: L2-normalise all of them first.
    """

    def __init__(self, normalize: bool = False) -> None:
        self.normalize = normalize

    def __call__(self, candidates: Tensor, queries: Sequence[Tensor]) -> Tensor:
        """(K, D) candidates and one or more (Q, D) query representations -> (Q, K) scores."""
        check_same_shape(list(queries))
        if self.normalize:
            candidates, *queries = (F.normalize(tensor, dim=-1) for tensor in (candidates, *queries))
        return sum(queries[1:], start=queries[0]) @ candidates.T


class GeometricSimilarity(ABC):
    """Scores by a distance among L2-normalised vectors, one per modality: the smaller, the more alike.

    Not a torch module, for the reason given at `MIPSimilarity`. The distance does not depend on the order of the
    vectors. Losses call its three methods with unit vectors (`unit_rows`).
    """

    normalize = True

    def __call__(self, candidates: Tensor, queries: Sequence[Tensor]) -> Tensor:
        """(K, D) candidates and one or more (Q, D) query representations -> (Q, K) scores: minus the distances.

        They need not be normalised. Halves are computed, and scored, in float32. Raises ValueError without queries or
        with unequal shapes.
        """
        check_same_shape(list(queries))
        if candidates.shape[-1] != queries[0].shape[-1]:
            raise ValueError(f"candidates have D = {candidates.shape[-1]}, queries D = {queries[0].shape[-1]}")
        candidates, *queries = (unit_rows(tensor) for tensor in (candidates, *queries))
        scores = candidates.new_empty((len(queries[0]), len(candidates)))
        height = max(1, SCORES_AT_ONCE // max(1, len(candidates)))
        for first in range(0, len(scores), height):
            rows = slice(first, first + height)
            scores[rows] = -self.between(candidates, self.of_tuples([query[rows] for query in queries])).T
        return scores

    @abstractmethod
    def of_rows(self, vectors: Sequence[Tensor]) -> Tensor:
        """Tensors (n, D) -> (n,): the distance among their rows of one number."""

    @abstractmethod
    def of_tuples(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors (N, D) -> what `between` needs of the N tuples that their rows of one number make: tensors of N
        rows each."""

    @abstractmethod
    def between(self, vectors: Tensor, tuples: list[Tensor]) -> Tensor:
        """(R, D) and the result of `of_tuples` -> (R, N): the distance among each vector and each tuple."""


class VolumeSimilarity(GeometricSimilarity):
    """Minus the volume that the candidate spans with the queries (GRAM, arXiv 2412.11959).

    Vol = sqrt(det G), with G the Gram matrix of the unit vectors: 0 where they are linearly dependent, 1 where they are
    orthogonal. With less than all other modalities at hand it is the volume of those that are.
    """

    def of_rows(self, vectors: Sequence[Tensor]) -> Tensor:
        return _square_root(_orthogonal(vectors)[1])

    def of_tuples(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The first vectors; what completes them to orthonormal bases of the tuples, m - 1 tensors (N, D); and the
        determinants (N,) of the tuples' Gram matrices."""
        bases, determinants = _orthogonal(vectors)
        return [vectors[0], *(unit_rows(direction) for direction in bases[1:]), determinants]

    def between(self, vectors: Tensor, tuples: list[Tensor]) -> Tensor:
        """det G is the tuple's own times the square of what is left of the vector without its part in the tuple's span.

        The vector's side from the tuple's first vector has as much left: in a narrow cone it is as short as what is
        left itself, so nothing large is subtracted. A matrix (R, N) per modality of the tuples is all that is needed.
        """
        first, *directions, determinants = tuples
        left, products = _sides(vectors, first, directions)
        along = (vectors.square().sum(dim=1)[:, None] - first.square().sum(dim=1) - left) / 2
        for product in (along, *products):
            left = left - product.square()
        return _square_root(left * determinants)


class AreaSimilarity(GeometricSimilarity):
    """Minus the area measure of the triangle whose corners are the candidate and two queries (TRIANGLE, NeurIPS 2025).

    (|u|^2 |w|^2 - (u . w)^2) / 2, where u and w are the sides from one corner, whichever: twice the squared area of the
    triangle, as TRIANGLE's public code has it. With a single query, minus the squared distance of the two.
    """

    def __call__(self, candidates: Tensor, queries: Sequence[Tensor]) -> Tensor:
        """As `GeometricSimilarity.__call__`. Raises ValueError for more than two queries too."""
        if len(queries) > 2:
            raise ValueError(
                f"the area of a triangle is among three modalities: one or two queries, got {len(queries)}"
            )
        return super().__call__(candidates, queries)

    def of_rows(self, vectors: Sequence[Tensor]) -> Tensor:
        corner, *others = vectors
        sides = [corner - other for other in others]
        squares = [side.square().sum(dim=1) for side in sides]
        return squares[0] if len(sides) == 1 else _area(squares[0], squares[1], (sides[0] * sides[1]).sum(dim=1))

    def of_tuples(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The first vectors and, if there are two, the sides (N, D) from them to the second ones."""
        return [vectors[0], *(vector - vectors[0] for vector in vectors[1:])]

    def between(self, vectors: Tensor, tuples: list[Tensor]) -> Tensor:
        first, *sides = tuples
        squares, products = _sides(vectors, first, sides)
        return _area(squares, sides[0].square().sum(dim=1), products[0]) if sides else squares


def unit_rows(tensor: Tensor) -> Tensor:
    """(n, D) -> the rows L2-normalised, in float32 or more. A row of zeros stays one, and gets the gradient zero."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    # Squares of large numbers overflow. A row's direction, and so its gradient, is that of any multiple of it.
    largest = wide.detach().abs().amax(dim=1, keepdim=True)
    wide = wide / torch.where(largest > 2.0**50, largest, 1.0)
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return wide / torch.where(length > 1e-12, length, torch.inf)


def _orthogonal(vectors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """m tensors (n, D) -> orthogonal bases of what rows of one number span, m tensors (n, D); and the determinants (n,)
    of their Gram matrices.

    By Gram and Schmidt's procedure. It takes the others' differences from the first vectors, which span the same and
    lose no digits where all are nearly equal. A vector that depends on those before leaves zeros, or rounding.
    """
    first, *others = vectors
    bases, squares = list[Tensor](), list[Tensor]()
    for vector in (first, *(other - first for other in others)):
        for direction, square in zip(bases, squares, strict=True):
            part = (vector * direction).sum(dim=1) / torch.where(square > 1e-24, square, torch.inf)
            vector = vector - part[:, None] * direction
        bases.append(vector)
        squares.append(vector.square().sum(dim=1))
    return bases, elementwise_product(squares)


def _sides(vectors: Tensor, first: Tensor, directions: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(R, D) unit vectors v, (N, D) others f, and directions (N, D) -> of the sides v - f, (R, N) each, their squares
    and their products with every direction.

    Sides stay what they are where all vectors are moved. So the centre of the f is subtracted: products of vectors in a
    narrow cone are all but one, and float32 rounds away what tells them apart.
    """
    counted = first.detach().nan_to_num()  # what is not a number stays in its own row
    centre = counted.sum(dim=0) / counted.square().sum().clamp(min=1)  # the mean of the rows that are not zero
    vectors, first = vectors - centre, first - centre
    squares = vectors.square().sum(dim=1)[:, None] + first.square().sum(dim=1) - 2 * vectors @ first.T
    return squares, [vectors @ direction.T - (first * direction).sum(dim=1) for direction in directions]


def _square_root(determinants: Tensor) -> Tensor:
    return determinants.clamp(min=SMALLEST_DETERMINANT).sqrt()


def _area(first: Tensor, second: Tensor, both: Tensor) -> Tensor:
    """From the squares of two sides and their product."""
    return (first * second - both.square()) / 2


def check_same_shape(representations: Sequence[Tensor]) -> None:
    """Raises ValueError unless there is a tensor or more, all (n, D) of one shape, floating type and device."""
    if not representations:
        raise ValueError("no representations given")
    first = representations[0]
    for number, tensor in enumerate(representations):
        if tensor.ndim != 2:
            raise ValueError(f"representation {number} has shape {tuple(tensor.shape)}; should be (n, D)")
        if tensor.dtype not in FLOATING_POINT:
            raise ValueError(
                f"representation {number} has dtype {tensor.dtype}; should be floating point, of 16, 32 or 64 bits"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"representation {number} is {tensor.layout}; should be dense")
        for what in ("shape", "dtype", "device"):
            if getattr(tensor, what) != getattr(first, what):
                raise ValueError(
                    f"representation {number} has {what} {getattr(tensor, what)}, representation 0 has "
                    f"{getattr(first, what)}; all modalities need the same"
                )
