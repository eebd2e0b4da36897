"""The tracking database survives kills and races while it is built; what was left half-built is repaired."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.errors import UserError
from spikefleet.tracking.database import _revisions, check_database, condition, create_database, repair_database

KILLS = 6

PROGRAM = Path(__file__).parents[1] / "support" / "killed_databases.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("databases")


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    return run_program(folder, KILLS)


def run_program(folder: Path, kills: int) -> dict[str, Any]:
    seed = time.time_ns() % 1_000_000
    print(f"seed of the kills: {seed}")
    done = subprocess.run([sys.executable, PROGRAM, folder, str(kills), str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def check_kills(told: dict[str, Any], folder: Path) -> None:
    assert set(told["killed"]) <= {"missing", "sound"}
    assert told["statuses"].count(-9) > len(told["statuses"]) // 4, "hardly any kill came before the end"
    assert told["killed"].count("missing") > len(told["killed"]) // 4
    assert condition(folder / "killed" / "mlflow.db") == "sound"
    assert not list((folder / "killed").glob(".*partial*")), "what killed processes left is removed"


def test_the_last_revision_is_read_without_importing_mlflow(told: dict[str, Any]) -> None:
    assert _revisions()[1] == told["head"]


def test_a_kill_while_it_is_built_leaves_none_or_a_whole_one(told: dict[str, Any], folder: Path) -> None:
    check_kills(told, folder)


@pytest.mark.slow  # 20 s of processor time: the same as above, forty times
def test_forty_kills_while_it_is_built(tmp_path: Path) -> None:
    check_kills(run_program(tmp_path, 40), tmp_path)


def test_of_four_processes_that_start_together_one_builds_it(told: dict[str, Any], folder: Path) -> None:
    assert sorted(told["created"]) == [0, 0, 0, 1]
    assert condition(folder / "race" / "mlflow.db") == "sound"


def test_what_mlflow_leaves_when_it_is_killed_is_recognised_and_repaired(told: dict[str, Any], folder: Path) -> None:
    """The negative control of the kills: MLflow's own way of building the schema leaves what no command accepts."""
    assert set(told["half"]) == {"incomplete"}
    for path in (folder / "half").glob("[0-9].db"):
        with pytest.raises(UserError, match=r"incomplete schema.*spikefleet tracking repair"):
            check_database(path)
        runs = path.with_suffix("")
        runs.mkdir()
        path = path.replace(runs / "mlflow.db")
        said = []
        for command in (["doctor"], ["registry", "list"], ["tracking", "repair"], ["tracking", "repair"]):
            answer = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*command, "--runs-dir", str(runs)])
            said.append((answer.exit_code, answer.output.replace("\n", " ")))
        assert [code for code, _ in said] == [1, 2, 0, 0]
        assert "incomplete schema" in said[0][1]
        assert "incomplete schema" in said[1][1]
        assert "is complete now; as it was before: " in said[2][1]
        assert "is sound" in said[3][1]
        assert condition(path) == "sound"


def test_a_repair_keeps_all_runs(told: dict[str, Any], folder: Path) -> None:
    from mlflow import MlflowClient

    assert set(told["rows"]) == {"incomplete"}
    for path in sorted((folder / "half").glob("rows[0-9].db")):
        before = path.read_bytes()
        backup = repair_database(path)
        assert backup is not None
        with closing(sqlite3.connect(backup)) as old:
            assert old.execute("SELECT count(*) FROM runs").fetchone() == (5,)
        assert condition(path) == "sound"
        assert path.read_bytes() != before
    client = MlflowClient(tracking_uri=f"sqlite:///{path}")
    runs = client.search_runs(["7"])
    losses = {run.info.run_id: client.get_metric_history(run.info.run_id, "loss")[0].value for run in runs}
    assert losses == {f"run{n}": n / 4 for n in range(5)}
    assert all(run.data.params == {"lr": "0.1"} for run in runs)


@pytest.mark.parametrize(
    ("content", "found", "said"),
    [
        (b"", "empty", None),
        (b"no database " * 1000, "damaged", "cannot be read as SQLite"),
        ("CREATE TABLE birds (name TEXT)", "foreign", "of another program"),
        ("CREATE TABLE runs (a TEXT); CREATE TABLE alembic_version (version_num TEXT); "
         "INSERT INTO alembic_version VALUES ('of_tomorrow')", "newer", "is of a later MLflow"),
    ],
)  # fmt: skip
def test_other_files_are_named_for_what_they_are(
    content: bytes | str, found: str, said: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "mlflow.db"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with closing(sqlite3.connect(path)) as database:
            database.executescript(content)
    assert condition(path) == found
    before = path.read_bytes()
    for command in (["tracking", "repair"], ["registry", "list"]):
        answer = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*command, "--runs-dir", str(tmp_path)])
        if said is not None:
            assert said in answer.output.replace("\n", " "), (command, answer.output)
            assert answer.exit_code in (1, 2)
    if said is not None:
        assert path.read_bytes() == before
        with pytest.raises(UserError, match=said):
            check_database(path)
        assert not create_database(path)
