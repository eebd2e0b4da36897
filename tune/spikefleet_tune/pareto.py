"""Pareto front, hypervolume and knee, for objectives of which each is maximised or minimised.

Rows are trials, columns are objectives. All computations use gains: the value of an objective to maximise, the negative
value of one to minimise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spikefleet_tune.direction import Direction
from spikefleet_tune.messages import counted

Rows = Sequence[Sequence[float]]
Gains = NDArray[np.float64]

MARGIN = 0.1
"""Distance of the reference point from the worst value of each objective, as a fraction of the objective's range."""


def front(rows: Rows, directions: Sequence[Direction]) -> list[int]:
    """The Pareto front.

    A row dominates another if it is at least as good in every objective and better in one; of equal rows, all are on
    the front or none.

    Args:
        rows: `[N][M]`, values of N trials for M objectives.
        directions: `max` or `min` for each objective.

    Returns:
        Positions of the rows that no other row dominates, ascending.

    Raises:
        ValueError: a row has another number of values, or a value that is not finite.
    """
    gains = _gains(rows, directions)
    return [i for i, gain in enumerate(gains) if not ((gains >= gain).all(axis=1) & (gains > gain).any(axis=1)).any()]


def reference_point(rows: Rows, directions: Sequence[Direction]) -> list[float]:
    """The reference point of the hypervolume.

    Args:
        rows: `[N][M]`, values of N trials for M objectives.
        directions: `max` or `min` for each objective.

    Returns:
        For each objective its worst value, made worse by a tenth of its range (by 0.1 if all values are equal).

    Raises:
        ValueError: there are no rows.
    """
    gains = _gains(rows, directions)
    if not len(gains):
        raise ValueError("a reference point needs at least one row")
    worst, spread = gains.min(axis=0), np.ptp(gains, axis=0)
    beyond = worst - MARGIN * np.where(spread > 0, spread, 1.0)
    return [float(value) for value in beyond * _signs(directions)]


def hypervolume(rows: Rows, directions: Sequence[Direction], reference: Sequence[float]) -> float:
    """The exact volume that the rows dominate, bounded by the reference point, for any number of objectives.

    Rows that are not better than the reference in every objective add nothing. The time is O(N^(M - 1)) in the size N
    of the front: milliseconds for hundreds of rows and three objectives.

    Args:
        rows: `[N][M]`, values of N trials for M objectives.
        directions: `max` or `min` for each objective.
        reference: the reference point `[M]`.
    """
    gains = _gains(rows, directions) - np.asarray(reference, dtype=float) * _signs(directions)
    return _volume(gains[(gains > 0).all(axis=1)])


def hypervolume_curve(
    rows: Sequence[Sequence[float] | None], directions: Sequence[Direction], reference: Sequence[float] | None = None
) -> list[float]:
    """The hypervolume after each trial; it never decreases.

    Args:
        rows: values of each trial, in order; None for a trial without values, which adds nothing.
        directions: `max` or `min` for each objective.
        reference: the reference point `[M]`; by default that of all rows.
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
    """The knee of the front: the row farthest above the plane through the best point of each objective.

    Each objective is scaled to [0, 1] over the front. The plane passes through the corners that are best in one
    objective and worst in all others; with two objectives it is the line between the ends of the front.

    Args:
        rows: `[N][M]`, values of N trials for M objectives.
        directions: `max` or `min` for each objective.

    Returns:
        The position of the row, of equal ones the first; with one objective that of the best row; None without rows.
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
    """Volume of the union of the boxes from the origin to each row, by slices along the last objective."""
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
        raise ValueError(f"direction {unknown[0]!r} must be max or min")
    return np.array([1.0 if one == "max" else -1.0 for one in directions])


def _gains(rows: Rows, directions: Sequence[Direction]) -> Gains:
    for i, row in enumerate(rows):
        if len(row) != len(directions):
            raise ValueError(f"row {i}: expected {counted(len(directions), 'value')}, found {len(row)}")
    table = np.array([list(row) for row in rows], dtype=float).reshape(len(rows), len(directions))
    if not np.isfinite(table).all():
        raise ValueError(f"row {int(np.argmin(np.isfinite(table).all(axis=1)))} has a value that is not finite")
    return table * _signs(directions)
