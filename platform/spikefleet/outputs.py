"""Where commands may write: never over an input, and over a file that exists only if the user says so."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from spikefleet.errors import UserError

_RUN = "run.json"
_CHECKPOINTS = "checkpoints"
_LONGEST_NAME = 200
"""Bytes of a file's name: the 255 that file systems allow, less what a file has in addition while it is written."""


def check_outputs(
    outputs: Iterable[Path], *, inputs: Iterable[Path] = (), force: bool = False, option: str = "--out"
) -> None:
    """Checks the files that a command is about to write, before it does any work.

    A file in a run's own directory may be replaced, except for checkpoints.

    Args:
        outputs: the files.
        inputs: files that the command reads, and directories of which it reads files.
        force: other files that exist may be replaced.
        option: that names the place, for messages.

    Raises:
        UserError: an output is an input or exists, has a name that is too long, or a directory is where a file should
            be, or the reverse.
    """
    read = {path.resolve() for path in inputs}
    files = {(status.st_dev, status.st_ino) for path in read if path.is_file() for status in (path.stat(),)}
    for path in outputs:
        if (length := len(os.fsencode(path.name))) > _LONGEST_NAME:
            raise UserError(
                f"{option} {str(path)[:100]}... has a name of {length} bytes, expected at most {_LONGEST_NAME}; give a "
                "shorter one"
            )
        place = path.resolve()
        same = place.exists() and (place.stat().st_dev, place.stat().st_ino) in files
        if same or place in read or any(folder in read for folder in place.parents):
            raise UserError(f"{option} {path} would overwrite what the command reads; give another place")
        if blocking := next((folder for folder in place.parents if folder.exists() and not folder.is_dir()), None):
            raise UserError(f"{option} {path}: {blocking} is a file, and not a directory; give another place")
        if place.is_dir():
            raise UserError(f"{option} {path} is a directory; give the path of a file")
        if place.exists() and not force and not _in_run(place):
            raise UserError(f"{option} {path} exists; give another place, or --force to replace it")


def _in_run(path: Path) -> bool:
    """Whether a file lies in the directory of a run, and not among its checkpoints."""
    for folder in path.parents:
        if (folder / _RUN).is_file():
            return path.relative_to(folder).parts[0] != _CHECKPOINTS
    return False
