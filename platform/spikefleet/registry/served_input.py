"""What a served network takes for images: integers from 0 to 255, whatever they come in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet.errors import UserError

EXPECTED = (
    "images [B, C, H, W]: integers (uint8) from 0 to 255, not floats; multiply floats from 0 to 1 by 255 and round "
    "them; images are resized to the size that the network was trained with, and may differ in size"
)
"""What a served network expects; stands in the description and the metadata of a registered version."""


def batches(given: Any, channels: int, size: tuple[int, int] | None) -> Iterator[NDArray[np.uint8]]:
    """Iterates over the images of a request, in batches of equal size.

    Args:
        given: an array, or nested lists as JSON has them; of any integer type.
        channels: C, the input channels of the network.
        size: (height, width) to resize to; None keeps the sizes.

    Yields:
        uint8 `[B, C, H, W]`: all images at once where their sizes are equal, else one after another.

    Raises:
        UserError: a value is no integer from 0 to 255, or an image has another form.
    """
    from spikefleet_pipelines.in_memory import resized  # imports torch, which searching the registry does not need

    images = [resized(_image(one, position, channels), size) for position, one in enumerate(_rows(given))]
    if len({image.shape for image in images}) == 1:
        yield np.stack(images)
    else:
        yield from (image[None] for image in images)


def _rows(given: Any) -> Any:
    if isinstance(given, list) or (isinstance(given, np.ndarray) and given.ndim):
        if len(given):
            return given
        raise UserError(f"found no image; expected {EXPECTED}")
    raise UserError(f"found {type(given).__name__}; expected {EXPECTED}")


def _image(one: Any, position: int, channels: int) -> NDArray[np.uint8]:
    try:
        values = np.asarray(one.tolist() if isinstance(one, np.ndarray) and one.dtype == object else one)
    except ValueError:  # lists of different lengths
        raise UserError(f"image {position} has rows of different lengths; expected {EXPECTED}") from None
    if values.ndim != 3 or len(values) != channels or not values.size:
        raise UserError(f"image {position} has shape {list(values.shape)}, expected [{channels}, H, W]; {EXPECTED}")
    if not np.issubdtype(values.dtype, np.integer):
        raise UserError(f"image {position} has values of type {values.dtype}; expected {EXPECTED}")
    if values.min() < 0 or values.max() > 255:
        raise UserError(
            f"image {position} has values from {values.min()} to {values.max()}, expected 0 to 255; {EXPECTED}"
        )
    return values.astype(np.uint8)
