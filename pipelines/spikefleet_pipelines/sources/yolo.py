"""Data sets in YOLO's format (docs.ultralytics.com/datasets/detect, roboflow.com/formats/yolo).

The labels of an image are a text file of its name. It is in `labels/` where the image is in `images/` (the last folder
of that name in its path), else beside it; an image without one has no objects. A line is an object: `class x_center
y_center width height`, or `class x1 y1 x2 y2 ...` with at least three points of a polygon, whose box is taken. With
`kpt_shape`, a box is followed by keypoints, which are not used. Coordinates are fractions of the width and the height
of the image as it is seen, after its EXIF rotation.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.box_rows import Box, FoundImage, boxed_contents, drop_repeated
from spikefleet_pipelines.sources.boxed_images import BoxedContents
from spikefleet_pipelines.sources.text_files import listed_path, plain_number, read_text, short
from spikefleet_pipelines.sources.yolo_config import YOLO, YoloOptions
from spikefleet_pipelines.sources.yolo_yaml import YoloDescription, describe_yolo
from spikefleet_pipelines.store.decode import upright_size
from spikefleet_pipelines.store.image_files import list_images

_TOLERANCE = 0.01
"""Coordinates this far outside the image are rounding errors of the program that wrote them."""
_ADVICE = "replace or remove the file"


def read_yolo(root: Path, options: YoloOptions, seed: int) -> BoxedContents:
    """Read description, labels and sizes of the images.

    Raises:
        SourceError: a file is missing or invalid; the message names file, line and value.
    """
    description = describe_yolo(root, options.yaml)
    unused: Counter[str] = Counter()
    splits = {split: _read_split(root, description, split, unused) for split in description.places}
    classes = description.class_names
    return boxed_contents(YOLO.name, root, classes, range(len(classes)), splits, options, seed, unused, _ADVICE)


def _read_split(root: Path, description: YoloDescription, split: str, unused: Counter[str]) -> list[FoundImage]:
    paths: dict[Path, None] = {}
    for place in description.places[split]:
        if place.is_dir():
            listed = list_images(place, recursive=True)
            paths |= dict.fromkeys(listed.images)
            unused.update(reason for path, reason in listed.unused if path.suffix.lower() != ".txt")
        else:
            paths |= dict.fromkeys(_listed(root, place))
    if not paths:
        places = ", ".join(str(place) for place in description.places[split])
        raise SourceError(f"{description.path}: split {split} has no image in {places}; correct the path")
    found = []
    labelled = 0
    for path in paths:
        labels = labels_of(root, path)
        height, width = upright_size(path) or (0, 0)
        image = FoundImage(path, height, width)
        if labels is not None:
            labelled += 1
            for box, label in _objects(labels, description):
                x, y, w, h = box
                image.boxes.append((x * width, y * height, w * width, h * height))
                image.labels.append(label)
        drop_repeated(image, unused)
        found.append(image)
    if not labelled:
        expected = _label_places(root, next(iter(paths)))[0]
        raise SourceError(
            f"{description.path}: none of the {len(paths):,} images of split {split} has a file of labels; the first "
            "is "
            f"looked for at {expected}; put the labels there"
        )
    if labelled < len(paths):
        unused[f"images of {split} without a file of labels (taken as images without objects)"] += len(paths) - labelled
    return found


def _listed(root: Path, path: Path) -> Iterator[Path]:
    """The images that a text file lists, one path a line."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        name = line.strip()
        if not name:
            continue
        yield listed_path(f"{path}, line {number}", root, name, (path.parent, root))


def labels_of(root: Path, image: Path) -> Path | None:
    """Return the file of labels of an image; None if there is none."""
    places = (place.with_suffix(suffix) for place in _label_places(root, image) for suffix in (".txt", ".TXT"))
    return next((path for path in places if path.is_file()), None)


def _label_places(root: Path, image: Path) -> list[Path]:
    beside = image.with_suffix(".txt")
    inside = image.relative_to(root).parts if image.is_relative_to(root) else image.parts
    folders = [part.casefold() for part in inside[:-1]]
    if "images" not in folders:
        return [beside]
    at = len(folders) - 1 - folders[::-1].index("images")
    other = Path(*inside[:at], "labels", *inside[at + 1 :]).with_suffix(".txt")
    return [root / other if image.is_relative_to(root) else other, beside]


def _objects(path: Path, description: YoloDescription) -> Iterator[tuple[Box, int]]:
    """Box (x y width height, fractions of the image) and class of each line."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        words = line.split()
        if not words:
            continue
        where = f"{path}, line {number}"
        values = [_number(where, word) for word in words]
        label = values[0]
        if not label.is_integer() or not 0 <= label < len(description.class_names):
            raise SourceError(
                f"{where}: class is {short(words[0])}, expected 0 to {len(description.class_names) - 1}, the classes "
                "of "
                f"{description.path.name}; correct the label, or add its class there"
            )
        yield _box(where, values[1:], description.keypoints), int(label)


def _number(where: str, word: str) -> float:
    value = plain_number(word)
    if value is None:
        raise SourceError(f"{where}: {short(word)} is no number; write `class x_center y_center width height`")
    return value


def _box(where: str, values: list[float], keypoints: int) -> Box:
    if keypoints and len(values) == 4 + keypoints:
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        also = f", or {4 + keypoints} with the keypoints of kpt_shape" if keypoints else ""
        raise SourceError(
            f"{where} has {len(values)} numbers after the class, expected 4 (x_center y_center width height), or 6, 8, "
            f"... of a polygon{also}; correct the line"
        )
    for value in values:
        if not -_TOLERANCE <= value <= 1 + _TOLERANCE:
            raise SourceError(
                f"{where}: coordinate is {value:g}, expected 0 to 1, fractions of the image's width and height; divide "
                "pixels by them, or clip the box"
            )
    if len(values) == 4:
        x, y, width, height = values
        if min(width, height) < 0:
            raise SourceError(f"{where}: width or height is {min(width, height):g}, expected at least 0; correct it")
        return x - width / 2, y - height / 2, width, height
    xs, ys = values[::2], values[1::2]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
