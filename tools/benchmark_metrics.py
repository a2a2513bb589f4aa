"""What watching costs: the seconds of a training step that go into metrics, history and signs of health."""

from __future__ import annotations

import os
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.table import Table

from symile_dist import flops, spans, train
from symile_dist.config import Config, parse_config
from symile_dist.engine import Engine
from symile_dist.metrics import ranks
from symile_dist.metrics.exporter import Exporter
from symile_dist.metrics.history import History
from symile_dist.metrics.recorder import Recorder
from symile_dist.step import train_step
from symile_dist.tools.parity import on_ranks
from symile_dist.tools.plan.calibrate import CONVNETS, SHAPES
from symile_dist.tools.plan.shapes import make_batch
from symile_dist.types import ReadCounts
from symile_dist.validate import embeddings_of, similarity_of
from symile_dist.vitals import SHARE, Vitals

WARM_UP = 5
SCRAPE_SECONDS = 15.0
"""From one scrape of a rank to the next."""
MARKS = 10_000
RECORDER = (
    "count_step",
    "tell_step",
    "count_data",
    "own_speed",
    "publish_ranks",
    "efficiency",
    "tell_device",
    "train_record",
)


class _Meter:
    """Adds up the seconds that functions take, each without those within."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._within = [0.0]

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            self._within.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                passed = time.perf_counter() - begin
                self.seconds[name] += passed - self._within.pop()
                self._within[-1] += passed

        return timed


def benchmark_metrics(world_size: int = 2, steps: int = 60, log_every: int = 10) -> dict[str, Any]:
    """Trains the demo's encoders on random samples as the loop does, with everything that watches it under a clock.

    Returns seconds of rank 0 per step, by what they were spent on, and `share`, their sum over the step's seconds.
    Raises ValueError for numbers that make no run.
    """
    if world_size < 1 or steps < log_every or log_every < 1:
        raise ValueError("--world-size should be 1 or more, --steps at least --log-every, and that 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        return on_ranks(_measure, world_size, folder, steps, log_every)[0]


def _measure(folder: str, steps: int, log_every: int) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world))
    overrides = [f"ray.num_workers={world}", f"train.log_every={log_every}", f"run.directory={folder}"]
    config = parse_config(CONVNETS, "benchmark", overrides).config
    engine = Engine(config, torch.device("cpu"))
    meter = _Meter()
    exporter = Exporter(label_values={"modality": list(config.modalities), "dataset": ["train"]})
    recorder = Recorder(exporter, History(Path(folder)) if rank == 0 else None)
    for name in RECORDER:
        setattr(recorder, name, meter.around(name, getattr(recorder, name)))
    ranks.gathered = meter.around("gathered", ranks.gathered)
    ranks.summary = meter.around("summary", ranks.summary)
    train.device_facts = meter.around("device_facts", flops.device_facts)
    vitals = Vitals(similarity_of(engine.module.objective), embeddings_of(engine.module.objective))
    looks: list[float] = []
    vitals.look = _clocked(vitals.look, looks)  # type: ignore[method-assign]
    spans.use(recorder.spans)
    passed = _train(config, engine, recorder, vitals, steps, log_every, meter)
    seconds = {name: each / steps for name, each in meter.seconds.items()}
    seconds["marks"] = _mark_seconds() * _marks_per_step(config)
    # Whatever a look takes, so much of the time it may take in all.
    seconds["vitals"] = SHARE * passed / steps
    scrape = _scrape_seconds(exporter)
    seconds["scrapes"] = scrape * (passed / steps) / SCRAPE_SECONDS
    background = _logger_seconds(Path(folder) / "loggers") / log_every
    recorder.close()
    dist.barrier()
    step_seconds = passed / steps
    return {
        "world_size": world,
        "steps": steps,
        "log_every": log_every,
        "step_seconds": step_seconds,
        "seconds": seconds | {"tensorboard": background},
        "look_seconds": max(looks, default=0.0),
        "scrape_seconds": scrape,
        "share": (sum(seconds.values()) + background) / step_seconds,
    }


def _clocked(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def clocked(*arguments: Any) -> Any:
        begin = time.perf_counter()
        found = function(*arguments)
        seconds.append(time.perf_counter() - begin)
        return found

    return clocked


def _train(
    config: Config, engine: Engine, recorder: Recorder, vitals: Vitals, steps: int, log_every: int, meter: _Meter
) -> float:
    """Seconds of all steps, as the loop takes them."""
    batch = make_batch(SHAPES["convnets"], config.train.global_batch_size // config.world_size, "cpu")
    batch.read = ReadCounts(bytes=10**6, shards_opened=1, samples={"train": len(batch)}, missing={"text": 1})
    loader: Any = SimpleNamespace(queue_depth=2, fetch_counters=dict)
    state, begin = train.TrainState(), 0.0
    trained = train_step(engine, batch, 0, recorder)
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            train._log(config, engine, state, batch, trained, loader, recorder, vitals)  # counts operations, once
            recorder.spans.take()
            meter.seconds.clear()
            begin = time.perf_counter()
        step_begin = time.perf_counter()
        trained = train_step(engine, batch, number, recorder)
        wishes = {"stop": False, "save": False}
        train._count(config, engine, state, batch, None, loader, recorder, time.perf_counter() - step_begin, wishes)
        recorder.tell_step(float(trained.loss), trained.result.grad_norm)
        if number >= WARM_UP and (number - WARM_UP + 1) % log_every == 0:
            train._log(config, engine, state, batch, trained, loader, recorder, vitals)
    return time.perf_counter() - begin


def _mark_seconds() -> float:
    """Of one phase: two marks."""
    clock = spans.Spans()
    begin = time.perf_counter()
    for _ in range(MARKS):
        with clock.phase("forward"):
            pass
    return (time.perf_counter() - begin) / MARKS


def _marks_per_step(config: Config) -> int:
    """Phases and collectives of a step: the loop's, and of the objective two collectives a modality at most."""
    return 8 + 2 * len(config.modalities)


def _scrape_seconds(exporter: Exporter, repeats: int = 10) -> float:
    assert exporter.url is not None
    begin = time.perf_counter()
    for _ in range(repeats):
        urllib.request.urlopen(exporter.url, timeout=10).read()
    return (time.perf_counter() - begin) / repeats


def _logger_seconds(folder: Path, records: int = 200) -> float:
    """What a record costs the threads that write it behind the loop."""
    values = {f"value/{number}": float(number) for number in range(25)}
    begin = time.process_time()
    history = History(folder)
    for step in range(records):
        history.write("train", step, **values)  # type: ignore[arg-type]
    history.close()
    return (time.process_time() - begin) / records


def metrics_table(results: dict[str, Any]) -> Table:
    """For a terminal."""
    step = results["step_seconds"]
    title = f"Watching a run: rank 0 of {results['world_size']}, steps of {1e3 * step:.0f} ms"
    table = Table(box=box.SIMPLE, title=title)
    table.add_column("")
    table.add_column("microseconds a step", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in sorted(results["seconds"].items(), key=lambda item: -item[1]):
        table.add_row(name, f"{1e6 * seconds:.1f}", f"{seconds / step:.3%}")
    table.add_row("together", f"{1e6 * results['share'] * step:.1f}", f"{results['share']:.3%}")
    return table
