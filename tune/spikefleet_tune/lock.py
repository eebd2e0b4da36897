"""File locks, each held by one owner in one process.

They use `lockf`, not `flock`: a forked process, such as a data loader, inherits a `flock` lock and would keep it after
its parent is killed. `lockf` has two pitfalls, which the process-wide table below avoids: it never refuses the process
that holds the lock, and closing any descriptor of the file releases it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_LOOK_S = 0.25
_FLOCK = "hhqqi0q"
"""Linux's `struct flock`: type, whence, start, length, process; padded to 8 bytes."""

_Key = tuple[int, int]  # device and inode: one for all names of a file


class LockedError(OSError):
    """The lock is held: `holder` names the process, `own` says whether it is this one."""

    def __init__(self, path: Path, holder: str, own: bool) -> None:
        super().__init__(f"{path} is locked by {holder}")
        self.holder, self.own = holder, own


class Lock:
    """A held lock; released by `release`, or at the end of a `with` block."""

    def __init__(self, key: _Key, descriptor: int) -> None:
        self._key, self.descriptor = key, descriptor

    def release(self) -> None:
        """Releases the lock. A second call does nothing, nor does a call in a forked child, which never held it."""
        with _guard:
            if _held.get(self._key) is self:
                del _held[self._key]
                os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


_guard = threading.Lock()
_held: dict[_Key, Lock] = {}
"""The locks of this process; checked before a lock file is opened."""


def hold(path: Path, patience_s: float = 0.0) -> Lock:
    """Acquires the lock of a file and writes the name of this process into it.

    Args:
        path: the lock file, created if it is missing; its directory exists.
        patience_s: seconds to wait for another holder.

    Returns:
        The held lock.

    Raises:
        LockedError: another process, or another owner in this one, still holds the lock after `patience_s`.
        OSError: the file cannot be created or locked.
    """
    give_up = time.monotonic() + patience_s
    while True:
        try:
            with _guard:
                return _attempt(path)
        except LockedError:
            left = give_up - time.monotonic()
            if left <= 0:
                raise
        time.sleep(min(_LOOK_S, left))


def holder_of(path: Path) -> str | None:
    """The process that holds the lock of a file, as it named itself; None if none does. It takes no lock.

    On storage that several machines share, a holder elsewhere is seen if the file system passes locks on (NFS does).
    """
    with _guard:  # closing a descriptor of a file that this process has locked would release it
        if not path.exists():
            return None
        if _key(path.stat()) in _held:
            return _own_name()
        with path.open("rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer: bytes = fcntl.fcntl(file.fileno(), fcntl.F_GETLK, asked)
            if struct.unpack(_FLOCK, answer)[0] == fcntl.F_UNLCK:
                return None
            return file.read(200).decode(errors="replace").strip() or "an unknown process"


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _attempt(path: Path) -> Lock:
    """Acquires the lock now. A refusal closes its descriptor: closing it later would release a lock taken since."""
    if path.exists() and _key(path.stat()) in _held:
        raise LockedError(path, f"process {os.getpid()}, this one", own=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise LockedError(path, holder or "an unknown process", own=False) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _own_name().encode(), 0)
        key = _key(os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    lock = _held[key] = Lock(key, descriptor)
    return lock


def _key(status: os.stat_result) -> _Key:
    return status.st_dev, status.st_ino


def _forget_in_child() -> None:
    """A forked child holds none of its parent's locks; closing their descriptors now releases nothing."""
    global _guard
    _guard = threading.Lock()  # another thread of the parent may have held it
    for lock in _held.values():
        os.close(lock.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
