""".npy and .npz: structured arrays, keys t, x, y, p, or unnamed columns. Nothing is unpickled."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.fields import BLOCK, FieldValues, choose_fields, place_columns
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, FIELDS, ReadOptions
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, damaged, reading

Places = dict[str, str] | dict[str, int]
"""The name or the column of each field."""
_SUFFIX = ".npy"
_MOST_HEADER = 10_000  # characters, numpy's own limit
_RAISED = (
    ValueError,
    KeyError,
    EOFError,
    SyntaxError,
    TypeError,
    NotImplementedError,
    zlib.error,
    zipfile.BadZipFile,
    RuntimeError,
)


def read_npy(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open a .npy file with a structured array `[N]`, or with columns `[N, k]` that the option `columns` names.

    Raises:
        SourceError: it cannot be read, or its fields are not clear.
    """
    with reading(path), _understood(path), path.open("rb") as stream:
        header = _read_header(stream)
        _check_plain(path, header)
        at, size = stream.tell(), path.stat().st_size
    whole = (size - at) // header.dtype.itemsize if header.row_bytes else 0
    if whole < header.items:
        raise damaged(
            path, f"its header states {list(header.shape)} {header.dtype}, which are more than its {size:,} bytes"
        )
    place = _places(path, header, options)
    return EventReader(path, None, lambda audit: _map(path, header, at, place, options), options)


def read_npz(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open a .npz file with keys t, x, y and p, or with one array as in a .npy file.

    Raises:
        SourceError: it cannot be read, or its keys are not clear.
    """
    with reading(path), _understood(path), zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(_SUFFIX) for name in archive.namelist()]
        if len(keys) != 1:
            chosen = choose_fields(path, keys, options)
            return EventReader(path, None, lambda audit: _stream_keys(path, chosen, options), options)
        with archive.open(archive.namelist()[0]) as stream:
            header = _read_header(stream)
    _check_plain(path, header)
    if header.fortran and len(header.shape) > 1:
        raise SourceError(f"{path} holds columns in Fortran order; save them with numpy.ascontiguousarray, or as .npy")
    place = _places(path, header, options)
    return EventReader(path, None, lambda audit: _stream_one(path, header, place, options), options)


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def items(self) -> int:
        count = 1
        for side in self.shape:
            count *= side  # Python's integers do not overflow
        return count

    @property
    def row_bytes(self) -> int:
        columns = self.shape[1] if len(self.shape) == 2 else 1
        return self.dtype.itemsize * columns


def _read_header(stream: IO[bytes]) -> _Header:
    version = npy_format.read_magic(stream)
    if version == (1, 0):
        return _Header(*npy_format.read_array_header_1_0(stream, max_header_size=_MOST_HEADER))
    if version == (2, 0):
        return _Header(*npy_format.read_array_header_2_0(stream, max_header_size=_MOST_HEADER))
    raise ValueError(f"it has version {version} of the format, expected 1.0 or 2.0")


def _check_plain(path: Path, header: _Header) -> None:
    if header.dtype.hasobject:
        raise SourceError(f"{path} holds Python objects ({header.dtype}), which are not unpickled; save plain numbers")
    if header.dtype.itemsize == 0 or any(side < 0 for side in header.shape):
        raise damaged(path, f"its header states {list(header.shape)} of {header.dtype}")


def _places(path: Path, header: _Header, options: ReadOptions) -> Places:
    """Return the name or the column of each field."""
    if header.dtype.names is not None and len(header.shape) == 1:
        return choose_fields(path, header.dtype.names, options)
    if header.dtype.names is not None or len(header.shape) != 2:
        raise SourceError(
            f"{path} holds {header.dtype} {list(header.shape)}, expected a structured array [N] with fields t, x, y "
            "and p, or columns [N, 4] with the option columns=..."
        )
    return place_columns(path, header.shape[1], options)


def _columns(rows: NDArray[Any], place: Places) -> dict[str, NDArray[Any]]:
    if rows.dtype.names is not None:
        return {field: rows[name] for field, name in place.items()}
    return {field: rows.T[column] for field, column in place.items()}


def _map(path: Path, header: _Header, at: int, place: Places, options: ReadOptions) -> Iterator[Decoded]:
    if not header.items:
        return
    order: Any = "F" if header.fortran else "C"
    rows = np.memmap(path, header.dtype, "r", at, header.shape, order)
    convert = FieldValues(path, options)
    for start in range(0, len(rows), BLOCK):
        yield convert(_columns(np.asarray(rows[start : start + BLOCK]), place))


def _stream_one(path: Path, header: _Header, place: Places, options: ReadOptions) -> Iterator[Decoded]:
    convert = FieldValues(path, options)
    with _understood(path), zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as stream:
        _read_header(stream)
        for rows in _rows(path, stream, header):
            yield convert(_columns(rows, place))


def _stream_keys(path: Path, chosen: dict[str, str], options: ReadOptions) -> Iterator[Decoded]:
    """Read the four members side by side, so that memory stays that of a block."""
    convert = FieldValues(path, options)
    with _understood(path), ExitStack() as opened:
        archive = opened.enter_context(zipfile.ZipFile(path))
        streams = {field: opened.enter_context(archive.open(chosen[field] + _SUFFIX)) for field in FIELDS}
        headers = {field: _read_header(stream) for field, stream in streams.items()}
        for header in headers.values():
            _check_plain(path, header)
        shapes = {field: header.shape for field, header in headers.items()}
        if len({header.items for header in headers.values()}) > 1 or any(
            header.items != max(header.shape, default=0) or header.dtype.names for header in headers.values()
        ):
            raise SourceError(f"{path} has keys of shapes {shapes}, expected one number an event in each")
        flat = {field: _Header((header.items,), False, header.dtype) for field, header in headers.items()}
        for blocks in zip(*(_rows(path, streams[field], flat[field]) for field in FIELDS), strict=True):
            yield convert(dict(zip(FIELDS, blocks, strict=True)))


def _rows(path: Path, stream: IO[bytes], header: _Header) -> Iterator[NDArray[Any]]:
    left = header.shape[0]
    while left:
        rows = min(left, BLOCK)
        raw = _read(stream, rows * header.row_bytes)
        if len(raw) < rows * header.row_bytes:
            raise damaged(path, f"an array ends {left:,} rows before the {header.shape[0]:,} of its header")
        yield np.frombuffer(raw, header.dtype).reshape(rows, *header.shape[1:])
        left -= rows


def _read(stream: IO[bytes], size: int) -> bytes:
    """Read so many bytes, or less at the end; a member may return less at once."""
    parts = []
    while size > 0 and (part := stream.read(min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except _RAISED as error:
        raise damaged(path, str(error)[:200] or type(error).__name__) from error
