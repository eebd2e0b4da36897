"""EVT3: words of 16 bits that change what holds for the events after them.

Type = bits 12 to 15. 0 ADDR_Y: y = bits 0 to 10. 2 ADDR_X: one event, x = bits 0 to 10, p = bit 11. 3 VECT_BASE_X: x
and p of the vectors that follow. 4 VECT_12 and 5 VECT_8: which of the next 12 or 8 pixels have an event; the base moves
on by as many. 6 TIME_LOW: bits 0 to 11 of the time, 8 TIME_HIGH: bits 12 to 23. 7, 0xA, 0xE and 0xF are no events of
pixels. The time wraps every 16.78 s.

Until its TIME_LOW comes, a new TIME_HIGH has 0 there: the old low bits belong to an earlier time.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.events.readers.blocks import read_blocks
from spikefleet_pipelines.events.readers.evt_words import UNSET, HeldState, check_types, set_bits
from spikefleet_pipelines.events.readers.packed_time import Unwrapper
from spikefleet_pipelines.events.readers.reader import Decoded, ReadAudit

_BLOCK = 1 << 17  # words, of up to 12 events each
_ADDR_Y, _ADDR_X, _BASE_X, _VECT_12, _VECT_8, _TIME_LOW, _TIME_HIGH = 0, 2, 3, 4, 5, 6, 8
_TYPES = frozenset({_ADDR_Y, _ADDR_X, _BASE_X, _VECT_12, _VECT_8, _TIME_LOW, 7, _TIME_HIGH, 0xA, 0xE, 0xF})
_OTHER = (7, 0xA, 0xE, 0xF)
_TIME_BITS = 12  # of TIME_HIGH
_LOW_BITS = 12


def decode_evt3(path: Path, offset: int, audit: ReadAudit) -> Iterator[Decoded]:
    """Decode the words from a place of a file on.

    Events without a time, a row or, in vectors, a base before them are invalid.
    """
    decoder = _Decoder()
    number = 0
    for words in read_blocks(path, offset, "<u2", _BLOCK, audit):
        types = (words >> 12).astype(np.uint8)
        check_types(path, types, _TYPES, number)
        number += len(words)
        audit.other_words += int(np.isin(types, _OTHER).sum())
        yield decoder.decode(words, types, audit)


class _Decoder:
    """The states that words set, over the blocks of a file."""

    def __init__(self) -> None:
        self._unwrap = Unwrapper(_TIME_BITS, sorted_source=True)
        self._last_high = UNSET
        self._high, self._low, self._y, self._base, self._base_p = (HeldState() for _ in range(5))

    def decode(self, words: NDArray[np.uint16], types: NDArray[np.uint8], audit: ReadAudit) -> Decoded:
        values = (words & 4095).astype(np.int64)
        at = np.flatnonzero((types == _ADDR_X) | (types == _VECT_12) | (types == _VECT_8))
        single = types[at] == _ADDR_X
        t = self._times(values, types, at)
        audit.wraps = self._unwrap.wraps
        setting = types == _ADDR_Y
        y = self._y(setting, values[setting] & 2047, at)
        base, base_p = self._bases(values, types, at)
        x = np.where(single, values[at] & 2047, base)
        p = np.where(single, values[at] >> 11, base_p)
        masks = _masks(values[at], types[at])
        known = (t != UNSET) & (y != UNSET) & (p != UNSET)
        audit.invalid += int(np.bitwise_count(masks[~known]).sum())
        which, bit = set_bits(np.where(known, masks, 0).astype(np.uint16))
        return Decoded(t[which], x[which] + bit, y[which], p[which].astype(np.uint8))

    def _times(self, values: NDArray[np.int64], types: NDArray[np.uint8], at: NDArray[np.intp]) -> NDArray[np.int64]:
        is_high = types == _TIME_HIGH
        highs = self._unwrap(values[is_high])
        high = self._high(is_high, highs, at)
        changed = np.diff(highs, prepend=self._last_high) != 0
        if len(highs):
            self._last_high = int(highs[-1])
        setting = types == _TIME_LOW
        setting[np.flatnonzero(is_high)[changed]] = True
        low = self._low(setting, np.where(is_high, 0, values)[setting], at)
        return np.where(high == UNSET, UNSET, high << _LOW_BITS | np.maximum(low, 0))

    def _bases(
        self, values: NDArray[np.int64], types: NDArray[np.uint8], at: NDArray[np.intp]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the base and the polarity of vectors; the polarity is `UNSET` where there is no base."""
        moves = np.where(types == _VECT_12, 12, np.where(types == _VECT_8, 8, 0))
        moved = np.cumsum(moves)
        setting = types == _BASE_X
        # A base is kept as its place before all moves of the block, which later words add.
        base = self._base(setting, (values[setting] & 2047) - moved[setting], at) + moved[at] - moves[at]
        self._base.value += int(moved[-1])
        return base, self._base_p(setting, values[setting] >> 11, at)


def _masks(values: NDArray[np.int64], types: NDArray[np.uint8]) -> NDArray[np.uint16]:
    masks = np.where(types == _VECT_12, values, np.where(types == _VECT_8, values & 255, 1))
    return masks.astype(np.uint16)
