"""A registered version, measured on the gate images: what it answers for each, and its energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from spikefleet.certificates.energy_card import measure_energy
from spikefleet.config.recipes import parse_config
from spikefleet.config.renamed import with_current_keys
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.plugins import missing_plugins_named
from spikefleet.registry.package import load_network, read_card, read_config
from spikefleet.registry.package_access import package_files
from spikefleet.registry.version import RegisteredVersion
from spikefleet.status import Announce, Count, silent, uncounted
from spikefleet.tasks import AnyTask, build_task
from spikefleet.tasks.per_image import Results
from spikefleet.training.distributed import ProcessGroup, pick_device
from spikefleet.training.evaluation import Evaluation, evaluate
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Samples

_ENERGY_IMAGES = 32


@dataclass(frozen=True)
class Measured:
    """A version on the gate images."""

    version: RegisteredVersion
    config: Config
    data: DataSummary
    network: nn.Module
    task: AnyTask
    gate: Samples
    evaluation: Evaluation[Any, Any]
    results: Results | None
    """By image; None for a task whose answers are not compared by image."""
    details: Mapping[str, Any]
    """The evaluation as plain data, as `Task.details` returns it."""

    @cached_property
    def energy_mj(self) -> float:
        """Energy per image in mJ, on gate images; measured when it is first asked for."""
        return measure_energy(self.network, self.config.transform, self.gate, images=_ENERGY_IMAGES).energy_mj

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics on the gate images, by name."""
        found: Mapping[str, float] = self.details["metrics"]
        return found

    @property
    def predictions(self) -> Sequence[Any]:
        """One for each gate image."""
        return self.evaluation.predictions


def measure(
    version: RegisteredVersion,
    gate: Samples,
    tracking_uri: str,
    *,
    gpu: bool = False,
    announce: Announce = silent,
    progress: Count = uncounted,
) -> Measured:
    """Loads a registered version, after its files are verified, and measures it on the gate images.

    Args:
        version: the version.
        gate: the gate images.
        tracking_uri: of the registry.
        gpu: run on the GPU.
        announce: called with what begins.
        progress: called with (images done, images in all).

    Raises:
        UserError: its files have changed, or a plugin that it needs is missing.
    """
    with package_files(version.uri, tracking_uri) as (directory, content_hash):
        network, _ = load_network(directory, content_hash)
        with missing_plugins_named(read_card(directory).metadata.get("plugins", ()), version.uri):
            config = parse_config(with_current_keys(read_config(directory)), origin=version.uri)
        data = DataSummary.read(directory)
    task = build_task(config, data)
    group = ProcessGroup(0, 1, pick_device(gpu))
    loader = BatchLoader(gate, config.transform, train=False, processes=config.data.loader_processes)
    announce(f"measuring version {version.version} on {len(gate):,} gate images")
    evaluation = evaluate(network.to(group.device), task, loader, config.train, group, progress)
    assert evaluation is not None, "rank 0 gets the predictions"
    network.to(torch.device("cpu"))
    predictions, targets = evaluation.predictions, evaluation.targets
    details = task.details(predictions, targets)
    results = task.per_image(predictions, targets)
    return Measured(version, config, data, network, task, gate, evaluation, results, details)
