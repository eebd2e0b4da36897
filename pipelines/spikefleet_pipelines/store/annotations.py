"""Objects in images: annotations of a store, and targets of a detection batch.

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


class Moment(NamedTuple):
    """Where the objects of a label time are in a store of recordings."""

    recording: int
    """Row of the recording in its split."""
    time_us: int
    """From the start of the recording."""
    still_us: int
    """For how long no object has moved; see `LabelFrames.still_us`."""


class Annotations(NamedTuple):
    """The objects of one stored image, or of one label time of a recording of events, as given.

    Arrays may be read-only views into the store.
    """

    image_id: int
    height: int
    width: int
    """Size of the stored image."""
    boxes: NDArray[np.float64]
    """[N, 4] x y width height in pixels of the stored image; may extend beyond it."""
    category_ids: NDArray[np.int64]
    """[N], as given."""
    labels: NDArray[np.int64]
    """[N], class index 0 to K - 1."""
    crowd: NDArray[np.bool_]
    """[N], whether the box surrounds a crowd: not a target, and not an error when detected."""
    areas: NDArray[np.float64]
    """[N], pixels of the object, by which COCO separates small, medium and large."""
    ids: NDArray[np.int64]
    """[N], annotation ids."""
    moment: Moment | None = None
    """Of the label time of a recording; None of an image."""


@dataclass(frozen=True)
class AnnotationColumns:
    """The objects of n images, concatenated in the order of the images: the columns of a shard."""

    image_ids: NDArray[np.int64]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    offsets: NDArray[np.int32]
    """Start of each image's objects, and the end of the last one's, [n + 1]."""
    boxes: NDArray[np.float64]
    category_ids: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]
    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.image_ids)

    def rows(self, start: int, stop: int) -> "AnnotationColumns":
        """Return the images from `start` to before `stop`."""
        return self.select(np.arange(start, min(stop, len(self))))

    def select(self, rows: NDArray[np.int64]) -> "AnnotationColumns":
        """Return the images at `rows`, in that order."""
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

    @classmethod
    def joined(cls, parts: Sequence["AnnotationColumns"]) -> "AnnotationColumns":
        """Concatenate the images of several shards, at least one."""
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("image_ids", "heights", "widths", "boxes", "category_ids", "crowd", "areas", "ids")
        }
        return cls(offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), **joined)

    def image(self, row: int, labels: NDArray[np.int64]) -> Annotations:
        """Return the annotations of one image; `labels` are the class indices of all objects, [m]."""
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
        """Return the image row of each object, [m]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


def class_indices(category_ids: NDArray[np.int64], table: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Map category ids to class indices.

    Args:
        category_ids: to map, [m].
        table: the manifest's category id of each class.

    Returns:
        Class indices [m], and whether the table contains the id [m].
    """
    ids = np.array(table, np.int64)
    order = np.argsort(ids, kind="stable")
    place = np.minimum(np.searchsorted(ids[order], category_ids), len(ids) - 1)
    labels = order[place].astype(np.int64)
    return labels, ids[labels] == category_ids


class Placement(NamedTuple):
    """Position of a stored image in the network's input: input = stored * (scale_x, scale_y) + (left, top)."""

    scale_x: float
    scale_y: float
    left: float
    top: float
    height: int
    width: int
    """Size of the stored image."""

    def to_stored_image(self, boxes: Tensor) -> Tensor:
        """Map boxes [N, 4] x1 y1 x2 y2 from the input's pixels to the stored image's, clipped to it."""
        shift = boxes.new_tensor([self.left, self.top] * 2, dtype=torch.float64)
        scale = boxes.new_tensor([self.scale_x, self.scale_y] * 2, dtype=torch.float64)
        limit = boxes.new_tensor([self.width, self.height] * 2, dtype=torch.float64)
        stored = (boxes.to(torch.float64) - shift) / scale
        return stored.clamp(min=0).minimum(limit).to(boxes.dtype)


class Target(NamedTuple):
    """The target of one image of a detection batch."""

    boxes: Tensor
    """float32 [N, 4] x1 y1 x2 y2 in the input's pixels, clipped to it; no crowds, no boxes without area."""
    labels: Tensor
    """int64 [N], class index 0 to K - 1."""
    placement: Placement
    """Position of the stored image, for evaluation; in training of the row's own image before a horizontal flip."""
    annotations: Annotations | None
    """All annotations of the image, for evaluation; None in training."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Target":
        """Copy boxes and labels to a device; placement and annotations are not copied."""
        boxes, labels = (part.to(device, non_blocking=non_blocking) for part in (self.boxes, self.labels))
        return self._replace(boxes=boxes, labels=labels)
