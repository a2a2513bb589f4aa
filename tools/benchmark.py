"""`symile-dist benchmark objective`: the Symile loss against the published package, a naive cube and torch.mm itself.

All contenders of a shape work on the same tensors in one run, by turns, so that whatever else the machine does hits all
of them; torch.mm's own rate is measured between them. Memory is measured in a process of its own for each. What is
handed to collectives is counted in real processes over gloo.
"""

from __future__ import annotations

import gc
import inspect
import math
import os
import platform
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich import box
from rich.console import Group
from rich.table import Table
from torch import Tensor

from symile_dist.objectives import SymileLoss, cube_triton
from symile_dist.objectives.cube import MAX_NEGATIVES
from symile_dist.storage import write_json
from symile_dist.tools.parity import INSTALL_PUBLISHED, Loss, cube_loss, on_ranks, published
from symile_dist.tools.progress import progress_bar

MIB = 2**20
MODALITIES = 3
SEED = 0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP_SIZE = 32
"""Samples of the first call before memory is measured: what libraries allocate once does not count."""
SHARE_OF_FREE_MEMORY = 0.8
MM_SECONDS = 0.1
"""How long each of torch.mm's three shapes is called back to back, per repeat."""
TRAFFIC_WORK = 4e11
"""Operations that counting the collectives may take: seconds of one core. Bytes grow as N, so a smaller N will do."""


@dataclass(frozen=True)
class Case:
    """One shape, and how it is computed."""

    size: int
    """N, the global batch."""
    dimension: int
    device: str = "cpu"
    dtype: str = "fp32"
    threads: int = 1
    sheets: int | None = None
    """None: a sixteenth of N."""

    @property
    def sheet_number(self) -> int:
        return max(2, self.size // 16) if self.sheets is None else min(self.sheets, self.size)


@dataclass(frozen=True)
class Contender:
    """Somebody's way to a loss."""

    name: str
    sampling: str
    make: Callable[[Case], Loss]
    floats: Callable[[Case], float] = lambda case: 0.0
    """Numbers that forward and backward hold at once, about; 0 where it is of no account."""
    only_cuda: bool = False


def _ours(sampling: str, backend: str = "auto") -> Callable[[Case], Loss]:
    def make(case: Case) -> Loss:
        sheets = case.sheet_number if sampling == "sheets" else None
        loss = SymileLoss(sampling, seed=SEED, sheets=sheets, backend=backend)
        return lambda representations, scale: loss(representations, scale, step=0)

    return make


def _package(sampling: str) -> Callable[[Case], Loss]:
    return lambda case: published.Symile(sampling)


def _cube_floats(case: Case) -> float:
    """The cube, an anchor's log-probabilities three times, their gradients; and a * b for all pairs of rows."""
    return 6.0 * case.size**3 + 2.0 * case.size**2 * case.dimension


def _package_floats(case: Case) -> float:
    """Per anchor, N rolled (N, D) matrices and their products, and the logits; fits what is measured within 10%."""
    return 8.0 * case.size**3 + 8.0 * case.size**2 * case.dimension


OURS, OURS_TRITON, PACKAGE, NAIVE = "ours", "ours, triton", "symile package", "einsum cube"
CONTENDERS = [
    Contender(OURS, "n_squared", _ours("n_squared")),
    Contender(OURS_TRITON, "n_squared", _ours("n_squared", "triton"), only_cuda=True),
    Contender(OURS, "sheets", _ours("sheets")),
    Contender(OURS, "n", _ours("n")),
    Contender(PACKAGE, "n_squared", _package("n_squared"), _package_floats),
    Contender(PACKAGE, "n", _package("n")),
    Contender(NAIVE, "n_squared", lambda case: cube_loss, _cube_floats),
]


def flops(case: Case, sampling: str) -> tuple[float, float]:
    """Operations that are counted for (forward, forward + backward), whatever a contender really does.

    A logit costs 2 D, its gradients with the logit's recomputation 6 D; "n" has N^2 logits for each of three anchors.
    """
    logits = {
        "n_squared": case.size**3,
        "sheets": case.sheet_number * case.size**2,
        "n": MODALITIES * case.size**2,
    }[sampling]
    return 2.0 * logits * case.dimension, 8.0 * logits * case.dimension


# -- tensors and clocks ----------------------------------------------------------------------------------------------


def make_inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Three (N, D) of unit vectors and the scale D, with which the logits' standard deviation is about 1."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randn(MODALITIES, case.size, case.dimension, generator=generator)
    made = F.normalize(drawn, dim=2).to(case.device, DTYPES[case.dtype])
    scale = torch.tensor(float(case.dimension), device=case.device)
    return [tensor.clone().requires_grad_() for tensor in made], scale.requires_grad_()


def run_once(loss: Loss, representations: list[Tensor], scale: Tensor, backward: bool) -> Tensor:
    for tensor in (*representations, scale):
        tensor.grad = None
    value = loss(representations, scale)
    if backward:
        value.backward()
    return value.detach()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: str) -> float:
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def sustained_seconds(call: Callable[[], Any], device: str) -> float:
    """The median over batches of back-to-back calls, per call."""
    once = max(1e-7, min(seconds_of(call, device) for _ in range(3)))
    batch = max(1, round(MM_SECONDS / 10 / once))

    def repeated() -> None:
        for _ in range(batch):
            call()

    batches = min(10, max(3, math.ceil(MM_SECONDS / (batch * once))))
    return statistics.median(seconds_of(repeated, device) for _ in range(batches)) / batch


def mm_calls(case: Case) -> dict[str, Callable[[], Any]]:
    """The three matrix products that a plane of the cube is made of, into memory that is there: 2 N^2 D each."""
    kind: dict[str, Any] = {"device": case.device, "dtype": DTYPES[case.dtype]}
    rows, columns = torch.randn(case.size, case.dimension, **kind), torch.randn(case.size, case.dimension, **kind)
    right, plane = columns.T.contiguous(), torch.randn(case.size, case.size, **kind)
    logits, back = torch.empty_like(plane), torch.empty_like(rows)
    return {
        "logits (N,D)x(D,N)": lambda: torch.mm(rows, right, out=logits),
        "rows' gradient (N,N)x(N,D)": lambda: torch.mm(plane, columns, out=back),
        "columns' gradient (N,N)^T x(N,D)": lambda: torch.mm(plane.T, rows, out=back),
    }


# -- memory ----------------------------------------------------------------------------------------------------------


def free_memory(device: str) -> float:
    """Bytes; infinite where the system does not tell."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return math.inf
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return float(found[1]) * 1024 if found else math.inf


def why_skip(contender: Contender, case: Case) -> str | None:
    if contender.name == PACKAGE and published is None:
        return INSTALL_PUBLISHED
    if contender.name == OURS_TRITON and not cube_triton.available():
        return "Triton is not installed; pip install triton"
    need = contender.floats(case) * DTYPES[case.dtype].itemsize
    free = free_memory(case.device)
    if need > SHARE_OF_FREE_MEMORY * free:
        return f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return None


def _memory_status(name: str) -> float:
    """Bytes of VmRSS (now) or VmHWM (highest) of this process. Linux."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return float(found[1]) * 1024


def extra_memory(number: int, case: Case) -> float:
    """MiB that forward and backward of a contender need beyond their inputs, at the highest. For a new process."""
    torch.set_num_threads(case.threads)
    make = CONTENDERS[number].make
    small = replace(case, size=min(WARM_UP_SIZE, case.size))
    run_once(make(small), *make_inputs(small), backward=True)
    loss, (representations, scale) = make(case), make_inputs(case)
    gc.collect()
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
        run_once(loss, representations, scale, backward=True)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the highest begins anew
        before = _memory_status("VmRSS")
        run_once(loss, representations, scale, backward=True)
        return max(0.0, _memory_status("VmHWM") - before) / MIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    before = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)  # the highest so far: no present figure
    run_once(loss, representations, scale, backward=True)
    return max(0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before) / MIB


def measured_memory(number: int, case: Case) -> tuple[float | None, str | None]:
    """MiB, or why the contender cannot run."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(extra_memory, number, case).result(), None
    except BrokenProcessPool:
        return None, "its process was ended, for lack of memory most likely"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            return None, "ran out of memory"
        raise


# -- what goes over the network --------------------------------------------------------------------------------------

COLLECTIVES = {
    # name in torch.distributed -> the argument that is as large as all ranks' parts together, this rank's input
    "all_gather_into_tensor": ("output_tensor", "input_tensor"),
    "all_gather_single": ("output", "input"),
    "all_gather": ("tensor_list", "tensor"),
    "reduce_scatter_tensor": ("input", "input"),
    "reduce_scatter": ("input_list", "input_list"),
    "all_reduce": ("tensor", "tensor"),
    "all_to_all_single": ("input", "input"),
    "broadcast": ("tensor", "tensor"),
}


def _bytes(value: Tensor | Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in ([value] if isinstance(value, Tensor) else value))


def _dtype(value: Tensor | Sequence[Tensor]) -> str:
    return str((value if isinstance(value, Tensor) else value[0]).dtype).removeprefix("torch.")


class Traffic:
    """What is handed to the collectives of torch.distributed, by operation and dtype."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.full: Counter[tuple[str, str]] = Counter()
        """Bytes of the gathered, reduced or to-be-scattered tensors."""
        self.own: Counter[tuple[str, str]] = Counter()
        """Bytes of what this rank hands in."""

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "collective": name,
                "dtype": kind,
                "calls": self.calls[name, kind],
                "full_bytes": self.full[name, kind],
                "own_bytes": self.own[name, kind],
            }
            for name, kind in sorted(self.calls)
        ]


@contextmanager
def counted_collectives() -> Iterator[Traffic]:
    """Counts this process's collectives that are called as `torch.distributed.NAME`."""
    traffic = Traffic()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        whole, own = COLLECTIVES[name]
        signature = inspect.signature(original)

        def call(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options).arguments
            key = (name, _dtype(bound[own]))
            traffic.calls[key] += 1
            traffic.full[key] += _bytes(bound[whole])
            traffic.own[key] += _bytes(bound[own])
            return original(*arguments, **options)

        return call

    with ExitStack() as patches:
        for name in COLLECTIVES:
            if hasattr(dist, name):  # the names change with torch
                patches.enter_context(patch.object(dist, name, counting(name, getattr(dist, name))))
        yield traffic


def count_traffic(case: Case, sampling: str) -> list[dict[str, Any]]:
    """What one rank hands to collectives in one forward and backward pass, on its share of the batch."""
    share = case.size // dist.get_world_size()
    rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    whole, scale = make_inputs(case)
    own = [tensor[rows].detach().clone().requires_grad_() for tensor in whole]
    loss = _ours(sampling)(case)
    with counted_collectives() as traffic:
        run_once(loss, own, scale, backward=True)
    return traffic.rows()


def measure_traffic(case: Case, sampling: str, world_size: int) -> dict[str, Any]:
    """Bytes by collective and dtype, on one rank, beside the ideal.

    The ideal hands over what cannot be avoided: M - 1 modalities gathered, and their gradients reduced and scattered.
    """
    size = case.size
    while size > world_size and flops(replace(case, size=size), sampling)[1] > TRAFFIC_WORK:
        size = max(world_size, size * 3 // 4 // world_size * world_size)
    counted = replace(case, size=size, device="cpu")
    rows, *others = on_ranks(count_traffic, world_size, counted, sampling)
    assert all(other == rows for other in others), "the ranks handed over different amounts"
    total = sum(row["full_bytes"] for row in rows)
    ideal = 2 * (MODALITIES - 1) * size * case.dimension * DTYPES[case.dtype].itemsize
    return {
        "negative_sampling": sampling,
        "world_size": world_size,
        "global_batch": size,
        "dimension": case.dimension,
        "collectives": rows,
        "full_bytes": total,
        "own_bytes": sum(row["own_bytes"] for row in rows),
        "ideal_full_bytes": ideal,
        "ratio_to_ideal": total / ideal,
    }


# -- the whole -------------------------------------------------------------------------------------------------------


def parse_shapes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """["256x512,384x512", "128x256"] -> [(256, 512), ...]. Raises ValueError for what is no shape."""
    shapes = []
    for text in ",".join(texts).split(","):
        found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
        size, dimension = (int(found[1]), int(found[2])) if found else (0, 0)
        if size < 2 or dimension < 1:
            raise ValueError(f"--shapes: '{text}' should be NxD, samples by dimension, e.g. 256x512 (N 2 or more)")
        if size**2 > MAX_NEGATIVES:
            raise ValueError(f"--shapes: '{text}' has more combinations than can be computed; choose a smaller N")
        shapes.append((size, dimension))
    return shapes


def check_options(
    shapes: Sequence[tuple[int, int]],
    threads: int,
    repeats: int,
    world_size: int,
    device: str,
    sheets: int | None,
    out: Path | None,
) -> None:
    """Raises ValueError for what does not go, before anything is computed."""
    for name, number in (("--threads", threads), ("--repeats", repeats), ("--world-size", world_size)):
        if number < 1:
            raise ValueError(f"{name} {number}: should be 1 or more")
    if world_size > 64:
        raise ValueError(f"--world-size {world_size}: is a number of processes on this machine; 64 at most")
    for size, dimension in shapes:
        if size % world_size:
            raise ValueError(
                f"--shapes: {size} samples of {size}x{dimension} do not divide by --world-size {world_size}"
            )
        if sheets is not None and not 2 <= sheets <= size:
            raise ValueError(f"--sheets {sheets}: should be 2 to {size} for {size}x{dimension}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out {out}: is a folder; name a file")
        out.parent.mkdir(parents=True, exist_ok=True)


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def benchmark_objective(
    shapes: Sequence[str] = ("256x512",),
    *,
    threads: int = 1,
    repeats: int = 5,
    world_size: int = 2,
    device: str = "cpu",
    dtype: str = "fp32",
    negative_sampling: Sequence[str] = ("n_squared",),
    sheets: int | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Times, memory and traffic of every contender at every shape; written to `out` too, as JSON.

    Raises ValueError for arguments that do not go, before anything is computed.
    """
    parsed = parse_shapes(shapes)
    target = None if out is None else Path(out)
    check_options(parsed, threads, repeats, world_size, device, sheets, target)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results: dict[str, Any] = {
            "processor": processor(device),
            "device": device,
            "dtype": dtype,
            "threads": threads,
            "cores": os.cpu_count(),
            "repeats": repeats,
            "torch": torch.__version__,
            "system": platform.system(),
            "shapes": [],
        }
        with progress_bar("benchmark") as progress:
            for size, dimension in parsed:
                case = Case(size, dimension, device, dtype, threads, sheets)

                def report(done: int, total: int, part: str = f"{size}x{dimension}") -> None:
                    progress(part, done, total)

                results["shapes"].append(measure_shape(case, negative_sampling, repeats, world_size, report))
    finally:
        torch.set_num_threads(before)
    if target is not None:
        write_json(target, results)
    return results


def measure_shape(
    case: Case, samplings: Sequence[str], repeats: int, world_size: int, report: Callable[[int, int], None]
) -> dict[str, Any]:
    """One shape's figures; `report(done, total)` as it goes."""
    numbers = [
        number
        for number, contender in enumerate(CONTENDERS)
        # Sheets estimate the cube: whoever asks for them is shown the package's cube beside.
        if (contender.sampling in samplings or (contender.name == PACKAGE and _counterpart(samplings, contender)))
        and (case.device == "cuda" or not contender.only_cuda)
    ]
    traffics = [] if world_size == 1 else list(dict.fromkeys(samplings))
    done, total = 0, len(numbers) * (2 + repeats) + repeats + len(traffics)
    report(done, total)

    def advance() -> None:
        nonlocal done
        done += 1
        report(done, total)

    rows: dict[int, dict[str, Any]] = {}
    for number in numbers:
        contender = CONTENDERS[number]
        reason, memory = why_skip(contender, case), None
        if reason is None:
            memory, reason = measured_memory(number, case)
        rows[number] = {
            "contender": contender.name,
            "negative_sampling": contender.sampling,
            "skipped": reason,
            "extra_peak_mib": memory,
        }
        advance()
    running = [number for number in numbers if rows[number]["skipped"] is None]
    representations, scale = make_inputs(case)
    losses = {number: CONTENDERS[number].make(case) for number in running}
    for number in running:
        rows[number]["loss"] = run_once(losses[number], representations, scale, backward=True).item()
        advance()
    times: dict[tuple[int, bool], list[float]] = {(n, backward): [] for n in running for backward in (False, True)}
    products = mm_calls(case)
    mm_times: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(repeats):
        for name, product in products.items():
            mm_times[name].append(sustained_seconds(product, case.device))
        advance()
        for number in running:
            for backward in (False, True):
                call = partial(run_once, losses[number], representations, scale, backward)
                times[number, backward].append(seconds_of(call, case.device))
            advance()
    mm_seconds = {name: statistics.median(taken) for name, taken in mm_times.items()}
    product_flops = 2.0 * case.size**2 * case.dimension
    mm_rate = product_flops / statistics.mean(mm_seconds.values())
    for number in running:
        of_forward, of_both = flops(case, CONTENDERS[number].sampling)
        forward, both = (statistics.median(times[number, backward]) for backward in (False, True))
        rows[number] |= {
            "forward_s": forward,
            "forward_backward_s": both,
            "forward_fastest_s": min(times[number, False]),
            "forward_backward_fastest_s": min(times[number, True]),
            "forward_flops_per_s": of_forward / forward,
            "forward_backward_flops_per_s": of_both / both,
            "forward_share_of_mm": of_forward / forward / mm_rate,
            "forward_backward_share_of_mm": of_both / both / mm_rate,
        }
    package = {CONTENDERS[n].sampling: rows[n] for n in running if CONTENDERS[n].name == PACKAGE}
    for number in running:
        sampling = CONTENDERS[number].sampling
        peer = package.get("n_squared" if sampling == "sheets" else sampling)
        ratio = None if peer is None else peer["forward_backward_s"] / rows[number]["forward_backward_s"]
        rows[number]["times_as_fast_as_package"] = ratio
    measured = []
    for sampling in traffics:
        measured.append(measure_traffic(case, sampling, world_size))
        advance()
    report(total, total)
    return {
        "global_batch": case.size,
        "dimension": case.dimension,
        "sheets": case.sheet_number if "sheets" in samplings else None,
        "mm": {
            "flops_per_s": mm_rate,
            "shapes": {name: product_flops / taken for name, taken in mm_seconds.items()},
        },
        "contenders": list(rows.values()),
        "traffic": measured,
    }


def _counterpart(samplings: Sequence[str], package: Contender) -> bool:
    return "sheets" in samplings and package.sampling == "n_squared"


# -- tables ----------------------------------------------------------------------------------------------------------


def benchmark_tables(results: dict[str, Any]) -> Group:
    """Markdown tables: one of the contenders and one of the traffic."""
    where = (
        f"{results['processor']}, {results['device']}, {results['threads']} thread(s), {results['dtype']}, "
        f"torch {results['torch']}, median of {results['repeats']}"
    )
    return Group(
        where, "", _contender_table(results), "", *([_traffic_table(results)] if _has_traffic(results) else [])
    )


def _has_traffic(results: dict[str, Any]) -> bool:
    return any(shape["traffic"] for shape in results["shapes"])


def _contender_table(results: dict[str, Any]) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in ("N x D", "contender", "negatives"):
        table.add_column(column)
    for column in (
        "forward, s",
        "forward + backward, s",
        "GFLOP/s",
        "of torch.mm",
        "times as fast as the package",
        "extra memory, MiB",
        "loss",
    ):
        table.add_column(column, justify="right")
    for shape in results["shapes"]:
        name = f"{shape['global_batch']} x {shape['dimension']}"
        rate = shape["mm"]["flops_per_s"]
        table.add_row(name, "torch.mm", "", "", "", f"{rate / 1e9:.1f}", "100%", "", "", "")
        for row in shape["contenders"]:
            if row["skipped"] is not None:
                table.add_row(name, row["contender"], row["negative_sampling"], f"skipped: {row['skipped']}")
                continue
            ratio = row["times_as_fast_as_package"]
            table.add_row(
                name,
                row["contender"],
                f"{row['negative_sampling']} ({shape['sheets']})"
                if row["negative_sampling"] == "sheets"
                else row["negative_sampling"],
                f"{row['forward_s']:.4g}",
                f"{row['forward_backward_s']:.4g}",
                f"{row['forward_backward_flops_per_s'] / 1e9:.1f}",
                f"{row['forward_backward_share_of_mm']:.0%}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{row['extra_peak_mib']:.0f}",
                f"{row['loss']:.5f}",
            )
    return table


def _traffic_table(results: dict[str, Any]) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in ("N x D", "ranks", "negatives", "collective", "dtype"):
        table.add_column(column)
    for column in ("calls", "whole, bytes", "own input, bytes"):
        table.add_column(column, justify="right")
    for shape in results["shapes"]:
        for traffic in shape["traffic"]:
            name = f"{traffic['global_batch']} x {traffic['dimension']}"
            words = (name, str(traffic["world_size"]), traffic["negative_sampling"])
            for row in traffic["collectives"]:
                figures = (f"{row[key]:,}" for key in ("calls", "full_bytes", "own_bytes"))
                table.add_row(*words, row["collective"], row["dtype"], *figures)
            all_bytes = f"{traffic['full_bytes']:,} = {traffic['ratio_to_ideal']:.4f} of the ideal"
            table.add_row(*words, "all", "", "", all_bytes, f"{traffic['own_bytes']:,}")
    return table
