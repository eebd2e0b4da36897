"""Images of a split as a deployed network gets them: uint8, resized, before they are normalised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from spikefleet.errors import UserError
from spikefleet.inference.trained_network import TrainedNetwork, open_split
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EvaluationPlan
from spikefleet_pipelines.transforms.normalise_config import Normalisation

_BATCH = 16


class Scaling(nn.Module):
    """Pixels to the input of a network: uint8 [B, C, H, W] -> (pixel / 255 - mean) / std.

    Args:
        normalise: statistics of the pixels scaled to [0, 1].
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, normalise: Normalisation) -> None:
        super().__init__()
        mean = np.array(normalise.mean, np.float32).reshape(-1, 1, 1)
        std = np.array(normalise.std, np.float32).reshape(-1, 1, 1)
        # As the transforms compute it, to the bit.
        self.register_buffer("scale", torch.from_numpy(1 / (255 * std)))
        self.register_buffer("shift", torch.from_numpy(-mean / std))

    def forward(self, pixels: Tensor) -> Tensor:
        """Scale pixels."""
        return pixels.to(self.scale.dtype) * self.scale + self.shift

    def undone(self, images: Tensor) -> Tensor:
        """The pixels, uint8, of normalised images."""
        return ((images - self.shift) / self.scale).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class ImagesToCompare:
    """Images of a split, of one size."""

    split: str
    shape: tuple[int, int, int]
    """(C, H, W) of the network's input."""
    count: int
    """At most so many; images of another size are left out."""
    scaling: Scaling
    _loader: BatchLoader
    _batch: int

    @classmethod
    def of(
        cls, trained: TrainedNetwork, split: str, stores_dir: Path, console: Console, data: str | None, most: int | None
    ) -> ImagesToCompare:
        """Opens the split.

        Args:
            trained: the network.
            split: name of the split.
            stores_dir: directory of prepared stores.
            console: for progress.
            data: location of another store; by default the data of the network's configuration.
            most: images, at most; None: all.

        Raises:
            UserError: the data does not fit the network, or its transform does not end in the normalisation.
        """
        transform = trained.config.transform
        rows = open_split(trained, split, stores_dir, console, data=data)
        if not len(rows):
            raise UserError(f"split {rows.name} has no image to compare on; give another one by --split")
        loader = BatchLoader(rows, transform, train=False)
        one = next(iter(loader.epoch(EvaluationPlan(samples=len(rows), global_batch=1), epoch=0))).images
        scaling = Scaling(transform.normalise)
        if not torch.equal(scaling(scaling.undone(one)), one):
            raise UserError(
                f"the transform {transform.kind!r} does not end in the normalisation of pixels from 0 to 255, so a "
                "file cannot say what its input is; export a network with another transform"
            )
        # keep_ratio pads a batch to its largest image, so that each image has a size of its own.
        batch = 1 if getattr(transform, "resize", None) == "keep_ratio" else _BATCH
        channels, height, width = one.shape[1:]
        count = len(rows) if most is None else min(most, len(rows))
        return cls(rows.name, (channels, height, width), count, scaling, loader, batch)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Batches, uint8 [B, C, H, W]."""
        plan = EvaluationPlan(samples=len(self._loader.split), global_batch=self._batch)
        left = self.count
        for batch in self._loader.epoch(plan, epoch=0):
            images = batch.images[:left]
            left -= len(images)
            if tuple(images.shape[1:]) == self.shape:
                yield self.scaling.undone(images).numpy()
            if not left:
                return

    def first(self) -> NDArray[np.uint8]:
        """The first image, uint8 [1, C, H, W]."""
        return next(iter(self))[:1]

    def input_metadata(self, trained: TrainedNetwork) -> dict[str, object]:
        """What the input of a file is, as plain data."""
        normalise = trained.config.data.transform.normalise
        channels, height, width = self.shape
        return {
            "layout": ["batch", "channels", "height", "width"],
            "channels": {1: ["grey"], 3: ["red", "green", "blue"]}.get(channels, channels),
            "height": height,
            "width": width,
            "resize": getattr(trained.config.data.transform, "resize", None) or "stretch",
            "pixel_range": [0, 255],
            "mean": list(normalise.mean),
            "std": list(normalise.std),
            "scaling": "(pixel / 255 - mean) / std, per channel",
        }
