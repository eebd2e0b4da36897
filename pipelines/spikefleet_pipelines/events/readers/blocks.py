"""Files of words of one size behind a header, read block by block."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.events.readers.reader import ReadAudit


def read_blocks(path: Path, offset: int, dtype: str, words: int, audit: ReadAudit) -> Iterator[NDArray[Any]]:
    """Yield the words of a file from a place on; bytes after the last whole word are counted.

    The file is read, not mapped: resident memory stays that of a block, and a file that is truncated meanwhile cannot
    end the process by a signal.

    Args:
        path: of the file.
        offset: of the first word, in bytes.
        dtype: of a word, with byte order.
        words: most words of a block.
        audit: gets the number of bytes left over.
    """
    item = np.dtype(dtype)
    with path.open("rb") as stream:
        stream.seek(offset)
        while raw := stream.read(words * item.itemsize):
            whole = len(raw) // item.itemsize
            if whole:
                yield np.frombuffer(raw, item, whole)
            if len(raw) % item.itemsize:
                audit.cut_bytes += len(raw) % item.itemsize


def head(path: Path, size: int) -> bytes:
    """Return the first bytes of a file."""
    with path.open("rb") as stream:
        return stream.read(size)
