"""What the driver does with the events of its workers before its own sink gets them."""

from __future__ import annotations

from pathlib import Path

from spikefleet.cluster.gauges import RunGauges
from spikefleet.cluster.host_watch import PEER_LOST, HostWatch, gone_hosts
from spikefleet.training.events import Event, EventSink, Started, WorkerFailed


class WatchedSink:
    """Passes events on, knows whether the workers train, and names a dead host before what its workers say of it.

    Args:
        sink: of the driver.
        hosts: of the cluster.
        run: name of the run, for its metrics.
    """

    def __init__(self, sink: EventSink, hosts: HostWatch, run: str) -> None:
        self._sink, self.hosts = sink, hosts
        self._gauges = RunGauges(run)
        self.training = False
        self.attempt: Path | None = None
        """Directory of the attempt whose events are passed on."""

    def emit(self, event: Event) -> None:
        """Passes an event on."""
        if isinstance(event, Started | WorkerFailed):
            self.training = isinstance(event, Started)
        if isinstance(event, Started):
            self.hosts.started()
        if isinstance(event, WorkerFailed) and (lost := self.hosts.lost(event.reason, self.attempt)):
            # That a peer does not answer is what a dead host makes the others say; anything else has its own cause.
            said = "" if PEER_LOST.search(event.reason) else f" ({event.reason})"
            event = WorkerFailed(f"{gone_hosts(lost)}{said}")
        self._gauges.show(event)
        self._sink.emit(event)

    def stopped_for(self, address: str | None) -> None:
        """The workers have stopped, with a checkpoint, for another group.

        Args:
            address: of a host that is being taken away, and may be gone by now; None: there is a place for more.
        """
        self.training = False
        if address is None:
            return
        self._sink.emit(WorkerFailed(f"host {address} is being taken away; its steps are in a checkpoint"))

    def tick(self) -> None:
        """Looks at the hosts; called several times a second."""
        self.hosts.tick(self.training)
        self._gauges.waits(self.hosts.waited_s)
