""".csv: one event a line, separated by commas; a header names the columns, or the option `columns` does."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.blocks import head
from spikefleet_pipelines.events.readers.fields import FieldValues, choose_fields, place_columns
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, FIELDS, ReadOptions
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, ReadAudit, damaged, reading

_LONGEST_LINE = 1 << 16
_BLOCK_BYTES = 1 << 22
_LARGEST_EXACT = 1 << 53  # of float64


def read_csv(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open a .csv file.

    Raises:
        SourceError: it cannot be read, or its columns are not clear.
    """
    with reading(path):
        first, end, _ = head(path, _LONGEST_LINE).partition(b"\n")
    try:
        cells = [cell.strip().strip('"') for cell in first.decode("utf-8-sig").strip().split(",")]
    except UnicodeDecodeError as error:
        raise damaged(path, "its first line is not text") from error
    if not end and cells == [""]:
        raise SourceError(f"{path} is empty; give it a header t,x,y,p and one event a line")
    names_columns = not all(map(_is_number, cells))
    if names_columns:
        if len(set(cells)) < len(cells):
            raise SourceError(f"{path} has columns of one name ({', '.join(cells)}); rename them")
        chosen = choose_fields(path, cells, options)
        place = {field: cells.index(name) for field, name in chosen.items()}
    else:
        place = place_columns(path, len(cells), options)
    count = len(cells)
    return EventReader(path, None, lambda audit: _decode(path, count, place, names_columns, options, audit), options)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _decode(
    path: Path, count: int, place: dict[str, int], names_columns: bool, options: ReadOptions, audit: ReadAudit
) -> Iterator[Decoded]:
    import pyarrow as pa
    from pyarrow import csv

    names = [str(number) for number in range(count)]
    read = [str(place[field]) for field in FIELDS]
    tail = _unended_tail(path)
    if tail.count(b",") < count - 1 and tail.strip():
        audit.cut_bytes += len(tail)
    else:
        tail = b""

    try:
        stream = csv.open_csv(
            _Start(path, path.stat().st_size - len(tail)),
            read_options=csv.ReadOptions(
                use_threads=False, block_size=_BLOCK_BYTES, column_names=names, skip_rows=int(names_columns)
            ),
            convert_options=csv.ConvertOptions(
                include_columns=read, column_types=dict.fromkeys(read, pa.float64()), null_values=[""]
            ),
        )
    except pa.ArrowInvalid as error:
        if path.stat().st_size <= _LONGEST_LINE and not _has_events(path, names_columns):
            return
        raise _not_numbers(path, error) from error
    convert = FieldValues(path, options)
    with stream:
        while True:
            try:
                batch = stream.read_next_batch()
            except StopIteration:
                return
            except pa.ArrowInvalid as error:
                raise _not_numbers(path, error) from error
            yield convert({field: _exact(path, field, batch.column(at)) for at, field in enumerate(FIELDS)})


class _Start(io.RawIOBase):
    """The first bytes of a file."""

    def __init__(self, path: Path, size: int) -> None:
        self._stream = path.open("rb")
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raw = self._stream.read(min(len(buffer), self._left))
        buffer[: len(raw)] = raw
        self._left -= len(raw)
        return len(raw)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _exact(path: Path, field: str, column: Any) -> NDArray[np.float64]:
    if column.null_count:
        raise SourceError(f"{path} has a line without a value for {field}; complete it or remove the line")
    values: NDArray[np.float64] = column.to_numpy()
    if field == "t" and len(values) and np.abs(values).max() > _LARGEST_EXACT:
        raise SourceError(
            f"{path} has a time of {values[np.abs(values).argmax()]}, expected at most 2^53; subtract the start"
        )
    return values


def _unended_tail(path: Path) -> bytes:
    """Return the last line of a file if no line break ends it."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _LONGEST_LINE))
        return stream.read().rpartition(b"\n")[2]


def _has_events(path: Path, names_columns: bool) -> bool:
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    return len(lines) > int(names_columns)


def _not_numbers(path: Path, error: Exception) -> SourceError:
    reason = str(error).splitlines()[0][:200]
    return SourceError(
        f"{path} is no table of numbers: {reason}; write one event a line, separated by commas, p as 0 and 1"
    )
