"""Error messages of a configuration: one for each invalid field, with the nearest name for an unknown key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from spikefleet.config.renamed import RENAMED_KEYS

PLAIN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""Pattern of the names that become names of files, directories and registered models."""

_QUOTED = 300
"""Characters of a value in a message."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str, most: int = 1) -> str:
    """The end of a message about an unknown word.

    Args:
        word: the unknown word.
        known: the words that are allowed.
        otherwise: returned if no known word is near.
        most: largest number of suggestions.

    Returns:
        `did you mean 'digits'?`, or `otherwise`.
    """
    near = difflib.get_close_matches(word, list(known), n=most, cutoff=0.5)
    return f"did you mean {' or '.join(repr(name) for name in near)}?" if near else otherwise


Concrete = Callable[[type[BaseModel], Any], type[BaseModel]]
"""Resolves a member of an open set of configurations: (declared class, plain data) -> class."""


def error_messages(
    error: ValidationError,
    root: type[BaseModel],
    data: Any,
    at: Sequence[str] = (),
    concrete: Concrete = lambda declared, data: declared,
) -> str:
    """The messages of a validation error: the dotted path of each field, its value, and what is allowed.

    Args:
        error: raised for `data`.
        root: class of the whole configuration.
        data: plain data of `root`, or of a section of it.
        at: path of that section in `root`.
        concrete: resolves members of open sets.

    Returns:
        The messages, separated by `; `.
    """
    for part in reversed(at):
        data = {part: data}
    messages = [_error_message({**item, "loc": (*at, *item["loc"])}, root, data, concrete) for item in error.errors()]
    return "; ".join(dict.fromkeys(messages))


def _error_message(error: Mapping[str, Any], root: type[BaseModel], data: Any, concrete: Concrete) -> str:
    location = [str(part) for part in error["loc"]]
    path = ".".join(location)
    if error["type"] in ("unknown_field", "extra_forbidden") and path in RENAMED_KEYS:
        return f"unknown key {path!r}; it was renamed to {RENAMED_KEYS[path]!r}"
    if error["type"] == "unknown_field":  # a transform knows which other kind has the field
        return f"unknown key {path!r}; {error['ctx']['hint']}"
    if error["type"] == "extra_forbidden":
        known = _fields_beside(location, root, data, concrete)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        nearest = ".".join([*location[:-1], *near])
        hint = f"did you mean {nearest!r}?" if near else f"expected one of {', '.join(known)}"
        return f"unknown key {path!r}; {hint}"
    if error["type"] == "missing":
        return f"{path!r} is missing"
    message = rule_of(error["msg"])
    if not path or isinstance(error["input"], Mapping | BaseModel):
        return f"{path + ': ' if path else ''}{message}"
    if error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] == PLAIN_NAME:
        message = "must have 1 to 100 letters, digits, '.', '_' or '-', and start with a letter or digit"
    return f"{path}={quoted(error['input'])}: {message}"


def quoted(value: object) -> str:
    """A value of the user in a message: in quotes if it is text, and its beginning alone if it is long."""
    shown = repr(value)
    return shown if len(shown) <= _QUOTED else f"{shown[:_QUOTED]}... ({len(shown):,} characters)"


def rule_of(message: str) -> str:
    """What is allowed, of a message of pydantic: `must be a valid number`."""
    rule = message.removeprefix("Value error, ").replace("Input should be", "must be")
    return rule.partition(", unable to parse")[0]


def _fields_beside(location: Sequence[str], root: type[BaseModel], data: Any, concrete: Concrete) -> list[str]:
    """The fields of the section that the last part of a location belongs to."""
    here = root
    for part in location[:-1]:
        data = data.get(part, {}) if isinstance(data, Mapping) else {}
        field = here.model_fields.get(part)
        section = next(_sections_of(field.annotation), None) if field else None
        if section is None:
            return []
        here = concrete(section, data)
    return sorted(here.model_fields)


def _sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configuration classes in a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _sections_of(argument)
