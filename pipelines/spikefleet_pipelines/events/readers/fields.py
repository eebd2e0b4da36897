"""Formats whose fields have names: which field is what, and what its numbers mean. Nothing is guessed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.options import FIELDS, SKIPPED, ReadOptions
from spikefleet_pipelines.events.readers.reader import Decoded

BLOCK = 1 << 18
"""Events that are converted at once."""
_NAMES = {
    "t": frozenset({"t", "ts", "timestamp"}),
    "x": frozenset({"x"}),
    "y": frozenset({"y"}),
    "p": frozenset({"p", "pol", "polarity"}),
}
_US = {"us": 1, "ms": 1_000, "s": 1_000_000}
_MOST_US = 1 << 60
_MOST_COORDINATE = 1 << 20  # beyond it, a coordinate cannot be one of any sensor; it is still reported as given

Columns = Mapping[str, NDArray[Any]]
"""Of t, x, y and p, the values of some events."""


def choose_fields(path: Path, names: Sequence[str], options: ReadOptions) -> dict[str, str]:
    """Return, for each of t, x, y and p, the name of the field of a file that it is.

    Raises:
        SourceError: a field is missing, or several names could be it.
    """
    given = dict(name.split(":", 1) for name in options.columns if ":" in name)
    chosen: dict[str, str] = {}
    for field in FIELDS:
        found = [name for name in names if name == given.get(field) or (not given and name.lower() in _NAMES[field])]
        if len(found) != 1:
            count = "no field" if not found else f"several fields ({', '.join(found)})"
            raise SourceError(
                f"{path} has {count} for {field}, among {', '.join(map(repr, names[:12])) or 'none'}; set "
                f"columns=t:NAME,x:NAME,y:NAME,p:NAME with the names of its fields"
            )
        chosen[field] = found[0]
    return chosen


def place_columns(path: Path, number: int, options: ReadOptions) -> dict[str, int]:
    """Return the positions of t, x, y and p among unnamed columns.

    Raises:
        SourceError: the option does not name the columns.
    """
    if not options.columns or any(":" in name for name in options.columns):
        raise SourceError(
            f"{path} has {number} columns without names; set columns=... with their names in order, for example "
            f"columns=x,y,t,p ({SKIPPED} for one that is not read)"
        )
    if len(options.columns) != number:
        raise SourceError(
            f"{path} has {number} columns, but columns={','.join(options.columns)} names {len(options.columns)}; name "
            f"each of them ({SKIPPED} for one that is not read)"
        )
    return {field: options.columns.index(field) for field in FIELDS}


class FieldValues:
    """Converts the values of a file's fields, block by block.

    Polarities are 0 and 1, or -1 and 1 throughout the file. Times have the unit of the option `time`.

    Args:
        path: of the file, for messages.
        options: of the reader.
    """

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path = path
        self._us = _US[options.time]
        self._unit = options.time
        self._signs: dict[int, int] = {}  # of the polarities 0 and -1, the first event that has it
        self._number = 0

    def __call__(self, columns: Columns) -> Decoded:
        """Convert the columns t, x, y and p, each `[N]`.

        Raises:
            SourceError: they differ in length, or a value is none that its field can have; the message names the event.
        """
        flat = {name: np.asarray(columns[name]) for name in FIELDS}
        lengths = {name: len(values) for name, values in flat.items()}
        if len(set(lengths.values())) > 1:
            raise SourceError(
                f"{self._path} has fields of different lengths {lengths}; give all of them one value an event"
            )
        for name, values in flat.items():
            if values.ndim != 1 or values.dtype.kind not in "biuf":
                raise SourceError(
                    f"{self._path}: field {name} is {values.dtype} {list(values.shape)}, expected numbers, one an event"
                )
        decoded = Decoded(
            self._times(flat["t"]), self._coordinates("x", flat["x"]), self._coordinates("y", flat["y"]),
            self._polarities(flat["p"]),
        )  # fmt: skip
        self._number += lengths["t"]
        return decoded

    def _times(self, values: NDArray[Any]) -> NDArray[np.int64]:
        limit = _MOST_US // self._us
        if values.dtype.kind == "f":
            wide = values.astype(np.float64)
            good = np.abs(wide) <= limit  # False for nan
        else:
            good = values <= limit
            if values.dtype.kind == "i":
                good &= values >= -limit
        self._check("t", values, good, f"a time in {self._unit}; set time=us, ms or s")
        if values.dtype.kind == "f":
            return np.rint(wide * self._us).astype(np.int64)
        return values.astype(np.int64) * self._us

    def _coordinates(self, name: str, values: NDArray[Any]) -> NDArray[np.int64]:
        if values.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                good = (np.abs(values) <= _MOST_COORDINATE) & (np.floor(values) == values)
            self._check(name, values, good, "a whole number of pixels; correct the file")
        elif values.dtype.itemsize == 8:
            values = np.clip(values, 0 if values.dtype.kind == "u" else -_MOST_COORDINATE, _MOST_COORDINATE)
        return values.astype(np.int64)

    def _polarities(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        if values.dtype.kind == "b":
            return values.astype(np.uint8)
        on = values == 1
        for sign in (0, -1):
            # A comparison with -1 would convert unsigned values.
            is_sign = values == sign if sign == 0 or values.dtype.kind != "u" else np.zeros(len(values), np.bool_)
            if sign not in self._signs and is_sign.any():
                self._signs[sign] = self._number + int(np.argmax(is_sign))
            on |= is_sign
        self._check("p", values, on, "0 or 1, or -1 or 1; correct the file")
        if len(self._signs) == 2:
            raise SourceError(
                f"{self._path} has polarity 0 at event {self._signs[0]:,} and -1 at event {self._signs[-1]:,}; give it "
                "polarities 0 and 1, or -1 and 1"
            )
        return (values == 1).astype(np.uint8)

    def _check(self, name: str, values: NDArray[Any], good: NDArray[np.bool_], expected: str) -> None:
        if not good.all():
            row = int(np.argmin(good))
            raise SourceError(
                f"{self._path}: event {self._number + row:,} has {name}={values[row]}, expected {expected}"
            )
