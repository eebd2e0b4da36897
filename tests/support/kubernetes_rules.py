"""What an API server and KubeRay's operator have against a manifest, found out without a cluster."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import cel
import kubernetes_validate
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from support.manifests import K8S, Manifest, containers_in

KUBERNETES = "1.36"
SCHEMA = json.loads((K8S / "schemas/kuberay-v1.7.0.json").read_text(encoding="utf-8"))
CUSTOM: dict[str, dict[str, set[str]]] = {
    "ResourceFlavor": {"kueue.x-k8s.io/v1beta2": {"nodeLabels", "nodeTaints", "tolerations", "topologyName"}},
    "ClusterQueue": {
        "kueue.x-k8s.io/v1beta2": {"namespaceSelector", "resourceGroups", "queueingStrategy", "preemption"}
    },
    "LocalQueue": {"kueue.x-k8s.io/v1beta2": {"clusterQueue"}},
    "PodMonitor": {"monitoring.coreos.com/v1": {"selector", "podMetricsEndpoints", "podTargetLabels"}},
    "PrometheusRule": {"monitoring.coreos.com/v1": {"groups"}},
}
"""Kinds whose definitions are not here: the fields that a spec may have, by API version."""


@functools.cache
def _complaints(text: str) -> tuple[str, ...]:
    document = json.loads(text)
    kind, version = document.get("kind"), document.get("apiVersion", "")
    if kind in CUSTOM:
        if version not in CUSTOM[kind]:
            return (f"{kind} of {version!r} is not one that is checked",)
        strange = set(document.get("spec", {})) - CUSTOM[kind][version]
        return tuple(f"spec.{name} was unexpected" for name in sorted(strange))
    if str(version).startswith("ray.io/"):
        if kind not in SCHEMA["kinds"]:
            return (f"kind {kind!r} is not one that is checked",)
        return _reduced(document)
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{'.'.join(str(step) for step in error.path)}: {error.message}",)
    except kubernetes_validate.SchemaNotFoundError:
        return (f"kind {kind!r} of {version!r} is not one that is checked",)
    return _reduced(document) if kind in SCHEMA["kinds"] else ()


def _reduced(document: Manifest) -> tuple[str, ...]:
    """By the schema in k8s/, which knows more values of some built-in kinds than Kubernetes' own."""
    validator = Draft202012Validator({**SCHEMA["kinds"][document["kind"]], "$defs": SCHEMA["$defs"]})
    return tuple(f"{error.json_path}: {error.message}" for error in validator.iter_errors(document))


def complaints(document: Manifest) -> list[str]:
    """What the strict schemas have against a manifest: unknown fields, wrong types, missing parts."""
    return list(_complaints(json.dumps(document, sort_keys=True)))


def _values(node: Any, steps: list[str]) -> Iterator[Any]:
    if not steps:
        yield node
    elif steps[0] == "[]":
        for item in node or []:
            yield from _values(item, steps[1:])
    elif isinstance(node, dict) and steps[0] in node:
        yield from _values(node[steps[0]], steps[1:])


def cel_complaints(document: Manifest, old: Manifest | None = None) -> list[str]:
    """Messages of the rules in CEL of KubeRay's definitions that a manifest breaks; those on changes need `old`."""
    found = []
    for rule in SCHEMA["rules"][document["kind"]]:
        steps = rule["path"].split(".")
        changes = "oldSelf" in rule["rule"]
        before = list(_values(old, steps)) if changes and old is not None else []
        for index, value in enumerate(_values(document, steps)):
            if changes and index >= len(before):
                continue
            context = {"self": value, **({"oldSelf": before[index]} if changes else {})}
            if cel.evaluate(rule["rule"], context) is not True:
                found.append(rule["message"])
    return found


class Policy:
    """A ValidatingAdmissionPolicy, evaluated."""

    def __init__(self, manifest: Manifest) -> None:
        self._spec = manifest["spec"]

    def denials(self, document: Manifest, user: str) -> list[str]:
        """Messages of the rules that deny `user` to create `document`, as does one that cannot be evaluated."""
        context: dict[str, Any] = {"object": document, "request": {"userInfo": {"username": user}}}
        if not all(cel.evaluate(condition["expression"], context) for condition in self._spec["matchConditions"]):
            return []
        variables: dict[str, Any] = {}
        for variable in self._spec["variables"]:
            try:
                variables[variable["name"]] = cel.evaluate(variable["expression"], {**context, "variables": variables})
            except (ValueError, RuntimeError, TypeError, KeyError):
                continue  # what uses it cannot be evaluated either
        return [
            rule["message"]
            for rule in self._spec["validations"]
            if not _holds(rule["expression"], {**context, "variables": variables})
        ]


def _holds(expression: str, context: dict[str, Any]) -> bool:
    try:
        return cel.evaluate(expression, context) is True
    except (ValueError, RuntimeError, TypeError, KeyError):
        return False


NAME_LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")
Rule = Callable[[Manifest], bool]


def _autoscaling(cluster: Manifest) -> bool:
    return bool(cluster.get("enableInTreeAutoscaling"))


def _pods(cluster: Manifest) -> list[Manifest]:
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [group["template"]["spec"] for group in groups]


CLUSTER_RULES: dict[str, Rule] = {
    "there are worker groups": lambda c: bool(c.get("workerGroupSpecs")),
    "minReplicas and maxReplicas are set unless autoscaling": lambda c: (
        _autoscaling(c) or all({"minReplicas", "maxReplicas"} <= set(group) for group in c.get("workerGroupSpecs", []))
    ),
    "0 <= minReplicas <= maxReplicas": lambda c: all(
        0 <= group.get("minReplicas", 0) <= group.get("maxReplicas", 2**31) for group in c.get("workerGroupSpecs", [])
    ),
    "with autoscaler v2 restartPolicy is Never or unset": lambda c: (
        not _autoscaling(c) or all(pod.get("restartPolicy", "Never") == "Never" for pod in _pods(c))
    ),
    "idleTimeoutSeconds is not negative": lambda c: c.get("autoscalerOptions", {}).get("idleTimeoutSeconds", 0) >= 0,
    "token auth needs rayVersion": lambda c: (
        c.get("authOptions", {}).get("mode") != "token" or bool(re.fullmatch(r"\d+\.\d+\.\d+", c.get("rayVersion", "")))
    ),
    "no field needs a feature gate that is off": lambda c: (
        not set(GATED) & set(c) and c.get("gcsFaultToleranceOptions", {}).get("backend") != "rocksdb"
    ),
    "no Redis address without its option": lambda c: (
        not any(
            entry["name"] == "RAY_REDIS_ADDRESS" for container in containers_in(c) for entry in container.get("env", [])
        )
    ),
}

JOB_RULES: dict[str, Rule] = {
    "one of rayClusterSpec and clusterSelector": lambda s: ("rayClusterSpec" in s) != bool(s.get("clusterSelector")),
    "there is an entrypoint": lambda s: bool(s.get("entrypoint")),
    "backoffLimit and suspend exclude clusterSelector": lambda s: (
        not s.get("clusterSelector") or not (s.get("backoffLimit") or s.get("suspend"))
    ),
    "what can be suspended shuts down": lambda s: not s.get("suspend") or s.get("shutdownAfterJobFinishes") is True,
    "TTL is not negative, and needs shutdownAfterJobFinishes": lambda s: (
        s.get("ttlSecondsAfterFinished", 0) == 0
        or (s["ttlSecondsAfterFinished"] > 0 and s.get("shutdownAfterJobFinishes") is True)
    ),
    "deadlines are positive": lambda s: all(
        s.get(name, 1) > 0 for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds")
    ),
    "backoffLimit is not negative": lambda s: s.get("backoffLimit", 0) >= 0,
    "deletionRules exclude shutdownAfterJobFinishes": lambda s: (
        not (s.get("deletionStrategy", {}).get("deletionRules") and s.get("shutdownAfterJobFinishes"))
    ),
    "enableK8sTokenAuth is not for RayJobs": lambda s: (
        not s.get("rayClusterSpec", {}).get("authOptions", {}).get("enableK8sTokenAuth")
    ),
}


def operator_complaints(document: Manifest) -> list[str]:
    """Names of the rules of KubeRay's own code that a manifest breaks; these are in no definition."""
    kind, name, spec = document["kind"], document["metadata"]["name"], document["spec"]
    found = []
    if len(name) > NAME_LENGTHS[kind] or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append(f"the name is a DNS-1035 label of at most {NAME_LENGTHS[kind]} characters")
    job = {"RayJob": spec, "RayCronJob": spec.get("jobTemplate")}.get(kind)
    cluster = spec if kind == "RayCluster" else (job or {}).get("rayClusterSpec")
    if job is not None:
        found += [rule for rule, holds in JOB_RULES.items() if not holds(job)]
        queued = document["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
        if queued and (not job.get("shutdownAfterJobFinishes") or _autoscaling(cluster or {})):
            found.append("a job in a queue shuts down and does not autoscale")
    if cluster is not None:
        found += [rule for rule, holds in CLUSTER_RULES.items() if not holds(cluster)]
    return found
