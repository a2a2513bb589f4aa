"""How a job reaches machines: this one, a Ray cluster, Kubernetes, Slurm. See docs/launch.md.

job.py        what is submitted, and what every backend can do        profiles.py   what a cluster is called and needs
records.py    where a run lives, by its name or directory             command.py    submit, status, logs, stop, list
local.py      ray_jobs.py    slurm.py    kuberay.py (kuberay_models.py: Kubernetes' objects)   the backends
ray_node.py   what runs on a node of a Ray that a job brings with it  processes.py  children, to the last of them
"""

from __future__ import annotations

BACKENDS: dict[str, str] = {
    "local": "symile_dist.launch.local:LocalBackend",
    "ray": "symile_dist.launch.ray_jobs:RayJobsBackend",
    "kuberay": "symile_dist.launch.kuberay:KubeRayBackend",
    "slurm": "symile_dist.launch.slurm:SlurmBackend",
}
"""Name in `--on` -> the class."""
