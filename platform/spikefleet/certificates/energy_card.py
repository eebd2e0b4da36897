"""Energy cards of trained networks on images of their data, as JSON and as a plot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from spikefleet import plots
from spikefleet.errors import UserError
from spikefleet.files import read_json_object, write_json
from spikefleet.status import Count, uncounted
from spikefleet.training.evaluation import SpreadPlan
from spikefleet_models.energy import EnergyCard, Form, energy_card
from spikefleet_models.low_precision import Precision
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Samples
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig

ENERGY = "energy.json"
"""File name of the card in a report and in a registered version."""

CARD_FILES = (ENERGY, "energy.png")
"""Names of the files that `write_card` writes."""

REGISTERED_CONSTANTS = "fp32-45nm"
"""Energy constants of every registered version, so that `energy_mj` is comparable across families."""


def measure_energy(
    network: nn.Module,
    transform: BatchTransformConfig,
    split: Samples,
    *,
    images: int = 32,
    constants: str = REGISTERED_CONSTANTS,
    form: Form = "merged",
    shortcuts: bool = True,
    precision: Precision = "fp32",
    progress: Count = uncounted,
) -> EnergyCard:
    """The energy card of a network, measured on images spread evenly over a split.

    Images run one at a time: a batch would pad them to the largest one.

    Args:
        network: in evaluation mode, on the CPU.
        transform: preprocessing of the network's data.
        split: where the images are from.
        images: number of images.
        constants: name of the energy constants.
        form: the form of the network to count.
        shortcuts: count 1x1 convolutions of shortcuts too.
        precision: of the weights of the layers that spikes feed.
        progress: called with (images measured, images to measure).

    Raises:
        ValueError: the constants are unknown, or nothing of the network can be rounded.
    """
    loader = BatchLoader(split, transform, train=False)
    plan = SpreadPlan(len(split), images)

    def shown() -> Iterator[Tensor]:
        for position, batch in enumerate(loader.epoch(plan, epoch=0)):
            yield batch.network_input
            progress(position + 1, plan.steps_per_epoch)

    batches = shown()
    binary = transform.binary_input
    return energy_card(network, batches, constants, form, shortcuts, binary_input=binary, precision=precision)


def read_card(path: Path) -> EnergyCard:
    """Reads an energy card. Raises UserError if the file is missing or damaged."""
    try:
        card = EnergyCard.from_dict(read_json_object(path))
        totals = (card.energy_mj, card.macs, card.acs, *(row["energy_mj"] for row in card.rows()))
        if not all(math.isfinite(value) for value in totals):
            raise ValueError("its totals are not finite")
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {error}; measure the energy again") from None
    return card


def write_card(card: EnergyCard, folder: Path) -> None:
    """Writes `energy.json` and `energy.png` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ENERGY, card.to_dict())
    title = f"{card.network}, {card.form}: {card.energy_mj:.4g} mJ per image ({card.constants.name})"
    plots.energy_bars(card.rows(), title, folder / "energy.png")
