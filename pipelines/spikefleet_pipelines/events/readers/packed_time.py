"""Counters of time with few bits, which start again from 0."""

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.events.readers.reader import Integers


class Unwrapper:
    """Continues a counter of time over its wraps; called with the values of a file, block by block.

    A step back of more than half the range is a wrap. Where events may be out of order (`sorted_source=False`), a step
    forward of more than half the range is an event from before the wrap, so that one late event around a wrap does not
    move all later ones.

    Args:
        bits: of the counter.
        sorted_source: the counter itself never runs back, so that every step forward is one.
    """

    def __init__(self, bits: int, sorted_source: bool = False) -> None:
        self.wraps = 0
        self._range = 1 << bits
        self._sorted_source = sorted_source
        self._last: int | None = None

    def __call__(self, values: Integers) -> NDArray[np.int64]:
        """Return the continued values, int64 `[N]`, in the counter's unit."""
        t = values.astype(np.int64)
        if not len(t):
            return t
        last = int(t[0]) if self._last is None else self._last
        before = last % self._range  # the counter's own value
        half = self._range >> 1
        step = int(t[0]) - before
        if 0 <= step < half and t[-1] - t[0] < half and (t[1:] >= t[:-1]).all():
            t += last - before
        else:
            steps = np.diff(t, prepend=before)
            steps[steps < -half] += self._range
            if not self._sorted_source:
                steps[steps > half] -= self._range
            t = last + np.cumsum(steps)
        self._last = int(t[-1])
        self.wraps = max(self.wraps, int(t.max()) // self._range)
        return t
