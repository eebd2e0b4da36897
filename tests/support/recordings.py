"""Reads whole recordings in tests, by our readers or by the libraries of another interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spikefleet_pipelines.events.readers.finding import read_recording
from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.events.readers.reader import ReadAudit
from spikefleet_pipelines.events.recording import EventArrays
from support.event_files import joined

OTHER_PYTHON = os.environ.get("EVENT_READERS_PYTHON", "")
"""An interpreter outside the project that has expelliarmus, faery, evlib, tonic, aedat and dv-processing."""


def read(path: Path, options: ReadOptions = ReadOptions()) -> tuple[EventArrays, ReadAudit]:  # noqa: B008
    """All events of a recording, and what was found in it."""
    reader = read_recording(path, options)
    chunks = list(reader)
    return joined(chunks), reader.audit


def other_reader(library: str, files: dict[str, Path]) -> dict[str, EventArrays]:
    """What a library reads of files of some kinds; skips where there is no interpreter that has it."""
    python = sys.executable if importlib.util.find_spec(library) else OTHER_PYTHON
    if not python:
        pytest.skip(f"{library} is not installed; set EVENT_READERS_PYTHON to an interpreter that has it")
    out = {kind: path.with_name(path.name + ".read.npz") for kind, path in files.items()}
    run_independent(python, [word for kind in files for word in (library, kind, str(files[kind]), str(out[kind]))])
    return {kind: _loaded(path) for kind, path in out.items()}


def run_independent(python: str, words: list[str]) -> None:
    """Run the script of independent readers."""
    script = Path(__file__).with_name("independent_readers.py")
    done = subprocess.run([python, str(script), *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def _loaded(path: Path) -> EventArrays:
    with np.load(path) as fields:
        return EventArrays(fields["t"], fields["x"], fields["y"], fields["p"])
