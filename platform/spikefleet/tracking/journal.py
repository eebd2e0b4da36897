"""Write-ahead journal of a run's tracking calls: what a process logged survives the process and the tracking server.

One record is one line of JSON in `tracking.jsonl`. `tracking.delivered.json` holds how far the records have reached the
tracking server. A reader takes records from that position, sends them and then moves it: a crash in between sends the
same records again, so a receiver must accept a record twice (MLflow does: see `tracker.py`).
"""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikefleet.errors import UserError
from spikefleet.files import write_json
from spikefleet_tune.lock import Lock, LockedError, hold

JOURNAL = "tracking.jsonl"
DELIVERED = "tracking.delivered.json"
LOCK = "tracking.lock"

_ENDING_S = 25.0
"""The last request of a journal's earlier user in this process may take so long: MLflow's limit is 20 seconds."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A record and the position in the file just behind it."""

    record: Record
    end: int


@dataclass(frozen=True)
class Delivered:
    """How far the journal has reached one tracking server."""

    tracking_uri: str  # without credentials
    run_id: str | None = None
    experiment_id: str | None = None
    offset: int = 0
    records: int = 0


class Journal:
    """The journal of one run directory, written by one process at a time.

    Opening it cuts off a last line that a killed writer left unfinished.

    Raises:
        UserError: it is open already, in this process or another one, or a line before the last one is damaged.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._path = directory / JOURNAL
        self._lock = _hold(directory)
        self._guard = threading.Lock()
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._size, self._records = self._recover()
            self.delivered = self._read_delivered()
        except BaseException:
            self.close()
            raise

    @property
    def pending(self) -> int:
        """Records that have not been delivered."""
        return self._records - self.delivered.records

    def append(self, record: Record) -> None:
        """Hands one record to the operating system: from then on it survives a kill of this process."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._guard:
            try:
                written = os.write(self._fd, line)
                if written != len(line):
                    raise OSError(f"{self._path}: only {written} of {len(line)} bytes were written")
            except OSError:
                os.ftruncate(self._fd, self._size)  # half a line in the middle would damage what follows
                raise
            self._size += len(line)
            self._records += 1

    def sync(self) -> None:
        """Makes all records survive a power failure too."""
        os.fsync(self._fd)

    def records(self) -> Iterator[Record]:
        """All records from the first one on."""
        with self._path.open("rb") as file:
            while file.tell() < self._size:
                yield json.loads(file.readline())

    def unsent(self, max_bytes: int) -> list[Entry]:
        """The oldest records that have not been delivered: at least one if there is one, else up to `max_bytes`."""
        start, size = self.delivered.offset, self._size
        chunk = b""
        while not chunk and start < size:
            chunk = os.pread(self._fd, min(max_bytes, size - start), start)
            chunk = chunk[: chunk.rfind(b"\n") + 1]
            max_bytes *= 2
        entries = []
        end = start
        for line in chunk.splitlines(keepends=True):
            end += len(line)
            entries.append(Entry(json.loads(line), end))
        return entries

    def mark_delivered(self, delivered: Delivered) -> None:
        """Moves the delivered position, atomically."""
        write_json(self.directory / DELIVERED, asdict(delivered))
        self.delivered = delivered

    def close(self) -> None:
        os.close(self._fd)
        self._lock.release()
        self._fd = -1  # a late write must fail, not land in a file that got the same number

    def _recover(self) -> tuple[int, int]:
        size = records = 0
        with self._path.open("rb") as file:
            for line in file:
                if not _whole(line):
                    if file.read(1):
                        raise UserError(
                            f"{self._path}, line {records + 1}: the line is damaged, so the records behind it cannot "
                            f"be trusted; move the file away to continue this run as a new run in MLflow"
                        )
                    os.ftruncate(self._fd, size)
                    break
                size += len(line)
                records += 1
        return size, records

    def _read_delivered(self) -> Delivered:
        try:
            delivered = Delivered(**json.loads((self.directory / DELIVERED).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return Delivered(tracking_uri="")
        at_line_end = delivered.offset == 0 or os.pread(self._fd, 1, delivered.offset - 1) == b"\n"
        # Sending everything once more is harmless; a position inside of a record is not.
        return delivered if at_line_end else Delivered(tracking_uri="")


def _whole(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _hold(directory: Path) -> Lock:
    try:
        try:
            return hold(directory / LOCK)
        except LockedError as error:
            if not error.own:
                raise
            return hold(directory / LOCK, _ENDING_S)
    except LockedError as error:
        raise UserError(
            f"{directory}: the run is being tracked already ({error.holder}); wait for it, or give another run name"
        ) from None
