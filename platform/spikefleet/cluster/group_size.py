"""How many workers the next group of a run has: the configured number, or what the hosts have places for.

Ray Train has elastic groups of its own (`ScalingConfig(num_workers=(min, max))`). They are not used: to grow they end
the workers without a word, so that the steps since the last checkpoint are lost, and they count hosts that will be
taken away.
"""

from __future__ import annotations

import time

from spikefleet.cluster.host_watch import HostWatch
from spikefleet.config.cluster_config import ClusterConfig
from spikefleet.errors import RunError
from spikefleet.training.events import EventSink, Note
from spikefleet_tune.messages import counted

_SETTLED_S = 3.0
"""For so long the free places must stay the same: those of the group before are given back one after the other."""
_SETTLE_S = 20.0
_LOOK_S = 0.2
_SHRINK_AFTER_S = 10.0


class WorkersFailed(RunError):  # noqa: N818  # one of the things that end a group
    """The workers failed more often than Ray Train may restart them."""


class GroupSize:
    """The sizes of a run's groups, one after the other; used by one thread at a time.

    Args:
        cluster: workers and their resources.
        hosts: what is known of the hosts.
        sink: receives a `Note` where the size changes.
    """

    def __init__(self, cluster: ClusterConfig, hosts: HostWatch, sink: EventSink) -> None:
        self._cluster, self._hosts, self._sink = cluster, hosts, sink
        self._worker = needed_by(cluster, 1)
        self._failures = 0
        self._free_since: float | None = None
        self._looked = 0.0
        self.size = 0
        """Of the latest group; 0 before the first one."""

    @property
    def max_failures(self) -> int:
        """How often Ray Train may restart a group at its own size."""
        return 0 if self._cluster.elastic else self._cluster.max_failures

    def choose(self) -> int:
        """The size of the next group; of an elastic run after the places of the group before are free."""
        before, self.size = self.size, self._cluster.most_workers
        if self._cluster.elastic:
            self.size = max(self._cluster.least_workers, min(self._settled_places(), self.size))
        if before not in (0, self.size):
            self._sink.emit(Note(f"the run continues with {counted(self.size, 'worker')} instead of {before}"))
        self._hosts.need(needed_by(self._cluster, self.size))
        self._free_since = None
        return self.size

    def grows(self, training: bool) -> bool:
        """Whether a group should stop, after a step, to restart with more workers.

        Args:
            training: whether it trains.
        """
        if not training or self.size >= self._cluster.most_workers:
            self._free_since = None
            return False
        now = time.monotonic()
        if now - self._looked >= 1:
            self._looked = now
            free = self._hosts.places(self._worker) > 0
            self._free_since = (self._free_since or now) if free else None
        return self._free_since is not None and now - self._free_since >= self._cluster.grow_after_s

    @property
    def may_shrink(self) -> bool:
        """Whether the group could have fewer workers."""
        return self._cluster.elastic and self.size > self._cluster.least_workers

    @property
    def too_large(self) -> bool:
        """Whether a group waits for hosts for a while that it could do without."""
        return self.may_shrink and self._hosts.waited_s > _SHRINK_AFTER_S

    def failed(self, error: WorkersFailed) -> None:
        """Takes note of a group that failed. Raises it if no other one may be started."""
        self._failures += 1
        allowed = self._cluster.max_failures
        if not self._cluster.elastic or (allowed != -1 and self._failures > allowed):
            raise error

    def _settled_places(self) -> int:
        """Places that are free on the hosts, once their number stays the same."""
        began = since = time.monotonic()
        places = -1
        while True:
            found, now = self._hosts.places(self._worker), time.monotonic()
            if found != places:
                places, since = found, now
            if places >= self._cluster.most_workers or now - since >= _SETTLED_S or now - began >= _SETTLE_S:
                return places
            time.sleep(_LOOK_S)


def needed_by(cluster: ClusterConfig, workers: int) -> dict[str, float]:
    """CPUs and GPUs of so many workers of a run."""
    return {"CPU": workers * cluster.cpus_per_worker, "GPU": workers if cluster.gpu else 0}
