"""The header of numpy's .npy format, read without building the array."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.reader import damaged

_MOST_CHARACTERS = 10_000  # numpy's own limit


@dataclass(frozen=True)
class NpyHeader:
    """Shape, order and type of an array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def items(self) -> int:
        """Number of values."""
        count = 1
        for side in self.shape:
            count *= side  # Python's integers do not overflow
        return count

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of `[N]` or `[N, k]`."""
        return self.dtype.itemsize * (self.shape[1] if len(self.shape) == 2 else 1)


def read_npy_header(path: Path, stream: IO[bytes]) -> NpyHeader:
    """Read the header at the start of a stream; the array's bytes follow.

    Raises:
        SourceError: it is damaged, or the array holds Python objects, which would be unpickled.
    """
    try:
        version = npy_format.read_magic(stream)
        if version == (1, 0):
            header = NpyHeader(*npy_format.read_array_header_1_0(stream, max_header_size=_MOST_CHARACTERS))
        elif version == (2, 0):
            header = NpyHeader(*npy_format.read_array_header_2_0(stream, max_header_size=_MOST_CHARACTERS))
        else:
            raise ValueError(f"it has version {version} of the format, expected 1.0 or 2.0")
    except OSError:
        raise
    except Exception as error:  # numpy evaluates it as an expression of Python, which fails in many ways
        raise damaged(path, str(error).splitlines()[0][:200] if str(error) else type(error).__name__) from error
    if header.dtype.hasobject:
        raise SourceError(f"{path} holds Python objects ({header.dtype}), which are not unpickled; save plain numbers")
    if header.dtype.itemsize == 0 or any(side < 0 for side in header.shape):
        raise damaged(path, f"its header states {list(header.shape)} of {header.dtype}")
    return header


def map_npy(path: Path) -> np.ndarray[Any, np.dtype[Any]]:
    """Map the array of a .npy file.

    Raises:
        SourceError: as `read_npy_header`, or the header states more than the file holds.
    """
    with path.open("rb") as stream:
        header = read_npy_header(path, stream)
        at, size = stream.tell(), path.stat().st_size
    if header.items * header.dtype.itemsize > size - at:
        raise damaged(
            path, f"its header states {list(header.shape)} {header.dtype}, which are more than its {size:,} bytes"
        )
    if not header.items:
        return np.empty(header.shape, header.dtype)
    return np.memmap(path, header.dtype, "r", at, header.shape, "F" if header.fortran else "C")
