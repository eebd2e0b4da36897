"""The last step of every transform: pixels become normalised floats, in shared memory in loader processes."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

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

    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """Normalise a batch, unless that is deferred."""
        if self._deferred:
            pixels = empty_batch(images.shape, torch.uint8)
            pixels.numpy()[...] = images
            return pixels
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


def empty_batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate a batch, in shared memory in a loader process."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    # In a loader process: in shared memory, as torch's own collate function does, so that sending it copies nothing.
    storage = torch.UntypedStorage._new_shared(dtype.itemsize * math.prod(shape))
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)
