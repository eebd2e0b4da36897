""".npy and .npz: structured arrays, keys t, x, y, p, or unnamed columns. Nothing is unpickled."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.fields import BLOCK, FieldValues, choose_fields, place_columns
from spikefleet_pipelines.events.readers.npy_header import NpyHeader, map_npy, read_npy_header
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, FIELDS, ReadOptions
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, damaged, reading

Places = dict[str, str] | dict[str, int]
"""The name or the column of each field."""
_SUFFIX = ".npy"
_RAISED = (ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zlib.error, zipfile.BadZipFile)
"""By zipfile, for damaged archives."""


def read_npy(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open a .npy file with a structured array `[N]`, or with columns `[N, k]` that the option `columns` names.

    Raises:
        SourceError: it cannot be read, or its fields are not clear.
    """
    with reading(path):
        rows = map_npy(path)
    place = _places(path, rows.shape, rows.dtype, options)
    return EventReader(path, None, lambda audit: _map(path, place, options), options)


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
            header = read_npy_header(path, stream)
    if header.fortran and len(header.shape) > 1:
        raise SourceError(f"{path} holds columns in Fortran order; save them with numpy.ascontiguousarray, or as .npy")
    place = _places(path, header.shape, header.dtype, options)
    return EventReader(path, None, lambda audit: _stream_one(path, header, place, options), options)


def _places(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], options: ReadOptions) -> Places:
    """Return the name or the column of each field."""
    if dtype.names is not None and len(shape) == 1:
        return choose_fields(path, dtype.names, options)
    if dtype.names is not None or len(shape) != 2:
        raise SourceError(
            f"{path} holds {dtype} {list(shape)}, expected a structured array [N] with fields t, x, y and p, or "
            "columns [N, 4] with the option columns=..."
        )
    return place_columns(path, shape[1], options)


def _columns(rows: NDArray[Any], place: Places) -> dict[str, NDArray[Any]]:
    if rows.dtype.names is not None:
        return {field: rows[name] for field, name in place.items()}
    return {field: rows.T[column] for field, column in place.items()}


def _map(path: Path, place: Places, options: ReadOptions) -> Iterator[Decoded]:
    convert = FieldValues(path, options)
    start, events = 0, 1
    while start < events:
        rows = map_npy(path)  # anew for each block, so that the pages of earlier ones do not stay in memory
        events = len(rows)
        if events:
            yield convert(_columns(np.asarray(rows[start : start + BLOCK]), place))
        start += BLOCK


def _stream_one(path: Path, header: NpyHeader, place: Places, options: ReadOptions) -> Iterator[Decoded]:
    convert = FieldValues(path, options)
    with _understood(path), zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as stream:
        read_npy_header(path, stream)
        for rows in _rows(path, stream, header):
            yield convert(_columns(rows, place))


def _stream_keys(path: Path, chosen: dict[str, str], options: ReadOptions) -> Iterator[Decoded]:
    """Read the four members side by side, so that memory stays that of a block."""
    convert = FieldValues(path, options)
    with _understood(path), ExitStack() as opened:
        archive = opened.enter_context(zipfile.ZipFile(path))
        streams = {field: opened.enter_context(archive.open(chosen[field] + _SUFFIX)) for field in FIELDS}
        headers = {field: read_npy_header(path, stream) for field, stream in streams.items()}
        shapes = {field: header.shape for field, header in headers.items()}
        if len({header.items for header in headers.values()}) > 1 or any(
            header.items != max(header.shape, default=0) or header.dtype.names for header in headers.values()
        ):
            raise SourceError(f"{path} has keys of shapes {shapes}, expected one number an event in each")
        flat = {field: NpyHeader((header.items,), False, header.dtype) for field, header in headers.items()}
        for blocks in zip(*(_rows(path, streams[field], flat[field]) for field in FIELDS), strict=True):
            yield convert(dict(zip(FIELDS, blocks, strict=True)))


def _rows(path: Path, stream: IO[bytes], header: NpyHeader) -> Iterator[NDArray[Any]]:
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
