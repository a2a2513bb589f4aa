"""The Ray cluster: joining or starting it, and how many ranks it holds."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
from collections.abc import Collection, Mapping
from typing import Any

from symile_dist.config import Config
from symile_dist.data.order import largest_world_size

logger = logging.getLogger(__name__)

RAY_ENVIRONMENT = {
    # Lost workers are seen, and the group restarted, in a second rather than in ten.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


def start_ray(config: Config) -> Config:
    """Joins the cluster that RAY_ADDRESS names, or starts a local Ray. A second call finds the first one's.

    Returns the config with as many ranks as the cluster holds, where `ray.min_workers` allows fewer. Raises ValueError
    when the cluster cannot hold the run: Ray itself would wait for ever.
    """
    return fitted(config, join_ray(config.ray.cpus_per_worker * config.world_size))


def fitted(config: Config, resources: Mapping[str, float]) -> Config:
    """The config with the most ranks that the resources hold and that divide the global batch. Raises ValueError when
    these are fewer than the run may have."""
    per_worker = {"CPU": config.ray.cpus_per_worker, "GPU": config.ray.gpus_per_worker}
    room = min(int(resources.get(what, 0) / need + 1e-9) for what, need in per_worker.items() if need)
    if room >= config.world_size:
        return config
    world = largest_world_size(config.train.global_batch_size, room) if room else 0
    if config.ray.min_workers is None or world < config.ray.min_workers:
        needs = [f"{need * config.world_size:g} {what}s" for what, need in per_worker.items() if need]
        has = [f"{resources.get(what, 0):g}" for what, need in per_worker.items() if need]
        fewer = (
            "ray.min_workers lets it begin with fewer ranks"
            if config.ray.min_workers is None
            else f"it holds {world} ranks that divide the global batch, ray.min_workers is {config.ray.min_workers}"
        )
        raise ValueError(
            f"the run needs {' and '.join(needs)} (ray.num_workers x ray.cpus_per_worker and gpus_per_worker), the Ray "
            f"cluster has {' and '.join(has)}; {fewer}"
        )
    logger.warning("the cluster holds %d ranks: the run begins with %d of %d", room, world, config.world_size)
    return config.model_copy(update={"ray": config.ray.model_copy(update={"num_workers": world})})


def join_ray(need_cpus: float) -> dict[str, float]:
    """Joins the cluster that RAY_ADDRESS names, or starts a local Ray that has so many CPUs at least.

    Returns the cluster's resources. Raises ValueError when the cluster does not answer.
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
                ray.init(address=address, **quiet)
            except ConnectionError as error:
                raise ValueError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from None
        else:
            # On one machine CPUs are only counted, not enforced: more ranks than cores is slow, not wrong.
            cpus = max(os.cpu_count() or 1, math.ceil(need_cpus) + 1)
            ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=cpus, include_dashboard=False, **quiet)
    return dict(ray.cluster_resources())


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


def resources_without(nodes: Collection[str]) -> dict[str, float]:
    """What the living nodes of the cluster have, but for some that are named by their ids."""
    import ray

    total: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in nodes:
            for name, amount in node["Resources"].items():
                total[name] = total.get(name, 0.0) + amount
    return total
