"""Hosts that a search loses: why a trial runs again, and what the search waits for while none fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from spikefleet_tune.capacity import needed_by_trial, nodes_of_cluster, there, trials_at_once
from spikefleet_tune.search_file import ResourcesConfig

_SETTLE_S = 3.0
"""A trial's error arrives before Ray knows that its host is gone."""
_LOOK_S = 0.1
_LOOK_EVERY_S = 2.0


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
        return f"{_gone(addresses)}, {places} of {self._places} trials at a time"


class Waits:
    """Since when no trial of a search fits into the cluster; used by the process that runs it.

    Args:
        resources: what a trial takes.
        wait_minutes: how long the search may wait; -1: for ever.
        say: gets the sentence when it begins to wait, and an empty string when a trial fits again.
    """

    def __init__(self, resources: ResourcesConfig, wait_minutes: float, say: Callable[[str], None]) -> None:
        self._resources, self._wait_minutes, self._say = resources, wait_minutes, say
        self._known = _alive()
        self._lost: dict[str, str] = {}
        self._looked = 0.0
        self._since: float | None = None
        self.overdue: str | None = None
        """The sentence for a search that has waited too long; None while it may wait on."""

    def tick(self) -> None:
        """Looks at the hosts, at most every two seconds."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        alive, nodes = _alive(), nodes_of_cluster()
        self._lost |= {node: address for node, address in self._known.items() if node not in alive}
        self._known = alive
        if trials_at_once(self._resources, nodes):
            if self._since is not None:
                self._say("")
            self._since = None
            self._lost.clear()
            return
        lost = f"{_gone(list(self._lost.values()))}; " if self._lost else ""
        sentence = (
            f"{lost}the search waits for hosts: a trial needs {needed_by_trial(self._resources)}, and the cluster has "
            f"{there(nodes)}"
        )
        if self._since is None:
            self._since = now
            self._say(sentence)
        elif 0 <= 60 * self._wait_minutes <= now - self._since:
            self.overdue = (
                f"{sentence}, and cluster.wait_minutes={self._wait_minutes:g} are over; run the same command again to "
                "resume"
            )


def _gone(addresses: Sequence[str]) -> str:
    lost = list(dict.fromkeys(addresses))
    return f"host {lost[0]} is gone" if len(lost) == 1 else f"hosts {', '.join(lost)} are gone"


def _alive() -> dict[str, str]:
    """Addresses of the living hosts by Ray's id."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
