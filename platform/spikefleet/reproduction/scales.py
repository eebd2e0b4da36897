"""The scales at which a table can be reproduced."""

from __future__ import annotations

from typing import Literal

Scale = Literal["digits", "digits_300", "fashion_mnist_10k", "fashion_mnist", "scenes", "saccade_scenes", "full"]
"""full: the paper's networks and data. The others run on two CPU cores: narrow networks on small real data.

digits_300 and fashion_mnist_10k train on so many images, so that accuracies are further from their ceiling, where
networks can differ. scenes has images of real digits with boxes, and saccade_scenes recordings of moving ones.
"""

SCALES: tuple[Scale, ...] = (
    "digits",
    "digits_300",
    "fashion_mnist_10k",
    "fashion_mnist",
    "scenes",
    "saccade_scenes",
    "full",
)
"""All scales, smaller ones first."""

FEW_IMAGES: tuple[Scale, ...] = ("fashion_mnist_10k", "digits_300")
"""Scales further from the ceiling of accuracy; first the one with less noise, by its 10,000 test images."""

RENAMED: dict[str, Scale] = {"digits": "scenes"}
"""New names of scales, for the tables of detection, which had them under the old ones."""
