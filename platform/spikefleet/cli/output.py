"""How commands speak: results on stdout; progress on stderr, but for trainings, whose log it is."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from spikefleet.status import STEERING, Announce, print_line, waiting

console = Console()
stderr = Console(stderr=True)


def messages(as_json: bool) -> Console:
    """Where the log of a training goes: beside JSON, stderr."""
    return stderr if as_json else console


def say(text: str) -> None:
    """Prints a line on stdout as it is: neither wrapped nor read as markup."""
    print_line(console, text)


def print_json(data: Any) -> None:
    """Prints JSON on stdout, and nothing else."""
    _write_json(json.dumps(data, indent=2, ensure_ascii=False))


def print_json_line(data: Any) -> None:
    """Prints JSON on one line of stdout, at once."""
    _write_json(json.dumps(data, ensure_ascii=False))
    sys.stdout.flush()


def _write_json(text: str) -> None:
    """Writes JSON with what steers a terminal, or is no Unicode, as the escapes that JSON has for it."""
    sys.stdout.write(STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


@contextmanager
def loading(what: str, where: Console = console) -> Iterator[Announce]:
    """Names a library that takes seconds to import, and pauses the garbage collector while it is imported.

    An import makes a million objects that stay; collecting among them takes a quarter of its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with waiting(where, f"loading {what}") as announce:
            yield announce
    finally:
        if enabled:
            gc.enable()
