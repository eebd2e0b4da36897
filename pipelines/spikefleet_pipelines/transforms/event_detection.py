"""Transform of label times of recordings, with boxes, to a normalised batch of frames with its targets.

Boxes are cut to the sensor, also those that an evaluation compares with, and in training to the visible part of it;
what is then less than a pixel wide or high is left out, and crowds are no targets. In training `training_boxes` leaves
out more, before the zoom. All slices of a sample are zoomed and flipped alike. Every random number is a function of
(seed, epoch, row, purpose).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.counter_random import Draw, uniform
from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.durations import duration_us
from spikefleet_pipelines.events.event_images import window_image
from spikefleet_pipelines.events.label_effects import LabelEffects, changed, label_effects_of
from spikefleet_pipelines.events.windows import EventWindow
from spikefleet_pipelines.sampling import TrainingRows
from spikefleet_pipelines.store.annotations import Annotations, Placement, Target
from spikefleet_pipelines.store.rows import EventRows, Rows
from spikefleet_pipelines.transforms.detection import Sample
from spikefleet_pipelines.transforms.event_detection_config import EventDetectionTransformConfig
from spikefleet_pipelines.transforms.event_frames import OUTSIDE, FrameMaker, Grid, SliceTable, event_rows

if TYPE_CHECKING:
    # Not where a version is served: the reader needs pyarrow.
    from spikefleet_pipelines.store.reader import Samples

LEAST_SIDE = 1.0
"""Boxes with a smaller side, in pixels, are no targets."""

_ZOOM_DRAWS = np.array([Draw.FLIP, *(Draw.EVENT_ZOOM + np.arange(5))])

Packed = tuple[list[Sample], SliceTable | None]


class _Place(NamedTuple):
    """Where the sensor is on the canvas, in pixels of the canvas; it may extend beyond it."""

    left: float
    top: float
    height: float
    width: float


@dataclass(frozen=True)
class EventDetectionTransform:
    """Frames and boxes of label times: a `BatchTransform` whose targets are a `Target` for each sample."""

    split: EventRows
    config: EventDetectionTransformConfig
    train: bool
    seed: int
    maker: FrameMaker
    effects: LabelEffects

    @classmethod
    def of(
        cls, split: Rows, config: EventDetectionTransformConfig, train: bool, seed: int
    ) -> "EventDetectionTransform":
        """The transform of a split.

        Raises:
            ValueError: the config does not fit the recordings, or their labels do not survive a flip.
        """
        events = event_rows(split, config.kind)
        effects = label_effects_of(events.source)
        if config.horizontal_flip and effects.mirror == "forbidden":
            raise SourceError(
                f"horizontal_flip is {config.horizontal_flip}: it changes what the labels of this data set mean; set "
                "it to 0"
            )
        return cls(events, config, train, seed, FrameMaker.of(config, events.sensor), effects)

    def __call__(self, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, Packed]:
        """Load rows; see `BatchTransform`."""
        flips, places = self._places(rows, epoch)
        grids = [self._grid(place, flip) for place, flip in zip(places, flips, strict=True)]
        order = np.arange(self.config.timesteps)
        slices = [order[::-1] if self.config.reverse_time else order] * len(rows)
        frames, table = self.maker.batch([self._window(row) for row in rows.tolist()], slices, grids)
        found = zip(rows.tolist(), places, flips, strict=True)
        return frames, ([self._sample(row, place, flip) for row, place, flip in found], table)

    def unpack(self, packed: Packed) -> tuple[Target, ...]:
        """Convert the targets to tensors."""
        return tuple(sample.target() for sample in packed[0])

    def on_device(self, images: Tensor, packed: Packed, device: torch.device | str) -> Tensor:
        """Return the frames of a batch; see `BinsOnDevice`."""
        return images if packed[1] is None else self.maker.on(images, packed[1], device)

    def of_frames(self, frames: NDArray[np.float32]) -> Tensor:
        """Place and normalise frames [B, T, C, H, W] that were counted elsewhere."""
        return self.maker.of_frames(frames, self._grid(self._fitted(), False))

    def pictures(self, rows: Sequence[int]) -> list[Tensor]:
        """Draw the window of each sample, uint8 [3, H, W] with the size of the sensor; see `DrawsRows`."""
        return [torch.from_numpy(window_image(self._window(row))) for row in rows]

    def _window(self, row: int) -> EventWindow:
        length = duration_us(self.config.window)
        return self.split.recording(row).window(self.split.label_time(row).time - length, length)

    def _places(self, rows: NDArray[np.int64], epoch: int) -> tuple[list[bool], list[_Place]]:
        """Whether each sample is flipped, and where its sensor is on the canvas."""
        config, fitted = self.config, self._fitted()
        if not self.train:
            return [False] * len(rows), [fitted] * len(rows)
        draws = uniform(self.seed, epoch, self.split.draw_rows(rows)[:, None], _ZOOM_DRAWS).reshape(
            -1, len(_ZOOM_DRAWS)
        )
        places = []
        for _, applied, inwards, size, x, y in draws.tolist():
            if applied >= config.zoom:
                places.append(fitted)
                continue
            most = config.zoom_in if inwards < config.zoom_in_share else config.zoom_out
            factor = 1 + (most - 1) * size
            places.append(_zoomed(fitted, factor if inwards < config.zoom_in_share else 1 / factor, (x, y)))
        return (draws[:, 0] < config.horizontal_flip).tolist(), places

    def _fitted(self) -> _Place:
        """The place of the sensor without zoom."""
        height, width = self.config.representation.size or self.split.sensor
        side = self.config.size
        if side is None:
            return _Place(0.0, 0.0, height, width)
        ratio = side / max(height, width)
        height, width = max(1, round(height * ratio)), max(1, round(width * ratio))
        return _Place((side - width) // 2, (side - height) // 2, height, width)

    def _grid(self, place: _Place, flip: bool) -> Grid:
        frame = self.config.representation.size or self.split.sensor
        height, width = self.config.canvas(self.split.sensor)
        rows = _nearest(height, place.top, place.height, frame[0])
        columns = _nearest(width, place.left, place.width, frame[1])
        return Grid(rows, columns[::-1].copy() if flip else columns)

    def _sample(self, row: int, place: _Place, flip: bool) -> Sample:
        stored = cut_to_sensor(self.split.annotations(row))
        if self.train:
            sides = stored.boxes[:, 2:]
            stored = _selected(stored, self.config.training_boxes.keeps(sides[:, 0], sides[:, 1], stored.width))
        canvas = self.config.canvas(self.split.sensor)
        scale_x, scale_y = place.width / stored.width, place.height / stored.height
        boxes, labels = _visible(stored, (scale_x, scale_y), place, canvas)
        if flip:
            boxes[:, [0, 2]] = canvas[1] - boxes[:, [2, 0]]
            labels = np.array([changed(label, self.effects.mirror, "a flip") for label in labels.tolist()], np.int64)
        where = Placement(scale_x, scale_y, place.left, place.top, stored.height, stored.width)
        return Sample(boxes, labels, where, None if self.train else stored)


def cut_to_sensor(stored: Annotations) -> Annotations:
    """Cut boxes to the sensor; objects of which less than a pixel is left in a direction are left out."""
    corners = stored.boxes.reshape(-1, 4).copy()
    corners[:, 2:] += corners[:, :2]
    np.clip(corners, 0, [stored.width, stored.height] * 2, out=corners)
    sides = corners[:, 2:] - corners[:, :2]
    boxes = np.concatenate([corners[:, :2], sides], axis=1)
    return _selected(stored._replace(boxes=boxes, areas=sides[:, 0] * sides[:, 1]), sides.min(1) >= LEAST_SIDE)


def _selected(stored: Annotations, kept: NDArray[np.bool_]) -> Annotations:
    names = ("boxes", "areas", "category_ids", "labels", "crowd", "ids")
    return stored._replace(**{name: getattr(stored, name)[kept] for name in names})


def training_rows(split: "Samples", config: EventDetectionTransformConfig) -> TrainingRows:
    """Choose the rows of a split to train on; see `EventDetectionTransformConfig.training_rows`."""
    if not config.skip_empty:
        return TrainingRows()
    counts = []
    for columns in split.annotation_columns:
        objects = columns.image_of_objects()
        sides = np.stack([columns.widths[objects], columns.heights[objects]], axis=1)
        cut = np.minimum(columns.boxes[:, :2] + columns.boxes[:, 2:], sides) - np.maximum(columns.boxes[:, :2], 0)
        kept = ~columns.crowd & (cut >= LEAST_SIDE).all(1)
        kept &= config.training_boxes.keeps(cut[:, 0], cut[:, 1], sides[:, 0])
        counts.append(np.bincount(objects[kept], minlength=len(columns)))
    rows = np.flatnonzero(np.concatenate([np.empty(0, np.int64), *counts]))
    if not len(rows):
        raise ValueError(
            f"split {split.name!r} of {split.location} has no label time with a box to train on; set "
            "data.transform.skip_empty=false, other data.transform.training_boxes, or prepare other data"
        )
    return TrainingRows(rows)


def _zoomed(place: _Place, factor: float, at: tuple[float, float]) -> _Place:
    """Scale a place; what is left over, or hidden, is divided between its sides as two numbers in [0, 1) say."""
    height, width = place.height * factor, place.width * factor
    left, top = place.left + (place.width - width) * at[0], place.top + (place.height - height) * at[1]
    return _Place(left, top, height, width)


def _nearest(length: int, start: float, extent: float, pixels: int) -> NDArray[np.int64]:
    """For each place of a canvas of `length`, the pixel there of a frame that extends from `start`; else OUTSIDE."""
    place = np.floor((np.arange(length) + 0.5 - start) * (pixels / extent)).astype(np.int64)
    return np.where((place >= 0) & (place < pixels), place, OUTSIDE)


def _visible(
    stored: Annotations, scale: tuple[float, float], place: _Place, canvas: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Compute the targets: boxes x1 y1 x2 y2 on the canvas, cut to it, and their classes."""
    corners = stored.boxes.copy()
    corners[:, 2:] += corners[:, :2]
    corners *= [*scale, *scale]
    corners += [place.left, place.top] * 2
    np.clip(corners, 0, [canvas[1], canvas[0]] * 2, out=corners)
    kept = ~stored.crowd & (corners[:, 2:] - corners[:, :2] >= LEAST_SIDE).all(1)
    return corners[kept].astype(np.float32), stored.labels[kept]
