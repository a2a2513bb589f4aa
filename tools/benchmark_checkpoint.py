"""What a save costs the step loop: the stall of a save behind the loop beside that of one that is waited for."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.table import Table

from symile_dist.checkpoint.interval import SaveInterval
from symile_dist.checkpoint.manager import CheckpointManager, Saved
from symile_dist.config import parse_config
from symile_dist.engine import Engine
from symile_dist.types import Batch

INPUT, BATCH = 256, 16
STEPS_BETWEEN = 8
CONFIG = """
run: {{name: benchmark, directory: {directory}}}
data: {{train: none}}
modalities:
  a: {{member: npy, decoder: npy, transform: tensor, encoder: {encoder}}}
  b: {{member: npy, decoder: npy, transform: tensor, encoder: {encoder}}}
  c: {{member: npy, decoder: npy, transform: tensor, encoder: {encoder}}}
model: {{embedding_dim: 256, logit_scale_init: -1}}
checkpoint: {{every: auto}}
train: {{steps: 1000000, global_batch_size: {batch}, zero_stage: 1}}
"""


def benchmark_checkpoint(megabytes: int = 200, repeats: int = 5, out: str | None = None) -> dict[str, Any]:
    """Saves a training state of so many MB by one rank, in turn behind the loop and waited for.

    Behind the loop, steps are taken while the save is on its way, as in training. Returns medians in seconds and
    `ratio`, the stall of a save behind the loop over the seconds of one that is waited for.
    """
    if megabytes < 1 or repeats < 1:
        raise ValueError("--megabytes and --repeats should be 1 or more")
    # Weights and two moments, in fp32, of three encoders of two square layers.
    width = max(8, round((megabytes * 1e6 / (3 * 4 * 3 * 2)) ** 0.5))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        encoder = f"{{name: mlp, input_dim: {INPUT}, hidden: [{width}, {width}, {width}]}}"
        text = CONFIG.format(directory=Path(folder) / "run", encoder=encoder, batch=BATCH)
        config = parse_config(text, "benchmark").config
        engine, manager = Engine(config, torch.device("cpu")), CheckpointManager(config)
        step = 0
        stalls: list[float] = []
        intervals: list[float] = []
        costs: list[float] = []
        waited: list[float] = []
        step_seconds: list[float] = []
        for _ in range(repeats + 1):
            step_seconds.append(_step(engine, step))
            begin = time.perf_counter()
            manager.save(engine, step + 1, {}, {}, wait=True)
            waited.append(time.perf_counter() - begin)
            step_seconds.append(_step(engine, step + 1))
            manager.news()
            interval = SaveInterval(config.checkpoint, 1, 0.0)
            for _ in range(STEPS_BETWEEN):
                interval.stepped(_step(engine, step + 2), saving=False)
            interval.saved(0.0, manager.save(engine, step + 2, {}, {}))
            ended: list[Saved] = []
            while not ended:
                interval.stepped(_step(engine, step + 2), saving=True)
                ended = manager.news()
            stalls.append(ended[0].stall)
            costs.append(interval.cost())
            intervals.append(interval.seconds() or math.inf)
            step += 3
        manager.finish()
        size = sum(tensor.numel() * tensor.element_size() for tensor in engine.saved_state()[0].values())
    # The first ones touch fresh memory.
    stall, wait = statistics.median(stalls[1:]), statistics.median(waited[1:])
    return {
        "bytes": size,
        "step_seconds": statistics.median(step_seconds[2:]),
        "stall_seconds": stall,
        "first_stall_seconds": stalls[0],
        "waited_seconds": wait,
        "ratio": stall / wait,
        "cost_seconds": statistics.median(costs[1:]),
        "auto_interval_seconds": statistics.median(intervals[1:]),
        "auto_overhead": statistics.median(costs[1:]) / statistics.median(intervals[1:]),
        "repeats": repeats,
    }


def _step(engine: Engine, step: int) -> float:
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(step)
    inputs: dict[str, Any] = {name: torch.randn(BATCH, INPUT, generator=generator) for name in "abc"}
    everything = torch.ones(BATCH, 3, dtype=torch.bool)
    report = engine.forward(Batch(inputs, everything, everything[:, 0], torch.arange(BATCH)), step)
    engine.backward(report.loss)
    engine.step(step)
    return time.perf_counter() - begin


def checkpoint_table(results: dict[str, Any]) -> Table:
    """For a terminal."""
    title = f"Saving {results['bytes'] / 1e6:.0f} MB, one rank, median of {results['repeats']}"
    table = Table(box=box.SIMPLE, title=title)
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_row("a save that is waited for", f"{results['waited_seconds']:.3f}")
    table.add_row("stall of a save behind the loop", f"{results['stall_seconds']:.4f}")
    table.add_row("the first stall, in fresh memory", f"{results['first_stall_seconds']:.4f}")
    table.add_row("a training step", f"{results['step_seconds']:.3f}")
    table.add_row("stall / waited for", f"{results['ratio']:.1%}")
    table.add_row("what a save costs: stall, and slower steps beside it", f"{results['cost_seconds']:.3f}")
    table.add_row("from save to save with checkpoint.every=auto", f"{results['auto_interval_seconds']:.0f}")
    table.add_row("its share of the time", f"{results['auto_overhead']:.2%}")
    return table
