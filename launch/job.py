"""A job: a config and the machines it asks for; and what every backend can do with one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from symile_dist.config import Config
from symile_dist.launch import BACKENDS
from symile_dist.launch.profiles import Profile
from symile_dist.registry import resolve, suggestion

State = Literal["queued", "running", "finished", "failed", "stopped", "lost", "unknown"]
MOST_SEEDS = 1000
"""Of one submission; Slurm's arrays are no longer either, unless its administrator says so."""
ENDED: tuple[State, ...] = ("finished", "failed", "stopped", "lost")


@dataclass(frozen=True)
class Job:
    """What is submitted. All paths in its config are absolute."""

    config: Config
    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    profile: Profile
    id: str
    """Of this submission; one run may have several, one after another."""
    minutes: int | None = None
    """Time limit."""
    resume: bool = False
    """Go on with the run in the directory, though its config was another."""

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def folder(self) -> Path:
        """Where the job's own files are: in the run's directory, so that all of its machines see them."""
        return self.config.run_directory / "jobs" / self.id

    def train_arguments(self, config_file: str) -> list[str]:
        """Of `symile-dist`."""
        return ["train", config_file, "--plain", *(["--resume"] if self.resume else [])]


@dataclass(frozen=True)
class JobStatus:
    """What a backend says of a job."""

    state: State
    exit_code: int | None = None
    detail: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the backend tells, such as the nodes."""


class Backend(Protocol):
    """A way to machines. A handle is what `submit` returned: plain JSON, kept with the run."""

    def check(self, job: Job) -> None:
        """Raises ValueError for whatever would make the submission fail: a missing command, an address that does not
        answer. Changes nothing."""

    def render(self, job: Job) -> str:
        """What would be submitted, as text. Needs no cluster."""

    def submit(self, job: Job) -> dict[str, Any]:
        """Submits; returns the handle. Raises ValueError where it is refused."""

    def status(self, handle: dict[str, Any]) -> JobStatus:
        """Raises ValueError where the backend cannot be asked."""

    def logs(self, handle: dict[str, Any], follow: bool) -> Iterator[str]:
        """Pieces of what the job has printed; with `follow`, until it has ended."""

    def stop(self, handle: dict[str, Any], now: bool) -> None:
        """Asks the job to save and stop; with `now` ends it."""


@runtime_checkable
class ArrayBackend(Backend, Protocol):
    """A way to machines that takes jobs which differ in their seed, and in places named after it, as one."""

    def check_array(self, jobs: Sequence[Job]) -> None:
        """As `check`."""

    def render_array(self, jobs: Sequence[Job]) -> str:
        """As `render`."""

    def submit_array(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """As `submit`; a handle for each."""


def backend_named(name: str) -> Backend:
    """Raises ValueError for an unknown name."""
    if name not in BACKENDS:
        raise ValueError(
            f"--on {name}: unknown backend{suggestion(name, list(BACKENDS))}; one of {', '.join(BACKENDS)}"
        )
    made: Backend = resolve(BACKENDS[name], {}, "backend")()
    return made


def rank_overrides(nodes: int, gpus_per_node: int | None, given: Sequence[str]) -> list[str]:
    """What the nodes mean for the config: a rank on each GPU, unless ray.num_workers is among the overrides `given`.

    Raises ValueError for numbers that are none.
    """
    _check_least("--nodes", nodes, 1)
    _check_least("--gpus-per-node", gpus_per_node, 0)
    if not gpus_per_node:
        return []
    fixed = any(override.startswith("ray.num_workers=") for override in given)
    return [*([] if fixed else [f"ray.num_workers={nodes * gpus_per_node}"]), "ray.gpus_per_worker=1"]


def node_sizes(config: Config, nodes: int, gpus_per_node: int | None, cpus_per_node: int | None) -> tuple[int, int]:
    """(GPUs, CPUs) of each node. Raises ValueError where the nodes do not hold the config's ranks."""
    _check_least("--nodes", nodes, 1)
    _check_least("--cpus-per-node", cpus_per_node, 1)
    workers = config.world_size
    if workers < nodes:
        raise ValueError(f"--nodes {nodes}: more than the ranks, ray.num_workers = {workers}; some would stand idle")
    per_node = math.ceil(workers / nodes)
    if gpus_per_node == 0 and config.ray.gpus_per_worker:
        raise ValueError("--gpus-per-node 0, and the config's ray.gpus_per_worker is 1: one of them is wrong")
    gpus = per_node * config.ray.gpus_per_worker if gpus_per_node is None else gpus_per_node
    if gpus and per_node > gpus:
        raise ValueError(
            f"ray.num_workers = {workers} on {nodes} nodes is {per_node} ranks a node, and --gpus-per-node is {gpus}"
        )
    needed = math.ceil(per_node * config.ray.cpus_per_worker)
    if cpus_per_node is not None and cpus_per_node < needed:
        raise ValueError(
            f"--cpus-per-node {cpus_per_node}: {per_node} ranks a node need {needed} "
            f"(ray.cpus_per_worker = {config.ray.cpus_per_worker:g})"
        )
    return gpus, cpus_per_node or needed


def _check_least(flag: str, number: int | None, least: int) -> None:
    if number is not None and number < least:
        raise ValueError(f"{flag} {number}: should be {least} or more")


def seeds_of(text: str) -> list[int]:
    """The seeds of "0,3,7", "0-4" or "0-4,9". Raises ValueError for what is none, or twice the same."""
    found: list[int] = []
    for part in text.split(","):
        numbers = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if not numbers:
            raise ValueError(f"--seeds {text}: write 0,1,2 or 0-4")
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if last < first or len(found) + last - first >= MOST_SEEDS:
            raise ValueError(f"--seeds {text}: from the lower to the higher, {MOST_SEEDS:,} at most")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise ValueError(f"--seeds {text}: the same seed twice")
    return found


def minutes_of(text: str) -> int:
    """Minutes of a time limit as Slurm writes it: MINUTES, HH:MM:SS, D-HH, D-HH:MM:SS. Raises ValueError."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not found:
        raise ValueError(f"--time {text}: write minutes, HH:MM:SS or D-HH:MM:SS")
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is not None:
        minutes = (days * 24 + first) * 60 + second + (third > 0)
    elif found[4] is not None:
        minutes = first * 60 + second + (third > 0)
    else:
        minutes = first + (second > 0)  # MM or MM:SS
    if minutes < 1:
        raise ValueError(f"--time {text}: should be a minute or more")
    return minutes
