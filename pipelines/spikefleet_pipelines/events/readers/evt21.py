"""EVT2.1: words of 64 bits, each for up to 32 neighbouring pixels.

Type = bits 60 to 63. 0 OFF and 1 ON: low 6 bits of the time = bits 54 to 59, x = bits 43 to 53, y = bits 32 to 42, and
bits 0 to 31 say which of the pixels x to x + 31 have an event. 8 TIME_HIGH: the time's bits 6 to 33 = bits 32 to 59.
Cameras with IMX636 send the half with the higher bits first ("legacy").
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spikefleet_pipelines.events.readers.blocks import read_blocks
from spikefleet_pipelines.events.readers.evt_words import UNSET, HeldState, check_types, set_bits
from spikefleet_pipelines.events.readers.packed_time import Unwrapper
from spikefleet_pipelines.events.readers.reader import Decoded, ReadAudit

_BLOCK = 1 << 15  # words, of up to 32 events each
_ON = 1
_TIME_HIGH = 8
_TYPES = frozenset({0, _ON, _TIME_HIGH, 0xA, 0xE, 0xF})
_TIME_BITS = 28


def decode_evt21(path: Path, offset: int, high_half_first: bool, audit: ReadAudit) -> Iterator[Decoded]:
    """Decode the words from a place of a file on; events before the first TIME_HIGH have no time and are invalid."""
    unwrap = Unwrapper(_TIME_BITS, sorted_source=True)
    high = HeldState()
    number = 0
    for words in read_blocks(path, offset, "<u8", _BLOCK, audit):
        halves = words.view(np.uint32).reshape(-1, 2)
        address, masks = (halves[:, 0], halves[:, 1]) if high_half_first else (halves[:, 1], halves[:, 0])
        types = (address >> 28).astype(np.uint8)
        check_types(path, types, _TYPES, number)
        number += len(words)
        setting = types == _TIME_HIGH
        at = np.flatnonzero(types <= _ON)
        audit.other_words += int(np.count_nonzero(types > _TIME_HIGH))
        base = high(setting, unwrap(address[setting] & ((1 << _TIME_BITS) - 1)), at)
        audit.wraps = unwrap.wraps
        timed = base != UNSET
        audit.invalid += int(np.bitwise_count(masks[at[~timed]]).sum())
        at, base = at[timed], base[timed]
        which, bit = set_bits(masks[at])
        events = address[at][which]
        yield Decoded(
            base[which] << 6 | (events >> 22 & 63),
            (events >> 11 & 2047).astype(np.int64) + bit,
            (events & 2047).astype(np.uint16),
            types[at][which],
        )
