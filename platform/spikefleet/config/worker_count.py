"""The number of workers of a run: one number, or a range in which it follows the hosts that are there."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator

MOST = 100_000
"""Largest number of workers."""
_RANGE = re.compile(r"(\d+):(\d+)")
_WIDEST = 64
_LARGEST_BATCH = 10_000_000


def parse_worker_count(given: Any) -> int | tuple[int, int]:
    """Reads a number of workers.

    Args:
        given: a number, "MIN:MAX", or a list of both.

    Returns:
        The number, or (MIN, MAX).

    Raises:
        ValueError: it is neither, or out of bounds.
    """
    if isinstance(given, str) and (found := _RANGE.fullmatch(given.strip())):
        given = (int(found[1]), int(found[2]))
    elif isinstance(given, str) and re.fullmatch(r"-?\d+", given.strip()):
        given = int(given)
    if isinstance(given, list | tuple):
        if len(given) != 2 or not all(_is_number(part) for part in given) or not 1 <= given[0] < given[1] <= MOST:
            raise ValueError(f"must be MIN:MAX, two increasing numbers of workers from 1 to {MOST:,}")
        return given[0], given[1]
    if not _is_number(given):
        raise ValueError("must be a number of workers, or MIN:MAX")
    if not 0 <= given <= MOST:
        raise ValueError(f"must be 0 to {MOST:,}")
    return int(given)


WorkerCount = Annotated[int | tuple[int, int], BeforeValidator(parse_worker_count)]
"""A field with a number of workers."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def nearest_batches(batch: int, least: int, most: int, accumulate: int) -> list[int] | None:
    """The global batches nearest to one that can be divided by every number of workers of a range.

    Args:
        batch: the global batch.
        least: the smallest number of workers.
        most: the largest one.
        accumulate: micro-batches of each step.

    Returns:
        Those below and above, of which the first may be missing; `[batch]` if it can be divided itself; None if there
        is none of a sensible size.
    """
    if most - least >= _WIDEST:  # of so many numbers no batch is a multiple
        return None
    unit = math.lcm(*range(least, most + 1)) * accumulate
    if batch % unit == 0:
        return [batch]
    below = batch // unit * unit
    return [size for size in (below, below + unit) if 0 < size <= _LARGEST_BATCH] or None
