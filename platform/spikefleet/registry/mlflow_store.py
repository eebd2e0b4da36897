"""Calls to MLflow's model registry: connect, search, download, publish."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikefleet.config.messages import did_you_mean
from spikefleet.disks import disk_problem
from spikefleet.errors import UserError
from spikefleet.registry.lookup_index import INDEXED, entry_of, mark, mark_experiment, write_numbers
from spikefleet.registry.version import CONTENT_HASH, RegisteredModel, RegisteredVersion, check_model_name
from spikefleet.tracking.database import database_path
from spikefleet.tracking.mlflow_client import EXTRA, check_tracking_uri, public_uri, quiet_mlflow
from spikefleet.tracking.relocation import ready_database
from spikefleet.tracking.server_problems import server_problem
from spikefleet_tune.messages import one_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRIC_PREFIX = "metric."
"""Prefix of the version tags that hold metrics."""

MODEL_TYPE = "spikefleet"
"""Of the LoggedModels that `publish` creates."""

_RUNS_ASKED = 100  # in one request, whose length is limited
_MODELS_ASKED = 8  # one by one; more are read with all others, 1,000 a page
_ARTIFACTS = "artifacts"  # where MLflow keeps a pyfunc model's files
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[A-Za-z0-9_-]{1,100})|/(?P<version>[0-9]{1,9}))")


@contextmanager
def connect(tracking_uri: str) -> "Iterator[MlflowClient]":
    """Yields a client of the registry.

    Raises:
        UserError: the registry does not exist, or MLflow fails inside the block.
    """
    quiet_mlflow()
    check_tracking_uri(tracking_uri)
    database = database_path(tracking_uri)
    if database is not None and not database.is_file():
        raise UserError(f"no registry exists at {tracking_uri}; train a run first, which registers its best network")
    ready_database(tracking_uri, create=False)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        yield MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    except ModuleNotFoundError as error:  # the driver of a database
        if tracking_uri.startswith(("http", "sqlite")):
            raise
        raise UserError(
            f"MLFLOW_TRACKING_URI={public_uri(tracking_uri)!r} needs the Python package {error.name!r}, which is not "
            f"installed; install it, or {EXTRA}, which has what PostgreSQL and S3 need"
        ) from error
    except (MlflowException, OSError) as error:  # an artifact store raises errors of requests, which are OSErrors
        if isinstance(error, OSError) and (error.filename is not None or disk_problem(error) is not None):
            raise  # of a file of ours, which the command line names
        if (sentence := server_problem(error, tracking_uri)) is not None:
            raise UserError(sentence) from error
        reason = str(error).splitlines()[0][:300]
        shown = public_uri(tracking_uri)
        raise UserError(f"the registry at {shown} failed: {reason.replace(tracking_uri, shown)}") from error


def set_alias(client: "MlflowClient", name: str, alias: str, version: int) -> None:
    """Points an alias at a version. Raises MlflowException.

    MLflow inserts a row if the alias does not exist: of two concurrent jobs one fails, and its second attempt updates
    the row of the other.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_alias(name, alias, str(version))
    except MlflowException:
        client.set_registered_model_alias(name, alias, str(version))


def download(
    client: "MlflowClient", version: RegisteredVersion, name: str, directory: Path, of: str = _ARTIFACTS
) -> None:
    """Downloads one file of a version's package, or all if `name` is empty, into a directory. Raises UserError.

    Args:
        client: of the registry.
        version: the version.
        name: of the file.
        directory: where to.
        of: folder of MLflow's model directory: the package's, or "" for the loader and the requirements.
    """
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    # Not by its models:/ URI, which MLflow resolves in its global registry instead of the client's.
    place = client.get_model_version_download_uri(version.name, str(version.version))
    source = "/".join(filter(None, (place.rstrip("/"), of, name)))
    try:
        found = Path(
            mlflow.artifacts.download_artifacts(source, dst_path=str(directory), tracking_uri=client.tracking_uri)
        )
    except (OSError, MlflowException) as error:
        if full := disk_problem(error, directory):
            raise UserError(f"the files of {version.uri} cannot be downloaded: {full}, by TMPDIR") from error
        if isinstance(error, MlflowException):
            raise
        raise UserError(f"the files of {version.uri} cannot be downloaded: {error}") from error
    if not found.is_dir():
        found.replace(directory / found.name)
    elif found != directory:
        inside = found.replace(directory / ".downloaded")  # it may hold a directory of its own name
        for file in inside.iterdir():
            file.replace(directory / file.name)
        inside.rmdir()


def resolve(client: "MlflowClient", uri: str) -> RegisteredVersion:
    """The version of `models:/NAME@ALIAS` or `models:/NAME/VERSION`. Raises UserError if there is none."""
    parts = _URI.fullmatch(uri)
    if parts is None:
        raise UserError(f"{uri[:200]!r} is not a registered version; expected models:/NAME@champion or models:/NAME/3")
    model = find_model(client, parts["name"])
    return model.pick(int(parts["version"])) if parts["version"] else model.pick_alias(parts["alias"])


def find_model(client: "MlflowClient", name: str) -> RegisteredModel:
    """A model and its versions. Raises UserError, with the nearest names, for an unknown name."""
    versions = find_versions(client, check_model_name(name))
    if not versions:
        known = sorted({version.name for version in find_versions(client)})
        hint = did_you_mean(name, known, one_of(known[:10]), most=3)
        raise UserError(f"registered model {name!r} does not exist; {hint}")
    return RegisteredModel(name, tuple(versions))


def find_versions(
    client: "MlflowClient", name: str | None = None, tags: Mapping[str, str] | None = None
) -> list[RegisteredVersion]:
    """The versions that spikefleet registered, by name and newest first.

    Args:
        client: of the registry.
        name: only versions of this model.
        tags: only versions with these tags; keys and values must be plain words (`query.plain_word`).
    """
    conditions = [f"name = '{name}'"] if name else []
    conditions += [f"tags.`{key}` = '{value}'" for key, value in (tags or {}).items()]
    read = _search(client, " AND ".join(conditions))
    aliases = aliases_of(client, {version.name for version in read}) if read else {}
    read = [replace(version, aliases=aliases.get((version.name, version.version), ())) for version in read]
    return sorted(read, key=lambda version: (version.name, -version.version))


def versions_of_runs(client: "MlflowClient", runs: Sequence[str]) -> list[RegisteredVersion]:
    """The versions that spikefleet registered of runs, without their aliases."""
    found: list[RegisteredVersion] = []
    for start in range(0, len(runs), _RUNS_ASKED):
        listed = ", ".join(f"'{run}'" for run in runs[start : start + _RUNS_ASKED])
        found += _search(client, f"run_id IN ({listed})")
    return found


def aliases_of(client: "MlflowClient", names: Collection[str]) -> dict[tuple[str, int], tuple[str, ...]]:
    """The aliases of the versions of some models, perhaps of others too, by name and number.

    MLflow's search for versions leaves them out.
    """
    # Not by get_registered_model, which reads all versions of a model.
    few = len(names) <= _MODELS_ASKED and not any("'" in name for name in names)
    conditions = [f"name = '{name}'" for name in sorted(names)] if few else [None]
    models: list[Any] = []
    for condition in conditions:
        token = None
        while True:
            page = client.search_registered_models(condition, max_results=1000, page_token=token)
            models += page
            if not (token := page.token):
                break
    found: dict[tuple[str, int], tuple[str, ...]] = {}
    for model in models:
        for alias, number in sorted(model.aliases.items()):  # SQLite returns numbers, a server returns strings
            found[model.name, int(number)] = (*found.get((model.name, int(number)), ()), alias)
    return found


def _search(client: "MlflowClient", condition: str) -> list[RegisteredVersion]:
    """The versions that spikefleet registered and for which a condition of MLflow's search holds, without aliases."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_model_versions(condition or None, page_token=token)
        found += page
        if not (token := page.token):
            break
    return [_read_version(version) for version in found if CONTENT_HASH in version.tags]


def _read_version(version: Any) -> RegisteredVersion:
    tags, metrics = _without_metrics(version.tags)
    created = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
    return RegisteredVersion(version.name, int(version.version), version.run_id, created, tags, metrics)


def _without_metrics(stored: Mapping[str, str]) -> tuple[dict[str, str], dict[str, float]]:
    """Tags and metrics of a version from its tags in MLflow."""
    tags, metrics = {}, {}
    for key, value in stored.items():
        if not key.startswith(METRIC_PREFIX):
            tags[key] = value
            continue
        with suppress(ValueError):  # a tag edited by hand
            metrics[key.removeprefix(METRIC_PREFIX)] = float(value)
    return tags, metrics


def publish(
    client: "MlflowClient",
    name: str,
    model: Path,
    run_id: str,
    tags: Mapping[str, str],
    description: str,
    tracking_uri: str,
) -> RegisteredVersion:
    """Uploads a model directory, then creates the version with all its tags, so that a crash leaves no version.

    Args:
        client: of the registry.
        name: of the registered model.
        model: the model directory.
        run_id: MLflow's id of the run.
        tags: of the version.
        description: of the version, on MLflow's page.
        tracking_uri: of the registry.

    Raises:
        MlflowException: the registry fails.
    """
    from mlflow.exceptions import MlflowException

    tags = {key: value for key, value in tags.items() if key != INDEXED}  # a renewed version's
    tags["size_mb"] = f"{_size_mb(model):.3g}"
    plain_tags, metrics = _without_metrics(tags)
    entry = entry_of(RegisteredVersion(name, 0, run_id, datetime.now(UTC), plain_tags, metrics))
    experiment = client.get_run(run_id).info.experiment_id
    plain = name.replace(".", "-")  # MLflow allows fewer characters here than in the registry
    words = {} if entry is None else dict(entry.words)
    logged = client.create_logged_model(experiment, name=plain, source_run_id=run_id, model_type=MODEL_TYPE, tags=words)
    client.log_model_artifacts(logged.model_id, str(model))
    client.finalize_logged_model(logged.model_id, "READY")
    if entry is not None:
        mark_experiment(client, experiment)
        write_numbers(client, logged.model_id, run_id, entry.numbers)
    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Without a server, MLflow resolves models:/m-... at its global tracking URI instead of the client's.
    source = f"models:/{logged.model_id}" if tracking_uri.startswith("http") else logged.artifact_location
    version = _read_version(
        client.create_model_version(
            name, source, run_id=run_id, tags=dict(tags), description=description, model_id=logged.model_id
        )
    )
    if entry is not None:  # last: a version that has no such tag is looked for without the index
        value = mark(client, version, logged.model_id)
        version = replace(version, tags={**version.tags, INDEXED: value})
    return version


def _size_mb(model: Path) -> float:
    """Size of the files of a model directory, in MB (10^6 bytes)."""
    return sum(file.stat().st_size for file in model.rglob("*") if file.is_file()) / 1e6
