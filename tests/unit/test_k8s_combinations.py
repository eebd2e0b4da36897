"""Folders and components of k8s/ build in every combination, each result is valid, each component does what it says."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from support.kubernetes_rules import cel_complaints, complaints, operator_complaints
from support.manifests import (
    COMPONENTS,
    FOLDERS,
    KUSTOMIZATIONS,
    LOCKED,
    PROJECT,
    Manifest,
    combined,
    one,
    pod_templates,
)
from support.pod_security import violations

MLFLOW = ("components/tracking", "mlflow/postgres", "mlflow/s3")
STORES = [(), ("mlflow/postgres",), ("mlflow/s3",), ("mlflow/postgres", "mlflow/s3")]
SIZES = [(), ("components/autoscaling",), ("components/kueue",)]  # these two exclude each other
CLUSTER_WIDE = {
    "Namespace",
    "ResourceFlavor",
    "ClusterQueue",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}
Overlay = tuple[tuple[str, ...], tuple[str, ...]]


def overlays() -> list[Overlay]:
    """Every combination that makes sense: what holds jobs, MLflow with or without its stores, sizes, monitoring."""
    found: list[Overlay] = []
    for folder in ("base", "train", "tune", "gpu", "retrain"):
        mlflow = [((folder,), ())] + [((folder, "mlflow"), ("components/tracking", *stores)) for stores in STORES]
        sizes = SIZES if folder != "retrain" else SIZES[:1]  # whose job is a text
        for (folders, parts), size, monitoring in itertools.product(mlflow, sizes, ((), ("components/monitoring",))):
            found.append((folders, (*parts, *size, *monitoring)))
    found += [(("kind",), size) for size in SIZES]
    found += [(("base",), ("retrain/raycronjob", *more)) for more in ((), ("components/monitoring",))]
    return found


def shown(overlay: Overlay) -> str:
    return "+".join(name.rpartition("/")[2] for part in overlay for name in part)


def some(every: list[Overlay]) -> list[Overlay]:
    """So many that each two of the names that may stand together do, at least once."""
    missing = {pair for folders, parts in every for pair in itertools.combinations((*folders, *parts), 2)}
    chosen = []
    for folders, parts in sorted(every, key=lambda overlay: -len(overlay[1])):
        pairs = set(itertools.combinations((*folders, *parts), 2))
        if pairs & missing or not parts:
            chosen.append((folders, parts))
            missing -= pairs
    return chosen


def faults(documents: list[Manifest]) -> list[str]:
    found = [complaint for document in documents for complaint in complaints(document)]
    for document in documents:
        if document["apiVersion"].startswith("ray.io/"):
            found += cel_complaints(document) + operator_complaints(document)
        space = document["metadata"].get("namespace")
        if space != (None if document["kind"] in CLUSTER_WIDE else "spikefleet"):
            found.append(f"{document['kind']} {document['metadata']['name']} in {space}")
    found += [violation for template in pod_templates(documents) for violation in violations(template)]
    names = Counter((document["kind"], document["metadata"]["name"]) for document in documents)
    return found + [f"{kind} {name} twice" for (kind, name), count in names.items() if count > 1]


def expected(overlay: Overlay) -> list[str]:
    """The autoscaler asks the API server for pods, with the head's token."""
    return ["automountServiceAccountToken"] if "components/autoscaling" in overlay[1] else []


@pytest.mark.parametrize("overlay", some(overlays()), ids=shown)
def test_pairs_build_and_are_valid(overlay: Overlay) -> None:
    assert faults(combined(*overlay)) == expected(overlay)


@pytest.mark.slow  # all of them take kubectl a minute
@pytest.mark.parametrize("overlay", overlays(), ids=shown)
def test_every_combination_builds_and_is_valid(overlay: Overlay) -> None:
    assert faults(combined(*overlay)) == expected(overlay)


def test_every_folder_and_component_is_in_some_combination() -> None:
    named = {name for folders, parts in some(overlays()) for name in (*folders, *parts)}
    within = {"image", "components/job-cluster"}  # parts of the folders
    assert named | within == {*FOLDERS, *COMPONENTS}
    assert within <= {name.removeprefix("../") for k in KUSTOMIZATIONS.values() for name in k.get("components", [])}


def test_two_folders_with_a_base_do_not_build() -> None:
    with pytest.raises(ValueError, match="already registered id"):
        combined(("train", "tune"), ())


def test_faults_are_noticed() -> None:
    documents = combined(("base",), ())
    assert faults([*documents, documents[0]]) == ["Namespace spikefleet twice"]
    astray = {**documents[1], "metadata": {**documents[1]["metadata"], "namespace": "default"}}
    assert any("in default" in fault for fault in faults([astray]))


@pytest.mark.parametrize(("folder", "kind"), [("base", "RayCluster"), ("train", "RayJob"), ("kind", "RayJob")])
def test_autoscaling_starts_with_no_worker_and_the_head_asks_for_pods(folder: str, kind: str) -> None:
    documents = combined((folder,), ("components/autoscaling",))
    spec = one(documents, {"kind": kind})["spec"]
    cluster = spec if kind == "RayCluster" else spec["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    options = cluster["autoscalerOptions"]
    assert (options["version"], options["idleTimeoutSeconds"]) == ("v2", 300)
    assert options["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert head["automountServiceAccountToken"] is True
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (0, 0, 8)
    assert group["template"]["spec"]["automountServiceAccountToken"] is False
    policy = one(documents, {"kind": "NetworkPolicy", "name": "head-to-api-server"})["spec"]
    assert [port["port"] for rule in policy["egress"] for port in rule["ports"]] == [443, 6443]


@pytest.mark.parametrize("folder", ["train", "tune", "gpu", "kind"])
def test_kueue_queues_jobs(folder: str) -> None:
    documents = combined((folder,), ("components/kueue",))
    queue = one(documents, {"kind": "LocalQueue"})
    assert queue["spec"]["clusterQueue"] == one(documents, {"kind": "ClusterQueue"})["metadata"]["name"]
    labels = one(documents, {"kind": "RayJob"})["metadata"]["labels"]
    assert labels == {"kueue.x-k8s.io/queue-name": queue["metadata"]["name"]}


def test_kueue_and_autoscaling_exclude_each_other() -> None:
    job = one(combined(("train",), ("components/kueue", "components/autoscaling")), {"kind": "RayJob"})
    assert operator_complaints(job) == ["a job in a queue shuts down and does not autoscale"]


def test_mlflow_is_reached_by_its_name_and_asks_for_a_password() -> None:
    documents = combined(("train", "mlflow"), MLFLOW)
    settings = one(documents, {"kind": "ConfigMap", "name": "spikefleet-settings"})["data"]
    service = one(documents, {"kind": "Service", "name": "mlflow"})
    assert settings["MLFLOW_TRACKING_URI"] == f"http://{service['metadata']['name']}:5000"
    deployment = one(documents, {"kind": "Deployment"})["spec"]
    assert service["spec"]["selector"].items() <= deployment["template"]["metadata"]["labels"].items()
    (container,) = deployment["template"]["spec"]["containers"]
    options = dict(word.removeprefix("--").split("=", 1) for word in container["command"][2:])
    assert container["command"][:2] == ["mlflow", "server"]
    assert options["app-name"] == "basic-auth"
    assert {"mlflow:5000", "mlflow.spikefleet.svc:5000"} <= set(options["allowed-hosts"].split(","))
    assert "*" not in options["allowed-hosts"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
    upgrade = one(documents, {"kind": "Job", "name": f"mlflow-db-upgrade-{LOCKED['mlflow'].replace('.', '-')}"})
    assert upgrade["spec"]["template"]["spec"]["containers"][0]["command"][:3] == ["mlflow", "db", "upgrade"]
    assert {"boto3", "flask-wtf", "psycopg"} <= {
        name.partition(">")[0].partition("[")[0] for name in PROJECT["project"]["optional-dependencies"]["server"]
    }


def test_the_command_lines_in_pods_are_those_that_mlflow_has() -> None:
    from mlflow.cli import cli  # type: ignore[attr-defined]

    documents = combined(("train", "mlflow"), MLFLOW)
    server = one(documents, {"kind": "Deployment"})["spec"]["template"]["spec"]["containers"][0]["command"]
    known = {option for parameter in cli.commands["server"].params for option in parameter.opts}
    assert {word.partition("=")[0] for word in server[2:]} <= known
    assert "--app-names" not in known
    assert "upgrade" in cli.commands["db"].commands


def test_scripts_in_pods_compile_and_each_policy_of_mlflow_has_its_other_end() -> None:
    documents = combined(("train", "mlflow"), MLFLOW)
    scripts = [
        container["command"][2]
        for document in documents
        for container in _containers(document)
        if container.get("command", [])[:2] == ["python", "-c"]
    ]
    assert len(scripts) == 2
    for script in scripts:
        compile(script, "pod", "exec")
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    into = {rule["ports"][0]["port"] for spec in policies for rule in spec.get("ingress", []) if "ports" in rule}
    out = {
        rule["ports"][0]["port"]
        for spec in policies
        for rule in spec.get("egress", [])
        if "ports" in rule and any("podSelector" in to and "namespaceSelector" not in to for to in rule["to"])
    }
    assert out == {5000, 5432, 8333}
    assert into - {8265, 8080} == out


def _containers(document: Manifest) -> list[Manifest]:
    spec = document.get("spec", {})
    template = spec.get("jobTemplate", {}).get("spec", spec).get("template", {})
    return [c for key in ("containers", "initContainers") for c in template.get("spec", {}).get(key, [])]
