"""The manifests in k8s/, built by kubectl and checked without a cluster against a strict schema.

The schemas are KubeRay's, reduced from its CRDs, and Kubernetes' own, from the package kubernetes-validate.
"""

import copy
import shutil
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from support.kubernetes_rules import SCHEMA, complaints
from support.manifests import (
    COMPONENTS,
    FOLDERS,
    K8S,
    at,
    build,
    built,
    every_folder,
    kustomization,
    manifest,
    maps_in,
    one,
)


def test_what_is_there_is_built() -> None:
    assert FOLDERS == ["base", "gpu", "kind", "mlflow", "retrain", "train", "tune"]
    parts = [*FOLDERS, *COMPONENTS]
    files = {path for part in parts for path in (K8S / part).iterdir() if path.is_file()}
    used = {K8S / part / "kustomization.yaml" for part in parts}
    for part in parts:
        written = kustomization(part)
        names = [*written.get("resources", []), *written.get("components", [])]
        names += [name for made in written.get("configMapGenerator", []) for name in made["files"]]
        used |= {(K8S / part / name).resolve() for name in names}
    assert files <= used


@pytest.mark.parametrize("folder", ["gpu", "kind", "retrain"])
def test_patches_and_replacements_meet_a_manifest(folder: str) -> None:
    """Kustomize passes over a target that selects nothing, without a word."""
    written = kustomization(folder)
    selected = [patch["target"] for patch in written["patches"] if "name" in patch.get("target", {})]
    selected += [target["select"] for entry in written.get("replacements", []) for target in entry["targets"]]
    assert selected
    for select in selected:
        one(built(folder), select)
        with pytest.raises(AssertionError, match="selects 0 manifests"):
            one(built(folder), {**select, "name": "spikefleet-trian"})


@every_folder
def test_manifests_are_valid(folder: str) -> None:
    assert [complaint for document in built(folder) for complaint in complaints(document)] == []


def test_schema_is_strict_everywhere() -> None:
    Draft202012Validator.check_schema({"$defs": {**SCHEMA["$defs"], **SCHEMA["kinds"]}})
    objects = [part for part in maps_in(SCHEMA) if part.get("type") == "object" and "properties" in part]
    assert len(objects) > 100
    assert all(part["additionalProperties"] is False for part in objects)


def gpu_overlay_with(right: str, wrong: str, tmp_path: Path) -> Path:
    """A copy of k8s/gpu in which `right` is mistyped."""
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s/gpu/kustomization.yaml"
    text = path.read_text(encoding="utf-8")
    assert right in text
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    return path.parent


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("  - ../train", "  - ../trian", "trian"),
        ("patches:", "patchs:", "patchs"),
        ("workerGroupSpecs/0/", "workerGroupSpecs/1/", "operation does not apply"),
    ],
)
def test_a_kustomization_that_cannot_be_built_is_refused(right: str, wrong: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        build(gpu_overlay_with(right, wrong, tmp_path))


def test_a_patch_of_a_field_that_is_not_there_is_refused_by_the_schema(tmp_path: Path) -> None:
    """Kustomize adds what it was told to replace."""
    job = one(build(gpu_overlay_with("/spec/entrypoint", "/spec/entrypiont", tmp_path)), {"kind": "RayJob"})
    assert any("'entrypiont' was unexpected" in complaint for complaint in complaints(job))


HEAD = "spec.headGroupSpec.template.spec"
WORKER = "spec.workerGroupSpecs.0.template.spec"
SUBMITTER = "spec.submitterPodTemplate.spec"


RETRAINER = {
    *("CronJob", "Role", "RoleBinding", "ServiceAccount"),
    *("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"),
}


@pytest.mark.parametrize(
    ("kind", "where", "field", "value"),
    [
        ("RayCluster", "spec", "workerGroupSpec", []),
        ("RayCluster", "spec.authOptions", "mode", "tokens"),
        ("RayCluster", "spec.workerGroupSpecs.0", "replicas", "two"),
        ("RayCluster", f"{HEAD}.containers.0", "imagePullPolicies", "Always"),
        ("RayCluster", f"{HEAD}.containers.0.securityContext", "runAsNonroot", True),
        ("RayCluster", f"{WORKER}.securityContext", "runAsNonRoot", "yes"),
        ("RayCluster", f"{WORKER}.volumes.1.emptyDir", "sizelimit", "1Gi"),
        ("RayCluster", f"{WORKER}.containers.0.resources.limits", "memory", "four"),
        ("RayJob", "spec", "shutdownAfterJobFinish", True),
        ("RayJob", "spec", "backoffLimit", "2"),
        ("RayJob", f"{SUBMITTER}.containers.0", "volumeMount", []),
        ("RayJob", "metadata", "label", {}),
        ("PersistentVolumeClaim", "spec", "accessModes", "ReadWriteMany"),
        ("NetworkPolicy", "spec", "podselector", {}),
        ("NetworkPolicy", "spec", "policyTypes", ["ingress"]),
        ("ConfigMap", "data", "NUMBER", 1),
        ("Namespace", "metadata", "lables", {}),
        ("Deployment", "spec.template.spec.containers.0", "startupProb", {}),
        ("Deployment", "spec", "replicas", "one"),
        ("StatefulSet", "spec", "volumeClaimTemplate", []),
        ("Job", "spec", "ttlSecondsAfterFinish", 1),
        ("Service", "spec.ports.0", "port", "http"),
        ("PodDisruptionBudget", "spec", "unhealthyPodEviction", "AlwaysAllow"),
        ("CronJob", "spec", "concurrency", "Forbid"),
        ("CronJob", "spec.jobTemplate.spec.podFailurePolicy.rules.0", "action", 3),
        ("Role", "rules.0", "verb", ["get"]),
        ("RoleBinding", "roleRef", "namespace", "x"),
        ("ServiceAccount", "metadata", "lables", {}),
        ("ValidatingAdmissionPolicy", "spec.validations.0", "messages", "no"),
        ("ValidatingAdmissionPolicyBinding", "spec", "validationActions", "Deny"),
    ],
)
def test_mistakes_are_refused(kind: str, where: str, field: str, value: object) -> None:
    folder = {"RayCluster": "base", "RayJob": "train", "Namespace": "base"}.get(kind, "kind")
    folder = "retrain" if kind in RETRAINER else folder
    document = copy.deepcopy(next(m for m in built(folder) if m["kind"] == kind))
    assert complaints(document) == []
    at(document, where.split("."))[field] = value
    assert complaints(document) != []


def test_missing_parts_and_unknown_kinds_are_refused() -> None:
    document = copy.deepcopy(manifest("base", "RayCluster"))
    del document["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["name"]
    assert any("'name' is a required property" in complaint for complaint in complaints(document))
    assert complaints({"apiVersion": "v1", "kind": "Secrets", "metadata": {"name": "x"}}) != []
    assert complaints({"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "x"}}) != []
    assert complaints({"apiVersion": "kueue.x-k8s.io/v1", "kind": "LocalQueue", "metadata": {"name": "x"}}) != []
