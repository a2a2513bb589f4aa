"""Passes over held-out samples: in the loop, by all ranks together, and alone for `symile-dist evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from symile_dist import gradcache
from symile_dist.config import Config
from symile_dist.data.loader import Loader, open_validation
from symile_dist.distributed import all_gather, gather_objects, rank
from symile_dist.engine import Engine
from symile_dist.evaluation.retrieval import CPU, class_numbers, directions, retrieve
from symile_dist.similarity import MIPSimilarity, Similarity
from symile_dist.types import Batch, Fault, Representation, StepReport


@dataclass
class HeldOut:
    """What one pass gives: the same on every rank."""

    loss: float
    """Mean over samples of the loss in batches of the global batch size."""
    full_batch_loss: float | None
    """The same over batches without a masked tail: only these have global_batch_size negatives."""
    representations: dict[str, Tensor]
    """Modality, or what the objective calls an embedding -> (Q, D) float32 on the CPU, in the order of the shards."""
    labels: list[str]
    present: Tensor
    """(Q, M) bool: False where a sample lacks a modality."""
    sample_ids: Tensor
    """(Q,) int64"""
    metadata: list[dict[str, Any]]
    """Q samples' metadata, if the batches carry any."""


@dataclass
class HeldOutPart:
    """Of a `HeldOut` what one global batch gives: the same on every rank. Slots without a sample are left out."""

    loss: float
    full: bool
    """Whether all slots held a sample."""
    representations: dict[str, Tensor]
    labels: list[str]
    present: Tensor
    sample_ids: Tensor
    metadata: list[dict[str, Any]]


def similarity_of(objective: nn.Module) -> Similarity | None:
    """How an objective's representations are compared: its attribute `similarity`, else the MIP.

    None where it says so: they are not to be compared across modalities, and there is no retrieval.
    """
    return getattr(objective, "similarity", MIPSimilarity())


Forward = Callable[[Batch, int], tuple[StepReport, dict[str, Representation]]]
Embeddings = Callable[[dict[str, Representation]], dict[str, Tensor]]


def embeddings_of(objective: nn.Module) -> Embeddings | None:
    """An objective's `embeddings(representations) -> name -> (n, D)`: the vectors that evaluation sees, where they are
    not the representations themselves."""
    return getattr(objective, "embeddings", None)


@torch.no_grad()
def held_out_parts(
    forward: Forward, batches: Iterable[Batch], embeddings: Embeddings | None = None
) -> Iterator[HeldOutPart]:
    """Runs every batch once, by all ranks in step. Batch t draws its negatives for step t, so passes are comparable.

    Raises ValueError where the encoders emit point sets and there are no `embeddings` to make vectors of them.
    """
    for number, batch in enumerate(batches):
        report, emitted = forward(batch, number)
        device = report.loss.device
        valid = all_gather(batch.valid.to(device).to(torch.uint8)).bool().cpu()
        vectors = emitted if embeddings is None else embeddings(emitted)
        representations = {}
        for name, value in vectors.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"modality '{name}' emits a point set; retrieval needs vectors")
            representations[name] = all_gather(value.float()).cpu()[valid]
        labels = [label for part in gather_objects(batch.labels) for label in part]
        metadata = [facts for part in gather_objects(batch.metadata) for facts in part]
        there = valid.tolist()
        yield HeldOutPart(
            loss=float(report.loss),
            full=bool(valid.all()),
            representations=representations,
            labels=[label for label, is_there in zip(labels, there, strict=True) if is_there],
            present=all_gather(batch.present.to(device).to(torch.uint8)).bool().cpu()[valid],
            sample_ids=all_gather(batch.sample_ids.to(device)).cpu()[valid],
            metadata=[facts for facts, is_there in zip(metadata, there, strict=True) if is_there] if metadata else [],
        )


def held_out_pass(forward: Forward, batches: Iterable[Batch], embeddings: Embeddings | None = None) -> HeldOut:
    """All parts of a pass together; see `held_out_parts`."""
    return joined(held_out_parts(forward, batches, embeddings))


def joined(parts: Iterable[HeldOutPart]) -> HeldOut:
    """Raises ValueError without a part."""
    found = list(parts)
    if not found:
        raise ValueError("there is no held-out batch")
    counts = [len(part.labels) for part in found]
    full = [part.loss for part in found if part.full]
    return HeldOut(
        loss=sum(part.loss * count for part, count in zip(found, counts, strict=True) if count) / max(1, sum(counts)),
        full_batch_loss=sum(full) / len(full) if full else None,
        representations={
            name: torch.cat([part.representations[name] for part in found]) for name in found[0].representations
        },
        labels=[label for part in found for label in part.labels],
        present=torch.cat([part.present for part in found]),
        sample_ids=torch.cat([part.sample_ids for part in found]),
        metadata=[facts for part in found for facts in part.metadata],
    )


def presence(held_out: HeldOut | HeldOutPart, modalities: Sequence[str]) -> dict[str, Tensor]:
    """Embedding -> (Q,) bool: False where the sample lacks the modality that it is made of (`image` of `image.shared`).

    One that is made of several (`b+c.shared`, of FactorCL's one against the rest) lacks what any of them lacks, and one
    that is named after no modality is always there.
    """
    number = {name: column for column, name in enumerate(modalities)}
    found = {}
    for name in held_out.representations:
        parts = name.partition(".")[0].split("+")
        columns = [number[part] for part in parts] if all(part in number for part in parts) else []
        found[name] = held_out.present[:, columns].all(dim=1)
    return found


class Validator:
    """Validation in the loop: loss and retrieval of each modality from all the others.

    It leaves no trace in training: the random state is put back, and nothing but the weights is read.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        assert config.data.validation is not None
        self.engine, self.config = engine, config
        self.dataset, self.steps = open_validation(
            config, config.data.validation, rank(), config.validation.max_samples, withhold=True
        )
        self.modalities = list(config.modalities)
        self.faults: list[Fault] = []
        """What could not be read in the last pass, on any rank: all ranks have the same list."""

    def run(self) -> dict[str, float]:
        """Values by name: `loss`, `accuracy/<target>_from_<queries>` and, where the objective has one, the bound."""
        devices = [self.engine.device] if self.engine.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.engine.train(False)
            try:
                faults: list[Fault] = []
                batches = telling(Loader(self.dataset, self.config, 0, self.steps), faults)
                engine, size = self.engine, self.config.encoded_at_once
                forward = partial(gradcache.forward, engine.encode, engine.objective, size=size)
                held_out = held_out_pass(forward, batches, embeddings_of(engine.module.objective))
                self.faults = [fault for part in gather_objects(faults) for fault in part]
                values = {"loss": held_out.loss}
                values |= bound_values(self.engine.module.objective, held_out, self.config.train.global_batch_size)
                similarity = similarity_of(self.engine.module.objective)
                values |= accuracies(similarity, held_out, self.modalities, engine.device, across_ranks=True)
            finally:
                self.engine.train(True)
        best = self.config.validation.best_metric
        if best not in values:
            raise ValueError(f"validation.best_metric: there is no '{best}'; choose one of {', '.join(values)}")
        return values


def telling(batches: Iterable[Batch], faults: list[Fault]) -> Iterator[Batch]:
    """The batches, their faults collected."""
    for batch in batches:
        faults += batch.faults
        yield batch


def accuracies(
    similarity: Similarity | None,
    held_out: HeldOut,
    modalities: list[str],
    device: torch.device = CPU,
    across_ranks: bool = False,
) -> dict[str, float]:
    """Accuracy of each modality from all the others; nothing where there is no similarity."""
    if similarity is None:
        return {}
    classes, present = class_numbers(held_out.labels), presence(held_out, modalities)
    vectors = held_out.representations
    return {
        f"accuracy/{direction}": retrieve(
            similarity, vectors, direction, classes, present, (), device=device, across_ranks=across_ranks
        ).accuracy
        for direction in directions(list(vectors), "others")
    }


def bound_values(objective: nn.Module, held_out: HeldOut, global_batch_size: int) -> dict[str, float]:
    """log N - loss, which bounds the total correlation from below, and its ceiling log N (in nats).

    Only for objectives that say so (`bounds_total_correlation`) and batches that hold N samples. Of one that contrasts
    with K > N candidates (`candidates`: Symile's "n_squared", K = N^(M - 1), and "sheets") log K - loss besides: an
    estimate, as candidates that share samples are not independent.
    """
    if held_out.full_batch_loss is None or not getattr(objective, "bounds_total_correlation", False):
        return {}
    ceiling = math.log(global_batch_size)
    found = {"total_correlation_bound": ceiling - held_out.full_batch_loss, "total_correlation_ceiling": ceiling}
    count = getattr(objective, "candidates", None)
    if count is not None and (candidates := count(global_batch_size, held_out.present.shape[1])) > global_batch_size:
        found["total_correlation_estimate"] = math.log(candidates) - held_out.full_batch_loss
    return found
