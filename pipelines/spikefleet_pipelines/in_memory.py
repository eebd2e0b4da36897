"""Batches of images in memory, transformed as in evaluation, without a store."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.loading import Batch
from spikefleet_pipelines.store.annotations import Annotations
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_pipelines.transforms.classification import resize

# Of red, green and blue in a grey pixel, in parts of 2^16: ITU-R 601-2, rounded as Pillow does.
_LUMA = np.array([19595, 38470, 7471], np.uint32)


def with_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Convert an image [C, H, W] of 1 or 3 channels to `channels` channels: grey or RGB."""
    if channels == 1 and len(pixels) == 3:
        grey = np.tensordot(_LUMA, pixels.astype(np.uint32), 1) + np.uint32(1 << 15) >> 16
        return grey.astype(np.uint8)[None]
    return np.repeat(pixels, 3, axis=0) if channels == 3 and len(pixels) == 1 else pixels


def resized(pixels: NDArray[np.uint8], size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Resize an image [C, H, W] to (height, width), as transforms do; None keeps the size."""
    if size is None:
        return pixels
    return resize(pixels if pixels.flags.writeable else pixels.copy(), *size)  # torch warns of what it cannot write to


def image_batch(images: NDArray[np.uint8], transform: BatchTransformConfig, channels: int) -> Batch:
    """Transform images as in evaluation.

    Args:
        images: uint8 [B, C, H, W].
        transform: config of any kind.
        channels: C, the input channels of the network.

    Returns:
        A batch without targets: class -1, or no objects.

    Raises:
        ValueError: the images have another type or shape, or do not fit the transform.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images: type and shape are {images.dtype} {list(images.shape)}, expected uint8 [B, {channels}, H, W]"
        )
    rows = np.arange(len(images))
    built = transform.build(_ImagesInMemory(images), train=False, seed=0)
    pixels, packed = built(rows, epoch=0)
    return Batch(pixels, built.unpack(packed), torch.from_numpy(rows), len(rows))


class _ImagesInMemory:
    """`Rows` of a batch of images."""

    name = location = "memory"
    class_names: tuple[str, ...] = ()

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._images = images
        _, channels, height, width = images.shape
        self.image_shape = channels, height, width
        self.labels = np.full(len(images), -1, np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._images[rows]

    def views(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return list(self._images[rows])

    def image(self, row: int) -> Tensor:
        return torch.from_numpy(self._images[row].copy())

    def annotations(self, row: int) -> Annotations:
        none, (_, height, width) = np.empty(0, np.int64), self.image_shape
        return Annotations(row, height, width, np.empty((0, 4)), none, none, none.astype(bool), np.empty(0), none)
