"""Numeric variables of MATLAB 5 files (.mat, saved with -v6 or -v7), found by a walk over the file and read in blocks.

After 128 bytes of text come elements: type (u32), size (u32), bytes. A matrix (14) has elements of its own: flags,
sizes, name, numbers; type 15 is a matrix compressed by zlib. Elements of up to 4 bytes have size and type in one word.

scipy's reader is not used: on damaged files it can end the process.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_NUMERIC_CLASSES = range(6, 16)
_COMPLEX = 0x0800
_MOST_SMALL = 1024  # bytes of flags, sizes or name
_STEP = 1 << 16


@dataclass(frozen=True)
class Variable:
    """A variable of a file.

    Attributes:
        name: of it.
        at: place of its element, in bytes.
        shape: sizes; empty where it is not an array of real numbers.
    """

    name: str
    at: int
    shape: tuple[int, ...]

    @property
    def items(self) -> int:
        """Number of values."""
        count = 1 if self.shape else 0
        for side in self.shape:
            count *= side
        return count


class _Source(Protocol):
    def read(self, size: int) -> bytes: ...


def list_variables(path: Path) -> list[Variable]:
    """Find the variables of a file.

    Raises:
        ValueError: it is no MATLAB 5 file, or damaged; also `struct.error` and `zlib.error`.
    """
    found = []
    with path.open("rb") as stream:
        order = _byte_order(stream.read(_HEADER))
        size = path.stat().st_size
        at = _HEADER
        while at + 8 <= size:
            stream.seek(at)
            _, bytes_ = struct.unpack(order + "II", stream.read(8))
            if at + 8 + bytes_ > size:
                raise ValueError(f"the element at byte {at:,} has {bytes_:,} bytes, and the file ends before")
            with VariableStream(path, at) as variable:
                found += [variable.variable] if variable.variable else []
            at += 8 + bytes_
    return found


class VariableStream:
    """The numbers of one variable, read in blocks.

    Args:
        path: of the file.
        at: place of the variable's element.

    Attributes:
        variable: what its header says; None where the element is no matrix.
        dtype: of its numbers, as stored.
    """

    def __init__(self, path: Path, at: int) -> None:
        self._file = path.open("rb")
        self.variable: Variable | None = None
        self.dtype = np.dtype("u1")
        try:
            self._order = _byte_order(self._file.read(_HEADER))
            self._file.seek(at)
            kind, size = struct.unpack(self._order + "II", self._file.read(8))
            self._source: _Source = self._file
            if kind == _COMPRESSED:
                self._source = _Inflated(self._file, size)
                kind, size = struct.unpack(self._order + "II", self._exactly(8))
            if kind == _MATRIX:
                self._read_header(at)
        except BaseException:
            self._file.close()
            raise

    def blocks(self, items: int) -> Iterator[np.ndarray[tuple[int], np.dtype[np.generic]]]:
        """Yield the numbers, at most so many at once."""
        left = self.variable.items if self.variable else 0
        while left:
            number = min(left, items)
            yield np.frombuffer(self._exactly(number * self.dtype.itemsize), self.dtype)
            left -= number

    def __enter__(self) -> "VariableStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read_header(self, at: int) -> None:
        flags = int.from_bytes(self._element()[1][:4], "little" if self._order == "<" else "big")
        sizes = self._element()[1]
        shape = struct.unpack(f"{self._order}{len(sizes) // 4}i", sizes[: len(sizes) // 4 * 4])
        name = self._element()[1].decode("latin-1")
        if any(side < 0 for side in shape):
            raise ValueError(f"variable {name!r} has the sizes {list(shape)}")
        self.variable = Variable(name, at, ())
        if flags & 255 in _NUMERIC_CLASSES and not flags & _COMPLEX:
            self.variable = Variable(name, at, shape)
            kind, size, inline = self._tag()
            if kind not in _NUMBERS:
                raise ValueError(f"variable {name!r} has numbers of type {kind}")
            self.dtype = np.dtype(self._order + _NUMBERS[kind])
            if size != self.variable.items * self.dtype.itemsize:
                raise ValueError(f"variable {name!r} has the sizes {list(shape)} and {size:,} bytes")
            self._source = _Given(inline) if inline else self._source

    def _element(self) -> tuple[int, bytes]:
        """Read a small element: (type, bytes)."""
        kind, size, inline = self._tag()
        if size > _MOST_SMALL:
            raise ValueError(f"an element of a header has {size:,} bytes")
        return kind, inline[:size] or self._exactly(size + -size % 8)[:size]

    def _tag(self) -> tuple[int, int, bytes]:
        """Read (type, size, the bytes themselves where they are in the tag)."""
        raw = self._exactly(8)
        (word,) = struct.unpack(self._order + "I", raw[:4])
        if word >> 16:
            if word >> 16 > 4:
                raise ValueError(f"an element has {word >> 16} bytes in its tag, which holds 4")
            return word & 65535, word >> 16, raw[4:]
        return word, struct.unpack(self._order + "I", raw[4:])[0], b""

    def _exactly(self, size: int) -> bytes:
        raw = self._source.read(size)
        if len(raw) < size:
            raise ValueError(f"it ends {size - len(raw):,} bytes before the end of a variable")
        return raw


class _Given:
    """Bytes that are at hand."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def read(self, size: int) -> bytes:
        raw, self._raw = self._raw[:size], self._raw[size:]
        return raw


class _Inflated:
    """Decompresses so many bytes of a file as they are asked for."""

    def __init__(self, source: _Source, size: int) -> None:
        self._source = source
        self._left = size
        self._inflate = zlib.decompressobj()

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0 and not self._inflate.eof:
            raw = self._inflate.unconsumed_tail
            if not raw:
                raw = self._source.read(min(_STEP, self._left))
                self._left -= len(raw)
            part = self._inflate.decompress(raw, size)
            if not raw and not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _byte_order(header: bytes) -> str:
    mark = header[126:128]
    if len(header) < _HEADER or mark not in (b"IM", b"MI"):
        raise ValueError(f"it has the mark {mark!r} at byte 126, expected IM or MI of MATLAB 5")
    return "<" if mark == b"IM" else ">"
