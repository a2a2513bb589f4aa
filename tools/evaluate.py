"""`symile-dist evaluate`: what a run's checkpoint has learned, and its embeddings for use elsewhere.

Alone, or on several processes that torchrun starts, which read, encode and score a share each:

    torchrun --nproc-per-node 8 --no-python symile-dist evaluate RUN
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from symile_dist import __version__, gradcache
from symile_dist.checkpoint.manifest import CheckpointError, folder_name, read_manifest
from symile_dist.checkpoint.reshape import consolidated_weights
from symile_dist.config import Component, Config
from symile_dist.data.batches import StepDataset
from symile_dist.data.loader import Loader, open_validation
from symile_dist.distributed import broadcast_object, rank, world_size
from symile_dist.evaluation.bootstrap import bootstrap_mean, resample
from symile_dist.evaluation.candidates import (
    CandidateLists,
    candidate_lists,
    entries_of_csv,
    entries_of_metadata,
    retrieve_among,
)
from symile_dist.evaluation.embeddings import EmbeddingRows, write_embeddings
from symile_dist.evaluation.probe import Split, logistic_probe
from symile_dist.evaluation.report import draw_retrieval, format_results
from symile_dist.evaluation.retrieval import class_numbers, number, parse_directions, retrieve
from symile_dist.evaluation.statistics import alignment, effective_rank, uniformity
from symile_dist.evaluation.zero_shot import zero_shot
from symile_dist.model import TrainingModule
from symile_dist.run_directory import CONFIG_FILE, load_run
from symile_dist.similarity import Similarity, towards
from symile_dist.storage import write_json, write_text
from symile_dist.tools.checkpoints import find_checkpoint
from symile_dist.tools.prompts import ZeroShotTask, encoded_classes, read_task
from symile_dist.types import Batch, Representation, StepReport
from symile_dist.validate import (
    HeldOut,
    HeldOutPart,
    bound_values,
    embeddings_of,
    held_out_parts,
    joined,
    presence,
    similarity_of,
)

METRICS = ("retrieval", "statistics")
RESULTS = "evaluation"
"""The folder of a run's directory that results are written to."""
PROBE_SAMPLES = 20_000


def split_directory(config: Config, split: str) -> str:
    """The folder of a split's shards; the validation shards stand in for a test split that the config lacks."""
    data = config.data
    if split == "train" and len(data.train) > 1:
        raise ValueError(f"data.train is a mixture of {', '.join(data.train)}: set data.test to one of their folders")
    train = next(iter(data.train.values())).path
    directory = {"test": data.test or data.validation, "validation": data.validation, "train": train}[split]
    if directory is None:
        raise ValueError(f"the config names no shards for the {split} split (data.{split}); try --split train")
    return directory


def find_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu` or `cuda`. Raises ValueError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: should be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


@contextlib.contextmanager
def processes_of_torchrun(device: torch.device) -> Iterator[None]:
    """The process group that torchrun's environment describes, where there is one and none is made yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def load_trained(config: Config, folder: Path) -> TrainingModule:
    """The model and objective of a config with a checkpoint's weights, on the CPU, in evaluation mode.

    Raises CheckpointError for a checkpoint that is damaged or of another model.
    """
    module = TrainingModule(config)
    weights = consolidated_weights(folder)
    try:
        missing, unknown = module.load_weights(weights)
    except RuntimeError as mismatch:  # of sizes
        raise CheckpointError(
            f"{folder}: was made by another model than the run's config describes: {mismatch}"
        ) from None
    if missing or unknown:
        raise CheckpointError(
            f"{folder}: was made by another model than {config.run_directory / CONFIG_FILE} describes; "
            f"lacking: {', '.join(missing[:3]) or 'none'}; unknown: {', '.join(unknown[:3]) or 'none'}"
        )
    return module.eval()


class Trained(NamedTuple):
    """A run's model, ready to look at splits."""

    config: Config
    """With as many workers as there are processes here."""
    module: TrainingModule
    device: torch.device
    encoded_at_once: int

    def parts(self, directory: str, max_samples: int | None = None, metadata: Sequence[str] = ()) -> Pass:
        """One pass over a folder of shards."""
        dataset, steps = open_validation(self.config, directory, rank(), max_samples, metadata=metadata)
        batches: Iterable[Batch] = Loader(dataset, self.config, 0, steps)
        return Pass(dataset, held_out_parts(self._forward, batches, embeddings_of(self.module.objective)))

    def _forward(self, batch: Batch, step: int) -> tuple[StepReport, dict[str, Representation]]:
        encode = partial(self.module, step=None)
        return gradcache.forward(encode, self.module, batch.to(self.device), step, size=self.encoded_at_once)


class Pass(NamedTuple):
    dataset: StepDataset
    parts: Iterator[HeldOutPart]


def _trained(run: str | Path, step: str, overrides: Sequence[str], device: torch.device) -> tuple[Trained, Path]:
    found = load_run(run, list(overrides))
    world = world_size()
    if found.train.global_batch_size % world:
        raise ValueError(
            f"{world} processes do not divide train.global_batch_size = {found.train.global_batch_size}, the batch of "
            "the loss"
        )
    # These processes read what all ranks read together, and as many samples are encoded at once as a rank held.
    config = found.model_copy(update={"ray": found.ray.model_copy(update={"num_workers": world})})
    if config.objective.options.get("backend") == "triton" and device.type == "cpu":  # the loss is the same
        options = config.objective.options | {"backend": "auto"}
        config = config.model_copy(update={"objective": Component(name=config.objective.name, **options)})
    folder = find_checkpoint(config, step)
    return Trained(config, load_trained(config, folder).to(device), device, found.encoded_at_once), folder


def evaluate_run(
    run: str | Path,
    step: str = "latest",
    split: str = "test",
    resamples: int | None = None,
    write: bool = True,
    *,
    shards: str | None = None,
    overrides: Sequence[str] = (),
    metrics: Sequence[str] = METRICS,
    directions: Sequence[str] | None = None,
    recall_at: Sequence[int] | None = None,
    zero_shot_file: str | Path | None = None,
    probe: Sequence[str] = (),
    probe_samples: int = PROBE_SAMPLES,
    export: str | Path | None = None,
    metadata: Sequence[str] = (),
    max_samples: int | None = None,
    device: str = "auto",
    figure: bool = False,
) -> dict[str, Any]:
    """Evaluates a run's checkpoint; writes RUN/evaluation/SPLIT-step-*.json, .md and, on request, .png and .svg, unless
    all that is asked for is an export.

    Args:
        step: a number, `latest` or `best` (by validation).
        split: `test`, `validation` or `train`.
        shards: a folder of shards in the place of the split's.
        overrides: `key=value`, laid on the run's config.
        resamples, directions, recall_at, zero_shot_file: in the place of the config's `evaluation` section.
        metrics: some of METRICS: `retrieval` in every direction, `statistics` of the embeddings.
        zero_shot_file: classes and prompts for zero-shot classification (see `prompts`).
        probe: embeddings that a logistic regression reads the label from, trained on the training split: names, several
            put together (`image+text`), or `all`.
        probe_samples: at most so many samples of the training split.
        export: a Parquet file for the embeddings; without metrics they never are in memory together.
        metadata: keys of the samples' metadata that become columns of it.
        max_samples: at most so many samples of the split, from the first on.
        device: `auto`, `cpu` or `cuda`.

    Returns the results, the same on every process; see docs/evaluation.md for the keys.

    Raises ValueError for a run, step, split or option that does not exist, CheckpointError for a damaged checkpoint.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"--metrics {unknown[0]}: choose some of {', '.join(METRICS)}, or none")
    if resamples is not None and resamples < 2:
        raise ValueError(f"--resamples {resamples}: a standard error needs two or more")
    for option, limit in (("--max-samples", max_samples), ("--probe-samples", probe_samples)):
        if limit is not None and limit < 1:
            raise ValueError(f"{option} {limit}: should be 1 or more")
    if directions is not None and not directions:
        raise ValueError("--directions names none: --metrics statistics leaves retrieval out")
    if export is not None and Path(export).is_dir():
        raise ValueError(f"--export {export}: is a folder; name a file")
    where = find_device(device)
    with processes_of_torchrun(where):
        trained, folder = _trained(run, step, [*overrides, *_as_overrides(resamples, directions, recall_at)], where)
        config, section = trained.config, trained.config.evaluation
        begin = time.perf_counter()
        task_file = zero_shot_file or section.zero_shot
        task = read_task(task_file, config) if task_file else None
        if embeddings_of(trained.module.objective) is None:
            parse_directions(section.directions, list(config.modalities))  # now, and not after the pass
        chosen = section.candidates if "retrieval" in metrics else None
        keys = [key for key in (chosen.query, chosen.positive, chosen.sample) if key] if chosen else []
        directory = shards or split_directory(config, split)
        found = trained.parts(directory, max_samples, list(dict.fromkeys([*keys, *metadata])))
        manifest = read_manifest(folder)
        results: dict[str, Any] = {
            "run": config.run.name,
            "step": manifest.step,
            "split": split if shards is None else Path(shards).name,
            "shards": directory,
        }
        measured = bool(metrics or task or probe)
        if write and measured and rank() == 0:
            (config.run_directory / RESULTS).mkdir(
                exist_ok=True
            )  # what cannot be written should be told before the pass
        parts = _Kept(found.parts, keep=measured)
        if export is not None:
            about = {
                **results,
                "config_digest": config.digest(),
                "similarity": _words(similarity_of(trained.module.objective)),
                "objective": config.objective.name,
                "normalization": config.model.normalization,
                "code_version": __version__,
            }
            results["export"] = _export(Path(export), parts, found.dataset, config, about, metadata)
        held_out = parts.held_out()
        if not held_out.labels:
            raise ValueError(f"{directory}: none of its samples could be read: symile-dist shards verify {directory}")
        results |= {
            "samples": len(held_out.labels),
            "classes": len(set(held_out.labels)),
            "loss": number(held_out.loss),
        }
        bounds = bound_values(trained.module.objective, held_out, config.train.global_batch_size)
        results |= {name: number(value) for name, value in bounds.items()}
        if "retrieval" in metrics:
            results |= _retrieval(trained, held_out)
        if "statistics" in metrics:
            results["statistics"] = _statistics(trained, held_out)
        if task is not None:
            results["zero_shot"] = _zero_shot(trained, held_out, found.dataset, task)
        if probe:
            results["probe"] = _probe(trained, held_out, probe, probe_samples)
        results["device"], results["seconds"] = str(where.type), time.perf_counter() - begin
        results = broadcast_object(results)  # the time is each process's own
        if write and measured and rank() == 0:
            _write(config.run_directory / RESULTS, results, figure)
    return results


def _as_overrides(
    resamples: int | None, directions: Sequence[str] | None, recall_at: Sequence[int] | None
) -> Iterator[str]:
    for key, value in (("resamples", resamples), ("directions", directions), ("recall_at", recall_at)):
        if value is not None:
            yield f"evaluation.{key}={value if isinstance(value, int) else list(value)}"


def _words(similarity: Similarity | None) -> str | None:
    return None if similarity is None else type(similarity).__name__


class _Kept:
    """The parts of a pass as they come, which are kept on the way."""

    def __init__(self, parts: Iterator[HeldOutPart], keep: bool) -> None:
        self._parts, self._keep = parts, keep
        self._seen: list[HeldOutPart] = []

    def __iter__(self) -> Iterator[HeldOutPart]:
        for part in self._parts:
            # Without the vectors where nobody needs all of them at once.
            self._seen.append(part if self._keep else replace(part, representations={}))
            yield part

    def held_out(self) -> HeldOut:
        """Of all of them."""
        for _ in self:
            pass
        return joined(self._seen)


def _export(
    path: Path,
    parts: Iterable[HeldOutPart],
    dataset: StepDataset,
    config: Config,
    about: dict[str, Any],
    metadata: Sequence[str],
) -> dict[str, Any]:
    population = dataset.populations[0]
    names = [shard.name for shard in population.manifest.shards]

    def rows(part: HeldOutPart) -> EmbeddingRows:
        ids = part.sample_ids.numpy()
        numbers = np.searchsorted(population.shard_ids, ids, side="right") - 1
        return EmbeddingRows(
            part.representations,
            presence(part, list(config.modalities)),
            part.sample_ids,
            shards=[names[shard] for shard in numbers],
            rows=(ids - population.shard_ids[numbers]).tolist(),
            labels=part.labels,
            metadata=part.metadata,
        )

    if rank() == 0:
        count = write_embeddings(path, map(rows, parts), about, metadata)
    else:  # the others only take part in the pass
        count = sum(len(part.labels) for part in parts)
    return {"path": str(path), "samples": count}


def _retrieval(trained: Trained, held_out: HeldOut) -> dict[str, Any]:
    section, similarity = trained.config.evaluation, similarity_of(trained.module.objective)
    protocol = "all" if section.candidates is None else "candidates"
    if similarity is None:
        return {"protocol": protocol, "retrieval": {}}
    present, vectors = presence(held_out, list(trained.config.modalities)), held_out.representations
    options: dict[str, Any] = {
        "present": present,
        "recall_at": section.recall_at,
        "resamples": section.resamples,
        "seed": trained.config.seed,
        "device": trained.device,
    }
    found = {}
    classes = class_numbers(held_out.labels)
    lists = _lists(trained.config, held_out) if section.candidates else None
    for direction in parse_directions(section.directions, list(vectors)):
        if lists is not None:
            result = retrieve_among(similarity, vectors, direction, lists, **options)
        else:
            result = retrieve(similarity, vectors, direction, classes, **options, across_ranks=True)
        found[str(direction)] = result.as_dict()
    left_out = {"queries_left_out": lists.left_out} if lists is not None else {}
    return {"protocol": protocol, **left_out, "retrieval": found}


def _lists(config: Config, held_out: HeldOut) -> CandidateLists:
    chosen = config.evaluation.candidates
    assert chosen is not None
    if chosen.file is None:
        return candidate_lists(entries_of_metadata(held_out.metadata, chosen.query, chosen.positive))
    assert chosen.sample is not None
    return candidate_lists(entries_of_csv(chosen.file, held_out.metadata, chosen.query, chosen.positive, chosen.sample))


def _statistics(trained: Trained, held_out: HeldOut) -> dict[str, Any]:
    """On rank 0, for all."""
    if rank() > 0:
        return broadcast_object({})
    present, vectors = presence(held_out, list(trained.config.modalities)), held_out.representations
    of_each, of_pairs = {}, {}
    for name, values in vectors.items():
        there = values if present[name].all() else values[present[name]]
        of_each[name] = {
            "dimension": values.shape[1],
            "effective_rank": number(effective_rank(there, trained.device)),
            "uniformity": number(uniformity(there, device=trained.device)),
        }
    for one, other in combinations(vectors, 2):
        if vectors[one].shape[1] == vectors[other].shape[1] and one.partition(".")[2] == other.partition(".")[2]:
            both = present[one] & present[other]
            of_pairs[f"{one}-{other}"] = number(alignment(vectors[one][both], vectors[other][both]))
    return broadcast_object({"embeddings": of_each, "alignment": of_pairs})


def _zero_shot(trained: Trained, held_out: HeldOut, dataset: StepDataset, task: ZeroShotTask) -> dict[str, Any]:
    objective, section = trained.module.objective, trained.config.evaluation
    similarity = similarity_of(objective)
    if similarity is None:
        raise ValueError("zero-shot classification: this objective does not compare representations across modalities")
    normalize = task.normalize
    if normalize is None:
        normalize = bool(getattr(similarity, "normalize", False)) or trained.config.model.normalization == "l2"
    features = encoded_classes(task, dataset, trained.module, embeddings_of(objective), normalize, trained.device)
    known = {label: number for number, label in enumerate(task.labels)}
    numbers = torch.tensor([known.get(label, -1) for label in held_out.labels], dtype=torch.int64)
    if not (numbers >= 0).any():
        raise ValueError(
            "zero-shot classification: no sample has a label of the classes; labels are "
            f"{', '.join(held_out.labels[:3])} ..., classes {', '.join(task.labels[:3])} ..."
        )
    present = presence(held_out, list(trained.config.modalities))
    found: dict[str, Any] = {}
    for query in task.queries:
        there = torch.stack([present[name] for name in query]).all(dim=0) & (numbers >= 0)
        vectors: list[Tensor] = [held_out.representations[name][there] for name in query]
        result = zero_shot(
            towards(similarity, task.text, query),
            features,
            vectors,
            numbers[there],
            section.resamples,
            trained.config.seed,
            trained.device,
        )
        found["_".join(query)] = {**result.as_dict(), "queries": list(query), "text": task.text, "normalize": normalize}
    return found


def _probe(trained: Trained, held_out: HeldOut, names: Sequence[str], max_samples: int) -> dict[str, Any]:
    """Logistic regression from the embeddings to the label: trained on the training split, C chosen on validation."""
    config = trained.config
    known = list(held_out.representations)
    wanted = known if list(names) == ["all"] else list(names)
    for part in "+".join(wanted).split("+"):
        if part not in known:
            raise ValueError(f"--probe {part}: there is no such embedding; choose some of {', '.join(known)}, or all")
    splits = [
        joined(trained.parts(split_directory(config, "train"), max_samples).parts),
        joined(trained.parts(split_directory(config, "validation")).parts),
        held_out,
    ]
    if rank() > 0:
        return broadcast_object({})
    found = {}
    for name in wanted:
        train, validation, test = (_probed(split, name.split("+"), list(config.modalities)) for split in splits)
        result = logistic_probe(train, validation, test)
        hits = torch.from_numpy(result.hits).double()
        spread = bootstrap_mean(hits, resample(len(hits), config.evaluation.resamples, config.seed))
        found[name] = {
            "accuracy": result.accuracy,
            "bootstrap_mean": spread.mean,
            "bootstrap_standard_error": spread.standard_error,
            "c": result.c,
            "validation_accuracy": result.validation_accuracy,
            "converged": result.converged,
            "samples": {
                "train": train.samples,
                "validation": validation.samples,
                "test": test.samples,
            },
        }
    return broadcast_object(found)


def _probed(split: HeldOut, names: Sequence[str], modalities: Sequence[str]) -> Split:
    """Some embeddings, one after the other, of the samples that have all of them; and their labels."""
    present = presence(split, modalities)
    there = torch.stack([present[name] for name in names]).all(dim=0)
    vectors = torch.cat([split.representations[name][there] for name in names], dim=1)
    return Split(vectors.numpy(), np.asarray(split.labels)[there.numpy()])


def _write(folder: Path, results: dict[str, Any], figure: bool) -> None:
    name = f"{results['split']}-{folder_name(results['step'])}"
    rows = list(results.get("retrieval", {}).values())
    if figure and any(row["accuracy"] is not None for row in rows):
        title = f"{results['run']}, step {results['step']}, {results['split']} split"
        results["figures"] = [str(file) for file in draw_retrieval(rows, title, folder / name, ("png", "svg"))]
    write_json(folder / f"{name}.json", results)
    write_text(folder / f"{name}.md", format_results(results) + "\n")


__all__ = ["METRICS", "evaluate_run", "find_checkpoint", "format_results", "load_trained", "split_directory"]
