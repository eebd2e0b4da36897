"""What `make gpu` stands on, without a GPU: sections that fail or hang, data in memory, and what it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpu.memory_store import as_store
from gpu.session import Results, Session
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions


def works(session: Session, results: Results) -> None:
    results["value"] = 3


def fails(session: Session, results: Results) -> None:
    results["before"] = 1
    raise ZeroDivisionError("by zero")


def hangs(session: Session, results: Results) -> None:
    results["before"] = 2
    try:
        time.sleep(60)
    except Exception:
        results["swallowed"] = True


def test_a_failure_or_a_hang_of_a_section_ends_no_other(tmp_path: Path) -> None:
    session = Session(tmp_path / "out" / "gpu.json", seconds=30, dry=False)
    session.section("fails", 5, fails)
    session.section("hangs", 1.2, hangs)
    session.section("works", 5, works)
    written = json.loads(session.out.read_text())
    assert "ZeroDivisionError: by zero" in written["fails"]["failure"]
    assert written["hangs"] == {"before": 2, "out_of_time": "after 1 s", "seconds": pytest.approx(1.2, abs=0.5)}
    assert written["works"]["value"] == 3
    assert [path.name for path in session.out.parent.iterdir()] == ["gpu.json"]


def test_no_section_starts_when_the_time_is_over(tmp_path: Path) -> None:
    session = Session(tmp_path / "gpu.json", seconds=0.5, dry=False)
    session.section("works", 5, works)
    assert json.loads(session.out.read_text())["works"]["skipped"] == "no time was left"


def test_data_in_memory_are_those_of_the_store(tmp_path: Path) -> None:
    memory = as_store("digits", read_digits(None, DigitsOptions(), 0))
    store = prepare("digits", None, tmp_path / "digits")
    assert memory.manifest.splits == store.manifest.splits
    assert memory.manifest.class_names == store.manifest.class_names
    rows = np.array([0, 17, 3])
    for name in store.manifest.splits:
        assert np.array_equal(memory.split(name).labels, store.split(name).labels)
        assert np.array_equal(memory.split(name).gather(rows), store.split(name).gather(rows))
    assert not np.array_equal(memory.split("train").gather(rows), memory.split("val").gather(rows))


def test_the_script_imports_on_a_bare_machine() -> None:
    """Without Ray, MLflow, Arrow and what else such a machine lacks; the training core included."""
    absent = ["ray", "mlflow", "pyarrow", "torchvision", "pycocotools", "optuna", "h5py"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import gpu.run, spikefleet.training.loop"
    environment = {"PYTHONPATH": ":".join(["tests", *sys.path]), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow  # some minutes on two cores
def test_every_section_runs_in_the_dry_mode(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "gpu.run", "--dry", "--minutes", "20", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name: results for name, results in json.loads(out.read_text()).items() if isinstance(results, dict)}
    assert len(found) > 10
    assert {name for name, results in found.items() if {"failure", "out_of_time"} & set(results)} == set()
    skipped = {name: results["skipped"] for name, results in found.items() if "skipped" in results}
    assert skipped == {"guarantees": "the CPU has no such form", "tile_sizes": "the CPU has no tiles"}
