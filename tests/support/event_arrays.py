"""Events for tests: random ones, strategies of hypothesis, and the representations as plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from spikefleet_pipelines.events.recording import EventArrays, Sensor

SENSORS: tuple[Sensor, ...] = ((1, 1), (34, 34), (128, 128), (180, 240), (240, 304), (720, 1280), (2048, 4096), (3, 5))


def random_events(count: int, sensor: Sensor, length: int, seed: int = 0) -> EventArrays:
    """`count` events within `length` us, in the order of time; the places follow no order."""
    random = np.random.default_rng(seed)
    return EventArrays(
        np.sort(random.integers(0, length, count)),
        random.integers(0, sensor[1], count).astype(np.uint16),
        random.integers(0, sensor[0], count).astype(np.uint16),
        random.integers(0, 2, count).astype(np.uint8),
    )


def at_times(times: Sequence[int], sensor: Sensor, seed: int = 0) -> EventArrays:
    """Events at given times, at random places."""
    return EventArrays(np.array(times, np.int64), *_places(len(times), sensor, seed))


def joined(parts: Sequence[EventArrays]) -> EventArrays:
    """Events of several arrays, one after the other."""
    return EventArrays(*(np.concatenate([getattr(part, name) for part in parts]) for name in "txyp"))


def equal(one: EventArrays, other: EventArrays) -> bool:
    """Whether two arrays hold the same events in the same order."""
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in "txyp")


@st.composite
def recordings(draw: st.DrawFn, most: int = 60) -> tuple[EventArrays, Sensor]:
    """Events in the order of time, with equal times, times around ticks, and some beyond 2^32 us."""
    sensor = draw(st.one_of(st.sampled_from(SENSORS), st.tuples(st.integers(1, 2048), st.integers(1, 4096))))
    bits = 32 - 1 - (sensor[0] - 1).bit_length() - (sensor[1] - 1).bit_length()
    tick = 1 << bits
    few_ticks = min(40 * tick, 1 << 34)
    at_edges = st.builds(lambda k, d: max(0, k * tick + d), st.integers(0, 40), st.integers(-1, 1))
    any_time = st.one_of(st.integers(0, 50), st.integers(0, few_ticks), at_edges)
    times = draw(st.lists(any_time, max_size=most))
    far = draw(st.booleans())
    if times and far:
        times.append((1 << 32) + draw(st.integers(0, 1000)) if (1 << 32) // tick < 1 << 20 else max(times))
    return at_times(sorted(times), sensor, draw(st.integers(0, 99))), sensor


def plain_count(events: EventArrays, slice_of: NDArray[np.int64], slices: int, sensor: Sensor) -> NDArray[np.int64]:
    """Counts [T, 2, H, W], event by event."""
    frames = np.zeros((slices, 2, *sensor), np.int64)
    for k, x, y, p in zip(slice_of, events.x, events.y, events.p, strict=True):
        frames[k, p, y, x] += 1
    return frames


def _places(count: int, sensor: Sensor, seed: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint8]]:
    random = np.random.default_rng(seed)
    return (
        random.integers(0, sensor[1], count).astype(np.uint16),
        random.integers(0, sensor[0], count).astype(np.uint16),
        random.integers(0, 2, count).astype(np.uint8),
    )
