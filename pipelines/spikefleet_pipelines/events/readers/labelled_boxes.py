"""Boxes beside Prophesee's recordings (Gen1, 1Mpx): NAME_bbox.npy beside NAME_td.dat.

Fields are read by name: t or ts in us, x, y, w, h in pixels (top left corner), class_id, track_id, and confidence or
class_confidence.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.npy_header import map_npy
from spikefleet_pipelines.events.readers.reader import damaged, reading

BOXES_SUFFIX = "_bbox.npy"
EVENTS_SUFFIX = "_td.dat"
_LATE_US = 1_000_000  # how long after a recording's last event a label may be
_NAMES = {
    "t": ("t", "ts"), "x": ("x",), "y": ("y",), "w": ("w",), "h": ("h",), "class_id": ("class_id",),
    "track_id": ("track_id",), "confidence": ("confidence", "class_confidence"),
}  # fmt: skip


@dataclass(frozen=True)
class LabelledBoxes:
    """Boxes of a recording, in time order.

    Attributes:
        t: times in us, int64 `[N]`.
        boxes: x, y of the top left corner, w, h in pixels, as given, float32 `[N, 4]`; they may leave the sensor.
        class_id: int64 `[N]`.
        track_id: int64 `[N]`.
        confidence: float32 `[N]`.
        without_area: number of boxes with w or h = 0, which no loss should use.
        out_of_order: number of boxes that are earlier than one before them in the file.
    """

    t: NDArray[np.int64]
    boxes: NDArray[np.float32]
    class_id: NDArray[np.int64]
    track_id: NDArray[np.int64]
    confidence: NDArray[np.float32]
    without_area: int
    out_of_order: int


def read_boxes(path: Path, classes: int | None = None) -> LabelledBoxes:
    """Read a _bbox.npy file.

    Args:
        path: of the file.
        classes: number of classes of the data set; None: any.

    Raises:
        SourceError: it cannot be read, a field is missing or there twice, a box is not finite or negative, or a class
            is unknown; the message names the row.
    """
    rows = _load(path)
    fields = {field: rows[_field(path, rows, field)] for field in _NAMES}
    boxes = np.stack([fields[name].astype(np.float32) for name in "xywh"], axis=1)
    class_id = fields["class_id"].astype(np.int64)
    t = fields["t"].astype(np.int64)
    _refuse(path, np.asarray(~np.isfinite(boxes).all(axis=1)), boxes, "which is not finite")
    _refuse(path, np.asarray((boxes[:, 2:] < 0).any(axis=1)), boxes, "which has a negative size")
    end = np.iinfo(np.int64).max if classes is None else classes
    _refuse(path, (class_id < 0) | (class_id >= end), class_id, f"expected a class from 0 to {end - 1}", "class")
    _refuse(path, t < 0, t, "expected a time in us from 0 on", "time")
    latest = np.maximum.accumulate(t) if len(t) else t
    order = np.argsort(t, kind="stable")
    return LabelledBoxes(
        t[order],
        boxes[order],
        class_id[order],
        fields["track_id"].astype(np.int64)[order],
        fields["confidence"].astype(np.float32)[order],
        int(np.count_nonzero((boxes[:, 2:] == 0).any(axis=1))),
        int(np.count_nonzero(t < latest)),
    )


def count_late(path: Path, t: NDArray[np.int64], last_event: int) -> int:
    """Count the labels after a recording's last event.

    Raises:
        SourceError: one is more than 1 s later.
    """
    late = int(np.count_nonzero(t > last_event))
    if late and t.max() > last_event + _LATE_US:
        raise SourceError(
            f"{path} has a label at {t.max():,} us, more than 1 s after the recording's last event at {last_event:,} "
            "us; give the recording that belongs to it"
        )
    return late


def pair_recordings(folder: Path) -> list[tuple[Path, Path]]:
    """Return the pairs (NAME_td.dat, NAME_bbox.npy) of a folder, sorted by name.

    Raises:
        SourceError: a file has no partner; the message names it.
    """
    with reading(folder):
        names = sorted(path.name for path in folder.iterdir())
    for suffix, other in ((EVENTS_SUFFIX, BOXES_SUFFIX), (BOXES_SUFFIX, EVENTS_SUFFIX)):
        for name in names:
            partner = name.removesuffix(suffix) + other
            if name.endswith(suffix) and partner not in names:
                raise SourceError(f"{folder / name} has no {partner} beside it; add that file or remove this one")
    stems = [name.removesuffix(EVENTS_SUFFIX) for name in names if name.endswith(EVENTS_SUFFIX)]
    return [(folder / (stem + EVENTS_SUFFIX), folder / (stem + BOXES_SUFFIX)) for stem in stems]


def _load(path: Path) -> NDArray[Any]:
    with reading(path):
        rows = map_npy(path)
    if rows.ndim != 1 or rows.dtype.names is None:
        raise damaged(path, "it does not hold a structured array with one row a box")
    return rows


def _field(path: Path, rows: NDArray[Any], field: str) -> str:
    names = rows.dtype.names or ()
    found = [name for name in _NAMES[field] if name in names]
    if len(found) != 1 or rows.dtype[found[0]].kind not in "iuf" or rows.dtype[found[0]].shape:
        wanted = " or ".join(_NAMES[field])
        raise damaged(path, f"it has the fields {', '.join(names)}, expected one of numbers named {wanted}")
    return found[0]


def _refuse(path: Path, bad: NDArray[np.bool_], values: NDArray[Any], why: str, what: str = "box") -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise SourceError(f"{path}: row {row:,} has {what} {values[row].tolist()}, {why}; correct or remove it")
