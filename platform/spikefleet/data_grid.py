"""A grid of rows of a store, as a PNG: images, images with boxes, or recordings of events over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from spikefleet.plots import boxes_on_image, image_grid, image_sheet
from spikefleet_pipelines.events.binning import count, slice_times, slices_by_time
from spikefleet_pipelines.events.event_images import COLOURS, coloured, scale_of, whole_counts, window_image
from spikefleet_pipelines.store.annotations import Annotations
from spikefleet_pipelines.store.event_reader import EventSplit
from spikefleet_pipelines.store.event_samples import SHOWN_US
from spikefleet_pipelines.store.reader import Split, Store

_STRIP = 7
"""Slices of a recording beside its events of all times: a line of eight."""
_EVENT_PALETTE = 4
"""First colour of boxes on events: green, since blue and red are the polarities."""


def draw_rows(store: Store, rows: int, path: Path, split: str | None = None) -> str:
    """Draw rows of a store, evenly spread over a split.

    Args:
        store: an open store.
        rows: how many, at most.
        path: the PNG.
        split: its name; None: the training split, or without one the first.

    Returns:
        The split.

    Raises:
        StoreError: there is no such split, or a row cannot be read.
    """
    names = list(store.manifest.shards)
    split = split or ("train" if "train" in names else names[0])
    if store.manifest.events is None:
        images = store.split(split)
        if images.is_detection:
            image_sheet([_with_boxes(images, row) for row in _spread(len(images), rows)], path)
        else:
            _draw_images(images, _spread(len(images), rows), path)
        return split
    recordings = store.recordings(split)
    chosen = _spread(len(recordings), rows)
    lines = [_labelled_line(recordings, row) if recordings.is_detection else _line(recordings, row) for row in chosen]
    shown = [image for line in lines for image, _ in line]
    captions = [caption for line in lines for _, caption in line]
    image_grid(shown, captions, [None] * len(shown), path, names=[COLOURS])
    return split


def _spread(total: int, wanted: int) -> list[int]:
    """Rows at equal distances, the first one included."""
    number = min(total, wanted)
    return [row * total // number for row in range(number)]


def _draw_images(split: Split, rows: list[int], path: Path) -> None:
    images = [split.image(row) for row in rows]
    captions = [split.class_names[split.label(row)] for row in rows]
    image_grid(images, captions, [None] * len(rows), path)


def _with_boxes(split: Split, row: int) -> torch.Tensor:
    return _boxes(split.image(row), split.annotations(row), split.class_names)


def _boxes(image: torch.Tensor, objects: Annotations, class_names: tuple[str, ...], palette: int = 0) -> torch.Tensor:
    """The image with the boxes that are inside of it; the first class has the colour `palette`."""
    corners = np.concatenate([objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]], axis=1)
    corners = np.clip(corners, 0, [objects.width, objects.height] * 2)
    visible = (corners[:, 2:] > corners[:, :2]).all(1)
    labels = objects.labels[visible].tolist()
    boxes = torch.from_numpy(corners[visible])
    colours = [label + palette for label in labels]
    return boxes_on_image(image, boxes, colours, [class_names[label] for label in labels])


def _line(split: EventSplit, row: int) -> list[tuple[torch.Tensor, str]]:
    """All events of a recording, then slices of equal time, with captions."""
    window = split.recording(row).whole()
    whole, strip = (count(window, slices_by_time(window, slices)) for slices in (1, _STRIP))
    times = slice_times(window, _STRIP) / 1000
    name = split.class_names[split.label(row)]
    line = [(_drawn(whole[0], scale_of(whole)), f"{name}\n{len(window):,} events")]
    scale = scale_of(strip)
    for number, frame in enumerate(strip):
        line.append((_drawn(frame, scale), f"{times[number]:.0f} to {times[number + 1]:.0f} ms"))
    return line


def _labelled_line(split: EventSplit, row: int) -> list[tuple[torch.Tensor, str]]:
    """All events of a recording, then those of the 50 ms before some label times with their boxes, with captions."""
    recording, frames = split.recording(row), split.frames(row)
    whole = whole_counts(recording.whole())
    line = [(_drawn(whole, scale_of(whole)), f"recording {row}\n{len(recording):,} events")]
    for number in _spread(len(frames), _STRIP):
        time = int(frames.times[number])
        drawn = torch.from_numpy(window_image(recording.window(time - SHOWN_US, SHOWN_US)))
        drawn = _boxes(drawn, split.annotations(row, number), split.class_names, _EVENT_PALETTE)
        line.append((drawn, f"{time / 1000:,.0f} ms"))
    blank = torch.full((3, *split.layout.sensor), 255, dtype=torch.uint8)
    return line + [(blank, "")] * (_STRIP + 1 - len(line))


def _drawn(counts: NDArray[np.int32], scale: float) -> torch.Tensor:
    return torch.from_numpy(coloured(counts, scale))
