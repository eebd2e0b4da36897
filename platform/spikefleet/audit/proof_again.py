"""The spike check of a registered version, made again: on the images of its data, or without them on generated ones.

With the data (the store of the version's configuration, or another place of the same content) it is the whole check, on
the same images as at registration. Without, the first two legs of the proof hold for any image, so they are made again
on generated ones; the metric needs the data and is left out.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from spikefleet import registry
from spikefleet.certificates.certify import certified_split, measured_images
from spikefleet.certificates.spike_check import PROOF, SpikeCheck, check_images, check_spikes
from spikefleet.certificates.verdict import NOT_SPIKING, PROVED
from spikefleet.data_access import open_data, store_at
from spikefleet.errors import UserError
from spikefleet.files import read_json_object
from spikefleet.inference.trained_network import TrainedNetwork, open_trained_network
from spikefleet.status import counting, one_line
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.in_memory import image_batch
from spikefleet_pipelines.store.reader import Store

_GENERATED = 8
_SIDE = 64
"""Of generated images, where the data have several sizes."""


@dataclass(frozen=True)
class ProofAgain:
    """A check made now beside the one that the version came with."""

    check: SpikeCheck
    stored: str | None
    """Verdict in the version; None for one without a spike check."""
    images: str
    """What it was made on, in words."""

    @property
    def confirmed(self) -> bool:
        """The verdict is that of the version; without one, that nothing speaks against it."""
        return self.check.verdict in ((PROVED, NOT_SPIKING) if self.stored is None else (self.stored,))

    @property
    def says(self) -> str:
        """What was found, in words."""
        before = "the version came without a verdict" if self.stored is None else f"the version says {self.stored!r}"
        why = "" if self.check.why is None else f" ({self.check.why})"
        return f"the spike check made again finds {self.check.verdict!r}{why}, and {before}; made on {self.images}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "verdict": self.check.verdict,
            "stored_verdict": self.stored,
            "confirmed": self.confirmed,
            "images": self.images,
            "says": self.says,
            "legs": [leg.to_dict() for leg in self.check.legs],
        }


def prove_again(
    reference: str | Path,
    stores_dir: Path,
    console: Console,
    *,
    data: str | None = None,
    tracking_uri: str | None = None,
) -> ProofAgain:
    """Makes the spike check of a version again.

    Args:
        reference: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a pulled directory.
        stores_dir: directory of prepared stores.
        console: for progress.
        data: another place of the version's data; by default that of its configuration, and generated images where
            its data are not there.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Raises:
        UserError: the version does not exist, its files have changed, or `data` is not the data of the version.
        SourceError: `data` cannot be prepared.
        StoreError: `data` is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="spikefleet-") as scratch:
        folder = Path(reference)
        if str(reference).startswith("models:"):
            folder = registry.pull(str(reference), Path(scratch) / "package", tracking_uri=tracking_uri)
        trained = open_trained_network(str(folder), Path())
        stored = str(read_json_object(folder / PROOF, "verdict")["verdict"]) if (folder / PROOF).is_file() else None
    store, reason = _store(trained, stores_dir, console, data)
    if store is None:
        config = trained.config
        without = f"{_GENERATED} generated images, without the metric, since {one_line(reason)}"
        check = check_images(trained.network, _generated(trained), config.transform.binary_input)
        return ProofAgain(check, stored, without)
    split, measured = certified_split(store), measured_images(trained.network, trained.config, store)
    with counting(console, "proving and measuring") as progress:
        check = check_spikes(trained.network, trained.task, trained.config, split, measured=measured, progress=progress)
    return ProofAgain(check, stored, f"the images of {split.name} that registration looked at ({store.location})")


def _store(trained: TrainedNetwork, stores_dir: Path, console: Console, data: str | None) -> tuple[Store | None, str]:
    """The data of a version, or why they are not there."""
    config = trained.config.data
    if data is not None:
        config = config.model_copy(update={"store": store_at(data, stores_dir)})
    try:
        store = open_data(config, stores_dir, console)
    except (SourceError, StoreError) as error:
        if data is not None:
            raise
        return None, f"its data are not here: {error}"
    if store.manifest.content_hash != trained.data.content_hash:
        other = (
            f"{store.location} has content hash {store.manifest.content_hash[:12]}, the data of the version "
            f"{trained.data.content_hash[:12]}"
        )
        if data is not None:
            raise UserError(f"{other}; name the version's own data by --data, or none")
        return None, other
    return store, ""


def _generated(trained: TrainedNetwork) -> Tensor:
    """Images `[B, C, H, W]`, or frames `[T, B, C, H, W]` of a network on events, as the network takes them."""
    config = trained.config
    if config.transform.reads_events:
        return _generated_frames(trained)
    return image_batch(_generated_images(trained), config.data.transform, config.model.in_channels).images


def _generated_frames(trained: TrainedNetwork) -> Tensor:
    """Counts of drawn events, few and many a pixel; 0 and 1 where the network takes spikes."""
    model, shape = trained.config.model, trained.data.input_shape(trained.config.data.transform)
    _, height, width = shape or (0, _SIDE, _SIDE)
    rates = torch.logspace(-2, 0, _GENERATED).view(1, -1, 1, 1, 1)
    expected = rates.expand(model.simulated_timesteps, _GENERATED, model.in_channels, height, width)
    counts = torch.poisson(expected, torch.Generator().manual_seed(0))
    return counts.clamp(max=1) if trained.config.transform.binary_input else counts


def _generated_images(trained: TrainedNetwork) -> NDArray[np.uint8]:
    """Images uint8 `[B, C, H, W]`: noise from coarse to fine, and of several contrasts, so that layers fire."""
    channels = trained.config.model.in_channels
    height, width = trained.data.image_shape[1:] if trained.data.image_shape else (_SIDE, _SIDE)
    rng = np.random.default_rng(0)
    images = []
    for number in range(_GENERATED):
        grain = 1 << (number % 4)
        coarse = rng.random((channels, -(-height // grain), -(-width // grain)))
        fine = coarse.repeat(grain, 1).repeat(grain, 2)[:, :height, :width]
        images.append((255 * fine ** (1 if number < _GENERATED // 2 else 3)).astype(np.uint8))
    return np.stack(images)
