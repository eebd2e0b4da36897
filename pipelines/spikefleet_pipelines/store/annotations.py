"""Objects in images: how a store holds them, and what a detection batch carries of them.

A box is `x y width height` in the store, as COCO has it, and `x1 y1 x2 y2` in a batch; both in pixels, with x = 0 at
the left edge of the first pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Annotations(NamedTuple):
    """The objects of one stored image, as they were given; arrays may be read-only views into the store."""

    image_id: int
    height: int
    width: int
    """Size of the stored image."""
    boxes: NDArray[np.float64]
    """[N, 4] x y width height, pixels of the stored image; may reach beyond it."""
    category_ids: NDArray[np.int64]
    """[N], as given."""
    labels: NDArray[np.int64]
    """[N], class index 0 to K - 1."""
    crowd: NDArray[np.bool_]
    """[N], whether the box is around a crowd: no target, and not wrong when found."""
    areas: NDArray[np.float64]
    """[N], pixels of the object, by which COCO tells small, medium and large."""
    ids: NDArray[np.int64]
    """[N], annotation ids."""


@dataclass(frozen=True)
class AnnotationColumns:
    """The objects of n images, those of all images one after another: the columns of a shard."""

    image_ids: NDArray[np.int64]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    offsets: NDArray[np.int32]
    """Where the objects of each image start and those of the last one end, [n + 1]."""
    boxes: NDArray[np.float64]
    category_ids: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]
    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.image_ids)

    def rows(self, start: int, stop: int) -> "AnnotationColumns":
        """The images from `start` to before `stop`."""
        return self.select(np.arange(start, min(stop, len(self))))

    def select(self, rows: NDArray[np.int64]) -> "AnnotationColumns":
        """The images at `rows`, in that order."""
        starts, counts = self.offsets[:-1][rows], np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        objects = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        return AnnotationColumns(
            self.image_ids[rows],
            self.heights[rows],
            self.widths[rows],
            offsets,
            self.boxes[objects],
            self.category_ids[objects],
            self.crowd[objects],
            self.areas[objects],
            self.ids[objects],
        )

    def image(self, row: int, labels: NDArray[np.int64]) -> Annotations:
        """One image; `labels` are the class indices of all objects."""
        objects = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return Annotations(
            int(self.image_ids[row]),
            int(self.heights[row]),
            int(self.widths[row]),
            self.boxes[objects],
            self.category_ids[objects],
            labels[objects],
            self.crowd[objects],
            self.areas[objects],
            self.ids[objects],
        )

    def image_of_objects(self) -> NDArray[np.int64]:
        """The row of each object, [m]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


def class_indices(category_ids: NDArray[np.int64], table: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Class index of each category id, by the manifest's table, and whether the table has that id at all, [m]."""
    ids = np.array(table, np.int64)
    order = np.argsort(ids, kind="stable")
    place = np.minimum(np.searchsorted(ids[order], category_ids), len(ids) - 1)
    labels = order[place].astype(np.int64)
    return labels, ids[labels] == category_ids


class Placement(NamedTuple):
    """Where a stored image lies in the network's input: input = stored * (scale_x, scale_y) + (left, top)."""

    scale_x: float
    scale_y: float
    left: float
    top: float
    height: int
    width: int
    """Size of the stored image."""

    def to_picture(self, boxes: Tensor) -> Tensor:
        """Boxes [N, 4] x1 y1 x2 y2 in the input's pixels -> in the stored image's pixels, clipped to it."""
        shift = boxes.new_tensor([self.left, self.top] * 2, dtype=torch.float64)
        scale = boxes.new_tensor([self.scale_x, self.scale_y] * 2, dtype=torch.float64)
        limit = boxes.new_tensor([self.width, self.height] * 2, dtype=torch.float64)
        stored = (boxes.to(torch.float64) - shift) / scale
        return stored.clamp(min=0).minimum(limit).to(boxes.dtype)


class Target(NamedTuple):
    """What is to be found in one image of a detection batch."""

    boxes: Tensor
    """float32 [N, 4] x1 y1 x2 y2 in the input's pixels, clipped to it; no crowds, no boxes without area."""
    labels: Tensor
    """int64 [N], class index 0 to K - 1."""
    placement: Placement
    """For evaluation; in training where the row's own image lies before the batch's image is mirrored."""
    annotations: Annotations | None
    """All that is known of the image, for evaluation; None in training."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Target":
        """The target with its boxes and labels on a device; what is for evaluation stays where it is."""
        boxes, labels = (part.to(device, non_blocking=non_blocking) for part in (self.boxes, self.labels))
        return self._replace(boxes=boxes, labels=labels)
