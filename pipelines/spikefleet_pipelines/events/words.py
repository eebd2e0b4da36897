"""An event as a word of four bytes, and access to events by time.

A word is `(t mod 2^b) << a | p << (bx + by) | y << bx | x` with bx and by bits for column and row, a = bx + by + 1 bits
of address and b = 32 - a bits of time. Events are in the order of time. What the word drops of the time is in the index
`ticks`: ticks[k] is the number of events with t < k * 2^b, for k = 0 .. K; a tick is 2^b us. All times count from the
start of the recording.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.recording import EventArrays, Sensor

Ticks = NDArray[np.uint32] | NDArray[np.uint64]
"""Index of a recording; 64 bits from 2^32 events on."""

_WORD_BITS = 32
_LEAST_TICK_BITS = 8
MOST_TICKS = 1 << 26
"""Bound of the index of one recording (256 MB): 19 hours at 1280 x 720, a year at 34 x 34."""


@dataclass(frozen=True)
class WordLayout:
    """The bits of a word for one size of the sensor.

    Args:
        height: of the sensor in pixels.
        width: of the sensor in pixels.

    Raises:
        StoreError: a side is below 1, or the address leaves fewer than 8 bits for the time (4096 x 2048 fits).
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or self.tick_bits < _LEAST_TICK_BITS:
            raise StoreError(
                f"sensor is {self.height} x {self.width} pixels (height x width), expected at least 1 x 1 and at most "
                f"{_WORD_BITS - _LEAST_TICK_BITS - 1} bits for row and column together, for example 2048 x 4096"
            )

    @property
    def sensor(self) -> Sensor:
        """Height and width of the sensor."""
        return self.height, self.width

    @property
    def x_bits(self) -> int:
        """Bits of the column."""
        return (self.width - 1).bit_length()

    @property
    def y_bits(self) -> int:
        """Bits of the row."""
        return (self.height - 1).bit_length()

    @property
    def address_bits(self) -> int:
        """Bits of column, row and polarity: the low bits of a word."""
        return self.x_bits + self.y_bits + 1

    @property
    def tick_bits(self) -> int:
        """Bits of the time: a tick is 2^tick_bits us."""
        return _WORD_BITS - self.address_bits

    @property
    def address_mask(self) -> np.uint32:
        """Selects column, row and polarity of a word."""
        return np.uint32((1 << self.address_bits) - 1)

    def pack(self, events: EventArrays) -> NDArray[np.uint32]:
        """Pack events whose coordinates are inside the sensor.

        Args:
            events: [n], times from the start of the recording, at least 0.

        Returns:
            Words [n].
        """
        words = (events.t & ((1 << self.tick_bits) - 1)).astype(np.uint32)
        words <<= np.uint32(1)
        words |= events.p
        words <<= np.uint32(self.y_bits)
        words |= events.y
        words <<= np.uint32(self.x_bits)
        words |= events.x
        return words

    def columns(self, words: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return x of each word, [n]."""
        return words & np.uint32((1 << self.x_bits) - 1)

    def rows(self, words: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return y of each word, [n]."""
        return (words >> np.uint32(self.x_bits)) & np.uint32((1 << self.y_bits) - 1)

    def polarities(self, words: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return p of each word, [n]: 1 is ON, 0 is OFF."""
        return (words >> np.uint32(self.x_bits + self.y_bits)) & np.uint32(1)

    def index(self, times: NDArray[np.int64]) -> Ticks:
        """Compute the index of a whole recording.

        Args:
            times: of its events from its start, sorted, [n].

        Returns:
            ticks [K + 1] with K = floor(last time / 2^b) + 1; [1] without events.
        """
        counts = np.bincount(times >> self.tick_bits) if len(times) else np.empty(0, np.int64)
        return index_of_counts(counts)

    def first_at(self, words: NDArray[np.uint32], ticks: Ticks, time: int) -> int:
        """Find the first event at or after a time: the number of events before it.

        Args:
            words: of the whole recording, [n].
            ticks: its index.
            time: us from its start; may be negative or after its end.
        """
        tick = time >> self.tick_bits
        if tick < 0:
            return 0
        if tick >= len(ticks) - 1:
            return len(words)
        start, stop = int(ticks[tick]), int(ticks[tick + 1])
        # As uint32: a needle of another type would make numpy convert the whole column.
        needle = np.uint32((time & ((1 << self.tick_bits) - 1)) << self.address_bits)
        return start + int(np.searchsorted(words[start:stop], needle))

    def times(self, words: NDArray[np.uint32], ticks: Ticks, start: int, stop: int) -> NDArray[np.int64]:
        """Compute the times of events number `start` to before `stop`, us from the start of the recording.

        Args:
            words: of the whole recording, [n].
            ticks: its index.
            start: number of the first event.
            stop: number after the last event.

        Returns:
            Times [stop - start].
        """
        if stop <= start:
            return np.empty(0, np.int64)
        first, last = (int(np.searchsorted(ticks, ticks.dtype.type(one), side="right")) for one in (start, stop - 1))
        edges = np.clip(ticks[first - 1 : last + 1].astype(np.int64), start, stop)
        times = np.repeat(np.arange(first - 1, last, dtype=np.int64), np.diff(edges))
        times <<= self.tick_bits
        times |= words[start:stop] >> np.uint32(self.address_bits)
        return times

    def unpack(self, words: NDArray[np.uint32], ticks: Ticks, start: int, stop: int) -> EventArrays:
        """Decode events number `start` to before `stop`; arguments as for `times`."""
        part = words[start:stop]
        return EventArrays(
            self.times(words, ticks, start, stop),
            self.columns(part).astype(np.uint16),
            self.rows(part).astype(np.uint16),
            self.polarities(part).astype(np.uint8),
        )


def index_of_counts(counts: NDArray[np.int64]) -> Ticks:
    """Compute the index from the number of events in each tick, [K]; the last one has events."""
    ticks = np.zeros(len(counts) + 1, np.uint64)
    np.cumsum(counts, out=ticks[1:], dtype=np.uint64)
    return ticks if ticks[-1] >> np.uint64(32) else ticks.astype(np.uint32)
