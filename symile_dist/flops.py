"""What a rank's device has, and how many floating-point operations a sample needs of it."""

from __future__ import annotations

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from symile_dist.config import Config
from symile_dist.devices import peak_flops
from symile_dist.engine import Engine
from symile_dist.types import Batch

ROWS = 2


def device_facts(device: torch.device, config: Config) -> dict[str, float]:
    """`resident` bytes of this process; on a GPU its memory and peak (see DEVICE_GAUGES in metrics/recorder.py)."""
    facts = {"resident": float(psutil.Process().memory_info().rss)}
    if device.type != "cuda":
        return facts
    statistics = torch.cuda.memory_stats(device)
    facts |= {
        "memory_allocated": statistics["allocated_bytes.all.current"],
        "memory_reserved": statistics["reserved_bytes.all.current"],
        "memory_peak": statistics["allocated_bytes.all.peak"],
        "out_of_memory": statistics["num_ooms"],
    }
    train = config.train
    peak = peak_flops(torch.cuda.get_device_name(device), train.precision, train.float32_matmul_precision)
    return facts | ({"peak_flops": peak} if peak else {})


def flops_per_sample(engine: Engine, batch: Batch) -> tuple[float, str]:
    """Of the encoders, forward and backward, counted on the first rows of a batch; all ranks call it, in step.

    Returns 0 and why where they cannot be counted, by encoders that take no such few rows, say.

    Products and convolutions only, as torch counts them, and nothing twice that the step computes twice (two passes,
    activation checkpointing). A backward pass needs twice the forward's; a frozen encoder needs none. The objective is
    left out: beside encoders worth counting it is small.
    """
    rows = batch.rows(slice(0, ROWS))
    devices = [engine.device] if engine.device.type == "cuda" else []
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
        engine.train(False)
        try:
            with counter:
                engine.encode(rows)
        except Exception as error:  # on all ranks alike, as they have the same encoders and as many rows
            return 0.0, str(error)
        finally:
            engine.train(True)
    total = 3.0 * counter.get_total_flops()
    for name, operations in counter.get_flop_counts().items():
        encoder = engine.module.model.encoders
        part = name.rpartition("encoders.")[2]
        if "encoders." in name and part in encoder and not any(p.requires_grad for p in encoder[part].parameters()):
            total -= 2.0 * sum(operations.values())
    return total / len(rows), ""
