"""The thread of a driver that follows one group of workers: its events, and why it should stop."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from spikefleet.cluster.group_size import GroupSize
from spikefleet.cluster.watched_sink import WatchedSink
from spikefleet.files import write_json
from spikefleet.training.event_log import STOPPED, EventReader
from spikefleet.training.stopping import STOP

POLL_S = 0.2


@dataclass
class Following:
    """For what else than a signal the thread that follows an attempt has asked the workers to stop."""

    leaving: str | None = None
    """Address of a host that will be taken away."""
    growing: bool = False
    """Whether there are places for more workers."""

    @property
    def goes_on(self) -> bool:
        """Whether another group is started afterwards."""
        return self.growing or self.leaving is not None


@contextmanager
def followed(
    attempt: Path, sink: WatchedSink, sizes: GroupSize, lockstep: bool, stop_signal: Callable[[], str | None]
) -> Iterator[Following]:
    """Passes the events of an attempt to the sink while the block runs, and the remaining ones when it ends.

    The other way, it passes on that the training is asked to stop, also for a host that will be taken away or for more
    workers; and it says what the workers wait for.
    """
    done = threading.Event()
    reader = EventReader(attempt)
    errors: list[Exception] = []
    following = Following()

    def forward() -> None:
        for event in reader.new():
            if not errors:
                sink.emit(event)
        if lockstep:
            with suppress(OSError):  # the next poll writes it again
                reader.acknowledge()

    def ask_to_stop() -> None:
        if (attempt / STOP).exists():
            return
        reason = stop_signal()
        if reason is None and sink.training:
            following.leaving = sink.hosts.leaving(attempt)
            reason = None if following.leaving is None else "preemption"
        if reason is None and sizes.grows(sink.training):
            following.growing, reason = True, "more workers"
        if reason is not None:
            with suppress(OSError):
                write_json(attempt / STOP, {"signal": reason})

    def follow() -> None:
        while not done.wait(POLL_S):
            try:
                sink.tick()
                ask_to_stop()
                forward()
            except Exception as error:  # the sink of a search ends its trial this way
                errors.append(error)
                try:
                    write_json(attempt / STOPPED, {"reason": str(error), "mendable": False})
                except OSError:  # no space left: removing the attempt stops the workers too
                    shutil.rmtree(attempt, ignore_errors=True)

    thread = threading.Thread(target=follow, name="events", daemon=True)
    thread.start()
    try:
        yield following
    finally:
        done.set()
        thread.join()
        forward()
        if errors:
            raise errors[0]
