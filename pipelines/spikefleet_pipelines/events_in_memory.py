"""Batches of events in memory: windows of recordings, or frames, transformed as in evaluation, without a store."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.events.event_images import window_image
from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.events.windows import StoredRecording, recording_of
from spikefleet_pipelines.loading import Batch
from spikefleet_pipelines.store.annotations import Annotations
from spikefleet_pipelines.store.rows import LabelTime
from spikefleet_pipelines.transforms.event_frames_config import EventFramesConfig


def part_of(events: EventArrays, sensor: Sensor, start_us: int, length_us: int) -> StoredRecording:
    """Return a part of a recording as one of its own, whose times count from the start of the part.

    Args:
        events: of the part, in the order of time, start <= t < start + length.
        sensor: height and width.
        start_us: start of the part, by the clock of the events.
        length_us: at least 1.

    Raises:
        StoreError: an event is outside the sensor or before the start, or times are not sorted.
    """
    relative = EventArrays(events.t - start_us, events.x, events.y, events.p)
    return replace(recording_of(relative, sensor), t0=start_us, duration=length_us)


def parts_of(
    chunks: Iterable[EventArrays],
    sensor: Sensor,
    length_us: int | None,
    start_us: int | None = None,
    end_us: int | None = None,
) -> Iterator[StoredRecording]:
    """Cut a recording into parts of one length, as its events come; memory holds the events of a part and of a chunk.

    Args:
        chunks: its events, in the order of time.
        sensor: height and width.
        length_us: of a part; the last one may be cut short by the end of the recording and is not shorter. None: the
            recording is one part.
        start_us: of the first part; None: at the first event.
        end_us: of the recording, which parts cover up to there; None: after the last event.

    Yields:
        The parts, also those without events between others; `t0` is the start of each, by the clock of the events.
    """
    held = _no_events()
    for chunk in chunks:
        if start_us is None and len(chunk):
            start_us = int(chunk.t[0])
        held = EventArrays(*(np.concatenate([getattr(held, name), getattr(chunk, name)]) for name in "txyp"))
        while length_us is not None and start_us is not None and len(held) and held.t[-1] >= start_us + length_us:
            stop = int(np.searchsorted(held.t, start_us + length_us))
            yield part_of(held.select(slice(stop)), sensor, start_us, length_us)
            held, start_us = held.select(slice(stop, None)), start_us + length_us
    if start_us is None:
        return
    end = max(start_us if end_us is None else end_us, int(held.t[-1]) + 1 if len(held) else start_us)
    while start_us < end:
        length = length_us or end - start_us
        stop = int(np.searchsorted(held.t, start_us + length))
        yield part_of(held.select(slice(stop)), sensor, start_us, length)
        held, start_us = held.select(slice(stop, None)), start_us + length


def recording_batch(recordings: Sequence[StoredRecording], transform: EventFramesConfig) -> Batch:
    """Transform recordings as in evaluation; for detection with a label time at the end of each.

    Args:
        recordings: of one sensor, at least one.
        transform: config of a kind that reads events, for the time steps of the network.

    Returns:
        A batch without targets: class -1, or no objects.

    Raises:
        ValueError: the recordings do not fit the transform.
    """
    rows = np.arange(len(recordings))
    built: Any = transform.build(_RecordingsInMemory(recordings), train=False, seed=0)
    images, packed = built(rows, 0)
    frames = built.on_device(images, packed, "cpu")
    return Batch(frames, built.unpack(packed), torch.from_numpy(rows), len(rows))


def frame_batch(frames: NDArray[np.float32], sensor: Sensor, transform: EventFramesConfig) -> Batch:
    """Transform frames that were counted elsewhere, as in evaluation.

    Args:
        frames: [B, T, C, H, W] in the representation of the transform, before normalisation.
        sensor: height and width, for boxes.
        transform: config of a kind that reads events, for the time steps of the network.

    Returns:
        A batch without targets: class -1, or no objects.

    Raises:
        ValueError: the frames have another shape.
    """
    expected = (transform.timesteps, *transform.representation.frame_shape(sensor))
    if frames.shape[1:] != expected:
        raise ValueError(f"frames have shape {list(frames.shape[1:])}, expected [T, C, H, W] = {list(expected)}")
    nothing = part_of(_no_events(), sensor, 0, 1)
    rows = np.arange(len(frames))
    built: Any = transform.build(_RecordingsInMemory([nothing] * len(frames)), train=False, seed=0)
    _, packed = built(rows, 0)
    return Batch(built.of_frames(frames), built.unpack(packed), torch.from_numpy(rows), len(rows))


def _no_events() -> EventArrays:
    return EventArrays(np.empty(0, np.int64), np.empty(0, np.uint16), np.empty(0, np.uint16), np.empty(0, np.uint8))


class _RecordingsInMemory:
    """`EventRows` of recordings in memory."""

    name = location = source = "memory"
    class_names: tuple[str, ...] = ()

    def __init__(self, recordings: Sequence[StoredRecording]) -> None:
        self._recordings = recordings
        self.sensor = recordings[0].layout.sensor
        self.image_shape = (3, *self.sensor)
        self.labels = np.full(len(recordings), -1, np.int64)

    def __len__(self) -> int:
        return len(self._recordings)

    def recording(self, row: int) -> StoredRecording:
        return self._recordings[row]

    def label_time(self, row: int) -> LabelTime:
        return LabelTime(row, 0, self._recordings[row].whole().length)

    def image(self, row: int) -> Tensor:
        return torch.from_numpy(window_image(self._recordings[row].whole()))

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack([self.image(int(row)).numpy() for row in rows])

    def views(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [self.image(int(row)).numpy() for row in rows]

    def annotations(self, row: int) -> Annotations:
        none = np.empty(0, np.int64)
        return Annotations(row, *self.sensor, np.empty((0, 4)), none, none, none.astype(bool), np.empty(0), none)
