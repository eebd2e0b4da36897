"""The samples of a split of events, as `Split` has images: what samplers, loaders and reports ask for.

A sample is a recording with its label or, for detection, a label time of a recording with its boxes.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.event_images import window_image
from spikefleet_pipelines.events.recording import Sensor
from spikefleet_pipelines.events.windows import StoredRecording
from spikefleet_pipelines.store.annotations import AnnotationColumns, Annotations
from spikefleet_pipelines.store.event_reader import EventSplit
from spikefleet_pipelines.store.event_shards import frame_columns
from spikefleet_pipelines.store.manifest import Manifest
from spikefleet_pipelines.store.rows import LabelTime

SHOWN_US = 50_000
"""Length of the window before a label time that `image` shows."""


class EventSamples:
    """Random access to the samples of one split; it pickles as paths.

    Attributes:
        recordings: the split.
        image_shape: of what `image` returns, [3, H, W].
    """

    def __init__(self, recordings: EventSplit) -> None:
        self.recordings = recordings
        self.name = recordings.name
        self.location = recordings.location
        self.manifest: Manifest = recordings.manifest
        self.image_shape: tuple[int, int, int] = (3, *self.sensor)
        self._labels = None if recordings.is_detection else recordings.labels
        self._recording_of, self._times = _label_times(recordings)

    def __reduce__(self) -> tuple[type["EventSamples"], tuple[EventSplit]]:
        return EventSamples, (self.recordings,)

    def __len__(self) -> int:
        return len(self._times) if self.is_detection else len(self.recordings)

    @property
    def source(self) -> str:
        """Name of the source."""
        return self.manifest.source

    @property
    def sensor(self) -> Sensor:
        """Height and width."""
        return self.recordings.layout.sensor

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        return self.recordings.class_names

    @property
    def is_detection(self) -> bool:
        """Whether samples have `annotations`; otherwise they have `labels`."""
        return self.recordings.is_detection

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each sample, [n].

        Raises:
            StoreError: this is a detection store.
        """
        return self.recordings.labels if self._labels is None else self._labels

    def label(self, row: int) -> int:
        """Class of one sample."""
        return int(self.labels[self._check(row)])

    def recording(self, row: int) -> StoredRecording:
        """Return the recording of a sample."""
        return self.recordings.recording(self.label_time(row).recording if self.is_detection else self._check(row))

    def label_time(self, row: int) -> LabelTime:
        """Return recording and label time of a sample for detection.

        Raises:
            StoreError: this is a classification store.
        """
        if not self.is_detection:
            raise StoreError(f"split {self.name!r} of {self.location} is for classification: it has no frames")
        recording = int(self._recording_of[self._check(row)])
        first = int(np.searchsorted(self._recording_of, recording))
        return LabelTime(recording, row - first, int(self._times[row]))

    def draw_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers by which samples are augmented: their own."""
        return rows

    def annotations(self, row: int) -> Annotations:
        """Return the objects of a sample, as those of an image with the size of the sensor; its id is the row.

        Raises:
            StoreError: this is a classification store.
        """
        sample = self.label_time(row)
        return self.recordings.annotations(sample.recording, sample.frame)

    @property
    def annotation_columns(self) -> list[AnnotationColumns]:
        """The objects of all samples.

        Raises:
            StoreError: this is a classification store.
        """
        found = [self.recordings.frames(row) for row in range(len(self.recordings))]
        return [frame_columns(found, self.recordings.layout)] if found else []

    def image(self, row: int) -> Tensor:
        """Draw a sample, uint8 [3, H, W]: all its events, or those of the 50 ms before its label time."""
        recording = self.recording(row)
        if self.is_detection:
            return torch.from_numpy(window_image(recording.window(self.label_time(row).time - SHOWN_US, SHOWN_US)))
        return torch.from_numpy(window_image(recording.whole()))

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Draw samples, uint8 [B, 3, H, W]."""
        if not len(rows):
            return np.empty((0, *self.image_shape), np.uint8)
        return np.stack([self.image(int(row)).numpy() for row in rows])

    def views(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Draw samples, uint8 [3, H, W] each."""
        return [self.image(int(row)).numpy() for row in rows]

    def _check(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside split {self.name!r}, expected 0 to {len(self) - 1}")
        return row


def _label_times(recordings: EventSplit) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row of the recording and time of each label time of a split, in order; [0] for classification."""
    none = np.empty(0, np.int64)
    if not recordings.is_detection:
        return none, none
    times = [recordings.frames(row).times for row in range(len(recordings))]
    counts = np.array([len(one) for one in times], np.int64)
    return np.repeat(np.arange(len(times)), counts), np.concatenate([none, *times])
