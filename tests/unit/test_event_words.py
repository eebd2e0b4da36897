"""Words of four bytes and their index, against plain arrays: all sensors, ticks, equal times, windows at every edge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.events.windows import StoredRecording, recording_of
from spikefleet_pipelines.events.words import WordLayout, index_of_counts
from support.event_arrays import at_times, equal, random_events, recordings

few = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize(
    ("sensor", "address", "tick"),
    [
        ((34, 34), 13, 19),
        ((128, 128), 15, 17),
        ((180, 240), 17, 15),
        ((240, 304), 18, 14),
        ((480, 640), 20, 12),
        ((720, 1280), 22, 10),
        ((2048, 4096), 24, 8),
        ((1, 1), 1, 31),
    ],
)
def test_bits_of_known_sensors(sensor: Sensor, address: int, tick: int) -> None:
    layout = WordLayout(*sensor)
    assert (layout.address_bits, layout.tick_bits) == (address, tick)


def test_one_word_bit_by_bit() -> None:
    layout = WordLayout(240, 304)
    events = EventArrays(
        np.array([(3 << 14) | 77]), np.array([301], np.uint16), np.array([200], np.uint16), np.array([1], np.uint8)
    )
    assert layout.pack(events).tolist() == [77 << 18 | 1 << 17 | 200 << 9 | 301]
    assert layout.index(events.t).tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("sensor", [(0, 5), (4096, 4096), (2049, 4096)])
def test_a_sensor_without_place_for_its_address_is_refused(sensor: Sensor) -> None:
    with pytest.raises(StoreError, match=f"sensor is {sensor[0]} x {sensor[1]}"):
        WordLayout(*sensor)


@few
@given(recordings())
def test_events_come_back(recorded: tuple[EventArrays, Sensor]) -> None:
    events, sensor = recorded
    stored = recording_of(events, sensor)
    assert stored.words.dtype == np.uint32
    assert equal(stored.events(), events)
    assert stored.ticks[-1] == len(events)
    expected = [(events.t < k << stored.layout.tick_bits).sum() for k in range(min(len(stored.ticks), 50))]
    assert stored.ticks[:50].tolist() == expected


@few
@given(recordings(), st.data())
def test_windows_hold_what_a_comparison_of_times_selects(
    recorded: tuple[EventArrays, Sensor], data: st.DataObject
) -> None:
    events, sensor = recorded
    stored = recording_of(events, sensor)
    edges = sorted({time + step for time in events.t.tolist() for step in (-1, 0, 1)} | {-5, 0, 1 << 40})
    for _ in range(4):
        start, end = data.draw(st.sampled_from(edges)), data.draw(st.sampled_from(edges))
        if end <= start:
            start, end = end, start + 1
        window = stored.window(start, end - start)
        chosen = (events.t >= start) & (events.t < end)
        assert equal(window.events(), events.select(chosen))
        assert np.array_equal(window.times(), events.t[chosen])
        assert window.first_at(end - 1) == (events.t[chosen] < end - 1).sum()


@pytest.mark.parametrize("sensor", [(1, 1), (240, 304), (720, 1280)])
def test_every_time_of_two_ticks_is_found(sensor: Sensor) -> None:
    layout = WordLayout(*sensor)
    around = [k * (1 << layout.tick_bits) + d for k in range(3) for d in (-2, -1, 0, 1)]
    events = at_times(sorted([time for time in around if time >= 0] * 2), sensor)
    stored = recording_of(events, sensor)
    for time in [*around, around[-1] + 1, 1 << 50, -(1 << 50)]:
        assert stored.first_at(time) == (events.t < time).sum(), time


def test_times_beyond_32_bits() -> None:
    events = at_times([0, (1 << 32) - 1, 1 << 32, (1 << 33) + 5], (34, 34))
    stored = recording_of(events, (34, 34))
    assert equal(stored.events(), events)
    assert equal(stored.window(1 << 32, 1).events(), events.select(slice(2, 3)))


def test_words_and_ticks_of_a_window_are_views() -> None:
    stored = recording_of(random_events(100_000, (240, 304), 1_000_000), (240, 304))
    window = stored.window(200_000, 300_000)
    assert np.shares_memory(window.words, stored.words)
    assert np.shares_memory(window.ticks, stored.ticks)
    assert window.ticks[0] <= window.first <= window.ticks[1]
    assert window.ticks[-2] <= window.stop <= window.ticks[-1]


def test_spans() -> None:
    stored = recording_of(at_times([10, 10, 25], (3, 5)), (3, 5))
    span, whole = stored.span(), stored.whole()
    assert (span.start, span.length, len(span)) == (10, 16, 3)
    assert (whole.start, whole.length, len(whole)) == (0, 26, 3)
    empty = recording_of(at_times([], (3, 5)), (3, 5))
    assert len(empty.span()) == len(empty.whole()) == len(empty.window(-10, 100)) == 0
    with pytest.raises(ValueError, match="length of a window is 0 us"):
        stored.window(0, 0)


def test_the_index_has_64_bits_from_2_32_events_on() -> None:
    assert index_of_counts(np.array([1 << 31, (1 << 31) - 1])).dtype == np.uint32
    ticks = index_of_counts(np.array([1 << 31, 1 << 31]))
    assert ticks.dtype == np.uint64
    assert ticks.tolist() == [0, 1 << 31, 1 << 32]
    stored = StoredRecording(WordLayout(720, 1280), np.zeros(3, np.uint32), np.array([0, 1, 3], np.uint64))
    assert stored.events().t.tolist() == [0, 1024, 1024]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"x": 5}, "column 5"), ({"y": 3}, "row 3"), ({"p": 2}, "polarity 2"), ({"t": -1}, "negative or not sorted")],
)
def test_events_that_no_word_holds_are_refused(change: dict[str, int], message: str) -> None:
    events = at_times([1, 2, 3], (3, 5))
    for name, value in change.items():
        getattr(events, name)[1] = value
    with pytest.raises(StoreError, match=message):
        recording_of(events, (3, 5))
