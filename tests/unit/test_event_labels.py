"""Labels beside recordings: boxes by field name, annotations, gestures; damaged ones are refused with their row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.gesture_labels import Gesture, read_gesture_labels
from spikefleet_pipelines.events.readers.labelled_boxes import count_late, pair_recordings, read_boxes
from spikefleet_pipelines.events.readers.ncaltech101_boxes import read_annotation
from support.damage import draws
from support.event_files import GEN1_FIRST, GEN1_LATER, write_annotation


def rows(dtype: Any) -> np.ndarray:
    made = np.zeros(3, dtype)
    names = made.dtype.names or ()
    made["ts" if "ts" in names else "t"] = [100, 200, 200]
    for name, values in {"x": [1, -2, 3], "y": [4, 5, 6], "w": [10, 20.5, 0], "h": [30, 40, 50]}.items():
        made[name] = values
    made["class_id"], made["track_id"] = [0, 1, 0], [7, 8, 9]
    made["confidence" if "confidence" in names else "class_confidence"] = 0.5
    return made


@pytest.mark.parametrize("dtype", [GEN1_FIRST, GEN1_LATER], ids=["first", "later"])
def test_boxes_of_both_releases_are_read_by_name(dtype: Any, tmp_path: Path) -> None:
    path = tmp_path / "a_bbox.npy"
    np.save(path, rows(dtype))
    found = read_boxes(path, classes=2)
    assert found.t.tolist() == [100, 200, 200]
    assert found.boxes.tolist() == [[1, 4, 10, 30], [-2, 5, 20.5, 40], [3, 6, 0, 50]]
    assert (found.class_id.tolist(), found.track_id.tolist()) == ([0, 1, 0], [7, 8, 9])
    assert found.confidence.tolist() == [0.5] * 3
    assert (found.without_area, found.out_of_order) == (1, 0)
    np.save(path, rows(dtype)[::-1])
    turned = read_boxes(path)
    assert (turned.t.tolist(), turned.track_id.tolist(), turned.out_of_order) == ([100, 200, 200], [7, 9, 8], 1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("w", np.nan, r"row 1 has box \[-2.0, 5.0, nan, 40.0\], which is not finite"),
        ("x", np.inf, "row 1 has box"),
        ("h", -1, "which has a negative size"),
        ("class_id", 2, "row 1 has class 2, expected a class from 0 to 1"),
        ("t", -5, "row 1 has time -5"),
    ],
)
def test_boxes_that_cannot_be_are_refused(field: str, value: float, message: str, tmp_path: Path) -> None:
    made = rows(GEN1_LATER)
    made[field][1] = value
    np.save(tmp_path / "a_bbox.npy", made)
    with pytest.raises(SourceError, match=message):
        read_boxes(tmp_path / "a_bbox.npy", classes=2)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 8)),
        np.zeros(3, [("t", "i8"), ("x", "f4")]),
        np.zeros(3, [*GEN1_FIRST, ("t", "i8")]),
        np.zeros(3, [*GEN1_FIRST[:-1], ("track_id", "U3")]),
        np.array([{"t": 1}], object),
    ],
)
def test_arrays_that_are_no_boxes_are_refused(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a_bbox.npy", array)
    with pytest.raises(SourceError, match=r"is damaged|not unpickled"):
        read_boxes(tmp_path / "a_bbox.npy")


def test_labels_after_the_last_event_are_kept_up_to_1_s() -> None:
    path = Path("a_bbox.npy")
    assert count_late(path, np.array([1, 10, 11, 1_000_010]), 10) == 2
    with pytest.raises(SourceError, match="label at 1,000,011 us, more than 1 s after"):
        count_late(path, np.array([1, 1_000_011]), 10)
    assert count_late(path, np.array([], np.int64), 10) == 0


def test_recordings_and_boxes_come_in_pairs(tmp_path: Path) -> None:
    for name in ("b_td.dat", "b_bbox.npy", "a_td.dat", "a_bbox.npy", "readme.txt"):
        (tmp_path / name).touch()
    pairs = pair_recordings(tmp_path)
    assert [(events.name, boxes.name) for events, boxes in pairs] == [
        ("a_td.dat", "a_bbox.npy"),
        ("b_td.dat", "b_bbox.npy"),
    ]
    (tmp_path / "a_bbox.npy").unlink()
    with pytest.raises(SourceError, match=r"a_td.dat has no a_bbox.npy beside it"):
        pair_recordings(tmp_path)
    (tmp_path / "a_td.dat").unlink()
    (tmp_path / "c_bbox.npy").touch()
    with pytest.raises(SourceError, match=r"c_bbox.npy has no c_td.dat beside it"):
        pair_recordings(tmp_path)


def test_annotations_are_in_column_major_order(tmp_path: Path) -> None:
    path = tmp_path / "annotation_0001.bin"
    box = np.array([[10, 60, 60, 10, 10], [5, 5, 45, 45, 5]], np.int16)
    contour = np.array([[1, 2, 3], [-4, 5, 6]], np.int16)
    write_annotation(path, box, contour)
    assert path.read_bytes()[:12] == bytes([2, 0, 5, 0, 10, 0, 5, 0, 60, 0, 5, 0])
    found = read_annotation(path)
    assert found.box == (10, 5, 50, 40)
    assert np.array_equal(found.contour, contour)
    raw = path.read_bytes()
    for bad in (b"", raw[:-1], raw[:-2], raw + b"\0\0", b"\3" + raw[1:], raw[:2] + b"\0\0" + raw[4:]):
        path.write_bytes(bad)
        with pytest.raises(SourceError, match="is damaged"):
            read_annotation(path)


LABELS = "class,startTime_usec,endTime_usec\n1,100,200\n11,150,300\n"


def test_gestures_count_from_0(tmp_path: Path) -> None:
    path = tmp_path / "user01_labels.csv"
    path.write_text(LABELS)
    assert read_gesture_labels(path) == [Gesture(0, 100, 200), Gesture(10, 150, 300)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line"),
        ("1,2,3\n", "first line"),
        (LABELS + "0,1,2\n", "line 4 has class 0 from 1 to 2 us, expected 1 to 11"),
        (LABELS + "12,1,2\n", "line 4 has class 12"),
        (LABELS + "3,5,5\n", "a start before its end"),
        (LABELS + "3,5\n", "line 4 is '3,5', expected class,start,end"),
        (LABELS + "3,a,7\n", "line 4 is"),
    ],
)
def test_gestures_that_cannot_be_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a_labels.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_gesture_labels(tmp_path / "a_labels.csv")


def test_damaged_labels_give_labels_or_an_error_of_the_source(tmp_path: Path) -> None:
    np.save(tmp_path / "a_bbox.npy", rows(GEN1_LATER))
    write_annotation(tmp_path / "annotation_1.bin", np.zeros((2, 5), np.int16), np.zeros((2, 9), np.int16))
    (tmp_path / "a_labels.csv").write_text(LABELS)
    refused = tried = 0
    readers: dict[str, Any] = {
        "a_bbox.npy": read_boxes,
        "annotation_1.bin": read_annotation,
        "a_labels.csv": read_gesture_labels,
    }
    for name, reader in readers.items():
        raw = (tmp_path / name).read_bytes()
        for rng in draws(60):
            changed = bytearray(raw[: rng.randrange(len(raw))] if rng.random() < 0.4 else raw)
            if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            (tmp_path / name).write_bytes(changed)
            tried += 1
            try:
                reader(tmp_path / name)
            except SourceError:
                refused += 1
    assert tried / 6 < refused < tried
