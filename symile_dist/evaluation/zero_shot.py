"""Zero-shot classification: a class is what its name, put into prompts, is encoded as."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from symile_dist.evaluation.bootstrap import Estimate, bootstrap_means
from symile_dist.evaluation.retrieval import CPU, number
from symile_dist.similarity import Similarity

QUERIES_AT_ONCE = 4096


def class_features(prompts: Tensor, classes: Tensor, normalize: bool) -> Tensor:
    """(P, D) features of prompts, (P,) int64 their classes, 0 to C - 1 -> (C, D): the mean over each class's prompts.

    With `normalize` each prompt's feature is L2-normalised before the mean, and the mean after (CLIP, arXiv 2103.00020,
    section 3.1.4). WPSE takes the mean as it is (arXiv 2404.19228).

    Raises ValueError for a class without a prompt.
    """
    counts = classes.bincount(minlength=1)
    if (counts == 0).any():
        raise ValueError(f"class {int((counts == 0).nonzero()[0])} has no prompt")
    prompts = F.normalize(prompts, dim=1) if normalize else prompts
    sums = prompts.new_zeros((len(counts), prompts.shape[1])).index_add_(0, classes, prompts)
    means = sums / counts[:, None]
    return F.normalize(means, dim=1) if normalize else means


@dataclass(frozen=True)
class ZeroShot:
    """What zero-shot classification gives; NaN without samples."""

    accuracy: float
    top5: float
    mean_per_class: float
    """The mean over the classes of the accuracy on their samples."""
    samples: int
    classes: int
    accuracy_bootstrap: Estimate | None
    hits: Tensor
    """(Q,) float64 per sample: 1 or 0, but a fraction where classes tie"""

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "accuracy": number(self.accuracy),
            "top5": number(self.top5),
            "mean_per_class": number(self.mean_per_class),
            "samples": self.samples,
            "classes": self.classes,
            "chance": 1 / self.classes,
        }
        if self.accuracy_bootstrap is not None:
            values["bootstrap_mean"] = number(self.accuracy_bootstrap.mean)
            values["bootstrap_standard_error"] = number(self.accuracy_bootstrap.standard_error)
        return values


@torch.no_grad()
def zero_shot(
    similarity: Similarity,
    features: Tensor,
    queries: Sequence[Tensor],
    classes: Tensor,
    resamples: int = 0,
    seed: int = 0,
    device: torch.device = CPU,
) -> ZeroShot:
    """Each sample's class is the one whose feature scores highest; of classes that tie one is taken at random, of which
    this is the expectation.

    Args:
        similarity: see `scoring.Similarity`; the classes' features are its candidates.
        features: (C, D), see `class_features`.
        queries: one or more (Q, D): of the modalities that are classified.
        classes: (Q,) int64: the true class, 0 to C - 1.
        resamples: of the bootstrap, which draws samples; 0: none.
    """
    above, tied = torch.zeros((2, len(classes)), dtype=torch.int64)
    features = features.to(device)
    for start in range(0, len(classes), QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        scores = similarity(features, [query[rows].to(device) for query in queries]).cpu()
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        own = scores.gather(1, classes[rows, None])
        above[rows], tied[rows] = (scores > own).sum(dim=1), (scores == own).sum(dim=1) - 1
    hits, top5 = (((k - above).double() / (tied + 1)).clamp(0, 1) for k in (1, 5))
    counts = classes.bincount(minlength=len(features))
    per_class = torch.zeros(len(features), dtype=torch.float64).index_add_(0, classes, hits)[counts > 0]
    some = len(classes) > 0
    return ZeroShot(
        accuracy=float(hits.mean()) if some else math.nan,
        top5=float(top5.mean()) if some else math.nan,
        mean_per_class=float((per_class / counts[counts > 0]).mean()) if some else math.nan,
        samples=len(classes),
        classes=len(features),
        accuracy_bootstrap=bootstrap_means([hits], resamples, seed)[0] if resamples and some else None,
        hits=hits,
    )
