"""Frames of events as RGB images: blue where pixels got brighter (ON), red where darker (OFF), grey without events."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.events.binning import count
from spikefleet_pipelines.events.binning_config import Kind
from spikefleet_pipelines.events.windows import EventWindow

OFF, ON = np.array([200.0, 50, 30]), np.array([25.0, 90, 200])
GROUND = 238.0
"""Grey of a pixel without events: the border of the sensor shows on white paper."""
COLOURS = "blue: ON, red: OFF"
_FAINTEST = 0.3
_GAP = 2
"""Pixels between the slices of a strip."""

Pixels = NDArray[np.uint8]
Counts = NDArray[np.floating[Any]] | NDArray[np.integer[Any]]


def scale_of(counts: Counts) -> float:
    """Return the count that is drawn in full colour: of the pixels with events, nearly the largest one."""
    shown = counts[counts > 0]
    return float(np.percentile(shown, 99)) if len(shown) else 1.0


def coloured(counts: Counts, scale: float) -> Pixels:
    """Draw counts [2, H, W] (OFF, ON) as uint8 [3, H, W]: grey without events, darker with more."""
    total = counts.sum(0)
    share_on = np.divide(counts[1], total, out=np.zeros(total.shape), where=total > 0)
    colour = OFF + (ON - OFF) * share_on[..., None]
    strength = np.where(total > 0, _FAINTEST + (1 - _FAINTEST) * np.minimum(counts.max(0) / scale, 1), 0)[..., None]
    pixels = GROUND * (1 - strength) + colour * strength
    return np.ascontiguousarray(pixels.round().astype(np.uint8).transpose(2, 0, 1))


def whole_counts(window: EventWindow) -> NDArray[np.int32]:
    """Count all events of a window, [2, H, W]."""
    return count(window, np.array([0, len(window)], np.int64))[0]


def window_image(window: EventWindow) -> Pixels:
    """Draw all events of a window, uint8 [3, H, W]."""
    counts = whole_counts(window)
    return coloured(counts, scale_of(counts))


def polarity_counts(frames: Counts, kind: Kind) -> Counts:
    """Reduce frames [T, C, H, W] of a representation to what is drawn of OFF and ON, [T, 2, H, W]."""
    if kind == "last_polarity":
        return np.concatenate([frames < 0.25, frames > 0.75], axis=1).astype(np.float32)
    if kind == "voxel":
        return np.stack([np.maximum(-frames, 0).sum(1), np.maximum(frames, 0).sum(1)], axis=1)
    if kind == "histogram":
        return frames.reshape(len(frames), 2, -1, *frames.shape[-2:]).sum(2)
    return np.maximum(frames, 0)


def strip(counts: Counts) -> Pixels:
    """Draw slices [T, 2, H, W] side by side in the order of time, uint8 [3, H, T W + gaps]."""
    scale, height = scale_of(counts), counts.shape[2]
    gap = np.full((3, height, _GAP), 255, np.uint8)
    parts = [part for one in counts for part in (gap, coloured(one, scale))]
    return np.concatenate(parts[1:], axis=2)
