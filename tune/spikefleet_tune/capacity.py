"""How many trials the cluster can run at a time, so that worker groups never deadlock waiting for one another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

from spikefleet_tune.errors import SearchError
from spikefleet_tune.messages import counted
from spikefleet_tune.search_file import ResourcesConfig, Search

TRIAL_MEMORY = 256 * 2**20
"""Bytes that a trial requests when it starts its own workers: Ray schedules nothing that requests nothing."""

_EPSILON = 1e-9


def trials_at_once(resources: ResourcesConfig, nodes: Iterable[Mapping[str, float]]) -> int:
    """Number of trials whose workers all fit at the same time.

    Args:
        resources: what one trial takes; a worker never spans two nodes.
        nodes: resources of each node, such as `{"CPU": 8.0, "GPU": 1.0}`.

    Returns:
        The number of trials, at most `resources.max_concurrent`.
    """
    places = 0
    for node in nodes:
        here = [int((node.get("CPU", 0.0) + _EPSILON) // resources.cpus_per_worker)]
        if resources.gpus_per_worker:
            here.append(int((node.get("GPU", 0.0) + _EPSILON) // resources.gpus_per_worker))
        places += min(here)
    fitting = places // resources.workers
    return fitting if resources.max_concurrent is None else min(fitting, resources.max_concurrent)


def nodes_of_cluster() -> list[Mapping[str, float]]:
    """Resources of each live node of the connected Ray cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def trial_request(resources: ResourcesConfig) -> dict[str, float]:
    """Ray resources of the trial's own process: those of its worker, or no CPU when it starts a worker group."""
    if resources.workers > 1:
        return {"memory": TRIAL_MEMORY}
    request = {"CPU": resources.cpus_per_worker}
    return {**request, "GPU": resources.gpus_per_worker} if resources.gpus_per_worker else request


def refuse_what_never_fits(resources: ResourcesConfig, nodes: Iterable[Mapping[str, float]]) -> None:
    """Raises SearchError when the cluster cannot run a single trial."""
    present = list(nodes)
    if trials_at_once(resources, present):
        return
    raise SearchError(
        f"a trial needs {needed_by_trial(resources)}, but the cluster has {there(present)}; lower resources.workers, "
        "cpus_per_worker or gpus_per_worker, or set resources.autoscaling=true where hosts will join"
    )


def needed_by_trial(resources: ResourcesConfig) -> str:
    """Such as "2 x 1 CPUs and 2 x 1 GPUs"."""
    needed = f"{resources.workers} x {resources.cpus_per_worker:g} CPUs"
    if resources.gpus_per_worker:
        needed += f" and {resources.workers} x {resources.gpus_per_worker:g} GPUs"
    return needed


def there(nodes: Iterable[Mapping[str, float]]) -> str:
    """Such as "4 CPUs and 0 GPUs on 2 nodes"."""
    present = list(nodes)
    cpus, gpus = (sum(node.get(kind, 0.0) for node in present) for kind in ("CPU", "GPU"))
    return f"{cpus:g} CPUs and {gpus:g} GPUs on {counted(len(present), 'node')}"


@contextmanager
def requested(resources: ResourcesConfig) -> Iterator[None]:
    """Asks the autoscaler of a cluster that grows for what the trials need, for the length of the block."""
    if not resources.autoscaling:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        worker["GPU"] = resources.gpus_per_worker
    request_resources(bundles=[worker] * (resources.workers * (resources.max_concurrent or 1)))
    try:
        yield
    finally:
        with suppress(Exception):  # a cluster that is gone needs no release
            request_resources(bundles=[])


def check_population(search: Search, trials: int | None, nodes: Iterable[Mapping[str, float]]) -> None:
    """Raises SearchError when a PBT population of multi-worker trials does not fit into the cluster.

    Ray Tune time-shares a population of one-worker trials, but it does not see workers that trials start themselves.
    """
    fitting = trials_at_once(search.resources, nodes)
    if search.resources.workers > 1 and (trials is None or trials > fitting):
        raise SearchError(
            f"scheduler pbt with {search.resources.workers} workers per trial runs its whole population at once, but "
            f"the cluster fits {counted(fitting, 'trial')}; set budget.trials={fitting} or lower, or "
            "resources.workers=1"
        )
