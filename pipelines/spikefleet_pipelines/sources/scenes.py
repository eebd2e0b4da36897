"""Scenes of handwritten digits: detection data without download, composed of scikit-learn's 1,797 real digits.

A scene is a noisy coloured background with one to five digits of different sizes and colours, or with none in one
scene of twenty. The digits of train, val and test scenes are different images: those of the `digits` source's splits.
Category ids have gaps and do not start at 0, as in COCO, so that confusing ids with class indices shows up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.counter_random import Draw, uniform
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions
from spikefleet_pipelines.sources.scenes_config import ScenesOptions
from spikefleet_pipelines.sources.source import Progress
from spikefleet_pipelines.store.annotations import AnnotationColumns
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.writer import StoreWriter

CATEGORY_IDS = tuple(11 * (digit + 1) for digit in range(10))

_SHOWN_EVERY = 64
_SPLITS = ("train", "val", "test")
_EMPTY = 0.05
_LEAST_SIDE, _LARGEST_SIDE = 12, 48
_ATTEMPTS = 8
# Maximum overlap of two objects, as a fraction of the smaller box.
_OVERLAP = 0.2
# Strokes fade at their edges; a box encloses the pixels of at least this opacity.
_VISIBLE = 0.3
_NUMBERS_PER_OBJECT = 8 + 2 * _ATTEMPTS
_FRAGMENTS = 3
_FRAGMENT_SIDES = (6, 16)
_NUMBERS_PER_FRAGMENT = 10


class _Objects(NamedTuple):
    boxes: list[tuple[int, int, int, int]]
    digits: list[int]


@dataclass(frozen=True)
class SceneContents:
    """Digits for the scenes, which are composed when the store is written."""

    options: ScenesOptions
    seed: int
    digits: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]
    class_names: tuple[str, ...] = tuple(map(str, range(10)))
    category_ids: tuple[int, ...] = CATEGORY_IDS
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    @property
    def image(self) -> ImageFormat:
        """Format of the images."""
        return ImageFormat(encoding="raw", shape=(3, self.options.size, self.options.size))

    def write(self, writer: StoreWriter, progress: Progress, parallel: int | None) -> None:
        """Compose and write all splits; see `Contents`."""
        counts = {split: getattr(self.options, split) for split in _SPLITS}
        side, done, objects = self.options.size, 0, 0
        at_once = max(1, writer.shard_bytes // (3 * side * side))
        for split, count in counts.items():
            for start in range(0, count, at_once):
                images = np.empty((min(count - start, at_once), 3, side, side), np.uint8)
                found: list[_Objects] = []
                for place in range(len(images)):
                    images[place], one = self.scene(split, start + place)
                    found.append(one)
                    done += 1
                    if done % _SHOWN_EVERY == 0 or done == sum(counts.values()):
                        progress(done, sum(counts.values()))
                columns = _columns(found, 100_000_000 * _SPLITS.index(split) + start, objects + 1, side)
                writer.write_images(split, images, columns)
                objects += len(columns.ids)

    def scene(self, split: str, number: int) -> tuple[NDArray[np.uint8], _Objects]:
        """Compose a scene, a pure function of the seed.

        Args:
            split: name of the split.
            number: of the scene, from 0.

        Returns:
            uint8 [3, side, side], and its objects.
        """
        images, labels = self.digits[split]
        side, most = self.options.size, self.options.objects
        needed = 2 + _FRAGMENTS * _NUMBERS_PER_FRAGMENT + most * _NUMBERS_PER_OBJECT
        draws = uniform(self.seed, _SPLITS.index(split), number, Draw.SCENE + np.arange(needed))
        canvas = self._background(split, number)
        count = 0 if draws[0] < _EMPTY else 1 + int(draws[1] * most)
        fragments, objects = np.split(draws[2:], [_FRAGMENTS * _NUMBERS_PER_FRAGMENT])
        for own in fragments.reshape(_FRAGMENTS, _NUMBERS_PER_FRAGMENT):
            _strew(canvas, images[int(own[0] * len(labels)), 0], own[1:])
        boxes: list[tuple[int, int, int, int]] = []
        digits: list[int] = []
        for own in objects.reshape(most, _NUMBERS_PER_OBJECT)[:count]:
            source = int(own[0] * len(labels))
            # Sizes are uniform on a logarithmic scale: as many small digits as large ones.
            length = round(_LEAST_SIDE * (_LARGEST_SIDE / _LEAST_SIDE) ** float(own[1]))
            opacity = enlarge(images[source, 0], length)
            rows, columns = np.flatnonzero((opacity >= _VISIBLE).any(1)), np.flatnonzero((opacity >= _VISIBLE).any(0))
            place = _free_place(own[8:], side - length, (rows, columns), boxes)
            if place is None:
                continue
            top, left = place
            _paint(canvas, opacity, top, left, own[2:6])
            boxes.append((left + int(columns[0]), top + int(rows[0]), _extent(columns), _extent(rows)))
            digits.append(int(labels[source]))
        return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), _Objects(boxes, digits)

    def _background(self, split: str, number: int) -> NDArray[np.float64]:
        """Draw smooth changes of colour with fine noise, [3, side, side]."""
        side = self.options.size
        cells = side // 8
        # Noise is drawn for a quarter of the pixels and mirrored for the others: the same statistics for less work.
        half = side // 2
        counts = 3 * 64, 3 * half * half
        draws = uniform(self.seed, _SPLITS.index(split), number, Draw.SCENE_NOISE + np.arange(sum(counts)))
        coarse = draws[: counts[0]].reshape(3, 8, 8)
        slow = np.stack([_interpolate(plane, 8 * cells) for plane in coarse])
        noise = draws[counts[0] :].reshape(3, half, half)
        fine = np.empty((3, side, side))
        fine[:, ::2, ::2], fine[:, 1::2, 1::2] = noise, noise[:, ::-1]
        fine[:, ::2, 1::2], fine[:, 1::2, ::2] = noise[:, :, ::-1], noise[:, ::-1, ::-1]
        return 20 + 100 * slow + 30 * (fine - 0.5)


def _strew(canvas: NDArray[np.float64], digit: NDArray[np.uint8], draws: NDArray[np.float64]) -> None:
    """Paint a quarter of a digit, from which the digit cannot be recognised."""
    row, column = (int(draw * 5) for draw in draws[:2])
    length = round(_FRAGMENT_SIDES[0] + (_FRAGMENT_SIDES[1] - _FRAGMENT_SIDES[0]) * float(draws[2]))
    top, left = (int(draw * (canvas.shape[-1] - length + 1)) for draw in draws[3:5])
    _paint(canvas, enlarge(digit[row : row + 4, column : column + 4], length), top, left, draws[5:9])


def _paint(
    canvas: NDArray[np.float64], opacity: NDArray[np.float64], top: int, left: int, draws: NDArray[np.float64]
) -> None:
    """Blend a colour into a square of the image."""
    colour = 150 + 105 * draws[:3]
    colour[int(draws[3] * 3)] = 255  # never grey and dim at once: the background is
    window = canvas[:, top : top + opacity.shape[0], left : left + opacity.shape[1]]
    window += opacity * (colour[:, None, None] - window)


def enlarge(digit: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """Interpolate a digit, or a square part of one, to opacities 0 to 1, [side, side]."""
    return _interpolate(digit.astype(np.float64) / 255, side)


def _extent(indices: NDArray[np.int64]) -> int:
    """Number of pixels from the first index to the last."""
    return int(indices[-1] - indices[0]) + 1


def _interpolate(values: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Interpolate bilinearly with the same arithmetic on every machine: products and sums of two, no matrix product."""
    length = values.shape[-1]
    place = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
    low = np.minimum(place.astype(np.int64), length - 2)
    part = place - low
    rows = values[low] * (1 - part[:, None]) + values[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _free_place(
    draws: NDArray[np.float64],
    limit: int,
    extent: tuple[NDArray[np.int64], NDArray[np.int64]],
    boxes: list[tuple[int, int, int, int]],
) -> tuple[int, int] | None:
    """Find top and left, 0 to `limit`, of a digit with visible rows and columns `extent`; None if nothing is free."""
    rows, columns = extent
    for down, right in draws.reshape(_ATTEMPTS, 2):
        top, left = int(down * (limit + 1)), int(right * (limit + 1))
        box = left + int(columns[0]), top + int(rows[0]), _extent(columns), _extent(rows)
        if all(_overlap(box, other) <= _OVERLAP for other in boxes):
            return top, left
    return None


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Intersection area as a fraction of the smaller box."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height) / min(one[2] * one[3], other[2] * other[3])


def _columns(scenes: list[_Objects], first_image_id: int, first_id: int, side: int) -> AnnotationColumns:
    count, counts = len(scenes), [len(scene.boxes) for scene in scenes]
    boxes = np.array([box for scene in scenes for box in scene.boxes], np.float64).reshape(-1, 4)
    digits = [digit for scene in scenes for digit in scene.digits]
    return AnnotationColumns(
        first_image_id + np.arange(1, count + 1),
        np.full(count, side, np.int32),
        np.full(count, side, np.int32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        boxes,
        np.array([CATEGORY_IDS[digit] for digit in digits], np.int64),
        np.zeros(len(digits), np.bool_),
        boxes[:, 2] * boxes[:, 3],
        first_id + np.arange(len(digits)),
    )


def read_scenes(root: Path, options: ScenesOptions, seed: int) -> SceneContents:
    """Prepare the digits; the seed determines the digits of each split and the content of the scenes."""
    return SceneContents(options, seed, read_digits(None, DigitsOptions(), seed).splits)
