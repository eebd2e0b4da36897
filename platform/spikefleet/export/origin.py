"""Where an exported network comes from: a registered version, a pulled package, or a run."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spikefleet import registry
from spikefleet.certificates.spike_check import PROOF
from spikefleet.files import read_json_object
from spikefleet.inference.trained_network import TrainedNetwork, open_package, open_trained_network
from spikefleet.registry.package import CARD, read_card
from spikefleet.registry.version import SPIKE_DRIVEN
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.versions import code_version

_REGISTERED = re.compile(r"[^/@]+(@[A-Za-z0-9_-]+|/[0-9]+)")


@dataclass(frozen=True)
class Origin:
    """A network and what is known of it."""

    trained: TrainedNetwork
    uri: str
    """`models:/NAME/VERSION` of a registered version, else the reference."""
    content_hash: str | None = None
    """Of the package; a checkpoint has none."""
    spike_driven: str = "unknown"
    """Verdict of the spike check."""
    code_version: str = ""
    """That trained the network."""

    @property
    def is_registered(self) -> bool:
        """Whether an export can be recorded with a version."""
        return self.uri.startswith("models:")

    def metadata(self) -> dict[str, Any]:
        """What a file says of the network, as plain data."""
        trained, model = self.trained, self.trained.config.model
        return {
            "network": self.uri,
            "content_hash": self.content_hash,
            "trained_by": self.code_version or None,
            "exported_by": code_version(),
            "spike_driven": self.spike_driven,
            "task": trained.config.task,
            "model": {key: str(value) for key, value in model.tags().items()},
            "config": model.model_dump(mode="json"),
            "timesteps": getattr(trained.network, "timesteps", model.timesteps),
            "classes": list(trained.data.class_names),
            "category_ids": list(trained.data.category_ids),
            "dataset": trained.data.dataset,
            "data_hash": trained.data.content_hash,
            "metrics": dict(trained.metrics),
        }


def full_reference(reference: str) -> str:
    """`models:/` before NAME@ALIAS and NAME/VERSION; directories and names of runs stay as they are."""
    registered = _REGISTERED.fullmatch(reference) and not Path(reference).is_dir()
    return f"models:/{reference}" if registered else reference


def open_origin(reference: str, runs_dir: Path) -> Origin:
    """Opens a network with what is known of it.

    Args:
        reference: NAME@ALIAS, NAME/VERSION, the same after `models:/`, a pulled directory, a run's name (its best
            checkpoint) or a checkpoint.
        runs_dir: directory of the runs.

    Raises:
        UserError: the reference does not exist, or a file is damaged.
    """
    reference = full_reference(reference)
    if not reference.startswith("models:"):
        trained = open_trained_network(reference, runs_dir)
        folder = Path(reference)
        if (folder / CARD).is_file():
            return _of_package(trained, reference, folder)
        return Origin(trained, reference, spike_driven=_verdict_of_run(trained))
    tracking_uri = resolve_tracking_uri(runs_dir)
    # An alias may move meanwhile: the version that it names now is the one that is opened and recorded.
    uri = registry.describe(reference, tracking_uri=tracking_uri)["uri"]
    with tempfile.TemporaryDirectory(prefix="spikefleet-") as scratch:
        folder = registry.pull(uri, Path(scratch) / "package", tracking_uri=tracking_uri)
        trained = replace(open_package(uri, folder), folders=())
        return _of_package(trained, uri, folder)


def _verdict_of_run(trained: TrainedNetwork) -> str:
    path = None if trained.report is None else trained.report / PROOF
    return "unknown" if path is None or not path.is_file() else str(read_json_object(path).get("verdict", "unknown"))


def _of_package(trained: TrainedNetwork, uri: str, folder: Path) -> Origin:
    card = read_card(folder)
    tags = card.metadata.get("tags", {})
    verdict = str(tags.get(SPIKE_DRIVEN, "unknown"))
    return Origin(trained, uri, card.content_hash, verdict, str(tags.get("code_version", "")))
