"""The registry's `where`: conditions on metadata, `timesteps * bound <= 8 and (connection==bsg or decoder=="rate")`.

`spikefleet_tune.expressions` has the grammar. A word on the right of a comparison is text; a number is compared as a
number, also with a tag that spells one. A version that lacks a key satisfies no condition on it.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from spikefleet.config.messages import did_you_mean
from spikefleet.errors import UserError
from spikefleet_tune.expressions import WHERE, Expression, ExpressionError, parse, required
from spikefleet_tune.messages import one_of

MetadataValue = str | float
"""A tag or a metric of a version."""

_SQL = {"==": "="}  # and a negative number with "e+" is none to MLflow's parser
_PLAIN = re.compile(r"[\w.:/+-]{1,250}(?: [\w.:/+-]{1,100})*", re.ASCII)


def parse_where(text: str, known: Collection[str] | None = None) -> Expression:
    """Parses a condition on the metadata of a version.

    Args:
        text: the condition.
        known: the keys of all versions; None checks no key, and reads "/" and "-" as part of a name.

    Returns:
        An expression; its `holds` takes `RegisteredVersion.metadata()`.

    Raises:
        UserError: the text is not a condition (the message quotes the place), or no version has one of its keys.
    """
    try:
        query = parse(text, WHERE, known)
    except ExpressionError as error:
        raise UserError(f"where: {error}") from None
    if not query.names:
        raise UserError(f"where: {text.strip()[:80]!r} names no key of a version; write, for example, timesteps<=2")
    for name in query.names:
        if known is not None and name not in known:
            hint = " ".join(filter(None, (did_you_mean(name, known, ""), one_of(sorted(known)))))
            raise UserError(f"where: no version has the key {name!r}; {hint}")
    return query


@dataclass(frozen=True)
class Pushed:
    """A term of a condition that MLflow can search for: a number among metrics, a word among tags."""

    key: str
    op: str
    value: float | str

    @property
    def filter(self) -> str:
        """As a condition of MLflow's search of LoggedModels."""
        if isinstance(self.value, str):
            return f"tags.`{self.key}` = '{self.value}'"
        return f"metrics.`{self.key}` {_SQL.get(self.op, self.op)} {float(self.value)!r}".replace("e+", "e")


def pushed_terms(query: Expression) -> list[Pushed]:
    """The terms `key op literal` that must hold wherever the condition holds, and that MLflow compares as we do.

    The rest is for `Expression.holds`: `!=`, which also holds for a value of the other kind; text that spells a number,
    which a metric may equal; text that is no plain word, which MLflow's quoting may not keep; and integers that are no
    floats.
    """
    terms = (Pushed(key, op, value) for key, op, value in required(query) if op != "!=")
    return [term for term in terms if _can_be_pushed(term)]


def plain_word(text: str) -> bool:
    """Whether a text is a word that MLflow's search takes in quotes as it is, and that equals no number."""
    try:
        float(text)
    except ValueError:
        return _PLAIN.fullmatch(text) is not None
    return False


def _can_be_pushed(term: Pushed) -> bool:
    if isinstance(term.value, str):
        return term.op == "==" and plain_word(term.value)
    try:
        return float(term.value) == term.value
    except OverflowError:
        return False
