"""The files of `submit --with-code`: a copy of a directory without what no job needs."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spikefleet.errors import UserError

MOST_BYTES = 50_000_000
"""Size of the files of a job: more belongs into an image or onto the cluster's storage."""

_LEFT_OUT = frozenset({".git", ".venv", "venv", "__pycache__", "data", "runs", "stores", "mlruns", "node_modules"})
_SHOWN = 3


@contextmanager
def packed(folder: Path) -> Iterator[Path]:
    """A copy of the files of a directory that a job gets, for the length of the block.

    Of a git repository, the files that git does not ignore; data, runs, stores and environments are left out.

    Raises:
        UserError: there is no such directory, it has no files, or more than 50 MB.
    """
    if not folder.is_dir():
        raise UserError(f"--with-code {str(folder)!r} is no directory; give the one that holds the code")
    files = {path: (folder / path).stat().st_size for path in _files(folder)}
    if not files:
        raise UserError(
            f"--with-code {str(folder)!r} has no files to send; {', '.join(sorted(_LEFT_OUT))} are left out"
        )
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


def _files(folder: Path) -> list[Path]:
    """Relative paths of the files that are sent."""
    tracked = _not_ignored(folder)
    paths = tracked if tracked is not None else [path.relative_to(folder) for path in folder.rglob("*")]
    kept = (path for path in paths if not _LEFT_OUT.intersection(path.parts))
    return sorted(path for path in kept if (folder / path).is_file() and not (folder / path).is_symlink())


def _not_ignored(folder: Path) -> list[Path] | None:
    """What git does not ignore; None where there is no repository."""
    words = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(words, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [Path(name.decode(errors="surrogateescape")) for name in listed.split(b"\0") if name]
