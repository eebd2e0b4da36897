"""The files of `submit --with-code`: a copy of a directory without what no job needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from spikefleet.errors import UserError
from spikefleet.status import Announce, silent

MOST_BYTES = 50_000_000
"""Size of the files of a job: more belongs into an image or onto the cluster's storage."""

_MADE = frozenset({"venv", "__pycache__", "node_modules"})
"""Directories, at any depth, whose files are made by programs."""
_OUTPUTS = frozenset({"data", "runs", "stores", "mlruns"})
"""Directories at the top that are too large to be sent."""
_SHOWN = 3
_NAMED = 5


@contextmanager
def packed(folder: Path, say: Announce = silent) -> Iterator[Path]:
    """A copy of the files of a directory that a job gets, for the length of the block.

    All files that git tracks, also in submodules. Of the others, those that git does not ignore and that are not
    hidden; environments, and data, runs and stores at the top, are left out. A symbolic link to a file that is sent is
    sent as that file.

    Args:
        folder: the directory.
        say: gets a sentence with what is left out.

    Raises:
        UserError: there is no such directory, it has no files, or more than 50 MB.
    """
    if not folder.is_dir():
        raise UserError(f"--with-code {str(folder)!r} is no directory; give the one that holds the code")
    sent, left_out = _files(folder)
    files = {path: (folder / path).stat().st_size for path in sent}
    if not files:
        raise UserError(
            f"--with-code {str(folder)!r} has no files to send; {_listed(left_out) or 'nothing'} is left out"
        )
    if left_out:
        say(f"--with-code: {len(files)} files are sent; left out: {_listed(left_out)}")
    if (total := sum(files.values())) > MOST_BYTES:
        largest = sorted(files.items(), key=lambda item: -item[1])[:_SHOWN]
        shown = ", ".join(f"{path} ({size / 1e6:.0f} MB)" for path, size in largest)
        raise UserError(
            f"--with-code {str(folder)!r} has {total / 1e6:.0f} MB, and {MOST_BYTES / 1e6:.0f} are allowed; the "
            f"largest files are {shown}; put data on the cluster's storage, or give a directory with code alone"
        )
    with tempfile.TemporaryDirectory(prefix="spikefleet-code-") as copy:
        for path in files:
            target = Path(copy) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / path, target)
        yield Path(copy)


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Relative paths of the files that are sent; of the files and directories that are left out."""
    tracked = _listed_by_git(folder, "--cached", "--recurse-submodules")
    if tracked is None:
        tracked, others = [], _below(folder)
    else:
        others = _listed_by_git(folder, "--others", "--exclude-standard") or []
    unwanted = [_unwanted(path) for path in others]
    wanted = [*tracked, *(path for path, part in zip(others, unwanted, strict=True) if part is None)]
    files = {path for path in wanted if (folder / path).is_file() and not (folder / path).is_symlink()}
    links = {path for path in wanted if (folder / path).is_symlink() and _target(folder, path) in files}
    # Links to elsewhere, submodules that are not checked out; not what git tracks and is deleted.
    strange = {path for path in wanted if path not in files | links and os.path.lexists(folder / path)}
    return sorted(files | links), sorted({*(part for part in unwanted if part is not None), *strange})


def _below(folder: Path) -> list[Path]:
    """Relative paths of all files and links below a directory."""
    paths = folder.rglob("*")
    return [path.relative_to(folder) for path in paths if path.is_symlink() or not path.is_dir()]


def _unwanted(path: Path) -> Path | None:
    """The file, or the directory with it, that is left out unless git tracks it; None if it is sent."""
    for number, part in enumerate(path.parts):
        is_directory = number + 1 < len(path.parts)
        made = is_directory and (part in _MADE or (number == 0 and part in _OUTPUTS))
        if part.startswith(".") or made:
            return Path(*path.parts[: number + 1])
    return None


def _target(folder: Path, link: Path) -> Path | None:
    """Relative path of what a link leads to; None if it is outside of the directory, or a loop."""
    try:
        return (folder / link).resolve(strict=True).relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        return None


def _listed(paths: Sequence[Path]) -> str:
    named = [str(path) for path in paths[:_NAMED]]
    return ", ".join([*named, *([f"{len(paths) - _NAMED} more"] if len(paths) > _NAMED else [])])


def _listed_by_git(folder: Path, *which: str) -> list[Path] | None:
    """Files of a repository, relative to the directory; None where there is no repository."""
    words = ["git", "-C", str(folder), "ls-files", "-z", *which]
    try:
        listed = subprocess.run(words, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [Path(name.decode(errors="surrogateescape")) for name in listed.split(b"\0") if name]
