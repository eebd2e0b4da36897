"""How commands speak: results on stdout; progress on stderr, but for trainings, whose log it is."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from spikefleet.errors import UserError
from spikefleet.status import Announce, print_line, waiting

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
    json.dump(data, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


@contextmanager
def writing(out: Path | None) -> Iterator[None]:
    """Around the work whose result goes to --out: a place where nothing can be written is refused before the work.

    Raises:
        UserError: `out` cannot be written, now or when the block writes it.
    """
    if out is not None:
        place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        if place != out.absolute() and not place.is_dir():
            raise UserError(f"--out {out} cannot be written: {place} is not a directory; choose another place")
        if not os.access(place, os.W_OK):
            raise UserError(f"--out {out} cannot be written: {place} is read-only; choose another place")
    try:
        yield
    except OSError as error:
        if out is None or not _lies_at(error.filename, out):
            raise
        raise UserError(f"--out {out} cannot be written: {error.strerror}; choose another place") from None


def _lies_at(name: object, out: Path) -> bool:
    """Whether a file is `out`, beside it (a temporary one) or in it."""
    folder = out.absolute().parent
    return isinstance(name, str | os.PathLike) and folder in (path := Path(name).absolute(), *path.parents)


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
