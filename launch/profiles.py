"""Profiles: what a cluster is called and what it needs, written once, chosen by `--profile NAME`.

They stand in `profiles.yaml`, in the user's configuration folder (~/.config/symile-dist) and in `configs/` of the
current folder, whose profiles come second. Secrets are named there, never written: `env:NAME`, `file:/path` or, on
Kubernetes, `secret:NAME/KEY`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from symile_dist.config import Section
from symile_dist.registry import suggestion

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
SECRET_NAME = r".*(SECRET|PASSWORD|PASSWD|CREDENTIALS?|TOKEN|KEY|PAT)$"
SECRET_VALUE = r".*://[^/\s]*:[^/\s]*@"
"""A URL with a password."""


class SlurmProfile(Section):
    account: str | None = None
    """sbatch --account."""
    partition: str | None = None
    """sbatch --partition."""
    qos: str | None = None
    """sbatch --qos."""
    constraint: str | None = None
    """sbatch --constraint."""
    reservation: str | None = None
    """sbatch --reservation."""
    exclusive: bool = False
    """Whole nodes."""
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How GPUs are asked for: --gpus-per-node=G, or --gres=gpu:G."""
    modules: list[str] = Field(default_factory=list)
    """Environment modules to load, as in `module load cuda/12.8`."""
    container: str | None = None
    """Image in which the steps run: a name that the runtime takes, such as /images/symile.sqsh or symile.sif."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis: srun --container-image; apptainer: apptainer exec."""
    container_mounts: list[str] = Field(default_factory=list)
    """Folders that the container sees, PATH or HOST:INSIDE; the run's directory and the state folder always."""
    grace_seconds: Annotated[int, Field(gt=0)] = 120
    """So long before the time limit the job is told to save; it is then queued again."""
    requeue: bool = True
    """Queue the job again when it was preempted or its time was over."""


class RayProfile(Section):
    address: str | None = None
    """Of the cluster's dashboard, e.g. http://head:8265; RAY_API_SERVER_ADDRESS, else RAY_ADDRESS when left out."""
    token: Annotated[str, Field(pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+)$")] | None = None
    """Where the cluster's token is: env:NAME or file:/path; Ray's own places (RAY_AUTH_TOKEN, ~/.ray/auth_token) when
    left out."""
    working_dir: str | None = None
    """Folder that the job runs in, copied to the cluster: your own encoders, say."""
    ignore: list[str] = Field(default_factory=list)
    """Patterns of what is not copied, beside .git, .venv, data, runs and caches."""
    max_megabytes: Annotated[int, Field(gt=0)] = 100
    """A larger working_dir is refused: it would pass through the cluster's head."""


class Toleration(Section):
    key: str | None = None
    """Of the taint; any when left out."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """How the taint's value is compared."""
    value: str | None = None
    """Of the taint, for Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Of the taint; any when left out."""

    @model_validator(mode="after")
    def _as_kubernetes_takes_it(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("operator: Exists compares no value; write operator: Equal")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("operator: Equal needs the taint's key")
        return self


class Claim(Section):
    claim: str
    """Name of a PersistentVolumeClaim; the one that holds run directories has to allow ReadWriteMany."""
    path: Annotated[str, Field(pattern=r"^/")]
    """Where it is mounted, in all pods."""


Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?([EPTGMK]i|[EPTGMkm])?$")]
"""As Kubernetes writes amounts: 64Gi, 500M, 2."""


class KubeRayProfile(Section):
    namespace: str = "default"
    """Namespace of the job."""
    context: str | None = None
    """kubectl --context; the current one when left out."""
    image: str | None = None
    """Container image with symile-dist in it (see docker/); needed."""
    image_pull_secrets: list[str] = Field(default_factory=list)
    """Names of secrets."""
    service_account: str | None = None
    """Of all pods."""
    user_id: Annotated[int, Field(gt=0)] | None = 1000
    """User and group that all pods run as, and that shared volumes belong to; None: as the image says."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Of the worker pods."""
    tolerations: list[Toleration] = Field(default_factory=list)
    """Of the worker pods."""
    volumes: list[Claim] = Field(default_factory=list)
    """Shared volumes; run.directory has to stand on one."""
    shared_memory: Quantity = "16Gi"
    """Size of /dev/shm in the worker pods; a part of their memory."""
    memory_per_node: Quantity = "64Gi"
    """Request and limit of a worker pod."""
    gpu_resource: str = "nvidia.com/gpu"
    """What the cluster calls its GPUs."""
    extra_resources: dict[str, int | Quantity] = Field(default_factory=dict)
    """What else a worker pod asks for: `vpc.amazonaws.com/efa: 4`, `rdma/hca: 1`, `hugepages-2Mi: 5120Mi`."""
    capabilities: list[str] = Field(default_factory=list)
    """Linux capabilities of the worker pods, such as IPC_LOCK, by which InfiniBand pins memory where its limit is low.
    Kubernetes gives them to root alone: user_id: null."""
    head_cpus: Annotated[int, Field(gt=0)] = 2
    """CPUs of the head pod: it runs the driver, and no ranks."""
    head_memory: Quantity = "8Gi"
    """Memory of the head pod."""
    gang: Literal["none", "kueue", "volcano", "yunikorn"] = "none"
    """All pods at once, or none: by which scheduler."""
    queue: str | None = None
    """Its queue; kueue needs one."""
    backoff_limit: Annotated[int, Field(ge=0)] = 3
    """How often a job whose driver failed is started again; it goes on from its newest checkpoint."""
    ttl_seconds: Annotated[int, Field(ge=0)] = 3600
    """How long an ended job's pods are kept."""
    pod_monitor: bool = True
    """Also make a PodMonitor, for the Prometheus operator."""
    pod_monitor_labels: dict[str, str] = Field(default_factory=dict)
    """Its labels, where the operator looks for some: often `release: NAME`."""
    pod_monitor_token: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")] | None = None
    """SECRET/KEY that holds what metrics.token_file does, where the config has one."""
    ray_version: str = "2.60.0"
    """That of the image."""

    @model_validator(mode="after")
    def _queue_of_kueue(self) -> Self:
        if self.gang == "kueue" and not self.queue:
            raise ValueError("gang: kueue needs a queue, the name of a LocalQueue in the namespace")
        if self.gang == "none" and self.queue:
            raise ValueError(f"queue: {self.queue} is of no use without `gang`, which says whose queue it is")
        return self


class Profile(Section):
    """Where and how jobs run."""

    backend: Literal["local", "ray", "kuberay", "slurm"] | None = None
    """`--on` when it is left out."""
    python: str | None = None
    """Absolute path of the interpreter on the cluster; this one's when left out (in a container: python3)."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the job, such as NCCL_SOCKET_IFNAME or FI_PROVIDER."""
    secrets: dict[str, str] = Field(default_factory=dict)
    """Variables whose values are elsewhere: `env:NAME`, `file:/path`, `secret:NAME/KEY` (Kubernetes)."""
    slurm: SlurmProfile = SlurmProfile()
    """Slurm."""
    ray: RayProfile = RayProfile()
    """A Ray cluster that is there."""
    kuberay: KubeRayProfile = KubeRayProfile()
    """Kubernetes."""

    @field_validator("environment", "secrets")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(VARIABLE, name):
                raise ValueError(f"'{name}' is not a variable's name")
        return value

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if re.match(SECRET_NAME, name.upper()) or re.match(SECRET_VALUE, text):
                raise ValueError(f"{name}: a secret does not stand here; name its place under `secrets`")
        return value

    @field_validator("secrets")
    @classmethod
    def _references(cls, value: dict[str, str]) -> dict[str, str]:
        for name, reference in value.items():
            if not re.fullmatch(rf"env:{VARIABLE}|file:/.+|secret:[a-z0-9.-]+/[A-Za-z0-9._-]+", reference):
                raise ValueError(f"{name}: write env:NAME, file:/path or secret:NAME/KEY, never the secret itself")
        return value


def config_folder() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "symile-dist"


def profile_files() -> list[Path]:
    """Those that are there, the user's own first."""
    return [path for path in (config_folder() / "profiles.yaml", Path("configs") / "profiles.yaml") if path.is_file()]


def load_profiles() -> dict[str, Profile]:
    """All profiles by name. Raises ValueError with every mistake and its file."""
    found: dict[str, Profile] = {}
    problems: list[str] = []
    for file in profile_files():
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{file}: cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file}: should be a map from a profile's name to what it needs")
        for name, values in content.items():
            try:
                profile = Profile.model_validate(values or {})
            except ValidationError as error:
                problems += [f"{file}: {name}.{_told(detail)}" for detail in error.errors()]
            else:
                found.setdefault(str(name), profile)
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _told(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        model: Any = Profile
        for part in detail["loc"][:-1]:
            model = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        known = list(model.model_fields) if hasattr(model, "model_fields") else []
        return f"{path}: unknown key{suggestion(str(detail['loc'][-1]), known)}"
    return f"{path}: {detail['msg'].removeprefix('Value error, ')}"


def profile_named(name: str | None) -> Profile:
    """The profile; without a name, the one called `default` or one without any settings. Raises ValueError."""
    profiles = load_profiles()
    if name is None:
        return profiles.get("default", Profile())
    if name not in profiles:
        places = ", ".join(map(str, profile_files())) or f"{config_folder() / 'profiles.yaml'}, which is not there"
        raise ValueError(f"--profile {name}: there is none of that name{suggestion(name, list(profiles))} in {places}")
    return profiles[name]
