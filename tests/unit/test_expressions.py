"""The expression language against Python's own evaluation of what it generates, and against text of any kind."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikefleet_tune.expressions import CONSTRAINT, MAX_LENGTH, WHERE, Dialect, ExpressionError, parse

NAMES = {"T": 4, "D": 2, "x.lr": 0.25, "val/top1": 0.5, "a-b": 3}

numbers = st.one_of(st.integers(0, 99).map(str), st.sampled_from(["0.5", "2.", ".25", "1e-2", "1_000"]))
leaves = st.one_of(numbers, st.sampled_from(sorted(NAMES)))
space = st.sampled_from(["", " ", "  "])


@st.composite
def _operations(draw: st.DrawFn, parts: st.SearchStrategy[str]) -> str:
    """Operators have spaces here, as names may hold "/" and "-"; no divisor is 0."""
    op = draw(st.sampled_from([" + ", " - ", " * ", " / "]))
    return draw(parts) + op + draw(st.sampled_from(["T", "D", "val/top1", "7"]) if op == " / " else parts)


sums = st.recursive(
    leaves,
    lambda parts: st.one_of(
        _operations(parts), parts.map(lambda part: f"({part})"), parts.map(lambda part: f"-({part})")
    ),
    max_leaves=6,
)
comparisons = st.lists(sums, min_size=2, max_size=3).flatmap(
    lambda terms: st.lists(
        st.sampled_from([" <= ", ">=", " < ", "> ", "==", " != "]), min_size=len(terms) - 1, max_size=len(terms) - 1
    ).map(lambda ops: terms[0] + "".join(op + f"({term})" for op, term in zip(ops, terms[1:], strict=True)))
)
conditions = st.recursive(
    comparisons,
    lambda parts: st.one_of(
        st.lists(parts, min_size=2, max_size=4).map(" and ".join),
        st.lists(parts, min_size=2, max_size=4).map(" or ".join),
        parts.map(lambda part: f"({part})"),
    ),
    max_leaves=5,
).filter(lambda text: len(text) <= MAX_LENGTH)


@pytest.mark.parametrize("dialect", [CONSTRAINT, WHERE])
@given(text=conditions)
@settings(max_examples=200, deadline=None)
def test_a_condition_is_worth_what_python_makes_of_it(dialect: Dialect, text: str) -> None:
    values: dict[str, Any] = dict(NAMES)
    expected = text
    for name, value in values.items():
        expected = expected.replace(name, str(value))
    assert parse(text, dialect, NAMES).holds(values) is eval(expected, {"__builtins__": {}})  # noqa: S307


pieces = st.sampled_from(
    ["T", "val/top1", "a-b", "and", "or", "(", ")", "-", "+", "*", "/", "<=", "<", "==", "=", "!", "1", "1e9", "1__0",
     ".", "'x'", '"', "'", "\\", "True", "_", " ", "\n", "é", "٣", "9" * 400, "e", ",", ":", "x.y"]
)  # fmt: skip


@pytest.mark.parametrize("dialect", [CONSTRAINT, WHERE])
@pytest.mark.parametrize("known", [None, NAMES], ids=["any", "known"])
@given(text=st.one_of(st.text(max_size=80), st.lists(pieces, max_size=30).map("".join)))
@settings(max_examples=400, deadline=None)
def test_any_text_is_a_condition_or_the_one_error(dialect: Dialect, known: dict[str, Any] | None, text: str) -> None:
    try:
        expression = parse(text, dialect, known)
    except ExpressionError as error:
        assert str(error)  # noqa: PT017 -- either may happen
        return
    for value in (0, 2.5, 10**300):
        assert expression.holds(dict.fromkeys(expression.names, value)) in (True, False)
    if expression.names:
        assert expression.holds({}) is dialect.missing_holds
    assert parse(f" {text} ", dialect, known) == expression


@pytest.mark.parametrize("dialect", [CONSTRAINT, WHERE])
@pytest.mark.parametrize(
    "text",
    [
        "(" * 400 + "T" + ")" * 400 + " > 1",
        "-" * 900 + "T > 1",
        "T * " + "-" * 900 + "1 > 1",
        "T>1" + " and T>1" * 200,
        "(T>1 and " * 90 + "T>1" + ")" * 90,
    ],
)
def test_length_and_depth_are_limited(dialect: Dialect, text: str) -> None:
    with pytest.raises(ExpressionError, match=r"at most 1000|more than 30"):
        parse(text, dialect)


@pytest.mark.parametrize("dialect", [CONSTRAINT, WHERE])
def test_long_is_not_deep(dialect: Dialect) -> None:
    assert parse("T" + "+T" * 400 + " > 1", dialect).holds({"T": 1})
    assert parse("T>1" + " or T>1" * 100, dialect).holds({"T": 2})


def test_known_names_tell_a_name_from_a_division() -> None:
    def names(text: str, *known: str) -> tuple[str, ...]:
        return parse(text, WHERE, known or None).names

    assert names("val/top1 > 1") == ("val/top1",)
    assert names("val/top1 > 1", "val/top1", "val") == ("val/top1",)  # the longest
    assert names("val/top1 > 1", "val", "top1") == ("val", "top1")
    assert names("val / top1 > 1", "val/top1") == ("val", "top1")
    assert names("a-b-c > 1", "a-b", "c") == ("a-b", "c")
    assert names("T-1 > 1", "T") == ("T",)
    assert names("T/2 > 1", "T") == ("T",)
    assert names("nothing/known > 1", "T") == ("nothing/known",)


@pytest.mark.parametrize("text", ["0<True", "1 <= T < False", "True > T", "True + 1 == 2", "-False == 0", "'a' < T"])
def test_what_is_no_number_is_neither_ordered_nor_added(text: str) -> None:
    with pytest.raises(ExpressionError, match="is not a number"):
        parse(text, CONSTRAINT)


def test_dialects_differ_in_words_numbers_and_what_is_missing() -> None:
    facts = {"T": "2", "kind": "bsg"}
    assert parse("T == 2 and kind == bsg", WHERE).holds(facts)
    assert not parse("T == 2", CONSTRAINT).holds(facts)
    assert parse("kind == bsg", CONSTRAINT).names == ("kind", "bsg")
    assert parse("T == 2 or D == 1", WHERE).holds(facts)
    assert not parse("T == 2 and D != 1", WHERE).holds(facts)
    assert parse("T == 3 and D == 1", CONSTRAINT).holds(facts)  # D is not chosen: kept as a whole
    with pytest.raises(ExpressionError, match="'bsg' is not a number"):
        parse("kind < 2", CONSTRAINT).holds(facts)
    assert not parse("kind < 2 or kind >= 2", WHERE).holds(facts)
    assert parse("kind != 2", WHERE).holds(facts)
