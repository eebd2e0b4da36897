"""Runs directories at any path, moved or copied; names of runs that the directory needs for itself."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from spikefleet import registry
from spikefleet.cli import app
from spikefleet.errors import UserError
from spikefleet.files import read_json
from spikefleet.runs.run_dir import check_run_name
from spikefleet.tracking.database import database_path
from spikefleet.tracking.journal import DELIVERED
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.tracking.relocation import former_places
from spikefleet.tracking.tracker import Tracker, sync
from support.finished import NAME

MODEL = "models:/sg_resnet_digits@champion"
ODD = ("who?", "50%25 of it", "a #b c", "100%")


def invoke(*words: str) -> tuple[int, str, str]:
    done = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"}).invoke(app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, " ".join(done.stdout.split()), " ".join(done.stderr.split())


def places(runs: Path) -> set[str]:
    """All artifact locations in a database."""
    with closing(sqlite3.connect(runs / "mlflow.db")) as database:
        queries = (
            "SELECT artifact_location FROM experiments WHERE name != 'Default'",
            "SELECT artifact_uri FROM runs",
            "SELECT artifact_location FROM logged_models",
            "SELECT source FROM model_versions",
            "SELECT storage_location FROM model_versions",
        )
        return {place for query in queries for (place,) in database.execute(query) if place}


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_runs_directory_follows_its_place(
    how: str, copied: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = copied("first")
    registry.pull(MODEL, tmp_path / "before", tracking_uri=resolve_tracking_uri(first))  # adapts it to `first`
    caplog.clear()
    runs = tmp_path / "else where" / "runs"
    runs.parent.mkdir()
    if how == "moved":
        first.rename(runs)
    else:
        shutil.copytree(first, runs)
        there = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert former_places(runs / "mlflow.db") == [(first / "artifacts").as_uri()]
    code, said, _ = invoke("doctor", "--runs-dir", str(runs))
    assert "was moved from" in said

    code, said, warned = invoke("registry", "pull", MODEL, "--out", str(tmp_path / "after"), "--runs-dir", str(runs))
    assert code == 0, said + warned
    assert f"the runs directory was moved from {first} to {runs}" in caplog.text
    assert all(place.startswith((runs / "artifacts").as_uri()) for place in places(runs))
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    backup = max(runs.glob("mlflow.db.before-*"), key=lambda path: path.stat().st_mtime_ns)
    with closing(sqlite3.connect(backup)) as database:
        rows = database.execute("SELECT count(*) FROM runs WHERE artifact_uri LIKE ?", (f"{first.as_uri()}%",))
        assert rows.fetchone()[0] > 0

    caplog.clear()
    assert invoke("registry", "list", "--runs-dir", str(runs))[0] == 0
    assert caplog.text == "", "it is said once"
    assert "was moved" not in invoke("doctor", "--runs-dir", str(runs))[1]
    if how == "copied":
        assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == there


def test_records_of_a_moved_run_go_to_the_moved_database(copied: Callable[[str], Path], tmp_path: Path) -> None:
    first = copied("first")
    uri = resolve_tracking_uri(first)
    tracker = Tracker.open(first / NAME, NAME, "digits", uri)
    assert tracker.finish("FINISHED", wait_s=60) == 0
    runs = first.rename(tmp_path / "moved")
    tracker = Tracker.open(runs / NAME, NAME, "digits", resolve_tracking_uri(runs))
    tracker.set_tags({"after": "the move"})
    tracker.finish("FINISHED", wait_s=0)
    assert sync(runs / NAME) > 0
    assert read_json(runs / NAME / DELIVERED)["tracking_uri"] == resolve_tracking_uri(runs)
    assert not first.exists(), "nothing is written at the old place"


def test_what_is_elsewhere_on_purpose_stays(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """Negative control: another experiment's artifacts are not taken for those of a moved directory."""
    runs = copied("runs")
    registry.list_models(tracking_uri=resolve_tracking_uri(runs))
    elsewhere = "file:///mnt/unmounted/artifacts"
    with closing(sqlite3.connect(runs / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ? WHERE name = 'Default'", (elsewhere,))
    assert former_places(runs / "mlflow.db") == []
    link = tmp_path / "link"
    link.symlink_to(runs)
    assert former_places(link / "mlflow.db") == []


@pytest.mark.parametrize("name", ODD)
def test_any_legal_path_is_a_runs_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: Callable[[str], Path]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    runs = copied(f"base/{name}/runs")
    (tmp_path / "cwd").mkdir()
    with contextlib.chdir(tmp_path / "cwd"):
        uri = resolve_tracking_uri(runs)
        path = database_path(uri)
        assert path is not None
        assert path.resolve() == (runs / "mlflow.db").resolve()
        tracker = Tracker.open(runs / "more", "more", "digits", uri)
        (tmp_path / "x.txt").write_text("x")
        tracker.log_artifact(tmp_path / "x.txt")
        assert tracker.finish("FINISHED", wait_s=60) == 0
        assert (runs / "artifacts" / str(tracker.run_id) / "artifacts" / "x.txt").is_file()
        registry.pull(MODEL, tmp_path / "pulled", tracking_uri=uri)
        assert np.isfinite(registry.best("classification", "top1", tracking_uri=uri).metrics["val/top1"])
    assert list((tmp_path / "cwd").iterdir()) == []
    assert [path.name for path in (tmp_path / "base").iterdir()] == [name], "nothing beside the directory"


@pytest.mark.parametrize("name", ["mlflow.db", "artifacts", "searches", "reproductions", "stores", "Artifacts"])
def test_names_that_the_directory_needs_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is reserved"):
        check_run_name(name)
    assert check_run_name(f"my-{name}") == f"my-{name}"
