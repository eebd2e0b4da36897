"""What a page says of a network: measured here by the functions of the other commands, or recorded with the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spikefleet.certificates.drift_reference import Calibration
from spikefleet.certificates.energy_card import measure_energy
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.inference.trained_network import TrainedNetwork, open_store
from spikefleet.status import counting, waiting
from spikefleet.tasks.mistakes import Confusion, Mistake
from spikefleet.training.distributed import ProcessGroup, pick_device
from spikefleet.training.evaluation import Evaluation, evaluate
from spikefleet.training.gradient_check import GradientCheck, check_gradients, training_batch
from spikefleet_models.energy import EnergyCard
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Store

MOST_MISTAKES = 12
"""Images of a page."""

_GRADIENT_IMAGES = 32

Shown = tuple[Mistake, list[tuple[str, torch.Tensor]]]
"""A mistake, and captions and images, uint8 `[C, H, W]`, that show it."""


@dataclass(frozen=True)
class Inspection:
    """All that a page shows of one network on one split."""

    trained: TrainedNetwork
    measured_on: DataSummary
    """The data of the split."""
    location: str
    """Of the store of these data."""
    evaluation: Evaluation[Any, Any]
    details: Mapping[str, Any]
    """Of the evaluation, as `Task.details` returns them."""
    rate_images: int
    """Images on which the firing rates were measured: the first ones of the split."""
    confusion: Confusion | None
    calibration: Calibration | None
    """None for a task whose answers have no confidence."""
    mistakes: tuple[Shown, ...]
    energy: EnergyCard
    energy_recorded: bool
    """Whether the card is that of the registration, else measured now on the split."""
    gradients: GradientCheck | None
    gradients_remark: str
    """What the gradients are of, or why there are none."""


def inspect_network(
    trained: TrainedNetwork,
    split: str,
    stores_dir: Path,
    console: Console,
    *,
    data: str | None = None,
    gpu: bool = False,
) -> Inspection:
    """Measures a network on a split of its data.

    Args:
        trained: the network.
        split: name of the split.
        stores_dir: directory of prepared stores.
        console: for progress.
        data: location of another store; by default the data of the network's configuration.
        gpu: evaluate on the GPU.

    Raises:
        UserError: the data do not fit the network.
        SourceError: the data are missing and cannot be prepared.
        StoreError: the store is damaged.
    """
    store = open_store(trained, stores_dir, console, data=data)
    rows = store.samples(store.manifest.original(split))
    config, task = trained.config, trained.task
    group = ProcessGroup(0, 1, pick_device(gpu))
    processes = config.data.loader_processes
    loader = BatchLoader(rows, config.transform, train=False, processes=processes, device=group.device)
    with counting(console, f"evaluating {rows.name}") as progress:
        network = trained.network.to(group.device)
        found = evaluate(network, task, loader, config.train, group, progress, over_time=True, still_images=True)
    assert found is not None, "rank 0 gets the predictions"
    network.cpu()
    with waiting(console, "measuring"):
        both = found.predictions, found.targets
        details = found.details(task)
        sure = task.confidences(*both)
        mistakes = task.report.mistakes(*both, MOST_MISTAKES)
        images = loader.pictures([one.row for one in mistakes])
        shown = tuple(
            (one, task.report.mistaken_images(image, found.predictions[one.row], found.targets[one.row]))
            for one, image in zip(mistakes, images, strict=True)
        )
        confusion = task.report.confusion(details, *both)
    with waiting(console, "running forward and backward"):
        gradients, remark = _gradients(trained, store)
    energy = None if trained.proof is None else trained.card  # without a proof, the card may be of another checkpoint
    recorded = energy is not None
    if energy is None:
        with counting(console, "measuring firing rates") as progress:
            energy = measure_energy(trained.network, config.transform, rows, progress=progress)
    return Inspection(
        trained,
        DataSummary.of(store.manifest),
        store.location,
        found,
        details,
        min(config.train.eval_batch, len(rows)),
        confusion,
        Calibration.of(sure) if sure else None,
        shown,
        energy,
        recorded,
        gradients,
        remark,
    )


def _gradients(trained: TrainedNetwork, store: Store) -> tuple[GradientCheck | None, str]:
    """The gradients of the trained weights on training images, or why there are none.

    A registered version has no side branches, so those of a training are left out.
    """
    config = trained.config
    plain = config.model_copy(update={"shortcut": config.shortcut.model_copy(update={"where": "none"})})
    try:
        batch = training_batch(plain, store, _GRADIENT_IMAGES)
        weights = trained.network.state_dict()
        check = check_gradients(plain, batch, DataSummary.of(store.manifest), weights=weights)
    except (UserError, StoreError) as error:
        return None, f"They cannot be measured: {error}."
    branches = "; without the side branches of the training" if config.shortcut.enabled else ""
    return check, f"Of the loss of the trained weights on {len(batch.indices)} training images, in fp32{branches}."


def expected_calibration_error(calibration: Calibration) -> float:
    """The expected calibration error: the mean of |accuracy - confidence| over bins, weighted by their answers.

    Guo et al., ICML 2017, eq. 3.
    """
    total = sum(calibration.counts)
    gaps = (abs(right - sure) for right, sure in zip(calibration.right, calibration.confidence, strict=True))
    return sum(gaps) / total if total else 0.0
