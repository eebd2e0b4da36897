"""The rules of KubeRay that no structural schema has: CEL of its definitions, and the operator's own code.

Each rule has a manifest that breaks it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from support.kubernetes_rules import (
    CLUSTER_RULES,
    JOB_RULES,
    SCHEMA,
    Policy,
    cel_complaints,
    complaints,
    operator_complaints,
)
from support.manifests import Manifest, at, combined, manifest, one, retraining

RULE = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 600}}
DELETIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "requires either BOTH onSuccess and onFailure, OR the deletionRules"),
    ({"onSuccess": {"policy": "DeleteCluster"}}, "requires either BOTH"),
    (
        {"onSuccess": {"policy": "DeleteCluster"}, "onFailure": {"policy": "DeleteCluster"}, "deletionRules": [RULE]},
        "cannot be used together within the same deletionStrategy",
    ),
    ({"deletionRules": [RULE, {"policy": "DeleteCluster", "condition": {"ttlSeconds": 1}}]}, "requires either the Job"),
    (
        {"deletionRules": [{**RULE, "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}]},
        "cannot be used together within the same deletion condition",
    ),
]


def job(kind: str) -> tuple[Manifest, Manifest]:
    """A RayJob or a RayCronJob, and the part of it that is a job's specification."""
    if kind == "RayJob":
        found = copy.deepcopy(manifest("train", "RayJob"))
        return found, found["spec"]
    found = copy.deepcopy(one(combined(("base",), ("retrain/raycronjob",)), {"kind": "RayCronJob"}))
    return found, found["spec"]["jobTemplate"]


def test_the_definitions_have_these_rules() -> None:
    assert {kind: len(rules) for kind, rules in SCHEMA["rules"].items()} == {
        "RayCluster": 3,
        "RayJob": 9,
        "RayCronJob": 9,
    }


@pytest.mark.parametrize("kind", ["RayJob", "RayCronJob"])
@pytest.mark.parametrize(("strategy", "message"), DELETIONS)
def test_deletion_strategies_that_cel_refuses(kind: str, strategy: dict[str, Any], message: str) -> None:
    document, spec = job(kind)
    assert cel_complaints(document) == []
    spec["deletionStrategy"] = strategy
    assert any(message in complaint for complaint in cel_complaints(document))


@pytest.mark.parametrize("kind", ["RayJob", "RayCronJob"])
def test_a_deletion_strategy_that_is_allowed(kind: str) -> None:
    document, spec = job(kind)
    del spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]
    failed = {**RULE, "condition": {"jobStatus": "FAILED", "ttlSeconds": 600}}
    spec["deletionStrategy"] = {"deletionRules": [RULE, failed]}
    assert complaints(document) + cel_complaints(document) + operator_complaints(document) == []


@pytest.mark.parametrize(("kind", "where"), [("RayCluster", "spec"), ("RayJob", "spec"), ("RayJob", "rayClusterSpec")])
def test_managed_by_is_one_of_two_and_does_not_change(kind: str, where: str) -> None:
    document = copy.deepcopy(manifest("base", kind) if kind == "RayCluster" else job(kind)[0])
    part = document["spec"] if where == "spec" else document["spec"][where]
    part["managedBy"] = "ray.io/kuberay-operator"
    assert cel_complaints(document, document) == []
    changed = copy.deepcopy(document)
    (changed["spec"] if where == "spec" else changed["spec"][where])["managedBy"] = "kueue.x-k8s.io/multikueue"
    assert cel_complaints(changed) == []
    assert cel_complaints(changed, document) == ["the managedBy field is immutable"]
    part["managedBy"] = "someone"
    assert any("must be either" in complaint for complaint in cel_complaints(document))


def test_the_backend_does_not_change() -> None:
    document = copy.deepcopy(manifest("base", "RayCluster"))
    document["spec"]["gcsFaultToleranceOptions"] = {"backend": "redis"}
    changed = copy.deepcopy(document)
    changed["spec"]["gcsFaultToleranceOptions"]["backend"] = "rocksdb"
    assert cel_complaints(changed, document) == ["gcsFaultToleranceOptions.backend is immutable"]


def with_change(document: Manifest, where: str, value: object) -> Manifest:
    changed = copy.deepcopy(document)
    *steps, last = where.split(".")
    node = at(changed, steps)
    if value is None:
        del node[last]
    else:
        node[last] = value
    return changed


GROUP = "spec.rayClusterSpec.workerGroupSpecs.0"
CLUSTER = "spec.rayClusterSpec"
BROKEN: list[tuple[str, dict[str, object]]] = [
    ("there are worker groups", {f"{CLUSTER}.workerGroupSpecs": []}),
    ("minReplicas and maxReplicas are set unless autoscaling", {f"{GROUP}.minReplicas": None}),
    ("0 <= minReplicas <= maxReplicas", {f"{GROUP}.minReplicas": 3}),
    (
        "with autoscaler v2 restartPolicy is Never or unset",
        {f"{CLUSTER}.enableInTreeAutoscaling": True, f"{GROUP}.template.spec.restartPolicy": "Always"},
    ),
    ("idleTimeoutSeconds is not negative", {f"{CLUSTER}.autoscalerOptions": {"idleTimeoutSeconds": -1}}),
    ("token auth needs rayVersion", {f"{CLUSTER}.rayVersion": None}),
    ("no field needs a feature gate that is off", {f"{CLUSTER}.networkPolicy": {"mode": "DenyAll"}}),
    (
        "no Redis address without its option",
        {f"{CLUSTER}.headGroupSpec.template.spec.containers.0.env": [{"name": "RAY_REDIS_ADDRESS", "value": "r"}]},
    ),
    ("one of rayClusterSpec and clusterSelector", {"spec.clusterSelector": {"ray.io/cluster": "spikefleet"}}),
    ("there is an entrypoint", {"spec.entrypoint": None}),
    ("backoffLimit and suspend exclude clusterSelector", {"spec.clusterSelector": {"ray.io/cluster": "spikefleet"}}),
    (
        "what can be suspended shuts down",
        {"spec.suspend": True, "spec.shutdownAfterJobFinishes": False, "spec.ttlSecondsAfterFinished": None},
    ),
    ("TTL is not negative, and needs shutdownAfterJobFinishes", {"spec.ttlSecondsAfterFinished": -1}),
    ("TTL is not negative, and needs shutdownAfterJobFinishes", {"spec.shutdownAfterJobFinishes": False}),
    ("deadlines are positive", {"spec.activeDeadlineSeconds": 0}),
    ("deadlines are positive", {"spec.preRunningDeadlineSeconds": -1}),
    ("backoffLimit is not negative", {"spec.backoffLimit": -1}),
    ("deletionRules exclude shutdownAfterJobFinishes", {"spec.deletionStrategy": {"deletionRules": [RULE]}}),
    ("enableK8sTokenAuth is not for RayJobs", {f"{CLUSTER}.authOptions.enableK8sTokenAuth": True}),
    ("the name is a DNS-1035 label of at most 47 characters", {"metadata.name": "a" * 48}),
    ("the name is a DNS-1035 label of at most 47 characters", {"metadata.name": "1a"}),
    ("the name is a DNS-1035 label of at most 47 characters", {"metadata.name": "a.b"}),
    (
        "a job in a queue shuts down and does not autoscale",
        {
            "metadata.labels": {"kueue.x-k8s.io/queue-name": "spikefleet"},
            "spec.shutdownAfterJobFinishes": False,
            "spec.ttlSecondsAfterFinished": None,
        },
    ),
]


@pytest.mark.parametrize(("rule", "changes"), BROKEN)
def test_the_operator_s_rules_are_noticed(rule: str, changes: dict[str, object]) -> None:
    document, _ = job("RayJob")
    assert operator_complaints(document) == []
    for where, value in changes.items():
        document = with_change(document, where, value)
    assert rule in operator_complaints(document)


def test_every_rule_of_the_operator_is_broken_above() -> None:
    assert {*CLUSTER_RULES, *JOB_RULES} <= {rule for rule, _ in BROKEN}


@pytest.mark.parametrize(("kind", "length"), [("RayCluster", 53), ("RayJob", 47), ("RayCronJob", 36)])
def test_lengths_of_names(kind: str, length: int) -> None:
    document = copy.deepcopy(manifest("base", kind)) if kind == "RayCluster" else job(kind)[0]
    document["metadata"]["name"] = "a" * length
    assert operator_complaints(document) == []
    document["metadata"]["name"] += "a"
    assert operator_complaints(document) != []


USER = "system:serviceaccount:spikefleet:retrain"
HEAD = "spec.rayClusterSpec.headGroupSpec.template.spec"
WORKER = "spec.rayClusterSpec.workerGroupSpecs.0.template.spec"
SUBMITTER = "spec.submitterPodTemplate.spec"
ANY_POD: list[tuple[str, Any, str]] = [
    ("containers.0.image", "docker.io/library/busybox:1", "the image of spikefleet"),
    ("initContainers", [{"name": "x", "image": "busybox"}], "the image of spikefleet"),
    ("volumes", [{"name": "x", "secret": {"secretName": "postgres"}}], "volumes may be"),
    ("volumes", [{"name": "x", "hostPath": {"path": "/"}}], "volumes may be"),
    ("volumes", [{"name": "x", "projected": {"sources": []}}], "volumes may be"),
    ("volumes", [{"name": "x", "csi": {"driver": "secrets"}}], "volumes may be"),
    ("volumes", [{"name": "x", "nfs": {"server": "s", "path": "/"}}], "volumes may be"),
    ("containers.0.envFrom", [{"secretRef": {"name": "postgres"}}], "envFrom may refer"),
    (
        "containers.0.env",
        [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "postgres", "key": "password"}}}],
        "env may refer",
    ),
    ("serviceAccountName", "default", "serviceAccountName"),
    ("automountServiceAccountToken", True, "automountServiceAccountToken"),
    ("automountServiceAccountToken", None, "automountServiceAccountToken"),
]
BAD = [(f"{pod}.{where}", value, named) for pod in (HEAD, WORKER, SUBMITTER) for where, value, named in ANY_POD]
BAD += [
    ("spec.runtimeEnvYAML", "pip: [requests]", "runtimeEnvYAML"),
    ("spec.rayClusterSpec.authOptions.mode", "disabled", "authOptions.mode"),
    ("spec.rayClusterSpec.authOptions", None, "authOptions.mode"),
    ("spec.rayClusterSpec", None, "brings its own cluster"),
    ("spec.clusterSelector", {"ray.io/cluster": "spikefleet"}, "brings its own cluster"),
    ("spec.rayClusterSpec.enableInTreeAutoscaling", True, "autoscaler"),
    ("spec.rayClusterSpec.autoscalerOptions", {"image": "busybox:1"}, "autoscaler"),
    ("spec.rayClusterSpec.gcsFaultToleranceOptions", {"redisAddress": "redis:6379"}, "GCS fault tolerance"),
    ("spec.rayClusterSpec.authOptions.secretName", "postgres", "another token's Secret"),
]


def policy() -> Policy:
    return Policy(manifest("retrain", "ValidatingAdmissionPolicy"))


def test_the_policy_admits_the_retraining_s_job_and_that_of_train() -> None:
    assert policy().denials(retraining(), USER) == []
    assert policy().denials(manifest("train", "RayJob"), USER) == []
    tracked = with_change(
        retraining(),
        f"{HEAD}.containers.0.env",
        [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "spikefleet-tracking", "key": "password"}}}],
    )
    assert policy().denials(tracked, USER) == []


@pytest.mark.parametrize(("where", "value", "named"), BAD)
def test_the_policy_denies(where: str, value: object, named: str) -> None:
    bad = with_change(retraining(), where, value)
    assert any(named in message for message in policy().denials(bad, USER))
    assert policy().denials(bad, "system:serviceaccount:kuberay-operator:kuberay-operator") == []


def test_every_rule_of_the_policy_denies_something() -> None:
    messages = {rule["message"] for rule in manifest("retrain", "ValidatingAdmissionPolicy")["spec"]["validations"]}
    denied = [set(policy().denials(with_change(retraining(), where, value), USER)) for where, value, _ in BAD]
    assert set().union(*denied) == messages
    # For each there is a job that breaks nothing else.
    assert all({message} in denied for message in messages)


def test_the_policy_binds_and_fails_closed() -> None:
    spec = manifest("retrain", "ValidatingAdmissionPolicy")["spec"]
    assert spec["failurePolicy"] == "Fail"
    (rule,) = spec["matchConstraints"]["resourceRules"]
    assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
    assert rule["operations"] == ["CREATE", "UPDATE"]
    binding = manifest("retrain", "ValidatingAdmissionPolicyBinding")["spec"]
    assert binding["policyName"] == manifest("retrain", "ValidatingAdmissionPolicy")["metadata"]["name"]
    assert binding["validationActions"] == ["Deny"]
    assert binding["matchResources"]["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "spikefleet"
    }


def test_the_account_may_create_get_and_delete_rayjobs_and_nothing_else() -> None:
    assert manifest("retrain", "Role")["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "delete"]}
    ]
    binding = manifest("retrain", "RoleBinding")
    assert binding["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "retrain"}
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "retrain", "namespace": "spikefleet"}]
    account = manifest("retrain", "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert f"system:serviceaccount:{account['metadata']['namespace']}:{account['metadata']['name']}" == USER


def test_the_cronjob_waits_for_the_job_and_outlives_it() -> None:
    cron = manifest("retrain", "CronJob")["spec"]
    assert (cron["concurrencyPolicy"], cron["timeZone"]) == ("Forbid", "Etc/UTC")
    assert 0 < cron["startingDeadlineSeconds"] < 86400
    spec = cron["jobTemplate"]["spec"]
    deadlines = retraining()["spec"]["activeDeadlineSeconds"] + retraining()["spec"]["preRunningDeadlineSeconds"]
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"] > deadlines) == (0, True)
    pod = spec["template"]["spec"]
    assert pod["serviceAccountName"] == "retrain"
    (container,) = pod["containers"]
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "template"]
    config = manifest("retrain", "ConfigMap", "retrain-sg-resnet-digits")
    assert {"name": "template", "configMap": {"name": config["metadata"]["name"]}} in pod["volumes"]
    assert container["command"] == [
        "spikefleet",
        "retrain-job",
        "--template",
        f"{mount['mountPath']}/{next(iter(config['data']))}",
    ]
    policy = manifest("retrain", "NetworkPolicy", "retrain-to-api-server")["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert labels["app.kubernetes.io/component"] != "ray"  # else it would talk to Ray's pods
