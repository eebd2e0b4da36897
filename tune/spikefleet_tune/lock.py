"""A lock of one file, held by one part of one process on one machine.

It is fcntl's lock (`lockf`), not flock's: a process that is forked, such as a data loader, inherits a lock of flock and
would hold it on when its parent is killed. fcntl's has two traps, which the table of this process avoids: it never
refuses the process that holds it, and closing any descriptor of the file drops it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_LOOK_S = 0.25

_Key = tuple[int, int]  # device and inode: one for all names of a file


class LockedError(OSError):
    """Somebody else holds the lock: `holder` names the process, `own` says whether it is this one."""

    def __init__(self, path: Path, holder: str, own: bool) -> None:
        super().__init__(f"{path} is locked by {holder}")
        self.holder, self.own = holder, own


class Lock:
    """A lock that is held until `release`, or to the end of a `with` block."""

    def __init__(self, key: _Key, descriptor: int) -> None:
        self._key, self.descriptor = key, descriptor

    def release(self) -> None:
        """Gives the lock back; does nothing the second time, and nothing in a forked child, which never held it."""
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
"""What this process holds. It is asked before a file is opened."""


def hold(path: Path, patience_s: float = 0.0) -> Lock:
    """Takes the lock of a file, which is created where it is missing; the name of the process is written into it.

    Args:
        path: the lock file; its directory exists.
        patience_s: how long to wait for another holder, in seconds.

    Raises:
        LockedError: another process, or another part of this one, holds the lock after `patience_s`.
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


def _attempt(path: Path) -> Lock:
    """Takes the lock now. No descriptor is left open by a refusal: closing it later would drop a lock taken since."""
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
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        key = _key(os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    lock = _held[key] = Lock(key, descriptor)
    return lock


def _key(status: os.stat_result) -> _Key:
    return status.st_dev, status.st_ino


def _forget_in_child() -> None:
    """A forked child holds none of its parent's locks. Their descriptors go now, when closing them drops nothing."""
    global _guard
    _guard = threading.Lock()  # another thread of the parent may have held it
    for lock in _held.values():
        os.close(lock.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
