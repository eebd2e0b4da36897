"""A recording that is read in chunks: what all formats share.

A format decodes bytes into events; limits of the sensor, order in time and what was left out are handled here, alike
for all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.options import MOST_PIXELS, ReadOptions
from spikefleet_pipelines.events.recording import EventArrays, Sensor

MOST_EVENTS = 1 << 22
"""Largest chunk."""

Integers = NDArray[np.integer[Any]]


class Decoded(NamedTuple):
    """Events as a file has them: coordinates may lie outside the sensor, and be negative where they are signed."""

    t: NDArray[np.int64]
    x: Integers
    y: Integers
    p: NDArray[np.uint8]

    def rows(self, chosen: slice | NDArray[np.bool_]) -> "Decoded":
        """Return some of the events."""
        return Decoded(self.t[chosen], self.x[chosen], self.y[chosen], self.p[chosen])


@dataclass
class ReadAudit:
    """What was found in a recording; complete when it was read to its end.

    Attributes:
        events: number of events, without those that were left out.
        out_of_order: events that are earlier than one before them.
        largest_step_back: of all events, how much earlier one is than the latest before it, in us.
        outside: events outside the sensor that were left out (`outside=drop`).
        invalid: events that were left out because the file marks them as invalid, or because no time, row or base
            comes before them.
        cut_bytes: bytes after the last whole event.
        wraps: how often the file's counter of time started again.
        other_words: words and packets that are no events of pixels, such as triggers.
    """

    events: int = 0
    out_of_order: int = 0
    largest_step_back: int = 0
    outside: int = 0
    invalid: int = 0
    cut_bytes: int = 0
    wraps: int = 0
    other_words: int = 0


Decode = Callable[[ReadAudit], Iterator[Decoded]]
"""Decodes a file from its start; counts what it skips."""


class EventReader:
    """The events of a file. Each iteration reads the file again and yields chunks of at most `MOST_EVENTS` events.

    Events have the order of the file, also where their times run back; `time_order.in_time_order` sorts them.

    Args:
        path: of the file.
        sensor: size as the file states it; None where it does not.
        decode: reads the file.
        options: of the reader.

    Raises:
        SourceError: the file's size and that of the options differ.
    """

    def __init__(self, path: Path, sensor: Sensor | None, decode: Decode, options: ReadOptions) -> None:
        if sensor and options.sensor and sensor != options.sensor:
            raise SourceError(
                f"{path} has sensor {_size(sensor)}, but the option is sensor={_size(options.sensor)}; leave the "
                "option out, or remove the file"
            )
        self.path = path
        self.sensor = sensor or options.sensor
        self.audit = ReadAudit()
        self._decode = decode
        self._options = options

    def require_sensor(self) -> Sensor:
        """Return the size of the sensor.

        Raises:
            SourceError: neither file nor options have it.
        """
        if self.sensor is None:
            raise SourceError(
                f"{self.path} does not state the size of its sensor; set sensor=HxW, as in sensor=240x304"
            )
        return self.sensor

    def __iter__(self) -> Iterator[EventArrays]:
        """Read the file from its start; `audit` is new and belongs to this iteration.

        Raises:
            SourceError: the file is damaged, or holds what the options refuse.
        """
        audit = self.audit = ReadAudit()
        latest: int | None = None
        with reading(self.path):
            for decoded in self._decode(audit):
                for start in range(0, len(decoded.t), MOST_EVENTS):
                    part = decoded.rows(slice(start, start + MOST_EVENTS))
                    events = self._inside(part, audit)
                    if not len(events.t):
                        continue
                    latest = _count_order(events.t, latest, audit)
                    audit.events += len(events.t)
                    yield events
        if self._options.strict:
            self._refuse_flaws(audit)

    def _inside(self, part: Decoded, audit: ReadAudit) -> EventArrays:
        height, width = self.sensor or (MOST_PIXELS, MOST_PIXELS)
        if _exceeds(part.x, width) or _exceeds(part.y, height):
            inside = (part.x >= 0) & (part.x < width) & (part.y >= 0) & (part.y < height)
            if self._options.outside == "refuse":
                row = int(np.argmin(inside))
                number = audit.events + audit.outside + row
                raise SourceError(
                    f"{self.path}: event {number:,} is at x={part.x[row]}, y={part.y[row]}, outside the sensor "
                    f"{_size((height, width))} (height x width); set the right sensor=HxW, or outside=drop to leave "
                    "such events out"
                )
            audit.outside += len(inside) - int(np.count_nonzero(inside))
            part = part.rows(inside)
        y = part.y.astype(np.uint16, copy=False)
        if self._options.y_axis == "up":
            y = (self.require_sensor()[0] - 1 - y.astype(np.int64)).astype(np.uint16)
        return EventArrays(part.t, part.x.astype(np.uint16, copy=False), y, part.p)

    def _refuse_flaws(self, audit: ReadAudit) -> None:
        for count, what in ((audit.cut_bytes, "bytes after its last whole event"), (audit.invalid, "invalid events")):
            if count:
                raise SourceError(f"{self.path} has {count:,} {what}; replace the file, or set strict=false")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what an operating system says of a file into a SourceError."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error


def damaged(path: Path, what: str) -> SourceError:
    """Create the error for a file whose content contradicts its format."""
    return SourceError(f"{path} is damaged: {what}; replace the file")


def _exceeds(values: Integers, end: int) -> bool:
    if not len(values):
        return False
    return int(values.max()) >= end or (values.dtype.kind == "i" and int(values.min()) < 0)


def _count_order(t: NDArray[np.int64], latest: int | None, audit: ReadAudit) -> int:
    """Count times that run back; return the latest time so far."""
    first = int(t[0]) if latest is None else latest
    if first <= t[0] and (t[1:] >= t[:-1]).all():
        return int(t[-1])
    latest_before = np.maximum.accumulate(np.concatenate([[first], t]))
    back = latest_before[:-1] - t
    audit.out_of_order += int(np.count_nonzero(back > 0))
    audit.largest_step_back = max(audit.largest_step_back, int(back.max()))
    return int(latest_before[-1])


def _size(sensor: Sensor) -> str:
    return f"{sensor[0]}x{sensor[1]}"
