"""Data sets whose labels need time: twins, whose events are equal but for the order of whole recordings.

A sample is a sequence of independent recordings, each from a freshly reset sensor; its twin is the same recordings in
another order, with another label, in the same split. A network that cannot see order (one time slice, no memory and a
mean over time, slices in random order) gives both the same answer, so at most half of its answers are right, for every
number of slices of which none is in two recordings.

One simulation over the whole time does not do: what the sensor has seen before changes what it sends later, and order
shows in the sum. `tests/unit/test_event_twins.py` has the constructions that fail.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.counter_random import Draw, random_bits, uniform
from spikefleet_pipelines.events.label_effects import LabelEffects, label_effects_of
from spikefleet_pipelines.events.moving_images import enlarge
from spikefleet_pipelines.events.pixel_model import DEFAULT, PixelModel, record
from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.events.saccades import SIDE, SPLITS, Digits, Saccades, checked

_CLASS_PAIRS = tuple(combinations(range(10), 2))
_REPEATS = {"train": 24, "val": 3, "test": 6}
_MOTION_PAIRS = {"train": 960, "val": 120, "test": 240}
_FLASHED_SIDE = 9
_DISTANCE = 10.5
_JITTER = 1.5
_FLASH_US, _FADE_US = 22_000, 4_000
# The flash raises the light from 0.2 of white, that of a black surface of the default camera, to 0.48.
_BRIGHTNESS = np.float32(0.35)


@dataclass(frozen=True)
class FirstDigit:
    """Recordings of two digits of different classes, one after the other; the label is the class of the first.

    Samples 2 k and 2 k + 1 are twins. Every pair of classes is there equally often.
    """

    digits: Digits
    seed: int = 0
    model: PixelModel = DEFAULT
    sensor: ClassVar[Sensor] = (SIDE, SIDE)
    part_us: ClassVar[int] = Saccades.duration_us
    duration_us: ClassVar[int] = 2 * part_us
    class_names: ClassVar[tuple[str, ...]] = Saccades.class_names
    effects: ClassVar[LabelEffects] = label_effects_of("first_digit")

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples of each split."""
        return {split: 2 * len(_CLASS_PAIRS) * _REPEATS[split] for split in self.digits}

    def sample(self, split: str, index: int) -> tuple[EventArrays, int]:
        """Return the events of one sample, and its class."""
        return self.samples(split, [index])[0]

    def samples(self, split: str, indices: Sequence[int]) -> list[tuple[EventArrays, int]]:
        """Make several samples at once, which is faster; each is the same as alone."""
        chosen = checked(indices, self.counts[split])
        orders = np.array([self.parts(split, index) for index in chosen.tolist()]).reshape(-1, 2)
        used = np.unique(orders)
        recorded = dict(
            zip(used.tolist(), Saccades(self.digits, self.seed, self.model).samples(split, used.tolist()), strict=True)
        )
        pairs = [(recorded[first], recorded[second]) for first, second in orders.tolist()]
        return [(in_sequence((first[0], second[0]), self.part_us), first[1]) for first, second in pairs]

    def parts(self, split: str, index: int) -> tuple[int, int]:
        """Return the samples of `Saccades` that a sample is made of, in order."""
        repeat, number = divmod(index // 2, len(_CLASS_PAIRS))
        labels = self.digits[split][1]
        found = []
        for side, label in enumerate(_CLASS_PAIRS[number]):
            members = np.flatnonzero(labels == label)
            keys = random_bits(self.seed, SPLITS.index(split), members, Draw.EVENT_PARTNERS + 2 * number + side)
            found.append(int(members[np.argsort(keys, kind="stable")[repeat % len(members)]]))
        return (found[1], found[0]) if index % 2 else (found[0], found[1])


@dataclass(frozen=True)
class ApparentMotion:
    """A small digit flashes at three places in a line; the label is the direction.

    Class k is the direction at k times 45 degrees from right towards down. Samples 2 k and 2 k + 1 are twins.
    """

    digits: Digits
    seed: int = 0
    model: PixelModel = DEFAULT
    sensor: ClassVar[Sensor] = (SIDE, SIDE)
    part_us: ClassVar[int] = 60_000
    duration_us: ClassVar[int] = 3 * part_us
    class_names: ClassVar[tuple[str, ...]] = (
        "right", "down right", "down", "down left", "left", "up left", "up", "up right",
    )  # fmt: skip
    effects: ClassVar[LabelEffects] = label_effects_of("apparent_motion")

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples of each split."""
        return {split: 2 * _MOTION_PAIRS[split] for split in self.digits}

    def sample(self, split: str, index: int) -> tuple[EventArrays, int]:
        """Return the events of one sample, and its direction."""
        return self.samples(split, [index])[0]

    def samples(self, split: str, indices: Sequence[int]) -> list[tuple[EventArrays, int]]:
        """Make several samples at once, which is faster; each is the same as alone."""
        chosen = checked(indices, self.counts[split])
        pairs = np.unique(chosen // 2)
        still = self.places(split, pairs)
        stream = SPLITS.index(split)
        numbers = (3 * pairs[:, None] + np.arange(3)).reshape(-1)
        recorded = record(lambda time: still * flash(time), self.part_us, self.model, self.seed, numbers, stream=stream)
        results = []
        for index in chosen.tolist():
            first = 3 * int(np.searchsorted(pairs, index // 2))
            forwards = recorded[first : first + 3]
            label = index // 2 % 4 + 4 * (index % 2)
            results.append((in_sequence(forwards[::-1] if index % 2 else forwards, self.part_us), label))
        return results

    def places(self, split: str, pairs: NDArray[np.int64]) -> NDArray[np.float32]:
        """Draw the digits at full light of the three places of each pair of twins, float32 [3 * n, H, W]."""
        images, labels = self.digits[split]
        draws = uniform(self.seed, SPLITS.index(split), pairs[:, None], Draw.EVENT_SCENE + np.arange(3))
        digit = (draws[:, 0] * len(labels)).astype(np.int64)
        angle = np.pi / 4 * (pairs % 4)
        way = _DISTANCE * np.stack([np.sin(angle), np.cos(angle)], -1)  # down, right
        middle = (SIDE - _FLASHED_SIDE) / 2 + _JITTER * (2 * draws[:, 1:] - 1)
        place = middle[:, None] + way[:, None] * np.array([-1, 0, 1])[:, None]
        digits = np.repeat(images[digit, 0], 3, axis=0)
        sides = np.full(len(digits), float(_FLASHED_SIDE))
        return _BRIGHTNESS * enlarge(digits, sides, place.reshape(-1, 2), self.sensor)


def flash(time_us: int) -> np.float32:
    """Return the light of a flash that begins at 0, of its highest."""
    return np.float32(min(max(min(time_us, _FLASH_US - time_us) / _FADE_US, 0), 1))


def in_sequence(parts: Sequence[EventArrays], part_us: int) -> EventArrays:
    """Join recordings of equal length, one after the other.

    Args:
        parts: the recordings.
        part_us: length of each.
    """
    return EventArrays(
        np.concatenate([part.t + number * part_us for number, part in enumerate(parts)]),
        np.concatenate([part.x for part in parts]),
        np.concatenate([part.y for part in parts]),
        np.concatenate([part.p for part in parts]),
    )
