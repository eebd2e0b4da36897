"""A network as a run leaves it behind, registered at will; what a test reads of what was registered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from spikefleet.data_summary import DataSummary
from spikefleet.registry.api import RegisteredVersion, register
from spikefleet.tracking.tracker import Tracker
from spikefleet_models.families import build_model, model_config
from spikefleet_pipelines.transforms.classification_config import TransformConfig

DIGITS = DataSummary("digits", "d" * 64, tuple(map(str, range(10))), (), (1, 8, 8))


@dataclass(frozen=True)
class Trained:
    """A network as a run leaves it behind."""

    weights: Path
    config: dict[str, Any]
    tags: dict[str, object]
    run_id: str
    uri: str

    def register(self, name: str, value: float = 0.9, **changes: Any) -> RegisteredVersion:
        """Registers it under `name` with validation accuracy `value`; `changes` replace arguments of `register`."""
        arguments: dict[str, Any] = {
            "weights": self.weights,
            "config": self.config,
            "data": DIGITS,
            "tags": self.tags,
            "metrics": {"val/top1": value, "test/top1": value - 0.01},
            "run_id": self.run_id,
            "tracking_uri": self.uri,
        }
        return register(name, **(arguments | changes))

    def again(self, seed: int, directory: Path, **overrides: Any) -> Trained:
        """Another training of the same run: other weights, perhaps another network."""
        torch.manual_seed(seed)
        model = model_config("sg_resnet_tiny", stages=(1, 1), **overrides)
        weights = directory / f"{seed}.safetensors"
        save_file(build_model(model).state_dict(), weights)
        return replace(self, weights=weights, config={**self.config, "model": model.model_dump(mode="json")})


def trained(directory: Path, uri: str) -> Trained:
    """A finished run, tracked at `uri`, and the tiny network that it left in `directory`."""
    tracker = Tracker.open(directory / "first", "first", "digits", uri)
    assert tracker.finish("FINISHED", wait_s=30) == 0
    transform = TransformConfig(normalise="digits")
    config = {"task": "classification", "data": {"source": "digits", "transform": transform.model_dump(mode="json")}}
    tags: dict[str, object] = {"recipe": "digits", "run_name": "first", "seed": 0, "spike_driven": "proved"}
    bare = Trained(Path(), config, tags, str(tracker.run_id), uri)
    return bare.again(0, directory)


def load_network_of(origin: Trained) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """The network as it was before it was registered, in evaluation mode, and its configuration."""
    network = build_model(model_config("sg_resnet_tiny", stages=(1, 1)))
    network.load_state_dict(load_file(origin.weights))
    return network.eval(), origin.config


def stored_files(uri: str, version: RegisteredVersion) -> Path:
    """Where MLflow keeps the files of a version, as somebody with access to that storage sees them."""
    source = MlflowClient(uri, registry_uri=uri).get_model_version(version.name, str(version.version)).source
    return Path(source.removeprefix("file://"))
