"""Checks a search against what a run accepts, before anything starts."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from itertools import islice
from typing import Any

from spikefleet_tune.errors import SearchError, nearest
from spikefleet_tune.search_file import Search
from spikefleet_tune.space import Point, Space, label

_COMBINATIONS = 256
_LOOKED_AT = 20_000
_TRIES = 100

CheckPoint = Callable[[Mapping[str, Any]], str | None]
"""Dotted overrides -> what is wrong with them, or None."""


def check_search(
    search: Search,
    check_point: CheckPoint,
    reportable: Collection[str] | None = None,
    by_epoch: Collection[str] | None = None,
) -> None:
    """Checks every choice, every end of a range and many combinations against what a run accepts.

    `check_point` is given the whole overrides of a trial. A value must be accepted in some point that keeps the
    constraints; and of the combinations (all when there are at most 256, else as many at random), each must be.
    `reportable` are the figures that a trial gives back, `by_epoch` those that it reports after each epoch.
    Raises SearchError naming key and value, combination, or objective.
    """
    if reportable is not None:
        for name in search.objectives:
            if name not in reportable:
                raise SearchError(f"no {name!r} is reported by this task; {nearest(name, reportable)}")
    if by_epoch is not None and search.scheduler.kind != "none" and (name := search.deciding[0]) not in by_epoch:
        raise SearchError(
            f"scheduler {search.scheduler.kind} cannot decide by {name!r}, which is not reported after each epoch; "
            f"{nearest(name, by_epoch)}"
        )
    space = search.space_view()
    rng = random.Random(search.seed)
    for key, dimension in space.dimensions.items():
        for value in dimension.corners:
            _check_value(space, key, value, check_point, rng)
    combinations = [] if search.sampler.kind == "listed" else _combinations(space, rng)
    for point in [*combinations, *(dict(point) for point in search.points)]:
        if complaint := check_point({**space.fixed, **point}):
            chosen = ", ".join(f"{key}={value!r}" for key, value in point.items()) or "of the fixed overrides"
            raise SearchError(
                f"the combination {chosen} is not possible: {complaint}; exclude it by a constraint or by `when`"
            )


def _check_value(space: Space, key: str, value: Any, check_point: CheckPoint, rng: random.Random) -> None:
    """Raises SearchError unless the value is accepted in one of a few points that keep the constraints."""
    complaint: str | None = None
    chosen = (space.draw(rng, {**_opening(space, key, rng), key: value}) for _ in range(_TRIES))
    fitting = [point for point in chosen if key in point and space.keeps_constraints(point)]
    if not fitting:  # rare among the others: look through all corners
        fitting = [point for point in _corner_points(space) if key in point and label(point[key]) == label(value)]
    for point in fitting:
        complaint = check_point({**space.fixed, **point})
        if complaint is None:
            return
    if complaint is None:
        raise SearchError(f"space.{key}: {value!r} is never tried, as no point with it keeps the constraints")
    raise SearchError(f"space.{key}: {value!r} is not possible: {complaint}")


def _opening(space: Space, key: str, rng: random.Random) -> Point:
    """Values of other keys that open the branch of a key."""
    given: Point = {}
    for parent, values in space.dimensions[key].when.items():
        given.update({**_opening(space, parent, rng), parent: rng.choice(values)})
    return given


def _corner_points(space: Space) -> list[Point]:
    return list(space.points(corners=True, look_at=_LOOKED_AT))


def _combinations(space: Space, rng: random.Random) -> list[Point]:
    corners = _corner_points(space)
    if len(corners) <= _COMBINATIONS:
        return corners
    drawn = (space.draw(rng) for _ in range(10 * _COMBINATIONS))
    return list(islice((point for point in drawn if space.keeps_constraints(point)), _COMBINATIONS))
