"""Binning of 10^6 events by number: from the store's words, by a plain numpy ToFrame, and by tonic if it is installed.

All in one process, round by round, in processor time of this thread; equal counts are asserted. The plain ToFrame is
written from the description of tonic's: events are divided by number, and each slice is counted by `numpy.add.at`.
tonic is measured if it is installed (the extra spikefleet[tonic], GPL-3.0, or another folder on PYTHONPATH). The exit
code is 1 if the words are less than ten times as fast as another way.

    python tests/bench/bench_event_binning.py [EVENTS]
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.events.binning import count, slices_by_number, slices_by_time
from spikefleet_pipelines.events.recording import EventArrays, Sensor
from spikefleet_pipelines.events.windows import recording_of

ROUNDS = 7
CASES: tuple[tuple[Sensor, int], ...] = (((128, 128), 16), ((240, 304), 5), ((34, 34), 8))
WINDOWS = 200


def made(events: int, sensor: Sensor, clustered: bool) -> EventArrays:
    """Random events within a second; clustered ones are around 20 places, as edges make them."""
    random = np.random.default_rng(0)
    height, width = sensor
    places = random.random((2, events))
    if clustered:
        centres = random.random((2, 20))[:, random.integers(0, 20, events)]
        places = np.clip(centres + 0.04 * random.standard_normal((2, events)), 0, 0.999)
    return EventArrays(
        np.sort(random.integers(0, 1_000_000, events)),
        (places[0] * width).astype(np.uint16),
        (places[1] * height).astype(np.uint16),
        random.integers(0, 2, events).astype(np.uint8),
    )


def plain_to_frame(table: NDArray[Any], sensor: Sensor, slices: int) -> NDArray[np.int16]:
    """Frames [T, 2, H, W] as the description of tonic's ToFrame(n_event_bins=T) says, in plain numpy."""
    size = len(table) // slices
    frames = np.zeros((slices, 2, *sensor), np.int16)
    for number in range(slices):
        part = table[number * size : (number + 1) * size]
        np.add.at(frames, (number, part["p"].astype(int), part["y"], part["x"]), 1)
    return frames


def measure(events: int, sensor: Sensor, slices: int, clustered: bool) -> dict[str, float]:
    """Median of the million events per second of processor time, of each way."""
    arrays = made(events - events % slices, sensor, clustered)
    table = np.empty(len(arrays), [("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.bool_)])
    for name in table.dtype.names or ():
        table[name] = getattr(arrays, name)
    window = recording_of(arrays, sensor).span()
    ways: dict[str, Callable[[], NDArray[Any]]] = {
        "words": lambda: count(window, slices_by_number(window, slices)),
        "plain numpy": lambda: plain_to_frame(table, sensor, slices),
    }
    if importlib.util.find_spec("tonic"):
        tonic = importlib.import_module("tonic")
        ways["tonic"] = tonic.transforms.ToFrame(sensor_size=(sensor[1], sensor[0], 2), n_event_bins=slices).__call__
        ways["tonic"] = lambda to_frame=ways["tonic"]: to_frame(table)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected = ways["words"]()
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.thread_time()
            frames = way()
            seconds[name].append(time.thread_time() - start)
            assert np.array_equal(frames, expected), name
    return {name: len(arrays) / 1e6 / float(np.median(each)) for name, each in seconds.items()}


def measure_windows(events: int) -> float:
    """Milliseconds of processor time to find and count a window of 50 ms of a recording of 304 x 240."""
    recording = recording_of(made(events, (240, 304), True), (240, 304))
    starts = np.random.default_rng(1).integers(0, 950_000, WINDOWS)
    start = time.thread_time()
    for place in starts:
        window = recording.window(int(place), 50_000)
        count(window, slices_by_time(window, 1))
    return (time.thread_time() - start) / WINDOWS * 1e3


def main() -> int:
    slowest = np.inf
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    print(f"{events:,} events, medians of {ROUNDS} rounds in million events per second; in brackets words over it")
    for sensor, slices in CASES:
        for clustered in (False, True):
            speeds = measure(events, sensor, slices, clustered)
            slowest = min(slowest, *(speeds["words"] / speeds[name] for name in speeds if name != "words"))
            found = "  ".join(f"{name} {speed:.0f} ({speeds['words'] / speed:.1f}x)" for name, speed in speeds.items())
            places = "clustered" if clustered else "uniform"
            print(f"{sensor[1]}x{sensor[0]} T={slices:<3} {places:9} {found}")
    print(f"a window of 50 ms of {events:,} events a second at 304x240: {measure_windows(events):.2f} ms")
    return int(slowest < 10)


if __name__ == "__main__":
    sys.exit(main())
