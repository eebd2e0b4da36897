"""The one place that talks to MLflow's model registry.

A version holds a network package (`package.py`) wrapped as MLflow's "models from code", so it loads here and by
`mlflow.pyfunc.load_model("models:/NAME@champion")`, and neither unpickles. Loading here runs no stored code at all;
MLflow runs the Python file that is stored with the version: who may write to the registry may run code in its loader.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikefleet.certificates.verdict import REFUTED
from spikefleet.config.recipes import parse_model
from spikefleet.data_summary import DATA_SUMMARY, DataSummary
from spikefleet.errors import UserError
from spikefleet.plugins import loaded_plugins
from spikefleet.registry.mlflow_store import (
    METRIC_PREFIX,
    connect,
    download,
    find_model,
    find_versions,
    publish,
    resolve,
    save_for_mlflow,
    set_alias,
)
from spikefleet.registry.package import (
    CARD,
    CONFIG,
    load_network,
    read_card,
    read_config,
    verify_package,
    write_package,
)
from spikefleet.registry.promotion import Alias, Candidate, Mode, decide, winner_of
from spikefleet.registry.query import parse_where
from spikefleet.registry.version import (
    CHALLENGER,
    CHAMPION,
    CONTENT_HASH,
    SPIKE_DRIVEN,
    RegisteredModel,
    RegisteredVersion,
    check_model_name,
)
from spikefleet.tracking.mlflow_client import resolve_tracking_uri

if TYPE_CHECKING:
    import torch

__all__ = [
    "Promotion",
    "RegisteredModel",
    "RegisteredVersion",
    "best",
    "describe",
    "list_models",
    "load",
    "promote",
    "pull",
    "register",
    "renew",
    "show",
]

_PROMOTION = "spikefleet.promotion"  # tag of a version that asks, or has asked, to become champion


@dataclass(frozen=True)
class Promotion:
    """What became of a version that asked for the alias `champion`."""

    name: str
    version: int
    alias: Alias
    reason: str
    champion: int | None
    """The version that is the champion now."""


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
    """Registers a network; the same files from the same run give the version that is there already.

    Args:
        weights: safetensors with the network's whole state.
        config: the run's configuration, with the sections model, data (with data.transform) and task.
        data: what the network was trained on; becomes the tags dataset and data_hash, and goes with the version.
        tags: what the network was trained by: recipe, run_name, code_version, seed, ...; what follows from the
            configuration (task, timesteps, connection, ...) is added.
        metrics: by split, such as "val/top1" and "test/top1".
        extra_files: further files of the package by their names in it, such as "energy.json".

    Raises:
        UserError: a bad name, value or file, weights that are not the configuration's, or a registry that fails.
    """
    check_model_name(name)
    for metric, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(f"model {name}: metric {metric} is {value}; only finite values can be registered")
    with connect(tracking_uri) as client, _scratch() as scratch:
        package = scratch / "package"
        package.mkdir()
        origin = {"dataset": data.source, "data_hash": data.content_hash}
        given = {key: str(value) for key, value in {**origin, **tags}.items()}
        data.write(scratch)
        facts = {"run_id": run_id, "tags": given, "metrics": dict(metrics), "plugins": list(loaded_plugins())}
        files = {DATA_SUMMARY: scratch / DATA_SUMMARY, **(extra_files or {})}
        card = write_package(package, weights, config, files, facts)
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
        save_for_mlflow(package, scratch / "model", config, data)
        return publish(client, name, scratch / "model", run_id, all_tags, tracking_uri)


def renew(uri: str, *, tracking_uri: str | None = None) -> RegisteredVersion:
    """Registers a version again with the serving code of this spikefleet; files, tags and metrics stay.

    The new version takes over the old one's aliases.

    Raises:
        UserError: there is no such version, its files are not the registered ones, a plugin that it was trained with
            is not loaded, or the registry fails.
    """
    with connect(_uri(tracking_uri)) as client, _package(uri, tracking_uri) as (directory, content_hash):
        old = resolve(client, uri)
        load_network(directory, content_hash)  # what cannot be built here could not be served either
        card = read_card(directory, content_hash)
        with _scratch() as scratch:
            package = scratch / "package"
            package.mkdir()
            for name in (*card.sha256, CARD):
                shutil.copyfile(directory / name, package / name)
            save_for_mlflow(package, scratch / "model", read_config(package), DataSummary.read(package))
            measured = {f"{METRIC_PREFIX}{metric}": repr(value) for metric, value in old.metrics.items()}
            tags = {**old.tags, **measured}
            new = publish(client, old.name, scratch / "model", old.run_id, tags, _uri(tracking_uri))
        for alias in old.aliases:
            set_alias(client, old.name, alias, new.version)
        return find_model(client, old.name).pick(new.version)


def promote(name: str, version: int, metric: str, mode: Mode = "max", *, tracking_uri: str | None = None) -> Promotion:
    """Gives a version the alias `champion` if its metric is better than the present champion's, else `challenger`.

    Jobs may promote at the same time. Each marks its version as asking, and after every change of the alias looks again
    at all versions that asked meanwhile. Once all calls have returned, the champion is the best of them and of the
    champion before; in between, and after a call was killed, it may be a worse one, until the next call. An alias that
    is moved by hand at the same moment may be moved back.

    Raises:
        UserError: there is no such version, or it lacks the metric.
    """
    with connect(_uri(tracking_uri)) as client:
        before = find_model(client, name)
        candidate = before.pick(version)
        own = _of(candidate, metric)
        if own.value is None:
            has = ", ".join(candidate.metrics) or "none"
            raise UserError(f"{candidate.uri} has no metric {metric!r}; it has {has}")
        asking, settled = f"asking {mode} {metric}", f"settled {mode} {metric}"
        settled_before = {v.version for v in before.versions if v.tags.get(_PROMOTION) == settled}
        client.set_model_version_tag(name, str(version), _PROMOTION, asking)
        while True:
            model = find_model(client, name)
            champion = _candidate(model.champion, metric)
            asked = [
                v
                for v in model.versions
                if v.tags.get(_PROMOTION) == asking
                or (v.tags.get(_PROMOTION) == settled and v.version not in settled_before)
            ]
            winner = winner_of(champion, [_of(v, metric) for v in asked], metric, mode)
            if winner is None or winner == champion:
                break
            set_alias(client, name, CHAMPION, winner.version)
        won = winner is not None and winner.version == version
        decision = decide(_candidate(before.champion, metric) if won else winner, own, metric, mode)
        challenger = next((v for v in model.versions if CHALLENGER in v.aliases), None)
        if not won:
            set_alias(client, name, CHALLENGER, version)
        elif challenger is not None and challenger.version == version:
            client.delete_registered_model_alias(name, CHALLENGER)
        client.set_model_version_tag(name, str(version), _PROMOTION, settled)
        return Promotion(name, version, decision.alias, decision.reason, winner.version if winner else None)


def load(uri: str | Path, *, tracking_uri: str | None = None) -> "torch.nn.Module":
    """The network of `models:/NAME@champion`, `models:/NAME/3` or a pulled directory: evaluation mode, on the CPU.

    Its files are checked against the hash that the registry holds (a directory: against its card) before they are read;
    no stored code runs. `network.config` is its configuration.

    Raises:
        UserError: nothing there, or files that are not those that were registered.
    """
    with _package(uri, tracking_uri) as (directory, content_hash):
        network, _ = load_network(directory, content_hash)
    return network


def describe(uri: str | Path, *, tracking_uri: str | None = None) -> dict[str, Any]:
    """What is known about a registered version or a pulled directory: tags, metrics, config, hashes of the files."""
    if not _is_registered(uri):
        directory = Path(uri)
        card = verify_package(directory)
        return {"uri": str(uri), **card.facts, "config": read_config(directory), "sha256": dict(card.sha256)}
    with connect(_uri(tracking_uri)) as client, _scratch() as scratch:
        version = resolve(client, str(uri))
        for name in (CARD, CONFIG):
            download(client, version, name, scratch)
        card = read_card(scratch, version.content_hash)
        return {
            "uri": version.uri,
            "aliases": list(version.aliases),
            "created": version.created.isoformat(),
            "run_id": version.run_id,
            "tags": {key: value for key, value in version.facts().items() if key in version.tags},
            "metrics": dict(version.metrics),
            "config": read_config(scratch),
            "sha256": dict(card.sha256),
        }


def pull(uri: str, out: Path, *, tracking_uri: str | None = None) -> Path:
    """Copies a version's verified files into a new directory, all or none.

    Raises:
        UserError: the directory is not empty, there is no such version, or its files are not the registered ones.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; give another directory")
    if not _is_registered(uri):
        raise UserError(f"{uri!r} is not a registered version; give models:/NAME@champion or models:/NAME/3")
    with _package(uri, tracking_uri) as (directory, content_hash):
        card = verify_package(directory, content_hash)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            for name in (*card.sha256, CARD):
                shutil.copyfile(directory / name, partial / name)
            verify_package(partial, content_hash)
            partial.chmod(0o755)
            partial.replace(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def list_models(*, tracking_uri: str | None = None) -> list[RegisteredModel]:
    """All models that spikefleet has registered, by name."""
    with connect(_uri(tracking_uri)) as client:
        versions = find_versions(client)
        names = sorted({version.name for version in versions})
        return [RegisteredModel(name, tuple(v for v in versions if v.name == name)) for name in names]


def show(name: str, *, tracking_uri: str | None = None) -> RegisteredModel:
    """A model and its versions. Raises UserError naming the nearest names when there is none of this name."""
    with connect(_uri(tracking_uri)) as client:
        return find_model(client, name)


def best(
    task: str,
    metric: str,
    dataset: str | None = None,
    where: str | None = None,
    mode: Mode = "max",
    *,
    tracking_uri: str | None = None,
) -> RegisteredVersion:
    """The best version for a metric, among those of a task (and data set) that satisfy `where`; of equals, the oldest.

    Raises:
        UserError: `where` is no query or asks for what no version has, or nothing matches (the sentence says why).
    """
    if where is not None:
        parse_where(where)  # what is no query is refused before anything is asked of the server
    with connect(_uri(tracking_uri)) as client:
        versions = find_versions(client)
    versions = _narrow(versions, "task", task)
    if dataset is not None:
        versions = _narrow(versions, "dataset", dataset)
    if where is not None:
        query = parse_where(where, {key for version in versions for key in version.facts()})
        versions = [version for version in versions if query.holds(version.facts())]
        if not versions:
            raise UserError(f"no version for task {task!r} satisfies where {where!r}")
    values = [(version, value) for version in versions if (value := version.metric(metric)) is not None]
    if not values:
        known = sorted({name for version in versions for name in version.metrics})
        raise UserError(f"no version that matches has the metric {metric!r}; there are {', '.join(known) or 'none'}")
    sign = -1 if mode == "max" else 1
    return min(values, key=lambda pair: (sign * pair[1], pair[0].created, pair[0].name, pair[0].version))[0]


def _narrow(versions: list[RegisteredVersion], key: str, wanted: str) -> list[RegisteredVersion]:
    kept = [version for version in versions if version.tags.get(key) == wanted]
    if not kept:
        known = sorted({version.tags[key] for version in versions if key in version.tags})
        raise UserError(f"no version is registered for {key} {wanted!r}; there are {', '.join(known) or 'none'}")
    return kept


def _uri(tracking_uri: str | None) -> str:
    return tracking_uri or resolve_tracking_uri(Path("runs"))


def _is_registered(uri: str | Path) -> bool:
    return isinstance(uri, str) and uri.startswith("models:")


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="spikefleet-") as directory:
        yield Path(directory)


@contextmanager
def _package(uri: str | Path, tracking_uri: str | None) -> Iterator[tuple[Path, str | None]]:
    """A directory with a package's files, not yet verified, and the content hash that it must have."""
    if not _is_registered(uri):
        yield Path(uri), None
        return
    with connect(_uri(tracking_uri)) as client, _scratch() as scratch:
        version = resolve(client, str(uri))
        download(client, version, "", scratch)
        yield scratch, version.content_hash


def _candidate(version: RegisteredVersion | None, metric: str) -> Candidate | None:
    return None if version is None else _of(version, metric)


def _of(version: RegisteredVersion, metric: str) -> Candidate:
    refuted = version.tags.get(SPIKE_DRIVEN) == REFUTED
    return Candidate(version.version, version.metric(metric), version.tags.get("data_hash"), refuted)
