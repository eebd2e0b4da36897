"""What differs between two stores: images that were added, removed or moved, labels and boxes that changed.

Images are the same where their stored bytes are equal. Of equal images in one store, the first is compared with the
first of the other store, and so on. Boxes of one image are the same where class and coordinates are; of the others, two
that overlap by half (IoU of at least 0.5) are one box that was moved or relabelled.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.reader import Split, Store
from spikefleet_pipelines.store.splitting import image_digests

_SAME_OBJECT = 0.5

Place = tuple[str, int]
"""Split and row."""
_Box = tuple[str, tuple[float, ...]]
"""Class, and x y width height in pixels."""


@dataclass
class StoreDifference:
    """What is in the second store and not in the first, and the other way round."""

    classes_added: tuple[str, ...] = ()
    classes_removed: tuple[str, ...] = ()
    same: int = 0
    """Images with the same split and targets in both."""
    added: list[Place] = field(default_factory=list)
    """Images of the second store alone."""
    removed: list[Place] = field(default_factory=list)
    """Images of the first store alone."""
    moved: list[tuple[Place, Place]] = field(default_factory=list)
    """Images in another split than before."""
    relabelled: list[tuple[Place, str, str]] = field(default_factory=list)
    """Classification: images of the second store, with the class before and now."""
    boxes: list[tuple[Place, dict[str, int]]] = field(default_factory=list)
    """Detection: images of the second store, with the number of boxes `added`, `removed`, `moved`, `relabelled`."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing differs."""
        lists = (self.added, self.removed, self.moved, self.relabelled, self.boxes)
        return not any((self.classes_added, self.classes_removed, *lists))

    @property
    def box_changes(self) -> dict[str, int]:
        """Number of boxes by change, over all images."""
        total: Counter[str] = Counter()
        for _, changes in self.boxes:
            total.update(changes)
        return dict(total)


def compare_stores(before: Store, now: Store) -> StoreDifference:
    """Compare two stores of images of one task.

    Args:
        before: the first store.
        now: the second store.

    Raises:
        StoreError: one is of events, or their tasks differ.
    """
    for store in (before, now):
        if store.manifest.image is None:
            raise StoreError(f"{store.location} holds recordings of events; only stores of images are compared")
    if before.manifest.task != now.manifest.task:
        raise StoreError(
            f"{before.location} is for {before.manifest.task}, {now.location} for {now.manifest.task}; compare "
            "stores of "
            "one task"
        )
    names, names_now = before.manifest.class_names, now.manifest.class_names
    found = StoreDifference(
        tuple(name for name in names_now if name not in names), tuple(name for name in names if name not in names_now)
    )
    places, places_now = _places(before), _places(now)
    for digest in {**places, **places_now}:
        was, has = places.get(digest, []), places_now.get(digest, [])
        for first, second in zip(*_in_same_splits_first(was, has), strict=False):
            _compare(before, first, now, second, found)
        found.removed += was[len(has) :]
        found.added += has[len(was) :]
    return found


def _places(store: Store) -> dict[bytes, list[Place]]:
    """The places of each image, by its digest."""
    found: dict[bytes, list[Place]] = defaultdict(list)
    for name in store.manifest.shards:
        if store.manifest.original(name) == name:
            for row, digest in enumerate(image_digests(store.split(name))):
                found[digest].append((name, row))
    return found


def _in_same_splits_first(was: list[Place], has: list[Place]) -> tuple[list[Place], list[Place]]:
    """Sort the places of equal images, so that those of one split are compared."""
    if len(was) > 1 or len(has) > 1:
        both = Counter(split for split, _ in was) & Counter(split for split, _ in has)
        for places in (was, has):
            left = Counter(both)
            order = []
            for split, row in places:
                order.append((left[split] <= 0, split, row))
                left[split] -= 1
            places[:] = [(split, row) for _, split, row in sorted(order)]
    return was, has


def _compare(before: Store, first: Place, now: Store, second: Place, found: StoreDifference) -> None:
    changed = first[0] != second[0]
    if changed:
        found.moved.append((first, second))
    one, other = before.split(first[0]), now.split(second[0])
    if one.is_detection:
        changes = _box_changes(_boxes(one, first[1]), _boxes(other, second[1]))
        if changes:
            found.boxes.append((second, changes))
            changed = True
    else:
        labels = one.class_names[one.label(first[1])], other.class_names[other.label(second[1])]
        if labels[0] != labels[1]:
            found.relabelled.append((second, *labels))
            changed = True
    found.same += not changed


def _boxes(split: Split, row: int) -> list[_Box]:
    found = split.annotations(row)
    return [(split.class_names[k], tuple(box)) for k, box in zip(found.labels, found.boxes.tolist(), strict=True)]


def _box_changes(before: list[_Box], now: list[_Box]) -> dict[str, int]:
    """Number of boxes by change; empty where they are the same, in any order."""
    both = Counter(before) & Counter(now)
    gone, new = (list((Counter(boxes) - both).elements()) for boxes in (before, now))
    changes: Counter[str] = Counter()
    for first, second in _overlapping(gone, new):
        changes["relabelled" if gone[first][0] != new[second][0] else "moved"] += 1
    paired = sum(changes.values())
    changes.update({"removed": len(gone) - paired, "added": len(new) - paired})
    return {name: changes[name] for name in ("added", "removed", "moved", "relabelled") if changes[name]}


def _overlapping(gone: list[_Box], new: list[_Box]) -> Iterator[tuple[int, int]]:
    """Pairs of boxes that overlap by half, greedily from the largest overlap."""
    if not gone or not new:
        return
    overlap = _iou(*(np.array([box for _, box in boxes], np.float64) for boxes in (gone, new)))
    while overlap.max() >= _SAME_OBJECT:
        first, second = (int(part) for part in np.unravel_index(overlap.argmax(), overlap.shape))
        yield first, second
        overlap[first, :] = overlap[:, second] = -1.0


def _iou(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of boxes x y width height, [n, 4] and [m, 4] -> [n, m]."""
    start = np.maximum(one[:, None, :2], other[None, :, :2])
    end = np.minimum(one[:, None, :2] + one[:, None, 2:], other[None, :, :2] + other[None, :, 2:])
    shared = np.clip(end - start, 0, None).prod(-1)
    whole = one[:, 2:].prod(1)[:, None] + other[:, 2:].prod(1)[None] - shared
    return np.where(whole > 0, shared / np.where(whole > 0, whole, 1), 0.0)
