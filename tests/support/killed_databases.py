"""Databases of MLflow whose builders are killed; a program that imports MLflow once, and forks what is killed.

Arguments: an empty directory, the number of kills, a seed. It prints what it found as JSON.
"""

import json
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy
from alembic import command
from mlflow.store.db.utils import _get_alembic_config, _get_latest_schema_revision, _initialize_tables, _upgrade_db
from mlflow.store.tracking.dbmodels.initial_models import Base

from spikefleet.tracking.database import condition, create_database


def forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            os._exit(int(bool(work())))
        finally:
            os._exit(99)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def engine(path: Path, die_at: int | None = None) -> sqlalchemy.Engine:
    """An engine whose process is killed at a statement."""
    made, count = sqlalchemy.create_engine(f"sqlite:///{path}", poolclass=sqlalchemy.pool.NullPool), [0]
    sqlalchemy.event.listen(made, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))

    def maybe(*_: Any) -> None:
        count[0] += 1
        if count[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sqlalchemy.event.listen(made, "before_cursor_execute", maybe)
    return made


def kills(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Builds one whole, then kills builders at random moments."""
    draw, began = random.Random(seed), time.monotonic()
    assert ended(forked(lambda: create_database(folder / "whole" / "mlflow.db"))) == 1
    seconds = time.monotonic() - began
    path = folder / "killed" / "mlflow.db"
    conditions, statuses = [], []
    for _ in range(count):
        child = forked(lambda: create_database(path))
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        statuses.append(ended(child))
        conditions.append(condition(path))
        if conditions[-1] == "sound":
            path.unlink()
    create_database(path)
    return {"killed": conditions, "statuses": statuses}


def race(folder: Path) -> dict[str, Any]:
    """Four processes build the same one."""
    path = folder / "race" / "mlflow.db"
    return {"created": [ended(child) for child in [forked(lambda: create_database(path)) for _ in range(4)]]}


def half_built(folder: Path) -> dict[str, Any]:
    """What MLflow itself leaves: killed while it builds the schema, and in an upgrade of one with rows."""
    folder = folder / "half"
    folder.mkdir()
    half, rows = [], []
    for n, die_at in enumerate((12, 400)):
        path = folder / f"{n}.db"
        ended(forked(partial(_initialize_tables, engine(path, die_at))))
        half.append(condition(path))
    earlier = folder / "rows.db"
    made = engine(earlier)
    Base.metadata.create_all(made)
    config = _get_alembic_config(str(made.url))
    with made.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "728d730b5ebd")  # of the year 2019
    fill(earlier)
    for n, die_at in enumerate((20, 200)):
        path = folder / f"rows{n}.db"
        path.write_bytes(earlier.read_bytes())
        ended(forked(partial(_upgrade_db, engine(path, die_at))))
        rows.append(condition(path))
    return {"half": half, "rows": rows}


def fill(path: Path) -> None:
    """Five runs of an experiment."""
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO experiments VALUES (7, 'digits', 'file:///old/artifacts', 'active')")
        for n in range(5):
            database.execute(
                "INSERT INTO runs (run_uuid, name, user_id, experiment_id, status, start_time, lifecycle_stage, "
                "artifact_uri) VALUES (?, ?, 'me', 7, 'FINISHED', 1, 'active', ?)",
                (f"run{n}", f"r{n}", f"file:///old/artifacts/run{n}"),
            )
            database.execute(
                "INSERT INTO metrics (key, value, timestamp, step, run_uuid, is_nan) VALUES ('loss', ?, 1, 1, ?, 0)",
                (n / 4, f"run{n}"),
            )
            database.execute("INSERT INTO params VALUES ('lr', '0.1', ?)", (f"run{n}",))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    found = {**kills(place, int(sys.argv[2]), int(sys.argv[3])), **race(place), **half_built(place)}
    json.dump({**found, "head": _get_latest_schema_revision()}, sys.stdout)
