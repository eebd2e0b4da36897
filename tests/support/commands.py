"""Commands of the program given one after the other in one new process: a process costs seconds, a command does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PROGRAM = """
import json, sys
from typer.testing import CliRunner
from spikefleet.cli import app
said = []
for words, environment in json.load(sys.stdin):
    done = CliRunner(env={"COLUMNS": "200", **environment}).invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    said.append([done.exit_code, done.output])
json.dump(said, open("said.json", "w"))
"""


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
    """Gives commands in one process that is started in `folder` and can import what lies there.

    Args:
        then: Python code that the process executes when the commands are done; what it prints comes last.

    Returns:
        What each command said on both streams, and last what `then` printed.

    Raises:
        AssertionError: a command ended with another exit code.
    """
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM + then],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        input=json.dumps([[command.words, dict(command.environment)] for command in commands]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((folder / "said.json").read_text())
    assert len(said) == len(commands)
    for command, (code, text) in zip(commands, said, strict=True):
        assert code == command.code, f"{command.words}: exit code {code}\n{text}"
    return [text for _, text in said] + [done.stdout]
