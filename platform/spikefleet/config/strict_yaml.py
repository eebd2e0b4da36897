"""YAML 1.2's core schema for recipes, searches and overrides: plain data, no duplicate keys, no aliases.

PyYAML reads YAML 1.1, where `010` is 8, `yes` is true, `1:30` is 90 and a date is no text. Here numbers are decimal,
booleans are `true` and `false`, and everything else is text (YAML 1.2.2, section 10.3.2); octal and hexadecimal
numbers, which only some readers know, are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from spikefleet.errors import UserError

_LIMIT_BYTES = 1 << 20
_DEEPEST = 50
"""Largest number of sections inside one another."""

_TAG = "tag:yaml.org,2002:"
_REFUSED = _TAG + "octal-or-hexadecimal"
_NULL = re.compile(r"(?:~|null|Null|NULL|)")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))"
)
_OTHER_BASE = re.compile(r"[-+]?0(?:o[0-7]+|x[0-9a-fA-F]+)")
_KINDS = (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT))


def core_scalar(text: str) -> Any:
    """The value of a plain scalar: null, a boolean, a number or, verbatim, text.

    Raises:
        yaml.YAMLError: it is an octal or hexadecimal number, or an integer of thousands of digits.
    """
    word = text.strip()
    if _OTHER_BASE.fullmatch(word):
        raise yaml.YAMLError(f"{word} is octal or hexadecimal; write it in decimal, or in quotes if it is text")
    for kind, pattern in _KINDS:
        if pattern.fullmatch(word):
            return _value(kind, word)
    return text


def _value(kind: str, word: str) -> Any:
    try:
        return _VALUES[kind](word)
    except ValueError as error:  # Python reads no more than 4,300 digits
        raise yaml.YAMLError(f"a number of {len(word)} digits: {error}") from None


def _float(word: str) -> float:
    special = word.lower().lstrip("+-")
    if special in (".inf", ".nan"):
        return float(word.lower().replace(".", ""))
    return float(word)


_VALUES: dict[str, Callable[[str], Any]] = {
    "null": lambda word: None,
    "bool": lambda word: word.lower() == "true",
    "int": int,
    "float": _float,
}


class _CoreLoader(yaml.SafeLoader):
    """The safe loader by the core schema, which also rejects duplicate keys (the last one would win) and aliases."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 -- typed by PyYAML's base class
    yaml_constructors: ClassVar[dict[str | None, Callable[..., Any]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise self._error("aliases (*name) are not allowed", self.peek_event().start_mark)
        if self._depth >= _DEEPEST:
            raise self._error(f"more than {_DEEPEST} sections inside one another", self.peek_event().start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise self._error(f"key {str(key)[:80]!r} must be text; write it in quotes", key_node.start_mark)
            if key in found:
                raise self._error(f"key {key!r} is repeated", key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=deep)
        return found

    def construct_plain(self, node: yaml.ScalarNode) -> Any:
        """A scalar by the tag that it has or that its text resolves to."""
        kind, word = node.tag.removeprefix(_TAG), str(node.value)
        pattern = dict(_KINDS).get(kind)
        try:
            if node.tag == _REFUSED:
                return core_scalar(word)
            if pattern is None or not pattern.fullmatch(word):
                raise yaml.YAMLError(f"{word[:80]!r} is not of type {kind}")
            return _value(kind, word)
        except yaml.YAMLError as error:
            raise self._error(str(error), node.start_mark) from None

    def _error(self, what: str, mark: yaml.Mark | None) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, what, mark)


for _kind, _pattern in (*_KINDS, ("octal-or-hexadecimal", _OTHER_BASE)):
    _CoreLoader.add_implicit_resolver(_TAG + _kind, re.compile(f"^{_pattern.pattern}$"), None)
    _CoreLoader.yaml_constructors[_TAG + _kind] = _CoreLoader.construct_plain
_CoreLoader.yaml_constructors |= {
    _TAG + "str": yaml.SafeLoader.construct_yaml_str,
    _TAG + "seq": yaml.SafeLoader.construct_yaml_seq,
    _TAG + "map": yaml.SafeLoader.construct_yaml_map,
    None: yaml.SafeLoader.construct_undefined,
}


class _CoreDumper(yaml.SafeDumper):
    """Writes text that both YAML 1.1 and the core schema read back as it was."""


for _kind, _pattern in (("float", _FLOAT), ("octal-or-hexadecimal", _OTHER_BASE)):
    _CoreDumper.add_implicit_resolver(_TAG + _kind, re.compile(f"^{_pattern.pattern}$"), None)


def parse_yaml(text: str) -> Any:
    """Parses one document. Raises yaml.YAMLError, with the line."""
    try:
        loader = _CoreLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (ValueError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def dump_yaml(data: Any) -> str:
    """Plain data as a document that `parse_yaml` reads back, keys in their order."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True)


def parse_value(text: str) -> Any:
    """Parses the value of an override: JSON where it starts with `[`, `{` or `"`, else one plain scalar.

    There are no comments in it, and text is verbatim. Raises yaml.YAMLError if it is neither.
    """
    if not text.lstrip().startswith(("[", "{", '"')):
        return core_scalar(text)
    try:
        value = json.loads(text, object_pairs_hook=_without_repeated_keys, parse_constant=_no_constant)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:
        raise yaml.YAMLError(
            f"it is not valid JSON ({error}); lists and sections are JSON, texts in double quotes"
        ) from None
    if _depth(value) > _DEEPEST:
        raise yaml.YAMLError(f"more than {_DEEPEST} lists or sections inside one another")
    return value


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is repeated")
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number")


def _depth(value: Any) -> int:
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        one, depth = waiting.pop()
        deepest = max(deepest, depth)
        if isinstance(one, (list, dict)):
            waiting += [(inside, depth + 1) for inside in (one.values() if isinstance(one, dict) else one)]
    return deepest


def read_mapping(text: str, what: str, needs: str) -> dict[str, Any]:
    """Parses a YAML document that is a mapping.

    Args:
        text: the document.
        what: names it in error messages, such as "recipe digits".
        needs: its required keys, for the message about an empty document.

    Raises:
        UserError: the document is not valid YAML, or not a mapping.
    """
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what} must be a mapping with at least {needs}")
    return tree


def read_yaml_text(path: Path, what: str) -> str:
    """Reads the text of a YAML file.

    Args:
        path: the file.
        what: kind of file, for error messages, such as "recipe".

    Raises:
        UserError: the file does not exist, is larger than 1 MiB, or is not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{what} file {path} does not exist")
    try:
        if (size := path.stat().st_size) > _LIMIT_BYTES:
            raise UserError(f"{what} file {path} has {size} bytes; at most 1 MiB is allowed")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{what} file {path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{what} file {path} cannot be read: {error.strerror or error}") from None
