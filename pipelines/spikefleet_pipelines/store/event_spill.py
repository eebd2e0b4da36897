"""Words of recordings in a file, appended as their events come, with what comes late sorted in.

The file holds words only; memory holds the index of the current recording. An event that is late (earlier than one
before it) by less than a second is put behind all events up to its own time: the end of the file, from there on, is
read, merged and written again.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.words import MOST_TICKS, Ticks, WordLayout, index_of_counts
from spikefleet_pipelines.store.event_statistics import EventStatistics

LATEST_US = 1_000_000
"""An event that is late by this time or more is refused."""

_LATE_SHARE = 100
"""At most one in so many events may be late (one event always)."""
_PART = 1 << 20
_MOST_TIME = 1 << 62
_WORD_BYTES = 4


class SpilledRecording(NamedTuple):
    """A recording whose words are in the file."""

    events: int
    ticks: Ticks
    t0: int
    last: int
    """Time of the last event from t0; -1 without events."""
    digest: bytes


class WordSpill:
    """Appends recordings to a file of words.

    Args:
        path: of the file, which is created.
        layout: the bits of a word.
        drop_outside: whether events outside the sensor are left out and counted, instead of refused.
        statistics: where events are counted.
    """

    def __init__(self, path: Path, layout: WordLayout, drop_outside: bool, statistics: EventStatistics) -> None:
        self._path = path
        self._layout = layout
        self._drop_outside = drop_outside
        self.statistics = statistics
        self._file = path.open("w+b", buffering=0)
        self._start = 0
        self.begin("", None)

    def begin(self, name: str, t0: int | None) -> None:
        """Start a recording.

        Args:
            name: for error messages, for example its file.
            t0: its start, by the clock of its events; None: its first event.
        """
        self._name = name
        self._t0, self._is_fixed = t0, t0 is not None
        self._last = -_MOST_TIME
        self._read = self._count = self._late = 0
        self._counts, self._used = np.zeros(0, np.int64), 0
        self._digest: hashlib.blake2b | None = hashlib.blake2b(digest_size=16)

    def append(self, events: EventArrays) -> None:
        """Add events, which need not be in order.

        Raises:
            StoreError: an event is outside the sensor, has another polarity than 0 and 1, is late by a second or more,
                is before the given start, or the recording is too long; the message names the event.
        """
        for start in range(0, len(events), _PART):
            self._append(events.select(slice(start, start + _PART)))

    def end(self) -> SpilledRecording:
        """Complete the recording.

        Raises:
            StoreError: more than 1 % of its events were late.
        """
        if self._late > max(1, self._count // _LATE_SHARE):
            raise StoreError(
                f"{self._name}: {self._late:,} of {self._count:,} events are earlier than one before them, expected at "
                f"most 1 in {_LATE_SHARE}; sort the events by time"
            )
        self.statistics.out_of_order += self._late
        ticks = self._index()
        digest = self._digest
        if digest is None:  # words were written again
            digest = hashlib.blake2b(digest_size=16)
            for start in range(0, self._count, _PART):
                digest.update(self._words(start, min(start + _PART, self._count)).data)
        digest.update(ticks.astype(np.uint64).data)
        ended = SpilledRecording(self._count, ticks, self.t0, self.last, digest.digest())
        self._start += self._count
        return ended

    def drop(self) -> None:
        """Remove what the current recording has written."""
        for start in range(0, self._count, _PART):
            self.statistics.add_words(self._words(start, min(start + _PART, self._count)), self._layout, -1)
        self._truncate(0)

    @property
    def words(self) -> int:
        """Words of all completed recordings."""
        return self._start

    @property
    def count(self) -> int:
        """Events of the current recording."""
        return self._count

    @property
    def t0(self) -> int:
        """Start of the current recording, by the clock of its events."""
        return self._t0 or 0

    @property
    def last(self) -> int:
        """Time of the current recording's last event from its start; -1 without events."""
        return self._last - self.t0 if self._count else -1

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, events: EventArrays) -> None:
        events = self._inside(events)
        if not len(events):
            return
        if self._t0 is None:
            self._t0 = int(events.t[0])
        if events.t[0] < self._last or (events.t[1:] < events.t[:-1]).any():
            events = self._in_order(events)
        self._check_start(int(events.t[0]))
        self._add(EventArrays(events.t - self.t0, events.x, events.y, events.p))
        self._last = max(self._last, int(events.t[-1]))

    def _in_order(self, events: EventArrays) -> EventArrays:
        """Count and sort events of which some are late."""
        behind = np.maximum(np.maximum.accumulate(events.t), self._last) - events.t
        self._late += int((behind > 0).sum())
        worst = int(behind.argmax())
        if behind[worst] >= LATEST_US:
            raise StoreError(
                f"{self._name}: event {self._number(worst)} at {events.t[worst]} us is {behind[worst]:,} us "
                f"earlier than one before it, expected less than {LATEST_US:,}; sort the events by time"
            )
        return events.select(np.argsort(events.t, kind="stable"))

    def _add(self, events: EventArrays) -> None:
        """Write events in order, with times from the start."""
        words = self._layout.pack(events)
        if not self._count or events.t[0] >= self._last - self.t0:
            self._count_ticks(events.t)
            self._write(words)
        else:
            place = self._layout.first_at(self._words(), self._index(), int(events.t[0]) + 1)
            after = self._stored(place)
            self._count_ticks(events.t)
            both = EventArrays(*(np.concatenate([getattr(part, name) for part in (after, events)]) for name in "txyp"))
            self._rewrite(place, both.select(np.argsort(both.t, kind="stable")))
        self.statistics.add_words(words, self._layout)

    def _number(self, place: int) -> int:
        """Number of an event of the current part among all that were read."""
        return self._read - self._part + (place if self._kept is None else int(self._kept[place]))

    def _inside(self, events: EventArrays) -> EventArrays:
        """Check the events; without those outside the sensor, if they are to be dropped."""
        self._part = len(events)
        self._read += self._part
        self._kept: NDArray[np.int64] | None = None
        height, width = self._layout.sensor
        if not self._part or (
            max(-int(events.t.min()), int(events.t.max())) < _MOST_TIME
            and events.p.max() <= 1
            and events.x.max() < width
            and events.y.max() < height
        ):
            return events
        outside = (events.x >= width) | (events.y >= height)
        checks = (
            ((events.t > -_MOST_TIME) & (events.t < _MOST_TIME), "time", events.t, f"less than {_MOST_TIME} us"),
            (events.p <= 1, "polarity", events.p, "0 or 1"),
            (~outside | self._drop_outside, "place", (events.x, events.y), f"less than ({width}, {height})"),
        )
        for good, what, values, expected in checks:
            if not good.all():
                place = int(good.argmin())
                found = tuple(int(one[place]) for one in values) if isinstance(values, tuple) else int(values[place])
                advice = "; check the sensor's size, or drop such events with outside=drop" if what == "place" else ""
                shown = "x, y" if what == "place" else what
                raise StoreError(
                    f"{self._name}: event {self._number(place)}: {shown} is {found}, expected {expected}{advice}"
                )
        if outside.any():
            self.statistics.dropped += int(outside.sum())
            self._kept = np.flatnonzero(~outside)
            return events.select(~outside)
        return events

    def _check_start(self, earliest: int) -> None:
        """Move the start to an event before it, unless the start is given."""
        assert self._t0 is not None
        if earliest >= self._t0:
            return
        if self._is_fixed:
            raise StoreError(
                f"{self._name}: an event is at {earliest} us, before the start of the recording at {self._t0} us; "
                "check the time unit and the start"
            )
        before = self._stored(0)
        moved = EventArrays(before.t + (self._t0 - earliest), before.x, before.y, before.p)
        self._t0, self._used = earliest, 0
        self._counts[:] = 0
        self._count_ticks(moved.t)
        self._rewrite(0, moved)

    def _count_ticks(self, times: NDArray[np.int64]) -> None:
        if not len(times):
            return
        bits = self._layout.tick_bits
        first, end = int(times[0]) >> bits, (int(times[-1]) >> bits) + 1
        if end > MOST_TICKS:
            raise StoreError(
                f"{self._name}: an event is {int(times[-1]):,} us after the start, expected less than "
                f"{MOST_TICKS << bits:,} for this sensor; check the time unit, or cut the recording"
            )
        if end > len(self._counts):
            room = np.zeros(min(2 * end, MOST_TICKS), np.int64)
            room[: self._used] = self._counts[: self._used]
            self._counts = room
        self._used = max(self._used, end)
        if (end - first) * 16 < len(times):  # few ticks: their edges are found faster than each event's tick
            edges = np.searchsorted(times, np.arange(first, end + 1, dtype=np.int64) << bits)
            self._counts[first:end] += np.diff(edges)
        else:
            self._counts[first:end] += np.bincount((times >> bits) - first)

    def _index(self) -> Ticks:
        return index_of_counts(self._counts[: self._used])

    def _words(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint32]:
        """Words of the current recording, a view of the file."""
        end = self._count if stop is None else stop
        if end <= start:
            return np.empty(0, np.uint32)
        place = (self._start + start) * _WORD_BYTES
        return np.memmap(self._path, np.uint32, "r", offset=place, shape=(end - start,)).view(np.ndarray)

    def _stored(self, first: int) -> EventArrays:
        """Decode the events of the current recording from a number on."""
        return self._layout.unpack(self._words(), self._index(), first, self._count)

    def _write(self, words: NDArray[np.uint32]) -> None:
        if not len(words):
            return
        left = words.data.cast("B")
        while left:  # an unbuffered file may take less, for example of 2 GB
            left = left[self._file.write(left) or 0 :]
        self._count += len(words)
        if self._digest is not None:
            self._digest.update(words.data)

    def _rewrite(self, first: int, events: EventArrays) -> None:
        """Replace the events from a number on."""
        self._digest = None
        self._truncate(first)
        self._write(self._layout.pack(events))

    def _truncate(self, count: int) -> None:
        place = (self._start + count) * _WORD_BYTES
        self._file.truncate(place)
        self._file.seek(place)
        self._count = count
