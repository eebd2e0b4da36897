"""The `where` language and the decision about the champion, against brute force."""

import math
import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikefleet.errors import UserError
from spikefleet.registry.promotion import Candidate, decide
from spikefleet.registry.query import parse_where, pushed_terms

KEYS = ["timesteps", "energy_mj", "connection", "val/top1", "a-b.c"]
WORDS = ["bsg", "bsg_star", "cifar10", "1e5x", "and", "v1.2-3"]
OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}

numbers = st.one_of(st.integers(-9, 9), st.floats(-9, 9, allow_nan=False).map(lambda x: round(x, 3)))
conditions = st.one_of(
    st.tuples(st.sampled_from(KEYS), st.sampled_from(list(OPERATORS)), numbers),
    st.tuples(st.sampled_from(KEYS), st.sampled_from(["==", "!="]), st.sampled_from(WORDS)),
)
versions = st.dictionaries(
    st.sampled_from(KEYS), st.one_of(numbers.map(float), numbers.map(str), st.sampled_from(WORDS)), max_size=5
)
space = st.sampled_from(["", " ", "  "])


def brute_force(condition: tuple[str, str, Any], facts: dict[str, Any]) -> bool:
    key, op, value = condition
    if key not in facts:
        return False
    fact = facts[key]
    if isinstance(value, str):
        return OPERATORS[op](str(fact), value)
    try:
        return OPERATORS[op](float(fact), float(value))
    except ValueError:
        return op == "!="


@given(st.lists(conditions, min_size=1, max_size=4), st.lists(versions, max_size=8), st.data())
def test_a_query_selects_what_brute_force_selects(
    asked: list[tuple[str, str, Any]], facts: list[dict[str, Any]], data: st.DataObject
) -> None:
    text = " and ".join(f"{k}{data.draw(space)}{op}{data.draw(space)}{value}" for k, op, value in asked)
    query = parse_where(data.draw(space) + text + data.draw(space))
    selected = [query.holds(version) for version in facts]
    assert selected == [all(brute_force(condition, version) for condition in asked) for version in facts]


@given(st.text(max_size=60))
def test_any_text_is_a_query_or_a_sentence(text: str) -> None:
    try:
        assert parse_where(text).names
    except UserError as error:
        assert str(error).startswith("where: ")  # noqa: PT017 -- either may happen


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        ("timesteps<=2 and energy_mj<40 and connection==bsg", "a"),
        ('timesteps * bound <= 8 and (connection==bsg or decoder=="rate")', "ab"),
        ("timesteps<=2 or connection==iand", "ac"),
        ("timesteps<=2 and energy_mj<1 or connection==iand", "c"),  # and binds tighter
        ("timesteps<=2 and (energy_mj<1 or connection==iand)", ""),
        ("connection == 'bsg'", "a"),
        ("decoder != rate", ""),  # c has none, so that nothing can be said of it
        ("val/top1 / 2 > 0.44", "b"),
        ("val/top1/2 > 0.44", "b"),
        ("1 <= timesteps < 4", "a"),
        ("timesteps <= (bound)", "a"),
        ("8 >= timesteps * bound", "ab"),
        ("timesteps - 1 == 1", "a"),
        ("timesteps-1 == 1", "a"),
        ("connection * 2 <= 8", ""),  # no number: neither above nor below
        ("energy_mj / (timesteps - 2) > 0 or timesteps == 2", "ac"),  # b lies below; a divides by zero and has 2
        ("timesteps == 2.0", "a"),
        ("connection == (decoder)", ""),
    ],
)
def test_queries_select_versions(text: str, selected: str) -> None:
    versions: dict[str, dict[str, Any]] = {
        "a": {"timesteps": "2", "bound": "4", "energy_mj": 39.9, "connection": "bsg", "decoder": "rate"},
        "b": {"timesteps": "4", "bound": "1", "energy_mj": -1.0, "connection": "bsg_star", "decoder": "rate"},
        "c": {"timesteps": "8", "energy_mj": 60.0, "connection": "iand"},
    }
    versions["b"]["val/top1"] = 0.9
    query = parse_where(text, {key for facts in versions.values() for key in facts})
    assert "".join(name for name, facts in versions.items() if query.holds(facts)) == selected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not a condition"),
        ("timesteps", "is not a condition"),
        ("timesteps=2", "is not a condition"),
        ("timesteps<=2 and", "is not a condition"),
        ("timesteps<=2 or", "is not a condition"),
        ("(timesteps<=2", r"a '\)' is missing"),
        ("timesteps<=2)", "follows a condition"),
        ("timesteps<=2,energy<3", "join conditions with 'and'"),
        ("timesteps<=2 energy<3", "join conditions with 'and'"),
        ("timesteps<=2 andenergy<3", "join conditions with 'and'"),
        ("connection<bsg", "compare text and booleans with == or !="),
        ("timesteps<='2'", "compare text and booleans with == or !="),
        ("__import__('os').system('true')==0", "is not a condition"),
        ("2<=timesteps", r"is not a condition.*put a key on the right in \(\.\.\.\)"),
        ("2<=3", "names no key of a version"),
        ("x==1 and " * 200 + "x==1", "at most 1000 are allowed"),
        ("größe==1", "is not a condition"),
        ("'a' * 2 == b", "'a' is not a number; . - . / need numbers"),
        ("(a < 2) * 2 < 3", "expected a value before .*, found a comparison"),
        ("a < 1e999", "'1e999' is not a finite number"),
        ("(" * 300 + "a" + ")" * 300 + "<3", "more than 30 parentheses"),
    ],
)
def test_what_is_no_query_is_refused_with_the_place(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_where(text)


def test_an_unknown_key_is_named_with_what_exists() -> None:
    parse_where("timestep<=2", {"timestep"})
    with pytest.raises(
        UserError, match=r"'timestep'; did you mean 'timesteps'\? expected one of connection, timesteps"
    ):
        parse_where("timestep<=2", {"timesteps", "connection"})
    with pytest.raises(UserError, match=r"no version has the key 'val/top'; did you mean 'val/top1'"):
        parse_where("val/top<=2", {"val/top1"})


@pytest.mark.parametrize(
    ("champion", "candidate", "mode", "alias"),
    [
        (None, 0.1, "max", "champion"),
        (0.5, 0.6, "max", "champion"),
        (0.5, 0.5, "max", "challenger"),
        (0.5, 0.4, "max", "challenger"),
        (0.5, 0.4, "min", "champion"),
        (0.5, 0.6, "min", "challenger"),
        (0.5, math.nan, "max", "challenger"),
        (None, math.nan, "max", "challenger"),
        (None, None, "max", "challenger"),
        (math.nan, 0.5, "max", "challenger"),
    ],
)
def test_only_a_better_version_becomes_champion(champion: Any, candidate: Any, mode: Any, alias: str) -> None:
    present = None if champion is None else Candidate(1, champion)
    decision = decide(present, Candidate(2, candidate, verdict="proved"), "val/top1", mode)
    assert decision.alias == alias
    assert "version" in decision.reason


def test_a_champion_without_the_metric_stays_and_the_sentence_says_why() -> None:
    elsewhere = decide(Candidate(1, 0.1, "a"), Candidate(2, 0.9, "b", "proved"), "val/map", "max")
    assert (elsewhere.alias, elsewhere.reason) == ("challenger", "champion version 1 was measured on other data")
    proved = Candidate(2, 0.9, verdict="proved")
    decision = decide(Candidate(1, None), proved, "val/map", "max")
    assert decision == decide(Candidate(1, math.nan), proved, "val/map", "max")
    assert decision.reason == "champion version 1 has no val/map to compare with"


@pytest.mark.parametrize(
    ("verdict", "sentence", "alias"),
    [("refuted", "binary form of version 2", "challenger"), ("not shown", "shows nothing", None)],
)
def test_a_version_that_is_refuted_or_shows_nothing_is_never_champion(
    verdict: str, sentence: str, alias: str | None
) -> None:
    for champion in (None, Candidate(1, 0.1)):
        decision = decide(champion, Candidate(2, 0.9, verdict=verdict), "val/top1", "max")
        assert decision.alias == alias
        assert sentence in decision.reason
    for harmless in ("proved", "not spiking"):
        assert decide(None, Candidate(2, 0.9, verdict=harmless), "val/top1", "max").alias == "champion"


@given(
    st.none() | st.floats(0.001, 1),
    st.lists(st.floats(0.001, 1), max_size=6),
    st.sampled_from(["max", "min"]),
    st.randoms(use_true_random=False),
)
def test_of_jobs_that_take_turns_the_best_is_champion_in_the_end(
    champion: float | None, values: list[float], mode: Any, random: Any
) -> None:
    present = None if champion is None else Candidate(1, champion)
    candidates = [Candidate(version, value, verdict="proved") for version, value in enumerate(values, start=2)]
    random.shuffle(candidates)
    winner = present
    for candidate in candidates:
        if decide(winner, candidate, "m", mode).alias == "champion":
            winner = candidate
    field = [*([present] if present else []), *candidates]
    extreme = (max if mode == "max" else min)((s.value for s in field if s.value is not None), default=None)
    assert winner == next((candidate for candidate in field if candidate.value == extreme), None)


@pytest.mark.parametrize(
    ("text", "filters"),
    [
        ("timesteps<=2 and energy_mj<40", ["metrics.`timesteps` <= 2.0", "metrics.`energy_mj` < 40.0"]),
        ("1 <= timesteps < 4", ["metrics.`timesteps` >= 1.0", "metrics.`timesteps` < 4.0"]),
        ("val/top1 == -1e-3 and (connection==bsg)", ["metrics.`val/top1` = -0.001", "tags.`connection` = 'bsg'"]),
        ("-5 > (a-b.c)", ["metrics.`a-b.c` < -5.0"]),
        ("a > -1e300", ["metrics.`a` > -1e300"]),
        ("a==2 or b==3", []),
        ("a==2 and (b==3 or c==4) and timesteps * bound <= 8", ["metrics.`a` = 2.0"]),
        ("a != 2 and b != bsg", []),  # which also hold for words and for numbers
        ("a == '2' and b == nan and c == '1e5' and d == ' x' and e == \"it's\" and f == ''", []),
        ("a == 'x y' and b == 'x OR 1=1' and c == 'x`y'", ["tags.`a` = 'x y'"]),
        ("a < 9007199254740993", []),  # no float
        ("a < (b)", []),
    ],
)
def test_what_must_hold_is_pushed_down_and_the_rest_is_left(text: str, filters: list[str]) -> None:
    assert [term.filter for term in pushed_terms(parse_where(text))] == filters
