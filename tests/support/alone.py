"""Runs `fenced.py`: versions served by what their requirements name."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from packaging.requirements import Requirement

from support import fenced


def closure(requirements: Sequence[str]) -> set[str]:
    """Names of the installed distributions that requirements need, with all that those need."""
    waiting = [Requirement(line) for line in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            if (wanted.name.lower(), extra) in seen:
                continue
            seen.add((wanted.name.lower(), extra))
            for line in metadata.requires(wanted.name) or ():
                inner = Requirement(line)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    waiting.append(inner)
    return {name for name, _ in seen}


def top_levels(distributions: set[str]) -> set[str]:
    """The packages and modules that distributions install."""
    names = set()
    for one in distributions:
        for file in metadata.files(one) or ():
            first = file.parts[0]
            if len(file.parts) > 1 and first.isidentifier():
                names.add(first)
            elif first.endswith((".py", ".so")):
                names.add(first.partition(".")[0])
    return names


@dataclass(frozen=True)
class Alone:
    """A process that serves."""

    refused: list[str]
    answers: dict[str, Any]
    form: str
    """Of spiking units."""
    _ports: dict[str, int]
    _process: subprocess.Popen[str]

    def ask(self, name: str, images: Any) -> Any:
        """The answer to a POST of images as JSON."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._ports[name]}/invocations",
            json.dumps({"inputs": images}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["predictions"]

    def imported(self) -> dict[str, str | None]:
        """Ends the process; the file of each module that it imported."""
        out, _ = self._process.communicate(timeout=60)
        modules: dict[str, str | None] = json.loads(out)
        return modules


@contextmanager
def alone(folder: Path, requirements: Sequence[str], **request: Any) -> Iterator[Alone]:
    """A process that can import the standard library and what requirements need; see `fenced.py`."""
    admitted = sorted(top_levels(closure(requirements)))
    (folder / "request.json").write_text(json.dumps({"admitted": admitted, **request}))
    command = [sys.executable, "-I", fenced.__file__, str(folder / "request.json")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=folder) as process:
        try:
            assert process.stdout is not None
            yield _started(process, process.stdout)
        finally:
            process.kill()


def _started(process: subprocess.Popen[str], out: IO[str]) -> Alone:
    line = out.readline()
    assert line, "the process failed; its standard error says why"
    said = json.loads(line)
    return Alone(said["refused"], said["answers"], said["form"], said["ports"], process)
