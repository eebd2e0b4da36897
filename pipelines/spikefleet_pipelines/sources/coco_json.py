"""COCO's annotation files: one JSON object with the lists `images`, `annotations` and `categories`.

The checks follow the format (cocodataset.org/#format-data) and the assumptions of its evaluation. Nothing is repaired:
an inconsistent file is refused with the id at fault.
"""

import math
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.json_stream import list_elements
from spikefleet_pipelines.store.annotations import AnnotationColumns
from spikefleet_pipelines.store.manifest import is_text

_LARGEST_SIDE = 1 << 20


@dataclass(frozen=True)
class CocoFile:
    """One annotation file: its categories in ascending order of ids, its images in the order of the file."""

    path: Path
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    file_names: tuple[str, ...]
    columns: AnnotationColumns
    computed_areas: NDArray[np.int64]
    """Number of annotations without an area, for each image, [n]."""
    grouping: tuple[tuple[int, str], ...] = ()
    """Ids and names of the categories that are left out because they only group others, as some exports have them."""

    @property
    def unused(self) -> dict[str, int]:
        """The categories that are left out, for the manifest."""
        return {f"category that only groups others ({name!r}, id {number})": 1 for number, name in self.grouping}

    def with_all_categories(self) -> "CocoFile":
        """The same file with the categories that only group others."""
        table = dict(
            sorted({**dict(self.grouping), **dict(zip(self.category_ids, self.class_names, strict=True))}.items())
        )
        _check_names(self.path, table)
        return replace(self, category_ids=tuple(table), class_names=tuple(table.values()), grouping=())

    def check_same_categories(self, category_ids: tuple[int, ...], class_names: tuple[str, ...], where: str) -> None:
        """Compare the categories with those of another file or of a store.

        Args:
            category_ids: of the other.
            class_names: of the other, in the same order.
            where: name of the other, for the error message.

        Raises:
            SourceError: they differ; the message names the first difference.
        """
        here, there = (
            dict(zip(*table, strict=True))
            for table in ((self.category_ids, self.class_names), (category_ids, class_names))
        )
        for number in sorted({*here, *there}):
            if here.get(number) != there.get(number):
                raise SourceError(
                    f"{self.path}: category {number} is {here.get(number, 'missing')!r}, expected "
                    f"{there.get(number, 'missing')!r} of {where}; all splits must have the same categories"
                )


def read_coco_json(path: Path) -> CocoFile:
    """Read and check an annotation file; segmentations and other unused fields are dropped while reading.

    Raises:
        SourceError: the file is not an annotation file, or an entry is invalid; the message names the file and the id.
    """
    categories: dict[int, str] = {}
    above: dict[int, object] = {}
    images: dict[int, tuple[str, int, int]] = {}
    objects = _Objects(path)
    lists: set[str] = set()
    for section, position, entry in list_elements(path, lists):
        if section not in ("images", "annotations", "categories"):
            continue
        if not isinstance(entry, dict):
            raise SourceError(f"{path}: entry {position} of {section!r} is {_short(entry)}, expected a JSON object")
        number = _id(path, section, position, entry)
        if section == "annotations":
            objects.add(number, entry)
        elif section == "categories":
            name = entry.get("name")
            if not is_text(name):
                raise SourceError(
                    f"{path}: category {number}: name is {_short(name)}, expected a non-empty string of Unicode text"
                )
            if number in categories:
                raise SourceError(f"{path}: category {number} {name!r}: its id or its name occurs twice")
            categories[number] = name
            above[number] = entry.get("supercategory")
        else:
            if number in images:
                raise SourceError(f"{path}: image id {number} occurs twice")
            images[number] = _image(path, number, entry)
    for section, found in (("images", images), ("categories", categories)):
        if not found:
            raise SourceError(f"{path}: list {section!r} is missing or empty; give the JSON of a COCO data set")
    if "annotations" not in lists:
        raise SourceError(
            f"{path}: list 'annotations' is missing, so it is not the JSON of a labelled data set; give the one with "
            "the boxes"
        )
    grouping = _grouping(categories, above, objects.category_ids)
    for number, _ in grouping:
        del categories[number]
    _check_names(path, categories)
    ids = tuple(sorted(categories))
    columns, computed = objects.columns(images, categories)
    names = tuple(name for name, _, _ in images.values())
    return CocoFile(path, ids, tuple(categories[number] for number in ids), names, columns, computed, grouping)


def _grouping(
    categories: Mapping[int, str], above: Mapping[int, object], used: Collection[int]
) -> tuple[tuple[int, str], ...]:
    """The categories that are no class: without objects, under no other, and the supercategory of another one."""
    return tuple(
        (number, name)
        for number, name in sorted(categories.items())
        if number not in used
        and above[number] in (None, "", "none")
        and any(above[other] == name for other in categories if other != number)
    )


def _check_names(path: Path, categories: Mapping[int, str]) -> None:
    seen: set[str] = set()
    for number, name in categories.items():
        if name in seen:
            raise SourceError(f"{path}: category {number} {name!r}: its id or its name occurs twice")
        seen.add(name)


class _Objects:
    """The annotations read so far, as columns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids: dict[int, None] = {}
        self._image_ids = array("q")
        self._category_ids = array("q")
        self._boxes = array("d")
        self._areas = array("d")
        self._crowd = bytearray()
        self._computed = bytearray()

    def add(self, number: int, entry: Mapping[str, Any]) -> None:
        """Check one annotation by itself and add it."""
        where = f"{self._path}: annotation {number}"
        if number in self._ids:
            raise SourceError(f"{self._path}: annotation id {number} occurs twice")
        for key in ("image_id", "category_id"):
            if not _is_integer(entry.get(key)):
                raise SourceError(f"{where}: {key} is {_short(entry.get(key))}, expected an integer")
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)) or min(box[2:]) < 0:
            raise SourceError(
                f"{where} of image {entry['image_id']}: bbox is {_short(box)}, expected [x, y, width, height] of "
                "finite numbers with width and height of at least 0"
            )
        area, crowd = entry.get("area"), entry.get("iscrowd")
        crowd = 0 if crowd is None else crowd
        if area is not None and (not _is_finite(area) or area < 0):
            raise SourceError(
                f"{where} of image {entry['image_id']}: area is {_short(area)}, expected a finite number of at least 0"
            )
        if crowd not in (0, 1):
            raise SourceError(f"{where} of image {entry['image_id']}: iscrowd is {_short(crowd)}, expected 0 or 1")
        self._ids[number] = None
        self._image_ids.append(entry["image_id"])
        self._category_ids.append(entry["category_id"])
        self._boxes.extend(box)
        self._crowd.append(int(crowd))
        self._areas.append(box[2] * box[3] if area is None else area)
        self._computed.append(area is None)

    @property
    def category_ids(self) -> set[int]:
        """The categories of the annotations."""
        return set(self._category_ids)

    def columns(
        self, images: Mapping[int, tuple[str, int, int]], categories: Mapping[int, str]
    ) -> tuple[AnnotationColumns, NDArray[np.int64]]:
        """Sort all annotations by image.

        Returns:
            The annotations, and the number of computed areas of each image.

        Raises:
            SourceError: one belongs to an unknown image or category.
        """
        row_of = {number: row for row, number in enumerate(images)}
        for number, image_id, category_id in zip(self._ids, self._image_ids, self._category_ids, strict=True):
            for what, named, known in (("image", image_id, row_of), ("category", category_id, categories)):
                if named not in known:
                    raise SourceError(
                        f"{self._path}: annotation {number}: {what}_id is {named}, expected the id of one of the "
                        f"file's {what} entries"
                    )
        rows = np.array([row_of[image_id] for image_id in self._image_ids], np.int64)
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=len(images))
        columns = AnnotationColumns(
            np.fromiter(images, np.int64, len(images)),
            np.array([height for _, height, _ in images.values()], np.int32),
            np.array([width for _, _, width in images.values()], np.int32),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            np.array(self._boxes, np.float64).reshape(-1, 4)[order],
            np.array(self._category_ids, np.int64)[order],
            np.frombuffer(self._crowd, np.bool_)[order],
            np.array(self._areas, np.float64)[order],
            np.fromiter(self._ids, np.int64, len(self._ids))[order],
        )
        computed = np.bincount(rows, weights=np.frombuffer(self._computed, np.uint8), minlength=len(images)).astype(
            np.int64
        )
        return columns, computed


def _image(path: Path, number: int, entry: Mapping[str, Any]) -> tuple[str, int, int]:
    name = entry.get("file_name")
    # A file name from elsewhere must not reach outside the directory of images.
    if not is_text(name) or "\0" in name or "\\" in name or _leaves(PurePosixPath(name)):
        raise SourceError(
            f"{path}: image {number}: file_name is {_short(name)}, expected a path below the directory of images"
        )
    height, width = entry.get("height"), entry.get("width")
    if not _is_side(height) or not _is_side(width):
        raise SourceError(
            f"{path}: image {number} ({name}): height and width are {_short(height)} and {_short(width)}, expected "
            f"integers from 1 to {_LARGEST_SIDE}"
        )
    return name, height, width


def _leaves(name: PurePosixPath) -> bool:
    return name.is_absolute() or ".." in name.parts


def _id(path: Path, section: str, position: int, entry: Mapping[str, Any]) -> int:
    number = entry.get("id")
    if not _is_integer(number):
        raise SourceError(f"{path}: id of entry {position} of {section!r} is {_short(number)}, expected an integer")
    return number


def _is_side(value: object) -> TypeGuard[int]:
    return _is_integer(value) and 1 <= value <= _LARGEST_SIDE


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
