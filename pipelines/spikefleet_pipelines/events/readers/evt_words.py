"""What the encodings of Prophesee's RAW files share: states that words set, and types of words."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.events.readers.reader import Integers, damaged

UNSET = -1
"""A state before any word has set it."""


class HeldState:
    """A value that holds from the word that sets it to the next that does, over the blocks of a file."""

    def __init__(self) -> None:
        self.value = UNSET

    def __call__(
        self, setting: NDArray[np.bool_], values: NDArray[np.int64], at: NDArray[np.intp]
    ) -> NDArray[np.int64]:
        """Return the state at some words.

        Args:
            setting: which words of the block set the state, `[W]`.
            values: what they set it to, one for each of them.
            at: positions of the words in the block.
        """
        states = np.concatenate([np.array([self.value], np.int64), values])
        self.value = int(states[-1])
        return states[np.cumsum(setting)[at]]


def check_types(path: Path, types: NDArray[np.uint8], known: frozenset[int], first_word: int) -> None:
    """Refuse words of types that the encoding does not have.

    Args:
        path: of the file.
        types: of the words of a block, `[W]`, below 16.
        known: types of the encoding.
        first_word: number of the block's first word in the file.

    Raises:
        SourceError: there is another type; the message names the word.
    """
    counts = np.bincount(types, minlength=16)
    unknown = [kind for kind in np.flatnonzero(counts).tolist() if kind not in known]
    if unknown:
        word = first_word + int(np.argmax(np.isin(types, unknown)))
        raise damaged(path, f"word {word:,} has type {types[word - first_word]:#x}, which the encoding does not have")


def set_bits(masks: Integers) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Return, for each set bit of all masks in order, (which mask, which bit), bit 0 first."""
    width = masks.dtype.itemsize * 8
    little = np.ascontiguousarray(masks, masks.dtype.newbyteorder("<"))
    places = np.flatnonzero(np.unpackbits(little.view(np.uint8), bitorder="little"))
    return places // width, places % width
