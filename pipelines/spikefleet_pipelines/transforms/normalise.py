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

    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """Normalise a batch."""
        tensor = empty_batch(images.shape)
        batch = tensor.numpy()
        together = max(1, CACHED_VALUES // max(1, images[:1].size))
        for start in range(0, len(images), together):
            part = batch[start : start + together]
            np.multiply(images[start : start + together], self._scale, out=part)
            part += self._shift
        return tensor


def empty_batch(shape: tuple[int, ...]) -> Tensor:
    """Allocate a batch of float32, in shared memory in a loader process."""
    if get_worker_info() is None:
        return torch.empty(shape)
    # In a loader process: in shared memory, as torch's own collate function does, so that sending it copies nothing.
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))
    return torch.empty(0).set_(storage).view(shape)
