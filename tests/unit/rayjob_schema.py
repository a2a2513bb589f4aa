"""JSON Schema of a RayJob, typed by hand from KubeRay's published Go types (ray.io/v1, release 1.7).

An unknown field, or a value of another type, fails. What a golden file holds only freezes what was written once; this
says what may be written. Pod templates are Kubernetes' own type: `kubernetes_validate` knows them.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
INT32: Schema = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
NATURAL: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
OBJECT: Schema = {"type": "object"}


def fields(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with these fields and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


MANAGED_BY = one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
POLICY = one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")

POD_TEMPLATE = fields(("spec",), metadata=OBJECT, spec={"type": "object", "required": ["containers"]})

METADATA = fields(
    ("name",),
    name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47},
    namespace={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
    labels={
        "type": "object",
        "propertyNames": {
            "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
        },
        "additionalProperties": {
            "type": "string",
            "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$",
            "maxLength": 63,
        },
    },
    annotations=STRINGS,
)

HEAD_GROUP = fields(
    ("template", "rayStartParams"),
    template=POD_TEMPLATE,
    headService=OBJECT,
    enableIngress=BOOLEAN,
    ingressOptions=OBJECT,
    resources=STRINGS,
    labels=STRINGS,
    rayStartParams=STRINGS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
)

WORKER_GROUP = fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    suspend=BOOLEAN,
    groupName=STRING,
    replicas=NATURAL,
    minReplicas=NATURAL,
    maxReplicas=NATURAL,
    idleTimeoutSeconds=INT32,
    priority=INT32,
    resources=STRINGS,
    labels=STRINGS,
    rayStartParams=STRINGS,
    template=POD_TEMPLATE,
    scaleStrategy=fields(workersToDelete=array(STRING)),
    numOfHosts=INT32,
)

RAY_CLUSTER = fields(
    ("headGroupSpec",),
    upgradeStrategy=fields(type=one_of("Recreate", "None")),
    authOptions=fields(enableK8sTokenAuth=BOOLEAN, secretName=STRING, mode=one_of("disabled", "token")),
    suspend=BOOLEAN,
    managedBy=MANAGED_BY,
    autoscalerOptions=OBJECT,
    headServiceAnnotations=STRINGS,
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions=OBJECT,
    historyServerOptions=OBJECT,
    networkPolicy=OBJECT,
    tlsOptions=fields(enabled=BOOLEAN),
    headGroupSpec=HEAD_GROUP,
    rayVersion=STRING,
    workerGroupSpecs=array(WORKER_GROUP),
)

DELETION_RULE = fields(
    ("policy", "condition"),
    policy=POLICY,
    condition=fields(jobStatus=one_of("SUCCEEDED", "FAILED"), jobDeploymentStatus=one_of("Failed"), ttlSeconds=NATURAL),
)

RAY_JOB_SPEC = fields(
    activeDeadlineSeconds={**INT32, "minimum": 1},
    preRunningDeadlineSeconds={**INT32, "minimum": 1},
    backoffLimit=NATURAL,
    rayClusterSpec=RAY_CLUSTER,
    submitterPodTemplate=POD_TEMPLATE,
    metadata=STRINGS,
    clusterSelector=STRINGS,
    submitterConfig=fields(backoffLimit=NATURAL),
    managedBy=MANAGED_BY,
    deletionStrategy=fields(
        onSuccess=fields(policy=POLICY),
        onFailure=fields(policy=POLICY),
        deletionRules={**array(DELETION_RULE), "minItems": 1},
    ),
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=STRING,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=NATURAL,
    shutdownAfterJobFinishes=BOOLEAN,
    suspend=BOOLEAN,
)

RAY_JOB: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": "RayJob"},
        metadata=METADATA,
        spec=RAY_JOB_SPEC,
    ),
}

RELABELING = fields(
    sourceLabels=array(STRING),
    separator=STRING,
    targetLabel=STRING,
    regex=STRING,
    modulus=NATURAL,
    replacement=STRING,
    action=STRING,
)

POD_MONITOR: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"const": "PodMonitor"},
        metadata=METADATA,
        spec=fields(
            ("selector", "podMetricsEndpoints"),
            jobLabel=STRING,
            podTargetLabels=array(STRING),
            namespaceSelector=fields(any=BOOLEAN, matchNames=array(STRING)),
            selector=fields(matchLabels=STRINGS, matchExpressions=array(OBJECT)),
            podMetricsEndpoints=array(
                fields(
                    port=STRING,
                    portNumber=NATURAL,
                    path=STRING,
                    scheme=one_of("http", "https"),
                    interval=STRING,
                    scrapeTimeout=STRING,
                    honorLabels=BOOLEAN,
                    authorization=fields(
                        ("credentials",), type=STRING, credentials=fields(("key",), name=STRING, key=STRING)
                    ),
                    relabelings=array(RELABELING),
                    metricRelabelings=array(OBJECT),
                )
            ),
        ),
    ),
}
"""Of the Prometheus operator (monitoring.coreos.com/v1): the fields that anyone here would write."""
