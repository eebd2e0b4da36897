"""Searches as YAML files: those that come with spikefleet, by name, and others by path."""

from __future__ import annotations

from pathlib import Path

from spikefleet.config.strict_yaml import read_mapping, read_yaml_text
from spikefleet.errors import UserError
from spikefleet_tune.errors import SearchError
from spikefleet_tune.search_file import Search, search_of, search_text


def load_search(search: str) -> Search:
    """A search by its name in the package, or by the path of its YAML file.

    Raises:
        UserError: there is none, or something in it is wrong: a sentence for each thing.
    """
    path = Path(search)
    try:
        text = read_yaml_text(path, "search") if path.suffix in (".yaml", ".yml") else search_text(search)
    except SearchError as error:
        raise UserError(str(error)) from None
    return parse_search(text, f"search {search}")


def parse_search(text: str, origin: str = "search") -> Search:
    """Reads a search. Raises UserError with one sentence for each thing that is wrong."""
    tree = read_mapping(text, origin, "recipe, space, objectives and budget")
    try:
        return search_of(tree, origin)
    except SearchError as error:
        raise UserError(str(error)) from None
