"""Windows of events as frames [T, C, H, W]: the representations of `BinningConfig`.

`count` and `binary` have channels (OFF, ON). `last_polarity`: what the released SpikeYOLO was trained on.
`histogram`: stacked histograms of RVT (Gehrig and Scaramuzza, 2023). `voxel`: discretised event volumes of Zhu et al.
(2019). `time_surface`: exponential decay since the last event (Lagorce et al., 2017).
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.binning import (
    CHUNK,
    Edges,
    count,
    count_into,
    edges_at,
    pixel_keys,
    pixel_polarity_keys,
    slice_times,
    slices_by_number,
    slices_by_time,
)
from spikefleet_pipelines.events.binning_config import BinningConfig
from spikefleet_pipelines.events.windows import EventWindow

Frames = NDArray[np.int32] | NDArray[np.uint8] | NDArray[np.float32]
"""Frames [T, C, H, W]."""

NO_EVENT = np.float32(127 / 255)
"""The value of a pixel without events in frames of `last_polarity`."""

_ON, _OFF = np.float32(1), np.float32(0)


def bin_events(window: EventWindow, config: BinningConfig) -> Frames:
    """Compute the frames of a window.

    Args:
        window: of the events; slices of equal time divide the whole of it.
        config: representation and what follows it.

    Returns:
        [T, C, H, W]; C is 2 for count, binary and time_surface, 1 for last_polarity, 2 x bins for histogram, bins for
        voxel.

    Raises:
        StoreError: `area` with a size that does not divide the sensor's, or values that `dtype` does not hold.
    """
    edges = (
        slices_by_number(window, config.slices)
        if config.by == "number"
        else slices_by_time(window, config.slices, config.compat)
    )
    frames: Frames
    if config.kind == "count":
        frames = count(window, edges)
    elif config.kind == "binary":
        frames = np.minimum(count(window, edges), 1)
    elif config.kind == "last_polarity":
        frames = last_polarity(window, edges)
    elif config.kind == "histogram":
        frames = histogram(window, edges, config.bins, config.cut)
    elif config.kind == "voxel":
        frames = voxel(window, edges, config.bins)
    else:
        frames = time_surface(window, slice_times(window, config.slices), config.tau_us)
    return _finish(frames, config)


def last_polarity(window: EventWindow, edges: Edges) -> NDArray[np.float32]:
    """Show the polarity of the last event of each pixel in each slice.

    Returns:
        [T, 1, H, W]: 1 for ON, 0 for OFF, 127/255 where no event was.
    """
    height, width = window.layout.sensor
    frames = np.full((len(edges) - 1, height * width), NO_EVENT, np.float32)
    for frame, start, stop in zip(frames, edges[:-1], edges[1:], strict=True):
        for words in _chunks(window.words[start:stop]):
            # Of equal indices numpy keeps the last assignment, and words are in the order of time.
            frame[pixel_keys(words, window.layout)] = np.where(window.layout.polarities(words), _ON, _OFF)
    return frames.reshape(-1, 1, height, width)


def histogram(window: EventWindow, edges: Edges, bins: int, cut: int) -> NDArray[np.uint8]:
    """Count events in bins of each slice, from its first to its last event.

    bin = min(floor(B (t - first) / max(last - first, 1)), B - 1).

    Args:
        window: of the events.
        edges: of the slices, [T + 1].
        bins: B.
        cut: counts above are cut to it, 1 to 255.

    Returns:
        [T, 2 B, H, W], channel p * B + bin.
    """
    layout = window.layout
    frames = np.zeros((len(edges) - 1, 2, bins, layout.height, layout.width), np.uint8)
    counts = np.empty((2, layout.height, layout.width), np.int32)
    for frame, start, stop in zip(frames, edges[:-1], edges[1:], strict=True):
        inside = _edges_inside(window, int(start), int(stop), bins)
        for place, (first, last) in enumerate(pairwise(inside)):
            if last > first:
                count_into(counts, window.words[first:last], layout)
                frame[:, place] = np.minimum(counts, cut, out=counts)
    return frames.reshape(len(frames), 2 * bins, layout.height, layout.width)


def voxel(window: EventWindow, edges: Edges, bins: int) -> NDArray[np.float32]:
    """Share each event, +1 for ON and -1 for OFF, linearly between the two bins next to its time.

    u = (B - 1) (t - first) / (last - first); with one time in a slice u = 0.

    Args:
        window: of the events.
        edges: of the slices, [T + 1].
        bins: B.

    Returns:
        [T, B, H, W].
    """
    height, width = window.layout.sensor
    frames = np.zeros((len(edges) - 1, bins, height * width), np.float32)
    for frame, start, stop in zip(frames, edges[:-1], edges[1:], strict=True):
        if stop > start:
            _voxel_slice(frame, window, int(start), int(stop))
    return frames.reshape(-1, bins, height, width)


def time_surface(window: EventWindow, times: NDArray[np.int64], tau_us: float) -> NDArray[np.float32]:
    """Compute exp(-(end of the slice - time of the pixel's last event) / tau), 0 where the window had none until then.

    Args:
        window: of the events.
        times: of the slices' edges, us from the start of the recording, [T + 1].
        tau_us: time constant in us.

    Returns:
        [T, 2, H, W], channels (OFF, ON).
    """
    layout = window.layout
    none = np.iinfo(np.int64).min
    latest = np.full(2 * layout.height * layout.width, none, np.int64)
    frames = np.empty((len(times) - 1, 2, layout.height, layout.width), np.float32)
    edges = edges_at(window, times)
    for frame, start, stop, end in zip(frames, edges[:-1], edges[1:], times[1:], strict=True):
        for first in range(int(start), int(stop), CHUNK):
            last = min(first + CHUNK, int(stop))
            latest[pixel_polarity_keys(window.words[first:last], layout)] = window.times(first, last)
        age = np.where(latest == none, np.inf, end - np.maximum(latest, end - (1 << 52)))
        frame[...] = np.exp(-age / tau_us).reshape(frame.shape)
    return frames


def _chunks(words: NDArray[np.uint32]) -> list[NDArray[np.uint32]]:
    return [words[start : start + CHUNK] for start in range(0, len(words), CHUNK)]


def _edges_inside(window: EventWindow, start: int, stop: int, bins: int) -> Edges:
    """Edges of the bins of a slice, [bins + 1], numbers of events of the window."""
    if stop <= start:
        return np.full(bins + 1, start, np.int64)
    first = window.time(start)
    length = max(window.time(stop - 1) - first, 1)
    times = np.array([first + -(-place * length // bins) for place in range(bins)], np.int64)
    edges = np.clip(edges_at(window, times), start, stop)
    edges[0] = start
    return np.append(edges, stop)


def _voxel_slice(frame: NDArray[np.float32], window: EventWindow, start: int, stop: int) -> None:
    """Add the events of a slice to its bins [B, H * W].

    The events between two integer values of u are a range, which adds to two bins only.
    """
    parts = max(len(frame) - 1, 1)
    first = window.time(start)
    length = max(window.time(stop - 1) - first, 1)
    edges = _edges_inside(window, start, stop, parts)
    cells = frame.shape[1]
    for place in range(parts):
        for low in range(int(edges[place]), int(edges[place + 1]), CHUNK):
            high = min(low + CHUNK, int(edges[place + 1]))
            words = window.words[low:high]
            keys = pixel_keys(words, window.layout)
            signs = np.where(window.layout.polarities(words), 1.0, -1.0)
            later = np.zeros(len(words))
            if len(frame) > 1:
                later = (window.times(low, high) - first) * parts / length - place
                frame[place + 1] += np.bincount(keys, signs * later, cells)
            frame[place] += np.bincount(keys, signs * (1 - later), cells)


def _finish(frames: Frames, config: BinningConfig) -> Frames:
    if config.size is not None and config.size != frames.shape[-2:]:
        frames = resized(frames, config.size, config.resize)
    if config.normalise != "none":
        frames = normalised(frames, config.normalise)
    if config.clip is not None:
        frames = _clipped(frames, config.clip)
    return _as_dtype(frames, config.dtype)


def _clipped(frames: Frames, limit: float) -> Frames:
    if frames.dtype == np.float32:
        return np.clip(frames.astype(np.float32, copy=False), np.float32(-limit), np.float32(limit))
    return np.minimum(frames.astype(np.int32, copy=False), np.int32(limit))


def resized(frames: Frames, size: tuple[int, int], how: str) -> Frames:
    """Resize frames [T, C, H, W].

    Args:
        frames: to resize.
        size: new height and width.
        how: "nearest", "area" (sums over blocks, so that counts are kept; as int32) or "bilinear" (antialiased; as
            float32).

    Raises:
        StoreError: "area" with a size that does not divide the old one.
    """
    height, width = frames.shape[-2:]
    if how == "nearest":
        rows, columns = (np.arange(new) * old // new for new, old in zip(size, (height, width), strict=True))
        chosen: Frames = frames[..., rows[:, None], columns]
        return chosen
    if how == "area":
        if height % size[0] or width % size[1]:
            raise StoreError(
                f"resize 'area' sums whole blocks: {height} x {width} pixels cannot become {size[0]} x {size[1]}; "
                "choose a size that divides the sensor's, or another resize"
            )
        blocks = frames.reshape(*frames.shape[:2], size[0], height // size[0], size[1], width // size[1])
        kind = np.float32 if frames.dtype == np.float32 else np.int32
        summed: Frames = blocks.sum(axis=(3, 5), dtype=kind)
        return summed
    import torch  # seconds to import, and only this needs it

    values = torch.from_numpy(frames.astype(np.float32))
    smooth = torch.nn.functional.interpolate(values, size, mode="bilinear", align_corners=False, antialias=True)
    result: NDArray[np.float32] = smooth.numpy()
    return result


def normalised(frames: Frames, how: str) -> NDArray[np.float32]:
    """Normalise each slice of frames [T, C, H, W]; a slice without events stays 0.

    Args:
        frames: to normalise.
        how: "slice_max": over the largest absolute value; "std": the values that are not 0 to mean 0 and standard
            deviation 1 (to 0 where they are all equal).
    """
    values = frames.astype(np.float32)
    for one in values:
        if how == "slice_max":
            one /= max(float(np.abs(one).max()), np.finfo(np.float32).tiny)
            continue
        shown = one != 0
        if shown.any():
            chosen = one[shown].astype(np.float64)
            deviation = float(chosen.std())
            one[shown] = (chosen - chosen.mean()) / deviation if deviation > 0 else 0.0
    return values


def _as_dtype(frames: Frames, dtype: str) -> Frames:
    """Raises StoreError where the type does not hold the values; no value wraps or is rounded."""
    is_whole = frames.dtype != np.float32
    largest = int(frames.max(initial=0)) if is_whole else 0
    if dtype == "smallest":
        dtype = ("uint8" if largest <= 255 else "int32") if is_whole else "float32"
    if dtype == "float32":
        return frames.astype(np.float32, copy=False)
    if not is_whole or (dtype == "uint8" and largest > 255):
        found = f"values up to {largest}" if is_whole else "values that are no integers"
        raise StoreError(f"dtype {dtype!r} does not hold {found}; use dtype 'smallest' or 'float32'")
    return frames.astype(np.uint8, copy=False) if dtype == "uint8" else frames.astype(np.int32, copy=False)
