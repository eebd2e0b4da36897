"""Crop, flip and cutout of stored images on the device that trains on them, to the bits of `classification.py`.

Loaders send images as they are stored, with a few numbers for each, which are functions of (seed, epoch, row). All is
computed for a whole batch, and nothing waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PixelAugmentation(NamedTuple):
    """What is left to do to the images of a batch."""

    draws: Tensor
    """int32 [B, 5]: top and left of the crop, negative in the padding; 1 to flip, else 0; top and left of the cutout,
    negative above and left of the image. Without cutout [B, 3]."""
    cutout: int
    """Side of the square that is erased; 0 erases nothing."""

    def to(self, device: torch.device | str) -> "PixelAugmentation":
        """Copy the numbers to a device; non-blocking from page-locked memory."""
        return self._replace(draws=self.draws.to(device, non_blocking=True))

    def pin_memory(self) -> "PixelAugmentation":
        """Copy the numbers to page-locked memory."""
        return self._replace(draws=self.draws.pin_memory())

    def part(self, start: int, stop: int) -> "PixelAugmentation":
        """The same for images `start` to `stop` of the batch."""
        return self._replace(draws=self.draws[start:stop])

    def moved(self, pixels: Tensor) -> Tensor:
        """Crop images, surrounded by zeros, to their size, and flip some.

        Args:
            pixels: uint8 [B, C, H, W], on the device of the numbers.

        Returns:
            Other memory, contiguous.
        """
        channels, height, width = pixels.shape[1:]
        top, left, flipped = self.draws[:, :3, None].unbind(1)
        rows, columns = (torch.arange(side, device=pixels.device) for side in (height, width))
        rows = rows + top
        columns = torch.where(flipped == 1, width - 1 - columns, columns) + left
        inside = _within(rows, height)[:, None, :, None] & _within(columns, width)[:, None, None, :]
        places = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
        found = pixels.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, channels, -1))
        return found.unflatten(2, (height, width)).mul_(inside)

    def erased(self, images: Tensor) -> Tensor:
        """Multiply the squares of cutout by zero, in place.

        Args:
            images: float32 [B, C, H, W], normalised, on the device of the numbers.
        """
        if not self.cutout:
            return images
        top, left = self.draws[:, 3:, None].unbind(1)
        height, width = images.shape[-2:]
        rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
        inside = [_within(positions, self.cutout) for positions in (rows - top, columns - left)]
        return images.mul_(~(inside[0][:, None, :, None] & inside[1][:, None, None, :]))


def _within(positions: Tensor, length: int) -> Tensor:
    return (positions >= 0) & (positions < length)
