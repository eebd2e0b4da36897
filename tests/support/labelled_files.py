"""Images with known boxes, and the files of labels that people have for them, written by hand for tests.

Nothing here uses a reader or a writer of spikefleet: what the files must mean is computed from `BOXES`.
"""

from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import PIL.Image

Known = tuple[str, int, int, int, int]
"""Class, x, y, width and height in pixels."""

CLASSES = ("cat", "no", "small dog")
"""In the order of their names; `no` is a boolean in YAML 1.1."""


def picture(path: Path, number: int, size: tuple[int, int]) -> None:
    """Write an image of its own colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)


def size_of(number: int) -> tuple[int, int]:
    """Width and height of an image."""
    return ((40, 20), (33, 61), (64, 64))[number % 3]


def boxes_of(number: int) -> list[Known]:
    """The objects of an image; every fifth has none."""
    width, height = size_of(number)
    return [
        (CLASSES[(number + k) % 3], 2 + k, 3 + k, width // 2, height // 2 - k)
        for k in range(0 if number % 5 == 4 else 2)
    ]


def yolo_lines(number: int) -> str:
    """Lines of YOLO's format; the second object is a polygon."""
    width, height = size_of(number)
    lines = []
    for k, (name, x, y, w, h) in enumerate(boxes_of(number)):
        label = CLASSES.index(name)
        if k:
            points = [(x, y + h / 2), (x + w, y), (x + w / 2, y + h)]
            lines.append(f"{label} " + " ".join(f"{px / width:.9f} {py / height:.9f}" for px, py in points))
        else:
            values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(f"{label} " + " ".join(f"{value:.9f}" for value in values))
    return "\n".join(lines) + "\n"


def voc_xml(number: int, name: str, first: int = 1) -> str:
    """A file of Pascal VOC's format, whose pixels are counted from `first`."""
    width, height = size_of(number)
    objects = "".join(
        f"<object><name>{escape(label)}</name><difficult>{k}</difficult><bndbox><xmin>{x + first}</xmin>"
        f"<ymin>{y + first}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>\n"
        for k, (label, x, y, w, h) in enumerate(boxes_of(number))
    )
    return (
        f"<annotation>\n<filename>{name}</filename>\n<size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>\n{objects}</annotation>\n"
    )


def csv_lines(number: int, name: str) -> list[str]:
    """Lines of keras-retinanet's format."""
    return [f"{name},{x},{y},{x + w},{y + h},{label}" for label, x, y, w, h in boxes_of(number)] or [f"{name},,,,,"]
