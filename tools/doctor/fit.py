"""The config against its data: shapes, modalities, one forward pass; and what a rank will need."""

from __future__ import annotations

import time
from collections.abc import Iterator

from symile_dist.config import Config
from symile_dist.preflight import preflight
from symile_dist.registry import ENCODERS, resolve
from symile_dist.tools.doctor.finding import Finding, fail, ok, warn

SAMPLES = 4


def config_fits(config: Config) -> Iterator[Finding]:
    """What `train` checks before it begins, with what the run's directory holds."""
    try:
        warnings = preflight(config)
    except ValueError as error:
        for line in str(error).splitlines():
            yield fail("config", line, "see the message; `symile-dist config explain CONFIG` tells every key")
        return
    for words in warnings:
        yield warn("data", words, "symile-dist shards verify")
    yield ok("config", f"{len(config.modalities)} modalities over {len(config.data.train)} datasets, batch divides")


def takes_long(config: Config) -> bool:
    """Whether an encoder brings weights from elsewhere, which may be gigabytes."""
    encoders = [resolve(modality.encoder.name, ENCODERS, "encoder") for modality in config.modalities.values()]
    return any(hasattr(encoder, "check") for encoder in encoders)


def forward_works(config: Config) -> Iterator[Finding]:
    """A few samples through every decoder, transform and encoder, and the objective, on the CPU."""
    import torch

    from symile_dist.data.loader import open_training
    from symile_dist.model import TrainingModule

    few = config.model_copy(
        update={
            "train": config.train.model_copy(update={"global_batch_size": SAMPLES, "steps": 1}),
            "ray": config.ray.model_copy(update={"num_workers": 1, "min_workers": None}),
            "data": config.data.model_copy(update={"lanes": None, "loader_processes": 0}),
        }
    )
    begin = time.perf_counter()
    batch = next(iter(open_training(few, rank=0, start_step=0)))
    read = time.perf_counter() - begin
    module = TrainingModule(few).eval()
    begin = time.perf_counter()
    with torch.no_grad():
        outputs = module.model(batch)
    seconds = time.perf_counter() - begin
    shapes = []
    for name in config.modalities:
        given = batch.inputs[name]
        shapes.append(f"{name} {tuple(given.shape[1:])}" if isinstance(given, torch.Tensor) else name)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    bad = [name for name, emitted in outputs.representations.items() if not _finite(emitted)]
    words = f"{SAMPLES} samples read in {read:.2f} s, encoded in {seconds:.2f} s: {', '.join(shapes)}; "
    words += f"{parameters:,} parameters"
    if bad:
        yield fail(
            "forward", f"{words}; not finite: {', '.join(bad)}", "look at the transform and the encoder's weights"
        )
    else:
        yield ok("forward", words)


def _finite(emitted: object) -> bool:
    import torch

    parts = emitted if isinstance(emitted, tuple) else (emitted,)
    return all(bool(torch.isfinite(part).all()) for part in parts if isinstance(part, torch.Tensor))
