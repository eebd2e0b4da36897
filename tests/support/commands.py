"""Commands of the program given one after the other in one process, which is forked with what they import."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.forked import Forked

_LONGEST_S = 280.0


@dataclass(frozen=True)
class Command:
    """What is typed after `spikefleet`, the exit code that it should have, and variables that are set for it alone."""

    words: tuple[str, ...]
    code: int = 0
    environment: tuple[tuple[str, str], ...] = ()


def give(*words: str, code: int = 0, **environment: str) -> Command:
    """A command, for `run_commands`."""
    return Command(words, code, tuple(environment.items()))


def run_commands(folder: Path, commands: Sequence[Command], then: str = "") -> list[str]:
    """Gives commands in one process that works in `folder` and can import what lies there.

    Args:
        then: Python code that the process executes when the commands are done; what it prints comes last.

    Returns:
        What each command said on both streams, and last what `then` printed.

    Raises:
        AssertionError: a command ended with another exit code.
    """
    (folder / "printed.txt").unlink(missing_ok=True)
    process = Forked(folder / "printed.txt", _give, folder, commands, then, dict(os.environ))
    printed = process.wait(_LONGEST_S)
    assert process.returncode == 0, printed
    said = json.loads((folder / "said.json").read_text())
    assert len(said) == len(commands)
    for command, (code, text) in zip(commands, said, strict=True):
        assert code == command.code, f"{command.words}: exit code {code}\n{text}"
    return [text for _, text in said] + [printed]


def _give(folder: Path, commands: Sequence[Command], then: str, variables: dict[str, str]) -> None:
    from typer.testing import CliRunner

    from spikefleet.cli import app

    os.environ.clear()
    os.environ.update(variables)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), variables.get("PYTHONPATH")]))
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    said = []
    for command in commands:
        done = CliRunner(env={"COLUMNS": "200", **dict(command.environment)}).invoke(app, command.words)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        said.append([done.exit_code, done.output])
    Path("said.json").write_text(json.dumps(said))
    exec(then, {"__name__": "__main__"})
