"""Atomic file writes: after a kill or a crash a reader finds either the old file or the new one, never a part."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file written there replaces `path` when the block ends, synced to disk.

    An exception in the block leaves `path` unchanged and removes the temporary file.

    Args:
        path: the file to replace; its directory exists.

    Yields:
        A path in the same directory.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    # The process id alone is not unique: two containers on a shared file system often have the same one.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and (error.filename is None or os.fspath(error.filename) == os.fspath(partial)):
            error.filename = str(path)  # `write` does not name the file; the message of a full disk should
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file atomically, synced to disk; text is encoded as UTF-8. Raises OSError."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Flushes a file's content, or a directory's entries, to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
