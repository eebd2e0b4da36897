"""The section `cluster` of a configuration."""

from __future__ import annotations

from pydantic import Field

from spikefleet.config.section import Section
from spikefleet.config.worker_count import WorkerCount
from spikefleet_tune.messages import counted


class ClusterConfig(Section):
    """Workers and their resources.

    The number of workers changes the result: it decides which samples share batch statistics, and the order of sums.
    A run with a range of it is therefore not repeatable bit for bit.
    """

    workers: WorkerCount = Field(
        1,
        description="Ray Train workers; 0: train in this process, without Ray; MIN:MAX: as many as the hosts have "
        "places for, fewer when a host is lost, more when one joins",
    )
    gpu: bool = Field(False, description="use one GPU per worker")
    cpus_per_worker: float = Field(1, gt=0, le=100_000, description="CPUs of each worker")
    max_failures: int = Field(3, ge=-1, description="restarts after a worker failure; -1: no limit")
    autoscaling: bool = Field(
        False,
        description="the cluster grows: hosts that are missing at the start are asked for and waited for, not refused",
    )
    wait_minutes: float = Field(
        30,
        ge=-1,
        le=100_000,
        description="minutes that the run may wait for hosts that are gone or do not come; -1: for ever",
    )
    grace_s: float = Field(
        30, gt=0, le=3600, description="seconds in which workers may end their step when the run is asked to stop"
    )
    grow_after_s: float = Field(
        30,
        gt=0,
        le=100_000,
        description="seconds for which a place must be free before a run with workers=MIN:MAX restarts with more",
    )

    @property
    def elastic(self) -> bool:
        """Whether the number of workers follows the hosts."""
        return not isinstance(self.workers, int)

    @property
    def least_workers(self) -> int:
        """The smallest number of processes that train; 1 for a run without Ray."""
        return max(1, self.workers) if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The largest number of processes that train; 1 for a run without Ray."""
        return max(1, self.workers) if isinstance(self.workers, int) else self.workers[1]

    def shown_workers(self, noun: str = "worker") -> str:
        """Such as "2 workers" or "1 to 4 workers"."""
        if self.elastic:
            return f"{self.least_workers} to {counted(self.most_workers, noun)}"
        return counted(self.most_workers, noun)
