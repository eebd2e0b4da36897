"""Events on their way from workers to the driver: files in the run's directory, which outlive every process.

A attempt has a directory. Each process that sends events appends to a file of its own there, one line of JSON an event;
the driver reads all of them. Rank 0 writes the event of a step before it commits the checkpoint of that step, so the
events up to a checkpoint are never lost, whoever is killed.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from spikefleet.errors import UserError
from spikefleet.files import read_json, write_json
from spikefleet.training.events import (
    CheckpointSaved,
    EpochDone,
    Event,
    EventSink,
    Note,
    Phase,
    Recovered,
    Started,
    StepDone,
    WorkerFailed,
)
from spikefleet_tune.jsonl_log import JsonlLog, Record

STOPPED = "stopped.json"
"""In a attempt's directory: why its workers must not go on."""

TAKEN_OVER = "a later attempt has taken over the run"

_HANDED_ON = ".handed-on"
"""Suffix of the file beside a file of events that says how many of its bytes the driver has handed on."""
_WAIT_S = 0.05

_KINDS: dict[str, Callable[..., Event]] = {
    kind.__name__: kind for kind in (Started, StepDone, EpochDone, CheckpointSaved, Note, Phase, WorkerFailed)
}

log = logging.getLogger(__name__)


def new_attempt(run_dir: Path) -> Path:
    """The directory of one more attempt of a run; later attempts sort behind earlier ones."""
    folder = run_dir / "ray" / f"attempt-{time.time_ns():020d}"
    folder.mkdir(parents=True)
    return folder


class EventWriter:
    """The sink of one process of a attempt.

    Does not wait for the driver, unless it is `lockstep`: then it goes on after a checkpoint when the driver has handed
    on what was sent, so that the driver finds the checkpoint as it is, and decides before more is trained.
    """

    def __init__(self, attempt: Path, lockstep: bool = False) -> None:
        self._attempt, self._lockstep = attempt, lockstep
        # Opened anew for each event: the driver may read it over a network file system.
        self._log = JsonlLog(attempt / f"events-{time.time_ns():020d}-{os.getpid()}.jsonl")

    def emit(self, event: Event) -> None:
        try:
            self._log.append({"event": type(event).__name__, **asdict(event)})
        except OSError as error:
            # A full disk ends the run at its checkpoint.
            log.warning("%s: an event is lost: %s", self._log.path, error)
            return
        if self._lockstep and isinstance(event, CheckpointSaved):
            self._wait()

    def _wait(self) -> None:
        """Until all is handed on, or the attempt is stopped or gone, which is for the next step to find out."""
        mark = self._log.path.with_suffix(_HANDED_ON)
        while self._attempt.is_dir() and not (self._attempt / STOPPED).is_file():
            with suppress(OSError, UserError):  # not written yet, or the attempt is being removed
                if read_json(mark) >= self._log.path.stat().st_size:
                    return
            time.sleep(_WAIT_S)


class EventReader:
    """Reads what the processes of a attempt have written since the last look."""

    def __init__(self, attempt: Path) -> None:
        self._attempt = attempt
        self._read: dict[Path, int] = {}
        self._handed_on: dict[Path, int] = {}

    def new(self) -> list[Event]:
        """Events that were not read before, of one process after the other. A line that is being written waits."""
        return [event for path in sorted(self._attempt.glob("events-*.jsonl")) for event in self._of(path)]

    def handed_on(self) -> None:
        """Lets writers that are in step know that what was read so far has been dealt with. Raises OSError."""
        for path, size in self._read.items():
            if self._handed_on.get(path) != size:
                write_json(path.with_suffix(_HANDED_ON), size)
                self._handed_on[path] = size

    def _of(self, path: Path) -> Iterator[Event]:
        for entry in JsonlLog(path).entries(self._read.get(path, 0)):
            self._read[path] = entry.end
            yield _decode(entry.record)


def _decode(fields: Record) -> Event:
    kind = _KINDS[fields.pop("event")]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


class ResumedRunSink:
    """Wraps the sink of a driver that goes on with a run whose earlier driver may have died.

    Workers of the earlier attempts are told to stop. What they sent after their driver's death is handed on when the
    training has picked its checkpoint, because until then they may have committed more.
    """

    def __init__(self, run_dir: Path, sink: EventSink) -> None:
        self._sink = sink
        self._earlier = sorted((run_dir / "ray").glob("attempt-*"))
        for attempt in self._earlier:
            write_json(attempt / STOPPED, {"reason": TAKEN_OVER, "mendable": False})

    def emit(self, event: Event) -> None:
        if isinstance(event, Started) and self._earlier:
            self._recover()
        self._sink.emit(event)

    def _recover(self) -> None:
        for attempt in self._earlier:
            self._sink.emit(Recovered(tuple(EventReader(attempt).new())))
            shutil.rmtree(attempt, ignore_errors=True)
        self._earlier = []
