"""Where MLflow shows a page: an artifact of the run, and a tag and a link on the registered version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from spikefleet.registry.mlflow_store import connect, resolve
from spikefleet.registry.version import RegisteredVersion
from spikefleet.registry.version_page import INSPECTION, describe_version
from spikefleet.runs.run_dir import Run
from spikefleet.tracking.tracker import attach, sync

if TYPE_CHECKING:
    from mlflow import MlflowClient

_RUN_FOLDER: Final = "report"
_VERSION_FOLDER: Final = "inspection"


def link_run(run: Run, page: Path, tracking_uri: str) -> str:
    """Logs the page of a run as an artifact of it; the version that it was registered as gets the tag.

    Args:
        run: that has ended.
        page: the page.
        tracking_uri: of the server or database.

    Returns:
        Where it is, in words.

    Raises:
        UserError: a process tracks the run, or the server does not answer; `spikefleet tracking sync` delivers it then.
    """
    attach(run.path, page, _RUN_FOLDER)
    sync(run.path, tracking_uri)
    place, registered = f"{_RUN_FOLDER}/{page.name}", run.record().get("registered")
    if registered is None:
        return f"artifact {place} of run {run.name}"
    with connect(tracking_uri) as client:
        version = resolve(client, f"models:/{registered}")
        _tag(client, version, f"runs:/{version.run_id}/{place}")
    return f"artifact {place} of run {run.name}, tag {INSPECTION} of {version.uri}"


def link_version(uri: str, page: Path, tracking_uri: str) -> str:
    """Logs the page of a version as an artifact of its run, and sets the tag of the version.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        page: the page.
        tracking_uri: of the registry.

    Returns:
        Where it is, in words.

    Raises:
        UserError: the version does not exist, or the registry fails.
    """
    with connect(tracking_uri) as client:
        version = resolve(client, uri)
        folder = f"{_VERSION_FOLDER}/{version.name}-{version.version}"
        client.log_artifact(version.run_id, str(page), folder)
        _tag(client, version, f"runs:/{version.run_id}/{folder}/{page.name}")
    return f"artifact {folder}/{page.name} of its run, tag {INSPECTION} of {version.uri}"


def _tag(client: MlflowClient, version: RegisteredVersion, place: str) -> None:
    """Sets the tag, and with it the link in the version's description."""
    client.set_model_version_tag(version.name, str(version.version), INSPECTION, place)
    describe_version(client, version.name, version.version)
