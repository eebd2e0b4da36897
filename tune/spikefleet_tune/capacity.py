"""How many trials fit into the cluster at a time, so that their groups of workers never wait for one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from spikefleet_tune.errors import SearchError
from spikefleet_tune.search_file import ResourcesConfig, Search

TRIAL_MEMORY = 256 * 2**20
"""What a trial that starts its own workers asks for instead of a CPU: Ray places nothing that asks for nothing."""

_EPSILON = 1e-9


def trials_at_once(resources: ResourcesConfig, nodes: Iterable[Mapping[str, float]]) -> int:
    """Trials whose workers all have a place at the same time; each worker stays on one node."""
    places = 0
    for node in nodes:
        here = [int((node.get("CPU", 0.0) + _EPSILON) // resources.cpus_per_worker)]
        if resources.gpus_per_worker:
            here.append(int((node.get("GPU", 0.0) + _EPSILON) // resources.gpus_per_worker))
        places += min(here)
    fitting = places // resources.workers
    return fitting if resources.max_concurrent is None else min(fitting, resources.max_concurrent)


def nodes_of_cluster() -> list[Mapping[str, float]]:
    """Resources of each node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def trial_request(resources: ResourcesConfig) -> dict[str, float]:
    """What the trial's own process asks for: its worker's share, or no CPU when it starts a group of workers."""
    if resources.workers > 1:
        return {"memory": TRIAL_MEMORY}
    request = {"CPU": resources.cpus_per_worker}
    return {**request, "GPU": resources.gpus_per_worker} if resources.gpus_per_worker else request


def refuse_what_never_fits(resources: ResourcesConfig, nodes: Iterable[Mapping[str, float]]) -> None:
    """Raises SearchError when not even one trial fits."""
    present = list(nodes)
    if trials_at_once(resources, present):
        return
    cpus, gpus = (sum(node.get(kind, 0.0) for node in present) for kind in ("CPU", "GPU"))
    asked = f"{resources.workers} x {resources.cpus_per_worker:g} CPUs"
    if resources.gpus_per_worker:
        asked += f" and {resources.workers} x {resources.gpus_per_worker:g} GPUs"
    raise SearchError(
        f"a trial takes {asked}, and the cluster has {cpus:g} CPUs and {gpus:g} GPUs on {len(present)} nodes; "
        "lower resources.workers, cpus_per_worker or gpus_per_worker"
    )


def check_population(search: Search, trials: int | None, nodes: Iterable[Mapping[str, float]]) -> None:
    """Raises SearchError when a population of trials that start their own workers cannot run as a whole.

    Ray Tune lets a population of one-worker trials take turns; it knows nothing of the workers of others.
    """
    fitting = trials_at_once(search.resources, nodes)
    if search.resources.workers > 1 and (trials is None or trials > fitting):
        raise SearchError(
            f"scheduler pbt with {search.resources.workers} workers a trial runs its whole population at once, and the "
            f"cluster holds {fitting} trials; set budget.trials={fitting} or lower, or resources.workers=1"
        )
