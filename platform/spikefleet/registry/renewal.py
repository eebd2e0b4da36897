"""Registers a version again with today's serving code: one of an earlier release becomes self-contained."""

from pathlib import Path
from typing import TYPE_CHECKING

from spikefleet.data_summary import DataSummary
from spikefleet.registry.aliases import changing_aliases, refused_alias
from spikefleet.registry.flaws import FLAW, flaw_tag
from spikefleet.registry.mlflow_model import save_for_mlflow, serving_files_tag
from spikefleet.registry.mlflow_store import METRIC_PREFIX, connect, download, find_model, publish, resolve
from spikefleet.registry.model_card import description_of
from spikefleet.registry.package import load_network, read_card, read_config, with_code
from spikefleet.registry.package_access import package_files, registry_uri, scratch_directory
from spikefleet.registry.serving_code import serving_code
from spikefleet.registry.version import CONTENT_HASH, RegisteredVersion

if TYPE_CHECKING:
    from mlflow import MlflowClient


def renew(uri: str, *, tracking_uri: str | None = None) -> RegisteredVersion:
    """Registers a version again with the current serving code; weights, configuration, tags and metrics stay the same.

    A version that has that code, and is loaded by it, stays as it is. The new version brings the code and the
    requirements that serve it, and gets the aliases of the old one, but none that it must not have; those stay where
    they are.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Returns:
        The new version, or the one at `uri` if it is current.

    Raises:
        UserError: the version does not exist, its files have changed, a plugin that it was trained with is not loaded,
            or the registry fails.
    """
    place = registry_uri(tracking_uri)
    with connect(place) as client, package_files(uri, place) as (directory, content_hash):
        old = resolve(client, uri)
        load_network(directory, content_hash)  # a network that cannot be built cannot be served
        with scratch_directory() as scratch:
            package = scratch / "package"
            package.mkdir()
            card = with_code(directory, read_card(directory, content_hash), serving_code().archive(), package)
            config, data = read_config(package), DataSummary.read(package)
            save_for_mlflow(package, scratch / "model", config, data, card)
            flaw = flaw_tag(config, data, old.metrics, {name: package / name for name in card.sha256})
            same = card.content_hash == old.content_hash and flaw.items() <= old.tags.items()
            hashed = serving_files_tag(scratch / "model")
            if same and hashed.keys() <= old.tags.keys() and _is_loaded_as_now(client, old, scratch / "model"):
                return old
            measured = {f"{METRIC_PREFIX}{metric}": repr(value) for metric, value in old.metrics.items()}
            tags = {**old.tags, **flaw, **measured, **hashed, CONTENT_HASH: card.content_hash}
            text = description_of(old.name, package, card, tags.get(FLAW))
            new = publish(client, old.name, scratch / "model", old.run_id, tags, text, place)
        with changing_aliases(client, old.name, f"the renewal of version {old.version}") as aliases:
            for alias in aliases.model.pick(old.version).aliases:
                if refused_alias(new, alias) is None:
                    aliases.move(alias, new.version, "renewed", f"version {old.version} with today's serving code")
        return find_model(client, old.name).pick(new.version)


def _is_loaded_as_now(client: "MlflowClient", version: RegisteredVersion, model: Path) -> bool:
    """Whether a version has the loader and the requirements of a model directory that was written now."""
    with scratch_directory() as stored:
        for name in ("pyfunc_model.py", "requirements.txt"):
            download(client, version, name, stored, of="")
            if (stored / name).read_bytes() != (model / name).read_bytes():
                return False
    return True
