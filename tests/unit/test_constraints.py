"""Constraints of a search: arithmetic and comparisons over keys, and nothing else that Python could run."""

from __future__ import annotations

from typing import Any

import pytest

from spikefleet_tune.constraints import Constraint
from spikefleet_tune.errors import SearchError


@pytest.mark.parametrize(
    ("text", "values", "holds"),
    [
        ("T * D <= 8", {"m.T": 2, "m.D": 4}, True),
        ("T * D <= 8", {"m.T": 4, "m.D": 4}, False),
        ("m.T * D <= 8", {"m.T": 4}, True),  # a branch without D
        ("1 <= T < 3 and D == 4 or T == 9", {"m.T": 2, "m.D": 4}, True),
        ("1 <= T < 3 and D == 4 or T == 9", {"m.T": 3, "m.D": 4}, False),
        ("T / D > 1", {"m.T": 1, "m.D": 0}, False),
        ("-T + 2 * D >= 1 - 1.5", {"m.T": 2, "m.D": 1}, True),
        ("D != 'if'", {"m.T": 2, "m.D": "if"}, False),
        ("D == 4", {"m.T": 2, "m.D": "4"}, False),  # text is text
        ("D == True", {"m.T": 2, "m.D": True}, True),
        ("T/D > 1", {"m.T": 4, "m.D": 2}, True),
        ("T-D > 1", {"m.T": 4, "m.D": 2}, True),
        ("m.T/m.D-1 < 1", {"m.T": 4, "m.D": 2}, False),
        ("T-1<=D", {"m.T": 2, "m.D": 1}, True),
        ("T == D", {"m.T": 2, "m.D": 2}, True),  # a word on the right is a key
        ("(T + D) * 2 <= 8 and (T == 1 or D == 1)", {"m.T": 2, "m.D": 2}, False),
    ],
)
def test_constraints_hold_or_not(text: str, values: dict[str, Any], holds: bool) -> None:
    assert Constraint(text, ["m.T", "m.D"]).holds(values) is holds


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true') == 0",
        "(lambda: 1)() == 1",
        "T.__class__ == 1 if T else 2",
        "[T for T in (1,)] == 1",
        "T ** 99999 > 1",
        "T << 9 > 1",
        "T",
        "T + D",
        "f'{T}' == 1",
        "(T := 3) == 3",
        "T <= 8; D",
        "1e999 > T",
        "T in (1, 2)",
        "(" * 300 + "T" + ")" * 300 + " > 1",
        "-" * 400 + "T > 1",
        "T <= 8 " * 100,
        "",
    ],
)
def test_anything_else_is_no_constraint(text: str) -> None:
    with pytest.raises(SearchError, match="constraint"):
        Constraint(text, ["m.T", "m.D"])


def test_names_in_constraints_are_told_apart() -> None:
    keys = ["model.timesteps", "eval.timesteps"]
    with pytest.raises(SearchError, match=r"is ambiguous: eval.timesteps or model.timesteps; write the full key"):
        Constraint("timesteps <= 4", keys)
    assert Constraint("model.timesteps <= 4", keys).keys == {"model.timesteps"}
    with pytest.raises(SearchError, match=r"did you mean 'timesteps'\?"):
        Constraint("timestep <= 4", keys[:1])
    for text in ("a * 2 <= 4", "a <= 4", "1-a == 0"):
        with pytest.raises(SearchError, match="needs numbers, found a='if'"):
            Constraint(text, ["a"]).holds({"a": "if"})
