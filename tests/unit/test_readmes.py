"""Each command that a README shows is one that the program takes: words, options, recipes, searches and overrides."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from spikefleet.cli import app
from spikefleet.cli.inspection import _untrained
from spikefleet.cli.submissions import checked
from spikefleet.config.recipes import list_recipes, load_config, parse_overrides
from spikefleet.errors import UserError
from spikefleet.reproduction.table import list_tables, load_table
from spikefleet.search.search_files import load_search
from spikefleet_tune.search_file import list_searches

ROOT = Path(__file__).parents[2]
READMES = sorted([ROOT / "README.md", *ROOT.glob("*/README.md")])
HEADERS = sorted(
    path
    for folder in ("platform/spikefleet/recipes", "tune/spikefleet_tune/searches")
    for path in (ROOT / folder).glob("*.yaml")
)
FENCED = re.compile(r"^```.*?$(.*?)^```", re.MULTILINE | re.DOTALL)
UsageError: Any = typer.BadParameter.__base__
"""click's, which typer brings along."""
COMMAND = re.compile(r"^(?:uv run )?spikefleet (.*)$")


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command: in fenced blocks, in backticks, and in the headers of recipes and searches."""
    lines = "\n".join(FENCED.findall(text)).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(spikefleet [^`]+)`", FENCED.sub("", text))
    headers = (line.removeprefix("# command:") for line in text.splitlines() if line.startswith("# command:"))
    lines += [header.partition(" (and")[0] for header in headers]
    for line in lines:
        if found := COMMAND.match(line.strip()):
            yield shlex.split(found[1].removesuffix(" &"), comments=True)


def parsed(command: Any, words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that words name, and its parameters. Raises click's UsageError."""
    context = command.make_context(command.name, list(words))
    if not hasattr(command, "resolve_command"):
        return command.name, context.params
    _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    return parsed(inner, rest)


def check(words: list[str]) -> None:
    """Raises whatever the program would, before it does anything."""
    name, given = parsed(typer.main.get_command(app), words)
    overrides = [one.replace("=N", "=0") for one in given.get("overrides") or [] if one not in ("key=value", "...")]
    if name == "energy" and given["rate"] is not None:
        assert given["size"] is not None
        _untrained(given["network"], overrides)
    if name == "submit":
        checked(given["command"], None)
    recipes = [given["recipe"]] if given.get("recipe") not in (None, "RECIPE") else []
    if name == "gradients" and given["network"] in list_recipes():
        recipes = [given["network"]]
    if name == "tune" and given["search"] != "SEARCH":
        recipes = [load_search(given["search"]).recipe]
    if name == "reproduce" and given["table"] != "TABLE":
        table = load_table(given["table"])
        assert list(table.entries(given["only"]))
        chosen = table.scale(given["scale"])
        recipes = [scale.recipe for group in table.groups for at, scale in group.scales.items() if at == chosen]
        assert recipes
    for recipe in set(recipes):
        load_config(recipe, parse_overrides(overrides))


@pytest.mark.parametrize("path", [*READMES, *HEADERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_ones_that_the_program_takes(path: Path) -> None:
    for words in commands_of(path.read_text()):
        check(words)


def test_readmes_and_headers_show_commands() -> None:
    assert sum(any(commands_of(path.read_text())) for path in READMES) >= 4
    assert all(any(commands_of(path.read_text())) for path in HEADERS)


@pytest.mark.parametrize(
    "words",
    [
        "trian digits",
        "submit train digits --worker 2 --address http://HEAD:8265",
        "submit predict digits --address http://HEAD:8265",
        "train digits --worker 2",
        "train digit",
        "train digits optim.lrr=1",
        "train gen1_spike_yolo_s data.transform.windows=50ms",
        "tune digits_t_gate_schedules",
        "gradients digits model.gate_gradients=exact",
        "tune digits_t_gate_schedule optim.lrr=1",
        "reproduce sg_resnet_table2",
        "reproduce sg_resnet_table9 --only VGG",
        "reproduce sg_resnet_table9 optim.lrr=1",
        "energy cifar10_sg_resnet81 --rate 0.1 --size 32",
        "energy sg_resnet18 model.timestep=2 --rate 0.1 --size 32",
        "energy sg_resnet18 --rate 0.1",
    ],
)
def test_a_wrong_command_is_found(words: str) -> None:
    with pytest.raises((UserError, UsageError, AssertionError)):
        check(words.split())


def test_tables_and_searches_name_recipes_that_exist() -> None:
    known = list_recipes()
    for name in list_searches():
        assert load_search(name).recipe in known, name
    for name in list_tables():
        for group in load_table(name).groups:
            assert {scale.recipe for scale in group.scales.values()} <= set(known), name
