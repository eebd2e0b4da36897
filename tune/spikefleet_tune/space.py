"""The search space: the values that each dotted configuration key may take, and the branches in which it exists."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spikefleet_tune.constraints import Constraint
from spikefleet_tune.errors import SearchError
from spikefleet_tune.messages import nearest

Point = dict[str, Any]
"""One value for each active key: a key whose branch is taken."""

MOST_LISTED = 20_000
"""A space with at most this many combinations is enumerated, so that the search knows when it is exhausted."""


class Part(BaseModel):
    """A frozen section of a search that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class Dimension(Part):
    """The values of one key: exactly one of `choice`, `uniform`, `log_uniform` and `int`; ranges include both ends."""

    choice: tuple[Any, ...] | None = Field(None, description="the values to choose from")
    uniform: tuple[float, float] | None = Field(None, description="lowest and highest value")
    log_uniform: tuple[float, float] | None = Field(None, description="lowest and highest value, on a log scale")
    integers: tuple[int, int] | None = Field(None, alias="int", description="lowest and highest integer")
    when: Mapping[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="the key exists only where each of these keys has one of these values"
    )

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        given = [name for name in ("choice", "uniform", "log_uniform", "integers") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("set exactly one of choice, uniform, log_uniform and int")
        if self.choice is not None:
            labels = [label(value) for value in self.choice]
            if not labels:
                raise ValueError("choice=[] must have at least one value")
            if repeated := sorted({text for text in labels if labels.count(text) > 1}):
                raise ValueError(f"choice repeats {', '.join(repeated)}; remove the duplicate")
        else:
            low, high = self.ends
            kind = "int" if self.integers else "uniform" if self.uniform else "log_uniform"
            if low >= high:
                raise ValueError(f"{kind}=[{low:g}, {high:g}] must have its lowest value first, then a larger one")
            if self.log_uniform and low <= 0:
                raise ValueError(f"log_uniform=[{low:g}, {high:g}] must start above 0")
        for key, values in self.when.items():
            if not values:
                raise ValueError(f"when: {key}: [] must have at least one value")
        return self

    @property
    def ends(self) -> tuple[Any, Any]:
        """Lowest and highest value of a range."""
        ends = self.uniform or self.log_uniform or self.integers
        assert ends is not None, "a choice has no ends"
        return ends

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values in order; None for a continuous range."""
        if self.choice is not None:
            return self.choice
        return tuple(range(self.integers[0], self.integers[1] + 1)) if self.integers else None

    @property
    def corners(self) -> tuple[Any, ...]:
        """Every choice, or both ends of a range."""
        return self.choice if self.choice is not None else self.ends

    def allows(self, value: Any) -> bool:
        """Whether a value is a choice, or inside the range."""
        if self.choice is not None:
            return label(value) in {label(one) for one in self.choice}
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.ends
        return bool(low <= value <= high and (self.integers is None or float(value).is_integer()))

    def draw(self, rng: random.Random) -> Any:
        """A random value."""
        if self.choice is not None:
            return rng.choice(self.choice)
        low, high = self.ends
        if self.integers:
            return rng.randint(low, high)
        if self.log_uniform:
            return min(high, max(low, math.exp(rng.uniform(math.log(low), math.log(high)))))
        return rng.uniform(low, high)

    def step(self, value: Any, rng: random.Random) -> Any:
        """A neighbour of a value: the next choice or integer up or down, or 0.8 or 1.2 times it, inside the range."""
        up = rng.random() < 0.5
        if self.choice is not None:
            here = [label(one) for one in self.choice].index(label(value))
            return self.choice[min(max(here + (1 if up else -1), 0), len(self.choice) - 1)]
        low, high = self.ends
        if self.integers:
            return min(max(value + (1 if up else -1), low), high)
        return min(max(value * (1.2 if up else 0.8), low), high)


class Space:
    """The dimensions, ordered so that a key follows the keys of its `when`, and the constraints.

    Args:
        dimensions: by full key.
        fixed: overrides of all trials, which constraints may read.
        constraints: conditions over keys; see `constraints.Constraint`.

    Raises:
        SearchError: a `when` or a constraint names an unknown key, or a value that never occurs.
    """

    def __init__(self, dimensions: Mapping[str, Dimension], fixed: Mapping[str, Any], constraints: tuple[str, ...]):
        self.fixed = dict(fixed)
        self.dimensions = {key: dimensions[key] for key in _ordered(dimensions)}
        self.constraints = [Constraint(text, {*dimensions, *fixed}) for text in constraints]

    def active(self, key: str, point: Mapping[str, Any]) -> bool:
        """Whether a key exists at a point, that is, whether its branch is taken."""
        return all(
            parent in point and label(point[parent]) in {label(value) for value in values}
            for parent, values in self.dimensions[key].when.items()
        )

    def keeps_constraints(self, point: Mapping[str, Any]) -> bool:
        """Whether a point satisfies all constraints."""
        values = {**self.fixed, **point}
        return all(constraint.holds(values) for constraint in self.constraints)

    def draw(self, rng: random.Random, given: Mapping[str, Any] | None = None) -> Point:
        """A random point with the given values; it may violate constraints."""
        given = given or {}
        point: Point = {}
        for key, dimension in self.dimensions.items():
            if self.active(key, point):
                point[key] = given[key] if key in given else dimension.draw(rng)
        return point

    def points(self, corners: bool = False, look_at: int | None = None) -> Iterator[Point]:
        """Iterates over the points that satisfy the constraints, in order.

        Args:
            corners: of each range, only both ends.
            look_at: largest number of combinations to check.

        Yields:
            Each point.

        Raises:
            SearchError: a range is continuous, and `corners` is False.
        """
        combinations = islice(self._branch(list(self.dimensions), {}, corners), look_at)
        yield from (point for point in combinations if self.keeps_constraints(point))

    def _branch(self, keys: list[str], point: Point, corners: bool) -> Iterator[Point]:
        if not keys:
            yield point
            return
        key, rest = keys[0], keys[1:]
        if not self.active(key, point):
            yield from self._branch(rest, point, corners)
            return
        dimension = self.dimensions[key]
        values = dimension.corners if corners else dimension.values
        if values is None:
            raise SearchError(f"space.{key} is continuous; a grid needs `choice` or `int` for every key")
        for value in values:
            yield from self._branch(rest, {**point, key: value}, corners)

    def listed(self) -> list[Point] | None:
        """All points that satisfy the constraints; None if a range is continuous or there are too many."""
        sizes = [math.inf if one.values is None else len(one.values) for one in self.dimensions.values()]
        return list(self.points()) if math.prod(sizes) <= MOST_LISTED else None

    def check(self, point: Mapping[str, Any], origin: str) -> None:
        """Checks that a point, or a part of one, belongs to the space.

        Args:
            point: values by key.
            origin: where the point is from, for error messages.

        Raises:
            SearchError: names the key and the value, or the constraint.
        """
        for key, value in point.items():
            if key not in self.dimensions:
                raise SearchError(f"{origin}: {key!r} is not in the space; {nearest(key, self.dimensions)}")
            if not self.dimensions[key].allows(value):
                raise SearchError(f"{origin}: {key}={value!r} is outside the space ({describe(self.dimensions[key])})")
            if not self.active(key, point):
                needed = ", ".join(f"{k} in {list(v)}" for k, v in self.dimensions[key].when.items())
                raise SearchError(f"{origin}: {key}={value!r} exists only where {needed}")
        for constraint in self.constraints:
            if not constraint.holds({**self.fixed, **point}):
                raise SearchError(f"{origin} violates the constraint {constraint.text!r}")


def label(value: Any) -> str:
    """A value as JSON text, which distinguishes 1, 1.0, true and "1". Raises ValueError for other types."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} must be a number, text, true, false, null or a list of these") from None


def signature(point: Mapping[str, Any]) -> str:
    """A point as text that does not depend on the order of its keys."""
    return label(dict(point))


def describe(dimension: Dimension) -> str:
    """A dimension in the notation of a search file."""
    if dimension.choice is not None:
        return f"choice: {list(dimension.choice)}"
    kind = "int" if dimension.integers else "uniform" if dimension.uniform else "log_uniform"
    low, high = dimension.ends
    return f"{kind}: [{low:g}, {high:g}]"


def _ordered(dimensions: Mapping[str, Dimension]) -> list[str]:
    """Keys in the order of the file, but parents before their branches."""
    for key, dimension in dimensions.items():
        for parent, values in dimension.when.items():
            if parent not in dimensions:
                raise SearchError(f"space.{key}.when: {parent!r} is not in the space; {nearest(parent, dimensions)}")
            if dimensions[parent].values is None:
                raise SearchError(f"space.{key}.when: {parent} is continuous; `when` needs a `choice` or `int` key")
            for value in values:
                if not dimensions[parent].allows(value):
                    raise SearchError(
                        f"space.{key}.when: {parent}={value!r} is outside the space ({describe(dimensions[parent])})"
                    )
    done: list[str] = []
    while len(done) < len(dimensions):
        ready = [k for k in dimensions if k not in done and all(parent in done for parent in dimensions[k].when)]
        if not ready:
            stuck = ", ".join(k for k in dimensions if k not in done)
            raise SearchError(f"space: the `when` of {stuck} form a cycle; remove one of them")
        done.append(ready[0])
    return done
