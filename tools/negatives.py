"""`symile-dist benchmark negatives`: what negatives are worth, trained on M3-digits at equal CPU time.

Each strategy trains the demo's encoders for as many steps as fit into the same CPU seconds, once per seed, in this
process, and is judged by retrieval on the test split.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from symile_dist import gradcache
from symile_dist.config import Config
from symile_dist.data.demo import make_demo
from symile_dist.data.loader import Loader, open_training, open_validation
from symile_dist.model import TrainingModule
from symile_dist.optim import learning_rate_factor, make_optimizer
from symile_dist.tools.demo import DIRECTION, demo_config
from symile_dist.tools.progress import progress_bar
from symile_dist.validate import accuracies, held_out_pass, similarity_of

STRATEGIES = ("n", "sheets", "n_squared")
CALIBRATION_STEPS = 6


def compare_negatives(
    data: Path, cpu_seconds: float, global_batch_size: int, seeds: int, threads: int, languages: int = 5
) -> dict[str, Any]:
    """Trains every strategy with every seed; returns the runs and, per strategy, mean and standard error.

    Args:
        data: folder of the demo's shards, made when it is not there.
        cpu_seconds: of all threads together, for each run.

    Raises ValueError for a budget in which no strategy could take a step.
    """
    if seeds < 2:
        raise ValueError(f"--seeds {seeds}: a standard error needs two or more")
    if not 0 < cpu_seconds < math.inf:
        raise ValueError(f"--cpu-seconds {cpu_seconds:g}: should be more than 0, and finite")
    if threads < 1:
        raise ValueError(f"--threads {threads}: should be 1 or more")
    if not 2 <= global_batch_size <= 2_000:
        raise ValueError(f"--global-batch-size {global_batch_size}: should be 2 to 2000, the size of the test split")
    torch.set_num_threads(threads)
    with progress_bar("making demo data") as progress:
        make_demo(data, languages=languages, train=20_000, val=2_000, test=2_000, progress=progress)
    runs: list[dict[str, Any]] = []
    with progress_bar("training") as progress:
        total = len(STRATEGIES) * seeds
        for seed in range(seeds):
            for strategy in STRATEGIES:
                progress(f"{total} runs", len(runs), total)
                runs.append(_run(data, strategy, seed, cpu_seconds, global_batch_size))
    return {
        "direction": DIRECTION,
        "global_batch_size": global_batch_size,
        "cpu_seconds": cpu_seconds,
        "threads": threads,
        "runs": runs,
        "strategies": {strategy: _summary(runs, strategy) for strategy in STRATEGIES},
    }


def _summary(runs: list[dict[str, Any]], strategy: str) -> dict[str, Any]:
    of_strategy = [run for run in runs if run["negative_sampling"] == strategy]
    accuracy = [run["accuracy"] for run in of_strategy]
    return {
        "accuracy": statistics.mean(accuracy),
        "standard_error": statistics.stdev(accuracy) / math.sqrt(len(accuracy)),
        "steps": statistics.mean(run["steps"] for run in of_strategy),
        "cpu_seconds": statistics.mean(run["cpu_seconds"] for run in of_strategy),
    }


def _config(data: Path, strategy: str, seed: int, global_batch_size: int, steps: int) -> Config:
    base = demo_config(data, data, "symile", quick=False)
    options: dict[str, Any] = {"negative_sampling": strategy}
    if strategy == "sheets":
        options["sheets"] = max(2, global_batch_size // 16)
    content = base.model_dump()
    content |= {"seed": seed, "objective": {"name": "symile", **options}}
    content["train"] |= {"steps": steps, "global_batch_size": global_batch_size}
    content["optimizer"]["warmup_steps"] = steps // 6
    content["ray"]["num_workers"] = 1
    content["data"]["loader_processes"] = 0  # in this process, so that decoding is in its CPU time
    return Config.model_validate(content)


def _run(data: Path, strategy: str, seed: int, cpu_seconds: float, global_batch_size: int) -> dict[str, Any]:
    trial = _config(data, strategy, seed, global_batch_size, CALIBRATION_STEPS)
    _train(trial)  # what the first steps cost is no measure of the others
    _, cost = _train(trial)
    steps = int(cpu_seconds / (cost / (CALIBRATION_STEPS - 1)))  # the first batch is read before the clock starts
    if steps < 1:
        raise ValueError(f"{cpu_seconds:g} CPU seconds are less than one step of '{strategy}' takes; give more")
    config = _config(data, strategy, seed, global_batch_size, steps)
    module, used = _train(config)
    return {
        "negative_sampling": strategy,
        "seed": seed,
        "steps": steps,
        "cpu_seconds": used,
        "accuracy": _accuracy(config, module),
    }


def _train(config: Config) -> tuple[TrainingModule, float]:
    """The trained module and the CPU seconds that its steps took."""
    torch.manual_seed(config.seed)
    module = TrainingModule(config)
    optimizer = make_optimizer(module, config)
    begin = time.process_time()
    for step, batch in enumerate(open_training(config, rank=0, start_step=0)):
        if step == 0:
            begin = time.process_time()  # opening the shards is not part of a step
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(config.optimizer, step, config.train.steps)
        optimizer.zero_grad()
        module(batch, step).loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
    return module, time.process_time() - begin


def _accuracy(config: Config, module: TrainingModule) -> float:
    assert config.data.test is not None
    directory = config.data.test
    # Retrieval needs no loss: O(N) negatives cost least.
    config = config.model_copy(update={"objective": type(config.objective)(name="symile")})
    dataset, steps = open_validation(config, directory, 0, None)
    evaluated = TrainingModule(config)
    evaluated.load_state_dict(module.state_dict())
    evaluated.eval()

    def forward(batch: Any, step: int) -> Any:
        return gradcache.forward(
            lambda part: evaluated(part, None), evaluated, batch, step, size=config.encoded_at_once
        )

    held_out = held_out_pass(forward, Loader(dataset, config, 0, steps))
    values = accuracies(similarity_of(evaluated.objective), held_out, list(config.modalities))
    return values[f"accuracy/{DIRECTION}"]


def negatives_markdown(results: dict[str, Any]) -> str:
    """The table for a page."""
    lines = ["| negatives | steps | CPU seconds | image from (audio, text), mean ± SE |", "|---|---|---|---|"]
    for strategy, row in results["strategies"].items():
        lines.append(
            f"| `{strategy}` | {row['steps']:.0f} | {row['cpu_seconds']:.0f} | {row['accuracy']:.3f} ± "
            f"{row['standard_error']:.3f} |"
        )
    return "\n".join(lines) + "\n"
