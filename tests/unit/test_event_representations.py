"""Representations against event-by-event loops written from their definitions, and the options after them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events import representations
from spikefleet_pipelines.events.binning_config import BinningConfig
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.representations import bin_events, normalised, resized
from spikefleet_pipelines.events.windows import EventWindow, recording_of
from support.event_arrays import at_times, random_events

SENSOR = (3, 5)
few = settings(max_examples=40, deadline=None)
times = st.lists(st.one_of(st.integers(0, 30), st.integers(0, 3_000_000)), max_size=50).map(sorted)


def windows(listed: list[int]) -> list[EventWindow]:
    stored = recording_of(at_times(listed, SENSOR), SENSOR)
    return [stored.span(), stored.window(-7, 40), stored.whole()]


def sliced(window: EventWindow, slices: int) -> list[EventArrays]:
    events = window.events()
    places = (events.t - window.start) * slices // window.length
    return [events.select(places == k) for k in range(slices)]


def each(events: EventArrays) -> list[tuple[int, int, int, int]]:
    return list(zip(events.t.tolist(), events.x.tolist(), events.y.tolist(), events.p.tolist(), strict=True))


def loop_histogram(events: EventArrays, bins: int, cut: int) -> NDArray[np.int64]:
    frame = np.zeros((2 * bins, *SENSOR), np.int64)
    for t, x, y, p in each(events):
        first, last = int(events.t[0]), int(events.t[-1])
        place = min(bins * (t - first) // max(last - first, 1), bins - 1)
        frame[p * bins + place, y, x] += 1
    return np.minimum(frame, cut)


def loop_voxel(events: EventArrays, bins: int) -> NDArray[np.float64]:
    frame = np.zeros((bins, *SENSOR))
    for t, x, y, p in each(events):
        first, last = int(events.t[0]), int(events.t[-1])
        u = (bins - 1) * (t - first) / max(last - first, 1)
        for place in range(bins):
            frame[place, y, x] += (2 * p - 1) * max(0.0, 1 - abs(place - u))
    return frame


@few
@given(times, st.integers(1, 5), st.integers(1, 6))
def test_histogram_and_voxel(listed: list[int], slices: int, bins: int) -> None:
    for window in windows(listed):
        parts = sliced(window, slices)
        frames = bin_events(window, BinningConfig(kind="histogram", slices=slices, bins=bins, cut=3))
        assert frames.dtype == np.uint8
        assert np.array_equal(frames, [loop_histogram(part, bins, 3) for part in parts])
        volumes = bin_events(window, BinningConfig(kind="voxel", slices=slices, bins=bins))
        assert volumes.dtype == np.float32
        assert np.allclose(volumes, [loop_voxel(part, bins) for part in parts], atol=1e-5)
        signs = sum(2 * int(p) - 1 for part in parts for p in part.p)
        assert math.isclose(float(volumes.sum(dtype=np.float64)), signs, abs_tol=1e-4)  # no event is lost


@few
@given(times, st.integers(1, 5))
def test_last_polarity_and_time_surface(listed: list[int], slices: int) -> None:
    for window in windows(listed):
        polarity = bin_events(window, BinningConfig(kind="last_polarity", slices=slices))
        surface = bin_events(window, BinningConfig(kind="time_surface", slices=slices, tau_us=500.0))
        latest: dict[tuple[int, int, int], int] = {}
        for k, part in enumerate(sliced(window, slices)):
            expected, decay = np.full((1, *SENSOR), np.float32(127 / 255)), np.zeros((2, *SENSOR))
            for t, x, y, p in each(part):
                expected[0, y, x] = p
                latest[p, y, x] = t
            end = window.start + -(-(k + 1) * window.length // slices)
            for place, t in latest.items():
                decay[place] = math.exp(-(end - t) / 500)
            assert np.array_equal(polarity[k], expected)
            assert np.allclose(surface[k], decay, atol=1e-6)


def test_binary_and_dtypes() -> None:
    window = recording_of(at_times([1] * 600, (1, 1)), (1, 1)).span()
    counts = bin_events(window, BinningConfig(slices=1))
    assert (str(counts.dtype), counts.sum()) == ("int32", 600)  # more than uint8 holds
    assert bin_events(window, BinningConfig(slices=2, by="number")).dtype == np.uint8
    binary = bin_events(window, BinningConfig(kind="binary", slices=1))
    assert (str(binary.dtype), binary.ravel().tolist()) == ("uint8", [1, 1])
    assert bin_events(window, BinningConfig(slices=1, dtype="float32")).dtype == np.float32
    assert bin_events(window, BinningConfig(slices=1, clip=7)).max() == 7
    assert bin_events(window, BinningConfig(slices=1, clip=7)).dtype == np.uint8
    with pytest.raises(StoreError, match=r"'uint8' does not hold values up to [23]"):
        bin_events(window, BinningConfig(slices=1, dtype="uint8"))
    with pytest.raises(StoreError, match="values that are no integers"):
        bin_events(window, BinningConfig(kind="voxel", slices=1, dtype="int32"))


@pytest.mark.parametrize("kind", ["histogram", "voxel", "time_surface", "last_polarity"])
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window = recording_of(random_events(2000, SENSOR, 100_000), SENSOR).span()
    config = BinningConfig.model_validate({"kind": kind, "slices": 3, "bins": 4})
    whole = bin_events(window, config)
    monkeypatch.setattr(representations, "CHUNK", 70)
    assert np.allclose(bin_events(window, config), whole, atol=1e-5)
    mirrored = recording_of(random_events(2000, SENSOR, 100_000, seed=1), SENSOR).span()
    assert not np.allclose(bin_events(mirrored, config), whole, atol=1e-5)


def test_resizing() -> None:
    window = recording_of(random_events(5000, (12, 8), 1000), (12, 8)).span()
    counts = bin_events(window, BinningConfig(slices=2, dtype="int32"))
    area = bin_events(window, BinningConfig(slices=2, size=(4, 2), resize="area", dtype="int32"))
    assert area.sum() == 5000
    assert np.array_equal(area[0, 1], counts[0, 1].reshape(4, 3, 2, 4).sum((1, 3)))
    nearest = resized(counts, (5, 5), "nearest")
    reference = torch.nn.functional.interpolate(torch.from_numpy(counts).double(), (5, 5), mode="nearest")
    assert np.array_equal(nearest, reference.numpy())
    smooth = bin_events(window, BinningConfig(slices=2, size=(6, 4), resize="bilinear"))
    assert smooth.dtype == np.float32
    assert math.isclose(smooth.mean(), counts.mean(), rel_tol=0.05)
    with pytest.raises(StoreError, match="12 x 8 pixels cannot become 5 x 4"):
        bin_events(window, BinningConfig(size=(5, 4), resize="area"))


def test_normalising() -> None:
    frames = np.array([[[[0, 2], [4, 0]]], [[[0, 0], [0, 0]]], [[[3, 3], [0, 0]]]], np.int32)
    assert normalised(frames, "slice_max").ravel().tolist() == [0, 0.5, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0]
    assert normalised(frames, "std").ravel().tolist() == [0, -1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    window = recording_of(at_times([1, 1, 1, 9], (1, 1)), (1, 1)).span()
    assert bin_events(window, BinningConfig(slices=2, normalise="slice_max")).max(axis=(1, 2, 3)).tolist() == [1, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "voxel", "by": "number"},
        {"compat": "spikingjelly", "by": "number"},
        {"compat": "spikingjelly", "kind": "histogram"},
        {"size": (0, 4)},
        {"slices": 0},
        {"cut": 256},
        {"clip": 0},
        {"tau_us": math.inf},
        {"slice": 3},
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BinningConfig.model_validate(wrong)
    assert BinningConfig.model_validate({"kind": "voxel"}).bins == 10
