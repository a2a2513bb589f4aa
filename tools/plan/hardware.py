"""What devices can do: a table from their makers' data sheets, or a machine that `benchmark calibrate` has measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from symile_dist.devices import GPUS
from symile_dist.registry import suggestion

GIGA = 1e9
MATMUL_SHARE = 0.6
"""Assumed: of the peak, that the encoders' products and convolutions reach; single large ones reach 0.8."""
LOSS_SHARE = 0.5
"""Assumed: of the peak, that the loss's tiles reach: somewhat less than the encoders' products."""
MEMORY_SHARE = 0.8
"""Assumed: of the memory's bandwidth."""
LINK_SHARE = 0.8
"""Assumed: of the links' bandwidth."""
LATENCY = {"node": 15e-6, "nodes": 30e-6}
"""Assumed: seconds of a collective on nothing, within a node and between nodes, for two ranks."""
OPERATOR_SECONDS = 8e-6
"""Assumed: of the host, to start one kernel; a device that is done sooner waits."""
STEP_SECONDS = 5e-3
"""Assumed: of the host per step, beside operators: the loop and DeepSpeed."""
NODE_WRITE_BYTES = 2e9
"""Assumed: bytes per second that a node writes to its checkpoints' folder."""
HOST_COPY_BYTES = 2e10
"""Assumed: bytes per second from a device to the host's memory (PCIe 4 x16: 32 GB/s)."""


@dataclass(frozen=True)
class Device:
    """One rank's device and its surroundings; rates per second."""

    name: str
    kind: str
    """`cuda` or `cpu`."""
    memory_bytes: float
    matmul_flops: Mapping[str, float]
    """By precision, as reached."""
    convolution_flops: Mapping[str, float]
    loss_flops: Mapping[str, float]
    """Of the loss's tiles, by training precision."""
    memory_bandwidth: float
    """Bytes, as reached."""
    optimizer_bytes: float
    """Bytes of weights, gradients and moments that AdamW passes."""
    node_bandwidth: float
    """Bytes that a rank sends to others of its node, as reached."""
    network_bandwidth: float
    """Bytes that a rank sends to other nodes."""
    latency: Mapping[str, float]
    """Seconds of an empty collective between two ranks: of one `node`, of several `nodes`."""
    peak_flops: Mapping[str, float]
    """By precision, of the data sheet or, of a measured machine, the best product: what MFU relates to."""
    operator_seconds: float = OPERATOR_SECONDS
    step_seconds: float = STEP_SECONDS
    batch_share: float = 1.0
    """Of the speed that encoders and loss reach where they are timed alone, again and again, what they reach in a step:
    its memory is fresh, its caches are cold."""
    state_share: float = 1.0
    """The same of what is done with gradients and parameters, which DeepSpeed copies about."""
    write_bytes: float = NODE_WRITE_BYTES
    """Of a node, to checkpoints."""
    host_copy_bytes: float = HOST_COPY_BYTES
    synchronous: bool = False
    """An operator ends before the next begins: nothing hides the host's part of it."""
    collective_bandwidth: Mapping[str, float] = field(default_factory=dict)
    """Bytes on the wire by collective, where they were measured one by one."""
    measured_ranks: int = 0
    """How many ranks shared the machine when it was measured; 0: from the table."""
    source: str = ""
    assumptions: tuple[str, ...] = ()


def device_named(name: str) -> Device:
    """A GPU of the table. Raises ValueError for one that is not there."""
    known = {key.lower(): key for key in GPUS}
    if name.lower() not in known:
        raise ValueError(
            f"--gpu {name}: not in the table{suggestion(name, list(GPUS))} (it has {', '.join(GPUS)}). Any other "
            "machine: `symile-dist benchmark calibrate --out FILE.json` there, and `plan --calibration FILE.json`"
        )
    key = known[name.lower()]
    sheet = GPUS[key]
    tera = {"fp32": sheet.fp32, "high": sheet.tf32, "fp16": sheet.halves}
    if sheet.bf16:
        tera["bf16"] = sheet.halves
    peak = {precision: value * 1e12 for precision, value in tera.items()}
    reached = {precision: MATMUL_SHARE * value for precision, value in peak.items()}
    return Device(
        name=key,
        kind="cuda",
        memory_bytes=sheet.memory * GIGA,
        matmul_flops=reached,
        convolution_flops=reached,
        # Only bfloat16 is multiplied as it is.
        loss_flops={key: LOSS_SHARE * peak[key if key in ("bf16", "high") else "fp32"] for key in peak},
        memory_bandwidth=MEMORY_SHARE * sheet.bandwidth * GIGA,
        optimizer_bytes=MEMORY_SHARE * sheet.bandwidth * GIGA,
        node_bandwidth=LINK_SHARE * sheet.link * GIGA,
        network_bandwidth=LINK_SHARE * sheet.network * GIGA,
        latency=LATENCY,
        peak_flops=peak,
        source=sheet.source,
        assumptions=(
            f"matrix products reach {MATMUL_SHARE:.0%} of the peak, the loss's tiles {LOSS_SHARE:.0%}, memory and "
            f"links {MEMORY_SHARE:.0%}",
            f"the host starts a kernel in {OPERATOR_SECONDS * 1e6:.0f} us; loop and DeepSpeed take "
            f"{STEP_SECONDS * 1e3:.0f} ms a step",
            f"a node writes checkpoints at {NODE_WRITE_BYTES / GIGA:.0f} GB/s",
        ),
    )


def read_calibration(path: Path, links: Device | None = None) -> Device:
    """A machine that `benchmark calibrate` measured.

    Args:
        links: the device of the table whose links it has, where a single rank was measured.

    Raises ValueError for a file that is not there or is no such.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measured = device_of(content)
    except FileNotFoundError:
        raise ValueError(
            f"--calibration {path}: no such file; make it: symile-dist benchmark calibrate --out {path}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--calibration {path}: is not what `symile-dist benchmark calibrate` writes ({type(error).__name__}: "
            f"{error})"
        ) from None
    if links is None:
        return measured
    names = ("node_bandwidth", "network_bandwidth", "latency", "peak_flops")
    taken = {name: getattr(links, name) for name in names}
    source = f"{measured.source}; links and peak of {links.name}: {links.source}"
    return replace(measured, **taken, collective_bandwidth={}, source=source)


def device_of(measured: Mapping[str, Any]) -> Device:
    """From the figures of `calibrate.calibrate`. Raises KeyError or TypeError for what is none."""
    collectives = measured["collectives"]
    bandwidths = {name: float(one["bytes_per_s"]) for name, one in collectives.items()}
    # One rank alone has nobody to measure with; then there is nothing to send either.
    slowest = min(bandwidths.values(), default=math.inf)
    latency = max((float(one["latency_s"]) for one in collectives.values()), default=0.0)
    ranks = max(2, int(measured["ranks"]))
    per_two = latency / math.log2(ranks)
    matmul = {key: float(value) for key, value in measured["matmul_flops_per_s"].items()}
    return Device(
        name=str(measured["processor"]),
        kind=str(measured["device"]),
        memory_bytes=float(measured["memory_bytes"]),
        matmul_flops=matmul,
        convolution_flops={key: float(value) for key, value in measured["convolution_flops_per_s"].items()},
        loss_flops={key: float(value) for key, value in measured["loss_flops_per_s"].items()},
        memory_bandwidth=float(measured["memory_bytes_per_s"]),
        optimizer_bytes=float(measured["optimizer_bytes_per_s"]),
        node_bandwidth=slowest,
        network_bandwidth=slowest,
        latency={"node": per_two, "nodes": per_two},
        peak_flops=matmul,
        operator_seconds=float(measured["operator_s"]),
        step_seconds=float(measured["step_s"]),
        batch_share=float(measured["batch_share"]),
        state_share=float(measured["state_share"]),
        write_bytes=float(measured["write_bytes_per_s"]),
        host_copy_bytes=float(measured["memory_bytes_per_s"]),
        synchronous=str(measured["device"]) == "cpu",
        collective_bandwidth=bandwidths,
        measured_ranks=int(measured["ranks"]),
        source=f"measured by `symile-dist benchmark calibrate` with {measured['ranks']} rank(s) at once",
    )


def peak_of(rates: Mapping[str, float], precision: str, float32_matmul_precision: str, device: str) -> float:
    """A rate for a training precision. Raises ValueError for one that the device has not."""
    if precision == "fp32" and float32_matmul_precision != "highest" and "high" in rates:
        return rates["high"]
    if precision not in rates:
        raise ValueError(f"train.precision={precision}: {device} has no such arithmetic; there is {', '.join(rates)}")
    return rates[precision]


__all__ = ["GPUS", "Device", "device_named", "device_of", "peak_of", "read_calibration"]
