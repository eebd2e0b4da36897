"""Constraints between choices: small expressions such as `model.timesteps * model.neuron.bound <= 8`.

Python's parser reads them; only numbers, strings, dotted names, + - * /, comparisons, `and` and `or` are let through.
Nothing is ever evaluated by Python itself.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from spikefleet_tune.errors import SearchError, nearest

_LONGEST = 500
_MOST_PARTS = 100

_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class Constraint:
    """One expression over keys of a search, which a point keeps or does not keep.

    A name is a full key (`model.neuron.bound`) or the end of exactly one key (`bound`, `neuron.bound`).
    Raises SearchError when the text is no such expression, or when a name fits no key or several.
    """

    def __init__(self, text: str, keys: Collection[str]) -> None:
        self.text = text
        self._root = _parse(text)
        self._key_of = {name: _resolve(name, keys, text) for name in _names(self._root)}

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self._key_of.values())

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the values keep it. One that speaks of a key which has no value here (a branch not taken) is kept.

        A division by zero is not kept. Raises SearchError when it calculates with, or orders, what is no number.
        """
        if any(key not in values for key in self.keys):
            return True
        try:
            return bool(self._value(self._root, values))
        except ZeroDivisionError:
            return False
        except TypeError:
            given = ", ".join(f"{key}={values[key]!r}" for key in sorted(self.keys))
            raise SearchError(f"constraint {self.text!r} calculates with what is no number: {given}") from None

    def _value(self, node: ast.expr, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(self._value(part, values) for part in parts)
            case ast.BoolOp(values=parts):
                return any(self._value(part, values) for part in parts)
            case ast.Compare(left=left, ops=ops, comparators=others):
                operands = [self._value(part, values) for part in (left, *others)]
                return all(_compare(op, a, b) for op, a, b in zip(ops, operands[:-1], operands[1:], strict=True))
            case ast.BinOp(left=left, op=op, right=right):
                return _ARITHMETIC[type(op)](_number(self._value(left, values)), _number(self._value(right, values)))
            case ast.UnaryOp(operand=operand):
                return -_number(self._value(operand, values))
            case ast.Constant(value=value):
                return value
        return values[self._key_of[_dotted(node)]]


def _parse(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise SearchError(f"constraint {text[:40]!r}... has {len(text)} characters; at most {_LONGEST} are read")
    try:
        root = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise SearchError(
            f"constraint {text!r} cannot be read; write it like 'model.timesteps * model.neuron.bound <= 8'"
        ) from None
    if sum(1 for _ in ast.walk(root)) > 3 * _MOST_PARTS:
        raise SearchError(f"constraint {text[:40]!r}... has more than {_MOST_PARTS} parts; write several short ones")
    _check_condition(root, text)
    return root


def _check_condition(node: ast.expr, text: str) -> None:
    match node:
        case ast.BoolOp(values=parts):
            for part in parts:
                _check_condition(part, text)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
            for part in (left, *others):
                _check_term(part, text)
        case _:
            raise SearchError(
                f"constraint {text!r} compares nothing in {ast.unparse(node)!r}; it needs <, <=, >, >=, == or !="
            )


def _check_term(node: ast.expr, text: str) -> None:
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            _check_term(left, text)
            _check_term(right, text)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            _check_term(operand, text)
        case ast.Constant(value=value) if isinstance(value, bool | str) or (
            isinstance(value, int | float) and math.isfinite(value)
        ):
            pass
        case ast.Name() | ast.Attribute() if _dotted(node):
            pass
        case _:
            raise SearchError(
                f"constraint {text!r}: {ast.unparse(node)!r} is not allowed; "
                "use numbers, names with dots, + - * /, comparisons, `and` and `or`"
            )


def _dotted(node: ast.expr) -> str:
    """The dotted name that a node spells, or nothing when it spells none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def _names(node: ast.expr) -> list[str]:
    if name := _dotted(node):
        return [name]
    return [name for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr) for name in _names(child)]


def _resolve(name: str, keys: Collection[str], text: str) -> str:
    if name in keys:
        return name
    fitting = sorted(key for key in keys if key.endswith(f".{name}"))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SearchError(f"constraint {text!r}: {name!r} may be {' or '.join(fitting)}; write the whole key")
    ends = {key.rsplit(".", 1)[-1] for key in keys}
    known = keys if "." in name else {*keys, *ends}
    raise SearchError(
        f"constraint {text!r}: {name!r} is a key neither of space nor of overrides; {nearest(name, known)}"
    )


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return value


def _compare(op: ast.cmpop, left: Any, right: Any) -> bool:
    if not isinstance(op, ast.Eq | ast.NotEq):
        left, right = _number(left), _number(right)
    return _COMPARISONS[type(op)](left, right)
