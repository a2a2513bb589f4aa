"""The multilinear inner product (MIP) and its kin: what objectives and evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


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


def check_same_shape(representations: Sequence[Tensor]) -> None:
    """Raises ValueError unless there is a tensor or more, all (n, D) of one shape, floating type and device."""
    if not representations:
        raise ValueError("no representations given")
    first = representations[0]
    for number, tensor in enumerate(representations):
        if tensor.ndim != 2:
            raise ValueError(f"representation {number} has shape {tuple(tensor.shape)}; should be (n, D)")
        if not tensor.is_floating_point():
            raise ValueError(f"representation {number} has dtype {tensor.dtype}; should be floating point")
        for what in ("shape", "dtype", "device"):
            if getattr(tensor, what) != getattr(first, what):
                raise ValueError(
                    f"representation {number} has {what} {getattr(tensor, what)}, representation 0 has "
                    f"{getattr(first, what)}; all modalities need the same"
                )
