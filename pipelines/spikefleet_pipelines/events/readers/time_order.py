"""Recordings whose times run back a little, brought into time order without holding them in memory."""

from collections.abc import Iterator

import numpy as np

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.reader import MOST_EVENTS, EventReader, ReadAudit
from spikefleet_pipelines.events.recording import EventArrays

_FARTHEST_US = 1_000_000
_LARGEST_SHARE = 0.01


def in_time_order(reader: EventReader) -> Iterator[EventArrays]:
    """Yield the events of a recording in time order; events of equal times keep the order of the file.

    The file is read twice: nothing is yielded of a recording that is refused, and the second pass holds back only what
    a later event may still precede.

    Raises:
        SourceError: times run back by 1 s or more, or in 1 % of the events or more; or as iterating over the reader.
    """
    found = scan(reader)
    if not found.out_of_order:
        yield from reader
        return
    waiting: EventArrays | None = None
    for chunk in reader:
        waiting = chunk if waiting is None else _joined(waiting, chunk)
        waiting = waiting.select(np.argsort(waiting.t, kind="stable"))
        safe = int(np.searchsorted(waiting.t, waiting.t[-1] - found.largest_step_back))
        yield from _chunks(waiting.select(slice(safe)))
        waiting = waiting.select(slice(safe, None))
    if waiting is not None:
        yield from _chunks(waiting)


def scan(reader: EventReader) -> ReadAudit:
    """Read a recording to its end and check that its times run back at most a little.

    Raises:
        SourceError: as `in_time_order`.
    """
    for _ in reader:
        pass
    found = reader.audit
    many = found.out_of_order and found.out_of_order >= _LARGEST_SHARE * found.events
    if many or found.largest_step_back >= _FARTHEST_US:
        raise SourceError(
            f"{reader.path} is not in time order: {found.out_of_order:,} of {found.events:,} events are earlier than "
            f"one before them, by up to {found.largest_step_back:,} us; allowed are less than 1 % of events and less "
            "than 1 s; sort its events by time"
        )
    return found


def _joined(first: EventArrays, second: EventArrays) -> EventArrays:
    return EventArrays(
        np.concatenate([first.t, second.t]),
        np.concatenate([first.x, second.x]),
        np.concatenate([first.y, second.y]),
        np.concatenate([first.p, second.p]),
    )


def _chunks(events: EventArrays) -> Iterator[EventArrays]:
    for start in range(0, len(events.t), MOST_EVENTS):
        yield events.select(slice(start, start + MOST_EVENTS))
