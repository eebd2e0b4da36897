"""Names of commands and options are promises: none changes unnoticed.

After a change that is meant, write the list anew: `python tests/unit/test_frozen_commands.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer.main

from spikefleet.cli import app

FROZEN = Path(__file__).with_name("frozen_commands.txt")


def listed() -> list[str]:
    """A line for each command with its arguments and options."""
    return sorted(_lines(typer.main.get_command(app), ""))


def _lines(command: Any, name: str) -> list[str]:
    words = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            words.append(parameter.name.upper() + ("..." if parameter.nargs == -1 else ""))
        elif not parameter.hidden:
            words.append("/".join([*parameter.opts, *parameter.secondary_opts]))
    arguments = [word for word in words if not word.startswith("-")]
    line = " ".join(["spikefleet", *name.split(), *arguments, *sorted(set(words) - set(arguments))])
    below = getattr(command, "commands", {})
    return [line, *(found for key, one in below.items() for found in _lines(one, f"{name} {key}"))]


def test_commands_and_options_are_those_that_were_promised() -> None:
    assert listed() == FROZEN.read_text(encoding="utf-8").splitlines()


def test_the_list_notices_another_name() -> None:
    assert any(line.startswith("spikefleet spike-check NETWORK ") and "--images" in line for line in listed())
    assert not any("--pictures" in line for line in listed())


def test_every_command_that_opens_a_run_or_a_store_says_where_by_the_same_name() -> None:
    for line in listed():
        words = line.split()
        if words[1] in ("train", "evaluate", "spike-check", "energy", "gradients", "tune", "reproduce"):
            assert {"--runs-dir", "--stores-dir"} <= set(words), line
        if words[1] in ("predict", "registry", "tracking", "doctor", "ui") and len(words) > 4:
            assert "--runs-dir" in words, line
        if words[1:3] in (["data", "prepare"], ["data", "show"]):
            assert "--stores-dir" in words, line


if __name__ == "__main__":
    FROZEN.write_text("\n".join(listed()) + "\n", encoding="utf-8")
