"""Write-ahead journal of a run's tracking calls: what a process logged survives the process and the tracking server.

One record is one line of JSON in `tracking.jsonl`. `tracking.delivered.json` holds how far the records have reached the
tracking server. A reader takes records from that position, sends them and then moves it: a crash in between sends the
same records again, so a receiver must accept a record twice (MLflow does: see `tracker.py`).
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
DELIVERED = "tracking.delivered.json"
LOCK = "tracking.lock"

_ENDING_S = 25.0
"""The last request of a journal's earlier user in this process may take so long: MLflow's limit is 20 seconds."""


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
        """Records that have not been delivered."""
        return self._records - self.delivered.records

    def append(self, record: Record) -> None:
        """Hands one record to the operating system: from then on it survives a kill of this process."""
        with self._guard:
            self._log.append(record)
            self._records += 1

    def sync(self) -> None:
        """Makes all records survive a power failure too."""
        self._log.sync()

    def records(self) -> Iterator[Record]:
        """All records from the first one on."""
        return (entry.record for entry in self._log.entries())

    def unsent(self, max_bytes: int) -> list[Entry]:
        """The oldest records that have not been delivered: at least one if there is one, else up to `max_bytes`."""
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
        with self._guard:
            self._log.close()
        self._lock.release()

    def _recover(self) -> int:
        try:
            return self._log.drop_torn_line()
        except DamagedLineError as error:
            raise UserError(
                f"{error}, so the records behind it cannot be trusted; "
                "move the file away to continue this run as a new run in MLflow"
            ) from None

    def _read_delivered(self) -> Delivered:
        try:
            delivered = Delivered(**read_json(self.directory / DELIVERED))
            whole = isinstance(delivered.tracking_uri, str) and isinstance(delivered.records, int)
            whole = whole and self._ends_a_line(delivered.offset)
        except (UserError, ValueError, TypeError):
            whole = False
        # Sending everything once more is harmless; a position inside of a record is not.
        return delivered if whole else Delivered(tracking_uri="")

    def _ends_a_line(self, position: int) -> bool:
        with self._log.path.open("rb") as file:
            return position == 0 or (position > 0 and file.seek(position - 1) >= 0 and file.read(1) == b"\n")


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
