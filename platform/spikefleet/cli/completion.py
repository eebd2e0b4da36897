"""What the shell is offered when a word is completed: names of what there is, without loading a heavy library."""

from __future__ import annotations

import io
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import typer

from spikefleet.errors import UserError

_REGISTRY_PATIENCE_S = 0.2
_BREAKS = frozenset(":=@")
"""Characters at which bash (COMP_WORDBREAKS) takes a word apart before it asks."""

VARIABLE = "_SPIKEFLEET_COMPLETE"


def recipe_names(incomplete: str) -> list[str]:
    """Recipes that come with the package."""
    from spikefleet.config.recipes import list_recipes

    return _beginning(list_recipes(), incomplete)


def search_names(incomplete: str) -> list[str]:
    """Searches that come with the package."""
    from spikefleet.search.search_files import list_searches

    return _beginning(list_searches(), incomplete)


def table_names(incomplete: str) -> list[str]:
    """Papers' tables that come with the package."""
    from spikefleet.reproduction.table import list_tables

    return _beginning(list_tables(), incomplete)


def source_names(incomplete: str) -> list[tuple[str, str]]:
    """Data sources, each with its description."""
    from spikefleet_pipelines.sources import list_sources

    return [(name, about) for name, about in list_sources().items() if name.startswith(incomplete)]


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Runs in --runs-dir."""
    return _beginning(sorted(path.parent.name for path in _runs_dir(ctx).glob("*/run.json")), incomplete)


def store_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Stores in --stores-dir."""
    folder = Path(ctx.params.get("stores_dir") or "stores")
    return _beginning(sorted(path.parent.name for path in folder.glob("*/manifest.json")), incomplete)


def model_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Registered models of a local registry."""
    return _beginning(list(dict.fromkeys(name for name, _, _ in _registered(_runs_dir(ctx)))), incomplete)


def version_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Registered versions of a local registry: NAME@ALIAS and NAME/VERSION."""
    prefix = "models:/" if incomplete.startswith("models:/") else ""
    return _beginning(_references(_runs_dir(ctx), prefix), incomplete)


def network_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """What opens a trained network: registered versions and runs."""
    return [*_beginning(_references(_runs_dir(ctx), "models:/"), incomplete), *run_names(ctx, incomplete)]


def trained_or_not(ctx: typer.Context, incomplete: str) -> list[str]:
    """Recipes and runs."""
    return [*recipe_names(incomplete), *run_names(ctx, incomplete)]


def override_keys(ctx: typer.Context, incomplete: str) -> list[str]:
    """Dotted keys of the configuration that the line names; a single one with the value that it has."""
    return _keys(incomplete, lambda: _recipe_of(ctx), ctx.params.get("overrides") or ())


def _keys(incomplete: str, recipe: Callable[[], str], before: Sequence[str]) -> list[str]:
    from spikefleet.config.recipes import load_config, parse_overrides
    from spikefleet.config.schema import leaves

    try:
        name = recipe()
        try:
            config = load_config(name, parse_overrides(before))
        except UserError:  # an override before is not finished
            config = load_config(name)
    except (UserError, ValueError, KeyError):
        return []
    found = {key: value for key, value in leaves(config.dump()) if f"{key}=".startswith(incomplete.partition("=")[0])}
    if len(found) > 1 and incomplete.endswith("="):
        found = {key: value for key, value in found.items() if f"{key}=" == incomplete}
    keys = [f"{key}=" for key in found]
    if len(found) == 1:  # a second candidate keeps the shell from ending the word
        ((key, value),) = found.items()
        keys.append(f"{key}={_plain(value)}")
    return _beginning(keys, incomplete)


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace(" ", "")


def _recipe_of(ctx: typer.Context) -> str:
    """The recipe whose keys an override of this command names."""
    given = ctx.params
    if search := given.get("search"):
        from spikefleet.search.search_files import load_search

        return load_search(search).recipe
    if table := given.get("table"):
        from spikefleet.reproduction.table import load_table

        scales = load_table(table).groups[0].scales
        wanted = [name for name in scales if name == given.get("scale")]
        return scales[(wanted or list(scales))[0]].recipe
    return str(given.get("recipe") or given.get("network") or "")


def _runs_dir(ctx: typer.Context) -> Path:
    return Path(ctx.params.get("runs_dir") or os.environ.get("SPIKEFLEET_RUNS") or "runs")


def _references(runs_dir: Path, prefix: str) -> list[str]:
    found = _registered(runs_dir)
    aliases = [f"{prefix}{name}@{alias}" for name, _, alias in found if alias]
    versions = dict.fromkeys(f"{prefix}{name}/{version}" for name, version, _ in found)
    return [*aliases, *versions]


def _registered(runs_dir: Path) -> list[tuple[str, int, str | None]]:
    """Name, version and alias of what spikefleet registered in a local SQLite registry; nothing where it is a server.

    Read-only and by SQLite alone: MLflow takes seconds to import, and a key is waited for.
    """
    from spikefleet.registry.version import CONTENT_HASH
    from spikefleet.tracking.database import database_path

    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    path = database_path(uri) if uri else runs_dir / "mlflow.db"
    if path is None:
        return []
    deadline = time.monotonic() + _REGISTRY_PATIENCE_S
    query = (
        "SELECT v.name, v.version, a.alias FROM model_versions v "
        "JOIN model_version_tags t ON t.name = v.name AND t.version = v.version AND t.key = ? "
        "LEFT JOIN registered_model_aliases a ON a.name = v.name AND a.version = v.version "
        "ORDER BY v.name, v.version DESC"
    )
    with (
        suppress(sqlite3.Error, OSError),
        closing(
            sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=_REGISTRY_PATIENCE_S / 2)
        ) as database,
    ):
        database.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
        return [(name, int(version), alias) for name, version, alias in database.execute(query, (CONTENT_HASH,))]
    return []


def _beginning(names: Sequence[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


# ------------------------------------------------------------------------------------------------ bash


def answer_bash(app: Callable[[], object]) -> None:
    """Answers bash, which takes `models:/NAME@champion` and `key=value` apart and wants the last part alone.

    Words are put together again for the application, and what stands before the part that bash asks for is taken off
    its answers.
    """
    words = os.environ.get("COMP_WORDS", "").split("\n")
    with suppress(ValueError):
        whole, position, before = joined(words, int(os.environ.get("COMP_CWORD", "")))
        os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(whole), str(position)
        answers = io.StringIO()
        with redirect_stdout(answers), suppress(SystemExit):
            app()
        sys.stdout.writelines(f"{line.removeprefix(before)}\n" for line in answers.getvalue().splitlines())
        return
    app()


def joined(words: Sequence[str], position: int) -> tuple[list[str], int, str]:
    """Words that bash took apart at `:`, `=` and `@`, put together.

    Args:
        words: as in COMP_WORDS.
        position: of the word that is completed.

    Returns:
        the words; the position among them; what of the word stands before the part that bash asks for.
    """
    whole: list[str] = []
    place, before, glue = position, "", False
    for index, word in enumerate([*words, ""] if position == len(words) else words):
        breaks = bool(word) and set(word) <= _BREAKS
        joins = len(whole) > 1 and (glue or breaks) and (bool(word) or index == position)
        start = whole.pop() if joins else ""
        whole.append(start + word)
        glue = breaks
        if index == position:
            place, before = len(whole) - 1, start + word if breaks else start
    return whole, place, before
