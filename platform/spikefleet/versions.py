"""The code version of a result: library versions, and the commit of a checkout."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

_LIBRARIES = ("spikefleet", "torch", "torchvision", "spikingjelly", "ray", "mlflow", "numpy", "pyarrow", "safetensors")


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that can change a result, by name."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):  # training itself needs neither Ray nor MLflow nor pyarrow
            versions[name] = metadata.version(name)
    return versions


@cache
def code_version() -> str:
    """The commit of the checkout that the package runs from, with `+dirty` for changes; else the package's version."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # the checkout may be another project's
        commit = _git(here, "rev-parse", "HEAD")
        dirty = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return f"spikefleet-{metadata.version('spikefleet')}"
    return f"{commit[:12]}+dirty" if dirty else commit[:12]


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
