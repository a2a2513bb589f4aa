"""The Ray cluster: joining or starting it, and how many ranks it holds."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from symile_dist.config import Config
from symile_dist.data.order import largest_world_size
from symile_dist.environment import expected_nodes
from symile_dist.signals import handlers_kept, sigterm_blocked

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""A node that runs no task within so long counts as lost."""
POLL_SECONDS = 0.5
RAY_ENVIRONMENT = {
    # A group is killed after its first failure: those of the others are not news.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


class Node(NamedTuple):
    """A node of the cluster."""

    id: str
    resources: dict[str, float]


def start_ray(config: Config) -> None:
    """Joins the cluster that RAY_ADDRESS names, or starts a local Ray. A second call finds the first one's.

    Where a launcher has said that more nodes are coming it waits for them, ray.wait_for_nodes_seconds at most. Raises
    ValueError when the cluster cannot hold the run: Ray itself would wait for ever.
    """
    join_ray(config.ray.cpus_per_worker * config.world_size)
    fitted(config, wait_for_nodes(config.ray.wait_for_nodes_seconds))


def wait_for_nodes(seconds: float) -> list[Node]:
    """The cluster's nodes: where a launcher has said how many are coming, all of them, or those of so many seconds."""
    deadline = time.monotonic() + seconds
    while len(nodes := living_nodes()) < expected_nodes() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return nodes


def own_address() -> str | None:
    """How the cluster's other nodes reach this one; None where it has none but this machine."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return None if address.startswith("127.") else address


def fitted(config: Config, nodes: Sequence[Node]) -> Config:
    """The config with the most ranks that the nodes hold and that divide the global batch. Raises ValueError when
    these are fewer than the run may have."""
    world = ranks_held(config, nodes)
    if world >= (config.ray.min_workers or config.world_size):
        return config.model_copy(update={"ray": config.ray.model_copy(update={"num_workers": world})})
    per_worker = _per_worker(config)
    needs = [f"{need * config.world_size:g} {what}s" for what, need in per_worker.items()]
    has = [f"{sum(node.resources.get(what, 0) for node in nodes):g}" for what in per_worker]
    fewer = (
        "ray.min_workers lets it go on with fewer ranks"
        if config.ray.min_workers is None
        else f"it holds {world} ranks that divide the global batch, ray.min_workers is {config.ray.min_workers}"
    )
    raise ValueError(
        f"the run needs {' and '.join(needs)} (ray.num_workers x ray.cpus_per_worker and gpus_per_worker), the Ray "
        f"cluster has {' and '.join(has)}; {fewer}"
    )


def ranks_held(config: Config, nodes: Sequence[Node]) -> int:
    """How many ranks of a run the nodes hold, of those that divide the global batch; no more than it wants."""
    per_worker = _per_worker(config)
    room = sum(
        min(int(node.resources.get(what, 0) / need + 1e-9) for what, need in per_worker.items()) for node in nodes
    )
    if room >= config.world_size:
        return config.world_size
    return largest_world_size(config.train.global_batch_size, room) if room else 0


def _per_worker(config: Config) -> dict[str, float]:
    needs = {"CPU": config.ray.cpus_per_worker, "GPU": float(config.ray.gpus_per_worker)}
    return {what: need for what, need in needs.items() if need}


def join_ray(need_cpus: float) -> list[Node]:
    """Joins the cluster that RAY_ADDRESS names, or starts a local Ray that has so many CPUs at least.

    Returns the cluster's nodes. Raises ValueError when the cluster does not answer.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Whoever reaches Ray's ports can run code, and Ray listens on every interface: a token of this process's own.
        # Ray reads both when it is imported. A cluster's own settings are left as they are.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not ray.is_initialized():
        if address:
            _check_cluster_answers(address)
            try:
                with handlers_kept():
                    ray.init(address=address, **quiet)
            except ConnectionError as error:
                raise ValueError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from None
        else:
            # On one machine CPUs are only counted, not enforced: more ranks than cores is slow, not wrong.
            cpus = max(os.cpu_count() or 1, math.ceil(need_cpus) + 1)
            with handlers_kept(), sigterm_blocked():
                ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=cpus, include_dashboard=False, **quiet)
    return living_nodes()


def _check_cluster_answers(address: str) -> None:
    """Raises ValueError when nothing listens at the cluster's address: Ray itself would take minutes to say so."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # `auto` and the like
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"RAY_ADDRESS={address}: nothing answers there ({error.strerror or error}); start the cluster (ray start "
            "--head), correct the address, or unset RAY_ADDRESS to train on this machine"
        ) from None


def living_nodes() -> list[Node]:
    """Those that the cluster takes for alive: a lost one is among them for up to half a minute."""
    import ray

    return [Node(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]


def answering_nodes() -> list[Node]:
    """Those that run a task when they are asked to: what a cluster really holds, seconds after a failure."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = living_nodes()
    if len(nodes) <= 1:
        return nodes
    answer = ray.remote(num_cpus=0, max_retries=0)(_answer)
    asked = {
        answer.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(): node
        for node in nodes
    }
    done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    for task in silent:
        ray.cancel(task, force=True)
    answered = []
    for task in done:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(task)
            answered.append(asked[task])
    return answered


def _answer() -> None:
    """I am here."""
