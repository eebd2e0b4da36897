"""Sentences for disks that are full, read-only or not writable: which one, how much is free, what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_OTHERS = {
    errno.EROFS: "is read-only; choose another place, or mount it writable",
    errno.EIO: "reports an error of the device; choose another place, and check the disk",
}
_PATHS = {
    errno.ENOENT: "it does not exist",
    errno.ENOTDIR: "a part of it is a file, and not a directory",
    errno.EEXIST: "a file, or a link to nothing, is there",
    errno.EISDIR: "it is a directory, and not a file",
    errno.ENAMETOOLONG: "a name in it is too long",
    errno.ELOOP: "its symbolic links form a loop",
    errno.ENOTEMPTY: "the directory is not empty",
    errno.EBUSY: "it is in use",
    errno.ENXIO: "it is no file",
    errno.EINVAL: "the file system does not accept it",
}
_SHOWN = 200


def disk_problem(error: BaseException, place: Path | None = None) -> str | None:
    """A sentence for an error that a disk is the cause of.

    Args:
        error: an OSError, or an error of a library that quotes one.
        place: what was written, where the error does not name it.

    Returns:
        The sentence; None for any other error.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code is None and re.search(r"No space left on device|\[Errno 28\]", str(error)):
        code = errno.ENOSPC
    if code not in (*_FULL, *_OTHERS, *_FORBIDDEN):
        return None
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    path = Path(os.fsdecode(named)) if isinstance(named, str | bytes) and not place else place or Path()
    if code in _FORBIDDEN:
        return f"{path} cannot be used: this user has no permission; choose another place, or change its permissions"
    mount = _mount_of(path)
    if code not in _FULL:
        return f"{path} cannot be written: the disk at {mount} {_OTHERS[code or errno.EIO]}"
    usage = shutil.disk_usage(mount)
    return (
        f"{path} cannot be written: the disk at {mount} is full ({_size(usage.free)} of {_size(usage.total)} free); "
        "free space there, or choose another place"
    )


def path_problem(error: BaseException, path: Path | None = None) -> str | None:
    """A sentence for an error that a path is the cause of, such as a loop of links or a file in a directory's place.

    Args:
        error: of the operating system, or of pathlib.
        path: where the error does not name it.

    Returns:
        The sentence; None for any other error.
    """
    if isinstance(error, RuntimeError) and (loop := re.match(r"Symlink loop from '(.*)'", str(error))):  # Python 3.11
        return f"{path or loop[1]} cannot be used: its symbolic links form a loop; check the path"
    if not isinstance(error, OSError) or error.errno not in _PATHS:
        return None
    if path is None and not isinstance(error.filename, str | bytes):
        return None
    named = path or Path(os.fsdecode(error.filename))
    shown = str(named) if len(str(named)) <= _SHOWN else f"{str(named)[:_SHOWN]}..."
    return f"{shown} cannot be used: {_PATHS[error.errno]}; check the path"


def _mount_of(path: Path) -> Path:
    """The mount point of the disk that a path, which need not exist, lies on."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    place = place.resolve()
    while not place.is_mount():
        place = place.parent
    return place


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count //= 1000
    return f"{count} GB"
