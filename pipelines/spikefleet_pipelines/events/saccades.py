"""Digits recorded by a simulated event camera that makes three saccades, as N-MNIST was.

Orchard, Jayawant, Cohen and Thakor, "Converting static image datasets to spiking neuromorphic datasets using saccades",
Frontiers in Neuroscience 9:437, 2015. The labels need no time: a network that sees one summed frame reads the digit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.counter_random import Draw, uniform
from spikefleet_pipelines.events.label_effects import LabelEffects, label_effects_of
from spikefleet_pipelines.events.moving_images import along, enlarge, shifted
from spikefleet_pipelines.events.pixel_model import DEFAULT, PixelModel, record
from spikefleet_pipelines.events.recording import EventArrays, Sensor

Digits = Mapping[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]
"""Images uint8 [n, 1, 8, 8] and labels [n] of the splits, as the source `digits` has them."""

SPLITS = ("train", "val", "test")
SIDE = 34
_DIGIT = 22
_MARGIN = 8
# Corners of the path (down, right) in pixels: an isosceles triangle.
_PATH = np.array([(0.0, 0.0), (7.0, 3.5), (0.0, 7.0), (0.0, 0.0)])
_ROOM = SIDE - _DIGIT - 7


@dataclass(frozen=True)
class Saccades:
    """Every digit of every split, once; a sample is a pure function of (seed, split, index)."""

    digits: Digits
    seed: int = 0
    model: PixelModel = DEFAULT
    sensor: ClassVar[Sensor] = (SIDE, SIDE)
    duration_us: ClassVar[int] = 300_000
    class_names: ClassVar[tuple[str, ...]] = tuple(map(str, range(10)))
    effects: ClassVar[LabelEffects] = label_effects_of("saccades")

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples of each split."""
        return {split: len(labels) for split, (_, labels) in self.digits.items()}

    def sample(self, split: str, index: int) -> tuple[EventArrays, int]:
        """Record one digit: its events, and its class."""
        return self.samples(split, [index])[0]

    def samples(self, split: str, indices: Sequence[int]) -> list[tuple[EventArrays, int]]:
        """Record several digits at once, which is faster; each is the same as alone."""
        chosen = checked(indices, self.counts[split])
        images, labels = self.digits[split]
        stream = SPLITS.index(split)
        place = _ROOM * uniform(self.seed, stream, chosen[:, None], Draw.EVENT_SCENE + np.arange(2))
        padded = (SIDE + 2 * _MARGIN, SIDE + 2 * _MARGIN)
        large = enlarge(images[chosen, 0], np.full(len(chosen), float(_DIGIT)), _MARGIN + place, padded)
        recorded = record(
            lambda time: shifted(large, _MARGIN, along(_PATH, time / self.duration_us), self.sensor),
            self.duration_us,
            self.model,
            self.seed,
            chosen,
            stream=stream,
        )
        return list(zip(recorded, labels[chosen].tolist(), strict=True))


def checked(indices: Sequence[int], count: int) -> NDArray[np.int64]:
    """Return indices as an array.

    Raises:
        IndexError: one is not in [0, count).
    """
    chosen = np.asarray(indices, np.int64).reshape(-1)
    if len(wrong := chosen[(chosen < 0) | (chosen >= count)]):
        raise IndexError(f"sample {wrong[0]}: expected 0 to {count - 1}")
    return chosen
