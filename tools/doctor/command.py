"""The doctor's rounds, and its table."""

from __future__ import annotations

import os
from typing import Any

from rich.table import Table

from symile_dist.config import Config, local_path
from symile_dist.tools.doctor.finding import Finding, checked

STYLES = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}


def examine(config: Config | None) -> list[Finding]:
    """All checks: of this machine, or of the nodes of the cluster that RAY_ADDRESS names; then, with a config, of data,
    storage and model."""
    from symile_dist.tools.doctor import bandwidth, cluster, fit, machine, store

    if os.environ.get("RAY_ADDRESS"):
        found = checked("cluster", lambda: cluster.cluster(config))
    else:
        found = machine.machine(config, several_nodes=False)
        if config is not None:
            gpus = config.ray.gpus_per_worker > 0
            found += checked("bandwidth", lambda: bandwidth.between_processes(config.world_size, gpus))
    if config is None:
        return found
    fits = checked("config", lambda: fit.config_fits(config))
    found += fits
    found += checked("data", lambda: store.data_speed(config))
    found += checked("checkpoint.mirror", lambda: store.mirror_takes(config))
    if not any(each.level == "FAIL" for each in fits):
        found += checked("forward", lambda: fit.forward_works(config))
    return found


def before_submission(config: Config, backend: str) -> None:
    """What can be told in a few seconds, from here: raises ValueError with every reason why a run would fail at once.

    Folders that this machine does not see are left to the job where its machines are others than this one's.
    """
    from symile_dist.tools.doctor import fit, store

    folders = [dataset.path for dataset in config.data.train.values()]
    folders += [folder for folder in (config.data.validation, config.data.test) if folder]
    local = [path for path in map(local_path, folders) if path is not None]
    elsewhere = backend in ("ray", "kuberay") and any(not path.exists() for path in local)
    found = [] if elsewhere else checked("config", lambda: fit.config_fits(config))
    found += checked("checkpoint.mirror", lambda: store.mirror_takes(config))
    if not elsewhere and not any(each.level == "FAIL" for each in found) and not fit.takes_long(config):
        found += checked("forward", lambda: fit.forward_works(config))
    problems = [f"{each.check}: {each.found}" for each in found if each.level == "FAIL"]
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))


def summary(found: list[Finding]) -> dict[str, Any]:
    counts = {level: sum(each.level == level for each in found) for level in STYLES}
    return {"findings": [vars(each) for each in found], **counts}


def findings_table(found: list[Finding]) -> Table:
    table = Table(box=None)
    several = len({each.where for each in found if each.where}) > 1
    for column in ("", "check", *(["where"] if several else []), "found", "fix"):
        table.add_column(column, overflow="fold")
    for each in found:
        level = f"[{STYLES[each.level]}]{each.level}[/]"
        row = [each.check, *([each.where] if several else []), each.found, each.fix]
        table.add_row(level, *(text.replace("[", "\\[") for text in row))
    return table
