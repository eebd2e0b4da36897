"""Container tools of Debian: debootstrap makes the base, buildah builds, podman with runc runs."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

NEEDED = ("debootstrap", "buildah", "podman", "runc")
BASE = "localhost/spikefleet-python:bookworm"
IMAGE = "localhost/spikefleet:tried"

_PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_ENVIRONMENT = {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "overlay"}


class ImageError(RuntimeError):
    """A step failed; the message names it and shows the end of what it printed."""


def missing_tools() -> list[str]:
    """Names of the tools that are not installed."""
    return [tool for tool in NEEDED if shutil.which(tool) is None]


def tool(*command: str, environment: Mapping[str, str] = _ENVIRONMENT, quiet: bool = True) -> str:
    """Run a command and return its output.

    Args:
        *command: program and arguments.
        environment: added to that of this process.
        quiet: keep the output; otherwise it goes to the terminal, and none is returned.

    Raises:
        ImageError: it failed.
    """
    import os

    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ImageError(f"{' '.join(command[:3])} ended with {done.returncode}:\n{(done.stdout or '')[-2000:]}")
    return done.stdout or ""


def has_image(name: str) -> bool:
    """Whether an image of that name was built here."""
    return bool(tool("buildah", "images", "--quiet", "--filter", f"reference={name}").strip())


def make_base(folder: Path) -> None:
    """Make a base with Python as the official image has it: `python` and `pip` run, and pip may install.

    Args:
        folder: to unpack Debian in; emptied first.
    """
    shutil.rmtree(folder, ignore_errors=True)
    tool("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(folder), quiet=False)
    for marker in (folder / "usr/lib").glob("python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    for name, target in (("python", "python3"), ("pip", "pip3")):
        (folder / "usr/bin" / name).unlink(missing_ok=True)
        (folder / "usr/bin" / name).symlink_to(target)
    # Behind a proxy that signs anew, the build trusts what this machine trusts.
    shutil.copyfile(_CERTIFICATES, folder / str(_CERTIFICATES).lstrip("/"))
    container = tool("buildah", "from", "scratch").strip()
    try:
        tool("buildah", "add", "--quiet", container, str(folder), "/")
        tool("buildah", "config", "--env", f"SSL_CERT_FILE={_CERTIFICATES}", container)
        tool("buildah", "commit", "--quiet", container, BASE)
    finally:
        tool("buildah", "rm", container)
    shutil.rmtree(folder)


def build(repository: Path, arguments: Sequence[str] = ()) -> None:
    """Build `k8s/Dockerfile` unchanged, on the base.

    Args:
        repository: its root.
        arguments: more build arguments, NAME=VALUE.
    """
    flags = [flag for argument in (f"PYTHON_IMAGE={BASE}", *arguments) for flag in ("--build-arg", argument)]
    tool(
        "buildah", "build", "--layers", "-f", str(repository / "k8s/Dockerfile"), "-t", IMAGE, *flags, str(repository),
        quiet=False,
    )  # fmt: skip
