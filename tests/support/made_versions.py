"""Registries of many versions, made by direct calls to MLflow: with tags, metrics and index, and without files."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import Engine

from spikefleet.registry.lookup_index import INDEXED, VERSION, entry_of, mark_experiment, write_numbers
from spikefleet.registry.mlflow_store import METRIC_PREFIX, find_versions
from spikefleet.registry.version import CONTENT_HASH, RegisteredVersion
from spikefleet.tracking.database import database_path
from spikefleet.tracking.relocation import ready_database

TABLES = (
    *("runs", "logged_models", "logged_model_metrics", "logged_model_tags"),
    *("model_versions", "model_version_tags"),
)
START = 4_000_000_000_000
"""Milliseconds: copies are younger than what is made by MLflow."""

USUAL = {"task": "classification", "dataset": "digits", "spike_driven": "proved", "parameters": "308074"}


class ManyVersions:
    """A registry that is filled through MLflow's client; each version has a run of its own."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        if (path := database_path(uri)) is not None and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            ready_database(uri, create=True)
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        found = self.client.get_experiment_by_name("many")
        self._experiment = self.client.create_experiment("many") if found is None else found.experiment_id
        mark_experiment(self.client, self._experiment)
        self._names = {version.name for version in find_versions(self.client)}
        self.made = len(find_versions(self.client))

    def add(
        self, name: str, tags: Mapping[str, str], metrics: Mapping[str, float], *, indexed: bool = True
    ) -> tuple[str, int]:
        """Registers a version with `tags` beside the usual ones; not indexed, as an earlier release did."""
        given = {**USUAL, **tags, CONTENT_HASH: f"{self.made:064x}"}
        run = self.client.create_run(self._experiment).info.run_id
        entry = entry_of(RegisteredVersion(name, 0, run, datetime.now(UTC), given, metrics)) if indexed else None
        words = {} if entry is None else dict(entry.words)
        logged = self.client.create_logged_model(self._experiment, "many", run, tags=words)
        if entry is not None:
            write_numbers(self.client, logged.model_id, run, entry.numbers)
        if name not in self._names:
            self._create(name)
        self.made += 1
        stored = {**given, **{f"{METRIC_PREFIX}{key}": repr(value) for key, value in metrics.items()}}
        if entry is not None:
            stored[INDEXED] = str(self.made)
        source = f"{logged.artifact_location}"
        version = self.client.create_model_version(name, source, run, tags=stored)
        if entry is not None:
            self.client.set_logged_model_tags(logged.model_id, {VERSION: f"{name}/{version.version}"})
        return name, int(version.version)

    def multiply(self, count: int, seed: int = 0) -> None:
        """Copies the rows of the versions until there are `count`: with other numbers, in the same models.

        To make each by MLflow takes a tenth of a second.
        """
        number, engine = random.Random(seed), sqlalchemy.create_engine(self.uri)
        schema = sqlalchemy.MetaData()
        schema.reflect(engine, only=TABLES)
        with engine.begin() as connection:
            rows = {
                name: [dict(row._mapping) for row in connection.execute(schema.tables[name].select())]
                for name in TABLES
            }
            templates = sorted({(row["name"], row["version"]) for row in rows["model_versions"]})
            last = {name: max(version for other, version in templates if other == name) for name, _ in templates}
            copies: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
            for i in range(count - len(templates)):
                name, version = templates[i % len(templates)]
                last[name] += 1
                _copy(rows, copies, (name, version), last[name], number, self.made + 1)
                self.made += 1
            for table in TABLES:
                connection.execute(schema.tables[table].insert(), copies[table])
        engine.dispose()

    def edit(self, place: tuple[str, int], key: str, value: str | None) -> None:
        """Sets or deletes a tag of a version, as somebody does on MLflow's page."""
        if value is None:
            self.client.delete_model_version_tag(place[0], str(place[1]), key)
        else:
            self.client.set_model_version_tag(place[0], str(place[1]), key, value)

    def _create(self, name: str) -> None:
        self._names.add(name)
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _copy(
    rows: Mapping[str, list[dict[str, Any]]],
    copies: Mapping[str, list[dict[str, Any]]],
    template: tuple[str, int],
    version: int,
    number: random.Random,
    made: int,
) -> None:
    """Adds the rows of one more version of a template's model, with other metrics."""

    def of(table: str, column: str, value: object) -> list[dict[str, Any]]:
        return [row for row in rows[table] if row[column] == value]

    (origin,) = (row for row in of("model_versions", "name", template[0]) if row["version"] == template[1])
    (logged,) = of("logged_models", "source_run_id", origin["run_id"])
    run_id, model_id = f"{made:032x}", f"m-{made:032x}"
    metrics: dict[str, float] = {}
    copies["runs"].append({**of("runs", "run_uuid", origin["run_id"])[0], "run_uuid": run_id, "name": run_id})
    copies["logged_models"].append({**logged, "model_id": model_id, "source_run_id": run_id})
    for row in of("logged_model_metrics", "model_id", logged["model_id"]):
        name, value = row["metric_name"], row["metric_value"]
        if "/" in name or name == "energy_mj":
            value = metrics[name] = number.random() * (1 if "/" in name else 80)
        copies["logged_model_metrics"].append({**row, "model_id": model_id, "run_id": run_id, "metric_value": value})
    for row in of("logged_model_tags", "model_id", logged["model_id"]):
        value = f"{template[0]}/{version}" if row["tag_key"] == VERSION else row["tag_value"]
        copies["logged_model_tags"].append({**row, "model_id": model_id, "tag_value": value})
    times = {"creation_time": START + made, "last_updated_time": START + made}
    copies["model_versions"].append({**origin, **times, "version": version, "run_id": run_id})
    for row in of("model_version_tags", "name", template[0]):
        if row["version"] == template[1]:
            metric = metrics.get(row["key"].removeprefix(METRIC_PREFIX))
            value = str(made) if row["key"] == INDEXED else row["value"] if metric is None else repr(metric)
            copies["model_version_tags"].append({**row, "version": version, "value": value})


def database_in(directory: Path) -> str:
    """The URI of a SQLite registry in a directory."""
    return f"sqlite:///{directory}/mlflow.db"


@contextmanager
def without_fsync() -> Iterator[None]:
    """SQLite does not wait for the disk, which takes most of the time of making versions."""

    def relax(connection: Any, _: object) -> None:
        if "sqlite" in type(connection).__module__:
            connection.execute("PRAGMA synchronous=OFF")

    sqlalchemy.event.listen(Engine, "connect", relax)
    try:
        yield
    finally:
        sqlalchemy.event.remove(Engine, "connect", relax)


@contextmanager
def counted_statements() -> Iterator[list[str]]:
    """Yields a list that grows by each SQL statement that this process sends."""
    sent: list[str] = []

    def note(_: object, __: object, statement: str, *___: object) -> None:
        if not statement.startswith(("PRAGMA", "SELECT alembic_version")):
            sent.append(statement)

    sqlalchemy.event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        sqlalchemy.event.remove(Engine, "before_cursor_execute", note)
