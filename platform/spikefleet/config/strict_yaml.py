"""Strict YAML for recipes, searches and overrides: plain data, no duplicate keys, no aliases."""

from pathlib import Path
from typing import Any

import yaml

from spikefleet.errors import UserError

_LIMIT_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which also rejects duplicate keys (the last one would win silently) and aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is repeated", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parses one document. Raises yaml.YAMLError, also for an invalid date or a key that is a list."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except (ValueError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


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
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{what} file {path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{what} file {path} cannot be read: {error.strerror or error}") from None
