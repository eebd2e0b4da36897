"""Slices of a window of events, and the number of events of each pixel in each slice.

A slice is a range of events, found by search, since events are in the order of time; it is counted straight from the
words, by one `numpy.bincount` over their addresses. No event of a window is lost: the counts add up to its events.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.events.windows import EventWindow
from spikefleet_pipelines.events.words import WordLayout

Edges = NDArray[np.int64]
"""Numbers of the first event of each slice in its window, and of the end of the last one, [T + 1]."""

CHUNK = 1 << 20
"""Events that are counted at a time: their copy as int64, which bincount makes, is 8 MB."""

_LARGE_GRID = 1 << 20
"""Cells from which a grid whose sides are powers of two costs more than computing y * W + x."""


def slices_by_number(window: EventWindow, slices: int) -> Edges:
    """Divide the events of a window into slices of the same number of events.

    Event i of N goes to slice min(i // (N // T), T - 1); with fewer events than slices to floor(i T / N).

    Args:
        window: its N events.
        slices: T, at least 1.
    """
    count, steps = len(window), np.arange(slices + 1, dtype=np.int64)
    if count < slices:
        return -(-steps * count // slices)
    edges = steps * (count // slices)
    edges[-1] = count
    return edges


def slice_times(window: EventWindow, slices: int) -> NDArray[np.int64]:
    """Start of each slice of equal time, and the end of the last one: start + ceil(k L / T), [T + 1]."""
    steps = range(slices + 1)  # as Python's integers: k L may be beyond int64
    return np.array([window.start + -(-step * window.length // slices) for step in steps], np.int64)


def slices_by_time(window: EventWindow, slices: int, compat: Literal["spikingjelly"] | None = None) -> Edges:
    """Divide a window into slices of the same time.

    Slice k is [start + ceil(k L / T), start + ceil((k + 1) L / T)), exact in microseconds.

    Args:
        window: its start and its length L.
        slices: T, at least 1.
        compat: "spikingjelly": slices of (last - first time) // T from the first event on, the last one to the end.
            Unlike there, empty slices are allowed.
    """
    if compat is None:
        return edges_at(window, slice_times(window, slices))
    if not len(window):
        return np.zeros(slices + 1, np.int64)
    first = window.time(0)
    step = (window.time(len(window) - 1) - first) // slices
    edges = edges_at(window, first + step * np.arange(slices + 1, dtype=np.int64))
    edges[-1] = len(window)
    return edges


def edges_at(window: EventWindow, times: NDArray[np.int64]) -> Edges:
    """Number of the window's events before each time, [n]; times count from the recording's start."""
    return np.array([window.first_at(int(time)) for time in times], np.int64)


def count(window: EventWindow, edges: Edges) -> NDArray[np.int32]:
    """Count the events of each pixel and polarity in each slice.

    Args:
        window: of the events.
        edges: of the slices, [T + 1].

    Returns:
        Counts [T, 2, H, W]; channel 0 is OFF, channel 1 is ON.
    """
    layout = window.layout
    frames = np.empty((len(edges) - 1, 2, layout.height, layout.width), np.int32)
    for frame, start, stop in zip(frames, edges[:-1], edges[1:], strict=True):
        count_into(frame, window.words[start:stop], layout)
    return frames


def count_into(frame: NDArray[np.int32], words: NDArray[np.uint32], layout: WordLayout) -> None:
    """Write the number of events of each pixel and polarity into a frame [2, H, W]."""
    _count_chunk(frame, words[:CHUNK], layout, first=True)
    for start in range(CHUNK, len(words), CHUNK):
        _count_chunk(frame, words[start : start + CHUNK], layout, first=False)


def pixel_keys(words: NDArray[np.uint32], layout: WordLayout) -> NDArray[np.uint32]:
    """Return y * W + x of each word, [n]."""
    keys = layout.rows(words)
    keys *= np.uint32(layout.width)
    keys += layout.columns(words)
    return keys


def pixel_polarity_keys(words: NDArray[np.uint32], layout: WordLayout) -> NDArray[np.uint32]:
    """Return (p * H + y) * W + x of each word, [n]."""
    keys = pixel_keys(words, layout)
    keys += layout.polarities(words) * np.uint32(layout.height * layout.width)
    return keys


def _count_chunk(frame: NDArray[np.int32], words: NDArray[np.uint32], layout: WordLayout, first: bool) -> None:
    cells, padded = frame.size, 1 << layout.address_bits
    if padded > _LARGE_GRID and padded > cells:
        found = np.bincount(pixel_polarity_keys(words, layout), minlength=cells).reshape(frame.shape)
    else:
        grid = np.bincount(words & layout.address_mask, minlength=padded)
        found = grid.reshape(2, 1 << layout.y_bits, 1 << layout.x_bits)[:, : layout.height, : layout.width]
    if first:
        frame[...] = found
    else:
        frame += found
