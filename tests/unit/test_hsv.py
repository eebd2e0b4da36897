"""Jitter of hue, saturation and value: that of the standard library's colorsys, to a step of a pixel's value."""

import colorsys

import numpy as np
import pytest

from spikefleet_pipelines.transforms.hsv import jitter_hsv


@pytest.mark.parametrize(
    "change", [(0.0, 1.0, 1.0), (0.1, 1.3, 0.8), (-0.3, 0.4, 1.4), (0.0, 1.7, 0.6), (0.5, 1.0, 1.0)]
)
def test_jitter_is_that_of_colorsys(change: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 20, 30), np.uint8)
    image[:, 0] = rng.integers(0, 256, 30)  # greys
    image[:, 1, :10] = 0
    image[:2, 2] = 200  # ties
    expected = np.empty_like(image)
    hue, saturation, value = change
    for y in range(20):
        for x in range(30):
            h, s, v = colorsys.rgb_to_hsv(*(image[:, y, x] / 255))
            rgb = colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), min(1, v * value))
            expected[:, y, x] = np.rint(np.array(rgb) * 255)
    found = image.copy()
    jitter_hsv(found, *change)
    assert np.abs(found.astype(int) - expected).max() <= 1
    if change == (0.0, 1.0, 1.0):
        assert np.array_equal(found, image)
