"""What the pods of k8s/ may do: Pod Security Standard "restricted", and no credentials or floating images."""

import copy
import re
from typing import Any

import pytest

from support.manifests import (
    PROJECT,
    Manifest,
    at,
    built,
    cluster_spec,
    containers_in,
    every_folder,
    manifest,
    maps_in,
    pod_templates,
)

VOLUMES = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def violations(template: Manifest) -> list[str]:
    """What the standard, and our additions to it, have against a pod template."""
    spec = template["spec"]
    pod = spec.get("securityContext", {})
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC", "hostUsers") if spec.get(key)]
    found += ["automountServiceAccountToken"] if spec.get("automountServiceAccountToken") is not False else []
    found += [f"pod {key}" for key in ("sysctls", "seLinuxOptions", "windowsOptions") if key in pod]
    for volume in spec.get("volumes", []):
        found += [f"volume {kind}" for kind in set(volume) - {"name"} - VOLUMES]
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            found.append("emptyDir sizeLimit")
    for container in containers_in(spec):
        own = container.get("securityContext", {})
        effective = {**pod, **own}
        wanted = {
            "runAsNonRoot": effective.get("runAsNonRoot") is True,
            "runAsUser": effective.get("runAsUser", 0) != 0,
            "seccompProfile": effective.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "privileged": not own.get("privileged"),
            "capabilities.drop": own.get("capabilities", {}).get("drop") == ["ALL"],
            "capabilities.add": not own.get("capabilities", {}).get("add"),
            "procMount": own.get("procMount", "Default") == "Default",
            "hostPort": not any("hostPort" in port for port in container.get("ports", [])),
            "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
        }
        found += [name for name, kept in wanted.items() if not kept]
    return found


@every_folder
def test_pods_are_restricted(folder: str) -> None:
    templates = pod_templates(built(folder))
    assert len(templates) == (2 if folder == "base" else 3)  # head, worker, and the submitter of a job
    assert [violations(template) for template in templates] == [[]] * len(templates)
    labels = manifest(folder, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(
    ("where", "field", "value", "named"),
    [
        ("spec", "hostNetwork", True, "hostNetwork"),
        ("spec", "automountServiceAccountToken", True, "automountServiceAccountToken"),
        ("spec.securityContext", "runAsNonRoot", False, "runAsNonRoot"),
        ("spec.securityContext", "runAsUser", 0, "runAsUser"),
        ("spec.securityContext", "seccompProfile", {"type": "Unconfined"}, "seccompProfile"),
        ("spec.securityContext", "sysctls", [], "pod sysctls"),
        ("spec.containers.0", "securityContext", {}, "allowPrivilegeEscalation"),
        ("spec.containers.0.securityContext", "runAsUser", 0, "runAsUser"),
        ("spec.containers.0.securityContext", "privileged", True, "privileged"),
        ("spec.containers.0.securityContext", "readOnlyRootFilesystem", False, "readOnlyRootFilesystem"),
        ("spec.containers.0.securityContext.capabilities", "drop", [], "capabilities.drop"),
        ("spec.containers.0.securityContext.capabilities", "add", ["NET_RAW"], "capabilities.add"),
        ("spec.containers.0", "ports", [{"containerPort": 1, "hostPort": 1}], "hostPort"),
        ("spec", "initContainers", [{"name": "bare", "image": "bare:1"}], "allowPrivilegeEscalation"),
        ("spec", "volumes", [{"name": "host", "hostPath": {"path": "/"}}], "volume hostPath"),
        ("spec", "volumes", [{"name": "tmp", "emptyDir": {}}], "emptyDir sizeLimit"),
    ],
)
def test_a_loosened_pod_is_noticed(where: str, field: str, value: object, named: str) -> None:
    template = copy.deepcopy(cluster_spec("base")["workerGroupSpecs"][0]["template"])
    at(template, where.split("."))[field] = value
    assert named in violations(template)


def careless(node: Any) -> list[str]:
    """Credentials that are written down, and images that may change under the same name."""
    found = []
    for part in maps_in(node):
        if re.search(r"(?i)token|passw|secret|credential|api_?key", str(part.get("name", ""))) and part.get("value"):
            found.append(f"literal value of {part['name']}")
        found += [
            f"credentials in {value!r}" for value in part.values() if re.search(r"://[^/\s]+:[^/\s]+@", str(value))
        ]
    for container in containers_in(node):
        tag = re.search(r"(?::([\w.-]+)|@sha256:[0-9a-f]{64})$", container.get("image", ""))
        if tag is None or tag[1] == "latest":
            found.append(f"image {container.get('image')!r}")
    return found


@every_folder
def test_no_literal_secrets_and_no_floating_images(folder: str) -> None:
    assert careless(built(folder)) == []
    assert not any(document["kind"] == "Secret" for document in built(folder))
    images = {container["image"] for container in containers_in(built(folder))}
    assert images == {f"registry.example.com/spikefleet:{PROJECT['project']['version']}"}


@pytest.mark.parametrize(
    "container",
    [
        {"image": "registry.example.com/spikefleet"},
        {"image": "registry.example.com:5000/spikefleet"},
        {"image": "spikefleet:latest"},
        {"image": "spikefleet:1", "env": [{"name": "RAY_AUTH_TOKEN", "value": "0123"}]},
        {"image": "spikefleet:1", "env": [{"name": "MLFLOW_TRACKING_URI", "value": "http://me:word@mlflow"}]},
    ],
)
def test_carelessness_is_noticed(container: Manifest) -> None:
    assert careless({"containers": [container]}) != []
