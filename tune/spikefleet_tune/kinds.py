"""Whether validation kept the kind of each value: a boolean is no number, a text is neither."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

Kind = Literal["true or false", "a number", "text"]


def changed_kinds(given: Any, validated: Any, path: str = "") -> Iterator[str]:
    """Iterate over the values that validation took for another kind, as pydantic does with `true`, `"1"` and `yes`.

    Args:
        given: plain data, as it was written.
        validated: the same data as they were understood.
        path: dotted key of both, for the messages.

    Yields:
        A message for each: the key, the value, and what is expected.
    """
    if isinstance(given, Mapping) and isinstance(validated, Mapping):
        for key, value in given.items():
            if key in validated:
                yield from changed_kinds(value, validated[key], f"{path}.{key}" if path else str(key))
    elif isinstance(given, list | tuple) and isinstance(validated, list | tuple):
        for position, (one, other) in enumerate(zip(given, validated, strict=False)):
            yield from changed_kinds(one, other, f"{path}.{position}" if path else str(position))
    else:
        found, expected = _kind(given), _kind(validated)
        if found is not None and expected is not None and found != expected:
            yield f"{path}={given!r}: expected {expected}, found {found}"


def _kind(value: Any) -> Kind | None:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else None
