"""Records of an image with its class or its objects, as shards of others hold them: the contents of a store."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.box_rows import Box, FoundImage, boxed_contents, drop_repeated
from spikefleet_pipelines.sources.boxed_images import BoxedContents
from spikefleet_pipelines.sources.contents import MAX_CLASSES
from spikefleet_pipelines.sources.labelled_images import LabelledContents, LabelledImages
from spikefleet_pipelines.sources.own_splits_config import OwnSplits
from spikefleet_pipelines.sources.packed_images import PackedImage
from spikefleet_pipelines.sources.split_rules import STAND_INS, divide_splits, group_names
from spikefleet_pipelines.sources.text_files import short
from spikefleet_pipelines.store.decode import upright_size
from spikefleet_pipelines.store.manifest import is_text

_BOX_KEYS = ("bbox", "bboxes", "boxes", "box")
_CLASS_KEYS = ("category", "categories", "category_id", "label", "labels", "class", "classes", "cls")
_LONGEST_NAME = 1000
"""Most characters of the name of a class: longer text is of an image, and not of a class."""

_NO_CLASS = "images without a class (label -1 or none)"

Label = int | str
"""A class by its index or its name."""


@dataclass
class Record:
    """An image with its class, or with its objects."""

    image: PackedImage
    label: Label | None = None
    """None: it has no class."""
    boxes: list[Box] | None = None
    """x y width height in pixels; None for classification."""
    labels: list[Label] = field(default_factory=list)
    """Class of each box."""


def contents_of(
    source: str,
    root: Path,
    splits: Mapping[str, Sequence[Record]],
    names: Sequence[str] | None,
    options: OwnSplits,
    seed: int,
    unused: Counter[str],
    advice: str,
) -> LabelledContents | BoxedContents:
    """Number the classes and divide the records into splits.

    Args:
        source: name, for messages.
        root: directory of the files.
        splits: the records of each split that the data set has.
        names: of the classes, where labels are their indices; None: those that the labels say.
        options: what is held out, and which images belong together.
        seed: of the held-out images.
        unused: number of what is not used, by reason.
        advice: what to do about an image that cannot be read.

    Raises:
        SourceError: some records have boxes and some none, a class has no name, or the records cannot be divided.
    """
    kept = {split: _with_class(of_split, unused) for split, of_split in splits.items()}
    kept = {split: of_split for split, of_split in kept.items() if of_split}
    if "train" not in kept:
        raise SourceError(f"source {source!r}: {root} has no training image with a class or with boxes; add some")
    kinds = {record.boxes is None for of_split in kept.values() for record in of_split}
    if len(kinds) > 1:
        raise SourceError(f"source {source!r}: some images of {root} have boxes and some a class; give all the same")
    classes, index = _classes(source, root, kept, names)
    if kinds == {False}:
        return _boxed(source, root, kept, classes, index, options, seed, unused, advice)
    given = {
        split: LabelledImages(
            tuple(record.image for record in of_split),
            np.array([index(record.image, record.label) for record in of_split], np.int64),
        )
        for split, of_split in kept.items()
    }
    groups = {
        split: group_names(source, [record.image.below(root) for record in of_split], options.group)
        for split, of_split in kept.items()
    }
    divided = divide_splits(source, given, given["train"].labels, groups, options, seed)
    return LabelledContents(
        tuple(classes), divided, stand_ins=STAND_INS, unused=dict(sorted(unused.items())), advice=advice
    )


def objects_of(where: str, found: Any, corners: bool) -> tuple[list[Box], list[Label]]:
    """Read the objects of an image.

    Args:
        where: of the record, for messages.
        found: a list of objects `{"bbox": ..., "category": ...}`, or an object of lists.
        corners: whether boxes are x1 y1 x2 y2 instead of x y width height.

    Raises:
        SourceError: a box or a class is missing or malformed.
    """
    if isinstance(found, Mapping):
        boxes, labels = (_first_of(where, found, keys) for keys in (_BOX_KEYS, _CLASS_KEYS))
        if not isinstance(boxes, list) or not isinstance(labels, list) or len(boxes) != len(labels):
            raise SourceError(f"{where}: expected as many classes as boxes, as lists; correct the record")
        pairs = list(zip(boxes, labels, strict=True))
    elif isinstance(found, list) and all(isinstance(one, Mapping) for one in found):
        pairs = [(_first_of(where, one, _BOX_KEYS), _first_of(where, one, _CLASS_KEYS)) for one in found]
    else:
        raise SourceError(f"{where}: objects are {short(found)}, expected a list of boxes with classes")
    return [_box(where, box, corners) for box, _ in pairs], [_label(where, label) for _, label in pairs]


def label_of(where: str, value: Any) -> Label | None:
    """Read the class of an image; None for -1 and null, which mean none. Raises SourceError for other values."""
    return None if value is None or value == -1 else _label(where, value)


def _first_of(where: str, found: Mapping[str, Any], keys: Sequence[str]) -> Any:
    for key in keys:
        if key in found:
            return found[key]
    raise SourceError(f"{where}: its objects have {', '.join(map(short, found)) or 'nothing'}, expected {keys[0]!r}")


def _box(where: str, box: Any, corners: bool) -> Box:
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise SourceError(f"{where}: box {short(box)} is not four numbers; correct the record")
    try:
        x, y, right, bottom = map(float, box)
    except OverflowError:
        raise SourceError(f"{where}: box {short(box)} has a number that is too large; correct the record") from None
    width, height = (right - x, bottom - y) if corners else (right, bottom)
    if not np.isfinite([x, y, width, height]).all() or min(width, height) < 0:
        form = "x1 y1 x2 y2" if corners else "x y width height"
        raise SourceError(
            f"{where}: box {short(box)} is not {form}; correct it, or set option boxes={'xywh' if corners else 'xyxy'}"
        )
    return x, y, width, height


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(where: str, value: Any) -> Label:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        if value >= MAX_CLASSES:
            raise SourceError(
                f"{where}: class {short(value)} is no index from 0 to {MAX_CLASSES - 1:,}; write indices from 0"
            )
        return value
    if isinstance(value, str) and value.strip() and is_text(value) and len(value) <= _LONGEST_NAME:
        return value.strip()
    raise SourceError(
        f"{where}: class {short(value)} is no index from 0 and no name (text of at most {_LONGEST_NAME:,} characters); "
        "correct the record"
    )


def _with_class(records: Iterable[Record], unused: Counter[str]) -> list[Record]:
    found = []
    for record in records:
        if record.label is None and record.boxes is None:
            unused[_NO_CLASS] += 1
        else:
            found.append(record)
    return found


def _classes(
    source: str, root: Path, splits: Mapping[str, Sequence[Record]], names: Sequence[str] | None
) -> tuple[list[str], Callable[[object, Label | None], int]]:
    """The names of the classes, and what gives the index of a label."""
    labels = {
        label
        for of_split in splits.values()
        for record in of_split
        for label in (record.labels if record.label is None else [record.label])
    }
    if not labels and names is None:
        raise SourceError(f"source {source!r}: no image of {root} has an object; add some, or the names of the classes")
    numbered = all(isinstance(label, int) for label in labels)
    if not numbered and any(isinstance(label, int) for label in labels):
        raise SourceError(
            f"source {source!r}: some classes of {root} are numbers and some names; write all the same way"
        )
    if names is not None:
        classes = list(names)
    elif numbered:
        classes = [str(number) for number in range(max(label for label in labels if isinstance(label, int)) + 1)]
    else:
        classes = sorted(str(label) for label in labels)
    if len(set(classes)) < len(classes):
        raise SourceError(f"source {source!r}: a class of {root} is named twice; name each once")
    places = {name: number for number, name in enumerate(classes)}

    def index(where: object, label: Label | None) -> int:
        place = label if isinstance(label, int) else places.get(str(label), -1)
        if not 0 <= place < len(classes):
            raise SourceError(f"{where}: class {short(label)} has no name among {len(classes)} classes; add it")
        return place

    return classes, index


def _boxed(
    source: str,
    root: Path,
    splits: Mapping[str, Sequence[Record]],
    classes: Sequence[str],
    index: Callable[[object, Label | None], int],
    options: OwnSplits,
    seed: int,
    unused: Counter[str],
    advice: str,
) -> BoxedContents:
    found: dict[str, list[FoundImage]] = {}
    for split, records in splits.items():
        found[split] = []
        for record in records:
            height, width = _size(record.image)
            image = FoundImage(record.image, height, width, list(record.boxes or ()))
            image.labels = [index(record.image, label) for label in record.labels]
            drop_repeated(image, unused)
            found[split].append(image)
    ids = range(len(classes))
    return boxed_contents(source, root, classes, ids, found, options, seed, unused, advice)


def _size(image: PackedImage) -> tuple[int, int]:
    """Height and width; 0 of what is no image, which is named when it is decoded."""
    try:
        return upright_size(image.read()) or (0, 0)
    except ValueError:
        return 0, 0
