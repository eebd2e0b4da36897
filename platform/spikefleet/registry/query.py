"""The registry's `where`: conditions on metadata, `timesteps * bound <= 8 and (connection==bsg or decoder=="rate")`.

`spikefleet_tune.expressions` has the grammar. A word on the right of a comparison is text; a number is compared as a
number, also with a tag that spells one. A version that lacks a key satisfies no condition on it.
"""

from collections.abc import Collection

from spikefleet.config.messages import did_you_mean
from spikefleet.errors import UserError
from spikefleet_tune.expressions import WHERE, Expression, ExpressionError, parse

MetadataValue = str | float
"""A tag or a metric of a version."""


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
            listed = f"expected one of {', '.join(sorted(known))}"
            hint = " ".join(filter(None, (did_you_mean(name, known, ""), listed)))
            raise UserError(f"where: no version has the key {name!r}; {hint}")
    return query
