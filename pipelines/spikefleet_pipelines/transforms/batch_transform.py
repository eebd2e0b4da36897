"""The interface of transforms to the loader: rows become images and targets, which are sent between processes."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.transforms.normalise import PixelScaling
from spikefleet_pipelines.transforms.pixel_augmentation import PixelAugmentation

Targets: TypeAlias = Tensor | tuple[Any, ...]
"""One target per image: rows of a tensor, or a tuple (of `Target` for detection).

Items of a tuple have a method `to(device, non_blocking=...)` like tensors, so that a batch can be copied to a device.
"""

PackedT = TypeVar("PackedT")
TargetsT_co = TypeVar("TargetsT_co", bound=Targets, covariant=True)


class BatchTransform(Protocol[PackedT, TargetsT_co]):
    """Loads and transforms batches of one split.

    It is called in loader processes, into which it may be pickled; its packed targets are sent to the training process
    and unpacked there. Many small tensors are packed as numpy arrays. Images that are allocated by `empty_batch`,
    before any other batch, are written where the training process reads them; others are copied on their way.
    """

    def __call__(self, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, PackedT]:
        """Load rows.

        Args:
            rows: positions in the split, [B].
            epoch: of training, for the random transforms.

        Returns:
            Images float32 [B, C, H, W] or frames [B, T, C, H, W], normalised, and the packed targets. What
            `BinsOnDevice` completes may have another shape.

        Raises:
            ValueError: a row cannot be loaded; the message is shown to the user unchanged.
        """
        ...

    def unpack(self, packed: PackedT) -> TargetsT_co:
        """Unpack the targets of a batch, in the training process."""
        ...


@runtime_checkable
class BinsOnDevice(Protocol):
    """A transform that makes frames of events on the device that uses them."""

    def on_device(self, images: Tensor, packed: Any, device: torch.device | str) -> Tensor:
        """Complete a batch, in the training process.

        Args:
            images: as the transform returned them.
            packed: likewise.
            device: of the training.

        Returns:
            Frames float32 [B, T, C, H, W], normalised.
        """
        ...


@runtime_checkable
class SendsPixels(Protocol):
    """A transform that can leave the normalisation of images to the device that uses them."""

    def send_pixels(self) -> "PixelScaling | None":
        """Return uint8 images from now on, a quarter of the bytes; what is returned here normalises them.

        None, and nothing changes, where normalised images are changed further.
        """
        ...


@runtime_checkable
class AugmentsOnDevice(Protocol):
    """A transform that can leave crop, flip and cutout to the device; it does after `send_pixels` alone."""

    def device_augmentation(self, packed: Any) -> "PixelAugmentation | None":
        """Return what is left to do to the images of a batch, in the training process; None for augmented ones.

        Args:
            packed: as the transform returned it.
        """
        ...


@runtime_checkable
class KnowsStepTime(Protocol):
    """A transform whose samples have time slices."""

    def step_ms(self) -> float | None:
        """Return the length of a time slice in milliseconds; None if samples differ in it."""
        ...


@runtime_checkable
class DrawsRows(Protocol):
    """A transform whose samples are drawn for reports as it sees them; others are drawn as they are stored."""

    def pictures(self, rows: Sequence[int]) -> list[Tensor]:
        """Draw samples, uint8 [C, H, W] each.

        Args:
            rows: positions in the split.
        """
        ...
