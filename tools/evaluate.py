"""`symile-dist evaluate`: zero-shot retrieval of a run's checkpoint, in every direction."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from symile_dist import gradcache
from symile_dist.checkpoint.manifest import (
    CHECKPOINTS,
    CheckpointError,
    complete_checkpoints,
    folder_name,
    read_manifest,
)
from symile_dist.checkpoint.reshape import consolidated_weights
from symile_dist.config import Component, Config
from symile_dist.data.loader import Loader, open_validation
from symile_dist.evaluation.retrieval import bootstrap_accuracy, class_numbers, directions, retrieval_accuracy
from symile_dist.model import TrainingModule
from symile_dist.run_directory import CONFIG_FILE, load_run
from symile_dist.storage import write_json, write_text
from symile_dist.types import Batch
from symile_dist.validate import bound_values, held_out_pass, similarity_of


def find_checkpoint(config: Config, step: str) -> Path:
    """The folder of a checkpoint: of a step by number, the `latest`, or the `best` by validation.

    Raises CheckpointError when it is not there, naming those that are.
    """
    complete = dict(complete_checkpoints(config.run_directory / CHECKPOINTS))
    if not complete:
        raise CheckpointError(f"{config.run_directory}: has no complete checkpoint yet")
    newest = max(complete)
    if step == "latest":
        return complete[newest]
    if step == "best":
        best = read_manifest(complete[newest]).train_state.get("best_step")
        if best not in complete:
            raise CheckpointError(
                f"{config.run_directory}: the best step by validation ({best}) has no checkpoint; let "
                "validation.every be a multiple of checkpoint.every, or name a step"
            )
        return complete[best]
    if not step.isdecimal() or int(step) not in complete:
        known = ", ".join(str(number) for number in sorted(complete))
        raise CheckpointError(f"no checkpoint of step {step}; there are: {known} (or `latest`, `best`)")
    return complete[int(step)]


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


def _batches(config: Config, directory: str) -> Iterator[Batch]:
    dataset, steps = open_validation(config, directory, rank=0, max_samples=None)
    return iter(Loader(dataset, config, 0, steps))


def evaluate_run(
    run: str | Path, step: str = "latest", split: str = "test", resamples: int = 10, write: bool = True
) -> dict[str, Any]:
    """Evaluates a run's checkpoint on this machine, in one process; writes RUN/evaluation/SPLIT-step-*.json and .md.

    Returns for every direction the accuracy over the whole split (candidates are all samples of the split, a hit is a
    candidate of the query's class) and the bootstrap's mean and standard error; the loss; where the objective has it,
    the total-correlation bound with its ceiling.

    Raises ValueError for a run, step or split that does not exist, CheckpointError for a damaged checkpoint.
    """
    if resamples < 2:
        raise ValueError(f"--resamples {resamples}: a standard error needs two or more")
    trained = load_run(run)
    # One process reads what all ranks read together.
    config = trained.model_copy(update={"ray": trained.ray.model_copy(update={"num_workers": 1})})
    if config.objective.options.get("backend") == "triton":  # evaluation is on the CPU; the loss is the same
        options = config.objective.options | {"backend": "auto"}
        config = config.model_copy(update={"objective": Component(name=config.objective.name, **options)})
    folder = find_checkpoint(config, step)
    directory = split_directory(config, split)
    batches = _batches(config, directory)
    module = TrainingModule(config)
    weights = consolidated_weights(folder)
    missing = [name for name, _ in module.named_parameters() if name not in weights]
    unknown = [name for name in weights if name not in module.state_dict()]
    if missing or unknown:
        raise CheckpointError(
            f"{folder}: was made by another model than {config.run_directory / CONFIG_FILE} describes; "
            f"lacking: {', '.join(missing[:3]) or 'none'}; unknown: {', '.join(unknown[:3]) or 'none'}"
        )
    try:
        module.load_state_dict(weights, strict=False)  # buffers such as filter banks are made, not saved
    except RuntimeError as mismatch:  # of sizes
        raise CheckpointError(
            f"{folder}: was made by another model than the run's config describes: {mismatch}"
        ) from None
    module.eval()
    begin = time.perf_counter()
    # As many samples at once as a rank held in training.
    forward = partial(gradcache.forward, partial(module, step=None), module, size=trained.encoded_at_once)
    held_out = held_out_pass(forward, batches)
    similarity = similarity_of(module.objective)
    classes = class_numbers(held_out.labels)
    results: dict[str, Any] = {
        "run": config.run.name,
        "step": read_manifest(folder).step,
        "split": split,
        "samples": len(classes),
        "classes": int(classes.max()) + 1,
        "loss": held_out.loss,
        **bound_values(module.objective, held_out, config.train.global_batch_size),
        "retrieval": {},
    }
    for direction in directions(list(config.modalities), pairs=True):
        accuracy = retrieval_accuracy(similarity, held_out.representations, classes, direction)
        mean, error = bootstrap_accuracy(
            similarity, held_out.representations, classes, direction, resamples, config.seed
        )
        results["retrieval"][str(direction)] = {
            "target": direction.target,
            "queries": list(direction.queries),
            "accuracy": accuracy,
            "bootstrap_mean": mean,
            "bootstrap_standard_error": error,
        }
    results["seconds"] = time.perf_counter() - begin
    if write:
        name = f"{split}-{folder_name(results['step'])}"
        write_json(config.run_directory / "evaluation" / f"{name}.json", results)
        write_text(config.run_directory / "evaluation" / f"{name}.md", format_results(results) + "\n")
    return results


def format_results(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    chance = 1 / results["classes"]
    lines = [
        f"run {results['run']}, step {results['step']}, {results['split']} split: {results['samples']} samples of "
        f"{results['classes']} classes (chance {chance:.3f})",
        "",
        "| retrieval | accuracy | bootstrap mean ± SE |",
        "|---|---|---|",
    ]
    for row in results["retrieval"].values():
        name = f"{row['target']} from {' + '.join(row['queries'])}"
        spread = f"{row['bootstrap_mean']:.4f} ± {row['bootstrap_standard_error']:.4f}"
        lines.append(f"| {name} | {row['accuracy']:.4f} | {spread} |")
    lines += ["", f"loss {results['loss']:.4f}"]
    if "total_correlation_bound" in results:
        lines[-1] += (
            f"; total correlation at least {results['total_correlation_bound']:.3f} nats "
            f"(this bound cannot exceed log N = {results['total_correlation_ceiling']:.3f})"
        )
    return "\n".join(lines)
