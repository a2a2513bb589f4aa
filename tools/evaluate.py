"""`symile-dist evaluate`: what a run's checkpoint has learned, and its embeddings for use elsewhere.

Alone, or on several processes that torchrun starts, which read, encode and score a share each:

    torchrun --nproc-per-node 8 --no-python symile-dist evaluate RUN
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symile_dist import __version__
from symile_dist.checkpoint.manifest import read_manifest
from symile_dist.config import Config
from symile_dist.data.batches import StepDataset, own_class
from symile_dist.distributed import broadcast_object, rank
from symile_dist.evaluation.bootstrap import bootstrap_means
from symile_dist.evaluation.candidates import (
    CandidateLists,
    candidate_lists,
    entries_of_csv,
    entries_of_metadata,
    read_candidates,
    retrieve_among,
)
from symile_dist.evaluation.embeddings import EmbeddingRows, write_embeddings
from symile_dist.evaluation.probe import Split, logistic_probe
from symile_dist.evaluation.report import format_results
from symile_dist.evaluation.retrieval import class_numbers, number, parse_directions, retrieve
from symile_dist.evaluation.statistics import alignment, effective_rank, uniformity
from symile_dist.evaluation.zero_shot import zero_shot
from symile_dist.similarity import Similarity, towards
from symile_dist.tools.progress import Report, silent
from symile_dist.tools.prompts import ZeroShotTask, encoded_classes, read_task
from symile_dist.tools.results import RESULTS, write_results
from symile_dist.tools.trained import Trained, find_device, open_trained, processes_of_torchrun, split_directory
from symile_dist.validate import (
    HeldOut,
    HeldOutPart,
    bound_values,
    embeddings_of,
    joined,
    presence,
    similarity_of,
)

METRICS = ("retrieval", "statistics")
PROBE_SAMPLES = 20_000
logger = logging.getLogger(__name__)


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
    progress: Report = silent,
) -> dict[str, Any]:
    """Evaluates a run's checkpoint; writes RUN/evaluation/SPLIT-step-*.json, .md and, on request, .png and .svg, unless
    all that is asked for is an export. What stands there of the same samples and step, and is not asked for, stays.

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

    Raises ValueError for a run, step, split or option that does not exist, CheckpointError for a damaged checkpoint,
    and RunFailed where more samples are unreadable than data.max_bad_fraction, or any with data.on_error = stop.
    """
    _check_options(metrics, resamples, {"--max-samples": max_samples, "--probe-samples": probe_samples}, directions)
    if export is not None:
        _check_export(Path(export))
    metadata = list(dict.fromkeys(metadata))
    where = find_device(device)
    with processes_of_torchrun(where):
        trained, folder = open_trained(run, step, [*overrides, *_as_overrides(resamples, directions, recall_at)], where)
        config, section = trained.config, trained.config.evaluation
        begin = time.perf_counter()
        task_file = zero_shot_file or section.zero_shot
        task = read_task(task_file, config) if task_file else None
        if embeddings_of(trained.module.objective) is None:
            parse_directions(section.directions, list(config.modalities))  # now, and not after the pass
        chosen = section.candidates if "retrieval" in metrics else None
        keys = [key for key in (chosen.query, chosen.positive, chosen.sample) if key] if chosen else []
        if chosen and chosen.file and chosen.sample:
            read_candidates(chosen.file, chosen.query, chosen.positive, chosen.sample)
        directory = shards or split_directory(config, split)
        if probe:
            _warn_where_probes_are_fitted(config, directory)
        found = trained.parts(directory, max_samples, list(dict.fromkeys([*keys, *metadata])), progress)
        manifest = read_manifest(folder)
        # Of what a user may have got wrong, all that can be told before the pass is told before it.
        features = None if task is None else _class_features(trained, found.dataset, task)
        results: dict[str, Any] = {
            "run": config.run.name,
            "step": manifest.step,
            "split": split if shards is None else Path(shards).name,
            "shards": directory,
            "label": config.data.label,
        }
        measured = bool(metrics or task or probe)
        if write and measured and rank() == 0:
            (config.run_directory / RESULTS).mkdir(exist_ok=True)
        parts = _Kept(found.parts, keep=measured)
        probed = _embeddings_to_probe(parts.names, probe)
        if embeddings_of(trained.module.objective) is not None and "retrieval" in metrics and parts.names:
            parse_directions(section.directions, parts.names)
        if probe and parts.names and not parts.labelled:
            raise ValueError(
                f"--probe reads the label, and the samples of {directory} have none: "
                f"data.label = {config.data.label!r} should be a key of their metadata"
            )
        if chosen and not chosen.file:
            entries_of_metadata(parts.metadata, chosen.query, chosen.positive)
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
            "unreadable": found.samples - len(held_out.labels),
            "classes": len(set(held_out.labels)),
            "loss": number(held_out.loss),
        }
        bounds = bound_values(trained.module.objective, held_out, config.train.global_batch_size)
        results |= {name: number(value) for name, value in bounds.items()}
        if "retrieval" in metrics:
            results |= _retrieval(trained, held_out, progress)
        if "statistics" in metrics:
            results["statistics"] = _statistics(trained, held_out)
        if task is not None and features is not None:
            results["zero_shot"] = _zero_shot(trained, held_out, task, *features)
        if probed:
            results["probe"] = _probe(trained, held_out, probed, probe_samples, progress)
        results["device"], results["seconds"] = str(where.type), time.perf_counter() - begin
        results = broadcast_object(results)  # the time is each process's own
        if write and measured and rank() == 0:
            write_results(config.run_directory / RESULTS, results, max_samples, figure)
    return results


def _check_options(
    metrics: Sequence[str],
    resamples: int | None,
    limits: Mapping[str, int | None],
    directions: Sequence[str] | None,
) -> None:
    """Raises ValueError for an option that cannot be; `limits` are the numbers of samples, by option."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"--metrics {unknown[0]}: choose some of {', '.join(METRICS)}, or none")
    if resamples is not None and resamples < 2:
        raise ValueError(f"--resamples {resamples}: a standard error needs two or more")
    for option, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{option} {limit}: should be 1 or more")
    if directions is not None and not directions:
        raise ValueError("--directions names none: --metrics statistics leaves retrieval out")


def _warn_where_probes_are_fitted(config: Config, directory: str) -> None:
    """Warns of a folder whose samples a probe is fitted to, before it is judged by them."""
    for other in ("train", "validation"):
        if Path(split_directory(config, other)).resolve() == Path(directory).resolve() and rank() == 0:
            logger.warning(
                "--probe: %s holds the %s samples, to which the probe itself is fitted: its accuracy is not one of "
                "held-out samples (data.test=FOLDER or --shards FOLDER names others)",
                directory,
                other,
            )


def _as_overrides(
    resamples: int | None, directions: Sequence[str] | None, recall_at: Sequence[int] | None
) -> Iterator[str]:
    for key, value in (("resamples", resamples), ("directions", directions), ("recall_at", recall_at)):
        if value is not None:
            yield f"evaluation.{key}={value if isinstance(value, int) else list(value)}"


def _words(similarity: Similarity | None) -> str | None:
    return None if similarity is None else type(similarity).__name__


PARQUET = b"PAR1"
"""What such a file begins with."""


def _check_export(path: Path) -> None:
    """Raises ValueError where a file of embeddings cannot be, or something else would be lost."""
    if path.is_dir():
        raise ValueError(f"--export {path}: is a folder; name a file")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(len(PARQUET)) != PARQUET:
                raise ValueError(f"--export {path}: is there, and is no Parquet file; name another file")


class _Kept:
    """The parts of a pass as they come, which are kept on the way."""

    names: list[str]
    """Of the embeddings, which the first part tells."""
    metadata: list[dict[str, Any]]
    """Of the first part's samples."""
    labelled: bool
    """Whether any of these has a label."""

    def __init__(self, parts: Iterator[HeldOutPart], keep: bool) -> None:
        first = next(parts, None)
        self.names = [] if first is None else list(first.representations)
        self.metadata = [] if first is None else first.metadata
        sample_ids = [] if first is None else first.sample_ids.tolist()
        self.labelled = first is not None and first.labels != [own_class(sample_id) for sample_id in sample_ids]
        self._parts, self._keep = parts if first is None else chain([first], parts), keep
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
    keys: set[str] = set()

    def rows(part: HeldOutPart) -> EmbeddingRows:
        keys.update(*part.metadata)
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
        for key in metadata:
            if key not in keys:
                logger.warning("--metadata %s: no sample's metadata has it; the column is empty", key)
    else:  # the others only take part in the pass
        count = sum(len(part.labels) for part in parts)
    return {"path": str(path), "samples": count}


def _retrieval(trained: Trained, held_out: HeldOut, progress: Report) -> dict[str, Any]:
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
    wanted = parse_directions(section.directions, list(vectors))
    samples = len(held_out.labels)
    for done, direction in enumerate(wanted):
        report = partial(_report_queries, progress, done * samples, len(wanted) * samples)
        report(0)
        if lists is not None:
            result = retrieve_among(similarity, vectors, direction, lists, **options)
        else:
            result = retrieve(similarity, vectors, direction, classes, **options, across_ranks=True, report=report)
        found[str(direction)] = result.as_dict()
    progress("retrieval", len(wanted) * samples, len(wanted) * samples)
    of_lists: dict[str, Any] = {}
    if section.candidates is not None and lists is not None:
        of_lists = {"candidates": section.candidates.model_dump(), "queries_left_out": lists.left_out}
    return {"protocol": protocol, **of_lists, "retrieval": found}


def _report_queries(progress: Report, before: int, total: int, done: int) -> None:
    progress("retrieval", before + done, total)


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


def _class_features(trained: Trained, dataset: StepDataset, task: ZeroShotTask) -> tuple[Tensor, bool]:
    """(C, D) of the classes, and whether they are L2-normalised."""
    objective = trained.module.objective
    similarity = similarity_of(objective)
    if similarity is None:
        raise ValueError("zero-shot classification: this objective does not compare representations across modalities")
    normalize = task.normalize
    if normalize is None:
        normalize = bool(getattr(similarity, "normalize", False)) or trained.config.model.normalization == "l2"
    features = encoded_classes(task, dataset, trained.module, embeddings_of(objective), normalize, trained.device)
    return features, normalize


def _zero_shot(
    trained: Trained, held_out: HeldOut, task: ZeroShotTask, features: Tensor, normalize: bool
) -> dict[str, Any]:
    section, similarity = trained.config.evaluation, similarity_of(trained.module.objective)
    assert similarity is not None, "without one there are no features"
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


def _embeddings_to_probe(known: Sequence[str], wanted: Sequence[str]) -> dict[str, list[str]]:
    """What is asked for -> the embeddings that it puts side by side. Raises ValueError for one that is not there."""
    if list(wanted) == ["all"]:
        return {name: [name] for name in known}
    return {name: _side_by_side(known, name, name.split("+")) for name in wanted}


def _side_by_side(known: Sequence[str], name: str, words: list[str]) -> list[str]:
    """The embeddings of which "a+b+c.shared" is made: the longest names that are known, from the left."""
    found: list[str] = []
    while words:
        sizes = [size for size in range(len(words), 0, -1) if "+".join(words[:size]) in known]
        if not sizes:
            raise ValueError(f"--probe {name}: there is no such embedding; choose some of {', '.join(known)}, or all")
        found.append("+".join(words[: sizes[0]]))
        words = words[sizes[0] :]
    return found


def _probe(
    trained: Trained, held_out: HeldOut, wanted: dict[str, list[str]], max_samples: int, progress: Report
) -> dict[str, Any]:
    """Logistic regression from the embeddings to the label: trained on the training split, C chosen on validation."""
    config = trained.config
    splits = [
        joined(trained.parts(split_directory(config, "train"), max_samples, (), progress, "encoding train").parts),
        joined(trained.parts(split_directory(config, "validation"), None, (), progress, "encoding validation").parts),
        held_out,
    ]
    if rank() > 0:
        return broadcast_object({})
    found = {}
    for done, (name, parts) in enumerate(wanted.items()):
        progress("probes", done, len(wanted))
        train, validation, test = (_probed(split, parts, list(config.modalities)) for split in splits)
        for split, samples in (("training", train), ("validation", validation), ("evaluated", test)):
            if not samples.samples:
                raise ValueError(f"--probe {name}: no sample of the {split} split has {' and '.join(parts)}")
        result = logistic_probe(train, validation, test)
        hits = torch.from_numpy(result.hits).double()
        (spread,) = bootstrap_means([hits], config.evaluation.resamples, config.seed)
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


__all__ = ["METRICS", "RESULTS", "evaluate_run", "format_results"]
