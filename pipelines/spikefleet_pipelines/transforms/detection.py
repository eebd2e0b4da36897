"""Transform of rows of a detection split to a normalised batch with its boxes.

Every image of a batch consists of one or four tiles: stored images, resized and placed on a canvas, of which a window
is visible. Mosaic, scale and shift are thus one resize of each image instead of nested warps, and boxes and pixels are
mapped by the same scale and offset per axis. Every random number is a function of (seed, epoch, row, purpose),
including the partners of a mosaic.

Crowds and boxes without area, or entirely outside their image, are never targets. In training a box is clipped to the
visible part of its tile, and kept if more than 2 pixels of both sides and a tenth of its area are left, and its longer
side is less than 100 times its shorter one (the usual rule with mosaics).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.counter_random import Draw, integers, uniform
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.sampling import TrainingRows
from spikefleet_pipelines.store.annotations import AnnotationColumns, Annotations, Placement, Target
from spikefleet_pipelines.store.rows import Rows
from spikefleet_pipelines.transforms.classification import resize
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig
from spikefleet_pipelines.transforms.hsv import jitter_hsv
from spikefleet_pipelines.transforms.normalise import FloatStage, PixelScaling

if TYPE_CHECKING:
    from spikefleet_pipelines.store.reader import Samples

_LEAST_SIDE = 2.0
_LEAST_VISIBLE = 0.1
_LARGEST_ASPECT = 100.0

_SINGLE_DRAWS = np.array([Draw.SCALE, Draw.TRANSLATE, Draw.TRANSLATE + 1])
_MOSAIC_DRAWS = np.array([Draw.MOSAIC, Draw.MOSAIC_CENTRE, Draw.MOSAIC_CENTRE + 1])


class Sample(NamedTuple):
    """A `Target` as numpy arrays, which are sent between processes without a file descriptor each."""

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    placement: Placement
    annotations: Annotations | None

    def target(self) -> Target:
        """Convert to tensors."""
        return Target(torch.from_numpy(self.boxes), torch.from_numpy(self.labels), self.placement, self.annotations)


class _Tile(NamedTuple):
    """A stored image on the canvas: resized to `height` x `width`, placed at (left, top), visible in the window."""

    row: int
    annotations: Annotations
    height: int
    width: int
    left: int
    top: int
    window: tuple[int, int, int, int]
    """x1 y1 x2 y2 on the canvas, clipped to it; empty if x2 <= x1 or y2 <= y1."""

    @property
    def placement(self) -> Placement:
        stored = self.annotations
        return Placement(
            self.width / stored.width, self.height / stored.height, self.left, self.top, stored.height, stored.width
        )


class DetectionBatchTransform:
    """Images and the objects in them: a `BatchTransform` whose targets are a `Target` for each image.

    They are sent between processes as `Sample`.

    Args:
        split: whose rows it transforms.
        config: of the transform.
        train: apply the random transforms of training, else those of evaluation.
        seed: of the random transforms.
        epochs: length of the run, so that mosaics can stop before its end; None if unknown.

    Raises:
        ValueError: the config does not fit the images of the split.
    """

    def __init__(
        self, split: Rows, config: DetectionTransformConfig, train: bool, seed: int, epochs: int | None = None
    ) -> None:
        config.check_images(split.image_shape)
        self.split = split
        self.config = config
        self.train = train
        self.seed = seed
        self.epochs = epochs
        self._normalise = FloatStage(config.normalise)
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def __call__(self, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, list[Sample]]:
        """Load rows; see `BatchTransform`."""
        config = self.config
        if self.train and config.resize == "letterbox":
            layouts = self._augmented(rows, epoch)
        else:
            layouts = [[self._resized(int(row))] for row in rows]
        height, width = self._canvas(layouts)
        channels = 3 if self.split.image_shape is None else self.split.image_shape[0]
        images = self._normalise.pixels((len(rows), channels, height, width))
        images[...] = config.fill
        self._draw(images, layouts)
        samples = [self._sample(tiles) for tiles in layouts]
        if self.train:
            self._jitter(images, rows, epoch)
            flips = uniform(self.seed, epoch, rows, Draw.FLIP) < config.horizontal_flip
            for image, sample, flip in zip(images, samples, flips, strict=True):
                if flip:
                    image[...] = image[..., ::-1]
                    sample.boxes[:, [0, 2]] = width - sample.boxes[:, [2, 0]]
        return self._normalise(images), samples

    def send_pixels(self) -> PixelScaling:
        """See `SendsPixels`."""
        return self._normalise.defer()

    def unpack(self, packed: list[Sample]) -> tuple[Target, ...]:
        """Convert the targets to tensors."""
        return tuple(sample.target() for sample in packed)

    def _resized(self, row: int) -> _Tile:
        """Place one image without augmentation."""
        stored, config = self.split.annotations(row), self.config
        if config.resize == "letterbox":
            ratio = config.size / max(stored.height, stored.width)
        else:
            assert config.longest is not None
            shorter, longer = sorted((stored.height, stored.width))
            ratio = min(config.size / shorter, config.longest / longer)
        height, width = _scaled(stored.height, ratio), _scaled(stored.width, ratio)
        left, top = 0, 0
        if config.resize == "letterbox":
            left, top = (config.size - width) // 2, (config.size - height) // 2
        return _Tile(row, stored, height, width, left, top, (left, top, left + width, top + height))

    def _augmented(self, rows: NDArray[np.int64], epoch: int) -> list[list[_Tile]]:
        """Place the tiles of each image of a training batch."""
        side, config = self.config.size, self.config
        draws = uniform(self.seed, epoch, rows[:, None], _SINGLE_DRAWS).reshape(-1, 3)
        gains = (1 + config.scale * (2 * draws[:, 0] - 1)).tolist()
        shifts = (side * config.translate * (2 * draws[:, 1:] - 1)).tolist()
        if not config.has_mosaic(epoch, self.epochs):
            return [
                [self._moved(row, gain, *shift)] for row, gain, shift in zip(rows.tolist(), gains, shifts, strict=True)
            ]
        mosaic = uniform(self.seed, epoch, rows[:, None], _MOSAIC_DRAWS).reshape(-1, 3)
        numbers = Draw.MOSAIC_PARTNER + np.arange(3)
        partners = integers(self.seed, epoch, rows[:, None], numbers, len(self.split)).reshape(-1, 3)
        return [
            self._mosaic([row, *others], (side * (0.5 + cx), side * (0.5 + cy)), gain, *shift)
            if chance < config.mosaic
            else [self._moved(row, gain, *shift)]
            for row, others, (chance, cx, cy), gain, shift in zip(
                rows.tolist(), partners.tolist(), mosaic.tolist(), gains, shifts, strict=True
            )
        ]

    def _moved(self, row: int, gain: float, right: float, down: float) -> _Tile:
        """Place a letterboxed image, scaled about the centre of the canvas and shifted."""
        stored, side = self.split.annotations(row), self.config.size
        ratio = gain * side / max(stored.height, stored.width)
        height, width = _scaled(stored.height, ratio), _scaled(stored.width, ratio)
        left, top = round((side - width) / 2 + right), round((side - height) / 2 + down)
        return _Tile(row, stored, height, width, left, top, _within(side, left, top, left + width, top + height))

    def _mosaic(
        self, rows: list[int], centre: tuple[float, float], gain: float, right: float, down: float
    ) -> list[_Tile]:
        """Place four images around a point of a canvas of twice the side; its centre is scaled, shifted and visible."""
        side = self.config.size
        # From the large canvas to the visible one: x -> gain * (x - side) + side / 2 + shift.
        (middle_x, first_x, last_x), (middle_y, first_y, last_y) = (
            [round(gain * (place - side) + side / 2 + shift) for place in (point, 0, 2 * side)]
            for point, shift in zip(centre, (right, down), strict=True)
        )
        tiles = []
        for number, row in enumerate(rows):
            stored = self.split.annotations(row)
            ratio = gain * side / max(stored.height, stored.width)
            height, width = _scaled(stored.height, ratio), _scaled(stored.width, ratio)
            left = middle_x if number % 2 else middle_x - width
            top = middle_y if number // 2 else middle_y - height
            window = _within(
                side,
                max(left, first_x),
                max(top, first_y),
                min(left + width, last_x),
                min(top + height, last_y),
            )
            tiles.append(_Tile(row, stored, height, width, left, top, window))
        return tiles

    def _canvas(self, layouts: list[list[_Tile]]) -> tuple[int, int]:
        """Height and width of the batch."""
        config = self.config
        if config.resize == "letterbox":
            return config.size, config.size
        height, width = (max(getattr(tiles[0], name) for tiles in layouts) for name in ("height", "width"))
        return -(-height // config.divisor) * config.divisor, -(-width // config.divisor) * config.divisor

    def _draw(self, images: NDArray[np.uint8], layouts: list[list[_Tile]]) -> None:
        tiles = [(number, tile) for number, tiles in enumerate(layouts) for tile in tiles if not _is_empty(tile.window)]
        raw = None
        if self.split.image_shape is not None:
            raw = self.split.views(np.array([tile.row for _, tile in tiles], np.int64))

        def draw(place: int) -> None:
            number, tile = tiles[place]
            stored = self.split.image(tile.row).numpy() if raw is None else raw[place]
            if stored.shape[1:] != (tile.annotations.height, tile.annotations.width):
                raise StoreError(
                    f"row {tile.row} of split {self.split.name!r} in {self.split.location}: the image is "
                    f"{stored.shape[2]} x {stored.shape[1]} pixels, expected {tile.annotations.width} x "
                    f"{tile.annotations.height} of its annotations; prepare the store again"
                )
            x1, y1, x2, y2 = tile.window
            shown = resize(stored, tile.height, tile.width)
            images[number, :, y1:y2, x1:x2] = shown[:, y1 - tile.top : y2 - tile.top, x1 - tile.left : x2 - tile.left]

        threads = torch.get_num_threads()
        if threads == 1 or raw is not None:
            for place in range(len(tiles)):
                draw(place)
        else:
            self._pool = self._pool or ThreadPoolExecutor(threads, "decode")
            for _ in self._pool.map(draw, range(len(tiles))):
                pass

    def _sample(self, tiles: list[_Tile]) -> Sample:
        parts = [_visible_boxes(tile, self.train) for tile in tiles if not _is_empty(tile.window)]
        if len(parts) == 1:
            boxes, labels = parts[0]
        elif parts:
            boxes, labels = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        else:
            boxes, labels = np.empty((0, 4), np.float32), np.empty(0, np.int64)
        return Sample(boxes, labels, tiles[0].placement, None if self.train else tiles[0].annotations)

    def _jitter(self, images: NDArray[np.uint8], rows: NDArray[np.int64], epoch: int) -> None:
        if not any(self.config.hsv):
            return
        draws = uniform(self.seed, epoch, rows[:, None], Draw.HSV + np.arange(3)).reshape(-1, 3)
        changes = np.array(self.config.hsv) * (2 * draws - 1)
        for image, (hue, saturation, value) in zip(images, changes.tolist(), strict=True):
            jitter_hsv(image, hue, 1 + saturation, 1 + value)


def training_rows(split: "Samples", config: DetectionTransformConfig) -> TrainingRows:
    """Choose the rows of a split to train on; see `DetectionTransformConfig.training_rows`."""
    columns, rows, groups = split.annotation_columns, None, None
    if config.skip_empty:
        rows = np.flatnonzero(np.concatenate([_objects_for_loss(shard) for shard in columns]))
        if not len(rows):
            raise ValueError(
                f"split {split.name!r} of {split.location} has no image with an object to train on; set "
                "data.transform.skip_empty=false, or prepare other data"
            )
    if config.group_by_aspect:
        groups = np.concatenate([shard.widths > shard.heights for shard in columns]).astype(np.int64)
    return TrainingRows(rows, groups)


def _objects_for_loss(columns: AnnotationColumns) -> NDArray[np.int64]:
    """Number of objects of each image that can be targets: no crowds, some area within the image, [n]."""
    image = columns.image_of_objects()
    limits = np.stack([columns.widths[image], columns.heights[image]], axis=1)
    start, size = columns.boxes[:, :2], columns.boxes[:, 2:]
    inside = np.minimum(start + size, limits) - np.maximum(start, 0)
    return np.bincount(image[~columns.crowd & (inside > 0).all(1)], minlength=len(columns))


def _visible_boxes(tile: _Tile, by_rule: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Compute the targets of a tile: boxes x1 y1 x2 y2 on the canvas, and their classes.

    Args:
        tile: the placed image.
        by_rule: drop boxes with too little left, as in training; otherwise drop only boxes with nothing left.
    """
    stored = tile.annotations
    if not len(stored.boxes):
        return np.empty((0, 4), np.float32), np.empty(0, np.int64)
    scale = np.array([tile.width / stored.width, tile.height / stored.height] * 2)
    shift = np.array([tile.left, tile.top] * 2, np.float64)
    corners = stored.boxes.copy()
    corners[:, 2:] += corners[:, :2]
    np.clip(corners, 0, [stored.width, stored.height] * 2, out=corners)
    corners *= scale
    corners += shift
    whole = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    x1, y1, x2, y2 = tile.window
    np.clip(corners, [x1, y1] * 2, [x2, y2] * 2, out=corners)
    width, height = corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1]
    kept = ~stored.crowd & (width > 0) & (height > 0)
    if by_rule:
        shorter, longer = np.minimum(width, height), np.maximum(width, height)
        kept &= (
            (shorter > _LEAST_SIDE) & (width * height > _LEAST_VISIBLE * whole) & (longer < _LARGEST_ASPECT * shorter)
        )
    return corners[kept].astype(np.float32), stored.labels[kept]


def _scaled(length: int, ratio: float) -> int:
    return max(1, round(length * ratio))


def _within(side: int, x1: int, y1: int, x2: int, y2: int) -> tuple[int, int, int, int]:
    return max(0, x1), max(0, y1), min(side, x2), min(side, y2)


def _is_empty(window: tuple[int, int, int, int]) -> bool:
    return window[2] <= window[0] or window[3] <= window[1]
