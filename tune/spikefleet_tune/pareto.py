"""Non-dominated trials, hypervolume and knee, for any mixture of objectives to maximise and to minimise.

Rows are trials, columns are objectives. Everything works on gains: the value where more is better, its negative where
less is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spikefleet_tune.direction import Direction

Rows = Sequence[Sequence[float]]
Gains = NDArray[np.float64]

MARGIN = 0.1
"""The reference point lies this part of each objective's range beyond its worst value."""


def front(rows: Rows, directions: Sequence[Direction]) -> list[int]:
    """Positions, in order, of the rows that no other dominates.

    A row dominates another when it is at least as good in every objective and better in one; hence of equal rows all
    are kept, or none. Raises ValueError when a row has another number of values, or one that is not finite.
    """
    gains = _gains(rows, directions)
    return [i for i, gain in enumerate(gains) if not ((gains >= gain).all(axis=1) & (gains > gain).any(axis=1)).any()]


def reference_point(rows: Rows, directions: Sequence[Direction]) -> list[float]:
    """The worst value of each objective, and a tenth of its range (or of 1 where all are equal) beyond.

    Raises ValueError when there are no rows.
    """
    gains = _gains(rows, directions)
    if not len(gains):
        raise ValueError("without rows there is no reference point")
    worst, spread = gains.min(axis=0), np.ptp(gains, axis=0)
    beyond = worst - MARGIN * np.where(spread > 0, spread, 1.0)
    return [float(value) for value in beyond * _signs(directions)]


def hypervolume(rows: Rows, directions: Sequence[Direction], reference: Sequence[float]) -> float:
    """Volume of what the rows dominate, down to the reference point: exact, for any number of objectives.

    Rows that are no better than the reference in some objective add nothing. Its time grows with the number of front
    rows to the power of the number of objectives less one: milliseconds for hundreds of rows and three objectives.
    """
    gains = _gains(rows, directions) - np.asarray(reference, dtype=float) * _signs(directions)
    return _volume(gains[(gains > 0).all(axis=1)])


def hypervolume_curve(
    rows: Sequence[Sequence[float] | None], directions: Sequence[Direction], reference: Sequence[float] | None = None
) -> list[float]:
    """Hypervolume after each trial; None is a trial without values, after which the curve stays level.

    The reference point is that of all rows unless given, so that the curve never falls.
    """
    known = [row for row in rows if row is not None]
    if not known:
        return [0.0 for _ in rows]
    corner = reference_point(known, directions) if reference is None else reference
    curve: list[float] = []
    best: list[Sequence[float]] = []
    for row in rows:
        if row is not None:
            best.append(row)
            best = [best[i] for i in front(best, directions)]
        curve.append(hypervolume(best, directions, corner) if row is not None else (curve[-1] if curve else 0.0))
    return curve


def knee(rows: Rows, directions: Sequence[Direction]) -> int | None:
    """Position of the front row where giving up a little of one objective stops buying much of the others.

    Each objective is scaled to 0..1 over the front. The knee lies farthest above the plane through the corners that
    are best in one objective and worst in all others: with two objectives, the line between the front's two ends.
    Of equals it is the first; with one objective it is the best row; None when there are no rows.
    """
    gains = _gains(rows, directions)
    if not len(gains):
        return None
    members = front(rows, directions)
    ahead = gains[members]
    spread = np.ptp(ahead, axis=0)
    scaled = (ahead - ahead.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    heights = np.round(scaled.sum(axis=1), 12)  # the distance to the plane, up to a constant factor and summand
    return members[int(np.argmax(heights))]


def _volume(gains: Gains) -> float:
    """Volume of the union of the boxes from the origin to each row: slices along the last objective."""
    if not len(gains):
        return 0.0
    if gains.shape[1] == 1:
        return float(gains.max())
    ordered = gains[np.argsort(-gains[:, -1], kind="stable")]
    if gains.shape[1] == 2:
        reach = np.maximum.accumulate(ordered[:, 0])
        heights = ordered[:, 1] - np.append(ordered[1:, 1], 0.0)
        return float((reach * heights).sum())
    total = 0.0
    for i, row in enumerate(ordered):
        below = ordered[i + 1, -1] if i + 1 < len(ordered) else 0.0
        if row[-1] > below:
            total += float(row[-1] - below) * _volume(ordered[: i + 1, :-1])
    return total


def _signs(directions: Sequence[Direction]) -> Gains:
    if unknown := [one for one in directions if one not in ("max", "min")]:
        raise ValueError(f"direction {unknown[0]!r} is neither max nor min")
    return np.array([1.0 if one == "max" else -1.0 for one in directions])


def _gains(rows: Rows, directions: Sequence[Direction]) -> Gains:
    for i, row in enumerate(rows):
        if len(row) != len(directions):
            raise ValueError(f"row {i} has {len(row)} values for {len(directions)} objectives")
    table = np.array([list(row) for row in rows], dtype=float).reshape(len(rows), len(directions))
    if not np.isfinite(table).all():
        raise ValueError(f"row {int(np.argmin(np.isfinite(table).all(axis=1)))} has a value that is not finite")
    return table * _signs(directions)
