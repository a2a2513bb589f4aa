"""`symile-dist benchmark calibrate`: what this machine can do, in the terms of `plan`, and a check of plan by training.

All ranks measure at the same time, as they will train: cores and memory are shared. The check trains small models for
some steps through the real engine, and puts beside it what plan says of them with these figures.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from symile_dist.config import Config, parse_config
from symile_dist.objectives.exponentials import Weight
from symile_dist.objectives.negatives import draw_permutations
from symile_dist.objectives.permuted import Permuted
from symile_dist.storage import write_json
from symile_dist.tools.benchmark import free_memory, processor
from symile_dist.tools.parity import on_ranks
from symile_dist.tools.plan.collectives import Collective
from symile_dist.tools.plan.hardware import device_of
from symile_dist.tools.plan.meter import Meter
from symile_dist.tools.plan.objective import BACKWARD_WORK, FORWARD_WORK
from symile_dist.tools.plan.shapes import InputShape, make_batch
from symile_dist.tools.plan.time import ADAM_BYTES

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRODUCT = (256, 1024, 1024)
"""Rows, inputs and outputs of the linear map whose three products are timed."""
CONVOLUTIONS: list[tuple[tuple[int, ...], int, tuple[int, ...], Any]] = [
    ((64, 32, 8, 16), 64, (3, 3), F.conv2d),
    ((64, 64, 64), 64, (3,), F.conv1d),
]
"""Inputs, outputs, kernel: small images and sequences."""
ELEMENTS = 2**20
"""Of the tensors that elementwise operators and the optimizer are timed with."""
LOSS_SIZE, LOSS_DIMENSION = 512, 256
MESSAGE = 2**22
"""Bytes of the large message; the small one is a number."""
WRITTEN = 64 * 2**20
LAYERS, WIDTH = 24, 8
"""Of the network whose time is that of starting operators."""
BATCHES = 7
"""Of each clocked thing. The fastest counts, of training steps too: what else runs on the machine only adds to it."""
CHECK_STEPS, CHECK_WARM_UP = 20, 4

MLPS = """
run: {name: check}
data: {train: none, loader_processes: 0}
modalities:
  a: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 512, hidden: [1024, 1024]}}
  b: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 512, hidden: [1024]}}
  c: {member: npy, decoder: npy, transform: tensor, encoder: {name: mlp, input_dim: 512, hidden: [1024]}}
model: {embedding_dim: 256, logit_scale_init: -1}
train: {steps: 100, global_batch_size: 512}
deepspeed: {zero_optimization: {reduce_bucket_size: 4000000}}
"""
CONVNETS = """
run: {name: check}
data: {train: none, loader_processes: 0}
modalities:
  image: {member: png, decoder: image, transform: image, encoder: image_convnet}
  audio: {member: flac, decoder: audio, transform: waveform, encoder: audio_convnet}
  text: {member: txt, decoder: text, transform: characters, encoder: text_convnet}
model: {embedding_dim: 512, logit_scale_init: -5}
train: {steps: 100, global_batch_size: 256}
deepspeed: {zero_optimization: {reduce_bucket_size: 4000000}}
"""
SHAPES = {
    "mlps": {name: InputShape((512,), torch.float32, False, "check") for name in "abc"},
    "convnets": {
        "image": InputShape((1, 8, 16), torch.float32, False, "check"),
        "audio": InputShape((14000,), torch.float32, True, "check"),
        "text": InputShape((53,), torch.int64, True, "check"),
    },
}
TEXTS = {"mlps": MLPS, "convnets": CONVNETS}
FITTED: list[tuple[str, list[str]]] = [
    ("mlps", ["train.zero_stage=1", "train.global_batch_size=128"]),
    ("mlps", ["train.zero_stage=1", "train.global_batch_size=1024"]),
]
"""Trainings whose speeds give `Device.batch_share` and `state_share`; those below are compared with what follows."""
FITTED_CONVOLUTIONS = ["train.zero_stage=1", "train.global_batch_size=96"]
"""A training of convolutions, whose speed depends much on their shapes."""
CASES = [
    ("mlps", ["train.zero_stage=1"]),
    ("mlps", ["train.zero_stage=3"]),
    ("mlps", ["train.zero_stage=2", "train.micro_batch_size=64"]),
    ("convnets", ["train.zero_stage=1"]),
]
TINY = [
    *(f"modalities.{name}.encoder={{name: mlp, input_dim: 512}}" for name in "abc"),
    "model.embedding_dim=8",
    "train.global_batch_size=16",
]
"""Of `MLPS`: a step that is nothing but what the host does once per step."""


def calibrate(
    out: str | Path, ranks: int = 2, threads: int = 1, device: str = "cpu", check: bool = True
) -> dict[str, Any]:
    """Measures, writes the figures to `out` as JSON, and returns them. Rates are those of one rank.

    Args:
        check: train, too, and compare with what plan says.

    Raises ValueError for arguments that do not go, before anything is measured.
    """
    target = Path(out)
    _check_arguments(target, ranks, threads, device)
    target.parent.mkdir(parents=True, exist_ok=True)
    everyones = on_ranks(_measure, ranks, threads, device, str(target.parent))
    found: dict[str, Any] = {
        "processor": processor(device),
        "device": device,
        "ranks": ranks,
        "threads": threads,
        "torch": torch.__version__,
        # All ranks share the CPU's memory, a GPU is one rank's own.
        "memory_bytes": _memory(device) / (ranks if device == "cpu" else 1),
        **_medians(everyones),
    }
    found["write_bytes_per_s"] *= ranks  # of the node
    found |= {"step_s": 0.0, "batch_share": 1.0, "state_share": 1.0}
    if device == "cpu":
        tiny = _config("mlps", TINY, ranks)
        measured = on_ranks(_train, ranks, threads, tiny.to_yaml(), "mlps")[0]
        found["step_s"] = max(0.0, measured["clock_s"] - _predicted(tiny, "mlps", found)["step_s"])
        found |= _shares(found, ranks, threads)
        found["convolution_flops_per_s"] = _convolutions_in_steps(found, ranks, threads)
    found["check"] = []
    if check and device == "cpu":
        for name, overrides in CASES:
            config = _config(name, overrides, ranks)
            measured = on_ranks(_train, ranks, threads, config.to_yaml(), name)[0]
            predicted = _predicted(config, name, found)["step_s"]
            found["check"].append(
                {
                    "model": name,
                    "overrides": overrides,
                    "measured_s": measured["clock_s"],
                    "measured_cpu_s": measured["cpu_s"],
                    "predicted_s": predicted,
                    "ratio": predicted / measured["clock_s"],
                    "ratio_to_cpu": predicted / measured["cpu_s"],
                }
            )
    write_json(target, found)
    return found


def _check_arguments(target: Path, ranks: int, threads: int, device: str) -> None:
    for name, value in (("--ranks", ranks), ("--threads", threads)):
        if value < 1:
            raise ValueError(f"{name} {value}: should be 1 or more")
    if ranks > 64:
        raise ValueError(f"--ranks {ranks}: is a number of processes on this machine; 64 at most")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    if device == "cuda" and ranks > 1:
        raise ValueError("--device cuda measures one GPU: --ranks 1 (plan takes the links from --gpu NAME)")
    if target.is_dir():
        raise ValueError(f"--out {target}: is a folder; name a file")


def _memory(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    import psutil

    return float(psutil.virtual_memory().total) if math.isfinite(free_memory(device)) else 0.0


def _medians(everyones: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Number by number, over the ranks."""
    first = everyones[0]
    return {
        key: _medians([one[key] for one in everyones])
        if isinstance(first[key], dict)
        else statistics.median(one[key] for one in everyones)
        for key in first
    }


# -- on every rank ---------------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], Any], device: str, least: float = 0.15) -> float:
    """The fastest of some batches of back-to-back calls, per call, which take so many seconds together."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def batch(number: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(number):
            call()
        wait()
        return (time.perf_counter() - begin) / number

    once = max(1e-7, min(batch(1) for _ in range(3)))
    number = max(1, round(least / BATCHES / once))
    return min(batch(number) for _ in range(BATCHES))


def _measure(threads: int, device: str, folder: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    dist.barrier()
    return {
        "matmul_flops_per_s": {key: _products(kind, device) for key, kind in PRECISIONS.items()},
        "convolution_flops_per_s": {key: _convolutions(kind, device) for key, kind in PRECISIONS.items()},
        "memory_bytes_per_s": _elementwise(device),
        "loss_flops_per_s": {key: _loss(kind, device) for key, kind in PRECISIONS.items()},
        "optimizer_bytes_per_s": _optimizer(device),
        "operator_s": _operators(device),
        "write_bytes_per_s": _writing(folder),
        "collectives": _collectives() if dist.get_world_size() > 1 else {},
    }


def _products(kind: torch.dtype, device: str) -> float:
    """The three products of a linear map, forward and backward."""
    rows, inputs, outputs = PRODUCT
    x, w = torch.randn(rows, inputs, device=device, dtype=kind), torch.randn(outputs, inputs, device=device, dtype=kind)
    g = torch.randn(rows, outputs, device=device, dtype=kind)
    calls: list[Callable[[], Any]] = [lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x]
    return 6.0 * rows * inputs * outputs / sum(seconds_of(call, device) for call in calls)


def _convolutions(kind: torch.dtype, device: str) -> float:
    """Of images and of sequences, forward and backward."""
    work, seconds = 0.0, 0.0
    for shape, outputs, kernel, convolve in CONVOLUTIONS:
        x = torch.randn(shape, device=device, dtype=kind, requires_grad=True)
        w = torch.randn(outputs, shape[1], *kernel, device=device, dtype=kind, requires_grad=True)
        gradient = torch.ones_like(convolve(x, w, padding="same"))

        def both(x: Tensor = x, w: Tensor = w, gradient: Tensor = gradient, convolve: Any = convolve) -> None:
            convolve(x, w, padding="same").backward(gradient)

        work += 6.0 * gradient.numel() * shape[1] * math.prod(kernel)
        seconds += seconds_of(both, device)
    return work / seconds


def _elementwise(device: str) -> float:
    """Operators between the products: activations, sums, normalisations."""
    x, y = torch.randn(1024, ELEMENTS // 1024, device=device), torch.randn(1024, ELEMENTS // 1024, device=device)
    width = x.shape[1:]
    calls: list[tuple[int, Callable[[], Any]]] = [
        (3, lambda: x + y),
        (2, lambda: F.gelu(x)),
        (3, lambda: torch.ops.aten.gelu_backward(y, x)),
        (2, lambda: F.layer_norm(x, width)),
        (2, lambda: x.clone()),
    ]
    moved = 4.0 * ELEMENTS * sum(number for number, _ in calls)
    return moved / sum(seconds_of(call, device) for _, call in calls)


def _loss(kind: torch.dtype, device: str) -> float:
    """A rank's tiles of Symile's loss, forward and backward, without communication."""
    wide = kind if device == "cuda" else torch.float32  # as the loss has it
    n = max(1, LOSS_SIZE // dist.get_world_size())
    generator = torch.Generator().manual_seed(0)
    made = [F.normalize(torch.randn(LOSS_SIZE, LOSS_DIMENSION, generator=generator), dim=1) for _ in range(3)]
    own, *others = (tensor.to(device, wide) for tensor in made)
    own = own[:n].contiguous()
    permutations = draw_permutations(3, LOSS_SIZE, 0, 0, device=device)
    negatives = Permuted(0, None, permutations)
    scale = torch.tensor(10.0, device=device)
    of_own, of_others = negatives.log_sum_exp(own, others, scale)
    weights = [Weight(torch.full_like(of_own, 1e-3), of_own)]
    weights += [Weight(torch.full_like(one, 1e-3), one) for one in of_others]

    def both() -> None:
        negatives.log_sum_exp(own, others, scale)
        negatives.gradients(own, others, scale, weights)

    logits = 3.0 * n * LOSS_SIZE
    return (FORWARD_WORK + BACKWARD_WORK) * logits * LOSS_DIMENSION / seconds_of(both, device)


def _optimizer(device: str) -> float:
    weights = torch.zeros(ELEMENTS, device=device, requires_grad=True)
    weights.grad = torch.ones_like(weights)
    adam = torch.optim.AdamW([weights])
    return ADAM_BYTES * ELEMENTS / seconds_of(lambda: adam.step(), device)


def _operators(device: str) -> float:
    """What it takes to start one operator, forward or backward: of a deep network of next to no work."""
    layers: list[nn.Module] = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    network = nn.Sequential(*layers).to(device)
    x = torch.randn(2, WIDTH, device=device)

    def both() -> None:
        network(x).sum().backward()
        network.zero_grad()

    both()
    with Meter(device) as meter:
        both()
    return seconds_of(both, device) / len(meter.operations)


def _writing(folder: str) -> float:
    data = os.urandom(WRITTEN // 64) * 64
    with tempfile.TemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - begin)


def _collectives() -> dict[str, dict[str, float]]:
    """Latency of next to nothing, and bytes on the wire per second of a large message."""
    world = dist.get_world_size()
    large = MESSAGE // 4 // world * world

    def calls(elements: int) -> dict[str, tuple[Collective, Callable[[], Any]]]:
        whole, own = torch.zeros(elements), torch.zeros(elements // world)
        size = 4 * elements
        return {
            "all_reduce": (Collective("all_reduce", "float32", size, size), lambda: dist.all_reduce(whole)),
            "broadcast": (Collective("broadcast", "float32", size, size), lambda: dist.broadcast(whole, 0)),
            "all_gather_into_tensor": (
                Collective("all_gather_into_tensor", "float32", size, size // world),
                lambda: dist.all_gather_into_tensor(whole, own),
            ),
            "reduce_scatter_tensor": (
                Collective("reduce_scatter_tensor", "float32", size, size),
                lambda: dist.reduce_scatter_tensor(own, whole),
            ),
        }

    found = {}
    for name, (_, small) in calls(world).items():
        latency = _together(small, 100)
        call, big = calls(large)[name]
        seconds = _together(big, 10)
        found[name] = {
            "latency_s": latency,
            "bytes_per_s": call.wire_bytes(world) / max(1e-9, seconds - latency),
        }
    return found


def _together(call: Callable[[], Any], number: int) -> float:
    """Seconds per call, as `seconds_of`: all ranks make as many."""
    call()
    taken = []
    for _ in range(BATCHES):
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(number):
            call()
        taken.append((time.perf_counter() - begin) / number)
    return min(taken)


# -- the check -------------------------------------------------------------------------------------------------------


def _config(name: str, overrides: Sequence[str], ranks: int) -> Config:
    return parse_config(TEXTS[name], "check", [*overrides, f"ray.num_workers={ranks}"]).config


def _train(threads: int, text: str, name: str) -> dict[str, float]:
    """Seconds of the fastest step, its data at hand: by the clock, and of CPU time, which a busy machine does not
    lengthen (and which waiting for other ranks is no part of)."""
    from symile_dist.distributed import all_reduce_sum
    from symile_dist.engine import Engine
    from symile_dist.metrics.recorder import Recorder
    from symile_dist.step import train_step

    torch.set_num_threads(threads)
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK="0", WORLD_SIZE=str(dist.get_world_size()))
    config = parse_config(text, "check").config
    engine, recorder = Engine(config, torch.device("cpu")), Recorder()
    local = config.train.global_batch_size // config.world_size
    batch = make_batch(SHAPES[name], local, "cpu")
    for values in batch.inputs.values():
        tensor = values if isinstance(values, Tensor) else values.values
        if tensor.is_floating_point():
            tensor.normal_()
    taken = []
    for step in range(CHECK_WARM_UP + CHECK_STEPS):
        begin = time.perf_counter(), time.process_time()
        train_step(engine, batch, step, recorder)
        all_reduce_sum(torch.zeros(3, dtype=torch.int64))  # as the loop does
        taken.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    dist.barrier()  # whoever leaves earlier takes the others' connections away
    clock, cpu = (min(times) for times in zip(*taken[CHECK_WARM_UP:], strict=True))
    return {"clock_s": clock, "cpu_s": cpu}


def _shares(found: dict[str, Any], ranks: int, threads: int) -> dict[str, float]:
    """How fast a step's parts are beside themselves alone: what grows with the batch, and what does not. Two trainings
    that differ in their batch tell the two apart."""
    rows, seconds = [], []
    for name, overrides in FITTED:
        config = _config(name, overrides, ranks)
        parts = _predicted(config, name, found)
        batch = parts["forward_backward_s"] + parts["second_forward_s"] + parts["objective_s"]
        rows.append([batch, parts["step_s"] - found["step_s"] - batch])
        measured = on_ranks(_train, ranks, threads, config.to_yaml(), name)[0]
        seconds.append(measured["clock_s"] - found["step_s"])
    slower = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64))
    batch, state = (1.0 / min(10.0, max(0.5, float(each))) for each in slower)  # noise gives no more than this
    return {"batch_share": batch, "state_share": state}


def _convolutions_in_steps(found: dict[str, Any], ranks: int, threads: int) -> dict[str, float]:
    """Rates of convolutions with which a training of small networks takes as long as it did."""
    config = _config("convnets", FITTED_CONVOLUTIONS, ranks)
    measured = on_ranks(_train, ranks, threads, config.to_yaml(), "convnets")[0]["clock_s"]
    slowest, fastest = 0.1, 2.0  # times what they reach alone
    for _ in range(6):
        factor = math.sqrt(slowest * fastest)
        rates = {key: value * factor for key, value in found["convolution_flops_per_s"].items()}
        if _predicted(config, "convnets", {**found, "convolution_flops_per_s": rates})["step_s"] > measured:
            slowest = factor
        else:
            fastest = factor
    return rates


def _predicted(config: Config, name: str, found: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step and of its parts."""
    from symile_dist.tools.plan.planner import Ask, Planner

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "check.yaml")
        file.write_text(config.to_yaml(), encoding="utf-8")
        shapes = {key: "x".join(map(str, one.shape)) for key, one in SHAPES[name].items()}
        ask = Ask(str(file), [], device_of(found), 1, config.world_size, shapes)
        return dict(Planner(ask).plan(1)["time"])


__all__ = ["calibrate", "seconds_of"]
