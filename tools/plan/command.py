"""From the options of `symile-dist plan` to a plan."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those beside CONFIG, key=value and --json."""
    parser.add_argument("--nodes", type=int, default=1, help="how many machines (1)")
    parser.add_argument(
        "--gpus-per-node", type=int, help="ranks of each (8; of a calibrated CPU as many as were measured)"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="device from the table, such as H200 or A100; cpu with --calibration"
    )
    parser.add_argument("--calibration", metavar="FILE", help="what `benchmark calibrate` wrote, in place of the table")
    parser.add_argument("--epochs", type=float, help="in place of train.steps")
    parser.add_argument("--samples", type=int, help="of the training data, where its index cannot be reached here")
    parser.add_argument(
        "--shape",
        metavar="MODALITY=SIZES",
        action="append",
        default=[],
        help="of a sample, where the data cannot be read here: image=3x224x224; may be repeated",
    )
    parser.add_argument("--price-per-gpu-hour", type=float, help="for the cost")
    parser.add_argument(
        "--sweep",
        metavar="KEY=VALUES",
        nargs="+",
        default=[],
        help="every combination: batch=4096,8192 zero_stage=1,2,3 nodes=1,2,4 micro_batch_size=64,128",
    )
    parser.add_argument("--figure", metavar="FILE", help="draw the sweep: .png or .svg")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], Callable[[], str]]:
    """The plan as JSON, and a function that makes the text. Raises ValueError for every wrong use."""
    _check(options)
    from symile_dist.tools.plan.planner import Ask, Planner, parse_sweep
    from symile_dist.tools.plan.report import draw_sweep, plan_text, sweep_text

    device = _device(options)
    swept = parse_sweep(options.sweep)
    per_node = options.gpus_per_node or max(1, device.measured_ranks if device.kind == "cpu" else 8)
    ask = Ask(
        options.config,
        options.overrides,
        device,
        swept["nodes"][0] if "nodes" in swept else options.nodes,
        per_node,
        _shapes(options.shape),
        options.samples,
        options.epochs,
        options.price_per_gpu_hour,
    )
    if not swept:
        plan = Planner(ask).plan(ask.nodes)
        return plan, lambda: plan_text(plan)
    planner = Planner(ask, sweeps=True)
    rows = planner.sweep(swept)
    names = list(swept)
    result = {
        "config": options.config,
        "device": {"name": device.name, "source": device.source, "memory_bytes": device.memory_bytes},
        "gpus_per_node": per_node,
        "swept": swept,
        "rows": rows,
    }
    if options.figure:
        draw_sweep(rows, names, device.memory_bytes, Path(options.figure))
    return result, lambda: sweep_text(rows, names)


def _check(options: argparse.Namespace) -> None:
    for name in ("nodes", "gpus_per_node", "samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: should be 1 or more")
    for name in ("epochs", "price_per_gpu_hour"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: should be more than 0")
    if options.figure:
        if not options.sweep:
            raise ValueError("--figure draws a sweep: say --sweep too, e.g. --sweep nodes=1,2,4,8")
        file = Path(options.figure)
        if file.suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"--figure {file}: should end in .png or .svg")
        if not file.parent.is_dir():
            raise ValueError(f"--figure {file}: there is no folder {file.parent}")


def _device(options: argparse.Namespace) -> Any:
    from symile_dist.tools.plan.hardware import device_named, read_calibration

    if options.calibration:
        links = None if options.gpu in (None, "cpu") else device_named(options.gpu)
        return read_calibration(Path(options.calibration), links)
    if not options.gpu:
        raise ValueError("--gpu: name a device, such as H200, or give --calibration FILE")
    if options.gpu.lower() == "cpu":
        raise ValueError(
            "--gpu cpu: CPUs differ too much for a table; measure one by `symile-dist benchmark calibrate --out "
            "FILE.json`, and give --calibration FILE.json"
        )
    return device_named(options.gpu)


def _shapes(words: list[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, equals, sizes = word.partition("=")
        if not equals:
            raise ValueError(f"--shape {word}: should be MODALITY=SIZES, such as image=3x224x224")
        found[name] = sizes
    return found


__all__ = ["add_arguments", "run"]
