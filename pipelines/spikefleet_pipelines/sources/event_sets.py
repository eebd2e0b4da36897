"""Data sets recorded by the simulated event camera from scikit-learn's digits, whose splits they keep.

The seed determines the digits of each split, what moves how, and the camera's pixels. Category ids of boxes have gaps
and do not start at 0, as in COCO, so that confusing ids with class indices shows up.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from spikefleet_pipelines.events.label_frames import LabelFrames
from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.events.saccade_scenes import BoxFrame, SaccadeScenes
from spikefleet_pipelines.events.saccades import SPLITS, Digits, Saccades
from spikefleet_pipelines.events.twins import ApparentMotion, FirstDigit
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions
from spikefleet_pipelines.sources.event_sets_config import SaccadeScenesOptions
from spikefleet_pipelines.sources.source import Progress, SourceOptions
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_writer import EventStoreWriter

CATEGORY_IDS = tuple(11 * (digit + 1) for digit in range(10))

_AT_ONCE = 128
"""Samples that are recorded together, several times as fast as one by one. Memory holds their pixels and events."""


class EventSet(Protocol):
    """What the data sets of `events/` have in common."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    @property
    def sensor(self) -> Sensor:
        """Height and width."""
        ...

    @property
    def duration_us(self) -> int:
        """Of each sample."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of samples of each split."""
        ...

    def samples(self, split: str, indices: Sequence[int]) -> Sequence[tuple[EventArrays, int | list[BoxFrame]]]:
        """Events of samples, each with its class or with its boxes."""
        ...


@dataclass(frozen=True)
class EventSetContents:
    """A data set that is recorded when the store is written."""

    task: EventSet
    category_ids: tuple[int, ...] | None = None
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        return self.task.class_names

    @property
    def events(self) -> EventFormat:
        """Format of the events."""
        return EventFormat.of(self.task.sensor)

    def write(self, writer: EventStoreWriter, progress: Progress, parallel: int | None) -> None:
        """Record and write all splits; see `Contents`."""
        counts = {split: self.task.counts[split] for split in SPLITS if self.task.counts.get(split)}
        total, done = sum(counts.values()), 0
        for split, count in counts.items():
            writer.write_recordings(split, self._recordings(split, count, done, total, progress))
            done += count

    def _recordings(
        self, split: str, count: int, before: int, total: int, progress: Progress
    ) -> Iterator[SourceRecording]:
        for start in range(0, count, _AT_ONCE):
            chosen = range(start, min(start + _AT_ONCE, count))
            for number, (events, target) in zip(chosen, self.task.samples(split, chosen), strict=True):
                label, frames = (target, None) if isinstance(target, int) else (None, _frames(target))
                name = f"sample {number} of {split}"
                yield SourceRecording([events], label, frames, name=name, t0=0, duration=self.task.duration_us)
            progress(before + chosen.stop, total)


def _frames(found: Sequence[BoxFrame]) -> LabelFrames:
    return LabelFrames.of_objects(
        np.concatenate([np.full(len(one.labels), one.t, np.int64) for one in found]),
        np.concatenate([one.boxes for one in found]),
        np.array(CATEGORY_IDS, np.int64)[np.concatenate([one.labels for one in found])],
        # A scene's digits are the same ones, in the same order, at all times.
        np.concatenate([np.arange(len(one.labels)) for one in found]),
    )


def read_saccades(root: Path, options: SourceOptions, seed: int) -> EventSetContents:
    """Prepare the set `Saccades`."""
    return EventSetContents(Saccades(_digits(seed), seed))


def read_first_digit(root: Path, options: SourceOptions, seed: int) -> EventSetContents:
    """Prepare the set `FirstDigit`."""
    return EventSetContents(FirstDigit(_digits(seed), seed))


def read_apparent_motion(root: Path, options: SourceOptions, seed: int) -> EventSetContents:
    """Prepare the set `ApparentMotion`."""
    return EventSetContents(ApparentMotion(_digits(seed), seed))


def read_saccade_scenes(root: Path, options: SaccadeScenesOptions, seed: int) -> EventSetContents:
    """Prepare the set `SaccadeScenes`."""
    counts = {split: getattr(options, split) for split in SPLITS}
    scenes = SaccadeScenes(
        _digits(seed),
        seed,
        counts=counts,
        pauses=options.pauses,
        sides=options.sides,
        speeds=options.speeds,
        one_class=options.one_class,
    )
    return EventSetContents(scenes, CATEGORY_IDS[: len(scenes.class_names)])


def _digits(seed: int) -> Digits:
    return read_digits(None, DigitsOptions(), seed).splits
