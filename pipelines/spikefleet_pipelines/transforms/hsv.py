"""Jitter of hue, saturation and value (Smith, "Color gamut transform pairs", SIGGRAPH 1978)."""

import numpy as np
from numpy.typing import NDArray

_TOGETHER = 1 << 14


def jitter_hsv(image: NDArray[np.uint8], hue: float, saturation: float, value: float) -> None:
    """Change hue, saturation and value of an image in place.

    Args:
        image: uint8 [3, H, W]; changed.
        hue: added, as a fraction of the colour circle.
        saturation: factor; saturation is clipped to 0 to 1.
        value: factor; values are clipped to 0 to 255.
    """
    pixels = image.reshape(3, -1)
    # In chunks that stay in the processor's cache between the operations.
    for start in range(0, pixels.shape[1], _TOGETHER):
        part = pixels[:, start : start + _TOGETHER]
        part[:] = _jittered(part.astype(np.float32), hue, np.float32(saturation), np.float32(value))


def _jittered(rgb: NDArray[np.float32], hue: float, saturation: np.float32, value: np.float32) -> NDArray[np.float32]:
    most = np.maximum(np.maximum(rgb[0], rgb[1]), rgb[2])
    chroma = most - np.minimum(np.minimum(rgb[0], rgb[1]), rgb[2])
    safe = np.where(chroma == 0, np.float32(1), chroma)
    # A channel is `value - chroma * below`: below is 0 for the largest channel and 1 for the smallest.
    below = most - rgb
    below /= safe
    if hue:
        below = _turned(below, np.float32(6 * hue))
    new_most = np.minimum(most * value, np.float32(255))
    # chroma / most is the saturation; black has none.
    new_chroma = np.minimum(chroma * saturation, most)
    new_chroma *= new_most
    new_chroma /= np.where(most == 0, np.float32(1), most)
    below *= new_chroma
    np.subtract(new_most, below, out=below)
    return np.rint(below, out=below)


def _turned(below: NDArray[np.float32], sixths: np.float32) -> NDArray[np.float32]:
    """Rotate the hue by `sixths` sixths of the colour circle."""
    red, green, blue = below
    # Red is 0, green 2 and blue 4; the largest channel gives the sector, the two others the position in it.
    angle = np.where(
        red == 0, blue - green, np.where(green == 0, np.float32(2) + red - blue, np.float32(4) + green - red)
    )
    angle += sixths
    if abs(sixths) > 1:
        angle -= np.float32(6) * np.floor((angle + np.float32(1)) * np.float32(1 / 6))
    # `below` falls from 1 to 0 between two sixths and one sixth away from the channel's own hue, and a distance x of up
    # to 6 sixths is 3 - |x - 3| on the circle. Together: ||angle - place| - 3| - 1, clipped to 0 to 1.
    turned = np.empty_like(below)
    for distance, place in zip(turned, (3, -1, 1), strict=True):
        np.subtract(angle, np.float32(place), out=distance)
        np.abs(distance, out=distance)
        distance -= np.float32(3)
        np.abs(distance, out=distance)
        distance -= np.float32(1)
        np.maximum(distance, np.float32(0), out=distance)
        np.minimum(distance, np.float32(1), out=distance)
    return turned
