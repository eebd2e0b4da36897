"""Checks the values of a search against what a run accepts, before any trial starts."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from itertools import islice
from typing import Any

from spikefleet_tune.errors import SearchError
from spikefleet_tune.messages import nearest
from spikefleet_tune.search_file import Search
from spikefleet_tune.space import Point, Space, label

_COMBINATIONS = 256
_LOOKED_AT = 20_000
_TRIES = 100

CheckPoint = Callable[[Mapping[str, Any]], str | None]
"""Dotted overrides -> the error message, or None if they are valid."""


def check_search(
    search: Search,
    check_point: CheckPoint,
    reportable: Collection[str] | None = None,
    by_epoch: Collection[str] | None = None,
) -> None:
    """Checks every choice, both ends of every range, and many combinations.

    Each value must be valid in some point that satisfies the constraints, and each combination (all if there are at
    most 256, else 256 at random) must be valid.

    Args:
        search: the search.
        check_point: checks the complete overrides of a trial.
        reportable: metrics that a trial returns; None skips the check of the objectives.
        by_epoch: metrics that a trial reports after each epoch; None skips the check of the scheduler.

    Raises:
        SearchError: names the key and value, the combination, or the objective.
    """
    if reportable is not None:
        for name in search.objectives:
            if name not in reportable:
                raise SearchError(f"objectives: this task reports no {name!r}; {nearest(name, reportable)}")
    if by_epoch is not None and search.scheduler.kind != "none" and (name := search.deciding[0]) not in by_epoch:
        raise SearchError(
            f"scheduler {search.scheduler.kind} cannot use {name!r}: trials do not report it after each epoch; "
            f"{nearest(name, by_epoch)}"
        )
    space = search.space_view()
    rng = random.Random(search.seed)
    for key, dimension in space.dimensions.items():
        for value in dimension.corners:
            _check_value(space, key, value, check_point, rng)
    combinations = [] if search.sampler.kind == "listed" else _combinations(space, rng)
    for point in [*combinations, *(dict(point) for point in search.points)]:
        if problem := check_point({**space.fixed, **point}):
            chosen = ", ".join(f"{key}={value!r}" for key, value in point.items()) or "of the fixed overrides"
            raise SearchError(
                f"the combination {chosen} is not valid: {problem}; exclude it with a constraint or with `when`"
            )


def _check_value(space: Space, key: str, value: Any, check_point: CheckPoint, rng: random.Random) -> None:
    """Raises SearchError unless the value is valid in one of a few points that satisfy the constraints."""
    problem: str | None = None
    chosen = (space.draw(rng, {**_opening(space, key, rng), key: value}) for _ in range(_TRIES))
    fitting = [point for point in chosen if key in point and space.keeps_constraints(point)]
    if not fitting:  # rare among random points: search all corners
        fitting = [point for point in _corner_points(space) if key in point and label(point[key]) == label(value)]
    for point in fitting:
        problem = check_point({**space.fixed, **point})
        if problem is None:
            return
    if problem is None:
        raise SearchError(f"space.{key}: no point with {value!r} satisfies the constraints; remove it or change them")
    raise SearchError(f"space.{key}: {value!r} is not valid: {problem}")


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
