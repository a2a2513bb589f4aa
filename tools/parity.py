"""`symile-dist benchmark parity`: how much of the single-process gradient a scheme of distributed training delivers.

Real processes over gloo, each with its own rows, the encoders under DistributedDataParallel, in float64. The gradient
that DDP leaves in the encoders is compared with that of the same loss on the whole batch in one process:

    ratio = <g, g_ref> / <g_ref, g_ref>,    cosine = <g, g_ref> / (|g| |g_ref|).

The schemes of other projects are written anew here, from their public code, as short as their gradients allow.
"""

from __future__ import annotations

import json
import math
import os
import socket
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich import box
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from symile_dist.objectives import SymileLoss
from symile_dist.objectives.reference import symile_loss_reference
from symile_dist.tools.progress import progress_bar

try:
    import symile as published  # type: ignore
except ImportError:
    published = None

INSTALL_PUBLISHED = "not installed; pip install symile (or this project's extra 'benchmark')"

ROWS, INPUT, DIMENSION = 16, 24, 16
"""Samples per rank, width of the inputs, D."""
SEED, STEP, SHEETS = 0, 0, 8
WORLD_SIZES = range(2, 9)
SECONDS = 600
"""After which ranks that wait for each other give up."""

Loss = Callable[[list[Tensor], Tensor], Tensor]
"""(n, D) representations of one process and the scale of the logits -> what that process back-propagates."""


# -- processes -------------------------------------------------------------------------------------------------------


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # newer torch has other names for the collectives that peers call
    # The host's name may lead to an interface that a sandbox does not have.
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=SECONDS),
    )
    found = function(*arguments)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Calls `function(*arguments)` on every rank of a new gloo group; the results, of numbers and words, in rank order.

    The function stands at the top of a module. Raises what the first failing rank raised, as text.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world_size, folder, function, arguments), nprocs=world_size, daemon=True)
        return [json.loads(Path(folder, f"rank-{rank}.json").read_text("utf-8")) for rank in range(world_size)]


# -- losses of one process -------------------------------------------------------------------------------------------


def info_nce(features: list[Tensor], scale: Tensor) -> Tensor:
    """The symmetric InfoNCE of two modalities."""
    logits = scale * features[0] @ features[1].T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def cube_loss(features: list[Tensor], scale: Tensor) -> Tensor:
    """Symile's loss with all N^2 negatives for three modalities, the cube of logits in memory."""
    cube = scale * torch.einsum("id,jd,kd->ijk", features)
    size = len(cube)
    labels = torch.arange(size, device=cube.device) * (size + 1)  # (i, i) of the flattened plane
    anchors = [cube.movedim(m, 0).flatten(1) for m in range(3)]
    return sum((F.cross_entropy(logits, labels) for logits in anchors), start=cube.new_zeros(())) / 3


def volumes(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """(A, D) and twice (B, D) unit vectors -> (A, B) volumes that first[i], second[j] and third[j] span (GRAM)."""
    p, q, r = first @ second.T, first @ third.T, (second * third).sum(dim=1)
    return (1 + 2 * p * q * r - p**2 - q**2 - r**2).abs().sqrt()


def gram_loss(features: list[Tensor], scale: Tensor) -> Tensor:
    """GRAM's contrastive term (arXiv 2412.11959), without the label smoothing of its training code."""
    logits = -scale * volumes(*features)
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


# -- schemes ---------------------------------------------------------------------------------------------------------


def own_labels(n: int) -> Tensor:
    """The columns of this rank's positives among all ranks' rows."""
    return dist.get_rank() * n + torch.arange(n)


def gathered(tensor: Tensor) -> Tensor:
    """All ranks' rows, without gradients."""
    parts = [torch.zeros_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def gathered_with_gradient(tensor: Tensor) -> Tensor:
    """All ranks' rows; the backward pass sums over the ranks. As open_clip's gather_with_grad has it."""
    return torch.cat(torch.distributed.nn.all_gather(tensor))


class _DiscoGather(torch.autograd.Function):
    """All ranks' rows; the backward pass averages over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.n = len(tensor)
        return gathered(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)  # gloo has no ReduceOp.AVG
        first = dist.get_rank() * ctx.n
        return total[first : first + ctx.n] / dist.get_world_size()


class _SumOfGradients(torch.autograd.Function):
    """The tensor as it is; the backward pass sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def local_info_nce(features: list[Tensor], everyones: list[Tensor], scale: Tensor) -> Tensor:
    """The symmetric InfoNCE of this rank's rows as anchors."""
    labels = own_labels(len(features[0]))
    of_first = F.cross_entropy(scale * features[0] @ everyones[1].T, labels)
    return (of_first + F.cross_entropy(scale * features[1] @ everyones[0].T, labels)) / 2


def open_clip_both(features: list[Tensor], scale: Tensor) -> Tensor:
    return local_info_nce(features, [gathered_with_gradient(f) for f in features], scale)


def open_clip_gather_with_grad(features: list[Tensor], scale: Tensor) -> Tensor:
    return info_nce([gathered_with_gradient(f) for f in features], scale)


def open_clip_defaults(features: list[Tensor], scale: Tensor) -> Tensor:
    """The whole loss on every rank; of the gathered rows only the rank's own carry a gradient."""
    everyones = []
    for tensor in features:
        parts = list(gathered(tensor).chunk(dist.get_world_size()))
        parts[dist.get_rank()] = tensor
        everyones.append(torch.cat(parts))
    return info_nce(everyones, scale)


def open_clip_local_loss(features: list[Tensor], scale: Tensor) -> Tensor:
    return local_info_nce(features, [gathered(f) for f in features], scale)


def inf_cl(features: list[Tensor], scale: Tensor) -> Tensor:
    """Features as with local_loss + gather_with_grad (there by a ring); the scale's gradients are summed over ranks."""
    return open_clip_both(features, _SumOfGradients.apply(scale))


def disco_clip(features: list[Tensor], scale: Tensor) -> Tensor:
    """As its README has it, with half of its sum of both directions, for the same loss as the other rows'."""
    everyones = [_DiscoGather.apply(tensor) for tensor in features]
    first, n = dist.get_rank() * len(features[0]), len(features[0])
    return local_info_nce([tensor[first : first + n] for tensor in everyones], everyones, scale)


def published_symile(features: list[Tensor], scale: Tensor) -> Tensor:
    """The package on this rank's rows alone, as in its examples."""
    return published.Symile("n_squared")(features, scale)


def gather_without_gradient(features: list[Tensor], scale: Tensor) -> Tensor:
    """GRAM's training code: gathered rows come from under no_grad, in both directions."""
    everyones = [gathered(tensor) for tensor in features]
    rows = volumes(features[0], *everyones[1:])
    columns = volumes(everyones[0], *features[1:]).T
    labels = own_labels(len(features[0]))
    return (F.cross_entropy(-scale * rows, labels) + F.cross_entropy(-scale * columns, labels)) / 2


def _ours(sampling: str) -> Loss:
    sheets = SHEETS if sampling == "sheets" else None
    return lambda features, scale: SymileLoss(sampling, seed=SEED, sheets=sheets)(features, scale, step=STEP)


def _reference(sampling: str) -> Loss:
    sheets = SHEETS if sampling == "sheets" else None
    return lambda features, scale: symile_loss_reference(
        features, scale, SEED, STEP, negative_sampling=sampling, sheets=sheets
    )


class Objective(NamedTuple):
    """A loss on the whole batch, in one process."""

    name: str
    modalities: int
    scale: float
    """What logits are multiplied with: they are of order 1, and positives do not yet have all the probability."""
    loss: Loss


INFO_NCE = Objective("InfoNCE, 2 modalities", 2, 10.0, info_nce)
CUBE = Objective("Symile n_squared, 3 modalities", 3, 20.0, cube_loss)
PERMUTED = Objective("Symile n, 3 modalities", 3, 20.0, _reference("n"))
SHEETED = Objective("Symile sheets, 3 modalities", 3, 20.0, _reference("sheets"))
VOLUME = Objective("GRAM's volume, 3 modalities", 3, 10.0, gram_loss)


class Scheme(NamedTuple):
    name: str
    objective: Objective
    local: Loss


SCHEMES = [
    Scheme("ours", INFO_NCE, _ours("n_squared")),
    Scheme("ours", CUBE, _ours("n_squared")),
    Scheme("ours", PERMUTED, _ours("n")),
    Scheme("ours", SHEETED, _ours("sheets")),
    Scheme("open_clip: local_loss + gather_with_grad", INFO_NCE, open_clip_both),
    Scheme("open_clip: gather_with_grad", INFO_NCE, open_clip_gather_with_grad),
    Scheme("open_clip: defaults", INFO_NCE, open_clip_defaults),
    Scheme("open_clip: local_loss", INFO_NCE, open_clip_local_loss),
    Scheme("Inf-CL", INFO_NCE, inf_cl),
    Scheme("DisCo-CLIP", INFO_NCE, disco_clip),
    Scheme("symile package, local rows", CUBE, published_symile),
    Scheme("GRAM: gather under no_grad", VOLUME, gather_without_gradient),
]
LEFT_OUT = [
    "TRIANGLE: gathers as GRAM does, on its area in place of the volume",
    "GRAM's label smoothing and its other losses",
    "Inf-CL's ring and kernels: its row has their gradients, by a gather",
]


# -- measurement -----------------------------------------------------------------------------------------------------


class Encoders(nn.Module):
    """One linear map per modality onto the unit sphere, partly aligned with each other, and the logit scale."""

    def __init__(self, modalities: int, scale: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        common, *own = torch.randn(1 + modalities, INPUT, DIMENSION, generator=generator, dtype=torch.float64)
        self.maps = nn.ParameterList([common + weight / 2 for weight in own])
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64))

    def forward(self, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        features = [F.normalize(x @ weight, dim=1) for x, weight in zip(inputs, self.maps, strict=True)]
        return features, self.log_scale.exp()


def inputs(modalities: int, size: int) -> list[Tensor]:
    """One view per modality of the same `size` samples."""
    generator = torch.Generator().manual_seed(SEED + 1)
    common, *own = torch.randn(1 + modalities, size, INPUT, generator=generator, dtype=torch.float64)
    return [common + noise / 2 for noise in own]


def gradient(scheme: Scheme, world_size: int) -> dict[str, Any]:
    """What DDP leaves on this rank: the gradient of the encoders as one vector, and that of the logit scale."""
    encoders = Encoders(scheme.objective.modalities, scheme.objective.scale)
    rows = slice(dist.get_rank() * ROWS, (dist.get_rank() + 1) * ROWS)
    views = inputs(scheme.objective.modalities, ROWS * world_size)
    trained = DistributedDataParallel(encoders)  # has to live until the backward pass, or nothing is averaged
    scheme.local(*trained([view[rows] for view in views])).backward()
    return _gradient(encoders)


def _gradient(encoders: Encoders) -> dict[str, Any]:
    gradients = [parameter.grad for parameter in (*encoders.maps, encoders.log_scale)]
    vectors = [tensor.flatten() for tensor in gradients if tensor is not None]
    assert len(vectors) == len(gradients)
    return {"features": torch.cat(vectors[:-1]).tolist(), "logit_scale": vectors[-1].item()}


def gradients(world_size: int, numbers: list[int]) -> list[dict[str, Any]]:
    """`gradient` of the schemes of these numbers, on one rank."""
    return [gradient(SCHEMES[number], world_size) for number in numbers]


def single_process_gradient(objective: Objective, size: int) -> dict[str, Any]:
    encoders = Encoders(objective.modalities, objective.scale)
    objective.loss(*encoders(inputs(objective.modalities, size))).backward()
    return _gradient(encoders)


def measure_parity(world_size: int = 4) -> dict[str, Any]:
    """The table: for each scheme ratio and cosine of the encoders' gradient, and the ratio of the logit scale's.

    Raises ValueError for a world size that is not within `WORLD_SIZES`.
    """
    if world_size not in WORLD_SIZES:
        raise ValueError(f"--world-size {world_size}: should be {WORLD_SIZES.start} to {WORLD_SIZES.stop - 1}")
    left_out = list(LEFT_OUT)
    numbers = [number for number, scheme in enumerate(SCHEMES) if published or scheme.local is not published_symile]
    if published is None:
        left_out.append(f"symile package, local rows: {INSTALL_PUBLISHED}")
    with progress_bar("parity") as progress:
        progress(f"{world_size} processes", 0, 1)
        of_ranks = on_ranks(gradients, world_size, world_size, numbers)
        progress(f"{world_size} processes", 1, 1)
    rows = []
    for number, *found in zip(numbers, *of_ranks, strict=True):
        assert all(one == another for one, another in pairwise(found)), "DDP gave the ranks different gradients"
        name, objective, _ = SCHEMES[number]
        want = single_process_gradient(objective, ROWS * world_size)
        g, reference = (torch.tensor(each["features"], dtype=torch.float64) for each in (found[0], want))
        product = torch.dot(g, reference).item()
        rows.append(
            {
                "scheme": name,
                "loss": objective.name,
                "features_ratio": product / torch.dot(reference, reference).item(),
                "features_cosine": product / (g.norm() * reference.norm()).item(),
                "logit_scale_ratio": found[0]["logit_scale"] / want["logit_scale"],
            }
        )
    return {
        "world_size": world_size,
        "global_batch": ROWS * world_size,
        "dimension": DIMENSION,
        "torch": torch.__version__,
        "rows": rows,
        "left_out": left_out,
    }


def parity_table(results: dict[str, Any]) -> Group:
    """A Markdown table, and what it leaves out."""
    title = (
        f"gradient under DDP at {results['world_size']} ranks of {ROWS} samples, against one process "
        f"with all {results['global_batch']}"
    )
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for column in ("scheme", "loss"):
        table.add_column(column)
    for column in ("features: ratio", "cosine", "logit scale: ratio"):
        table.add_column(column, justify="right")
    for row in results["rows"]:
        figures = (row[key] for key in ("features_ratio", "features_cosine", "logit_scale_ratio"))
        table.add_row(row["scheme"], row["loss"], *(f"{figure:.3f}" for figure in figures))
    return Group(table, *(f"left out: {what}" for what in results["left_out"]))
