"""Average precision of detections in recordings, written from the definitions: loops over boxes, no library.

The reference of `spikefleet.tasks.event_metrics`. Slow, for tests.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from spikefleet.tasks.event_metrics import Protocol


class Box(NamedTuple):
    """A label, or a detection with its score."""

    time: int
    place: list[float]
    of: int
    score: float


Image = tuple[list[Box], list[Box]]


def protocol_images(recordings: Sequence[tuple[list[Box], list[Box]]], by: Protocol, classes: int) -> list[Image]:
    """Labels and detections of each label time that counts."""
    images: list[Image] = []
    for truth, found in recordings:
        truth, found = ([box for box in boxes if _counts(box, by) and box.of < classes] for boxes in (truth, found))
        for time in sorted({box.time for box in truth}):
            here = [box for box in truth if box.time == time]
            images.append((here, [box for box in found if abs(box.time - time) <= by.tolerance_us]))
    return images


def _counts(box: Box, by: Protocol) -> bool:
    _, _, width, height = box.place
    if by.skip_us is not None and box.time <= by.skip_us:
        return False
    return width * width + height * height >= by.diagonal**2 and min(width, height) >= by.side


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes x y width height."""
    sides = [
        max(0.0, min(one[axis] + one[axis + 2], other[axis] + other[axis + 2]) - max(one[axis], other[axis]))
        for axis in (0, 1)
    ]
    shared = sides[0] * sides[1]
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def average_precision(images: Sequence[Image], of: int, iou: float) -> float:
    """Mean over recall 0, 0.01, ..., 1 of the best precision at that recall or more, of one class."""
    decided: list[tuple[float, bool]] = []
    objects = 0
    for truth, found in images:
        free = [box for box in truth if box.of == of]
        objects += len(free)
        best_first = sorted((box for box in found if box.of == of), key=lambda box: -box.score)[:100]
        for box in best_first:
            overlaps = [overlap(box.place, other.place) for other in free]
            best = max(overlaps, default=0.0)
            decided.append((box.score, best >= iou))
            if best >= iou:
                del free[len(overlaps) - 1 - overlaps[::-1].index(best)]
    recalls, precisions, right = [], [], 0
    for count, (_, is_right) in enumerate(sorted(decided, key=lambda one: -one[0]), start=1):
        right += is_right
        recalls.append(right / objects)
        precisions.append(right / count)
    points = []
    for point in range(101):
        # COCO's recalls are these floating-point numbers: 0.01 * 35 is more than 35 / 100
        first = bisect.bisect_left(recalls, 0.01 * point)
        points.append(max(precisions[first:], default=0.0))
    return sum(points) / len(points)
