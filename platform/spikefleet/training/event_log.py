"""Events from workers to the driver, as files in the run's directory, which outlive every process.

Each attempt has a directory. Each process that sends events appends to its own file there, one line of JSON per event;
the driver reads all files. Rank 0 writes the event of a step before it commits the checkpoint of that step, so events
up to a checkpoint are never lost, whichever process is killed.
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
from spikefleet_tune.jsonl_log import DamagedLineError, JsonlLog, Record

STOPPED = "stopped.json"
"""File name, in an attempt's directory, of the reason why its workers must stop."""

TAKEN_OVER = "a later attempt has taken over the run"
"""The reason for workers of an earlier attempt."""

_ACKNOWLEDGED = ".handed-on"
"""Suffix of the file beside an event file with the number of bytes that the driver has handled."""
_WAIT_S = 0.05

_KINDS: dict[str, Callable[..., Event]] = {
    kind.__name__: kind for kind in (Started, StepDone, EpochDone, CheckpointSaved, Note, Phase, WorkerFailed)
}

log = logging.getLogger(__name__)


def new_attempt(run_dir: Path) -> Path:
    """Creates the directory of a new attempt of a run; attempts sort by time."""
    folder = run_dir / "ray" / f"attempt-{time.time_ns():020d}"
    folder.mkdir(parents=True)
    return folder


class EventWriter:
    """The event sink of one process of an attempt.

    Args:
        attempt: the attempt's directory.
        lockstep: after the event of a checkpoint, wait until the driver has handled all events, so that it can use the
            checkpoint, and decide, before training continues.
    """

    def __init__(self, attempt: Path, lockstep: bool = False) -> None:
        self._attempt, self._lockstep = attempt, lockstep
        # Opened for each event, since the driver may read it over a network file system.
        self._log = JsonlLog(attempt / f"events-{time.time_ns():020d}-{os.getpid()}.jsonl")

    def emit(self, event: Event) -> None:
        """Appends an event; a full disk is logged, not raised."""
        try:
            self._log.append({"event": type(event).__name__, **asdict(event)})
        except OSError as error:
            # If the disk is full, the next checkpoint raises an error.
            log.warning("%s: an event is lost: %s", self._log.path, error)
            return
        if self._lockstep and isinstance(event, CheckpointSaved):
            self._wait()

    def _wait(self) -> None:
        """Waits until all events are handled, or the attempt is stopped or removed, which the next step checks."""
        mark = self._log.path.with_suffix(_ACKNOWLEDGED)
        while self._attempt.is_dir() and not (self._attempt / STOPPED).is_file():
            with suppress(OSError, UserError):  # not written yet, or the attempt is being removed
                handled = read_json(mark)
                if isinstance(handled, int) and handled >= self._log.path.stat().st_size:
                    return
            time.sleep(_WAIT_S)


class EventReader:
    """Reads the events of an attempt that its processes have written since the last call."""

    def __init__(self, attempt: Path) -> None:
        self._attempt = attempt
        self._read: dict[Path, int] = {}
        self._acknowledged: dict[Path, int] = {}
        self._damaged: set[Path] = set()

    def new(self) -> list[Event]:
        """Events that were not read before, process by process, without incomplete lines."""
        return [event for path in sorted(self._attempt.glob("events-*.jsonl")) for event in self._of(path)]

    def acknowledge(self) -> None:
        """Tells lockstep writers that all events read so far have been handled. Raises OSError."""
        for path, size in self._read.items():
            if self._acknowledged.get(path) != size:
                write_json(path.with_suffix(_ACKNOWLEDGED), size)
                self._acknowledged[path] = size

    def _of(self, path: Path) -> Iterator[Event]:
        if path in self._damaged:
            return
        try:
            for entry in JsonlLog(path).entries(self._read.get(path, 0)):
                event = _decode(entry.record)
                self._read[path] = entry.end
                yield event
        except (DamagedLineError, KeyError, TypeError, ValueError, AttributeError) as error:
            self._damaged.add(path)  # what is shown and tracked ends there; checkpoints do not depend on it
            log.warning("%s is damaged, and its further events are lost: %s", path, error)


def _decode(fields: Record) -> Event:
    kind = _KINDS[fields.pop("event")]
    if kind is Started and "facts" in fields:  # written by an attempt of an earlier version
        fields["metadata"] = fields.pop("facts")
    for name in ("metrics", "metadata"):
        if not isinstance(fields.get(name, {}), dict):
            raise TypeError(f"{name} of {kind.__name__} must be an object")
    for name in ("step", "epoch", "total_steps", "steps_per_epoch", "epochs"):
        if not isinstance(fields.get(name, 0), int):
            raise TypeError(f"{name} of {kind.__name__} must be a whole number")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


class ResumedRunSink:
    """Wraps the sink of a driver that resumes a run whose earlier driver may have been killed.

    It tells workers of earlier attempts to stop. The events that they sent without a driver are passed on when training
    has picked its checkpoint, since they may commit further checkpoints until then.

    Args:
        run_dir: of the run.
        sink: of the driver.
    """

    def __init__(self, run_dir: Path, sink: EventSink) -> None:
        self._sink = sink
        # Earlier versions called attempts launches; their runs can be resumed too.
        self._earlier = [path for word in ("launch", "attempt") for path in sorted((run_dir / "ray").glob(f"{word}-*"))]
        for attempt in self._earlier:
            write_json(attempt / STOPPED, {"reason": TAKEN_OVER, "mendable": False})

    def emit(self, event: Event) -> None:
        """Passes an event on; before the first `Started`, the events of earlier attempts."""
        if isinstance(event, Started) and self._earlier:
            self._recover()
        self._sink.emit(event)

    def _recover(self) -> None:
        for attempt in self._earlier:
            self._sink.emit(Recovered(tuple(EventReader(attempt).new())))
            shutil.rmtree(attempt, ignore_errors=True)
        self._earlier = []
