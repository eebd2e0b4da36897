"""Digits as an event camera sees them move: enlarged, blurred by the lens, and shifted by parts of a pixel.

All arithmetic is sums and products in a fixed order, without matrix products, whose order of summation differs between
machines.
"""

import numpy as np
from numpy.typing import NDArray

BLUR = 0.7  # standard deviation of the lens's blur in pixels
_BLUR_RADIUS = 3
_CELLS = 8  # side of scikit-learn's digits


def enlarge(
    digits: NDArray[np.uint8], side: NDArray[np.float64], place: NDArray[np.float64], shape: tuple[int, int]
) -> NDArray[np.float32]:
    """Enlarge digits of 8x8 by cubic convolution, each to its place on a black ground, and blur them.

    The kernel is that of Keys, "Cubic convolution interpolation for digital image processing", IEEE Transactions on
    Acoustics, Speech, and Signal Processing 29(6), 1981.

    Args:
        digits: uint8 [B, 8, 8], 255 is white.
        side: of each digit in pixels, [B].
        place: its top and left, in pixels, [B, 2].
        shape: height and width of the results.

    Returns:
        Reflectances 0 to 1, float32 [B, H, W].
    """
    values = digits.astype(np.float64) / 255
    rows, columns = (_weights(place[:, axis], side, shape[axis]) for axis in (0, 1))
    high = sum((rows[:, :, cell, None] * values[:, cell, None, :] for cell in range(_CELLS)), np.zeros(()))
    full = sum((high[:, :, cell, None] * columns[:, None, :, cell] for cell in range(_CELLS)), np.zeros(()))
    return np.clip(_blurred(full), 0, 1).astype(np.float32)


def shifted(
    images: NDArray[np.float32], margin: int, by: tuple[float, float], shape: tuple[int, int]
) -> NDArray[np.float32]:
    """Cut windows out of images, moved by parts of a pixel with bilinear interpolation.

    Args:
        images: float32 [B, H + 2 * margin, W + 2 * margin] or larger.
        margin: rows and columns around the windows of an image that has not moved.
        by: how far the images have moved down and right, in pixels; each at most `margin` either way.
        shape: height and width of the windows, H and W.

    Returns:
        float32 [B, H, W].
    """
    (top, down), (left, right) = (_split(margin - way) for way in by)
    rows = images[:, top : top + shape[0]]
    if down:
        rows = rows + np.float32(down) * (images[:, top + 1 : top + 1 + shape[0]] - rows)
    window = rows[:, :, left : left + shape[1]]
    if right:
        window = window + np.float32(right) * (rows[:, :, left + 1 : left + 1 + shape[1]] - window)
    return window


def along(corners: NDArray[np.float64], part: float) -> tuple[float, float]:
    """Return the point of a polygonal path of equal times from corner to corner.

    Args:
        corners: [n, 2].
        part: of the whole time, 0 to 1.
    """
    sides = len(corners) - 1
    side = min(int(part * sides), sides - 1)
    one, other = corners[side], corners[side + 1]
    point = one + (other - one) * (part * sides - side)
    return float(point[0]), float(point[1])


def _split(value: float) -> tuple[int, float]:
    whole = int(np.floor(value))
    return whole, value - whole


def _weights(place: NDArray[np.float64], side: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Return the weight of each cell of a digit in each pixel, [B, length, 8]; outside the digit there is black."""
    cell = (np.arange(length) - place[:, None] + 0.5) * _CELLS / side[:, None] - 0.5
    way = np.abs(cell[:, :, None] - np.arange(_CELLS))
    near = (1.5 * way - 2.5) * way * way + 1
    far = ((-0.5 * way + 2.5) * way - 4) * way + 2
    return np.where(way < 1, near, np.where(way < 2, far, 0))


def _blurred(images: NDArray[np.float64]) -> NDArray[np.float64]:
    offsets = np.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    kernel = np.exp(-0.5 * (offsets / BLUR) ** 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[axis] = (_BLUR_RADIUS, _BLUR_RADIUS)
        padded, length = np.pad(images, padding), images.shape[axis]
        images = np.zeros_like(images)
        for tap, weight in enumerate(kernel):
            window = [slice(None)] * 3
            window[axis] = slice(tap, tap + length)
            images += weight * padded[tuple(window)]
    return images
