"""Searches as YAML files: those that come with spikefleet, by name, and others by path."""

from __future__ import annotations

from pathlib import Path

import yaml

from spikefleet.config.strict_yaml import parse_yaml
from spikefleet.errors import UserError
from spikefleet_tune.errors import SearchError
from spikefleet_tune.search_file import Search, search_of, search_text

_LIMIT_BYTES = 1 << 20


def load_search(search: str) -> Search:
    """A search by its name in the package, or by the path of its YAML file.

    Raises UserError when there is none, or with one sentence for each thing that is wrong in it.
    """
    path = Path(search)
    if path.suffix not in (".yaml", ".yml"):
        try:
            return parse_search(search_text(search), f"search {search}")
        except SearchError as error:
            raise UserError(str(error)) from None
    return parse_search(_read(path), f"search {search}")


def parse_search(text: str, origin: str = "search") -> Search:
    """Reads a search. Raises UserError with one sentence for each thing that is wrong."""
    try:
        tree = parse_yaml(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # a date that is none, a list as a key
        raise UserError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{origin} is empty or no mapping; it needs at least recipe, space, objectives and budget")
    try:
        return search_of(tree, origin)
    except SearchError as error:
        raise UserError(str(error)) from None


def _read(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"search file {path} does not exist")
    try:
        if (size := path.stat().st_size) > _LIMIT_BYTES:
            raise UserError(f"search file {path} has {size} bytes; a search has at most 1 MiB")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"search file {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"search file {path} cannot be read: {error.strerror or error}") from None
