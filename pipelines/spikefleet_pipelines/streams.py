"""Streams of events: the consecutive windows of recordings as samples, and their loader.

A transform sees a window as it sees a sample: for classes a recording that ends with the window, for boxes a label time
at the end of the window. So windows have the representation and the targets of the samples that they stand for.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.events.event_images import window_image
from spikefleet_pipelines.events.windows import StoredRecording
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import Plan
from spikefleet_pipelines.store.annotations import Annotations
from spikefleet_pipelines.store.event_samples import EventSamples
from spikefleet_pipelines.store.reader import Samples
from spikefleet_pipelines.store.rows import LabelTime
from spikefleet_pipelines.stream_plan import (
    NO_FRAME,
    NO_WINDOW,
    EventStreamPlan,
    StreamWindows,
    equal_windows,
    labelled_windows,
)

Labelled = Literal["last", "all"]


def recordings_of(samples: Samples) -> EventSamples:
    """Return samples that are recordings of events. Raises ValueError for images."""
    if not isinstance(samples, EventSamples):
        raise ValueError(f"split {samples.name!r} of {samples.location} has images, not recordings of events")
    return samples


class StreamSamples(EventSamples):
    """The windows of the recordings of a split; a row is a window.

    Args:
        samples: of the split.
        length_us: of a window.
        labelled: of recordings with classes, "last": the last window has the label; "all": every window.

    Raises:
        ValueError: two labels of a recording are so near that they would share a window.
    """

    def __init__(self, samples: EventSamples, length_us: int, labelled: Labelled = "last") -> None:
        super().__init__(samples.recordings)
        self._arguments = (samples, length_us, labelled)
        self.windows = _windows_of(samples, length_us, labelled)

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamSamples, self._arguments

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each window: that of its recording, [n].

        Raises:
            StoreError: this is a detection store.
        """
        return np.repeat(super().labels, self.windows.counts)

    def recording(self, row: int) -> StoredRecording:
        """Return the recording of a window; for classes it ends with the window. `NO_WINDOW` has no events."""
        at = max(row, 0)
        recording = self.recordings.recording(int(self.windows.recordings(np.array([at]))[0]))
        if self.is_detection and row != NO_WINDOW:
            return recording
        end = 0 if row == NO_WINDOW else int(self.windows.ends_us[row])
        stop = recording.first_at(end)
        return replace(
            recording,
            words=recording.words[:stop],
            ticks=np.minimum(recording.ticks, stop),
            duration=max(end, self.windows.length_us),
        )

    def label_time(self, row: int) -> LabelTime:
        """Return recording and end of a window of a detection store; -1 as its label time where it has none."""
        if row == NO_WINDOW:
            return LabelTime(0, NO_FRAME, 0)
        recording = int(self.windows.recordings(np.array([row]))[0])
        return LabelTime(recording, int(self.windows.frame_index[row]), int(self.windows.ends_us[row]))

    def draw_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers by which windows are augmented: those of their recordings."""
        return self.windows.recordings(rows)

    def annotations(self, row: int) -> Annotations:
        """Return the objects at the label of a window; none where it has no label."""
        place = self.label_time(row)
        if place.frame != NO_FRAME:
            return self.recordings.annotations(place.recording, place.frame)
        numbers, values = np.empty(0, np.int64), np.empty(0, np.float64)
        height, width = self.sensor
        return Annotations(
            NO_FRAME, height, width, np.empty((0, 4)), numbers, numbers, np.empty(0, np.bool_), values, numbers
        )

    def image(self, row: int) -> Tensor:
        """Draw the events of a window, uint8 [3, H, W]."""
        length, end = self.windows.length_us, int(self.windows.ends_us[row])
        return torch.from_numpy(window_image(self.recording(row).window(end - length, length)))


def _windows_of(samples: EventSamples, length_us: int, labelled: str) -> StreamWindows:
    recordings = samples.recordings
    durations = [recordings.recording(row).whole().length for row in range(len(recordings))]
    if not samples.is_detection:
        return equal_windows(durations, length_us, labelled)
    times = [recordings.frames(row).times for row in range(len(recordings))]
    windows = labelled_windows(durations, times, length_us)
    for row, labels in enumerate(times):
        of_row = windows.frame_index[windows.offsets[row] : windows.offsets[row + 1]]
        left = np.setdiff1d(np.arange(len(labels)), of_row)
        if not len(left):
            continue
        what = f"recording {row} of split {samples.name!r} has a label at {int(labels[left[0]])} us"
        if labels[left[0]] == 0:
            raise ValueError(f"{what}, before any event; leave out such labels, for no window can end there")
        raise ValueError(
            f"{what}, to which no window of {length_us} us belongs: one ends at the first label, the others follow it, "
            "and each takes the label nearest to its end, less than half a window away; set a shorter "
            "data.transform.window"
        )
    return windows


class StreamLoader(BatchLoader):
    """Loads the windows of streams; `split` are `StreamSamples`, and batches have `stream`."""

    split: StreamSamples

    @classmethod
    def beside(cls, loader: BatchLoader) -> "StreamLoader":
        """The windows of the split that another loader reads sample by sample, for evaluation.

        The last window of each recording with a class has the label.

        Raises:
            ValueError: the split has no streams.
        """
        samples = StreamSamples(recordings_of(loader.split), loader.config.stream_window_us())
        return cls(samples, loader.config, train=False, processes=loader.processes, device=loader.device)

    def epoch(self, plan: Plan, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the windows of a step after the other; see `BatchLoader.epoch`.

        Raises:
            TypeError: the plan is not one of streams.
        """
        if not isinstance(plan, EventStreamPlan):
            raise TypeError(f"the plan is {type(plan).__name__}, expected EventStreamPlan")
        loaded = super().epoch(plan, epoch, start_step)
        for batch, step in zip(loaded, plan.batches(epoch, start_step), strict=True):
            yield batch._replace(stream=step)
