"""The registry's `where`: `timesteps * bound <= 8 and (connection==bsg or decoder=="rate")`, over a version's facts.

The grammar is that of `spikefleet_tune.expressions`. A word right of a comparison is text; a number is compared as a
number, also where the fact is text that spells one. A version that lacks a key satisfies no condition on it.
"""

from collections.abc import Collection

from spikefleet.config.messages import did_you_mean
from spikefleet.errors import UserError
from spikefleet_tune.expressions import WHERE, Expression, ExpressionError, parse

Fact = str | float


def parse_where(text: str, known: Collection[str] | None = None) -> Expression:
    """Reads a query, whose `holds` takes the facts of a version.

    Args:
        text: the query.
        known: the keys that some version has; without them, no key is checked, and one with "/" or "-" is no division.

    Raises:
        UserError: the text is no query (the sentence shows the place), or no version has a key of it.
    """
    try:
        query = parse(text, WHERE, known)
    except ExpressionError as error:
        raise UserError(f"where: {error}") from None
    if not query.names:
        raise UserError(f"where: {text.strip()[:80]!r} is no condition on a version; name a key, as in timesteps<=2")
    for name in query.names:
        if known is not None and name not in known:
            listed = f"there are {', '.join(sorted(known))}"
            hint = " ".join(filter(None, (did_you_mean(name, known, ""), listed)))
            raise UserError(f"where: no version has {name!r}; {hint}")
    return query
