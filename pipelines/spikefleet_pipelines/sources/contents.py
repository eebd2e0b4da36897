"""Raw data that fit in memory, and the selection of held-out samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.counter_random import Draw, random_bits
from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.source import Progress
from spikefleet_pipelines.store.manifest import ImageFormat

if TYPE_CHECKING:  # arrays in memory need no pyarrow
    from spikefleet_pipelines.store.writer import StoreWriter


MAX_CLASSES = 1_000_000
"""Most classes that numbers may stand for: each gets a name, so that one wrong number would fill the memory."""


@dataclass(frozen=True)
class ArrayContents:
    """A data set small enough for memory: for each split, images uint8 [n, C, H, W] and labels int64 [n]."""

    class_names: tuple[str, ...]
    splits: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]
    category_ids: tuple[int, ...] | None = None
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, int] = field(default_factory=dict)
    """Number of what the data set has and does not use, by reason."""

    @property
    def image(self) -> ImageFormat:
        """Format of the images."""
        _, channels, height, width = self.splits["train"][0].shape
        return ImageFormat(encoding="raw", shape=(channels, height, width))

    def write(self, writer: "StoreWriter", progress: Progress, parallel: int | None) -> None:
        """Write all splits; see `Contents`."""
        writer.unused = dict(self.unused)
        total, done = sum(len(labels) for _, labels in self.splits.values()), 0
        for split, (images, labels) in self.splits.items():
            writer.write_images(split, images, labels)
            done += len(labels)
            progress(done, total)


def held_out(labels: NDArray[np.int64], count: Callable[[int], int], seed: int) -> NDArray[np.bool_]:
    """Select the samples of each class to hold out, as a mask [n].

    Args:
        labels: class of each sample, [n].
        count: number of samples to hold out, from the size of the class; those with the smallest hashes are taken.
        seed: of the hashes.
    """
    keys = random_bits(seed, 0, np.arange(len(labels)), Draw.HOLD_OUT)
    chosen = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[members[np.argsort(keys[members], kind="stable")[: count(len(members))]]] = True
    return chosen


def hold_out_validation(
    images: NDArray[np.uint8], labels: NDArray[np.int64], holdout: float, seed: int, train_images: int | None = None
) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Split training data into "train" and "val".

    Args:
        images: uint8 [n, C, H, W].
        labels: class of each image, [n].
        holdout: fraction of each class that becomes val; where that is no whole image, a store has no val.
        seed: of the choice.
        train_images: number of images that "train" keeps, the same fraction of each class; None keeps all. Their order
            and val do not depend on it.

    Raises:
        SourceError: fewer images are left after val, or a class keeps none.
    """
    val = held_out(labels, lambda n: round(n * holdout), seed)
    train = ~val
    if train_images is not None:
        train[train] = _kept(labels[train], train_images, seed)
    return {"train": (images[train], labels[train]), "val": (images[val], labels[val])}


def _kept(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.bool_]:
    """Select `count` samples, as a mask [n]: the same fraction of each class.

    The samples of a class of m have their turns at (1/2, 3/2, ...) / m (Webster's method). Unlike shares that are
    rounded to a sum, that never takes a sample away when `count` grows.
    """
    if count > len(labels):
        raise SourceError(f"train_images is {count:,}, but after val {len(labels):,} images are left; set at most that")
    classes = np.unique(labels)
    turns = np.empty(len(labels))
    keys = random_bits(seed, 0, np.arange(len(labels)), Draw.KEEP)
    for label in classes:
        members = np.flatnonzero(labels == label)
        turns[members[np.argsort(keys[members], kind="stable")]] = (np.arange(len(members)) + 0.5) / len(members)
    chosen = np.zeros(len(labels), np.bool_)
    chosen[np.lexsort((labels, turns))[:count]] = True
    if empty := np.setdiff1d(classes, labels[chosen]).tolist():
        raise SourceError(f"train_images is {count:,}: classes {empty} would keep no image; set a larger number")
    return chosen
