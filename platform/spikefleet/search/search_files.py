"""Search files in YAML: those of the package by name, others by path."""

from __future__ import annotations

from pathlib import Path

from spikefleet.config.recipes import list_recipes
from spikefleet.config.strict_yaml import read_mapping, read_yaml_text
from spikefleet.errors import UserError
from spikefleet.search.costs import COSTS
from spikefleet_tune.errors import SearchError
from spikefleet_tune.messages import nearest
from spikefleet_tune.search_file import Search, search_of, search_text
from spikefleet_tune.search_file import list_searches as all_searches


def list_searches() -> list[str]:
    """Names of the searches that come with the package, but for those whose recipe is still to come."""
    recipes = set(list_recipes())
    return [name for name in all_searches() if _recipe_of(name) in recipes]


def _recipe_of(search: str) -> object:
    return read_mapping(search_text(search), f"search {search}", "recipe").get("recipe")


def load_search(search: str) -> Search:
    """Loads a search.

    Args:
        search: a name in the package, or the path of a YAML file.

    Raises:
        UserError: the search does not exist, or is invalid (one message for each field).
    """
    path = Path(search)
    if path.suffix not in (".yaml", ".yml") and search not in all_searches():
        raise UserError(f"search {search!r} does not exist; {nearest(search, list_searches())}")
    try:
        text = read_yaml_text(path, "search") if path.suffix in (".yaml", ".yml") else search_text(search)
    except SearchError as error:
        raise UserError(str(error)) from None
    return parse_search(text, f"search {search}")


def objectives_of(text: str) -> dict[str, str]:
    """Objectives as the command line has them: `top1,energy_mj,latency_ms`, or with a direction `map50:max`.

    A name without a split is a metric of validation, but for the costs of a trial; those are better the smaller they
    are, and metrics the larger. Raises UserError.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        name, colon, direction = part.strip().partition(":")
        if not name or (colon and direction not in ("min", "max")):
            raise UserError(
                f"--objectives {text!r}: {part.strip()!r} must be the name of a metric, maybe with :min or :max, "
                "such as top1,energy_mj,latency_ms"
            )
        key = name if name in COSTS or "/" in name else f"val/{name}"
        if key in found:
            raise UserError(f"--objectives {text!r} names {key} twice; leave one out")
        found[key] = direction or ("min" if key in COSTS else "max")
    return found


def parse_search(text: str, origin: str = "search") -> Search:
    """Parses the YAML text of a search. Raises UserError with one message for each invalid field."""
    tree = read_mapping(text, origin, "recipe, space, objectives and budget")
    try:
        return search_of(tree, origin)
    except SearchError as error:
        raise UserError(str(error)) from None
