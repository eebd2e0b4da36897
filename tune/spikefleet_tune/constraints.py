"""Constraints over the keys of a search, such as `model.timesteps * model.neuron.bound <= 8`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from spikefleet_tune.errors import SearchError
from spikefleet_tune.expressions import CONSTRAINT, ExpressionError, NotANumberError, parse
from spikefleet_tune.messages import nearest


class Constraint:
    """One condition over the keys of a search; `expressions.py` has the grammar.

    A name is a full key (`model.neuron.bound`) or the suffix of exactly one key (`bound`, `neuron.bound`).

    Args:
        text: the condition.
        keys: full keys of the space and of the fixed overrides.

    Raises:
        SearchError: the text is not a condition, or a name matches no key or several.
    """

    def __init__(self, text: str, keys: Collection[str]) -> None:
        self.text = text
        try:
            self._expression = parse(text, CONSTRAINT, {name for key in keys for name in _ends(key)})
        except ExpressionError as error:
            shown = repr(text) if len(text) <= 100 else f"{text[:40]!r}..."
            raise SearchError(f"constraint {shown}: {error}") from None
        self._key_of = {name: _resolve(name, keys, text) for name in self._expression.names}

    @property
    def keys(self) -> frozenset[str]:
        """Full keys that the condition reads."""
        return frozenset(self._key_of.values())

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the values satisfy the constraint.

        A constraint on a key without a value (a branch not taken) holds. A comparison that divides by zero does not.

        Args:
            values: values by full key.

        Raises:
            SearchError: an arithmetic or an ordering operand is not a number.
        """
        try:
            return self._expression.holds({name: values[key] for name, key in self._key_of.items() if key in values})
        except NotANumberError:
            given = ", ".join(f"{key}={values[key]!r}" for key in sorted(self.keys))
            raise SearchError(f"constraint {self.text!r} needs numbers, found {given}") from None


def _ends(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _resolve(name: str, keys: Collection[str], text: str) -> str:
    if name in keys:
        return name
    fitting = sorted(key for key in keys if key.endswith(f".{name}"))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SearchError(f"constraint {text!r}: {name!r} is ambiguous: {' or '.join(fitting)}; write the full key")
    ends = {key.rsplit(".", 1)[-1] for key in keys}
    known = keys if "." in name else {*keys, *ends}
    raise SearchError(
        f"constraint {text!r}: {name!r} is neither a key of space nor of overrides; {nearest(name, known)}"
    )
