"""Write-ahead journal of a run's tracking calls, which survive the process and an unreachable tracking server.

One record is one line of JSON in `tracking.jsonl`; `tracking.delivered.json` has the position up to which records were
delivered. Delivery sends the records after that position and then moves it. A crash in between sends them again, so a
receiver must accept a record twice (MLflow does: see `delivery.py`).
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from spikefleet.errors import UserError
from spikefleet.files import read_json, write_json
from spikefleet_tune.jsonl_log import DamagedLineError, Entry, JsonlLog, Record
from spikefleet_tune.lock import Lock, LockedError, hold

JOURNAL = "tracking.jsonl"
"""File name of the journal."""
DELIVERED = "tracking.delivered.json"
"""File name of the delivered position."""
LOCK = "tracking.lock"
"""File name of the lock."""

_ENDING_S = 25.0
"""Seconds to wait for the last request of an earlier tracker in this process; MLflow's timeout is 20 seconds."""


@dataclass(frozen=True)
class Delivered:
    """The position up to which the records were delivered to one tracking server."""

    tracking_uri: str  # without credentials
    run_id: str | None = None
    experiment_id: str | None = None
    offset: int = 0
    records: int = 0


class Journal:
    """The journal of one run directory, written by one process at a time.

    Opening it truncates an incomplete last line of a killed writer.

    Args:
        directory: of the run; created if it is missing.

    Raises:
        UserError: the journal is already open, in this process or another one, or a line before the last is damaged.
        OSError: the directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._guard = threading.Lock()
        with ExitStack() as undo:
            self._lock = undo.enter_context(_hold(directory))
            self._log = JsonlLog(directory / JOURNAL, keep_open=True, compact=True)
            undo.callback(self._log.close)
            self._records = self._recover()
            self.delivered = self._read_delivered()
            undo.pop_all()

    @property
    def pending(self) -> int:
        """Number of records that were not delivered."""
        return self._records - self.delivered.records

    def append(self, record: Record) -> None:
        """Appends a record, which then survives a kill of this process. Raises OSError if the disk is full."""
        with self._guard:
            self._log.append(record)
            self._records += 1

    def sync(self) -> None:
        """Flushes all records to disk. Raises OSError."""
        self._log.sync()

    def records(self) -> Iterator[Record]:
        """Iterates over all records."""
        return (entry.record for entry in self._log.entries())

    def unsent(self, max_bytes: int) -> list[Entry]:
        """The oldest undelivered records, up to `max_bytes`, but at least one if there are any."""
        start = self.delivered.offset
        found: list[Entry] = []
        for entry in self._log.entries(start):
            if found and entry.end - start > max_bytes:
                break
            found.append(entry)
        return found

    def mark_delivered(self, delivered: Delivered) -> None:
        """Moves the delivered position, atomically."""
        write_json(self.directory / DELIVERED, asdict(delivered))
        self.delivered = delivered

    def close(self) -> None:
        """Closes the journal and releases its lock."""
        with self._guard:
            self._log.close()
        self._lock.release()

    def _recover(self) -> int:
        try:
            return self._log.drop_torn_line()
        except DamagedLineError as error:
            raise UserError(
                f"{error}, so the records after it cannot be trusted; "
                "move the file away to continue this run as a new run in MLflow"
            ) from None

    def _read_delivered(self) -> Delivered:
        try:
            delivered = Delivered(**read_json(self.directory / DELIVERED))
            whole = isinstance(delivered.tracking_uri, str) and isinstance(delivered.records, int)
            whole = whole and self._ends_a_line(delivered.offset)
        except (UserError, ValueError, TypeError):
            whole = False
        # Sending everything again is harmless; a position inside a record is not.
        return delivered if whole else Delivered(tracking_uri="")

    def _ends_a_line(self, position: int) -> bool:
        with self._log.path.open("rb") as file:
            return position == 0 or (position > 0 and file.seek(position - 1) >= 0 and file.read(1) == b"\n")


_TEXTS = {
    "create": ("uid", "run_name", "experiment"),
    "artifact": ("digest", "name", "folder"),
    "status": ("status",),
    "dataset": ("name", "digest", "source_type", "source", "schema", "profile", "context"),
}
"""Keys of a record with text, by kind."""

_WITH_VALUES = ("metrics", "params", "tags", "experiment", "drop_tags")
_KINDS = ("create", "metrics", "params", "tags", "artifact", "status", "dataset", "experiment", "drop_tags")


def check_record(record: Record) -> None:
    """Raises KeyError, TypeError or ValueError unless a record has the fields of its kind."""
    kind = record["kind"]
    if kind not in _KINDS:
        raise ValueError(f"unknown kind {str(kind)[:40]!r}")
    numbers = [record["time"], *([record["step"]] if kind == "metrics" else [])]
    values = record["values"] if kind in _WITH_VALUES else {}
    texts = [record[key] for key in _TEXTS.get(kind, ())]
    if not isinstance(values, dict):
        raise TypeError("values must be an object")
    (numbers if kind == "metrics" else texts).extend(values.values())
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in numbers):
        raise TypeError(f"a record of kind {kind} has a value that is no number")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"a record of kind {kind} has a value that is no text")
    if kind == "create" and not isinstance(record["parent_run_id"], str | None):
        raise TypeError("parent_run_id must be text")


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
            f"{directory}: the run is already being tracked ({error.holder}); wait for it, or set another run name"
        ) from None
