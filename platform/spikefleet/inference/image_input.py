"""Reads images (files, PIL images or arrays) as the pixels of a network's input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spikefleet.errors import UserError
from spikefleet_pipelines.store.decode import decode_rgb, rgb_of
from spikefleet_pipelines.store.image_files import read_image_file

Pixels = NDArray[np.uint8]
"""uint8 `[C, H, W]`."""

ImageInput = str | Path | Image.Image | NDArray[np.uint8]
"""An image file, a PIL image, or uint8 pixels `[H, W]`, `[H, W, C]` or `[C, H, W]` with C = 1 or 3."""


def read_image(image: ImageInput) -> Pixels:
    """Reads an image by the decoder of the stores, rotated as its EXIF orientation says.

    Args:
        image: a file, a PIL image or an array.

    Returns:
        Pixels, uint8 `[C, H, W]` with C = 3, or C = 1 of an array that has no more.

    Raises:
        UserError: the file cannot be read, or the array has another shape or type; the message names the file.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    try:
        return rgb_of(image).numpy() if isinstance(image, Image.Image) else read_unnamed(Path(image))
    except ValueError as error:
        named = "the PIL image" if isinstance(image, Image.Image) else f"image {image}"
        raise UserError(f"{named} cannot be read: {error}") from None


def read_unnamed(path: Path) -> Pixels:
    """Reads a file as `read_image` does. Raises ValueError with the reason alone if it cannot be read."""
    return decode_rgb(np.frombuffer(read_image_file(path), np.uint8)).numpy()


def _from_array(pixels: NDArray[np.uint8]) -> Pixels:
    if pixels.dtype == np.uint8 and pixels.size:
        if pixels.ndim == 2:
            return pixels[None]
        if pixels.ndim == 3 and pixels.shape[-1] in (1, 3):
            return pixels.transpose(2, 0, 1)
        if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
            return pixels
    raise UserError(
        f"image array of type {pixels.dtype} and shape {list(pixels.shape)}: expected uint8 pixels [H, W], [H, W, C] "
        "or [C, H, W] with C = 1 or 3"
    )
