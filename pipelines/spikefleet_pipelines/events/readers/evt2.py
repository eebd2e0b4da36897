"""EVT2: words of 32 bits.

Type = bits 28 to 31. 0 OFF and 1 ON: low 6 bits of the time = bits 22 to 27, x = bits 11 to 21, y = bits 0 to 10.
8 TIME_HIGH: the time's bits 6 to 33. 0xA trigger, 0xE other and 0xF continued are no events of pixels.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spikefleet_pipelines.events.readers.blocks import read_blocks
from spikefleet_pipelines.events.readers.evt_words import UNSET, HeldState, check_types
from spikefleet_pipelines.events.readers.packed_time import Unwrapper
from spikefleet_pipelines.events.readers.reader import Decoded, ReadAudit

_BLOCK = 1 << 17  # words
_ON = 1
_TIME_HIGH = 8
_TYPES = frozenset({0, _ON, _TIME_HIGH, 0xA, 0xE, 0xF})
_TIME_BITS = 28  # of TIME_HIGH


def decode_evt2(path: Path, offset: int, audit: ReadAudit) -> Iterator[Decoded]:
    """Decode the words from a place of a file on; events before the first TIME_HIGH have no time and are invalid."""
    unwrap = Unwrapper(_TIME_BITS, sorted_source=True)
    high = HeldState()
    number = 0
    for words in read_blocks(path, offset, "<u4", _BLOCK, audit):
        types = (words >> 28).astype(np.uint8)
        check_types(path, types, _TYPES, number)
        number += len(words)
        setting = types == _TIME_HIGH
        at = np.flatnonzero(types <= _ON)
        audit.other_words += int(np.count_nonzero(types > _TIME_HIGH))
        base = high(setting, unwrap(words[setting] & ((1 << _TIME_BITS) - 1)), at)
        audit.wraps = unwrap.wraps
        timed = base != UNSET
        audit.invalid += len(timed) - int(np.count_nonzero(timed))
        at, base = at[timed], base[timed]
        events = words[at]
        yield Decoded(
            base << 6 | (events >> 22 & 63),
            (events >> 11 & 2047).astype(np.uint16),
            (events & 2047).astype(np.uint16),
            types[at],
        )
