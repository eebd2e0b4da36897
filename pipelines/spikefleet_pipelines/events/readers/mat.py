""".mat of MATLAB 5, as ASL-DVS was published: variables ts, x, y, pol, each `[N, 1]`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.blocks import head
from spikefleet_pipelines.events.readers.fields import BLOCK, FieldValues, choose_fields
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, FIELDS, ReadOptions
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, damaged, reading

_NUMERIC = frozenset({
    "double", "single", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "logical",
})  # fmt: skip
_MOST_EXPANSION = 1100  # zlib makes at most about 1032 bytes of one
_HDF5 = b"MATLAB 7.3"


def read_mat(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open a .mat file; it is read as a whole.

    Raises:
        SourceError: it cannot be read, is of version 7.3, or its variables are not clear.
    """
    with reading(path):
        if head(path, len(_HDF5)) == _HDF5:
            raise SourceError(
                f"{path} is of MATLAB 7.3 (HDF5); save it with save(..., '-v7'), or as .h5 with fields t, x, y, p"
            )
        size = path.stat().st_size
    from scipy import io  # takes a moment to import

    variables = {name: (shape, kind) for name, shape, kind in _call(path, io.whosmat, str(path))}
    chosen = choose_fields(path, list(variables), options)
    for name in chosen.values():
        shape, kind = variables[name]
        items = 1
        for side in shape:
            items *= int(side)
        if kind not in _NUMERIC or items not in (0, max(shape, default=0)):
            raise SourceError(f"{path}: variable {name} is {kind} {list(shape)}, expected one number an event")
        if items > size * _MOST_EXPANSION:
            raise damaged(path, f"variable {name} states {items:,} values, which are more than its {size:,} bytes")

    def decode(audit: object) -> Iterator[Decoded]:
        read = _call(path, io.loadmat, str(path), variable_names=list(chosen.values()))
        columns: dict[str, NDArray[Any]] = {field: np.ravel(read[chosen[field]]) for field in FIELDS}
        convert = FieldValues(path, options)
        for start in range(0, max(map(len, columns.values())), BLOCK):
            yield convert({field: values[start : start + BLOCK] for field, values in columns.items()})

    return EventReader(path, None, decode, options)


def _call(path: Path, function: Any, *arguments: Any, **named: Any) -> Any:
    with reading(path):
        try:
            return function(*arguments, **named)
        except Exception as error:  # scipy fails in any way on a damaged file, also with an OSError that no system made
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise damaged(path, str(error)[:200] or type(error).__name__) from error
