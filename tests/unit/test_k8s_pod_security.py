"""What the pods of k8s/ may do: Pod Security Standard "restricted", and no credentials or floating images."""

import copy
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.manifests import (
    COMPONENTS,
    FOLDERS,
    K8S,
    PROJECT,
    Manifest,
    at,
    build,
    built,
    cluster_spec,
    containers_in,
    every_folder,
    kustomization,
    manifest,
    maps_in,
    pod_templates,
    retraining,
)
from support.pod_security import violations


def templates_of(folder: str) -> list[Manifest]:
    documents = [*built(folder), *([retraining()] if folder == "retrain" else [])]
    return pod_templates(documents)


# Head and worker; the submitter of a job; the pods of MLflow: server, upgrade, database, dump, bucket and its server.
PODS = {"base": 2, "gpu": 3, "kind": 3 + 6, "mlflow": 2, "retrain": 1 + 3, "train": 3, "tune": 3}


@every_folder
def test_pods_are_restricted(folder: str) -> None:
    templates = templates_of(folder)
    assert len(templates) == PODS[folder]
    assert [violations(template) for template in templates] == [[]] * len(templates)
    if folder != "mlflow":
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
        ("spec.containers.0", "resources", {"limits": {"memory": "1Gi"}}, "requests and limits"),
        ("metadata", "labels", {"app.kubernetes.io/component": "ray"}, "label part-of"),
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
        secret = re.search(r"(?i)token|passw|secret|credential|api_?key", str(part.get("name", "")))
        a_file = str(part.get("name")).endswith("_FILE") and str(part.get("value")).startswith("/run/secrets/")
        if secret and part.get("value") and not a_file:
            found.append(f"literal value of {part['name']}")
        found += [
            f"credentials in {value!r}" for value in part.values() if re.search(r"://[^/\s]+:[^/\s]+@", str(value))
        ]
    for container in containers_in(node):
        tag = re.search(r"(?::([\w.-]+)|@sha256:[0-9a-f]{64})$", container.get("image", ""))
        if tag is None or tag[1] == "latest":
            found.append(f"image {container.get('image')!r}")
    return found


IMAGES = {f"registry.example.com/spikefleet:{PROJECT['project']['version']}"}
"""Of all pods but the database's and the bucket's."""


@every_folder
def test_no_literal_secrets_and_no_floating_images(folder: str) -> None:
    documents = [*built(folder), *([retraining()] if folder == "retrain" else [])]
    assert careless(documents) == []
    assert not any(document["kind"] == "Secret" for document in documents)
    images = {container["image"] for container in containers_in(documents)}
    written = {image["newName"]: image["newTag"] for image in kustomization("image")["images"]}
    assert images - IMAGES == (
        {f"{name}:{tag}" for name, tag in written.items()} - IMAGES if folder == "kind" else set()
    )
    assert images >= IMAGES


def test_only_image_names_images() -> None:
    assert [name for name in (*FOLDERS, *COMPONENTS) if "images" in kustomization(name)] == ["image"]


def undigested(overlay: list[Manifest], written: Manifest) -> list[str]:
    """Images of an overlay that says that it has digests, but are named otherwise."""
    if written.get("commonAnnotations", {}).get("spikefleet/images") != "digest":
        return []
    images = {container["image"] for container in containers_in(overlay)}
    return sorted(image for image in images if not re.search(r"@sha256:[0-9a-f]{64}$", image))


@pytest.mark.parametrize("pinned", [True, False])
def test_an_overlay_that_says_digests_has_no_tag(pinned: bool, tmp_path: Path) -> None:
    """The overlay of the README, with a digest that is made up here, and one that a tag was left in."""
    for name in (*FOLDERS, *COMPONENTS):
        assert undigested(built(name) if name in FOLDERS else [], kustomization(name)) == []
    image: Manifest = {"name": IMAGES.copy().pop().rpartition(":")[0]}
    image |= {"digest": f"sha256:{hashlib.sha256(b'image').hexdigest()}"} if pinned else {"newTag": "0.1.1"}
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(K8S / "train", tmp_path.resolve())],
        "commonAnnotations": {"spikefleet/images": "digest"},
        "images": [image],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    assert bool(undigested(build(tmp_path.resolve()), overlay)) is not pinned


@pytest.mark.parametrize(
    "container",
    [
        {"image": "registry.example.com/spikefleet"},
        {"image": "registry.example.com:5000/spikefleet"},
        {"image": "spikefleet:latest"},
        {"image": "spikefleet:1", "env": [{"name": "RAY_AUTH_TOKEN", "value": "0123"}]},
        {"image": "postgres:17.6", "env": [{"name": "POSTGRES_PASSWORD_FILE", "value": "word"}]},
        {"image": "spikefleet:1", "env": [{"name": "MLFLOW_TRACKING_URI", "value": "http://me:word@mlflow"}]},
    ],
)
def test_carelessness_is_noticed(container: Manifest) -> None:
    assert careless({"containers": [container]}) != []
