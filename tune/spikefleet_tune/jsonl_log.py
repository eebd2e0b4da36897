"""Append-only JSON Lines logs that survive killed writers and full disks.

Each line is written with one call, and removed again if the disk is full. An incomplete last line is torn: its writer
was killed, or is still writing. Readers stop before it, and the next writer truncates it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikefleet_tune.atomic import sync

Record = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A record and the byte offset of the end of its line."""

    record: Record
    end: int


class DamagedLineError(ValueError):
    """A line other than the last one is not a JSON object, so the lines after it cannot be trusted."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(f"{path}, line {number} is damaged: it is not a JSON object")


class JsonlLog:
    """A log file to which one process at a time appends.

    Args:
        path: the file; the first record creates it, in a directory that exists.
        keep_open: open the file now and keep it open until `close`. If False, the file is opened for each record: on
            a network file system, only closing makes a record visible to other machines.
        durable: `append` returns only after the record is synced to disk.
        compact: write no spaces inside a line.
        allow_nan: write numbers that are not finite, as Python's `json` does.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep_open: bool = False,
        durable: bool = False,
        compact: bool = False,
        allow_nan: bool = True,
    ) -> None:
        self.path = path
        self._durable, self._separators, self._allow_nan = durable, (",", ":") if compact else None, allow_nan
        self._descriptor = self._open() if keep_open else None

    def append(self, record: Record) -> None:
        """Writes a record, which then survives a kill of this process.

        Raises:
            OSError: the disk is full; no part of the line remains in the file.
            ValueError: JSON cannot represent the record.
        """
        text = json.dumps(record, separators=self._separators, allow_nan=self._allow_nan)
        descriptor, before = self._open() if self._descriptor is None else self._descriptor, None
        try:
            try:
                before = os.fstat(descriptor).st_size
                self._write(descriptor, text.encode() + b"\n")
            finally:
                if self._descriptor is None:
                    os.close(descriptor)  # a network file system may report a full disk only here
            if self._durable and not before:
                sync(self.path.parent)
        except OSError:
            if before is not None:
                with suppress(OSError):
                    os.truncate(self.path, before)  # half a line would damage the next one
            raise

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """Iterates over the records after an offset, oldest first, up to a torn last line; a missing file has none.

        Args:
            start: 0, or the `end` of an entry, in bytes.

        Yields:
            Each record with its end offset.

        Raises:
            DamagedLineError: a line is not a JSON object, and another line follows it.
        """
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            end = file.seek(start)
            for line in file:
                record = _record(line)
                if record is None:
                    # Bytes after an incomplete line were written since: its writer is still writing.
                    if line.endswith(b"\n") and file.read(1):
                        raise DamagedLineError(self.path, self._lines_before(end) + 1)
                    return
                end += len(line)
                yield Entry(record, end)

    def drop_torn_line(self) -> int:
        """Truncates a torn last line; a writer must call this before it appends to the log of another process.

        Returns:
            The number of records.

        Raises:
            DamagedLineError: a line before the last one is damaged.
        """
        count = end = 0
        for entry in self.entries():
            count, end = count + 1, entry.end
        if self.path.exists() and self.path.stat().st_size > end:
            os.truncate(self.path, end)
        return count

    def sync(self) -> None:
        """Flushes all records to disk. Raises OSError."""
        sync(self.path)

    def close(self) -> None:
        """Closes a log that is kept open; a later `append` raises OSError."""
        if self._descriptor is not None and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _write(self, descriptor: int, line: bytes) -> None:
        written = os.write(descriptor, line)
        if written < len(line):
            message = f"the disk is full: only {written} of {len(line)} bytes were written"
            raise OSError(errno.ENOSPC, message, str(self.path))
        if self._durable:
            os.fsync(descriptor)

    def _lines_before(self, position: int) -> int:
        with self.path.open("rb") as file:
            return file.read(position).count(b"\n")


def _record(line: bytes) -> Record | None:
    """The JSON object of a line, or None for an incomplete line or another value."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
