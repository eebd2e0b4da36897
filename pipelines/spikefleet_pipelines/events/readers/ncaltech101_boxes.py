"""Annotations of N-Caltech101, annotation_NNNN.bin: contours of the box and of the object."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.events.readers.reader import damaged, reading

SACCADES_US = 300_000
"""Length of the three saccades of a recording, for which its box is given."""

_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Annotation:
    """Of one recording.

    Attributes:
        box: x, y of the top left corner, w, h in pixels.
        contour: of the object, int16 `[2, N]`: row 0 x, row 1 y, from the corner of the box.
    """

    box: tuple[int, int, int, int]
    contour: NDArray[np.int16]


def read_annotation(path: Path) -> Annotation:
    """Read an annotation_NNNN.bin: twice i16 rows, i16 columns, values in column-major order.

    Raises:
        SourceError: it cannot be read, or is not two contours of x and y.
    """
    with reading(path):
        size = path.stat().st_size
        raw = path.read_bytes() if size <= _MOST_BYTES else b""
    if len(raw) % 2 or not raw:
        raise damaged(path, f"it has {size:,} bytes, expected two contours of 16-bit numbers")
    corners, rest = _contour(path, np.frombuffer(raw, "<i2"), "box")
    contour, rest = _contour(path, rest, "object")
    if len(rest):
        raise damaged(path, f"it has {2 * len(rest)} bytes after its two contours")
    left, top = corners.min(axis=1).tolist()
    right, bottom = corners.max(axis=1).tolist()
    return Annotation((left, top, right - left, bottom - top), contour)


def _contour(path: Path, values: NDArray[np.int16], what: str) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    rows, columns = values[:2].tolist() if len(values) >= 2 else (0, 0)
    if rows != 2 or columns < 1 or len(values) < 2 + rows * columns:
        raise damaged(
            path, f"the contour of the {what} has {rows} rows, {columns} columns, expected 2 and those in the file"
        )
    return values[2 : 2 + 2 * columns].reshape(columns, 2).T, values[2 + 2 * columns :]
