"""Slices and counts: no event is lost, and every frame is that of a plain loop."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events import binning
from spikefleet_pipelines.events.binning import count, slices_by_number, slices_by_time
from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.events.windows import recording_of
from support.event_arrays import at_times, plain_count, random_events, recordings

SMALL = ((1, 1), (3, 5), (34, 34))
few = settings(max_examples=60, deadline=None)


@few
@given(recordings(), st.integers(1, 17))
def test_by_number(recorded: tuple[EventArrays, Sensor], slices: int) -> None:
    events, sensor = recorded
    total = len(events)
    window = recording_of(events, sensor).span()
    edges = slices_by_number(window, slices)
    places = [
        min(i // (total // slices), slices - 1) if total >= slices else math.floor(i * slices / total)
        for i in range(total)
    ]
    assert np.diff(edges).tolist() == np.bincount(places, minlength=slices).tolist()
    if sensor in SMALL:
        frames = count(window, edges)
        assert frames.dtype == np.int32
        assert np.array_equal(frames, plain_count(events, np.array(places, np.int64), slices, sensor))


@few
@given(recordings(), st.integers(1, 17), st.data())
def test_by_time(recorded: tuple[EventArrays, Sensor], slices: int, data: st.DataObject) -> None:
    events, sensor = recorded
    stored = recording_of(events, sensor)
    last = int(events.t[-1]) if len(events) else 0
    start = data.draw(st.integers(-10, last))
    window = stored.window(start, data.draw(st.integers(1, last + 20)))
    edges = slices_by_time(window, slices)
    inside = events.select((events.t >= start) & (events.t < start + window.length))
    # Slice k holds t with ceil(k L / T) <= t - start, which is k <= floor((t - start) T / L) in integers.
    places = [(int(time) - start) * slices // window.length for time in inside.t]
    assert np.diff(edges).tolist() == np.bincount(places, minlength=slices).tolist()
    assert edges[-1] == len(window) == len(inside)
    if sensor in SMALL:
        assert np.array_equal(count(window, edges), plain_count(inside, np.array(places, np.int64), slices, sensor))


@few
@given(recordings(), st.integers(1, 17))
def test_by_time_as_spikingjelly(recorded: tuple[EventArrays, Sensor], slices: int) -> None:
    events, sensor = recorded
    edges = slices_by_time(recording_of(events, sensor).span(), slices, "spikingjelly")
    places = []
    if len(events):
        first = int(events.t[0])
        step = (int(events.t[-1]) - first) // slices
        for time in events.t.tolist():
            bounds = [(first + k * step, first + (k + 1) * step) for k in range(slices - 1)]
            fits = [k for k, (low, high) in enumerate(bounds) if low <= time < high]
            places.append(fits[0] if fits else slices - 1)
    assert np.diff(edges).tolist() == np.bincount(np.array(places, np.int64), minlength=slices).tolist()


def test_the_two_ways_of_slices_by_time_differ() -> None:
    window = recording_of(at_times([0, 3, 6, 9], (3, 5)), (3, 5)).span()
    assert slices_by_time(window, 4).tolist() == [0, 1, 2, 3, 4]  # L = 10: edges 0, 3, 5, 8
    assert slices_by_time(window, 4, "spikingjelly").tolist() == [0, 1, 2, 2, 4]  # dt = 2: edges 0, 2, 4, 6


@pytest.mark.parametrize("sensor", [(34, 34), (240, 304), (720, 1280), (1, 7)])
@pytest.mark.parametrize("slices", [1, 5])
def test_chunks_and_large_grids_count_the_same(sensor: Sensor, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    events = random_events(3001, sensor, 100_000)
    window = recording_of(events, sensor).span()
    edges = slices_by_time(window, slices)
    expected = np.zeros((slices, 2, *sensor), np.int32)
    places = (events.t - window.start) * slices // window.length
    np.add.at(expected, (places, events.p, events.y, events.x), 1)
    assert np.array_equal(count(window, edges), expected)
    monkeypatch.setattr(binning, "CHUNK", 700)
    assert np.array_equal(count(window, edges), expected)
    monkeypatch.setattr(binning, "_LARGE_GRID", 1)
    assert np.array_equal(count(window, edges), expected)
    events.x[:] = sensor[1] - 1 - events.x  # a comparison that cannot fail would pass this too
    assert not np.array_equal(count(recording_of(events, sensor).span(), edges), expected)


def test_as_tonic_counts() -> None:
    tonic = pytest.importorskip("tonic", reason="tonic is not installed (the extra spikefleet[tonic], GPL-3.0)")
    for sensor, slices in (((34, 34), 8), ((128, 128), 16), ((240, 304), 5)):
        events = random_events(slices * 2000, sensor, 1_000_000)
        kinds = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", bool)])
        table = np.empty(len(events), kinds)
        for name in "xytp":
            table[name] = getattr(events, name)
        frames = tonic.transforms.ToFrame(sensor_size=(sensor[1], sensor[0], 2), n_event_bins=slices)(table)
        window = recording_of(events, sensor).span()
        assert np.array_equal(count(window, slices_by_number(window, slices)), frames)


_BOUND = """
from pathlib import Path
import sys
import numpy as np
from spikefleet_pipelines.events.binning import count, slices_by_number
from spikefleet_pipelines.events.windows import StoredRecording
from spikefleet_pipelines.events.words import WordLayout

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

total, slices = 50_000_000, int(sys.argv[3])
layout = WordLayout(int(sys.argv[1]), int(sys.argv[2]))
words = np.arange(total, dtype=np.uint32) * np.uint32(2654435761)
x, y = layout.columns(words), layout.rows(words)
x %= np.uint32(layout.width)
y %= np.uint32(layout.height)
words &= np.uint32(1 << (layout.x_bits + layout.y_bits))
words |= y << np.uint32(layout.x_bits)
words |= x
del x, y
window = StoredRecording(layout, words, np.array([0, total], np.uint32)).whole()
frames = np.ones((slices, 2, layout.height, layout.width), np.int32)
del frames
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
frames = count(window, slices_by_number(window, slices))
assert int(frames.sum(dtype=np.int64)) == total
print(resident("VmHWM") - before - frames.nbytes)
"""


@pytest.mark.slow  # 5e7 events, the bound that is promised; half a minute and 400 MB
@pytest.mark.parametrize(("height", "width", "slices"), [(128, 128, 16), (240, 304, 4), (720, 1280, 2)])
def test_memory_of_50_million_events(height: int, width: int, slices: int) -> None:
    command = [sys.executable, "-c", _BOUND, *map(str, (height, width, slices))]
    above = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert above < 40_000_000, f"{above / 1e6:.0f} MB above the frames"


def test_a_frame_of_every_slice_is_written_even_without_events() -> None:
    window = recording_of(at_times([], (3, 5)), (3, 5)).window(-5, 10)
    assert not count(window, slices_by_time(window, 4)).any()
    assert not count(window, slices_by_number(window, 4)).any()
    assert not count(window, slices_by_time(window, 4, "spikingjelly")).any()


def test_times_beyond_the_index_are_refused() -> None:
    """A time in Unix microseconds would ask for an index of gigabytes."""
    events = at_times([0, 1_700_000_000_000_000], (34, 34))
    with pytest.raises(StoreError, match=r"the last event is at 1,700,000,000,000,000 us, .* in microseconds"):
        recording_of(events, (34, 34))
