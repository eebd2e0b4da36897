"""AEDAT 2.0 of a DVS128, as CIFAR10-DVS was published.

Lines that start with "#", then big-endian words of 32 bits: address and time in us. Of an address, bit 0 is the
polarity, inverted, and bits 1 to 7 and 8 to 14 are coordinates that count from the far corner: y = 127 - bits 1 to 7,
x = 127 - bits 8 to 14. Other cameras place them elsewhere and are refused by their further bits.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.blocks import read_blocks
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, ReadOptions
from spikefleet_pipelines.events.readers.packed_time import Unwrapper
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, ReadAudit, reading
from spikefleet_pipelines.events.readers.text_header import read_text_header

_FIRST_LINE = "!AER-DAT2.0"
_SENSOR = (128, 128)
_BLOCK = 1 << 17  # events
_ADDRESS_BITS = 15


def read_aedat2(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open an AEDAT 2.0 file.

    Raises:
        SourceError: it cannot be read, or its first line is not that of the format.
    """
    with reading(path):
        header = read_text_header(path, b"#")
    if header.lines[:1] != (_FIRST_LINE,):
        raise SourceError(f"{path} does not start with #{_FIRST_LINE}, so it is no AEDAT 2.0; give the original file")
    return EventReader(path, _SENSOR, lambda audit: _decode(path, header.offset, audit), options)


def _decode(path: Path, offset: int, audit: ReadAudit) -> Iterator[Decoded]:
    unwrap = Unwrapper(32)
    number = 0
    for words in read_blocks(path, offset, "V8", _BLOCK, audit):
        pairs = words.view(">u4").reshape(-1, 2).astype(np.uint32)
        address = pairs[:, 0]
        if address.max() >> _ADDRESS_BITS:
            row = int(np.argmax(address >> _ADDRESS_BITS > 0))
            raise SourceError(
                f"{path}: event {number + row:,} has address {address[row]:#x}, which is none of a DVS128 (bits 15 to "
                "31 must be 0); convert the recording to .npz or .csv with fields t, x, y, p"
            )
        number += len(address)
        t = unwrap(pairs[:, 1])
        audit.wraps = unwrap.wraps
        yield Decoded(
            t,
            (127 - (address >> 8 & 127)).astype(np.uint16),
            (127 - (address >> 1 & 127)).astype(np.uint16),
            (1 - (address & 1)).astype(np.uint8),
        )
