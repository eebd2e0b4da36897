"""Files that no version names: uploads of registrations that were killed, and what deleted versions left behind.

A registration uploads a logged model, then creates the version that names it (`mlflow_store.publish`). Killed between
the two, it leaves a logged model that nothing refers to; the next attempt uploads another one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from spikefleet.registry.lookup_index import MODEL_ID
from spikefleet.registry.mlflow_store import MODEL_TYPE, connect
from spikefleet.registry.package_access import registry_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

LEAST_AGE_S = 24 * 3600.0
"""A registration that still runs is younger."""

_PAGE = 1000


@dataclass(frozen=True)
class Leftover:
    """A logged model that no version names."""

    model_id: str
    name: str
    run_id: str | None
    created: datetime
    files: int
    size: int
    """Of its files in bytes."""
    location: str


@dataclass(frozen=True)
class Leftovers:
    """What was found, and what is kept although no version names it."""

    found: tuple[Leftover, ...]
    kept: tuple[str, ...]
    """A sentence for each logged model without a version that stays, and why."""

    @property
    def size(self) -> int:
        """Of all files in bytes."""
        return sum(one.size for one in self.found)


def find_leftovers(*, least_age_s: float = LEAST_AGE_S, tracking_uri: str | None = None) -> Leftovers:
    """Looks for logged models of ours that are ready, older than a day, and named by no version.

    Those of runs that are still running stay, for a resumed registration or retraining may be about to name them.

    Args:
        least_age_s: younger ones stay.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Raises:
        UserError: the registry fails.
    """
    with connect(registry_uri(tracking_uri)) as client:
        return _find(client, least_age_s)


def remove_leftovers(leftovers: Iterable[Leftover], *, tracking_uri: str | None = None) -> Iterator[Leftover]:
    """Removes logged models and their files, one after another; one that a version names by now stays.

    The files go first: killed in between, the next call finds the logged model again.

    Args:
        leftovers: as they were found.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Yields:
        Each one when it is gone.

    Raises:
        UserError: the registry fails.
    """
    uri = registry_uri(tracking_uri)
    with connect(uri) as client:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        for one in leftovers:
            if any(_all(client.search_model_versions, filter_string=f"source_path LIKE '%{one.model_id}%'")):
                continue
            get_artifact_repository(one.location, tracking_uri=uri, registry_uri=uri).delete_artifacts()
            client.delete_logged_model(one.model_id)
            yield one


def _find(client: MlflowClient, least_age_s: float) -> Leftovers:
    models = list(_logged_models(client))  # before the versions: what is published in between has its version then
    named, now = _named(client), time.time()
    found, kept = [], []
    for model in models:
        if model.model_id in named:
            continue
        created = datetime.fromtimestamp(model.creation_timestamp / 1000, UTC)
        if reason := _why_kept(client, model, now - created.timestamp(), least_age_s):
            kept.append(f"{model.model_id} ({model.name}, {created:%Y-%m-%d %H:%M} UTC) stays: {reason}")
            continue
        sizes = list(_sizes(client, model.model_id))
        found.append(
            Leftover(
                model.model_id,
                model.name,
                model.source_run_id,
                created,
                len(sizes),
                sum(sizes),
                model.artifact_location,
            )
        )
    return Leftovers(tuple(sorted(found, key=lambda one: one.created)), tuple(kept))


def _why_kept(client: MlflowClient, model: LoggedModel, age_s: float, least_age_s: float) -> str | None:
    from mlflow.exceptions import MlflowException

    if str(model.status) != "READY":
        return f"its upload did not finish (status {model.status})"
    if age_s < least_age_s:
        return f"it is younger than {least_age_s / 3600:g} hours, and its registration may still run"
    if model.model_id not in model.artifact_location:
        return f"its files are at {model.artifact_location[:200]}, which is not a directory of its own"
    try:
        status = client.get_run(model.source_run_id).info.status if model.source_run_id else "FINISHED"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return f"its run {model.source_run_id} is running" if status == "RUNNING" else None


def _logged_models(client: MlflowClient) -> Iterator[LoggedModel]:
    """Those that spikefleet created, of all experiments."""
    from mlflow.entities import ViewType

    experiments = [one.experiment_id for one in _all(client.search_experiments, view_type=ViewType.ALL)]
    if experiments:
        given = {"experiment_ids": experiments, "filter_string": f"model_type = '{MODEL_TYPE}'"}
        yield from _all(client.search_logged_models, **given)


def _named(client: MlflowClient) -> set[str]:
    """Ids of the logged models that a version names, of any model in the registry, also of other programs."""
    named: set[str] = set()
    for version in _all(client.search_model_versions):
        named.update(MODEL_ID.findall(f"{version.model_id or ''} {version.source or ''}"))
    return named


def _all(search: Any, **given: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(**given, max_results=_PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _sizes(client: MlflowClient, model_id: str, path: str | None = None) -> Iterator[int]:
    for entry in client.list_logged_model_artifacts(model_id, path):
        if entry.is_dir:
            yield from _sizes(client, model_id, entry.path)
        else:
            yield entry.file_size or 0
