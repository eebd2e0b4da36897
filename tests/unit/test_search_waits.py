"""What a search says while no trial fits into the cluster, and for how long it waits; Ray's list of hosts is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from spikefleet_tune import lost_hosts
from spikefleet_tune.journal import Clock, SearchFolder
from spikefleet_tune.ledger import Ledger, SilentObserver
from spikefleet_tune.lost_hosts import Waits
from spikefleet_tune.on_tune import TrialSource
from spikefleet_tune.samplers import PointSampler
from spikefleet_tune.search_file import ResourcesConfig, search_of
from support.ray_nodes import nodes


class Hosts:
    """Ray's answers: hosts a and b with one CPU each."""

    def __init__(self) -> None:
        self.there = {"a", "b"}

    def nodes(self) -> list[dict[str, Any]]:
        return nodes("ab", self.there, 1.0)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    known = Hosts()
    monkeypatch.setattr(ray, "nodes", known.nodes)
    monkeypatch.setattr(lost_hosts, "_LOOK_EVERY_S", 0.0)
    return known


def test_a_search_waits_while_no_trial_fits_and_no_longer(hosts: Hosts) -> None:
    said: list[str] = []
    waits = Waits(ResourcesConfig(workers=2), 30, said.append)
    waits.tick()
    assert said == [], "both workers have a place"
    hosts.there = {"a"}
    for _ in range(3):
        waits.tick()
    needs = "the search waits for hosts: a trial needs 2 x 1 CPUs, and the cluster has 1 CPUs and 0 GPUs on 1 node"
    assert said == [f"host 10.0.0.2 is gone; {needs}"], "said once"
    hosts.there = {"a", "b"}
    waits.tick()
    hosts.there = set()
    waits.tick()
    assert said[1] == ""
    assert said[2].startswith("hosts 10.0.0.1, 10.0.0.2 are gone; the search waits for hosts: ")
    assert waits.overdue is None


@pytest.mark.parametrize(("minutes", "over"), [(0.0, True), (30.0, False), (-1.0, False)])
def test_a_search_waits_for_its_minutes(hosts: Hosts, minutes: float, over: bool) -> None:
    hosts.there = set()
    waits = Waits(ResourcesConfig(), minutes, lambda sentence: None)
    waits.tick()
    waits.tick()
    assert (waits.overdue is not None) == over
    if waits.overdue is not None:
        assert waits.overdue.startswith("the search waits for hosts"), "none of them was there before"
        assert waits.overdue.endswith("cluster.wait_minutes=0 are over; run the same command again to resume")


@pytest.mark.parametrize(("minutes", "over"), [(0.0, True), (30.0, False)])
def test_a_search_that_has_waited_too_long_has_no_more_trials(
    hosts: Hosts, tmp_path: Path, minutes: float, over: bool
) -> None:
    """Ray Tune asks for the next trial again and again where it has none, and for nothing else."""
    tree = {"recipe": "none", "space": {"x": {"choice": [0, 1]}}, "objectives": {"gain": "max"}, "sampler": "grid"}
    search, folder = search_of({**tree, "budget": {"trials": 2}}), SearchFolder(tmp_path, "waits")
    with folder.lock():
        folder.begin(search)
        past, sampler = folder.read(), PointSampler(search, [])
        ledger = Ledger(search, folder, past, sampler, SilentObserver())
        source = TrialSource(search, past, sampler, ledger, Clock(folder))
        source.waits = Waits(search.resources, minutes, ledger.waits)
        hosts.there = set()
        assert not source.is_finished(), "it begins to wait"
        assert source.next_trial() is None
        assert (source.is_finished(), source.overdue is not None) == (over, over)
