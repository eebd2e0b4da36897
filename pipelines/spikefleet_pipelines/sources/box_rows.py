"""Boxes that are found image by image, gathered into the columns of a store."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from spikefleet_pipelines.sources.boxed_images import BoxedContents, BoxedImages, file_sizes
from spikefleet_pipelines.sources.own_splits_config import OwnSplits
from spikefleet_pipelines.sources.packed_images import ImagePlace
from spikefleet_pipelines.sources.split_rules import STAND_INS, divide_splits, group_names
from spikefleet_pipelines.store.annotations import AnnotationColumns
from spikefleet_pipelines.store.splitting import rarest_classes

T = TypeVar("T")

Box = tuple[float, float, float, float]
"""x y width height, in pixels."""


@dataclass
class FoundImage:
    """An image file and its objects."""

    path: ImagePlace
    height: int
    width: int
    """Size in pixels; 0 for a file that is no image, which is named when it is decoded."""
    boxes: list[Box] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """Class index of each box."""
    group: str | None = None
    """Images of a group stay in one split; None: by the options."""


def boxed_contents(
    source: str,
    root: Path,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    splits: dict[str, list[FoundImage]],
    options: OwnSplits,
    seed: int,
    unused: Counter[str],
    advice: str,
) -> BoxedContents:
    """Number images and objects, and divide the images into splits.

    Args:
        source: name, for messages.
        root: directory of the images.
        class_names: in the order of the class indices.
        category_ids: the id of each class.
        splits: the images of each split that the data set has.
        options: what is held out, and which images belong together.
        seed: of the held-out images.
        unused: number of what is not used, by reason.
        advice: what to do about a file that cannot be read.

    Raises:
        SourceError: the training images cannot be divided as asked.
    """
    given: dict[str, BoxedImages] = {}
    images = objects = 1
    for split, found in splits.items():
        given[split] = _columns(root, found, category_ids, images, objects)
        images += len(found)
        objects += sum(len(image.boxes) for image in found)
    grouped = any(image.group is not None for found in splits.values() for image in found)
    groups = {
        split: [image.group or path_below(root, image.path) for image in found]
        if grouped
        else group_names(source, [path_below(root, image.path) for image in found], options.group)
        for split, found in splits.items()
    }
    strata = rarest_classes([np.array(image.labels, np.int64) for image in splits["train"]], len(class_names))
    divided = divide_splits(source, given, strata, groups, options, seed, grouped or None)
    return BoxedContents(
        tuple(class_names), tuple(category_ids), divided, STAND_INS, dict(sorted(unused.items())), advice
    )


def drop_repeated(image: FoundImage, unused: Counter[str]) -> None:
    """Leave out boxes that repeat an earlier one of the image with the same class, and count them."""
    seen = dict.fromkeys(zip(image.boxes, image.labels, strict=True))
    if repeated := len(image.boxes) - len(seen):
        unused["boxes that repeat another of their image"] += repeated
        image.boxes, image.labels = [box for box, _ in seen], [label for _, label in seen]


def path_below(root: Path, path: ImagePlace) -> str:
    """The name of an image for groups: its path below the root, with `/`."""
    if not isinstance(path, Path):
        return path.below(root)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _columns(
    root: Path, found: Sequence[FoundImage], category_ids: Sequence[int], first_image: int, first_object: int
) -> BoxedImages:
    counts = [len(image.boxes) for image in found]
    boxes = np.array(_flat(image.boxes for image in found), np.float64).reshape(-1, 4)
    labels = np.array(_flat(image.labels for image in found), np.int64)
    columns = AnnotationColumns(
        np.arange(first_image, first_image + len(found), dtype=np.int64),
        np.array([image.height for image in found], np.int32),
        np.array([image.width for image in found], np.int32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        boxes,
        np.array(category_ids, np.int64)[labels],
        np.zeros(len(boxes), np.bool_),
        boxes[:, 2] * boxes[:, 3],
        np.arange(first_object, first_object + len(boxes), dtype=np.int64),
    )
    paths = tuple(image.path for image in found)
    return BoxedImages(paths, file_sizes(paths), columns, np.array(counts, np.int64), root)


def _flat(parts: Iterable[list[T]]) -> list[T]:
    return [item for part in parts for item in part]
