"""Durations as text: a number with a unit, such as 250ms or 2.5s."""

import re

_FORM = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_MICROSECONDS = {"us": 1, "ms": 1_000, "s": 1_000_000}
_MOST_US = 1 << 42
"""Fifty days."""


def duration_us(text: str) -> int:
    """Return a duration in microseconds.

    Raises:
        ValueError: the text is no number with the unit us, ms or s, or is below 1 us or above 50 days.
    """
    found = _FORM.fullmatch(text)
    length = round(float(found[1]) * _MICROSECONDS[found[2]]) if found else 0
    if not 1 <= length <= _MOST_US:
        raise ValueError(f"{text!r} is no duration, expected a number with a unit (us, ms, s), for example 250ms")
    return length
