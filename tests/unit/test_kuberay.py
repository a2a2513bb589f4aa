"""What is given to Kubernetes, and what is made of its answers. kubectl is a script that answers from files.

`python -m tests.unit.test_kuberay` writes the golden files anew: look at the difference before you keep it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from pydantic import ValidationError

from symile_dist.cli import main
from symile_dist.config import parse_config
from symile_dist.environment import EXPECTED_NODES, LAUNCH, SECRETS
from symile_dist.launch import kuberay
from symile_dist.launch.job import Job
from symile_dist.launch.kuberay import KubeRayBackend, handle_of, manifest_text, name_of
from symile_dist.launch.kuberay_models import RayJob, Volume, WorkerGroup
from symile_dist.launch.profiles import KubeRayProfile, Profile, Toleration
from symile_dist.metrics.discovery import targets
from tests.shards import config_text
from tests.unit.rayjob_schema import POD_MONITOR, RAY_JOB

GOLDEN = Path(__file__).parent / "golden"
SIZES = (1, 8, 128)
IMAGE = "registry.example.org/symile-dist:1.0"

PROFILES = {
    "plain": {"image": IMAGE, "volumes": [{"claim": "shared", "path": "/shared"}]},
    "everything": {
        "image": IMAGE,
        "namespace": "research",
        "context": "training",
        "image_pull_secrets": ["registry"],
        "service_account": "trainer",
        "node_selector": {"cloud.example.org/pool": "h100"},
        "tolerations": [
            {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
            {"key": "reserved", "operator": "Equal", "value": "research"},
        ],
        "volumes": [{"claim": "runs", "path": "/shared/runs"}, {"claim": "data", "path": "/shared"}],
        "extra_resources": {"vpc.amazonaws.com/efa": 4, "hugepages-2Mi": "5120Mi"},
        "capabilities": ["IPC_LOCK"],
        "gang": "kueue",
        "queue": "team-a",
        "pod_monitor_labels": {"release": "prometheus"},
    },
    "as the image says": {
        "image": IMAGE,
        "volumes": [{"claim": "shared", "path": "/shared"}],
        "user_id": None,
        "pod_monitor": False,
    },
    "volcano": {"image": IMAGE, "volumes": [{"claim": "s", "path": "/shared"}], "gang": "volcano", "queue": "q"},
    "yunikorn": {"image": IMAGE, "volumes": [{"claim": "s", "path": "/shared"}], "gang": "yunikorn", "queue": "root.q"},
}
ENVIRONMENT = {"NCCL_SOCKET_IFNAME": "eth0", "FI_PROVIDER": "efa"}
STORE = {"AWS_ACCESS_KEY_ID": "secret:store/id", "AWS_SECRET_ACCESS_KEY": "secret:store/key"}


def job_of(
    nodes: int = 2, gpus: int = 8, overrides: tuple[str, ...] = (), kuberay: str = "plain", **changes: Any
) -> Job:
    given = [
        "run.directory=/shared/runs/mine",
        "data.validation=s3://bucket/validation",
        f"ray.num_workers={nodes * max(1, gpus)}",
        f"ray.gpus_per_worker={min(1, gpus)}",
        f"train.global_batch_size={nodes * max(1, gpus) * 4}",
        "metrics.enabled=true",
        *overrides,
    ]
    config = parse_config(config_text("/shared/data/train", run="Mine_1.b"), "my.yaml", given).config
    values: dict[str, Any] = {"environment": ENVIRONMENT, "secrets": STORE, "kuberay": PROFILES[kuberay]}
    profile = Profile.model_validate(values | changes.pop("profile", {}))
    sizes = {"nodes": nodes, "gpus_per_node": gpus, "cpus_per_node": 2 * max(1, gpus), "id": "20260102-030405"}
    return Job(config.with_absolute_paths(), profile=profile, **(sizes | changes))


def documents_of(text: str) -> dict[str, Any]:
    """By kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def documents(job: Job) -> dict[str, Any]:
    return documents_of(manifest_text(job))


def pods(ray_job: dict[str, Any]) -> dict[str, Any]:
    """Pod templates of a RayJob."""
    cluster = ray_job["spec"]["rayClusterSpec"]
    templates = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {
        **templates,
        "head": cluster["headGroupSpec"]["template"],
        "submitter": ray_job["spec"]["submitterPodTemplate"],
    }


def variables(template: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable for variable in template["spec"]["containers"][0]["env"]}


def golden_text(nodes: int) -> str:
    """The manifest without the config in it, whose keys are another's matter."""
    job = job_of(nodes, kuberay="everything", minutes=720)
    config = kuberay.config_for_pods(job.config).to_yaml()
    lines = "".join(f"    {line}\n" if line.strip() else "\n" for line in config.splitlines())
    text = manifest_text(job)
    assert lines in text, "the config does not stand in the ConfigMap as it is"
    return text.replace(lines, "    (the config)\n")


@pytest.mark.parametrize("nodes", SIZES)
def test_manifest_is_the_golden_one(nodes: int) -> None:
    expected = (GOLDEN / f"kuberay-{nodes}.yaml").read_text(encoding="utf-8")
    assert golden_text(nodes) == expected, "meant? `python -m tests.unit.test_kuberay` writes the golden files anew"


@pytest.mark.parametrize("gpus", [0, 8])
@pytest.mark.parametrize("profile", PROFILES)
def test_manifests_have_only_published_fields(profile: str, gpus: int) -> None:
    for minutes in (None, 60):
        made = documents(job_of(gpus=gpus, kuberay=profile, minutes=minutes))
        jsonschema.validate(made["RayJob"], RAY_JOB)
        if "PodMonitor" in made:
            jsonschema.validate(made["PodMonitor"], POD_MONITOR)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backofLimit"), 3),
        (("spec", "backoffLimit"), "3"),
        (("spec", "submissionMode"), "K8sMode"),
        (("spec", "activeDeadlineSeconds"), 0),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), 2.5),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "gpus"), 1),
        (("metadata", "name"), "1-begins-with-a-digit"),
        (("metadata", "name"), "n" * 48),
    ],
)
def test_the_schema_finds_mistakes(path: tuple[Any, ...], value: Any) -> None:
    made = documents(job_of())["RayJob"]
    at = made
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(made, RAY_JOB)


@pytest.mark.parametrize("profile", PROFILES)
def test_kubernetes_takes_the_pods(profile: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    made = documents(job_of(kuberay=profile))
    objects = [made["ConfigMap"]]
    for name, template in pods(made["RayJob"]).items():
        objects.append({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template})
    for each in objects:
        validate.validate(each, "1.32", strict=True)
    objects[-1]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(validate.ValidationError):
        validate.validate(objects[-1], "1.32", strict=True)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("demo-symile", "demo-symile-20260102-030405"),
        ("Demo_1.B", "demo-1-b-20260102-030405"),
        ("2nd", "run-2nd-20260102-030405"),
        ("a" * 60, "a" * 31 + "-20260102-030405"),
        ("a" * 30 + "__b", "a" * 30 + "-20260102-030405"),
        ("x.", "x-20260102-030405"),
    ],
)
def test_names_are_what_kubernetes_takes(run: str, expected: str) -> None:
    job = job_of(overrides=(f"run.name={run}",))
    assert name_of(job) == expected
    made = documents(job)
    jsonschema.validate(made["RayJob"], RAY_JOB)
    assert {each["metadata"]["name"] for each in made.values()} == {expected}
    assert name_of(replace(job, id="20260102-030405-2")) != expected, "another submission has the same name"


def test_the_config_goes_along_with_metrics_that_prometheus_reaches() -> None:
    job = job_of()
    made = documents(job)
    sent = parse_config(made["ConfigMap"]["data"]["config.yaml"], "config.yaml").config
    assert (sent.metrics.address, sent.metrics.port, sent.metrics.driver_port) == ("0.0.0.0", 9400, 9390)
    assert sent.model_copy(update={"metrics": job.config.metrics}) == job.config, "more than the metrics was changed"
    head = pods(made["RayJob"])["head"]["spec"]
    mount = next(mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "config")
    assert f"{mount['mountPath']}/config.yaml" in made["RayJob"]["spec"]["entrypoint"]
    assert mount["readOnly"] and {"name": "config", "configMap": {"name": name_of(job)}} in head["volumes"]


def test_each_rank_of_a_pod_is_scraped() -> None:
    def ports(*overrides: str, nodes: int = 2) -> tuple[list[str], dict[str, int]]:
        made = documents(job_of(nodes=nodes, overrides=overrides))
        container = pods(made["RayJob"])["workers"]["spec"]["containers"][0]
        monitor = made["PodMonitor"]["spec"]
        labels = pods(made["RayJob"])["workers"]["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items(), "the monitor finds no pod"
        return [each["port"] for each in monitor["podMetricsEndpoints"]], {
            port["name"]: port["containerPort"] for port in container["ports"]
        }

    scraped, open_ports = ports()
    assert scraped == ["metrics", "driver", *(f"rank-{rank}" for rank in range(8))]
    assert set(scraped) - {"driver"} == set(open_ports), "the driver is in the head"
    assert [open_ports[f"rank-{rank}"] for rank in range(8)] == list(range(9400, 9408))
    assert ports("metrics.port=7000")[1]["rank-7"] == 7007
    assert ports("metrics.enabled=false") == (["metrics"], {"metrics": 8080})


def test_metrics_that_the_user_has_set_stay() -> None:
    sent = documents(job_of(overrides=("metrics.address=10.0.0.1", "metrics.port=7000")))["ConfigMap"]["data"]
    metrics = yaml.safe_load(sent["config.yaml"])["metrics"]
    assert (metrics["address"], metrics["port"]) == ("10.0.0.1", 7000)


def test_endpoints_have_the_labels_that_rules_and_dashboards_go_by() -> None:
    job = job_of()
    made = documents(job)
    head = pods(made["RayJob"])["head"]["spec"]["containers"][0]
    assert {"name": "driver", "containerPort": 9390} in head["ports"]
    expected = targets(job.name, job.config.run_directory, "http://head:9390/metrics", [])[0]["labels"]
    for endpoint in made["PodMonitor"]["spec"]["podMetricsEndpoints"]:
        labels = {each["targetLabel"]: each.get("replacement") for each in endpoint.get("relabelings", [])}
        if endpoint["port"] == "metrics":
            assert not labels, "those of Ray are no run's"
        elif endpoint["port"] == "driver":
            assert expected.items() <= labels.items() and set(labels) == {*expected, "host"}
        else:
            assert labels.pop("role") == "rank" and labels.items() >= {"run": "Mine_1.b"}.items()
            assert set(labels) == {"run", "run_id", "rank", "host"}


def test_a_pod_monitor_that_would_find_nothing_is_refused() -> None:
    for address in ("localhost", "127.0.0.2", "::1"):
        with pytest.raises(ValueError, match="reaches no pod's loopback"):
            manifest_text(job_of(overrides=(f"metrics.address={json.dumps(address)}",)))
        manifest_text(job_of(overrides=(f"metrics.address={json.dumps(address)}",), kuberay="as the image says"))
    manifest_text(job_of(overrides=("metrics.address=localhost", "metrics.enabled=false")))
    guarded = ("metrics.token_file=/shared/token",)
    with pytest.raises(ValueError, match="pod_monitor_token"):
        manifest_text(job_of(overrides=guarded))
    told = PROFILES["plain"] | {"pod_monitor_token": "metrics/token"}
    made = documents(job_of(overrides=guarded, profile={"kuberay": told}))["PodMonitor"]
    jsonschema.validate(made, POD_MONITOR)
    endpoints = {each["port"]: each for each in made["spec"]["podMetricsEndpoints"]}
    assert endpoints["rank-0"]["authorization"] == {"credentials": {"name": "metrics", "key": "token"}}
    assert "authorization" not in endpoints["metrics"], "Ray's own is another server"


@pytest.mark.parametrize("nodes", SIZES)
def test_ranks_are_in_the_workers_alone(nodes: int) -> None:
    ray_job = documents(job_of(nodes))["RayJob"]
    cluster = ray_job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == nodes
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert (workers["rayStartParams"]["num-cpus"], workers["rayStartParams"]["num-gpus"]) == ("16", "8")
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits["cpu"], limits["nvidia.com/gpu"]) == ("16", "8")
    for name in ("head", "workers"):
        expected = variables(pods(ray_job)[name])[EXPECTED_NODES]["value"]
        assert expected == str(nodes + 1), "the head counts as a node of Ray"


def test_without_gpus_none_are_asked_for() -> None:
    workers = documents(job_of(gpus=0))["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert workers["rayStartParams"]["num-gpus"] == "0"
    assert set(workers["template"]["spec"]["containers"][0]["resources"]["limits"]) == {"cpu", "memory"}


def test_a_job_has_time_to_save() -> None:
    ray_job = documents(job_of(overrides=("ray.grace_seconds=100",), minutes=30))["RayJob"]
    assert ray_job["spec"]["activeDeadlineSeconds"] == 1800
    for name in ("head", "workers"):
        template = pods(ray_job)[name]
        assert template["spec"]["terminationGracePeriodSeconds"] == 130
        assert variables(template)["RAY_JOB_STOP_WAIT_TIME_S"]["value"] == "115"
        assert template["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][:2] == ["python3", "-c"]


def test_the_job_knows_where_it_runs() -> None:
    job = job_of()
    record = json.loads(variables(pods(documents(job)["RayJob"])["head"])[LAUNCH]["value"])
    assert record == {"name": "Mine_1.b", "job": job.id, "backend": "kuberay", "handle": handle_of(job)}


def test_the_entrypoint_is_the_profiles_python() -> None:
    job = job_of(profile={"python": "/opt/my env/bin/python"}, resume=True)
    entrypoint = documents(job)["RayJob"]["spec"]["entrypoint"]
    assert entrypoint == "'/opt/my env/bin/python' -m symile_dist train /etc/symile-dist/config.yaml --plain --resume"


def test_secrets_are_named_not_written() -> None:
    ray_job = documents(job_of(profile={"secrets": {**STORE, "WANDB_API_KEY": "file:/run/secrets/wandb"}}))["RayJob"]
    for name in ("head", "workers"):
        found = variables(pods(ray_job)[name])
        assert found["AWS_ACCESS_KEY_ID"]["valueFrom"] == {"secretKeyRef": {"name": "store", "key": "id"}}
        assert json.loads(found[SECRETS]["value"]) == {"WANDB_API_KEY": "/run/secrets/wandb"}
        assert found["NCCL_SOCKET_IFNAME"]["value"] == "eth0"
        assert "WANDB_API_KEY" not in found


def test_secrets_of_this_machine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "hidden")
    with pytest.raises(ValueError, match="'env:' does not reach"):
        manifest_text(job_of(profile={"secrets": {"AWS_ACCESS_KEY_ID": "env:MY_KEY"}}))


def test_paths_that_no_pod_sees_are_all_told() -> None:
    overrides = ("run.directory=/home/me/run", "data.validation=/home/me/val", "run.init_from=/shared/runs/a")
    with pytest.raises(ValueError) as caught:
        manifest_text(job_of(overrides=(*overrides, "data.test=/shared-not/test")))
    told = str(caught.value)
    assert [line.split(": ")[1] for line in told.splitlines()] == ["run.directory", "data.validation", "data.test"]
    assert "its volumes are at /shared" in told


def test_without_an_image_or_volumes_nothing_is_made() -> None:
    with pytest.raises(ValueError, match="which image"):
        manifest_text(job_of(profile={"kuberay": {}}))
    with pytest.raises(ValueError, match=r"run\.directory: .* \(it has no volumes\)"):
        manifest_text(job_of(profile={"kuberay": {"image": IMAGE}}))


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        ({"namespace": "My_Team"}, "namespace"),
        ({"service_account": "UPPER"}, "service_account"),
        ({"node_selector": {"pool": "not a label"}}, "node_selector"),
        ({"ray_version": "2.9.0"}, "2.52.0"),
        ({"volumes": [{"claim": "a", "path": "/shared"}, {"claim": "b", "path": "/shared"}]}, "two volumes"),
    ],
)
def test_a_profile_that_kubernetes_would_refuse_is_told(profile: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"--on kuberay: .*{told}"):
        manifest_text(job_of(profile={"kuberay": PROFILES["plain"] | profile}))


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        ({"gang": "kueue"}, "needs a queue"),
        ({"queue": "q"}, "of no use without"),
        ({"shared_memory": "16GB"}, "pattern"),
        ({"tolerations": [{"operator": "Equal", "value": "x"}]}, "needs the taint's key"),
        ({"tolerations": [{"key": "k", "value": "x"}]}, "compares no value"),
        ({"volumes": [{"claim": "c", "path": "relative"}]}, "pattern"),
    ],
)
def test_a_profile_that_makes_no_sense_is_told(profile: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        KubeRayProfile.model_validate(profile)
    assert Toleration().operator == "Exists"


@pytest.mark.parametrize(
    ("profile", "labels", "suspend"),
    [
        ("everything", {"kueue.x-k8s.io/queue-name": "team-a"}, True),
        ("volcano", {"ray.io/scheduler-name": "volcano", "volcano.sh/queue-name": "q"}, None),
        (
            "yunikorn",
            {
                "ray.io/gang-scheduling-enabled": "true",
                "yunikorn.apache.org/app-id": "mine-1-b-20260102-030405",
                "yunikorn.apache.org/queue": "root.q",
            },
            None,
        ),
    ],
)
def test_all_pods_or_none(profile: str, labels: dict[str, str], suspend: bool | None) -> None:
    ray_job = documents(job_of(kuberay=profile))["RayJob"]
    own = {"symile-dist/run": "Mine_1.b", "symile-dist/job": "mine-1-b-20260102-030405"}
    assert ray_job["metadata"]["labels"] == own | labels
    assert ray_job["spec"].get("suspend") == suspend


def test_models_refuse_what_the_operator_would() -> None:
    made = documents(job_of())["RayJob"]
    RayJob.model_validate(made)
    for change in ({"shutdownAfterJobFinishes": False}, {"submissionMode": "InteractiveMode"}, {"ttl": 3}):
        with pytest.raises(ValidationError):
            RayJob.model_validate({**made, "spec": made["spec"] | change})
    group = made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    with pytest.raises(ValidationError, match="not from 3"):
        WorkerGroup.model_validate(group | {"minReplicas": 3})
    with pytest.raises(ValidationError, match="exactly one source"):
        Volume.model_validate({"name": "empty"})


class Kubectl:
    """A `kubectl` in a folder: notes what it is asked, and answers as it was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers = folder / "answers"
        self.answers.mkdir(parents=True)
        script = folder / "kubectl"
        script.write_text(
            f"""#!{sys.executable} -SE
import json, os, sys, time
folder = {str(folder)!r}
words = sys.argv[1:]
while words and words[0].startswith("--"):
    del words[:2]
key = "-".join(words[:2]) if words[0] == "get" else words[0]
text = sys.stdin.read() if "-f" in words and words[-1] == "-" else None
with open(folder + "/asked", "a") as file:
    file.write(json.dumps({{"arguments": sys.argv[1:], "key": key, "text": text}}) + "\\n")
with open(folder + "/asked") as file:
    number = sum(json.loads(line)["key"] == key for line in file)
names = [folder + "/answers/" + key + "." + str(n) for n in range(number, 0, -1)]
found = next((name for name in names if os.path.exists(name)), None)
answer = json.load(open(found)) if found else {{}}
sys.stdout.write(answer.get("out", ""))
sys.stdout.flush()
sys.stderr.write(answer.get("error", ""))
sys.exit(answer.get("code", 0))
"""
        )
        script.chmod(0o755)

    def answer(self, key: str, out: str = "", error: str = "", number: int = 1) -> None:
        """From its so many'th call on, until another answer holds."""
        content = {"out": out, "error": error, "code": 1 if error else 0}
        (self.answers / f"{key}.{number}").write_text(json.dumps(content))

    def status(self, number: int = 1, **status: Any) -> None:
        self.answer("get-rayjobs.ray.io", json.dumps({"kind": "RayJob", "status": status}), number=number)

    def asked(self, key: str) -> list[dict[str, Any]]:
        try:
            lines = (self.folder / "asked").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [call for call in map(json.loads, lines) if call["key"] == key]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    made = Kubectl(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{made.folder}:{os.environ['PATH']}")
    monkeypatch.setattr(kuberay, "POLL_SECONDS", 0.01)
    claim = {"spec": {"accessModes": ["ReadWriteMany"]}}
    made.answer("get-persistentvolumeclaims", json.dumps(claim))
    return made


def test_check_asks_the_server_and_changes_nothing(kubectl: Kubectl) -> None:
    job = job_of(kuberay="everything")
    KubeRayBackend().check(job)
    (call,) = kubectl.asked("create")
    assert call["arguments"][:4] == ["--context", "training", "--namespace", "research"]
    assert "--dry-run=server" in call["arguments"] and call["text"] == manifest_text(job)
    claims = [call["arguments"][-3] for call in kubectl.asked("get-persistentvolumeclaims")]
    assert claims == ["runs", "data"]
    (names,) = kubectl.asked("get--o")
    assert names["arguments"][7:] == ["secret/store", "secret/registry", "serviceaccount/trainer"]


def test_check_without_kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="the command kubectl is not here"):
        KubeRayBackend().check(job_of())


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not here")
def test_kubectl_itself_does_not_reach_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = {"name": "nowhere", "cluster": {"server": "https://127.0.0.1:1"}}
    user = {"name": "me", "user": {"token": "of no use"}}
    context = {"name": "training", "context": {"cluster": "nowhere", "user": "me"}}
    settings = {"apiVersion": "v1", "kind": "Config", "clusters": [nowhere], "contexts": [context], "users": [user]}
    (tmp_path / "settings").write_text(json.dumps(settings))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "settings"))
    with pytest.raises(ValueError, match=r"--on kuberay: kubectl: (?s:.*)is the cluster to be reached from here"):
        KubeRayBackend().check(job_of(kuberay="everything"))


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("The connection to the server localhost:8080 was refused - did you specify the right host?", "`context`"),
        ('error: resource mapping not found: no matches for kind "RayJob" in version "ray.io/v1"', "operator"),
        ('no matches for kind "PodMonitor" in version "monitoring.coreos.com/v1"', "pod_monitor: false"),
        ('unknown field "spec.rayClusterSpec.authOptions"', "KubeRay 1.5.1"),
        ('admission webhook "limits" denied the request: too many GPUs', ""),
    ],
)
def test_what_the_cluster_refuses_is_told_with_what_may_help(kubectl: Kubectl, said: str, hint: str) -> None:
    kubectl.answer("create", error=said)
    with pytest.raises(ValueError) as caught:
        KubeRayBackend().check(job_of())
    assert said in str(caught.value) and hint in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(said)):
        KubeRayBackend().submit(job_of())


def test_a_claim_that_is_not_there_or_for_one_pod_alone(kubectl: Kubectl) -> None:
    job = job_of()
    kubectl.answer("get-persistentvolumeclaims", json.dumps({"spec": {"accessModes": ["ReadWriteOnce"]}}))
    with pytest.raises(ValueError, match=r"allows ReadWriteOnce: .* needs ReadWriteMany"):
        KubeRayBackend().check(job)
    kubectl.answer("get-persistentvolumeclaims", error='Error from server (NotFound): claims "shared" not found')
    with pytest.raises(ValueError, match="not found"):
        KubeRayBackend().check(job)
    kubectl.answer("get-persistentvolumeclaims", error="Error from server (Forbidden): claims is forbidden")
    KubeRayBackend().check(job)


def test_a_secret_that_is_not_there_or_not_to_be_seen(kubectl: Kubectl) -> None:
    kubectl.answer("get--o", error='Error from server (NotFound): secrets "store" not found')
    with pytest.raises(ValueError, match='"store" not found'):
        KubeRayBackend().check(job_of())
    kubectl.answer("get--o", error="Error from server (Forbidden): secrets is forbidden")
    KubeRayBackend().check(job_of())


def test_data_may_be_on_a_claim_that_is_only_read(kubectl: Kubectl) -> None:
    kubectl.answer("get-persistentvolumeclaims", json.dumps({"spec": {"accessModes": ["ReadOnlyMany"]}}), number=2)
    KubeRayBackend().check(job_of(kuberay="everything"))  # of `runs`, then of `data`


def test_submit_gives_the_manifest_to_kubectl(kubectl: Kubectl) -> None:
    job = job_of()
    handle = KubeRayBackend().submit(job)
    (call,) = kubectl.asked("create")
    assert call["text"] == manifest_text(job)
    assert call["arguments"] == ["--namespace", "default", "create", "-o", "name", "-f", "-"]
    assert handle["id"] == "mine-1-b-20260102-030405"
    assert json.loads(json.dumps(handle)) == handle


@pytest.mark.parametrize(
    ("status", "state", "code"),
    [
        ({}, "queued", None),
        ({"jobDeploymentStatus": "Initializing"}, "queued", None),
        ({"jobDeploymentStatus": "Suspended"}, "queued", None),
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, "queued", None),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, "running", None),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "finished", 0),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "stopped", 75),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "no words of Ray's"}, "failed", 1),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, "failed", 1),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "name too long"}, "failed", 1),
        ({"jobDeploymentStatus": "NewerThanThis"}, "unknown", None),
        *(
            (
                {
                    "jobDeploymentStatus": "Failed",
                    "jobStatus": "FAILED",
                    "message": f"Job entrypoint command failed with exit code {code}, last logs:\nexit code 9",
                },
                state,
                told,
            )
            for code, state, told in ((2, "failed", 2), (75, "stopped", 75), (-9, "failed", 137))
        ),
    ],
)
def test_status(kubectl: Kubectl, status: dict[str, Any], state: str, code: int | None) -> None:
    kubectl.status(**status)
    found = KubeRayBackend().status(handle_of(job_of()))
    assert (found.state, found.exit_code) == (state, code), found
    assert "\n" not in found.detail


def test_status_tells_how_many_nodes_are_there(kubectl: Kubectl) -> None:
    cluster = {"desiredWorkerReplicas": 8, "readyWorkerReplicas": 3}
    kubectl.status(jobDeploymentStatus="Initializing", rayClusterName="c", failed=2, rayClusterStatus=cluster)
    found = KubeRayBackend().status(handle_of(job_of()))
    assert "3 of 8 workers ready" in found.detail
    assert found.facts == {"id": "mine-1-b-20260102-030405", "cluster": "c", "failures": 2}


def test_status_of_a_deleted_job_and_of_a_cluster_that_is_away(kubectl: Kubectl) -> None:
    handle = handle_of(job_of())
    kubectl.answer("get-rayjobs.ray.io", error='Error from server (NotFound): rayjobs.ray.io "mine" not found')
    assert KubeRayBackend().status(handle).state == "lost"
    kubectl.answer("get-rayjobs.ray.io", error="Unable to connect to the server: dial tcp: i/o timeout")
    with pytest.raises(ValueError, match="Unable to connect"):
        KubeRayBackend().status(handle)


def test_logs(kubectl: Kubectl) -> None:
    kubectl.answer("logs", "step 1\nstep 2\n")
    handle = handle_of(job_of())
    assert "".join(KubeRayBackend().logs(handle, follow=False)) == "step 1\nstep 2\n"
    assert kubectl.asked("logs")[0]["arguments"][-2:] == ["logs", f"job/{handle['id']}"]


def test_logs_are_followed_over_a_start_anew(kubectl: Kubectl) -> None:
    """Queued; running, its pod not there yet; running; tried again; running; ended."""
    running, ended = {"jobDeploymentStatus": "Running"}, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    states = [{}, running, running, running, {"jobDeploymentStatus": "Retrying"}, running, ended]
    for number, status in enumerate(states, start=1):
        kubectl.status(number, **status)
    kubectl.answer("logs", error="container is waiting to start: ContainerCreating", number=1)
    kubectl.answer("logs", "step 1\n", number=2)
    kubectl.answer("logs", "step 2\n", number=3)
    assert list(KubeRayBackend().logs(handle_of(job_of()), follow=True)) == ["step 1\n", "step 2\n"]
    calls = [" ".join(call["arguments"]) for call in kubectl.asked("logs")]
    assert ["--since-time=" in call for call in calls] == [False, False, True]


def test_logs_of_an_ended_job_that_has_none_left(kubectl: Kubectl) -> None:
    kubectl.status(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    kubectl.answer("logs", error='jobs.batch "mine" not found')
    with pytest.raises(ValueError, match="not found"):
        list(KubeRayBackend().logs(handle_of(job_of()), follow=True))


def test_stop_asks_ray_to_stop_the_driver(kubectl: Kubectl) -> None:
    kubectl.status(jobDeploymentStatus="Running", jobStatus="RUNNING", rayClusterName="c", jobId="mine-x7")
    kubectl.answer("get-pods", "pod/c-head\n")
    KubeRayBackend().stop(handle_of(job_of()), now=False)
    assert "ray.io/cluster=c,ray.io/node-type=head" in kubectl.asked("get-pods")[0]["arguments"]
    inside = kubectl.asked("exec")[0]["arguments"]
    assert inside[2:7] == ["exec", "pod/c-head", "-c", "ray-head", "--"]
    assert inside[7:] == ["ray", "job", "stop", "--no-wait", "--address", "http://127.0.0.1:8265", "mine-x7"]
    assert not kubectl.asked("delete")


def test_stop_without_a_head_pod(kubectl: Kubectl) -> None:
    kubectl.status(jobDeploymentStatus="Running")
    with pytest.raises(ValueError, match="no head pod yet"):
        KubeRayBackend().stop(handle_of(job_of()), now=False)


@pytest.mark.parametrize(("now", "status"), [(True, "Running"), (False, "Suspended")])
def test_stop_deletes_all_of_a_job_that_waits_or_is_to_end_now(kubectl: Kubectl, now: bool, status: str) -> None:
    kubectl.status(jobDeploymentStatus=status)
    job = job_of()
    KubeRayBackend().stop(handle_of(job), now)
    made = {document["kind"].lower() for document in documents(job).values()}
    deleted = [word for word in kubectl.asked("delete")[0]["arguments"] if "/" in word]
    assert {word.partition("/")[0].partition(".")[0].removesuffix("s") for word in deleted} == made
    assert {word.partition("/")[2] for word in deleted} == {name_of(job)}


def test_by_the_command_line(
    kubectl: Kubectl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    settings = tmp_path / "symile-dist" / "profiles.yaml"
    settings.parent.mkdir()
    kuberay = PROFILES["plain"] | {"volumes": [{"claim": "shared", "path": str(tmp_path)}]}
    settings.write_text(yaml.safe_dump({"k8s": {"backend": "kuberay", "kuberay": kuberay}, "bare": {}}))
    (tmp_path / "my.yaml").write_text(config_text(tmp_path / "data", run="mine"))
    assert main(["submit", "my.yaml", "--on", "kuberay", "--profile", "bare"]) == 2
    assert "which image" in capsys.readouterr().err
    assert not kubectl.asked("create") and not (tmp_path / "runs").exists()
    assert main(["submit", "my.yaml", "--profile", "k8s"]) == 0
    name = documents_of(kubectl.asked("create")[-1]["text"])["RayJob"]["metadata"]["name"]
    assert name in capsys.readouterr().out
    kubectl.status(jobDeploymentStatus="Running", jobStatus="RUNNING", rayClusterName="c", jobId="j")
    assert main(["status", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"
    assert main(["submit", "my.yaml", "--profile", "k8s"]) == 2, "a second job of a run that is under way"
    assert main(["stop", "mine", "--now"]) == 0
    assert f"rayjobs.ray.io/{name}" in kubectl.asked("delete")[0]["arguments"]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """only(pid): the machine has no other process, as far as psutil tells; a pod has its own anyway."""
    every = psutil.process_iter

    def make(pid: int) -> None:
        def one(attributes: list[str]) -> Iterator[psutil.Process]:
            return (process for process in every(attributes) if process.pid == pid)

        monkeypatch.setattr(psutil, "process_iter", one)

    return make


def test_before_the_head_ends_the_driver_saves(tmp_path: Path, only: Callable[[int], None]) -> None:
    package = tmp_path / "symile_dist"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import signal, sys, time, pathlib\n"
        "def save(*_):\n    time.sleep(0.3)\n    pathlib.Path('saved').touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-m", "symile_dist", "train", "config.yaml"], cwd=tmp_path, stdout=subprocess.PIPE
    )
    try:
        assert driver.stdout and driver.stdout.readline() == b"ready\n"
        only(driver.pid)
        exec(kuberay.SAVE, {})
        assert (tmp_path / "saved").exists(), "the hook has not waited for the driver"
    finally:
        driver.kill()
        driver.wait()


def test_a_worker_waits_for_its_ranks(only: Callable[[int], None]) -> None:
    rank = subprocess.Popen(["ray::TrainingRank.train", "60"], executable="/bin/sleep")
    only(rank.pid)
    waiting = threading.Thread(target=exec, args=(kuberay.WAIT_FOR_RANKS, {}), daemon=True)
    waiting.start()
    waiting.join(0.5)
    still = waiting.is_alive()
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    waiting.join(10)
    assert still and not waiting.is_alive(), (still, waiting.is_alive())


def test_a_dry_run_needs_no_cluster_and_no_torch(tmp_path: Path) -> None:
    settings = tmp_path / "symile-dist" / "profiles.yaml"
    settings.parent.mkdir()
    settings.write_text(yaml.safe_dump({"k8s": {"backend": "kuberay", "kuberay": PROFILES["plain"]}}))
    config = tmp_path / "my.yaml"
    config.write_text(config_text("/shared/data", run="mine"))
    program = (
        "import sys\n"
        "from symile_dist.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print({name for name in ('torch', 'ray', 'deepspeed', 'numpy') if name in sys.modules}, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    arguments = ["submit", str(config), "--profile", "k8s", "--dry-run", "run.directory=/shared/runs/mine"]
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path), "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "set()", done.stderr
    kinds = [document["kind"] for document in yaml.safe_load_all(done.stdout)]
    assert kinds == ["ConfigMap", "RayJob", "PodMonitor"]


if __name__ == "__main__":
    for size in SIZES:
        (GOLDEN / f"kuberay-{size}.yaml").write_text(golden_text(size), encoding="utf-8")
