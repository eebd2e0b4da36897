"""Append-only logs of JSON objects, one a line, that survive killed writers and full disks.

A line is written with one call and taken back when it does not fit. A last line that is no whole object is torn: its
writer was killed, or is not done. Readers stop before it, and the next writer cuts it off.
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
    """A record and the position in the file just behind it."""

    record: Record
    end: int


class DamagedLineError(ValueError):
    """A line that is no JSON object, and not the last one, so that what follows it cannot be trusted."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(f"{path}, line {number}: the line is damaged")


class JsonlLog:
    """A log file, which one process at a time appends to.

    Args:
        path: the file; it is created by the first record, in a directory that exists.
        keep_open: open it now, and keep it so until `close`. Otherwise it is opened anew for each record: on a network
            file system, closing is what makes a record seen elsewhere.
        durable: each record survives a crash of the machine before `append` returns.
        compact: no spaces between the parts of a line.
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
        """Hands a record to the operating system: from then on it survives a kill of this process.

        Raises OSError, and leaves no part of the line, when the disk is full; ValueError when JSON cannot hold it.
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
        """The records behind a position, oldest first, up to a torn last line; none when there is no file.

        Args:
            start: 0, or the `end` of an entry.

        Raises:
            DamagedLineError: a line is no JSON object, and another one follows it.
        """
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            end = file.seek(start)
            for line in file:
                record = _record(line)
                if record is None:
                    # What follows a line without an end has come since: its writer is not done.
                    if line.endswith(b"\n") and file.read(1):
                        raise DamagedLineError(self.path, self._lines_before(end) + 1)
                    return
                end += len(line)
                yield Entry(record, end)

    def drop_torn_line(self) -> int:
        """Cuts off a torn last line, as a writer must before it appends to what another has left.

        Returns the number of records. Raises DamagedLineError.
        """
        count = end = 0
        for entry in self.entries():
            count, end = count + 1, entry.end
        if self.path.exists() and self.path.stat().st_size > end:
            os.truncate(self.path, end)
        return count

    def sync(self) -> None:
        """Makes all records survive a crash of the machine."""
        sync(self.path)

    def close(self) -> None:
        """Ends the use of a log that is kept open: a later record fails, and lands in no other file."""
        if self._descriptor is not None and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _write(self, descriptor: int, line: bytes) -> None:
        written = os.write(descriptor, line)
        if written < len(line):
            told = f"the disk is full: only {written} of {len(line)} bytes were written"
            raise OSError(errno.ENOSPC, told, str(self.path))
        if self._durable:
            os.fsync(descriptor)

    def _lines_before(self, position: int) -> int:
        with self.path.open("rb") as file:
            return file.read(position).count(b"\n")


def _record(line: bytes) -> Record | None:
    """The object that a line holds, or None when it is no whole one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
