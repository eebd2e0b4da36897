"""Reads images (files, PIL images or arrays) as the pixels of a network's input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from spikefleet.errors import UserError

Pixels = NDArray[np.uint8]
"""uint8 `[C, H, W]`."""

ImageInput = str | Path | Image.Image | NDArray[np.uint8]
"""An image file, a PIL image, or uint8 pixels `[H, W]`, `[H, W, C]` or `[C, H, W]` with C = 1 or 3."""

_UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)


def check_image_file(file: Path) -> None:
    """Reads the header of an image file. Raises UserError if it is not an image."""
    try:
        with Image.open(file):
            pass
    except _UNREADABLE as error:
        raise UserError(f"image {file} cannot be read: {error}") from None


def read_image(image: ImageInput, channels: int, size: tuple[int, int] | None) -> Pixels:
    """Reads an image, rotated as its EXIF orientation says.

    Args:
        image: a file, a PIL image or an array.
        channels: 1 or 3; the image is converted to grey or RGB.
        size: (H, W) in pixels to resize to; None keeps the size.

    Returns:
        Pixels, uint8 `[C, H, W]`.

    Raises:
        UserError: the file cannot be read, or the array has another shape or type.
    """
    opened = _opened(image)
    mode = "L" if channels == 1 else "RGB"
    if size is not None and opened.size != (size[1], size[0]):
        opened = opened.convert(mode).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(opened.convert(mode), dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def _opened(image: ImageInput) -> Image.Image:
    if isinstance(image, np.ndarray):
        return _from_array(image)
    try:
        if isinstance(image, Image.Image):
            return ImageOps.exif_transpose(image)
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened)
    except _UNREADABLE as error:
        named = "the PIL image" if isinstance(image, Image.Image) else f"image {image}"
        raise UserError(f"{named} cannot be read: {error}") from None


def _from_array(pixels: NDArray[np.uint8]) -> Image.Image:
    if pixels.dtype == np.uint8:
        if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[-1] not in (1, 3):
            pixels = pixels.transpose(1, 2, 0)
        if pixels.ndim == 3 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        if pixels.size and (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)):
            return Image.fromarray(np.ascontiguousarray(pixels))
    raise UserError(
        f"image array of type {pixels.dtype} and shape {list(pixels.shape)}: expected uint8 pixels [H, W], [H, W, C] "
        "or [C, H, W] with C = 1 or 3"
    )
