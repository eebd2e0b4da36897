"""The `where` language of the registry: `timesteps<=2 and energy_mj<40 and connection==bsg`.

    query     = condition { "and" condition }
    condition = key ("<=" | ">=" | "<" | ">" | "==" | "!=") value
    key       = a letter or "_", then letters, digits and "_./-"
    value     = a number, or a word of letters, digits and "_.:/+-"

A number is compared as a number. A version that lacks a key does not satisfy a condition on it.
"""

import difflib
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from spikefleet.errors import UserError

Fact = str | float

MAX_LENGTH = 1000

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(r"\s*(?P<key>[A-Za-z_][\w./-]*)\s*(?P<op><=|>=|==|!=|<|>)\s*(?P<value>[\w.:/+-]+)\s*", re.ASCII)
_AND = re.compile(r"and\b", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Condition:
    """One comparison of a fact with a value."""

    key: str
    op: str
    value: Fact

    def holds(self, facts: Mapping[str, Fact]) -> bool:
        fact = facts.get(self.key)
        if fact is None:
            return False
        if isinstance(self.value, str):
            return _OPERATORS[self.op](str(fact), self.value)
        number = _number(fact) if isinstance(fact, str) else fact
        return self.op == "!=" if number is None else _OPERATORS[self.op](number, self.value)


@dataclass(frozen=True)
class Query:
    """Conditions that must all hold."""

    conditions: tuple[Condition, ...]

    def matches(self, facts: Mapping[str, Fact]) -> bool:
        return all(condition.holds(facts) for condition in self.conditions)

    def check_keys(self, known: Collection[str]) -> None:
        """Raises UserError naming a key that no version has, and those that exist."""
        for condition in self.conditions:
            if condition.key not in known:
                near = difflib.get_close_matches(condition.key, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise UserError(f"where: no version has {condition.key!r}; {hint}there are {', '.join(sorted(known))}")


def parse_where(text: str) -> Query:
    """Reads a query.

    Raises:
        UserError: the text is no query; the sentence shows the place.
    """
    if len(text) > MAX_LENGTH:
        raise UserError(f"where: {len(text)} characters are too many; at most {MAX_LENGTH} are read")
    conditions: list[Condition] = []
    position = 0
    while True:
        found = _CONDITION.match(text, position)
        if found is None:
            raise UserError(
                f"where: {text[position:].strip()[:80]!r} is no condition; write KEY OP VALUE with one of "
                f"{' '.join(_OPERATORS)}, such as timesteps<=2"
            )
        conditions.append(_condition(found["key"], found["op"], found["value"]))
        position = found.end()
        if position == len(text):
            return Query(tuple(conditions))
        joint = _AND.match(text, position)
        if joint is None or not text[position - 1].isspace():
            raise UserError(f"where: {text[position:][:80]!r} follows a condition; join conditions with 'and'")
        position = joint.end()


def _condition(key: str, op: str, value: str) -> Condition:
    number = _number(value)
    if number is not None:
        return Condition(key, op, number)
    if op not in ("==", "!="):
        raise UserError(f"where: {key}{op}{value}: {value!r} is no number; a word is compared with == or !=")
    return Condition(key, op, value)


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) else None
