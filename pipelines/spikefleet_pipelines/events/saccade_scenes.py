"""Scenes of digits that move in front of a simulated event camera, with boxes over time: detection without download.

With pauses, all digits of a scene stop twice for some time while their boxes stay: the camera sees nothing but noise
then, so that only a detector with memory finds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.counter_random import Draw, uniform
from spikefleet_pipelines.events.label_effects import LabelEffects, label_effects_of
from spikefleet_pipelines.events.moving_images import enlarge, shifted
from spikefleet_pipelines.events.pixel_model import DEFAULT, PixelModel, record
from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.events.saccades import SPLITS, Digits, checked

SIDE = 96
_OBJECTS = 3
_LEAST_BRIGHTNESS = 0.5
_ATTEMPTS = 8
# Maximum overlap of the areas that two digits pass over, as a fraction of the smaller one.
_OVERLAP = 0.2
# Strokes fade at their edges; a box encloses the pixels of at least this reflectance, relative to the brightest.
_VISIBLE = 0.3
_PAD = 4  # around a digit: the blur
_NUMBERS_PER_OBJECT = 8 + 2 * _ATTEMPTS
_DURATION_US, _PAUSED_DURATION_US = 200_000, 1_200_000
_SHORTEST_PAUSE_US, _LONGEST_PAUSE_US = 200_000, 400_000
# Before, between and after the two pauses, the digits move for at least this part of the time that is left.
_LEAST_MOVE = 0.2
_PAUSE_NUMBERS = 512  # of a scene's numbers, from Draw.EVENT_SCENE on


@dataclass(frozen=True)
class BoxFrame:
    """Objects at one time of a recording.

    Attributes:
        t: the time in microseconds.
        boxes: x, y (top left), width and height in pixels, float64 [n, 4].
        labels: class of each, [n].
    """

    t: int
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]


class _Object(NamedTuple):
    patch: NDArray[np.float32]  # [1, side + 2 * pad + 2, the same]: one more row and column all round for the motion
    start: NDArray[np.float64]  # top and left of the digit at 0
    velocity: NDArray[np.float64]  # down and right, pixels a microsecond
    box: NDArray[np.float64]  # x, y, width and height when its top left corner is at (0, 0)
    label: int


class _Scene(NamedTuple):
    objects: list[_Object]
    pauses: tuple[tuple[int, int], ...]  # start and end of each in us

    def moved_us(self, time: int) -> int:
        """For how long the digits have moved until a time."""
        return time - sum(min(max(time - start, 0), end - start) for start, end in self.pauses)


@dataclass(frozen=True)
class SaccadeScenes:
    """One to three digits that move in straight lines; a sample is a pure function of (seed, split, index).

    Attributes:
        digits: images and labels.
        seed: of the scenes and the camera.
        model: constants of the pixels.
        counts: number of scenes of each split.
        pauses: whether the digits stop twice, for 200 to 400 ms each; recordings are then 1.2 s long instead of 0.2 s.
        sides: of the smallest and the largest digit in pixels.
        speeds: of the slowest and the fastest digit in pixels a second.
        one_class: whether all digits are of the class `digit`, so that what counts is where they are.
    """

    digits: Digits
    seed: int = 0
    model: PixelModel = DEFAULT
    counts: Mapping[str, int] = field(default_factory=lambda: {"train": 2000, "val": 200, "test": 200})
    pauses: bool = False
    sides: tuple[int, int] = (14, 32)
    speeds: tuple[float, float] = (20.0, 70.0)
    one_class: bool = False
    sensor: ClassVar[Sensor] = (SIDE, SIDE)
    frame_us: ClassVar[int] = 50_000
    effects: ClassVar[LabelEffects] = label_effects_of("saccade_scenes")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return ("digit",) if self.one_class else tuple(map(str, range(10)))

    @property
    def duration_us(self) -> int:
        """Of each scene."""
        return _PAUSED_DURATION_US if self.pauses else _DURATION_US

    def sample(self, split: str, index: int) -> tuple[EventArrays, list[BoxFrame]]:
        """Record one scene: its events, and its objects after every `frame_us`."""
        return self.samples(split, [index])[0]

    def samples(self, split: str, indices: Sequence[int]) -> list[tuple[EventArrays, list[BoxFrame]]]:
        """Record several scenes at once, which is faster; each is the same as alone."""
        chosen = checked(indices, self.counts[split])
        stream = SPLITS.index(split)
        scenes = [self._scene(split, index) for index in chosen.tolist()]
        recorded = record(
            lambda time: _drawn(scenes, time), self.duration_us, self.model, self.seed, chosen, stream=stream
        )
        times = range(self.frame_us, self.duration_us + 1, self.frame_us)
        frames = [[_frame(scene, time) for time in times] for scene in scenes]
        return list(zip(recorded, frames, strict=True))

    def pauses_of(self, split: str, index: int) -> tuple[tuple[int, int], ...]:
        """Return start and end of each pause of a scene in us; empty without pauses."""
        if not self.pauses:
            return ()
        draws = uniform(self.seed, SPLITS.index(split), index, Draw.EVENT_SCENE + _PAUSE_NUMBERS + np.arange(4))
        lengths = [int(_SHORTEST_PAUSE_US + part * (_LONGEST_PAUSE_US - _SHORTEST_PAUSE_US)) for part in draws[:2]]
        moving = self.duration_us - sum(lengths)
        before, between = (int(moving * _LEAST_MOVE * (1 + part)) for part in draws[2:])
        second = before + lengths[0] + between
        return (before, before + lengths[0]), (second, second + lengths[1])

    def _scene(self, split: str, index: int) -> _Scene:
        pauses = self.pauses_of(split, index)
        return _Scene(self._objects(split, index, _Scene([], pauses).moved_us(self.duration_us)), pauses)

    def _objects(self, split: str, index: int, moved_us: int) -> list[_Object]:
        images, labels = self.digits[split]
        draws = uniform(
            self.seed, SPLITS.index(split), index, Draw.EVENT_SCENE + np.arange(1 + _OBJECTS * _NUMBERS_PER_OBJECT)
        )
        objects: list[_Object] = []
        passed: list[NDArray[np.float64]] = []
        for own in draws[1:].reshape(_OBJECTS, -1)[: 1 + int(draws[0] * _OBJECTS)]:
            number = int(own[0] * len(labels))
            # Sizes are uniform on a logarithmic scale: as many small digits as large ones.
            side = round(self.sides[0] * (self.sides[1] / self.sides[0]) ** float(own[1]))
            speed = (self.speeds[0] + (self.speeds[1] - self.speeds[0]) * own[2]) * 1e-6
            angle = 2 * np.pi * own[3]
            velocity = speed * np.array([np.sin(angle), np.cos(angle)])
            start = _free_start(own[8:].reshape(_ATTEMPTS, 2), side, velocity * moved_us, passed)
            if start is None:
                continue
            brightness = np.float32(_LEAST_BRIGHTNESS + (1 - _LEAST_BRIGHTNESS) * own[4])
            label = 0 if self.one_class else int(labels[number])
            length = side + 2 * _PAD + 2
            patch = enlarge(images[number], np.array([float(side)]), np.full((1, 2), _PAD + 1.0), (length, length))
            objects.append(_Object(brightness * patch, start, velocity, _tight_box(patch[0]), label))
        return objects


def _free_start(
    draws: NDArray[np.float64], side: int, way: NDArray[np.float64], passed: list[NDArray[np.float64]]
) -> NDArray[np.float64] | None:
    """Find where a digit can start without leaving the sensor or passing over another one's area, which it adds.

    Args:
        draws: numbers in [0, 1), [attempts, 2].
        side: of the digit.
        way: how far it moves down and right.
        passed: areas of the others: top, left, bottom, right.

    Returns:
        Its top and left, or None if nothing is free.
    """
    low = np.maximum(0, -way)
    room = SIDE - side - np.abs(way)
    for draw in draws:
        start = low + draw * room
        area = np.concatenate([np.minimum(start, start + way), np.maximum(start, start + way) + side])
        if all(_overlap(area, other) <= _OVERLAP for other in passed):
            passed.append(area)
            return start
    return None


def _overlap(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Intersection of two areas as a fraction of the smaller one."""
    sides = np.maximum(0, np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]))
    return float(np.prod(sides) / min(np.prod(one[2:] - one[:2]), np.prod(other[2:] - other[:2])))


def _tight_box(patch: NDArray[np.float32]) -> NDArray[np.float64]:
    """Box around the visible pixels of a digit, relative to its top left corner."""
    seen = patch >= _VISIBLE * patch.max()
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    first = np.array([columns[0], rows[0]]) - (_PAD + 1)
    return np.concatenate([first, [columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]]).astype(np.float64)


def _drawn(scenes: list[_Scene], time: int) -> NDArray[np.float32]:
    """Draw all scenes at a time, float32 [B, H, W]; where digits overlap, the brighter one is seen."""
    canvas = np.zeros((len(scenes), SIDE + 2 * _PAD + 2, SIDE + 2 * _PAD + 2), np.float32)
    for image, scene in zip(canvas, scenes, strict=True):
        moved_us = scene.moved_us(time)
        for item in scene.objects:
            length = item.patch.shape[1] - 2
            place = np.maximum(item.start + item.velocity * moved_us, 0)  # rounding may leave it just below
            whole = np.floor(place).astype(np.int64)
            down, right = (place - whole).tolist()
            moved = shifted(item.patch, 1, (down, right), (length + 1, length + 1))[0]
            window = image[whole[0] : whole[0] + length + 1, whole[1] : whole[1] + length + 1]
            np.maximum(window, moved, out=window)
    return canvas[:, _PAD : _PAD + SIDE, _PAD : _PAD + SIDE]


def _frame(scene: _Scene, time: int) -> BoxFrame:
    moved_us = scene.moved_us(time)
    boxes = np.array([item.box for item in scene.objects]).reshape(-1, 4)
    places = np.array([item.start + item.velocity * moved_us for item in scene.objects]).reshape(-1, 2)
    boxes[:, :2] += places[:, ::-1]
    return BoxFrame(time, boxes, np.array([item.label for item in scene.objects], np.int64))
