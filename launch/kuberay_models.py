"""The Kubernetes objects of a job: exactly the fields that are written, with the limits that their APIs set.

RayJob and RayCluster are those of KubeRay 1.5.1 and newer (ray.io/v1), PodMonitor that of the Prometheus operator
(monitoring.coreos.com/v1). The rules that KubeRay's operator checks only once it sees a RayJob are checked here.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

MAX_NAME = 47
"""Of a RayJob: its RayCluster's name is six characters longer, and that one's services have suffixes."""

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seconds = Annotated[int, Field(gt=0, le=2**31 - 1)]
Port = Annotated[int, Field(ge=1, le=65535)]
PortName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$", max_length=15)]
Amount = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?([EPTGMK]i|[EPTGMkm])?$")]
Label = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$", max_length=63)]
LabelKey = Annotated[
    str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")
]
Subdomain = Annotated[
    str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$", max_length=253)
]
DnsLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]


class Part(BaseModel):
    """Of a manifest; its fields are in camel case there."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


class Metadata(Part):
    name: Subdomain
    namespace: DnsLabel
    labels: dict[LabelKey, Label]


class PodMetadata(Part):
    labels: dict[LabelKey, Label]


class SecretKey(Part):
    name: Subdomain
    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=253)]


class ValueSource(Part):
    secret_key_ref: SecretKey


class Variable(Part):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str | None = None
    value_from: ValueSource | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.value is None) == (self.value_from is None):
            raise ValueError(f"{self.name}: either a value or the place of one")
        return self


class ContainerPort(Part):
    name: PortName
    container_port: Port


class Mount(Part):
    name: DnsLabel
    mount_path: Annotated[str, Field(pattern=r"^/[^:]*$")]
    read_only: bool | None = None


class Resources(Part):
    requests: dict[LabelKey, Amount]
    limits: dict[LabelKey, Amount]


class Command(Part):
    command: Annotated[list[str], Field(min_length=1)]


class Hook(Part):
    exec: Command


class Lifecycle(Part):
    pre_stop: Hook


class Capabilities(Part):
    add: list[str]


class ContainerSecurity(Part):
    capabilities: Capabilities


class Container(Part):
    name: DnsLabel
    image: Annotated[str, Field(min_length=1)]
    ports: list[ContainerPort] | None = None
    env: list[Variable] | None = None
    resources: Resources
    volume_mounts: list[Mount] | None = None
    lifecycle: Lifecycle | None = None
    security_context: ContainerSecurity | None = None


class Memory(Part):
    """emptyDir."""

    medium: Literal["Memory"] = "Memory"
    size_limit: Amount


class ConfigMapName(Part):
    name: Subdomain


class ClaimName(Part):
    claim_name: Subdomain


class Volume(Part):
    name: DnsLabel
    empty_dir: Memory | None = None
    config_map: ConfigMapName | None = None
    persistent_volume_claim: ClaimName | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.empty_dir, self.config_map, self.persistent_volume_claim)) != 1:
            raise ValueError(f"volume {self.name}: exactly one source")
        return self


class PodToleration(Part):
    key: LabelKey | None = None
    operator: Literal["Exists", "Equal"]
    value: Label | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class PodSecurity(Part):
    run_as_non_root: bool
    run_as_user: Count
    run_as_group: Count
    fs_group: Count
    fs_group_change_policy: Literal["Always", "OnRootMismatch"]


class SecretName(Part):
    name: Subdomain


class PodSpec(Part):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] | None = None
    service_account_name: Subdomain | None = None
    image_pull_secrets: list[SecretName] | None = None
    node_selector: dict[LabelKey, Label] | None = None
    tolerations: list[PodToleration] | None = None
    security_context: PodSecurity | None = None
    termination_grace_period_seconds: Count | None = None
    restart_policy: Literal["Always", "OnFailure", "Never"] | None = None

    @model_validator(mode="after")
    def _mounts_are_volumes(self) -> Self:
        volumes = {volume.name for volume in self.volumes or []}
        for container in self.containers:
            mounts = container.volume_mounts or []
            paths = [mount.mount_path for mount in mounts]
            twice = {path for path in paths if paths.count(path) > 1}
            if twice:
                raise ValueError(f"two volumes are mounted at {', '.join(sorted(twice))}")
            unknown = {mount.name for mount in mounts} - volumes
            if unknown:
                raise ValueError(f"mounts of volumes that are not there: {', '.join(sorted(unknown))}")
        return self


class PodTemplate(Part):
    metadata: PodMetadata
    spec: PodSpec


class HeadGroup(Part):
    ray_start_params: dict[str, str]
    template: PodTemplate


class WorkerGroup(Part):
    group_name: DnsLabel
    replicas: Count
    min_replicas: Count
    max_replicas: Count
    ray_start_params: dict[str, str]
    template: PodTemplate

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.min_replicas <= self.replicas <= self.max_replicas:
            raise ValueError(f"replicas {self.replicas}: not from {self.min_replicas} to {self.max_replicas}")
        return self


class AuthOptions(Part):
    mode: Literal["disabled", "token"]


class RayClusterSpec(Part):
    ray_version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+")]
    auth_options: AuthOptions
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]

    @model_validator(mode="after")
    def _knows_tokens(self) -> Self:
        major, minor = (int(part) for part in self.ray_version.split(".")[:2])
        if self.auth_options.mode == "token" and (major, minor) < (2, 52):
            raise ValueError(f"Ray {self.ray_version}: KubeRay gives tokens to Ray 2.52.0 and newer")
        return self


class RayJobSpec(Part):
    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    entrypoint: Annotated[str, Field(min_length=1)]
    backoff_limit: Count
    active_deadline_seconds: Seconds | None = None
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: Count
    suspend: bool | None = None
    submitter_pod_template: PodTemplate
    ray_cluster_spec: RayClusterSpec

    @model_validator(mode="after")
    def _as_the_operator_takes_it(self) -> Self:
        if not self.shutdown_after_job_finishes and (self.ttl_seconds_after_finished or self.suspend):
            raise ValueError("a time to live, and suspend, need shutdownAfterJobFinishes")
        if self.submission_mode == "InteractiveMode" and self.backoff_limit:
            raise ValueError("backoffLimit: not with InteractiveMode")
        return self


class RayJob(Part):
    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayJob"] = "RayJob"
    metadata: Metadata
    spec: RayJobSpec

    @model_validator(mode="after")
    def _short_name(self) -> Self:
        if len(self.metadata.name) > MAX_NAME or not self.metadata.name[0].isalpha() or "." in self.metadata.name:
            raise ValueError(f"{self.metadata.name}: not a RayJob's name: a letter first, up to {MAX_NAME} characters")
        return self


class ConfigMap(Part):
    api_version: Literal["v1"] = "v1"
    kind: Literal["ConfigMap"] = "ConfigMap"
    metadata: Metadata
    immutable: bool
    data: dict[str, str]


class Selector(Part):
    match_labels: dict[LabelKey, Label]


class Relabeling(Part):
    """A label of an endpoint: from labels of its pod that Prometheus finds, or always the same."""

    source_labels: list[Annotated[str, Field(pattern=r"^__meta_kubernetes_[a-z0-9_]+$")]] | None = None
    separator: str | None = None
    target_label: Annotated[str, Field(pattern=r"^[a-z_]+$")]
    replacement: str | None = None

    @model_validator(mode="after")
    def _from_somewhere(self) -> Self:
        if (self.source_labels is None) == (self.replacement is None):
            raise ValueError(f"{self.target_label}: either from other labels or always the same")
        return self


class Authorization(Part):
    """A bearer token."""

    credentials: SecretKey


class MetricsEndpoint(Part):
    port: PortName
    path: Annotated[str, Field(pattern=r"^/")]
    interval: Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m|h)$")]
    relabelings: list[Relabeling] | None = None
    authorization: Authorization | None = None


class PodMonitorSpec(Part):
    job_label: LabelKey
    pod_target_labels: list[LabelKey]
    selector: Selector
    pod_metrics_endpoints: Annotated[list[MetricsEndpoint], Field(min_length=1)]


class PodMonitor(Part):
    api_version: Literal["monitoring.coreos.com/v1"] = "monitoring.coreos.com/v1"
    kind: Literal["PodMonitor"] = "PodMonitor"
    metadata: Metadata
    spec: PodMonitorSpec


Manifest = ConfigMap | RayJob | PodMonitor
