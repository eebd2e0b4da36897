"""The public API of the registry, on MLflow's model registry.

A version holds a network package (`package.py`) wrapped as MLflow's "models from code": it loads here and with
`mlflow.pyfunc.load_model("models:/NAME@champion")`, and neither unpickles. `load` runs no stored code; MLflow runs the
Python file of the version, so anyone with write access to the registry can run code in an MLflow loader.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikefleet.config.recipes import parse_model
from spikefleet.data_summary import DATA_SUMMARY, DataSummary
from spikefleet.disks import disk_problem
from spikefleet.errors import UserError
from spikefleet.plugins import loaded_plugins
from spikefleet.registry.aliases import Promotion, keep_as_challenger, promote, refused_alias, rollback, settle
from spikefleet.registry.flaws import FLAW, flaw_tag
from spikefleet.registry.history import Change, History, load_history, read_history
from spikefleet.registry.lookup import find_best
from spikefleet.registry.mlflow_model import save_for_mlflow, serving_files_tag
from spikefleet.registry.mlflow_store import (
    METRIC_PREFIX,
    connect,
    download,
    find_model,
    find_versions,
    publish,
    resolve,
)
from spikefleet.registry.model_card import CARD_SOURCES, description_of, model_card
from spikefleet.registry.package import (
    CARD,
    CODE,
    CONFIG,
    Card,
    check_sections,
    load_network,
    read_card,
    read_config,
    verify_package,
    write_package,
)
from spikefleet.registry.package_access import is_registered, package_files, registry_uri, scratch_directory
from spikefleet.registry.promotion import Mode
from spikefleet.registry.question import Question
from spikefleet.registry.reindexing import Reindexed, reindex
from spikefleet.registry.renewal import renew
from spikefleet.registry.serving_code import serving_code
from spikefleet.registry.version import CONTENT_HASH, RegisteredModel, RegisteredVersion, check_model_name

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient

__all__ = [
    "Change",
    "History",
    "Promotion",
    "RegisteredModel",
    "RegisteredVersion",
    "Reindexed",
    "best",
    "card_text",
    "describe",
    "keep_as_challenger",
    "list_models",
    "load",
    "promote",
    "pull",
    "ranked",
    "read_history",
    "refused_alias",
    "register",
    "reindex",
    "renew",
    "rollback",
    "settle",
    "show",
]


def register(
    name: str,
    *,
    weights: Path,
    config: Mapping[str, Any],
    data: DataSummary,
    tags: Mapping[str, object],
    metrics: Mapping[str, float],
    run_id: str,
    tracking_uri: str,
    extra_files: Mapping[str, Path] | None = None,
) -> RegisteredVersion:
    """Registers a network. The same files from the same run return the existing version.

    Args:
        name: of the registered model.
        weights: safetensors with the complete state dict of the network.
        config: configuration of the run, with `model`, `data` (with `data.transform`) and `task`.
        data: summary of the training data, stored with the version; gives the tags dataset and data_hash.
        tags: recipe, run_name, code_version, seed and others; the tags that follow from the configuration (task,
            timesteps, connection, ...) are added.
        metrics: by split and name, such as "val/top1".
        run_id: MLflow's id of the run.
        tracking_uri: of the registry.
        extra_files: further files by their names in the package, such as "energy.json".

    Returns:
        The new or existing version.

    Raises:
        UserError: an invalid name, metric or file, weights that do not fit the configuration, or a registry error.
    """
    check_model_name(name)
    for metric, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(f"model {name}: metric {metric}={value} must be finite")
    with connect(tracking_uri) as client, scratch_directory() as scratch:
        package = scratch / "package"
        package.mkdir()
        origin = {"dataset": data.dataset, "data_hash": data.content_hash}
        given = {key: str(value) for key, value in {**origin, **tags}.items()}
        data.write(scratch)
        (scratch / CODE).write_bytes(serving_code().archive())
        files = {DATA_SUMMARY: scratch / DATA_SUMMARY, **(extra_files or {}), CODE: scratch / CODE}
        check_sections(config, "the configuration of a registered model")
        given |= flaw_tag(config, data, metrics, files)
        metadata = {"run_id": run_id, "tags": given, "metrics": dict(metrics), "plugins": list(loaded_plugins())}
        card = write_package(package, weights, config, files, metadata)
        network, _ = load_network(package)
        model = parse_model(config["model"], "the configuration of a registered model")
        for version in find_versions(client, name):
            if version.run_id == run_id and version.content_hash == card.content_hash:
                return version
        parameters = sum(parameter.numel() for parameter in network.parameters())
        measured = {f"{METRIC_PREFIX}{metric}": repr(float(value)) for metric, value in metrics.items()}
        derived = {
            key: str(value) for key, value in {**model.tags(), "task": config["task"], "parameters": parameters}.items()
        }
        all_tags = {**derived, **given, **measured, CONTENT_HASH: card.content_hash}
        save_for_mlflow(package, scratch / "model", config, data, card)
        all_tags |= serving_files_tag(scratch / "model")
        text = description_of(name, package, card, given.get(FLAW))
        return publish(client, name, scratch / "model", run_id, all_tags, text, tracking_uri)


def load(uri: str | Path, *, tracking_uri: str | None = None) -> "torch.nn.Module":
    """Loads a registered network. No stored code runs.

    The files are verified against the hash in the registry (a directory: against its card) before they are read.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a pulled directory.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Returns:
        The network in evaluation mode, on the CPU; `network.config` is its configuration.

    Raises:
        UserError: the version does not exist, or its files have changed.
    """
    with package_files(uri, tracking_uri) as (directory, content_hash):
        network, _ = load_network(directory, content_hash)
    return network


def describe(uri: str | Path, *, tracking_uri: str | None = None) -> dict[str, Any]:
    """Tags, metrics, configuration and file hashes of a registered version or of a pulled directory.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a pulled directory.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Raises:
        UserError: the version does not exist, or its files have changed.
    """
    if not is_registered(uri):
        directory = Path(uri)
        card = verify_package(directory)
        return {"uri": str(uri), **card.metadata, "config": read_config(directory), "sha256": dict(card.sha256)}
    with connect(registry_uri(tracking_uri)) as client, scratch_directory() as scratch:
        version = resolve(client, str(uri))
        for name in (CARD, CONFIG):
            download(client, version, name, scratch)
        card = read_card(scratch, version.content_hash)
        return {
            "uri": version.uri,
            "aliases": list(version.aliases),
            "created": version.created.isoformat(),
            "run_id": version.run_id,
            "tags": {key: value for key, value in version.metadata().items() if key in version.tags},
            "metrics": dict(version.metrics),
            "config": read_config(scratch),
            "sha256": dict(card.sha256),
        }


def card_text(uri: str | Path, *, tracking_uri: str | None = None) -> str:
    """The model card of a registered version or of a pulled directory, as Markdown.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a pulled directory.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Raises:
        UserError: the version does not exist, or its files have changed.
    """
    if not is_registered(uri):
        card = verify_package(Path(uri))
        return model_card(Path(uri).name, Path(uri), card, _flaw_of(Path(uri), card))
    with connect(registry_uri(tracking_uri)) as client, scratch_directory() as scratch:
        version = resolve(client, str(uri))
        download(client, version, CARD, scratch)
        listed = read_card(scratch, version.content_hash).sha256
        for name in (CONFIG, DATA_SUMMARY, *CARD_SOURCES):
            if name in listed:
                download(client, version, name, scratch)
        read = read_card(scratch, version.content_hash)
        return model_card(version.uri, scratch, read, version.tags.get(FLAW), _status(client, version))


def _flaw_of(package: Path, card: Card) -> str | None:
    """The flaw of a pulled package, by the rules of its registration."""
    files = {name: package / name for name in card.sha256}
    return flaw_tag(read_config(package), DataSummary.read(package), card.metadata["metrics"], files).get(FLAW)


def _status(client: "MlflowClient", version: RegisteredVersion) -> list[str]:
    """What the registry says of a version, in sentences: its aliases, since when, and why."""
    if not version.aliases:
        return []
    history = load_history(client, version.name)
    said = []
    for alias in version.aliases:
        moves = [change for change in history.changes if change.alias == alias]
        known = bool(moves) and moves[-1].after == version.version
        why = f" since {moves[-1].at} ({moves[-1].action}): {moves[-1].why}" if known else ""
        said.append(f"It is the {alias} of {version.name}{why}")
    return said if history.damage is None else [*said, f"The history of its model is damaged: {history.damage}"]


def pull(uri: str, out: Path, *, tracking_uri: str | None = None) -> Path:
    """Downloads a version's verified files into a new directory, atomically.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        out: the directory; it must be empty or missing.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Returns:
        The directory.

    Raises:
        UserError: the directory is not empty, the version does not exist, or its files have changed.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty directory; use another one")
    if not is_registered(uri):
        raise UserError(f"{uri!r} is not a registered version; expected models:/NAME@champion or models:/NAME/3")
    with package_files(uri, tracking_uri) as (directory, content_hash):
        card = verify_package(directory, content_hash)
        partial = _directory_beside(out)
        try:
            for name in (*card.sha256, CARD):
                _copy(directory / name, partial / name)
            verify_package(partial, content_hash)
            partial.chmod(0o755)
            partial.replace(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def _directory_beside(out: Path) -> Path:
    """A new directory to be renamed to `out`. Raises UserError or, for a problem of the disk, OSError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}-", dir=out.parent))
    except OSError as error:
        if disk_problem(error, out) is not None:
            raise
        raise UserError(f"{out} cannot be created: {error.strerror}; choose another directory") from error


def _copy(source: Path, target: Path) -> None:
    """Copies a file. Raises OSError, which names the target."""
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error


def list_models(*, tracking_uri: str | None = None) -> list[RegisteredModel]:
    """All models that spikefleet has registered, in the order of their names."""
    with connect(registry_uri(tracking_uri)) as client:
        versions = find_versions(client)
        names = sorted({version.name for version in versions})
        return [RegisteredModel(name, tuple(v for v in versions if v.name == name)) for name in names]


def show(name: str, *, tracking_uri: str | None = None) -> RegisteredModel:
    """A model and its versions. Raises UserError, with the nearest names, for an unknown name."""
    with connect(registry_uri(tracking_uri)) as client:
        return find_model(client, name)


def best(
    task: str,
    metric: str,
    dataset: str | None = None,
    where: str | None = None,
    mode: Mode = "max",
    *,
    any_proof: bool = False,
    tracking_uri: str | None = None,
) -> RegisteredVersion:
    """The version with the best metric: the first of `ranked`, whose arguments these are.

    Raises:
        UserError: `where` is not a condition or names an unknown key, or no version matches.
    """
    return ranked(task, metric, dataset, where, mode, top=1, any_proof=any_proof, tracking_uri=tracking_uri)[0]


def ranked(
    task: str,
    metric: str,
    dataset: str | None = None,
    where: str | None = None,
    mode: Mode = "max",
    *,
    top: int,
    any_proof: bool = False,
    tracking_uri: str | None = None,
    announce: Callable[[str], None] | None = None,
) -> list[RegisteredVersion]:
    """The versions with the best metric, the best first; of equal ones a champion, else the oldest.

    A renewed copy of a champion is one. Versions with a flaw (`flaws`) are left out.

    Args:
        task: only versions of this task.
        metric: full name, or the name of a validation metric without its split.
        dataset: only versions trained on this data set.
        where: only versions that satisfy this condition on tags and metrics; see `query.parse_where`.
        mode: `max` or `min`.
        top: how many versions, at most.
        any_proof: also versions whose spike-driven form is not proved; else only those that are proved, and networks
            without spikes.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.
        announce: called with the reason, in one line, where the index cannot answer and all versions are read.

    Raises:
        UserError: `where` is not a condition or names an unknown key, no version matches, or `top` is below 1.
    """
    question = Question(task, metric, dataset, where, mode, top, any_proof)
    with connect(registry_uri(tracking_uri)) as client:
        return find_best(client, question, announce)
