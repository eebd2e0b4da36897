"""Watches the hosts of a cluster while a run is on it: which are gone, which will go, what the run waits for."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import ray

from spikefleet.training.events import EventSink, Note, Phase, Waiting
from spikefleet_tune.messages import counted

NODE = "node-"
"""Prefix of the files in an attempt's directory, one for each rank, that hold the id of its node."""

_LOOK_EVERY_S = 1.0
_SETTLE_S = 1.0
_SETTLE_PEER_S = 8.0
"""A worker says that it has lost another one before Ray knows that the other's host is gone."""
PEER_LOST = re.compile(r"gloo|NCCL|by peer|socket|connection", re.IGNORECASE)
"""What a worker says when another one no longer answers."""
_SETTLE_LOOK_S = 0.1
_EPSILON = 1e-9


def gone_hosts(addresses: Sequence[str]) -> str:
    """Names hosts that are gone, such as "host 10.0.0.3 is gone"."""
    lost = list(dict.fromkeys(addresses))
    return f"host {lost[0]} is gone" if len(lost) == 1 else f"hosts {', '.join(lost)} are gone"


def _nodes_of(attempt: Path) -> set[str]:
    """Ids of the nodes that have, or had, a worker of an attempt."""
    found = set()
    for path in attempt.glob(f"{NODE}*"):
        with suppress(OSError):
            found.add(path.read_text())
    return found


def _fit(worker: Mapping[str, float], there: Mapping[str, float]) -> int:
    """Number of workers that fit into the resources of one host."""
    return min((int((there.get(kind, 0.0) + _EPSILON) // amount) for kind, amount in worker.items()), default=0)


class HostWatch:
    """What the driver of a run knows of the hosts; used by one thread.

    Args:
        needed: resources of all workers, such as `{"CPU": 2}`.
        wait_minutes: how long the run may wait for resources; -1: for ever.
        sink: receives `Waiting`, and a `Phase` when everything is there.
        worker: resources of one worker, which one host must have; None: any host may have any part.
    """

    def __init__(
        self,
        needed: Mapping[str, float],
        wait_minutes: float,
        sink: EventSink,
        worker: Mapping[str, float] | None = None,
    ) -> None:
        self._worker = {kind: amount for kind, amount in (worker or {}).items() if amount}
        self.need(needed)
        self._wait_minutes, self._sink = wait_minutes, sink
        self._known: dict[str, str] = {}
        self._present: dict[str, float] = {}
        self._fitting = 0
        self._draining: set[str] = set()
        self._lost: dict[str, str] = {}
        self._draining_unknown = False
        self._looked = 0.0
        self._look()

    def need(self, needed: Mapping[str, float]) -> None:
        """Sets the resources that the workers of the next group need; it has not waited for them yet."""
        self._needed = {kind: amount for kind, amount in needed.items() if amount}
        self._since: float | None = None

    @property
    def too_small(self) -> str | None:
        """What is wrong where the hosts have enough together, and each of them has too little; None where it is not."""
        if not self._worker or self._missing() or self._fitting >= self._workers:
            return None
        each = [f"{amount:g} {kind if amount == 1 else f'{kind}s'}" for kind, amount in self._worker.items()]
        return f"hosts with {' and '.join(each)} for each worker ({self._fitting} of {self._workers} have a place)"

    @property
    def _workers(self) -> int:
        return max((round(self._needed.get(kind, 0) / amount) for kind, amount in self._worker.items()), default=0)

    def places(self, worker: Mapping[str, float]) -> int:
        """Number of workers that would fit now, beside all that runs, on hosts that stay; 0 if the head does not say.

        Args:
            worker: resources of one.
        """
        self._look()
        wanted = {kind: amount for kind, amount in worker.items() if amount}
        free: dict[str, dict[str, float]] = {}
        with suppress(Exception):  # the head is busy or gone
            free = ray._private.state.available_resources_per_node()
        staying = [there for node, there in free.items() if node in self._known and node not in self._draining]
        return sum(_fit(wanted, there) for there in staying)

    @property
    def waited_s(self) -> float:
        """Seconds for which the run has been waiting; 0 if it does not."""
        return 0.0 if self._since is None else time.time() - self._since

    @property
    def overdue(self) -> str | None:
        """The sentence for a run that has waited too long; None while it may wait on."""
        if self._since is None or self._wait_minutes < 0 or time.time() - self._since < 60 * self._wait_minutes:
            return None
        return (
            f"{self._waits_for()}, and cluster.wait_minutes={self._wait_minutes:g} are over; run the same command "
            "again to resume"
        )

    def tick(self, training: bool) -> None:
        """Looks at the hosts, at most once a second, and says what the run waits for.

        Args:
            training: whether the workers train; if not, they wait for what is missing.
        """
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._look()
        if training or not (self._missing() or self.too_small):
            if self._since is not None and not training:
                self._sink.emit(Phase("restarting"))
            self._since = None
        elif self._since is None:
            self._since = time.time()
            self._sink.emit(Waiting(self._waits_for(), self._since))

    def lost(self, reason: str, attempt: Path | None) -> list[str]:
        """Addresses of the hosts of an attempt's workers that are gone; waits for Ray to notice.

        A host that had none of its workers, such as one that the autoscaler has removed since it was idle, did not fail
        them.

        Args:
            reason: what the workers say.
            attempt: their directory; None: no worker has started.
        """
        nodes = set() if attempt is None else _nodes_of(attempt)
        deadline = time.monotonic() + (_SETTLE_PEER_S if PEER_LOST.search(reason) else _SETTLE_S)
        while True:
            self._look()
            found = [address for node, address in self._lost.items() if node in nodes]
            # Of this host alone Ray has nothing to notice.
            if found or len(self._known) < 2 or time.monotonic() > deadline:
                return found
            time.sleep(_SETTLE_LOOK_S)

    def started(self) -> None:
        """Training has started: what was lost before does not matter any longer."""
        self._lost.clear()
        self._since = None

    def leaving(self, attempt: Path) -> str | None:
        """Address of a host that will be taken away and has a worker of the attempt; None if there is none."""
        node = min(_nodes_of(attempt) & self._draining, default=None)
        return None if node is None else self._known.get(node, node)

    def _look(self) -> None:
        self._looked = time.monotonic()
        with suppress(Exception):  # the head is busy or gone, which the run itself will report
            nodes = ray.nodes()
            self._draining = self._to_be_drained()
            alive = {node["NodeID"]: node for node in nodes if node["Alive"]}
            self._lost |= {node: address for node, address in self._known.items() if node not in alive}
            self._known = {name: node["NodeManagerAddress"] for name, node in alive.items()}
            staying = [node["Resources"] for name, node in alive.items() if name not in self._draining]
            self._present = {kind: sum(one.get(kind, 0.0) for one in staying) for kind in self._needed}
            self._fitting = sum(_fit(self._worker, one) for one in staying)

    def _to_be_drained(self) -> set[str]:
        """Ids of the nodes that will be taken away; where Ray does not say, none, and a note says so once."""
        try:
            return set(ray._private.state.state.get_draining_nodes())
        except Exception as error:  # no public call tells them
            if not self._draining_unknown:
                self._draining_unknown = True
                reason = f"{type(error).__name__}: {str(error)[:100]}"
                self._sink.emit(
                    Note(
                        f"Ray {ray.__version__} does not say which hosts will be taken away ({reason}): a host that is "
                        "will not stop the workers with a checkpoint before"
                    )
                )
            return set()

    def _missing(self) -> dict[str, float]:
        """What the hosts lack of what the workers need."""
        lacking = {kind: amount - self._present.get(kind, 0.0) for kind, amount in self._needed.items()}
        return {kind: amount for kind, amount in lacking.items() if amount > 0}

    def _waits_for(self) -> str:
        gone = f"{gone_hosts(list(self._lost.values()))}; " if self._lost else ""
        parts = [
            f"{amount:g} more {kind if amount == 1 else f'{kind}s'} "
            f"({self._present.get(kind, 0.0):g} of {self._needed[kind]:g} there)"
            for kind, amount in self._missing().items()
        ]
        return f"{gone}the run waits for {' and '.join(parts) or self.too_small or counted(1, 'host')}"
