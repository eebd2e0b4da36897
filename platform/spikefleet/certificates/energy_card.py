"""Energy cards of trained networks on pictures of their data: JSON and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from spikefleet import plots
from spikefleet.files import write_json
from spikefleet.status import Count, uncounted
from spikefleet.training.evaluation import SpreadPlan
from spikefleet_models.energy import EnergyCard, Form, energy_card
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Split
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig

ENERGY = "energy.json"
"""Name of the card's file in a report and in a registered version."""

REGISTERED_CONSTANTS = "fp32-45nm"
"""Of every registered version, so that `energy_mj` compares networks of all families."""


def measure_energy(
    network: nn.Module,
    transform: BatchTransformConfig,
    split: Split,
    *,
    pictures: int = 32,
    constants: str = REGISTERED_CONSTANTS,
    form: Form = "merged",
    shortcuts: bool = True,
    progress: Count = uncounted,
) -> EnergyCard:
    """The card of a network on pictures spread over a split, one at a time: a batch may be padded to its largest.

    `progress` is called with (pictures measured, pictures to measure). Raises ValueError for unknown constants.
    """
    loader = BatchLoader(split, transform, train=False)
    plan = SpreadPlan(len(split), pictures)

    def shown() -> Iterator[Tensor]:
        for position, batch in enumerate(loader.epoch(plan, epoch=0)):
            yield batch.images
            progress(position + 1, plan.steps_per_epoch)

    batches = shown()
    return energy_card(network, batches, constants, form, shortcuts)


def write_card(card: EnergyCard, folder: Path) -> None:
    """`energy.json` and `energy.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ENERGY, card.to_dict())
    title = f"{card.network}, {card.form}: {card.energy_mj:.4g} mJ a picture ({card.constants.name})"
    plots.energy_bars(card.rows(), title, folder / "energy.png")
