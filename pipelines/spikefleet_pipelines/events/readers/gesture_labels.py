"""Labels of DVS128 Gesture, NAME_labels.csv: class 1 to 11, start and end in us, behind a line of names."""

import csv
from dataclasses import dataclass
from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.reader import damaged, reading

CLASSES = 11
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Gesture:
    """A gesture in a recording: its events have start <= t < end. Gestures overlap in places.

    Attributes:
        label: class, 0 to 10.
        start: in us.
        end: in us.
    """

    label: int
    start: int
    end: int


def read_gesture_labels(path: Path) -> list[Gesture]:
    """Read a _labels.csv, in the order of the file.

    Raises:
        SourceError: it cannot be read, or a line is not a class with start and end; the message names the line.
    """
    with reading(path):
        raw = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else b"\xff"
    try:
        rows = list(csv.reader(raw.decode("utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise damaged(path, "it is not a table of text") from error
    if not rows or len(rows[0]) != 3 or rows[0][0].strip().isdigit():
        raise damaged(path, "its first line does not name class, start and end")
    return [_gesture(path, number, row) for number, row in enumerate(rows[1:], 2) if row]


def _gesture(path: Path, number: int, row: list[str]) -> Gesture:
    cells = [cell.strip() for cell in row]
    if len(cells) != 3 or not all(cell.isascii() and cell.isdigit() and len(cell) < 16 for cell in cells):
        raise SourceError(f"{path}: line {number} is {','.join(row)[:80]!r}, expected class,start,end; correct it")
    label, start, end = map(int, cells)
    if not 1 <= label <= CLASSES or start >= end:
        raise SourceError(
            f"{path}: line {number} has class {label} from {start} to {end} us, expected 1 to {CLASSES} and a "
            "start before its end; correct it"
        )
    return Gesture(label - 1, start, end)
