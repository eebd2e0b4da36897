"""The code version of a result: library versions, and the commit of a checkout."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

_LIBRARIES = ("spikefleet", "torch", "torchvision", "spikingjelly", "ray", "mlflow", "numpy", "pyarrow", "safetensors")


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a result, by name.

    The training core alone needs neither Ray nor MLflow, and runs from its sources too: what is not installed says so.
    """
    return {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache
def code_version() -> str:
    """The commit of the checkout that the package runs from, with `+dirty` for changes; else the package's version."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # the checkout may be another project's
        commit = _git(here, "rev-parse", "HEAD")
        dirty = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return f"spikefleet-{_version('spikefleet')}"
    return f"{commit[:12]}+dirty" if dirty else commit[:12]


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
