"""What a driver makes of Ray's list of hosts, without a cluster: which host failed its workers, and which did not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from spikefleet.cluster import group_size, host_watch
from spikefleet.cluster.group_size import GroupSize, needed_by
from spikefleet.cluster.host_watch import NODE, HostWatch
from spikefleet.cluster.watched_sink import WatchedSink
from spikefleet.config.cluster_config import ClusterConfig
from spikefleet.training.events import Event, Note, Started, Waiting, WorkerFailed
from support.ray_nodes import nodes


class Heard:
    """Keeps all events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


class Hosts:
    """Ray's answers: hosts a, b and c with two CPUs each."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.draining: Callable[[], dict[str, int]] = dict

    def nodes(self) -> list[dict[str, Any]]:
        return nodes("abc", set("abc") - self.gone, 2.0)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    known = Hosts()
    monkeypatch.setattr(ray, "nodes", known.nodes)
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: known.draining())
    for name in ("_SETTLE_S", "_SETTLE_PEER_S", "_SETTLE_LOOK_S", "_LOOK_EVERY_S"):
        monkeypatch.setattr(host_watch, name, 0.01)
    return known


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    """An attempt whose workers are on hosts a and b."""
    for rank, node in enumerate("ab"):
        (tmp_path / f"{NODE}{rank}").write_text(node)
    return tmp_path


def watched(attempt: Path, heard: Heard, cpus: float = 2) -> WatchedSink:
    sink = WatchedSink(heard, HostWatch({"CPU": cpus}, 30, heard), "run")
    sink.attempt = attempt
    sink.emit(Started(0, 4, 2, 2))
    return sink


def reasons(heard: Heard) -> list[str]:
    return [event.reason for event in heard.events if isinstance(event, WorkerFailed)]


def test_an_error_of_a_worker_stays_when_an_idle_host_was_removed_before(hosts: Hosts, attempt: Path) -> None:
    heard = Heard()
    sink = watched(attempt, heard)
    hosts.gone = {"c"}
    sink.hosts._look()
    sink.emit(WorkerFailed("CUDA out of memory"))
    assert reasons(heard) == ["CUDA out of memory"]


def test_a_host_of_a_worker_is_named_before_what_the_workers_say(hosts: Hosts, attempt: Path) -> None:
    heard = Heard()
    sink = watched(attempt, heard)
    hosts.gone = {"b", "c"}
    sink.emit(WorkerFailed("connection reset by peer"))
    sink.emit(WorkerFailed("CUDA out of memory"))
    assert reasons(heard) == ["host 10.0.0.2 is gone", "host 10.0.0.2 is gone (CUDA out of memory)"]
    sink.attempt = None
    sink.emit(WorkerFailed("the workers did not start"))
    assert reasons(heard)[2] == "the workers did not start"


def test_without_the_list_of_draining_hosts_the_run_still_knows_what_is_there(hosts: Hosts, attempt: Path) -> None:
    def unknown() -> dict[str, int]:
        raise AttributeError("'GlobalState' object has no attribute 'get_draining_nodes'")

    hosts.draining = unknown
    heard = Heard()
    sink = watched(attempt, heard, cpus=6)
    sink.hosts._look()
    notes = [event.text for event in heard.events if isinstance(event, Note)]
    assert len(notes) == 1, "said once"
    assert "does not say which hosts will be taken away (AttributeError: 'GlobalState' object has no" in notes[0]
    hosts.gone = {"b"}
    sink.hosts._look()
    sink.hosts._looked = 0.0
    sink.hosts.tick(training=False)
    (waits,) = [event.what for event in heard.events if isinstance(event, Waiting)]
    assert waits == "host 10.0.0.2 is gone; the run waits for 2 more CPUs (4 of 6 there)"


def test_a_host_that_is_drained_is_leaving_if_it_has_a_worker(hosts: Hosts, attempt: Path) -> None:
    sink = watched(attempt, Heard())
    hosts.draining = lambda: {"c": 0}
    sink.hosts._look()
    assert sink.hosts.leaving(attempt) is None
    hosts.draining = lambda: {"b": 0, "c": 0}
    sink.hosts._look()
    assert sink.hosts.leaving(attempt) == "10.0.0.2"


def test_a_group_that_has_shrunk_does_not_shrink_again_for_the_wait_before(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1 to 4 workers with two CPUs each, two hosts are left."""
    hosts.gone = {"c"}
    monkeypatch.setattr(group_size, "_SETTLED_S", 0.0)
    free = {name: {"CPU": 2.0} for name in "ab"}
    monkeypatch.setattr(ray._private.state, "available_resources_per_node", lambda: free)
    cluster, heard = ClusterConfig(workers=(1, 4), cpus_per_worker=2), Heard()
    watch = HostWatch(needed_by(cluster, 1), 30, heard)
    sizes = GroupSize(cluster, watch, heard)
    sizes.size = 4
    watch.need(needed_by(cluster, 4))
    watch._looked = 0.0
    watch.tick(training=False)
    watch._since = time.time() - 60
    assert sizes.too_large, "the group of 4 has waited long enough"
    assert sizes.choose() == 2
    assert sizes.may_shrink
    assert not sizes.too_large


def test_hosts_that_have_enough_together_and_each_too_little_are_said(hosts: Hosts) -> None:
    heard = Heard()

    def watch(workers: int, cpus: float) -> HostWatch:
        cluster = ClusterConfig(workers=workers, cpus_per_worker=cpus)
        return HostWatch(needed_by(cluster, workers), 30, heard, needed_by(cluster, 1))

    assert watch(3, 2).too_small is None
    assert watch(6, 1).too_small is None
    assert watch(4, 2).too_small is None, "they lack CPUs, which is another sentence"
    assert watch(1, 4).too_small == "hosts with 4 CPUs for each worker (0 of 1 have a place)"
    waits = watch(4, 1.5)
    assert waits.too_small == "hosts with 1.5 CPUs for each worker (3 of 4 have a place)"
    waits._looked = 0.0
    waits.tick(training=False)
    (event,) = [event for event in heard.events if isinstance(event, Waiting)]
    assert event.what == "the run waits for hosts with 1.5 CPUs for each worker (3 of 4 have a place)"
    assert waits.waited_s > 0
