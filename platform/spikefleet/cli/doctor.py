"""What on this machine would hinder a training: the findings of `spikefleet doctor`."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from spikefleet.errors import UserError
from spikefleet.tracking.database import check_database, condition, database_path
from spikefleet.tracking.mlflow_client import check_tracking_uri, local_database
from spikefleet.tracking.relocation import former_places
from spikefleet.versions import code_version, library_versions
from spikefleet_tune.messages import counted

_LEAST_DISK_GIB = 5
_LEAST_SHARED_MEMORY_GIB = 1
_GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One fact: good, worth knowing (`poor`), or in the way of any training (`bad`)."""

    verdict: Literal["good", "poor", "bad"]
    subject: str
    text: str


def examine(runs_dir: Path) -> list[Finding]:
    """Looks at versions, devices, storage, Ray's address and the tracking server. Starts nothing."""
    return [*_versions(), *_devices(), *_storage(runs_dir), _ray(), _tracking(runs_dir)]


def _versions() -> Iterator[Finding]:
    supported = (3, 11) <= sys.version_info < (3, 14)
    versions = dict(library_versions())
    python = versions.pop("python")
    yield Finding("good" if supported else "bad", "python", f"{python} (3.11 to 3.13 are supported)")
    yield Finding("good", "libraries", ", ".join(f"{name} {version}" for name, version in versions.items()))
    yield Finding("good", "code", code_version())


def _devices() -> Iterator[Finding]:
    import torch

    from spikefleet_models.kernels import unit_form

    cores = counted(os.cpu_count() or 1, "core")
    threads = counted(torch.get_num_threads(), "thread")
    yield Finding("good", "CPU", f"{cores}, {threads} for torch in new runs")
    if not torch.cuda.is_available():
        yield Finding("poor", "GPU", "none; `--gpu` cannot be used on this machine")
        yield _unit_on_the_cpu()
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("good", f"GPU {index}", f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB")
    form = unit_form(torch.device("cuda"))
    yield Finding("good" if form.startswith("triton") else "poor", "spiking unit", f"{form} on GPUs")
    yield _unit_on_the_cpu()


def _unit_on_the_cpu() -> Finding:
    import torch

    from spikefleet_models.kernels import chosen_cpu_form, unit_form

    try:
        form = unit_form(torch.device("cpu"))
    except ValueError as error:
        return Finding("bad", "spiking unit", str(error))
    poor = chosen_cpu_form() == "native" and form != "native"
    return Finding("poor" if poor else "good", "spiking unit", f"{form} on the CPU")


def _storage(runs_dir: Path) -> Iterator[Finding]:
    place = next(path for path in (runs_dir.absolute(), *runs_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free / _GIB
    flaw = "" if os.access(place, os.W_OK) else ", cannot be written to"
    if not place.is_dir():
        flaw = ", is no directory"
    verdict: Literal["good", "bad"] = "bad" if flaw else "good"
    text = f"{place}: {free:.0f} GiB free{flaw}"
    yield Finding("poor" if verdict == "good" and free < _LEAST_DISK_GIB else verdict, "runs", text)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / _GIB
        enough = size >= _LEAST_SHARED_MEMORY_GIB
        yield Finding("good" if enough else "poor", "shared memory", f"{size:.1f} GiB; Ray and loader processes use it")


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding("good", "Ray", "RAY_ADDRESS is not set: a local Ray is started for each run")
    if address in ("auto", "local"):
        return Finding("good", "Ray", f"RAY_ADDRESS={address}")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    answers = port.isdigit() and _answers(host, int(port))
    return Finding("good" if answers else "bad", "Ray", f"{address} {'answers' if answers else 'does not answer'}")


def _tracking(runs_dir: Path) -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri or database_path(uri) is not None:
        return _database(local_database(runs_dir), uri)
    try:
        check_tracking_uri(uri)
    except UserError as error:
        return Finding("bad", "tracking", str(error))
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return Finding("good", "tracking", f"{parts.scheme} database by MLFLOW_TRACKING_URI")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    shown = f"{parts.scheme}://{parts.hostname}:{port}"  # without a user's password
    if _answers(parts.hostname or "", port):
        return Finding("good", "tracking", f"{shown} answers")
    return Finding("poor", "tracking", f"{shown} does not answer; runs keep their records until it does")


def _database(path: Path, uri: str) -> Finding:
    try:
        check_database(path)
        former = former_places(path) if condition(path) == "sound" else []
    except UserError as error:
        return Finding("bad", "tracking", str(error))
    if former:
        return Finding(
            "poor", "tracking", f"{path} was moved from {', '.join(former)}; the next command that uses it adapts it"
        )
    origin = "by MLFLOW_TRACKING_URI" if uri else "MLFLOW_TRACKING_URI is not set"
    return Finding("good", "tracking", f"SQLite file {path}; {origin}")


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True
