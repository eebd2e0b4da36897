"""Constraints between choices: conditions over keys such as `model.timesteps * model.neuron.bound <= 8`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from spikefleet_tune.errors import SearchError, nearest
from spikefleet_tune.expressions import CONSTRAINT, ExpressionError, NotANumberError, parse


class Constraint:
    """One condition over keys of a search, which a point keeps or does not keep; `expressions.py` has the grammar.

    A name is a full key (`model.neuron.bound`) or the end of exactly one key (`bound`, `neuron.bound`).
    Raises SearchError when the text is no such condition, or when a name fits no key or several.
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
        return frozenset(self._key_of.values())

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the values keep it. One that speaks of a key which has no value here (a branch not taken) is kept.

        A comparison that divides by zero does not hold. Raises SearchError when it calculates with, or orders, what is
        no number.
        """
        try:
            return self._expression.holds({name: values[key] for name, key in self._key_of.items() if key in values})
        except NotANumberError:
            given = ", ".join(f"{key}={values[key]!r}" for key in sorted(self.keys))
            raise SearchError(f"constraint {self.text!r} calculates with what is no number: {given}") from None


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
        raise SearchError(f"constraint {text!r}: {name!r} may be {' or '.join(fitting)}; write the whole key")
    ends = {key.rsplit(".", 1)[-1] for key in keys}
    known = keys if "." in name else {*keys, *ends}
    raise SearchError(
        f"constraint {text!r}: {name!r} is a key neither of space nor of overrides; {nearest(name, known)}"
    )
