"""Events as arrays: what readers and sensors produce, and what the store takes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Sensor = tuple[int, int]
"""Size of a sensor in pixels: (height, width)."""


@dataclass(frozen=True)
class EventArrays:
    """Events of one recording or of a part of it, in the order of time unless said otherwise; arrays of one length."""

    t: NDArray[np.int64]
    """Time in microseconds."""
    x: NDArray[np.uint16]
    """Column, 0 at the left."""
    y: NDArray[np.uint16]
    """Row, 0 at the top."""
    p: NDArray[np.uint8]
    """Polarity: 1 is ON (brighter), 0 is OFF."""

    def __len__(self) -> int:
        return len(self.t)

    def select(self, chosen: NDArray[np.bool_] | NDArray[np.int64] | slice) -> "EventArrays":
        """Return the events at given places (a mask, indices or a slice), in that order."""
        return EventArrays(self.t[chosen], self.x[chosen], self.y[chosen], self.p[chosen])
