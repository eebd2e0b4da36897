"""How a configuration complains: a sentence for each field that is wrong, and the nearest name for an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo


def did_you_mean(word: str, known: Iterable[str], otherwise: str, most: int = 1) -> str:
    """The end of a sentence about an unknown word: the nearest known ones, or else `otherwise`."""
    near = difflib.get_close_matches(word, list(known), n=most, cutoff=0.5)
    return f"did you mean {' or '.join(repr(name) for name in near)}?" if near else otherwise


def sentences(error: ValidationError, root: type[BaseModel], at: Sequence[str] = ()) -> str:
    """What is wrong with plain data, a sentence for each field: its dotted path, the value, and what is allowed.

    Args:
        error: raised for the data of `root`, or of a part of it.
        root: the whole configuration, by which fields are named.
        at: where in `root` that part is.
    """
    complaints = [_sentence({**item, "loc": (*at, *item["loc"])}, root) for item in error.errors()]
    return "; ".join(dict.fromkeys(complaints))


def _sentence(error: Mapping[str, Any], root: type[BaseModel]) -> str:
    location, known = _resolve([str(part) for part in error["loc"]], root)
    path = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {path!r}; {hint}"
    if error["type"] == "missing":
        return f"{path!r} is missing"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not path or isinstance(error["input"], Mapping | BaseModel):
        return f"{path + ': ' if path else ''}{message}"
    return f"{path}={error['input']!r}: {message}"


def _resolve(location: Sequence[str], root: type[BaseModel]) -> tuple[list[str], list[str]]:
    """A location as the user writes it, without the tags of unions that pydantic puts in, and the fields beside its
    last part."""
    plain: list[str] = []
    members: list[tuple[str | None, type[BaseModel]]] = [(None, root)]
    beside: list[type[BaseModel]] = [root]
    for part in location:
        if len(members) > 1 and part in (tag for tag, _ in members):
            members = [(tag, member) for tag, member in members if tag == part]
            continue
        plain.append(part)
        beside = [member for _, member in members]
        fields = (member.model_fields.get(part) for member in beside)
        members = [section for field in fields if field for section in _sections_of(field)]
    return plain, sorted({name for member in beside for name in member.model_fields})


def _sections_of(annotation: Any, tag: str | None = None) -> Iterator[tuple[str | None, type[BaseModel]]]:
    """The configurations that an annotation or a field allows, each with its tag in a union."""
    if isinstance(annotation, FieldInfo):
        yield from _sections_of(annotation.annotation)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield tag, annotation
    elif get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        tag = next((note.tag for note in notes if isinstance(note, Tag)), tag)
        yield from _sections_of(inner, tag)
    elif get_origin(annotation) in (Union, UnionType):
        for argument in get_args(annotation):
            yield from _sections_of(argument, tag)
