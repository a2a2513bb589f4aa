"""Passes over held-out samples: in the loop, by all ranks together, and alone for `symile-dist evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from symile_dist import gradcache
from symile_dist.config import Config
from symile_dist.data.loader import Loader, open_validation
from symile_dist.distributed import all_gather, gather_objects, rank
from symile_dist.engine import Engine
from symile_dist.evaluation.retrieval import Similarity, class_numbers, directions, retrieval_accuracy
from symile_dist.similarity import MIPSimilarity
from symile_dist.types import Batch, Fault, Representation, StepReport


@dataclass
class HeldOut:
    """What one pass gives: the same on every rank."""

    loss: float
    """Mean over samples of the loss in batches of the global batch size."""
    full_batch_loss: float | None
    """The same over batches without a masked tail: only these have global_batch_size negatives."""
    representations: dict[str, Tensor]
    """Modality -> (Q, D) float32 on the CPU, in the order of the shards."""
    labels: list[str]


def similarity_of(objective: nn.Module) -> Similarity:
    """How an objective's representations are compared: its attribute `similarity`, else the MIP."""
    return getattr(objective, "similarity", None) or MIPSimilarity()


Forward = Callable[[Batch, int], tuple[StepReport, dict[str, Representation]]]


@torch.no_grad()
def held_out_pass(forward: Forward, batches: Iterable[Batch]) -> HeldOut:
    """Runs every batch once, by all ranks in step. Batch t draws its negatives for step t, so passes are comparable."""
    losses: list[tuple[float, int, int]] = []
    representations: dict[str, list[Tensor]] = {}
    labels: list[str] = []
    for number, batch in enumerate(batches):
        report, emitted = forward(batch, number)
        valid = all_gather(batch.valid.to(report.loss.device).to(torch.uint8)).bool().cpu()
        losses.append((float(report.loss), int(valid.sum()), len(valid)))
        for name, vectors in emitted.items():
            if not isinstance(vectors, Tensor):
                raise ValueError(f"modality '{name}' emits a point set; retrieval needs vectors")
            representations.setdefault(name, []).append(all_gather(vectors.float()).cpu()[valid])
        every_label = [label for part in gather_objects(batch.labels) for label in part]
        labels += [label for label, there in zip(every_label, valid.tolist(), strict=True) if there]
    counted = sum(count for _, count, _ in losses)
    full = [loss for loss, count, size in losses if count == size]
    return HeldOut(
        loss=sum(loss * count for loss, count, _ in losses if count) / max(1, counted),
        full_batch_loss=sum(full) / len(full) if full else None,
        representations={name: torch.cat(parts) for name, parts in representations.items()},
        labels=labels,
    )


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
                batches = _telling(Loader(self.dataset, self.config, 0, self.steps), faults)
                engine, size = self.engine, self.config.encoded_at_once
                held_out = held_out_pass(
                    partial(gradcache.forward, engine.encode, engine.objective, size=size), batches
                )
                self.faults = [fault for part in gather_objects(faults) for fault in part]
                values = {"loss": held_out.loss}
                values |= bound_values(self.engine.module.objective, held_out, self.config.train.global_batch_size)
                similarity = similarity_of(self.engine.module.objective)
                # By every rank: where the similarity is a module, ZeRO-3 has hooks on it and expects all to call it.
                values |= accuracies(similarity, held_out, self.modalities)
            finally:
                self.engine.train(True)
        return values


def _telling(batches: Iterable[Batch], faults: list[Fault]) -> Iterator[Batch]:
    """The batches, their faults collected."""
    for batch in batches:
        faults += batch.faults
        yield batch


def accuracies(similarity: Similarity, held_out: HeldOut, modalities: list[str]) -> dict[str, float]:
    classes = class_numbers(held_out.labels)
    return {
        f"accuracy/{direction}": retrieval_accuracy(similarity, held_out.representations, classes, direction)
        for direction in directions(modalities, pairs=False)
    }


def bound_values(objective: nn.Module, held_out: HeldOut, global_batch_size: int) -> dict[str, float]:
    """log N - loss, which bounds the total correlation from below, and its ceiling log N (in nats).

    Only for objectives that say so (`bounds_total_correlation`) and batches that hold N samples.
    """
    if held_out.full_batch_loss is None or not getattr(objective, "bounds_total_correlation", False):
        return {}
    ceiling = math.log(global_batch_size)
    return {"total_correlation_bound": ceiling - held_out.full_batch_loss, "total_correlation_ceiling": ceiling}
