"""The last step of every transform: pixels become normalised floats."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.shared_batches import empty_batch
from spikefleet_pipelines.transforms.normalise_config import Normalisation

CACHED_VALUES = 1 << 17
"""Number of values that stay in the processor's cache between two operations."""


class FloatStage:
    """Normalisation: uint8 [B, C, H, W] -> float32 [B, C, H, W], (pixel / 255 - mean) / std."""

    def __init__(self, normalise: Normalisation) -> None:
        # As one multiplication and one addition.
        mean = np.array(normalise.mean, np.float32).reshape(-1, 1, 1)
        std = np.array(normalise.std, np.float32).reshape(-1, 1, 1)
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._deferred = False

    def defer(self) -> "PixelScaling":
        """Return pixels as they are from now on; what is returned here normalises them, to the same bits."""
        self._deferred = True
        return PixelScaling(torch.from_numpy(self._scale), torch.from_numpy(self._shift))

    def pixels(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Allocate the pixels of a batch; they are the batch where the normalisation is deferred."""
        return empty_batch(shape, torch.uint8).numpy() if self._deferred else np.empty(shape, np.uint8)

    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """Normalise a batch, unless that is deferred."""
        if self._deferred:
            return torch.from_numpy(images)
        tensor = empty_batch(images.shape)
        batch = tensor.numpy()
        together = max(1, CACHED_VALUES // max(1, images[:1].size))
        for start in range(0, len(images), together):
            part = batch[start : start + together]
            np.multiply(images[start : start + together], self._scale, out=part)
            part += self._shift
        return tensor


class PixelScaling:
    """Pixels to normalised floats, on the device where they are: one multiplication and one addition.

    Args:
        scale: float32 [C, 1, 1].
        shift: likewise.
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self._scale, self._shift = scale, shift
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise pixels uint8 [B, C, H, W], in their memory layout."""
        if pixels.device not in self._there:
            self._there[pixels.device] = self._scale.to(pixels.device), self._shift.to(pixels.device)
        scale, shift = self._there[pixels.device]
        return pixels.to(torch.float32).mul_(scale).add_(shift)
