"""How a configuration complains: a sentence for each field that is wrong, and the nearest name for an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def did_you_mean(word: str, known: Iterable[str], otherwise: str, most: int = 1) -> str:
    """The end of a sentence about an unknown word: the nearest known ones, or else `otherwise`."""
    near = difflib.get_close_matches(word, list(known), n=most, cutoff=0.5)
    return f"did you mean {' or '.join(repr(name) for name in near)}?" if near else otherwise


Concrete = Callable[[type[BaseModel], Any], type[BaseModel]]
"""Which member of an open set of configurations plain data are for: (declared class, data) -> class."""


def sentences(
    error: ValidationError,
    root: type[BaseModel],
    data: Any,
    at: Sequence[str] = (),
    concrete: Concrete = lambda declared, data: declared,
) -> str:
    """What is wrong with plain data, a sentence for each field: its dotted path, the value, and what is allowed.

    Args:
        error: raised for `data`.
        root: the whole configuration, by which fields are named.
        data: plain data of `root`, or of a part of it.
        at: where in `root` that part is.
        concrete: tells the members of open sets apart.
    """
    for part in reversed(at):
        data = {part: data}
    complaints = [_sentence({**item, "loc": (*at, *item["loc"])}, root, data, concrete) for item in error.errors()]
    return "; ".join(dict.fromkeys(complaints))


def _sentence(error: Mapping[str, Any], root: type[BaseModel], data: Any, concrete: Concrete) -> str:
    location = [str(part) for part in error["loc"]]
    path = ".".join(location)
    if error["type"] == "unknown_field":  # a transform knows which other kind has it
        return f"unknown key {path!r}; {error['ctx']['hint']}"
    if error["type"] == "extra_forbidden":
        known = _fields_beside(location, root, data, concrete)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {path!r}; {hint}"
    if error["type"] == "missing":
        return f"{path!r} is missing"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not path or isinstance(error["input"], Mapping | BaseModel):
        return f"{path + ': ' if path else ''}{message}"
    return f"{path}={error['input']!r}: {message}"


def _fields_beside(location: Sequence[str], root: type[BaseModel], data: Any, concrete: Concrete) -> list[str]:
    """The fields of the configuration that the last part of a location was meant for."""
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
    """The configurations that a field's annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _sections_of(argument)
