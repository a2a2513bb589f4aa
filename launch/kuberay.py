"""Kubernetes: a RayJob, of which KubeRay's operator makes a Ray cluster of pods; the driver runs in its head.

N nodes are N worker pods with all ranks, and a small head pod with the driver and no rank. The config reaches the head
in a ConfigMap, so that nothing depends on the machine that submits. A ConfigMap cannot belong to a RayJob that is not
there yet, so Kubernetes does not delete it with one: `stop --now` deletes what a job has left, and everything carries
the labels symile-dist/run and symile-dist/job (`kubectl delete configmap -l symile-dist/run=NAME`).

SIGTERM at a pod's end reaches `ray start`, not the driver: hooks before it have the driver save, and the workers wait.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import ValidationError

from symile_dist.config import Config, local_path
from symile_dist.environment import EXPECTED_NODES, LAUNCH
from symile_dist.launch.environment import plain_environment, refuse_references
from symile_dist.launch.job import ENDED, Job, JobStatus, State
from symile_dist.launch.kuberay_models import (
    MAX_NAME,
    AuthOptions,
    Authorization,
    Capabilities,
    ClaimName,
    Command,
    ConfigMap,
    ConfigMapName,
    Container,
    ContainerPort,
    ContainerSecurity,
    HeadGroup,
    Hook,
    Lifecycle,
    Manifest,
    Memory,
    Metadata,
    MetricsEndpoint,
    Mount,
    PodMetadata,
    PodMonitor,
    PodMonitorSpec,
    PodSecurity,
    PodSpec,
    PodTemplate,
    PodToleration,
    RayClusterSpec,
    RayJob,
    RayJobSpec,
    Relabeling,
    Resources,
    SecretKey,
    SecretName,
    Selector,
    ValueSource,
    Variable,
    Volume,
    WorkerGroup,
)
from symile_dist.launch.local import state_of
from symile_dist.launch.processes import output_of
from symile_dist.metrics.discovery import run_id

WHAT = "--on kuberay"
RUN_LABEL, JOB_LABEL = "symile-dist/run", "symile-dist/job"
CONFIG_FOLDER, CONFIG_FILE = "/etc/symile-dist", "config.yaml"
METRICS_PORT, DRIVER_PORT = 9400, 9390
"""Of a node's first rank and of the driver, where the config leaves them to the system: Prometheus has to know them
beforehand."""
LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")
RAY_METRICS_PORT = 8080
OBJECT_STORE_BYTES = 2**30
"""/dev/shm is the loaders'; Ray would take a third of the pod's memory, and little goes through its store."""
POLL_SECONDS = 2.0
ANSWER_SECONDS = 30.0

DEPLOYMENT_STATES: dict[str, State] = {
    "": "queued",
    "Initializing": "queued",
    "Waiting": "queued",
    "Suspending": "queued",
    "Suspended": "queued",
    "Retrying": "queued",
    "Running": "running",
    "Failed": "failed",
    "ValidationFailed": "failed",
}
"""By RayJob.status.jobDeploymentStatus; of a `Complete` one the Ray job tells."""
JOB_STATES: dict[str, State] = {"SUCCEEDED": "finished", "FAILED": "failed", "STOPPED": "stopped"}

AWAY = "is the cluster to be reached from here? The profile's `context` names another one"
HINTS = {
    'kind "RayJob"': "is KubeRay's operator installed in the cluster?",
    'kind "PodMonitor"': "the cluster has no Prometheus operator: set `pod_monitor: false` in the profile",
    "authOptions": "KubeRay 1.5.1 or newer is needed",
    "connection to the server": AWAY,
    "Unable to connect": AWAY,
    "dial tcp": AWAY,
}

# The driver ends with 75 once everything is saved: for KubeRay a failure, after which it tries again, and goes on.
SAVE = """\
import psutil
driver = ["-m", "symile_dist", "train"]
found = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:4] == driver]
for process in found:
    process.terminate()
psutil.wait_procs(found)
"""
# All pods of a cluster that is deleted are told to end at once, and the ranks have to save first.
WAIT_FOR_RANKS = """\
import time
import psutil
title = "ray::TrainingRank"
while any((p.info["cmdline"] or [""])[0].startswith(title) for p in psutil.process_iter(["cmdline"])):
    time.sleep(1)
"""


def name_of(job: Job) -> str:
    """Of the job's objects: the run's name as Kubernetes takes it, and the submission's id."""
    stem = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    stem = stem if stem[:1].isalpha() else f"run-{stem}"
    return f"{stem[: MAX_NAME - len(job.id) - 1].rstrip('-')}-{job.id}"


def manifests(job: Job) -> list[Manifest]:
    """The objects of a job. Raises ValueError where the job cannot run on Kubernetes."""
    profile = job.profile.kuberay
    refuse_references(job, "env")
    if not profile.image:
        raise ValueError(
            f"{WHAT}: which image? Name one with symile-dist in it: `kuberay: {{image: ...}}` in a profile; docker/ "
            "makes one"
        )
    _refuse_unshared(job)
    try:
        made: list[Manifest] = [_config_map(job), _ray_job(job, profile.image)]
        return [*made, _pod_monitor(job)] if profile.pod_monitor else made
    except ValidationError as error:
        mistakes = (
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg'].removeprefix('Value error, ')} "
            f"(got {detail['input']!r})"
            if detail["loc"]
            else detail["msg"].removeprefix("Value error, ")
            for detail in error.errors()
        )
        raise ValueError(f"{WHAT}: not what Kubernetes takes: {'; '.join(mistakes)}") from None


def _refuse_unshared(job: Job) -> None:
    """Raises ValueError for each local path that no pod would see."""
    config, volumes = job.config, [claim.path for claim in job.profile.kuberay.volumes]
    places = {"run.directory": str(config.run_directory), "run.init_from": config.run.init_from}
    places |= {f"data.train.{name}.path": dataset.path for name, dataset in config.data.train.items()}
    places |= {"data.validation": config.data.validation, "data.test": config.data.test}
    places["checkpoint.mirror"] = config.checkpoint.mirror
    mounted = f"its volumes are at {', '.join(volumes)}" if volumes else "it has no volumes"
    mistakes = []
    for key, place in places.items():
        path = local_path(place) if place else None
        if path is not None and not any(path.is_relative_to(volume) for volume in volumes):
            mistakes.append(
                f"{WHAT}: {key}: {path} stands on no volume of the profile ({mounted}): the pods would not see it"
            )
    if mistakes:
        raise ValueError("\n".join(mistakes))


def config_for_pods(config: Config) -> Config:
    """The config with metrics that Prometheus reaches, where the user has left them as they are by default."""
    metrics = config.metrics
    if not metrics.enabled:
        return config
    changed = {
        "address": "0.0.0.0" if metrics.address == type(metrics)().address else metrics.address,
        "port": metrics.port or METRICS_PORT,
        "driver_port": metrics.driver_port or DRIVER_PORT,
    }
    return config.model_copy(update={"metrics": metrics.model_copy(update=changed)})


def _labels(job: Job) -> dict[str, str]:
    return {RUN_LABEL: re.sub(r"[^A-Za-z0-9]+$", "", job.name[:63]), JOB_LABEL: name_of(job)}


def _metadata(job: Job, more: dict[str, str] | None = None) -> Metadata:
    return Metadata(name=name_of(job), namespace=job.profile.kuberay.namespace, labels=_labels(job) | (more or {}))


def _config_map(job: Job) -> ConfigMap:
    return ConfigMap(metadata=_metadata(job), immutable=True, data={CONFIG_FILE: config_for_pods(job.config).to_yaml()})


def _rank_ports(job: Job) -> list[ContainerPort]:
    """Of the ranks of one worker pod."""
    metrics = config_for_pods(job.config).metrics
    ranks = math.ceil(job.config.world_size / job.nodes) if metrics.enabled else 0
    return [ContainerPort(name=f"rank-{rank}", container_port=metrics.port + rank) for rank in range(ranks)]


def _driver_ports(job: Job) -> list[ContainerPort]:
    metrics = config_for_pods(job.config).metrics
    return [ContainerPort(name="driver", container_port=metrics.driver_port)] if metrics.enabled else []


def _endpoint(job: Job, port: str, role: str) -> MetricsEndpoint:
    """With the labels that rules and dashboards go by. Which global rank a pod's first is nobody knows beforehand:
    `rank` is the pod's name and its port's."""
    labels = {"run": job.name, "run_id": run_id(job.config.run_directory), "role": role}
    relabelings = [Relabeling(target_label=label, replacement=value) for label, value in labels.items()]
    found = {"host": ["__meta_kubernetes_pod_node_name"]}
    if role == "rank":
        found["rank"] = ["__meta_kubernetes_pod_name", "__meta_kubernetes_pod_container_port_name"]
    relabelings += [
        Relabeling(source_labels=sources, separator="/" if len(sources) > 1 else None, target_label=label)
        for label, sources in found.items()
    ]
    secret, _, key = (job.profile.kuberay.pod_monitor_token or "").partition("/")
    authorization = Authorization(credentials=SecretKey(name=secret, key=key)) if secret else None
    return MetricsEndpoint(
        port=port, path="/metrics", interval="15s", relabelings=relabelings, authorization=authorization
    )


def _refuse_unreachable(job: Job) -> None:
    """Raises ValueError where a PodMonitor would find nothing."""
    metrics = job.config.metrics
    if not metrics.enabled:
        return
    if LOOPBACK.fullmatch(config_for_pods(job.config).metrics.address):
        raise ValueError(
            f"{WHAT}: metrics.address={metrics.address}: Prometheus reaches no pod's loopback; leave the key out (all "
            "interfaces), or set `pod_monitor: false` in the profile"
        )
    if metrics.token_file and not job.profile.kuberay.pod_monitor_token:
        raise ValueError(
            f"{WHAT}: metrics.token_file: Prometheus needs the token too; name a secret that holds it, "
            "`pod_monitor_token: SECRET/KEY` in the profile, or set `pod_monitor: false`"
        )


def _pod_monitor(job: Job) -> PodMonitor:
    _refuse_unreachable(job)
    endpoints = [MetricsEndpoint(port="metrics", path="/metrics", interval="15s")]  # of Ray
    endpoints += [_endpoint(job, port.name, "driver") for port in _driver_ports(job)]
    endpoints += [_endpoint(job, port.name, "rank") for port in _rank_ports(job)]
    return PodMonitor(
        metadata=_metadata(job, job.profile.kuberay.pod_monitor_labels),
        spec=PodMonitorSpec(
            job_label=RUN_LABEL,
            pod_target_labels=[JOB_LABEL],
            selector=Selector(match_labels={JOB_LABEL: name_of(job)}),
            pod_metrics_endpoints=endpoints,
        ),
    )


def _gang_labels(job: Job) -> dict[str, str]:
    """On the RayJob, from which KubeRay passes them on."""
    profile = job.profile.kuberay
    queue = profile.queue
    if profile.gang == "kueue":
        return {"kueue.x-k8s.io/queue-name": queue or ""}
    if profile.gang == "volcano":
        return {"ray.io/scheduler-name": "volcano"} | ({"volcano.sh/queue-name": queue} if queue else {})
    if profile.gang == "yunikorn":
        labels = {"ray.io/gang-scheduling-enabled": "true", "yunikorn.apache.org/app-id": name_of(job)}
        return labels | ({"yunikorn.apache.org/queue": queue} if queue else {})
    return {}


def _environment(job: Job) -> list[Variable]:
    """Of every pod of the Ray cluster."""
    plain = plain_environment(job) | {
        EXPECTED_NODES: str(job.nodes + 1),  # the head is one of Ray's nodes too
        # Ray kills a job that was asked to stop, and has not, after this.
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(job.config.ray.grace_seconds) + 15),
        LAUNCH: json.dumps({"name": job.name, "job": job.id, "backend": "kuberay", "handle": handle_of(job)}),
    }
    variables = {name: Variable(name=name, value=value) for name, value in plain.items()}
    for name, where in job.profile.secrets.items():
        if where.startswith("secret:"):
            secret, _, key = where.removeprefix("secret:").partition("/")
            source = ValueSource(secret_key_ref=SecretKey(name=secret, key=key))
            variables[name] = Variable(name=name, value_from=source)
    return list(variables.values())


def _pod(job: Job, container: Container, **more: Any) -> PodTemplate:
    """What all pods have in common."""
    profile = job.profile.kuberay
    user = profile.user_id
    security = None
    if user is not None:
        security = PodSecurity(
            run_as_non_root=True,
            run_as_user=user,
            run_as_group=user,
            fs_group=user,
            # A large volume takes minutes to give to the group, and is its own after the first time.
            fs_group_change_policy="OnRootMismatch",
        )
    spec = PodSpec(
        containers=[container],
        service_account_name=profile.service_account,
        image_pull_secrets=[SecretName(name=name) for name in profile.image_pull_secrets] or None,
        security_context=security,
        **more,
    )
    return PodTemplate(metadata=PodMetadata(labels=_labels(job)), spec=spec)


def _same(**amounts: str) -> Resources:
    """Requests that are the limits: such a pod is the last to be put out."""
    return Resources(requests=amounts, limits=amounts)


def _before_stop(job: Job, script: str) -> Lifecycle:
    return Lifecycle(pre_stop=Hook(exec=Command(command=[job.profile.python or "python3", "-c", script])))


def _head(job: Job, image: str) -> HeadGroup:
    profile = job.profile.kuberay
    claims, mounts = _shared(job)
    container = Container(
        name="ray-head",
        image=image,
        ports=[
            ContainerPort(name="gcs-server", container_port=6379),
            ContainerPort(name="dashboard", container_port=8265),
            ContainerPort(name="client", container_port=10001),
            ContainerPort(name="metrics", container_port=RAY_METRICS_PORT),
            *_driver_ports(job),
        ],
        env=_environment(job),
        resources=_same(cpu=str(profile.head_cpus), memory=profile.head_memory),
        volume_mounts=[Mount(name="config", mount_path=CONFIG_FOLDER, read_only=True), *mounts],
        lifecycle=_before_stop(job, SAVE),
    )
    template = _pod(
        job,
        container,
        volumes=[Volume(name="config", config_map=ConfigMapName(name=name_of(job))), *claims],
        termination_grace_period_seconds=_grace_seconds(job),
    )
    # Without CPUs no rank comes here.
    start = {"dashboard-host": "0.0.0.0", "num-cpus": "0", "object-store-memory": str(OBJECT_STORE_BYTES)}
    return HeadGroup(ray_start_params=start, template=template)


def _workers(job: Job, image: str) -> WorkerGroup:
    profile = job.profile.kuberay
    claims, mounts = _shared(job)
    gpus = {profile.gpu_resource: str(job.gpus_per_node)} if job.gpus_per_node else {}
    extra = {name: str(amount) for name, amount in profile.extra_resources.items()}
    capabilities = profile.capabilities
    container = Container(
        name="ray-worker",
        image=image,
        ports=[ContainerPort(name="metrics", container_port=RAY_METRICS_PORT), *_rank_ports(job)],
        env=_environment(job),
        resources=_same(cpu=str(job.cpus_per_node), memory=profile.memory_per_node, **gpus, **extra),
        volume_mounts=[Mount(name="shared-memory", mount_path="/dev/shm"), *mounts],
        lifecycle=_before_stop(job, WAIT_FOR_RANKS),
        security_context=ContainerSecurity(capabilities=Capabilities(add=capabilities)) if capabilities else None,
    )
    template = _pod(
        job,
        container,
        volumes=[Volume(name="shared-memory", empty_dir=Memory(size_limit=profile.shared_memory)), *claims],
        node_selector=profile.node_selector or None,
        tolerations=[PodToleration(**toleration.model_dump()) for toleration in profile.tolerations] or None,
        termination_grace_period_seconds=_grace_seconds(job),
    )
    start = {
        "num-cpus": str(job.cpus_per_node),
        "num-gpus": str(job.gpus_per_node),
        "object-store-memory": str(OBJECT_STORE_BYTES),
    }
    return WorkerGroup(
        group_name="workers",
        replicas=job.nodes,
        min_replicas=job.nodes,
        max_replicas=job.nodes,
        ray_start_params=start,
        template=template,
    )


def _grace_seconds(job: Job) -> int:
    return math.ceil(job.config.ray.grace_seconds) + 30


def _shared(job: Job) -> tuple[list[Volume], list[Mount]]:
    """The profile's volumes, in every pod of the Ray cluster."""
    claims = {f"volume-{number}": claim for number, claim in enumerate(job.profile.kuberay.volumes)}
    volumes = [
        Volume(name=name, persistent_volume_claim=ClaimName(claim_name=claim.claim)) for name, claim in claims.items()
    ]
    return volumes, [Mount(name=name, mount_path=claim.path) for name, claim in claims.items()]


def _ray_job(job: Job, image: str) -> RayJob:
    profile = job.profile.kuberay
    python = job.profile.python or "python3"
    # KubeRay's own would know neither the registry's secret nor the service account.
    submitter = _pod(
        job,
        Container(name="ray-job-submitter", image=image, resources=_same(cpu="500m", memory="1Gi")),
        restart_policy="Never",
    )
    return RayJob(
        metadata=_metadata(job, _gang_labels(job)),
        spec=RayJobSpec(
            submission_mode="K8sJobMode",  # its pod keeps the job's words when the Ray cluster has gone
            entrypoint=shlex.join(
                [python, "-m", "symile_dist", *job.train_arguments(f"{CONFIG_FOLDER}/{CONFIG_FILE}")]
            ),
            backoff_limit=profile.backoff_limit,
            active_deadline_seconds=job.minutes * 60 if job.minutes else None,
            shutdown_after_job_finishes=True,
            ttl_seconds_after_finished=profile.ttl_seconds,
            suspend=True if profile.gang == "kueue" else None,  # until Kueue has room for all of it
            submitter_pod_template=submitter,
            ray_cluster_spec=RayClusterSpec(
                ray_version=profile.ray_version,
                # Ray 2.60 wants a token anyway: KubeRay makes one, and gives it to all pods.
                auth_options=AuthOptions(mode="token"),
                head_group_spec=_head(job, image),
                worker_group_specs=[_workers(job, image)],
            ),
        ),
    )


class _Dumper(yaml.SafeDumper):
    """Text of several lines stands as such, and what stands twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def manifest_text(job: Job) -> str:
    """The objects as YAML documents. Raises ValueError as `manifests`."""
    documents = [made.model_dump(mode="json", by_alias=True, exclude_none=True) for made in manifests(job)]
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def handle_of(job: Job) -> dict[str, Any]:
    name, profile = name_of(job), job.profile.kuberay
    objects = [f"rayjobs.ray.io/{name}", f"configmaps/{name}"]
    objects += [f"podmonitors.monitoring.coreos.com/{name}"] if profile.pod_monitor else []
    where = {"namespace": profile.namespace} | ({"context": profile.context} if profile.context else {})
    return {"id": name, **where, "objects": objects}


def _kubectl(handle: dict[str, Any], *arguments: str) -> list[str]:
    context = ["--context", handle["context"]] if handle.get("context") else []
    return ["kubectl", *context, "--namespace", handle["namespace"], *arguments]


def _ask(handle: dict[str, Any], *arguments: str, text: str | None = None) -> str:
    """What kubectl answers. Raises ValueError with what it said, and what may help."""
    try:
        return output_of(_kubectl(handle, *arguments), WHAT, text, ANSWER_SECONDS)
    except ValueError as error:
        hint = next((f"\n  {hint}" for words, hint in HINTS.items() if words in str(error)), "")
        raise ValueError(f"{error}{hint}") from None


def _check_claims(job: Job, handle: dict[str, Any]) -> None:
    """Raises ValueError for a claim that is not there, or that cannot hold what several pods write."""
    claims = job.profile.kuberay.volumes
    home = max(
        (claim for claim in claims if job.config.run_directory.is_relative_to(claim.path)),
        key=lambda claim: len(claim.path),
    )
    for name in dict.fromkeys(claim.claim for claim in claims):
        try:
            found = json.loads(_ask(handle, "get", "persistentvolumeclaims", name, "-o", "json"))
        except ValueError as error:
            if "Forbidden" in str(error):  # whoever may make jobs need not be let see these
                return
            raise
        modes = found.get("spec", {}).get("accessModes", [])
        if name == home.claim and "ReadWriteMany" not in modes:
            raise ValueError(
                f"{WHAT}: the claim {name}, which holds run.directory, allows {', '.join(modes) or 'nothing'}: all "
                "pods write there, which needs ReadWriteMany"
            )


def _check_names(job: Job, handle: dict[str, Any]) -> None:
    """Raises ValueError for a secret or service account that is not there: pods would wait for it for ever."""
    profile = job.profile.kuberay
    keys = [where.removeprefix("secret:") for where in job.profile.secrets.values() if where.startswith("secret:")]
    secrets = [*(key.partition("/")[0] for key in keys), *profile.image_pull_secrets]
    names = [f"secret/{name}" for name in dict.fromkeys(secrets)]
    names += [f"serviceaccount/{profile.service_account}"] if profile.service_account else []
    if not names:
        return
    try:
        _ask(handle, "get", "-o", "name", *names)
    except ValueError as error:
        if "Forbidden" not in str(error):
            raise


class KubeRayBackend:
    """See `job.Backend`."""

    def check(self, job: Job) -> None:
        text, handle = manifest_text(job), handle_of(job)
        if not shutil.which("kubectl"):
            raise ValueError(f"{WHAT}: the command kubectl is not here; --dry-run prints what it would be given")
        # The server looks at everything but keeps nothing: types, rights, quotas, names.
        _ask(handle, "create", "--dry-run=server", "-o", "name", "-f", "-", text=text)
        _check_names(job, handle)
        _check_claims(job, handle)

    def render(self, job: Job) -> str:
        return manifest_text(job)

    def submit(self, job: Job) -> dict[str, Any]:
        handle = handle_of(job)
        _ask(handle, "create", "-o", "name", "-f", "-", text=manifest_text(job))
        return handle

    def status(self, handle: dict[str, Any]) -> JobStatus:
        """The exit code is the driver's, where Ray has told it to KubeRay; else 1 for a failure. 75: stopped."""
        try:
            told = _status(handle)
        except ValueError as error:
            if "(NotFound)" in str(error):
                gone = f"there is no RayJob {handle['id']} in {handle['namespace']}: it was deleted"
                return JobStatus("lost", None, gone, {"id": handle["id"]})
            raise
        deployment, ray = told.get("jobDeploymentStatus", ""), told.get("jobStatus", "")
        message = (told.get("message") or "").strip().partition("\n")[0]
        states = JOB_STATES if deployment == "Complete" else DEPLOYMENT_STATES
        state = states.get(ray if deployment == "Complete" else deployment, "unknown")
        code: int | None = {"finished": 0, "stopped": 75}.get(state)
        if state == "failed":
            code = _driver_code(message)
            state = state_of(code)
        words = [f"RayJob {handle['id']}", deployment.lower() or "new"]
        if state == "running" and ray:
            words.append(f"its Ray job {ray.lower()}")
        cluster = told.get("rayClusterStatus", {})
        if state in ("queued", "running") and cluster.get("desiredWorkerReplicas"):
            words.append(f"{cluster.get('readyWorkerReplicas', 0)} of {cluster['desiredWorkerReplicas']} workers ready")
        if state in ("failed", "stopped", "unknown"):
            words += [word for word in (told.get("reason"), message) if word]
        facts = {"id": handle["id"], "cluster": told.get("rayClusterName", ""), "failures": told.get("failed", 0)}
        return JobStatus(state, code, ", ".join(words), facts)

    def logs(self, handle: dict[str, Any], follow: bool) -> Iterator[str]:
        """Of the pod that submits the Ray job and repeats its words. A driver that is started again has a new one."""
        command = ["logs", f"job/{handle['id']}"]
        if not follow:
            yield _ask(handle, *command)
            return
        since: list[str] = []
        while True:
            state = self.status(handle).state
            if state != "queued":
                seen = False
                try:
                    for line in _lines(_kubectl(handle, *command, "--follow", *since)):
                        seen = True
                        yield line
                    if self.status(handle).state in ENDED:
                        return
                except ValueError:  # the pod is being started, or the connection was lost
                    if state in ENDED:
                        raise
                if seen:
                    since = [f"--since-time={time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() + 1))}"]
            time.sleep(POLL_SECONDS)

    def stop(self, handle: dict[str, Any], now: bool) -> None:
        """Ray sends the driver SIGTERM; a job that is stopped so is not tried again. One that waits is deleted."""
        if now or self.status(handle).state == "queued":
            _ask(handle, "delete", "--ignore-not-found", "--wait=false", *handle["objects"])
            return
        told = _status(handle)
        labels = f"ray.io/cluster={told.get('rayClusterName', '')},ray.io/node-type=head"
        head = _ask(handle, "get", "pods", "-l", labels, "-o", "name").split()
        if not head or not told.get("jobId"):
            raise ValueError(f"{WHAT}: {handle['id']} has no head pod yet; try again, or `stop --now`")
        inside = ["ray", "job", "stop", "--no-wait", "--address", "http://127.0.0.1:8265", told["jobId"]]
        _ask(handle, "exec", head[0], "-c", "ray-head", "--", *inside)


def _status(handle: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(_ask(handle, "get", "rayjobs.ray.io", handle["id"], "-o", "json"))
    status: dict[str, Any] = found.get("status") or {}
    return status


def _driver_code(message: str) -> int:
    """Ray's words for a driver that has failed hold its exit code."""
    found = re.search(r"exit code (-?\d+)", message)
    code = int(found[1]) if found else 1
    return code if code >= 0 else 128 - code  # ended by a signal: as a shell has it


def _lines(command: list[str]) -> Iterator[str]:
    """What a command writes, as it comes. Raises ValueError, with what the command said, where it fails."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace")
        assert process.stdout
        try:
            yield from process.stdout
            failed = process.wait()
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        if failed:
            raise ValueError(f"{WHAT}: {command[0]}: {errors.read().strip() or f'exit code {failed}'}")
