"""Events of a recording as arrays; the vocabulary of all that handles events."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Sensor = tuple[int, int]
"""Size of a sensor in pixels: (height, width)."""


@dataclass(frozen=True)
class EventArrays:
    """Events, in time order unless said otherwise.

    Attributes:
        t: times in us, int64 `[N]`.
        x: columns, uint16 `[N]`.
        y: rows, uint16 `[N]`.
        p: polarities, uint8 `[N]`: 1 is ON.
    """

    t: NDArray[np.int64]
    x: NDArray[np.uint16]
    y: NDArray[np.uint16]
    p: NDArray[np.uint8]
