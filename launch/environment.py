"""The environment of a job: what a profile sets, and where its secrets are."""

from __future__ import annotations

import json
import os

from symile_dist.environment import EXPECTED_NODES, SECRETS
from symile_dist.launch.job import Job


def plain_environment(job: Job) -> dict[str, str]:
    """Without any secret: it may be written down."""
    # Where ranks share cores, threads that spin while they wait cost more than the work.
    given = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive", **job.profile.environment}
    if job.nodes > 1:
        given[EXPECTED_NODES] = str(job.nodes)
    files = {name: where.removeprefix("file:") for name, where in job.profile.secrets.items() if where[:5] == "file:"}
    return given | ({SECRETS: json.dumps(files)} if files else {})


def taken_from_here(job: Job) -> dict[str, str]:
    """The secrets that stand in this process's environment, by the name that the job knows them by.

    Raises ValueError for one that is not set.
    """
    found = {}
    for name, where in job.profile.secrets.items():
        if where.startswith("env:"):
            source = where.removeprefix("env:")
            if source not in os.environ:
                raise ValueError(f"the profile's secret {name}: the variable {source} is not set here")
            found[name] = os.environ[source]
    return found


def refuse_references(job: Job, *kinds: str) -> None:
    """Raises ValueError for a secret of a kind that a backend cannot bring to the job."""
    for name, where in job.profile.secrets.items():
        kind = where.partition(":")[0]
        if kind in kinds:
            raise ValueError(f"the profile's secret {name}: '{kind}:' does not reach a job of this backend")
