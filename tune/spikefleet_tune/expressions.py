"""The expression language of a search's constraints and of the registry's `--where`: grammar, parser, evaluation.

    or         = and { "or" and }
    and        = comparison { "and" comparison }
    comparison = sum { ( "<=" | ">=" | "<" | ">" | "==" | "!=" ) right }          (a chain, as in 1 <= T < 3)
    right      = word | sum                                                        (word: see Dialect.bare_words)
    sum        = product { ( "+" | "-" ) product }
    product    = unary { ( "*" | "/" ) unary }
    unary      = [ "-" | "+" ] unary | number | text | name | "(" or ")"
    number     = digits with an optional point and exponent, such as 2, 0.5, 1e-3
    text       = "'" characters "'" | '"' characters '"'                          (without a backslash)
    name       = a letter or "_", then letters, digits and "_", which ".", "/" or "-" may join, such as val/top1
    word       = letters, digits and "_.:/+-"

The operands of `and`, `or` and the whole expression are comparisons; those of arithmetic are not. Whether "/" or "-"
belongs to a name depends on the known names: the longest known prefix is the name, so `val/top1` is one name if such a
metric exists, and `T/D` is a division if not. Spaces around an operator always make it an operator.

This module parses the text itself; Python never evaluates it. Length and nesting are limited.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

MAX_LENGTH = 1000
_DEEPEST = 30

_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
_ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_MIRRORED = {"<=": ">=", ">=": "<=", "<": ">", ">": "<"}
_COMPARISON = re.compile(r"\s*(<=|>=|==|!=|<|>)")
_SUM, _PRODUCT = re.compile(r"\s*([+-])"), re.compile(r"\s*([*/])")
_SIGN, _OPEN, _CLOSE = re.compile(r"\s*([+-])"), re.compile(r"\s*(\()"), re.compile(r"\s*(\))")
_NUMBER = re.compile(r"\s*((?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?)(?!\w)", re.ASCII)
_TEXT = re.compile(r"""\s*('[^'\\]*'|"[^"\\]*")""")
_NAME = re.compile(r"\s*([A-Za-z_]\w*(?:[./-]+\w+)*)", re.ASCII)
_WORD = re.compile(r"\s*([\w.:/+-]++)(?!\s*[-+*/<>=!])", re.ASCII)
_SPELLED_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_KEYWORDS = {word: re.compile(rf"\s*({word})\b", re.ASCII) for word in ("and", "or")}


class ExpressionError(ValueError):
    """The text is not a condition; the message quotes the place."""


class NotANumberError(ExpressionError):
    """An arithmetic or ordering operand is not a number."""


@dataclass(frozen=True)
class Dialect:
    """The rules in which constraints and `--where` differ."""

    bare_words: bool
    """A single word on the right of a comparison that is not a number is text, as in `connection==bsg`; a name there
    needs parentheses or arithmetic. If False, every word is a name, except True and False."""
    spelled_numbers: bool
    """Values may be text that spells a number; other text equals no number and is neither above nor below one.
    If False, 2 and "2" differ, and ordering text raises NotANumberError."""
    missing_holds: bool
    """An expression holds if one of its names has no value. If False, a comparison with such a name does not hold."""


CONSTRAINT = Dialect(bare_words=False, spelled_numbers=False, missing_holds=True)
WHERE = Dialect(bare_words=True, spelled_numbers=True, missing_holds=False)


@dataclass(frozen=True)
class Constant:
    """A number, True or False."""

    value: float | bool


@dataclass(frozen=True)
class Text:
    """A quoted text, or a bare word."""

    value: str


@dataclass(frozen=True)
class Name:
    """A name whose value the caller provides."""

    name: str


@dataclass(frozen=True)
class Arithmetic:
    """Operators of one precedence, left to right; a flat list, so that a long sum is not nested deeply."""

    first: Term
    rest: tuple[tuple[str, Term], ...]


@dataclass(frozen=True)
class Comparison:
    """A chain of comparisons, as in `1 <= T < 3`."""

    first: Term
    rest: tuple[tuple[str, Term], ...]


@dataclass(frozen=True)
class Joined:
    """Conditions joined by `and` or by `or`."""

    word: str
    parts: tuple[Condition, ...]


Term = Constant | Text | Name | Arithmetic
Condition = Comparison | Joined


@dataclass(frozen=True)
class Expression:
    """A parsed condition; equal texts give equal expressions."""

    root: Condition
    dialect: Dialect

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the expression, each once, in order."""
        return tuple(dict.fromkeys(_names(self.root)))

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the values satisfy the condition. A comparison that divides by zero does not hold.

        Args:
            values: values by name; `Dialect.missing_holds` says what a missing one means.

        Raises:
            NotANumberError: an operand is not a number, and the dialect has no `spelled_numbers`.
        """
        if self.dialect.missing_holds and any(name not in values for name in self.names):
            return True
        return self._holds(self.root, values)

    def _holds(self, node: Condition, values: Mapping[str, Any]) -> bool:
        if isinstance(node, Joined):
            results = (self._holds(part, values) for part in node.parts)
            return all(results) if node.word == "and" else any(results)
        if any(name not in values for name in _names(node)):
            return False
        terms = [node.first, *(term for _, term in node.rest)]
        try:
            given = [self._value(term, values) for term in terms]
        except (ZeroDivisionError, OverflowError):
            return False
        quoted = [isinstance(term, Text) for term in terms]
        return all(
            self._compare(op, given[i], given[i + 1], quoted[i] or quoted[i + 1]) for i, (op, _) in enumerate(node.rest)
        )

    def _value(self, node: Term, values: Mapping[str, Any]) -> Any:
        match node:
            case Constant(value) | Text(value):
                return value
            case Name(name):
                return values[name]
            case Arithmetic(first, rest):
                result = self._number(self._value(first, values))
                for op, term in rest:
                    result = _ARITHMETIC[op](result, self._number(self._value(term, values)))
                return result

    def _number(self, value: Any) -> Any:
        if self.dialect.spelled_numbers and isinstance(value, str):
            number = spelled_number(value)
            return math.nan if number is None else number
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise NotANumberError(f"{value!r} is not a number")
        return value

    def _compare(self, op: str, left: Any, right: Any, as_text: bool) -> bool:
        if self.dialect.spelled_numbers:
            if as_text:
                return _COMPARISONS[op](str(left), str(right))
            numbers = self._number(left), self._number(right)
            if all(map(math.isnan, numbers)) and isinstance(left, str) and isinstance(right, str):
                return op in ("==", "!=") and _COMPARISONS[op](left, right)
            return _COMPARISONS[op](*numbers)
        if op not in ("==", "!="):
            left, right = self._number(left), self._number(right)
        return bool(_COMPARISONS[op](left, right))


def spelled_number(text: str) -> float | None:
    """The number that a text spells; None for another text, such as `nan`."""
    return float(text) if _SPELLED_NUMBER.fullmatch(text) else None


def required(expression: Expression) -> Iterator[tuple[str, str, float | str]]:
    """What must hold wherever the expression holds: name, operator and value of comparisons joined by `and`.

    A chain is two comparisons, and `2 > T` is `T < 2`. What is joined by `or`, and comparisons between names, are left
    out. A value is text where it stands in quotes or is a bare word.
    """
    root = expression.root
    for part in root.parts if isinstance(root, Joined) and root.word == "and" else (root,):
        if isinstance(part, Joined):
            if part.word == "and":
                yield from required(Expression(part, expression.dialect))
            continue
        terms = [part.first, *(term for _, term in part.rest)]
        for (op, right), left in zip(part.rest, terms, strict=False):
            if isinstance(left, Name) and (value := _literal(right)) is not None:
                yield left.name, op, value
            elif isinstance(right, Name) and (value := _literal(left)) is not None:
                yield right.name, _MIRRORED.get(op, op), value


def _literal(term: Term) -> float | str | None:
    """A number, also with a sign, or a text; None for anything else."""
    match term:
        case Text(value) | Constant(value):
            return value
        case Arithmetic(Constant(0), ((("+" | "-") as sign, Constant(value)),)):
            return -value if sign == "-" else value
    return None


def parse(text: str, dialect: Dialect, known: Collection[str] | None = None) -> Expression:
    """Parses a condition.

    Args:
        text: at most 1000 characters.
        dialect: CONSTRAINT or WHERE.
        known: the known names, which distinguish `val/top1` from a division; None makes every name as long as
            possible. The caller checks that the names of the expression are known.

    Returns:
        The parsed condition.

    Raises:
        ExpressionError: the text is not a condition.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"the expression has {len(text)} characters; at most {MAX_LENGTH} are allowed")
    return Expression(_Parser(text, dialect, known).whole(), dialect)


class _Parser:
    """Recursive descent: one method for each rule of the grammar."""

    def __init__(self, text: str, dialect: Dialect, known: Collection[str] | None) -> None:
        self._text, self._dialect = text, dialect
        self._booleans = {} if dialect.bare_words else {"True": True, "False": False}
        self._known = None if known is None else {*known, *self._booleans}
        self._at = self._depth = 0

    def whole(self) -> Condition:
        condition = self._condition(self._or(), 0)
        if rest := self._text[self._at :].strip():
            raise ExpressionError(f"{rest[:80]!r} follows a condition; join conditions with 'and' or 'or'")
        return condition

    def _or(self) -> Term | Condition:
        return self._joined("or", lambda: self._joined("and", self._comparison))

    def _joined(self, word: str, part: Callable[[], Term | Condition]) -> Term | Condition:
        start, node = self._at, part()
        if not self._take(_KEYWORDS[word]):
            return node
        parts = [self._condition(node, start)]
        while True:
            start = self._at
            parts.append(self._condition(part(), start))
            if not self._take(_KEYWORDS[word]):
                return Joined(word, tuple(parts))

    def _comparison(self) -> Term | Condition:
        start, first = self._at, self._sum()
        rest: list[tuple[str, Term]] = []
        while op := self._take(_COMPARISON):
            left, right = rest[-1][1] if rest else first, self._term(self._right())
            rest.append((op, right))
            words = [term.value for term in (left, right) if _is_no_number(term)]
            if words and op not in ("==", "!="):
                raise ExpressionError(
                    f"{self._text[start : self._at].strip()!r} is not a condition: {words[0]!r} is not a number; "
                    "compare text and booleans with == or !="
                    + ", or put a key on the right in (...)"
                    * self._dialect.bare_words
                )
        return Comparison(self._term(first), tuple(rest)) if rest else first

    def _right(self) -> Term | Condition:
        found = _WORD.match(self._text, self._at) if self._dialect.bare_words else None
        if found is None or _SPELLED_NUMBER.fullmatch(found[1]):
            return self._sum()
        self._at = found.end()
        return Text(found[1])

    def _sum(self) -> Term | Condition:
        return self._arithmetic(_SUM, lambda: self._arithmetic(_PRODUCT, self._unary))

    def _arithmetic(self, ops: re.Pattern[str], part: Callable[[], Term | Condition]) -> Term | Condition:
        first = part()
        rest: list[tuple[str, Term]] = []
        while op := self._take(ops):
            rest.append((op, self._addend(part())))
        return Arithmetic(self._addend(first), tuple(rest)) if rest else first

    def _unary(self) -> Term | Condition:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ExpressionError(f"more than {_DEEPEST} parentheses or signs are nested")
        try:
            if sign := self._take(_SIGN):
                return Arithmetic(Constant(0), ((sign, self._addend(self._unary())),))
            if self._take(_OPEN):
                node = self._or()
                if not self._take(_CLOSE):
                    raise ExpressionError(f"a ')' is missing before {self._text[self._at :].strip()[:80]!r}")
                return node
            return self._leaf()
        finally:
            self._depth -= 1

    def _leaf(self) -> Term:
        if number := self._take(_NUMBER):
            try:
                value = int(number) if re.fullmatch(r"[\d_]+", number) else float(number)
                if math.isfinite(float(value)):
                    return Constant(value)
            except (ValueError, OverflowError):
                pass
            raise ExpressionError(f"{number[:80]!r} is not a finite number")
        if text := self._take(_TEXT):
            return Text(text[1:-1])
        found = _NAME.match(self._text, self._at)
        if found is None or found[1] in _KEYWORDS:
            raise self._no_condition(self._at)
        name = self._known_part(found[1])
        self._at = found.start(1) + len(name)
        return Constant(self._booleans[name]) if name in self._booleans else Name(name)

    def _known_part(self, run: str) -> str:
        """The longest known prefix that ends before a "/" or "-"; the whole text if none is known."""
        if self._known is None or run in self._known:
            return run
        cuts = [found.start() for found in re.finditer("[/-]", run)]
        return next((run[:cut] for cut in reversed(cuts) if run[:cut] in self._known), run)

    def _take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found[1]

    def _condition(self, node: Term | Condition, start: int) -> Condition:
        if isinstance(node, Condition):
            return node
        raise self._no_condition(start)

    def _term(self, node: Term | Condition) -> Term:
        if isinstance(node, Term):
            return node
        raise ExpressionError(f"expected a value before {self._text[self._at :].strip()[:80]!r}, found a comparison")

    def _addend(self, node: Term | Condition) -> Term:
        if _is_no_number(node):
            raise ExpressionError(f"{node.value!r} is not a number; + - * / need numbers")
        return self._term(node)

    def _no_condition(self, start: int) -> ExpressionError:
        return ExpressionError(
            f"{self._text[start:].strip()[:80]!r} is not a condition; write KEY OP VALUE with one of "
            f"{' '.join(_COMPARISONS)}, such as timesteps<=2"
        )


def _is_no_number(node: Term | Condition) -> TypeGuard[Text | Constant]:
    """Whether the value is known, and is a text or a boolean."""
    return isinstance(node, Text) or (isinstance(node, Constant) and isinstance(node.value, bool))


def _names(node: Term | Condition) -> Iterator[str]:
    match node:
        case Name(name):
            yield name
        case Arithmetic(first, rest) | Comparison(first, rest):
            yield from _names(first)
            for _, term in rest:
                yield from _names(term)
        case Joined(_, parts):
            for part in parts:
                yield from _names(part)
