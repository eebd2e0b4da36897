"""Large images in overlapping tiles, and the boxes of the tiles merged.

An object in the overlap of two tiles is found in both, and one on the border of a tile is found as the part that is
inside. Of each class, best score first: a box of another tile is the same object if the two overlap by more than the
network's own threshold (intersection over union), and the better box stays as it is; or if one of them is cut by the
border between the tiles and most of the smaller one is inside the other, and then they become the box around both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikefleet.errors import UserError
from spikefleet.inference.image_input import Pixels
from spikefleet.tasks.coco_metrics import FoundBoxes

_CUT_WITHIN = 2.0
"""A side of a box this near to the border between two tiles, in pixels of the image, may be cut by it."""
_MOST = 0.5
"""Part of the smaller box that is inside the other one."""

Window = tuple[int, int, int, int]
"""left, top, right, bottom of a tile in pixels of the image."""


@dataclass(frozen=True)
class Tiling:
    """Division of images into square tiles."""

    side: int
    """Of a tile, in pixels of the image."""
    overlap: float = 0.2
    """Of neighbouring tiles, at least this fraction of the side."""

    def __post_init__(self) -> None:
        if self.side < 1:
            raise UserError(f"--tile {self.side} must be at least 1 pixel")
        if not 0 <= self.overlap < 1:
            raise UserError(f"--overlap {self.overlap} must be at least 0 and less than 1")

    def windows(self, height: int, width: int) -> list[Window]:
        """The tiles of an image, by rows; one that is the image where it is not larger than a tile.

        All have the same size, and the last ones end at the borders of the image.
        """
        tall, wide = min(self.side, height), min(self.side, width)
        return [
            (left, top, left + wide, top + tall)
            for top in self._starts(height, tall)
            for left in self._starts(width, wide)
        ]

    def _starts(self, length: int, side: int) -> list[int]:
        # At least the fraction: 1e-9 for what binary fractions add to a whole number.
        step = max(1, side - math.ceil(self.overlap * side - 1e-9))
        count = -(-(length - side) // step)
        return [min(number * step, length - side) for number in range(count + 1)]


def cut_out(pixels: Pixels, window: Window) -> Pixels:
    """The pixels of a tile, uint8 `[C, h, w]`."""
    left, top, right, bottom = window
    return pixels[:, top:bottom, left:right]


def merge_tiles(
    windows: Sequence[Window], parts: Sequence[FoundBoxes], size: tuple[int, int], iou: float
) -> FoundBoxes:
    """The objects of an image from those of its tiles.

    Args:
        windows: the tiles.
        parts: the objects of each, in pixels of the tile.
        size: height and width of the image.
        iou: overlap above which two boxes are the same object.

    Returns:
        The objects, best first; those of a single tile as they are.
    """
    if len(windows) == 1:
        return parts[0]
    numbers = np.repeat(np.arange(len(parts)), [len(part.scores) for part in parts])
    moved = [part.boxes + np.array(window[:2] * 2) for part, window in zip(parts, windows, strict=True)]
    order = np.argsort(-np.concatenate([part.scores for part in parts]), kind="stable")
    boxes, numbers = np.concatenate(moved)[order], numbers[order]
    scores = np.concatenate([part.scores for part in parts])[order]
    labels = np.concatenate([part.labels for part in parts])[order]
    cut = _cut(boxes, np.array(windows)[numbers], size)
    kept: list[int] = []
    left = np.ones(len(boxes), bool)
    for best in range(len(boxes)):
        if not left[best]:
            continue
        kept.append(best)
        others = left & (labels == labels[best]) & (numbers != numbers[best])
        others[: best + 1] = False
        while len(joined := _join(boxes, best, np.flatnonzero(others & left), cut, iou)):
            left[joined] = False  # a box that has grown may reach parts in further tiles
    return FoundBoxes(boxes[kept], scores[kept], labels[kept])


def _join(
    boxes: NDArray[np.float64], best: int, others: NDArray[np.int64], cut: NDArray[np.bool_], iou: float
) -> NDArray[np.int64]:
    """Those of the other boxes that are the object of the best one, whose box grows where a part was cut."""
    if not len(others):
        return others
    inside, smaller, union = _overlaps(boxes[best], boxes[others])
    part = (cut[best] | cut[others]) & (inside > _MOST * smaller)
    same = inside > iou * union
    around = boxes[others[part]]
    if len(around):
        boxes[best, :2] = np.minimum(boxes[best, :2], around[:, :2].min(axis=0))
        boxes[best, 2:] = np.maximum(boxes[best, 2:], around[:, 2:].max(axis=0))
    return others[part | same]


def _overlaps(
    box: NDArray[np.float64], others: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Area of the intersection, of the smaller box, and of the union, `[n]` each."""
    corners = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inside = np.clip(corners[1] - corners[0], 0, None).prod(axis=1)
    area, areas = (box[2:] - box[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(axis=1)
    return inside, np.minimum(area, areas), area + areas - inside


def _cut(boxes: NDArray[np.float64], windows: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Whether a box reaches to a side of its tile that is not a side of the image, `[n]`."""
    height, width = size
    near = np.abs(boxes - windows) <= _CUT_WITHIN
    return (near & (windows != np.array([0, 0, width, height]))).any(axis=1)
