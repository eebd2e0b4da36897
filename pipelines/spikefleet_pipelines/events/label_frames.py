"""Boxes of objects at the label times of a recording."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelFrames:
    """Objects of one recording, grouped by the F different times at which they were labelled."""

    times: NDArray[np.int64]
    """[F], us, strictly increasing; of the raw clock before writing, from the recording's start in the store."""
    offsets: NDArray[np.int32]
    """First object of each time, and the end of the last one's, [F + 1]."""
    boxes: NDArray[np.float64]
    """[M, 4] x y width height in pixels of the sensor; may extend beyond it."""
    category_ids: NDArray[np.int64]
    """[M]."""
    crowd: NDArray[np.bool_]
    """[M], not a target, and not an error when detected."""
    areas: NDArray[np.float64]
    """[M], in pixels."""
    ids: NDArray[np.int64]
    """[M], annotation ids."""
    track_ids: NDArray[np.int64]
    """[M], the same for an object at all times; -1 where it is not known."""

    def __len__(self) -> int:
        return len(self.times)

    @classmethod
    def of_objects(
        cls,
        times: NDArray[np.int64],
        boxes: NDArray[np.float64],
        category_ids: NDArray[np.int64],
        track_ids: NDArray[np.int64] | None = None,
    ) -> "LabelFrames":
        """Group objects by their time, in the order given within one time; areas are width x height.

        Args:
            times: of each object in us, in any order, [M].
            boxes: [M, 4] x y width height.
            category_ids: [M].
            track_ids: [M]; None: not known.
        """
        order = np.argsort(times, kind="stable")
        different, starts = np.unique(times[order], return_index=True)
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)[order]
        count = len(order)
        return cls(
            different.astype(np.int64),
            np.append(starts, count).astype(np.int32),
            boxes,
            category_ids[order].astype(np.int64),
            np.zeros(count, np.bool_),
            boxes[:, 2] * boxes[:, 3],
            np.arange(count, dtype=np.int64),
            np.full(count, -1, np.int64) if track_ids is None else track_ids[order].astype(np.int64),
        )

    def still_us(self, frame: int) -> int:
        """Return for how long before a frame none of its objects has moved, as far as the labels tell.

        It is the time from the first of the consecutive frames with the same tracks and equal boxes: 0 where an object
        has moved, appeared or gone since the frame before, where there is none, and where tracks are not known.
        """
        first = frame
        while first and self._equal(first - 1, frame):
            first -= 1
        return int(self.times[frame] - self.times[first])

    def _equal(self, one: int, other: int) -> bool:
        here, there = (slice(int(self.offsets[k]), int(self.offsets[k + 1])) for k in (one, other))
        tracks = [self.track_ids[part] for part in (here, there)]
        if len(tracks[0]) != len(tracks[1]) or (tracks[0] < 0).any():
            return False
        order, other_order = (np.argsort(each, kind="stable") for each in tracks)
        return np.array_equal(tracks[0][order], tracks[1][other_order]) and np.array_equal(
            self.boxes[here][order], self.boxes[there][other_order]
        )

    def until(self, time: int) -> "LabelFrames":
        """Return the frames up to a time, that one included."""
        frames = int(np.searchsorted(self.times, time, side="right"))
        objects = int(self.offsets[frames])
        return LabelFrames(
            self.times[:frames], self.offsets[: frames + 1], *(getattr(self, name)[:objects] for name in OBJECT_FIELDS)
        )

    def from_start(self, t0: int) -> "LabelFrames":
        """Return the same frames with times from a start."""
        return replace(self, times=self.times - t0)


OBJECT_FIELDS: Sequence[str] = ("boxes", "category_ids", "crowd", "areas", "ids", "track_ids")
"""Fields with one entry for each object."""
