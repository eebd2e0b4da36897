"""Fronts, hypervolumes and knees: a problem with a known front, and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikefleet_tune.direction import Direction
from spikefleet_tune.pareto import front, hypervolume, hypervolume_curve, knee, reference_point

MAX_MIN: tuple[Direction, Direction] = ("max", "min")

_directions = st.sampled_from([("max", "min"), ("min", "min"), ("max", "max", "min"), ("max",)])


@st.composite
def _tables(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], tuple[Direction, ...]]:
    directions = draw(_directions)
    cells = st.tuples(*[st.integers(0, 5)] * len(directions))
    return draw(st.lists(cells, min_size=1, max_size=12)), directions  # type: ignore[return-value]


def _dominates(a: tuple[int, ...], b: tuple[int, ...], directions: tuple[Direction, ...]) -> bool:
    gains = [(x, y) if one == "max" else (-x, -y) for x, y, one in zip(a, b, directions, strict=True)]
    return all(x >= y for x, y in gains) and any(x > y for x, y in gains)


@settings(deadline=None, max_examples=200)
@given(_tables())
def test_front_equals_brute_force(table: tuple[list[tuple[int, ...]], tuple[Direction, ...]]) -> None:
    rows, directions = table
    expected = [i for i, a in enumerate(rows) if not any(_dominates(b, a, directions) for b in rows)]
    assert front(rows, directions) == expected


@settings(deadline=None, max_examples=100)
@given(_tables())
def test_hypervolume_equals_counted_cells(table: tuple[list[tuple[int, ...]], tuple[Direction, ...]]) -> None:
    """With integers, the volume is the number of unit cells that some row dominates."""
    rows, directions = table
    reference = [-1 if one == "max" else 6 for one in directions]
    gains = [[x + 1 if one == "max" else 6 - x for x, one in zip(row, directions, strict=True)] for row in rows]
    cells = itertools.product(range(7), repeat=len(directions))
    counted = sum(any(all(c < g for c, g in zip(cell, gain, strict=True)) for gain in gains) for cell in cells)
    assert hypervolume(rows, directions, reference) == pytest.approx(counted)


def test_front_of_a_known_problem_is_found() -> None:
    """Schaffer's problem: minimise x^2 and (x - 2)^2; the front is 0 <= x <= 2, sqrt(f1) + sqrt(f2) = 2."""
    xs = [i / 10 for i in range(-30, 51)]
    rows = [(x * x, (x - 2) ** 2) for x in xs]
    found = [xs[i] for i in front(rows, ("min", "min"))]
    assert found == [x for x in xs if 0 <= x <= 2]
    assert all(math.isclose(math.sqrt(a) + math.sqrt(b), 2) for a, b in (rows[i] for i in front(rows, ("min", "min"))))
    chosen = knee(rows, ("min", "min"))
    assert chosen is not None
    assert xs[chosen] == 1.0  # by symmetry
    exact = 4 * 4 - 8 / 3  # the square below the reference (4, 4), less the area under the front
    fine = [(x * x, (x - 2) ** 2) for x in (i / 1000 for i in range(2001))]
    assert hypervolume(fine, ("min", "min"), [4, 4]) == pytest.approx(exact, rel=2e-3)
    coarse = hypervolume(rows, ("min", "min"), [4, 4])
    assert coarse < exact


def test_equal_rows_are_all_kept_or_none() -> None:
    assert front([(1, 1), (1, 1), (0, 2)], MAX_MIN) == [0, 1]
    assert front([(1, 1), (1, 1), (2, 1)], MAX_MIN) == [2]


def test_what_is_below_the_reference_adds_nothing() -> None:
    assert hypervolume([(1, 1)], ("max", "max"), [2, 0]) == 0.0
    assert hypervolume([], MAX_MIN, [0, 1]) == 0.0
    assert hypervolume([(3, 1)], MAX_MIN, [1, 2]) == 2.0


def test_reference_lies_a_tenth_beyond_the_worst() -> None:
    assert reference_point([(90.0, 10.0), (80.0, 20.0)], MAX_MIN) == pytest.approx([79.0, 21.0])
    assert reference_point([(90.0, 10.0)], MAX_MIN) == pytest.approx([89.9, 10.1])
    with pytest.raises(ValueError, match="at least one row"):
        reference_point([], MAX_MIN)


def test_curve_never_falls_and_stays_level_at_a_failure() -> None:
    curve = hypervolume_curve([(1, 5), None, (3, 5), (0, 9), (2, 1)], MAX_MIN)
    assert curve == sorted(curve)
    assert curve[0] == curve[1]
    assert curve[2] == curve[3] < curve[4]
    assert hypervolume_curve([None, None], MAX_MIN) == [0.0, 0.0]
    assert curve[-1] == pytest.approx(
        hypervolume([(3, 5), (2, 1)], MAX_MIN, reference_point([(0, 9), (3, 1)], MAX_MIN))
    )


def test_knee_is_where_gain_bends() -> None:
    rows = [(50, 1), (90, 2), (92, 10), (60, 9)]
    assert knee(rows, MAX_MIN) == 1
    assert knee([(1, 1)], MAX_MIN) == 0
    assert knee([(1,), (3,), (2,)], ("max",)) == 1
    assert knee([], MAX_MIN) is None
    assert knee([(0, 0), (1, 1)], MAX_MIN) == 0  # two ends of a line: the first


@pytest.mark.parametrize(
    ("rows", "directions", "said"),
    [
        ([(1, 2, 3)], MAX_MIN, "row 0: expected 2 values, found 3"),
        ([(1, 2), (float("nan"), 1)], MAX_MIN, "row 1 has a value that is not finite"),
        ([(1, 2)], ("max", "up"), "direction 'up' must be max or min"),
    ],
)
def test_bad_rows_are_refused(rows: list[tuple[float, ...]], directions: tuple[Direction, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        front(rows, directions)
