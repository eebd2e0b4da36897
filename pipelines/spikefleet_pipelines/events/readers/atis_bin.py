""".bin of N-MNIST and N-Caltech101: 5 bytes an event.

Bytes x and y, then a big-endian word of 24 bits: p = bit 23, t = bits 22 to 0 in us. A row with y = 240 is no event; it
says that the camera's clock overflowed and adds 2^13 us to all later times.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spikefleet_pipelines.events.readers.blocks import read_blocks
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, ReadOptions
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, ReadAudit

_BLOCK = 1 << 17  # events
_OVERFLOW_ROW = 240
_OVERFLOW_US = 1 << 13


def read_atis_bin(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open a .bin file; it does not state the size of its sensor.

    Raises:
        SourceError: it cannot be read.
    """
    return EventReader(path, None, lambda audit: _decode(path, audit), options)


def _decode(path: Path, audit: ReadAudit) -> Iterator[Decoded]:
    for raw in read_blocks(path, 0, "V5", _BLOCK, audit):
        columns = raw.view(np.uint8).reshape(-1, 5)
        overflow = columns[:, 1] == _OVERFLOW_ROW
        overflows = audit.wraps + np.cumsum(overflow)
        audit.wraps = int(overflows[-1])
        wide = columns[:, 2:].astype(np.int64)
        t = (wide[:, 0] & 127) << 16 | wide[:, 1] << 8 | wide[:, 2]
        t += overflows * _OVERFLOW_US
        event = ~overflow
        yield Decoded(t[event], columns[event, 0], columns[event, 1], columns[event, 2] >> 7)
