"""Containers run by podman as the kubelet would: with the user, capabilities, root, volumes of the manifest."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image.engine import IMAGE, tool
from image.manifests import Container, in_bytes

_LIMITS = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=30000:30000")
RUNTIME = ("--runtime", "runc")
"""crun refuses a machine with both versions of cgroups."""


@dataclass(frozen=True)
class Place:
    """Where a container runs."""

    name: str
    """Name of the container, of its host and of its network namespace."""
    network: str
    """Value of podman's --network."""
    files: Path
    """Directory on this machine for the volumes of the pod."""
    claim: Path
    """Directory of the shared claim."""
    known: Mapping[str, str]
    """Addresses of names, instead of a DNS."""


def flags(container: Container, place: Place) -> list[str]:
    """Arguments of `podman run` that follow from a manifest."""
    pod, spec = container.pod, container.spec
    security = {**pod.get("securityContext", {}), **spec.get("securityContext", {})}
    found = [*RUNTIME, *_LIMITS, "--name", place.name, "--network", place.network, "--hostname", place.name]
    found += ["--user", f"{security['runAsUser']}:{security['runAsGroup']}"]
    if security.get("readOnlyRootFilesystem"):
        found += ["--read-only", "--read-only-tmpfs=false"]
    found += [f"--cap-drop={one.lower()}" for one in security.get("capabilities", {}).get("drop", ())]
    if security.get("allowPrivilegeEscalation") is False:
        found += ["--security-opt", "no-new-privileges"]
    # No server is asked for names that are not known: the answer that there is none comes at once.
    found += ["--dns", "127.0.0.1"] if place.known else []
    limits = spec["resources"]["limits"]
    found += ["--memory", str(in_bytes(limits["memory"])), "--cpus", str(limits["cpu"])]
    for name, value in place.known.items():
        found += ["--add-host", f"{name}:{value}"]
    for name, value in container.environment.items():
        found += ["--env", f"{name}={value}"]
    volumes = {one["name"]: one for one in pod.get("volumes", ())}
    for mount in spec.get("volumeMounts", ()):
        found += _volume(volumes[mount["name"]], mount["mountPath"], place, security["runAsUser"])
    return found


def _volume(volume: Mapping[str, Any], path: str, place: Place, user: int) -> list[str]:
    if "persistentVolumeClaim" in volume:
        return ["--volume", f"{place.claim}:{path}"]
    if volume["emptyDir"].get("medium") == "Memory":
        return ["--shm-size", str(in_bytes(volume["emptyDir"]["sizeLimit"]))]
    folder = place.files / place.name / volume["name"]
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o2777)
    return ["--volume", f"{folder}:{path}"]


def start(container: Container, place: Place) -> None:
    """Start a container in the background."""
    tool("podman", "run", "--detach", *flags(container, place), IMAGE, *container.command)


def run(container: Container, place: Place) -> None:
    """Run a container to its end, with its output on the terminal. Raises ImageError if it fails."""
    tool("podman", "run", "--rm", *flags(container, place), IMAGE, *container.command, quiet=False)


def inside(name: str, *command: str) -> str:
    """Output of a command in a running container. Raises ImageError if it fails."""
    return tool("podman", "exec", name, *command)


def logs(name: str, lines: int = 40) -> str:
    """The last lines that a container wrote."""
    done = subprocess.run(
        ("podman", "logs", "--tail", str(lines), name), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    return done.stdout


def is_running(name: str) -> bool:
    """Whether a container runs."""
    found = json.loads(tool("podman", "inspect", name))
    return bool(found[0]["State"]["Running"])


def stop(name: str, grace_s: int = 60) -> None:
    """Stop a container as the kubelet does: SIGTERM, and after the grace period SIGKILL; then remove it."""
    subprocess.run(("podman", "stop", "--time", str(grace_s), name), capture_output=True, check=False)
    subprocess.run(("podman", "rm", "--force", name), capture_output=True, check=False)


def remove(names: Sequence[str]) -> None:
    """Remove containers that an earlier run left."""
    for name in names:
        subprocess.run(("podman", "rm", "--force", name), capture_output=True, check=False)
