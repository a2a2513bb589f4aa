"""From the options of `symile-dist benchmark calibrate` to a machine's figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those beside --json."""
    parser.add_argument("--out", metavar="FILE", required=True, help="JSON, for `plan --calibration FILE`")
    parser.add_argument("--ranks", type=int, default=2, help="processes that measure at once, as they will train (2)")
    parser.add_argument("--threads", type=int, default=1, help="of each (1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what is measured")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison of plan with training")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], Callable[[], str]]:
    """The figures, and a function that makes the text. Raises ValueError for every wrong use."""
    from symile_dist.tools.plan.calibrate import calibrate

    found = calibrate(options.out, options.ranks, options.threads, options.device, check=not options.no_check)
    return found, lambda: calibration_text(found, options.out)


def calibration_text(found: Mapping[str, Any], out: str) -> str:
    from symile_dist.tools.plan.report import amount, duration

    lines = [
        f"{found['processor']}, torch {found['torch']}",
        f"{found['ranks']} rank(s) at once, {found['threads']} thread(s) each",
        *(f"products, {key}: {amount(value, 'FLOP/s')}" for key, value in found["matmul_flops_per_s"].items()),
        *(f"convolutions, {key}: {amount(value, 'FLOP/s')}" for key, value in found["convolution_flops_per_s"].items()),
        *(f"the loss's tiles, {key}: {amount(value, 'FLOP/s')}" for key, value in found["loss_flops_per_s"].items()),
        f"elementwise operators: {amount(found['memory_bytes_per_s'])}/s",
        f"AdamW: {amount(found['optimizer_bytes_per_s'])}/s",
        f"to start an operator: {duration(found['operator_s'])}; once per step: {duration(found['step_s'])}",
        f"in a step encoders and loss reach {found['batch_share']:.0%} of that, what is done with gradients and "
        f"parameters {found['state_share']:.0%}",
        f"writing: {amount(found['write_bytes_per_s'])}/s",
        *(
            f"{name}: {duration(one['latency_s'])} and {amount(one['bytes_per_s'])}/s"
            for name, one in found["collectives"].items()
        ),
        f"written to {out}: symile-dist plan CONFIG --gpu {found['device']} --calibration {out}",
    ]
    if found["check"]:
        lines += ["", "plan beside training, seconds of a step:"]
        lines += [
            f"{one['model']} {' '.join(one['overrides'])}: predicted {one['predicted_s']:.4g}, measured "
            f"{one['measured_s']:.4g} by the clock (ratio {one['ratio']:.2f}), {one['measured_cpu_s']:.4g} of CPU time "
            f"(ratio {one['ratio_to_cpu']:.2f})"
            for one in found["check"]
        ]
    return "\n".join(lines)


__all__ = ["add_arguments", "calibration_text", "run"]
