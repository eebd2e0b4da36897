"""`spikefleet tune` as a user meets it: trials tracked under their search, a report, registration, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spikefleet.cli import app

SEARCH = """
recipe: digits
overrides: {train.epochs: 1, model.width: 0.125, model.stages: [1, 1]}
space:
  model.timesteps: {choice: [1, 2]}
objectives: {val/top1: max, energy_mj: min}
sampler: grid
budget: {trials: 2}
"""


def tune(folder: Path, stores_dir: Path, *words: str) -> str:
    command = [str(Path(sys.executable).with_name("spikefleet")), "tune", str(folder / "small.yaml"), *words]
    command += ["--runs-dir", str(folder / "runs"), "--stores-dir", str(stores_dir)]
    clean = {key: value for key, value in os.environ.items() if "MLFLOW_TRACKING" not in key}
    done = subprocess.run(
        command, env={**clean, "COLUMNS": "200"}, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(stores_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    (folder / "small.yaml").write_text(SEARCH)
    said = tune(folder, stores_dir, "--register", "best")
    assert "trial 2/2" in said
    assert "sg_resnet_digits version 1 is champion" in said
    return folder


def test_each_trial_is_a_nested_run_with_its_figures(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("search-small")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"small", "small-0000", "small-0001"}
    parent = runs["small"]
    assert parent.data.metrics["trials"] == 2
    for name in ("small-0000", "small-0001"):
        trial = runs[name]
        assert trial.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert trial.info.status == "FINISHED"
        assert trial.data.metrics["energy_mj"] > 0
        assert {one.path for one in client.list_artifacts(trial.info.run_id, "report")} >= {"report/energy.json"}
    assert {run.data.params.get("model.timesteps") for run in runs.values()} == {None, "1", "2"}


def test_the_report_has_front_and_pictures(folder: Path) -> None:
    report = folder / "runs" / "searches" / "small" / "report"
    assert {path.name for path in report.iterdir()} >= {"results.json", "results.csv", "front.png", "parallel.png"}
    results = json.loads((report / "results.json").read_text())
    assert results["complete"]
    assert set(results["front"]) <= {"small-0000", "small-0001"}


def test_the_same_command_runs_nothing_again(folder: Path, stores_dir: Path) -> None:
    said = tune(folder, stores_dir)
    assert "trial " not in said.partition("on the front")[0].replace("trials are", "")
    assert "report:" in said


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("model.timesteps:", "model.timestep:"), ("model.timestep", "did you mean")),
        (("choice: [1, 2]", "choice: []"), ("model.timesteps", "choice")),
        (("choice: [1, 2]", "choice: [0, 2]"), ("model.timesteps", "0")),
        (("val/top1: max", "val/map50: max"), ("val/map50", "reported by this task")),
        (("val/top1: max", "val/top1: up"), ("val/top1", "up")),
        (("trials: 2", "trials: 0"), ("budget.trials", "0")),
        (("model.timesteps:", "model.neuron.bound:"), ("model.neuron.bound", "does not use")),
        (("sampler: grid", "sampler: gird"), ("sampler", "gird")),
        (("model.timesteps:", "data.seed:"), ("data.seed", "share one store")),
    ],
)
def test_what_could_not_run_is_refused_before_anything_starts(
    change: tuple[str, str], parts: tuple[str, ...], stores_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(SEARCH.replace(*change))
    words = ["tune", str(tmp_path / "bad.yaml"), "--runs-dir", str(tmp_path / "runs"), "--stores-dir", str(stores_dir)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, f"{done.output}\n{done.exception!r}"
    for part in parts:
        assert part in " ".join(done.stderr.split())
    assert not (tmp_path / "runs").exists()
