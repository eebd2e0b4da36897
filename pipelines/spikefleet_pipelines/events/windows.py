"""Recordings of words, and windows of them: views into the store's memory map, or into memory."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.events.words import MOST_TICKS, Ticks, WordLayout


@dataclass(frozen=True)
class StoredRecording:
    """The events of one recording as words, views into the mapped store."""

    layout: WordLayout
    words: NDArray[np.uint32]
    """[n], in the order of time."""
    ticks: Ticks
    """[K + 1]."""
    t0: int = 0
    """Start in us, as the raw file counts; all other times count from it."""
    duration: int = 0
    """Length in us; the last event is before its end, unless the format says otherwise."""

    def __len__(self) -> int:
        return len(self.words)

    def first_at(self, time: int) -> int:
        """Number of events before a time, us from the start."""
        return self.layout.first_at(self.words, self.ticks, time)

    def window(self, start_us: int, length_us: int) -> "EventWindow":
        """Return the events with start <= t < start + length.

        Args:
            start_us: us from the start of the recording; may be negative, and the window may be longer than the
                recording.
            length_us: at least 1.

        Raises:
            ValueError: the length is below 1.
        """
        if length_us < 1:
            raise ValueError(f"length of a window is {length_us} us, expected at least 1")
        return EventWindow(self, self.first_at(start_us), self.first_at(start_us + length_us), start_us, length_us)

    def span(self) -> "EventWindow":
        """Return all events, in the window from the first to the last one (both inside)."""
        if not len(self):
            return EventWindow(self, 0, 0, 0, max(self.duration, 1))
        first, last = self._time(0), self._time(len(self) - 1)
        return EventWindow(self, 0, len(self), first, last - first + 1)

    def whole(self) -> "EventWindow":
        """Return all events, in the window from the start to the end of the recording."""
        end = self._time(len(self) - 1) + 1 if len(self) else 1
        return EventWindow(self, 0, len(self), 0, max(self.duration, end))

    def events(self) -> EventArrays:
        """Decode all events; times count from the start."""
        return self.layout.unpack(self.words, self.ticks, 0, len(self))

    def _time(self, number: int) -> int:
        return int(self.layout.times(self.words, self.ticks, number, number + 1)[0])


@dataclass(frozen=True)
class EventWindow:
    """Events of a part of a recording."""

    recording: StoredRecording
    first: int
    """Number of the first event."""
    stop: int
    """Number after the last event."""
    start: int
    """us from the start of the recording."""
    length: int
    """us."""

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def layout(self) -> WordLayout:
        """The bits of a word."""
        return self.recording.layout

    @property
    def words(self) -> NDArray[np.uint32]:
        """Words [n], a view."""
        return self.recording.words[self.first : self.stop]

    @property
    def ticks(self) -> Ticks:
        """The part of the recording's index with the window's ticks, a view."""
        ticks, bits = self.recording.ticks, self.layout.tick_bits
        start = min(max(self.start >> bits, 0), len(ticks) - 1)
        return ticks[start : max(((self.start + self.length - 1) >> bits) + 2, start + 1)]

    def first_at(self, time: int) -> int:
        """Number of the window's events before a time, us from the start of the recording."""
        return min(max(self.recording.first_at(time) - self.first, 0), len(self))

    def times(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Times of the window's events `start` to before `stop` (default: all), us from the recording's start."""
        end = len(self) if stop is None else min(stop, len(self))
        source = self.recording
        return self.layout.times(source.words, source.ticks, self.first + start, self.first + end)

    def time(self, number: int) -> int:
        """Time of one event of the window, us from the start of the recording."""
        return int(self.times(number, number + 1)[0])

    def events(self) -> EventArrays:
        """Decode the events; times count from the start of the recording."""
        return self.layout.unpack(self.recording.words, self.recording.ticks, self.first, self.stop)


def recording_of(events: EventArrays, sensor: Sensor) -> StoredRecording:
    """Pack events in memory, without a store.

    Args:
        events: in the order of time, with times from the start of the recording and coordinates inside the sensor.
        sensor: height and width.

    Raises:
        StoreError: the sensor has too many pixels, or an event is outside it, out of order, or too early or late.
    """
    layout = WordLayout(*sensor)
    if len(events):
        largest = int(events.y.max()), int(events.x.max()), int(events.p.max())
        if largest[0] >= sensor[0] or largest[1] >= sensor[1] or largest[2] > 1:
            raise StoreError(
                f"events reach row {largest[0]}, column {largest[1]} and polarity {largest[2]}, expected less than "
                f"{sensor[0]}, {sensor[1]} and 2"
            )
        if events.t[0] < 0 or (np.diff(events.t) < 0).any():
            raise StoreError("times of events are negative or not sorted; sort them, and count from the start")
        if int(events.t[-1]) >> layout.tick_bits >= MOST_TICKS:
            raise StoreError(
                f"the last event is at {int(events.t[-1]):,} us, expected less than {MOST_TICKS << layout.tick_bits:,} "
                "for this sensor; count from the start of the recording, in microseconds"
            )
    duration = int(events.t[-1]) + 1 if len(events) else 0
    return StoredRecording(layout, layout.pack(events), layout.index(events.t), 0, duration)
