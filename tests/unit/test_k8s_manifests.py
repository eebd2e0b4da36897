"""The manifests in k8s/, checked without a cluster: structure, Pod Security "restricted", what Ray and the CLI need.

The kustomizations are resolved here (and compared with `kubectl kustomize` where kubectl is installed), then validated
against a strict schema that is derived from KubeRay's CRDs. Rules in CEL and the operator's own code are not covered.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from jsonschema import Draft202012Validator

import spikefleet.cli
from spikefleet.config.recipes import list_recipes

Manifest = dict[str, Any]

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
FOLDERS = sorted(path.parent.name for path in K8S.glob("*/kustomization.yaml"))
SCHEMA = json.loads((K8S / "schemas/kuberay-v1.7.0.json").read_text(encoding="utf-8"))
LOCKED = {p["name"]: p["version"] for p in tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCAL_ONLY = "config.kubernetes.io/local-config"


# Kustomize, as far as the kustomizations here use it.


def documents(path: Path) -> list[Manifest]:
    # Through JSON, so that what YAML anchors share becomes separate objects.
    return json.loads(json.dumps(list(yaml.safe_load_all(path.read_text(encoding="utf-8")))))


def build(folder: Path) -> list[Manifest]:
    kustomization = documents(folder / "kustomization.yaml")[0]
    known = {"apiVersion", "kind", "namespace", "resources", "images", "patches", "replacements"}
    assert set(kustomization) <= known, f"{folder.name}: teach this test {set(kustomization) - known}"
    manifests: list[Manifest] = []
    for name in kustomization["resources"]:
        manifests += build(folder / name) if (folder / name).is_dir() else documents(folder / name)
    for manifest in manifests:
        if manifest["kind"] != "Namespace" and "namespace" in kustomization:
            manifest["metadata"]["namespace"] = kustomization["namespace"]
        for image in kustomization.get("images", []):
            for container in containers_in(manifest):
                if container.get("image") == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    for entry in kustomization.get("patches", []):
        apply_patch(manifests, yaml.safe_load(entry["patch"]), entry.get("target"))
    for replacement in kustomization.get("replacements", []):
        source = dict(replacement["source"])
        steps = source.pop("fieldPath").split(".")
        value = at(one(manifests, source), steps)
        for target in replacement["targets"]:
            for field in target["fieldPaths"]:
                *parents, last = field.split(".")
                at(one(manifests, target["select"]), parents)[last] = copy.deepcopy(value)
    return [m for m in manifests if m["metadata"].get("annotations", {}).get(LOCAL_ONLY) != "true"]


def apply_patch(manifests: list[Manifest], patch: Any, target: dict[str, str] | None) -> None:
    if isinstance(patch, dict):
        merge(one(manifests, {"kind": patch["kind"], "name": patch["metadata"]["name"]}), patch)
        return
    for operation in patch:
        *parents, last = [step.replace("~1", "/") for step in operation["path"].lstrip("/").split("/")]
        holder = at(one(manifests, target or {}), parents)
        assert operation["op"] == "add" or (operation["op"] == "replace" and last in holder), operation
        holder[last] = operation["value"]


def merge(into: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, value in patch.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def one(manifests: list[Manifest], select: dict[str, str]) -> Manifest:
    name = select.get("name")
    found = [m for m in manifests if m["kind"] == select["kind"] and name in (None, m["metadata"]["name"])]
    assert len(found) == 1, f"{select} selects {len(found)} manifests"
    return found[0]


def at(node: Any, steps: list[str]) -> Any:
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node[step]
    return node


def maps_in(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from maps_in(child)


def containers_in(node: Any) -> Iterator[dict[str, Any]]:
    for part in maps_in(node):
        for key in ("containers", "initContainers"):
            if isinstance(part.get(key), list):
                yield from part[key]


def pod_templates(manifests: list[Manifest]) -> list[Manifest]:
    return [part for part in maps_in(manifests) if "containers" in part.get("spec", {})]


BUILT = {folder: build(K8S / folder) for folder in FOLDERS}
every_folder = pytest.mark.parametrize("folder", FOLDERS)


def manifest(folder: str, kind: str, name: str | None = None) -> Manifest:
    return one(BUILT[folder], {"kind": kind} if name is None else {"kind": kind, "name": name})


def cluster_spec(folder: str) -> Manifest:
    if folder == "base":
        return manifest("base", "RayCluster")["spec"]
    return manifest(folder, "RayJob")["spec"]["rayClusterSpec"]


def ray_groups(folder: str) -> list[Manifest]:
    spec = cluster_spec(folder)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def gibibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) / (1024 if unit == "Mi" else 1)


def test_what_is_there_is_built() -> None:
    assert FOLDERS == ["base", "gpu", "train"]
    files = {path for folder in FOLDERS for path in (K8S / folder).iterdir()}
    used = {K8S / folder / "kustomization.yaml" for folder in FOLDERS}
    for folder in FOLDERS:
        used |= {K8S / folder / name for name in documents(K8S / folder / "kustomization.yaml")[0]["resources"]}
    assert files <= used


@every_folder
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_resolved_as_kubectl_does(folder: str) -> None:
    run = subprocess.run(["kubectl", "kustomize", K8S / folder], capture_output=True, text=True, check=True)

    def ordered(manifests: list[Manifest]) -> list[Manifest]:
        return sorted(manifests, key=lambda m: (m["kind"], m["metadata"]["name"]))

    assert ordered(list(yaml.safe_load_all(run.stdout))) == ordered(BUILT[folder])


# Structure


def complaints(document: Manifest) -> list[str]:
    """What the strict schema has against a manifest."""
    kind = SCHEMA["kinds"].get(document.get("kind"))
    if kind is None:
        return [f"kind {document.get('kind')!r} is not one that is checked"]
    validator = Draft202012Validator({**kind, "$defs": SCHEMA["$defs"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@every_folder
def test_manifests_are_valid(folder: str) -> None:
    assert [complaint for document in BUILT[folder] for complaint in complaints(document)] == []


def test_schema_is_strict_everywhere() -> None:
    Draft202012Validator.check_schema({"$defs": {**SCHEMA["$defs"], **SCHEMA["kinds"]}})
    objects = [part for part in maps_in(SCHEMA) if part.get("type") == "object" and "properties" in part]
    assert len(objects) > 100
    assert all(part["additionalProperties"] is False for part in objects)


HEAD = "spec.headGroupSpec.template.spec"
WORKER = "spec.workerGroupSpecs.0.template.spec"
SUBMITTER = "spec.submitterPodTemplate.spec"


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
    ],
)
def test_mistakes_are_refused(kind: str, where: str, field: str, value: object) -> None:
    folder = "train" if kind == "RayJob" else "base"
    document = copy.deepcopy(next(m for m in BUILT[folder] if m["kind"] == kind))
    assert complaints(document) == []
    at(document, where.split("."))[field] = value
    assert complaints(document) != []


def test_missing_parts_and_unknown_kinds_are_refused() -> None:
    document = copy.deepcopy(manifest("base", "RayCluster"))
    del document["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["name"]
    assert any("'name' is a required property" in complaint for complaint in complaints(document))
    assert complaints({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}}) != []


# Pod Security Standard "restricted", and a little more

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
    templates = pod_templates(BUILT[folder])
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
    assert careless(BUILT[folder]) == []
    assert not any(document["kind"] == "Secret" for document in BUILT[folder])
    images = {container["image"] for container in containers_in(BUILT[folder])}
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


# What Ray, KubeRay and spikefleet need of one another


@every_folder
def test_ray_asks_for_a_token_and_is_not_exposed(folder: str) -> None:
    spec = cluster_spec(folder)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == LOCKED["ray"]
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["enableIngress"] is False
    variables = {entry["name"] for container in containers_in(spec) for entry in container.get("env", [])}
    assert not variables & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}  # KubeRay keeps what it finds there


@every_folder
def test_memory_is_bounded(folder: str) -> None:
    for group in ray_groups(folder):
        pod = group["template"]["spec"]
        resources = pod["containers"][0]["resources"]
        for name in set(resources["limits"]) - {"cpu"}:
            assert resources["requests"][name] == resources["limits"][name]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        shared = mounted["/dev/shm"]["emptyDir"]
        assert shared["medium"] == "Memory"
        object_store = int(group["rayStartParams"]["object-store-memory"]) / 2**30
        assert object_store < gibibytes(shared["sizeLimit"]) < gibibytes(resources["limits"]["memory"])
        assert "/tmp" in mounted


@every_folder
def test_runs_and_stores_are_on_one_claim(folder: str) -> None:
    claim = manifest(folder, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    settings = manifest(folder, "ConfigMap")
    train = typer.main.get_command(spikefleet.cli.app).commands["train"]  # type: ignore[attr-defined]
    read = {option.envvar for option in train.params if option.envvar}
    assert read == {name for name in settings["data"] if name.startswith("SPIKEFLEET_")}
    for group in ray_groups(folder):
        pod = group["template"]["spec"]
        held = {"name": "data", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
        assert held in pod["volumes"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert all(Path(settings["data"][name]).is_relative_to(mounts["data"]) for name in read)
        assert {"configMapRef": {"name": settings["metadata"]["name"]}} in pod["containers"][0]["envFrom"]


@every_folder
def test_network_is_closed_but_for_ray(folder: str) -> None:
    policies = {m["metadata"]["name"]: m["spec"] for m in BUILT[folder] if m["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    among = policies["among-ray-pods"]
    for template in pod_templates(BUILT[folder]):
        assert among["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert among["ingress"] == [{"from": [{"podSelector": among["podSelector"]}]}]
    assert among["egress"] == [{"to": [{"podSelector": among["podSelector"]}]}]
    from_outside = [spec for name, spec in policies.items() if name != "among-ray-pods" and "ingress" in spec]
    assert [rule["ports"] for spec in from_outside for rule in spec["ingress"]] == [[{"protocol": "TCP", "port": 8265}]]
    assert manifest(folder, "ConfigMap")["data"]["GLOO_SOCKET_IFNAME"] == "eth0"


@pytest.mark.parametrize("folder", ["train", "gpu"])
def test_job_has_the_standing_cluster_s_spec_and_ends(folder: str) -> None:
    job = manifest(folder, "RayJob")["spec"]
    assert not [m for m in BUILT[folder] if m["kind"] == "RayCluster"]
    if folder == "train":
        assert job["rayClusterSpec"] == cluster_spec("base")
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] > 0
    assert job["activeDeadlineSeconds"] > 0
    assert job["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


def parse(command: str) -> dict[str, Any]:
    program, *arguments = shlex.split(command)
    assert program == next(iter(PROJECT["project"]["scripts"]))
    group: Any = typer.main.get_command(spikefleet.cli.app)
    with group.make_context(program, arguments) as context:
        name, subcommand, rest = group.resolve_command(context, arguments)
        return {"command": name, **subcommand.make_context(name, rest, parent=context).params}


@pytest.mark.parametrize("folder", ["train", "gpu"])
def test_entry_point_is_a_command_that_the_cluster_has_room_for(folder: str) -> None:
    given = parse(manifest(folder, "RayJob")["spec"]["entrypoint"])
    assert given["command"] == "train"
    assert given["recipe"] in list_recipes()
    (group,) = cluster_spec(folder)["workerGroupSpecs"]
    assert given["workers"] == group["replicas"] * int(group["rayStartParams"]["num-cpus"])
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == ("1" if given["gpu"] else None)
    assert given["gpu"] == (folder == "gpu")


def test_a_wrong_option_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse("spikefleet train digits --worker-count 2")


# The image


def test_dockerfile_installs_the_lock_for_the_pods_user() -> None:
    text = (K8S / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in text.splitlines() if not line.startswith("#")]
    syncs = [line for line in lines if "uv sync" in line]
    assert len(syncs) == 2
    assert all("--locked" in sync and "--no-dev" in sync for sync in syncs)
    assert "--no-build" in syncs[0]
    assert "--no-install-project" in syncs[0]
    assert "--no-editable" in syncs[1]
    assert f"ARG UV_VERSION={LOCKED['uv']}" in lines
    assert not [line for line in lines if line.startswith("FROM") and "${PYTHON_IMAGE}" not in line]
    copied = {Path(name) for line in lines if re.match(r"COPY (?!--from)", line) for name in line.split()[1:-1]}
    assert all((ROOT / path).exists() for path in copied)
    assert {Path(name).parts[0] for name in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]} <= {
        path.name for path in copied
    }
    sent = {line[1:] for line in (K8S / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == {str(path) for path in copied}
    user = next(line.split()[1] for line in reversed(lines) if line.startswith("USER"))
    context = cluster_spec("base")["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
