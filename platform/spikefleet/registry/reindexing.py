"""Indexes the versions that are not indexed: those of an earlier spikefleet, of a killed job, and edited ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spikefleet.registry.index_search import numbers_of
from spikefleet.registry.lookup_index import (
    INDEXED,
    VERSION,
    Entry,
    entry_of,
    mark,
    mark_experiment,
    model_id_of,
    write_numbers,
)
from spikefleet.registry.mlflow_store import connect, find_versions
from spikefleet.registry.package_access import registry_uri
from spikefleet.registry.query import plain_word
from spikefleet.registry.version import RegisteredVersion

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


@dataclass(frozen=True)
class Reindexed:
    """What became of the versions of a registry."""

    versions: int
    """How many there are."""
    indexed: int
    """How many were indexed now; the others were before."""
    failed: tuple[tuple[str, str], ...]
    """URI, and why it cannot be indexed."""


def reindex(*, tracking_uri: str | None = None, progress: Callable[[int, int], None] | None = None) -> Reindexed:
    """Indexes the versions that are not indexed, or whose tags were edited since. A second call finds nothing to do.

    Args:
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.
        progress: called with (versions done, versions in all), after each.

    Returns:
        How many were indexed.

    Raises:
        UserError: the registry does not exist or fails.
    """
    from mlflow.exceptions import MlflowException

    indexed, failed = 0, []
    with connect(registry_uri(tracking_uri)) as client:
        versions = find_versions(client)
        for number, version in enumerate(versions, start=1):
            try:
                indexed += _index(client, version, len(versions))
            except MlflowException as error:  # of a deleted run or experiment; the next version may have none such
                if error.get_http_status_code() >= 500:
                    raise
                failed.append((version.uri, str(error).splitlines()[0][:200]))
            except _CannotBeIndexedError as reason:
                failed.append((version.uri, str(reason)))
            if progress is not None:
                progress(number, len(versions))
    return Reindexed(len(versions), indexed, tuple(failed))


class _CannotBeIndexedError(Exception):
    """The message says why."""


def _index(client: MlflowClient, version: RegisteredVersion, versions: int) -> bool:
    """Indexes one of some versions; returns False where nothing was to be done. Raises _CannotBeIndexedError."""
    entry = entry_of(version)
    if entry is None:
        raise _CannotBeIndexedError("a tag and a metric of one name are different numbers")
    run = client.get_run(version.run_id).info
    model = _own_model(client, version) or _found_model(client, version, run.experiment_id)
    mark_experiment(client, run.experiment_id)
    if model is not None and INDEXED in version.tags and _says(model, version, entry):
        return False
    if model is None:
        model = client.create_logged_model(
            run.experiment_id, name="index", source_run_id=version.run_id, model_type="spikefleet-index"
        )
        client.finalize_logged_model(model.model_id, "READY")
    known = numbers_of(model)
    client.set_logged_model_tags(model.model_id, dict(entry.words))
    changed = {name: value for name, value in entry.numbers.items() if known.get(name) != value}
    write_numbers(client, model.model_id, version.run_id, changed)
    mark(client, version, model.model_id, versions)
    return True


def _own_model(client: MlflowClient, version: RegisteredVersion) -> LoggedModel | None:
    """The LoggedModel that holds the files of a version; None if it has none, or that of another version."""
    from mlflow.exceptions import MlflowException

    model_id = model_id_of(client.get_model_version(version.name, str(version.version)).source or "")
    try:
        model = None if model_id is None else client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return model if model is not None and model.tags.get(VERSION, own := _place(version)) == own else None


def _found_model(client: MlflowClient, version: RegisteredVersion, experiment_id: str) -> LoggedModel | None:
    """The LoggedModel that was made for the index alone, for a version without one."""
    if not plain_word(_place(version)):
        raise _CannotBeIndexedError("its name has characters that no search takes")
    found = client.search_logged_models([experiment_id], f"tags.`{VERSION}` = '{_place(version)}'", max_results=1)
    return found[0] if found else None


def _place(version: RegisteredVersion) -> str:
    return f"{version.name}/{version.version}"


def _says(model: LoggedModel, version: RegisteredVersion, entry: Entry) -> bool:
    """Whether the index says of a version what it must."""
    return (
        model.tags.get(VERSION) == _place(version)
        and entry.words.items() <= model.tags.items()
        and entry.numbers.items() <= numbers_of(model).items()
    )
