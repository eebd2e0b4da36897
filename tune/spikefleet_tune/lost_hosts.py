"""Why a trial runs again: the host that it ran on is gone, or something of its own."""

from __future__ import annotations

import time

from spikefleet_tune.capacity import nodes_of_cluster, trials_at_once
from spikefleet_tune.search_file import ResourcesConfig

_SETTLE_S = 3.0
"""A trial's error arrives before Ray knows that its host is gone."""
_LOOK_S = 0.1


class Hosts:
    """The hosts of a search since it began; used by the process that runs it.

    Args:
        resources: what a trial takes.
    """

    def __init__(self, resources: ResourcesConfig) -> None:
        self._resources = resources
        self._known = _alive()
        self._places = trials_at_once(resources, nodes_of_cluster())

    def lost(self) -> str | None:
        """Names the hosts that are gone since the last call, and how many trials still run at a time; None for none.

        It waits for Ray to notice.
        """
        deadline = time.monotonic() + (_SETTLE_S if len(self._known) > 1 else 0.0)
        while not (gone := sorted(self._known.keys() - (alive := _alive()).keys())) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        addresses = [self._known[node] for node in gone]
        self._known = alive
        if not addresses:
            return None
        places = trials_at_once(self._resources, nodes_of_cluster())
        named = f"host {addresses[0]} is" if len(addresses) == 1 else f"hosts {', '.join(addresses)} are"
        return f"{named} gone, {places} of {self._places} trials at a time"


def _alive() -> dict[str, str]:
    """Addresses of the living hosts by Ray's id."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
