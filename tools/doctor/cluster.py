"""Checks of every node of the Ray cluster that RAY_ADDRESS names, and of what is between them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

from symile_dist.cluster import fitted, join_ray, wait_for_nodes
from symile_dist.config import Config
from symile_dist.tools.doctor.bandwidth import measure, told
from symile_dist.tools.doctor.finding import Finding, checked, fail, ok, warn
from symile_dist.tools.doctor.machine import clock, machine

SKEW_SECONDS = 5.0
NODE_SECONDS = 120.0


class _Node:
    """What is asked of a node."""

    def checks(self, config: Config | None) -> list[Finding]:
        return machine(config, several_nodes=True)

    def clock(self) -> float:
        return clock()

    def address(self) -> str:
        import ray

        return str(ray.util.get_node_ip_address())

    def port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def bandwidth(self, rank: int, world_size: int, address: str, backend: str) -> dict[str, float]:
        return measure(rank, world_size, address, backend)


def cluster(config: Config | None) -> list[Finding]:
    """All of its nodes, asked at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus = config is not None and config.ray.gpus_per_worker > 0
    join_ray(1)
    nodes = wait_for_nodes(NODE_SECONDS)
    found = checked("cluster", lambda: _room(config, nodes))
    asked: list[Any] = []
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": strategy}
        if gpus and node.resources.get("GPU"):
            options["num_gpus"] = 1
        asked.append(ray.remote(**options)(_Node).remote())
    answering = []
    for node, actor in zip(nodes, asked, strict=True):
        try:
            found += ray.get(actor.checks.remote(config), timeout=NODE_SECONDS)
            answering.append(actor)
        except Exception as error:
            words = f"node {node.id[:8]} does not answer ({type(error).__name__})"
            found.append(fail("cluster", words, "is it alive? `ray status`; its raylet's log says more"))
    found += checked("clocks", lambda: _clocks(answering))
    if len(answering) > 1:
        found += checked("bandwidth", lambda: _bandwidth(answering, gpus))
    for actor in asked:
        with contextlib.suppress(Exception):
            ray.kill(actor)
    return found


def _room(config: Config | None, nodes: list[Any]) -> Iterator[Finding]:
    words = f"{len(nodes)} nodes, {sum(node.resources.get('CPU', 0) for node in nodes):g} CPUs"
    gpus = sum(node.resources.get("GPU", 0) for node in nodes)
    words += f", {gpus:g} GPUs" if gpus else ""
    if config is None:
        yield ok("cluster", words)
        return
    try:
        held = fitted(config, nodes).world_size
    except ValueError as error:
        yield fail("cluster", words, str(error))
        return
    if held < config.world_size:
        yield warn("cluster", f"{words}: {held} of {config.world_size} ranks", "more nodes, or fewer ranks")
    else:
        yield ok("cluster", f"{words}: holds the run's {held} ranks")


def _clocks(actors: list[Any]) -> Iterator[Finding]:
    """Each node's clock against this one's; the way there and back is halved."""
    import ray

    skews = []
    for actor in actors:
        begin = clock()
        there = ray.get(actor.clock.remote(), timeout=NODE_SECONDS)
        skews.append(there - (begin + clock()) / 2)
    if not skews:
        return
    apart = max(*skews, 0.0) - min(*skews, 0.0)
    words = f"{len(skews)} nodes' are {apart:.2f} s apart at most"
    if apart > SKEW_SECONDS:
        yield warn("clocks", words, "run chrony or ntpd on every node: object stores refuse requests 15 minutes off")
    else:
        yield ok("clocks", words)


def _bandwidth(actors: list[Any], gpus: bool) -> Iterator[Finding]:
    """Between one rank on each node."""
    import ray

    address = f"{ray.get(actors[0].address.remote())}:{ray.get(actors[0].port.remote())}"
    backend = "nccl" if gpus else "gloo"
    begin = time.monotonic()
    measured = [actor.bandwidth.remote(rank, len(actors), address, backend) for rank, actor in enumerate(actors)]
    try:
        results = ray.get(measured, timeout=NODE_SECONDS)
    except Exception as error:
        words = f"{len(actors)} nodes do not reach each other over {backend} ({type(error).__name__})"
        fix = "firewall? the wrong interface? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose it"
        yield fail("bandwidth", f"{words}, after {time.monotonic() - begin:.0f} s", fix)
        return
    yield from told(results, f"{len(actors)} nodes, {backend}")
