"""Where commands may write: never over an input, and over a file that exists only if the user says so."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from spikefleet.disks import disk_problem, path_problem
from spikefleet.errors import UserError

_RUN = "run.json"
_CHECKPOINTS = "checkpoints"
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")
"""As it is left of a URI in a `Path`, which keeps one slash."""
_REMEDIES = {
    "--runs-dir": "a run needs locks and a database; set it to a local directory, and checkpoint.mirror={} to keep "
    "checkpoints and report there, from which the run resumes",
    "--stores-dir": "set it to a local directory; a store at a URI is read by data.store={}/NAME",
}


def refuse_uri(path: Path, option: str) -> None:
    """Raises UserError for a URI where files are written or kept: a directory `s3:` would be made of it.

    Args:
        path: as given.
        option: that holds it.
    """
    if found := _URI.fullmatch(str(path)):
        uri = f"{found[1]}://{found[2]}"
        remedy = _REMEDIES.get(option, "set it to a local path, and copy from there").format(uri.rstrip("/"))
        raise UserError(f"{option} {uri} is no directory of this machine: {remedy}")


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
        UserError: an output is an input, exists or cannot be written, or a directory is where a file should be, or the
            reverse.
    """
    read = set(_readable(inputs))
    files = {(status.st_dev, status.st_ino) for path in read if path.is_file() for status in (path.stat(),)}
    for path in outputs:
        place = _resolved(path, option)
        same = place.exists() and (place.stat().st_dev, place.stat().st_ino) in files
        if same or place in read or any(folder in read for folder in place.parents):
            raise UserError(f"{option} {path} would overwrite what the command reads; give another place")
        if blocking := next((folder for folder in place.parents if folder.exists() and not folder.is_dir()), None):
            raise UserError(f"{option} {path}: {blocking} is a file, and not a directory; give another place")
        if place.is_dir():
            raise UserError(f"{option} {path} is a directory; give the path of a file")
        if place.exists() and not force and not _in_run(place):
            raise UserError(f"{option} {path} exists; give another place, or --force to replace it")
        _try_to_write(path, place.parent, option)


def check_output_folder(folder: Path, option: str, *, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """Checks a directory of files whose names are not known before the work is done.

    Args:
        folder: the directory.
        option: that names it, for messages.
        inputs: files that the command reads, and directories of which it reads files.
        force: the directory may hold files, which may be replaced.

    Raises:
        UserError: it holds files, an input lies in it, it lies in an input, or it cannot be written.
    """
    place = _resolved(folder, option)
    read = set(_readable(inputs))
    if any(path == place or place in path.parents or path in place.parents for path in read):
        raise UserError(f"{option} {folder} is where the command reads files; give another place")
    if place.is_dir() and not force and any(place.iterdir()):
        raise UserError(f"{option} {folder} is not empty; give another place, or --force to add to it")
    check_place(folder, option)


def check_place(path: Path, option: str) -> None:
    """Checks that files can be created in a directory, or in one that is to be created, before any work is done.

    Args:
        path: the directory.
        option: that names it, for messages.

    Raises:
        UserError: the directory cannot be written or created, or libraries cannot open it.
    """
    place = _resolved(path, option)
    try:
        str(place).encode()
    except UnicodeEncodeError:
        raise UserError(f"{option} {path} is no UTF-8, which libraries cannot open; rename it") from None
    _try_to_write(path, place, option)


def _readable(inputs: Iterable[Path]) -> Iterator[Path]:
    """Inputs by their real places, without those that cannot be read, such as a loop of links: who reads names them."""
    for path in inputs:
        with suppress(OSError, RuntimeError, ValueError):
            place = path.resolve()
            place.exists()
            yield place


def _resolved(path: Path, option: str) -> Path:
    refuse_uri(path, option)
    try:
        place = path.resolve()
        place.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{option}: {path_problem(error, path) or error}") from None
    return place


def _try_to_write(path: Path, folder: Path, option: str) -> None:
    """Creates and removes a file in the directory, or in the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{option} {path}: {folder} is a file, and not a directory; give another place")
    try:
        descriptor, name = tempfile.mkstemp(prefix=".spikefleet-", dir=folder)
        os.close(descriptor)
        Path(name).unlink()
    except OSError as error:
        reason = disk_problem(error, path)
        reason = reason or f"{path} cannot be written: {error.strerror} in {folder}; give another place"
        raise UserError(f"{option}: {reason}") from None


def _in_run(path: Path) -> bool:
    """Whether a file lies in the directory of a run, and not among its checkpoints."""
    for folder in path.parents:
        if (folder / _RUN).is_file():
            return path.relative_to(folder).parts[0] != _CHECKPOINTS
    return False
