"""`--workers MIN:MAX` on Ray Train: a place that is taken away and given back, on one machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikefleet.cluster.group_size import GroupSize, WorkersFailed
from spikefleet.cluster.host_watch import HostWatch
from spikefleet.cluster.ray_train import train_on_ray
from spikefleet.config.cluster_config import ClusterConfig
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Event, Note, NullSink, StepDone, WorkerFailed
from spikefleet_pipelines.store.reader import Store
from support.snapshots import end_of

pytestmark = pytest.mark.xdist_group("ray")

SETTINGS = [
    "model.width=0.125",
    "model.timesteps=1",
    "train.epochs=4",
    "train.global_batch=216",
    "tracking.every_steps=1",
    "cluster.workers=1:2",
    "cluster.grow_after_s=1",
    "checkpoint.every_steps=1",
]
STEPS, KILLED_AT, GROWS_FROM = 24, 3, 8


class PlaceTaken:
    """Keeps the events; occupies a CPU of the machine from the first failure on, until some steps are done."""

    def __init__(self, folder: Path) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []
        self._folder = folder
        self._taken: threading.Event | None = None

    def emit(self, event: Event) -> None:
        if isinstance(event, WorkerFailed):
            self._taken = take_a_cpu()
        if isinstance(event, Note):
            self.notes.append(event.text)
        if isinstance(event, StepDone):
            self.steps.append(event.step)
            if event.step >= GROWS_FROM and self._taken is not None:
                self._taken.set()
                self._taken = None


def take_a_cpu() -> threading.Event:
    """Runs something else on one CPU, until the event is set."""
    import ray

    class Other:
        def there(self) -> None:
            return

    actor: Any = ray.remote(num_cpus=1)(Other)
    other, given_back = actor.remote(), threading.Event()
    ray.get(other.there.remote(), timeout=100)

    def wait() -> None:
        given_back.wait()
        ray.kill(other)

    threading.Thread(target=wait, daemon=True).start()
    return given_back


def dies_once(mark: Path) -> Callable[[ProcessGroup, int], None]:
    """Kills the second rank once, before a step; one rank alone is slow enough for its place to be given back.

    The function that is returned travels to the workers by value, which cannot import this module.
    """
    died, killed_at, grows_from = str(mark), KILLED_AT, GROWS_FROM

    def before_step(group: ProcessGroup, step: int) -> None:
        if step == killed_at and group.rank == 1 and not os.path.exists(died):  # noqa: PTH110
            os.close(os.open(died, os.O_CREAT))
            os.kill(os.getpid(), signal.SIGKILL)
        if group.size == 1 and step > grows_from:
            time.sleep(0.5)

    return before_step


@pytest.mark.slow  # three groups of Ray Train, one after the other; `tests/cluster` does it with hosts
def test_a_group_shrinks_with_a_lost_place_and_grows_after_a_checkpoint(
    ray_on_two_cpus: None, stores_dir: Path, tmp_path: Path
) -> None:
    config = load_config("digits", parse_overrides(SETTINGS))
    sink, run_dir = PlaceTaken(tmp_path), tmp_path / "run"
    train_on_ray(config, Store.open(stores_dir / "digits"), run_dir, sink, before_step=dies_once(tmp_path / "died"))
    assert "the run continues with 1 worker instead of 2" in sink.notes
    assert "the run continues with 2 workers instead of 1" in sink.notes
    sizes = end_of(run_dir).state["world_sizes"]
    assert [size["workers"] for size in sizes] == [2, 1, 2]
    assert sizes[1]["from_step"] == KILLED_AT
    assert GROWS_FROM < sizes[2]["from_step"] < STEPS
    assert sink.steps == list(range(1, STEPS + 1)), "no step was done again: each has a checkpoint"


class Hosts(HostWatch):
    """Hosts of which only the number of free places is known."""

    def __init__(self, *places: int) -> None:
        self._places = list(places)
        self.waits = 0.0

    def places(self, worker: Any) -> int:
        return self._places.pop(0) if len(self._places) > 1 else self._places[0]

    def need(self, needed: Any) -> None:
        self.needed = needed

    @property
    def waited_s(self) -> float:
        return self.waits


@pytest.mark.parametrize(("free", "size"), [(0, 2), (2, 2), (3, 3), (9, 4)])
def test_a_group_has_the_places_that_there_are_within_its_range(free: int, size: int) -> None:
    hosts = Hosts(free)
    sizes = GroupSize(ClusterConfig(workers=(2, 4), cpus_per_worker=3), hosts, NullSink())
    assert sizes.choose() == size
    assert hosts.needed == {"CPU": 3 * size, "GPU": 0}
    assert sizes.max_failures == 0
    hosts.waits = 60
    assert sizes.too_large is (size > 2)


def test_a_group_of_one_number_asks_for_it_whatever_is_there() -> None:
    hosts = Hosts(0)
    sizes = GroupSize(ClusterConfig(workers=3, max_failures=7), hosts, NullSink())
    assert (sizes.choose(), sizes.max_failures, sizes.grows(training=True)) == (3, 7, False)
    hosts.waits = 60
    assert not sizes.too_large
    with pytest.raises(WorkersFailed):
        sizes.failed(WorkersFailed("all"))


def test_a_group_grows_when_a_place_has_been_free_for_a_while_and_training_goes_on() -> None:
    hosts = Hosts(1)
    sizes = GroupSize(ClusterConfig(workers=(1, 2), grow_after_s=0.01), hosts, NullSink())
    assert sizes.choose() == 1
    assert not sizes.grows(training=False)
    assert not sizes.grows(training=True), "just seen"
    time.sleep(0.02)
    assert sizes.grows(training=True)
    assert not sizes.grows(training=False)


@pytest.mark.parametrize(("allowed", "failures"), [(0, 0), (2, 2)])
def test_an_elastic_run_counts_its_failures_itself(allowed: int, failures: int) -> None:
    sizes = GroupSize(ClusterConfig(workers=(1, 2), max_failures=allowed), Hosts(2), NullSink())
    for _ in range(failures):
        sizes.failed(WorkersFailed("one"))
    with pytest.raises(WorkersFailed):
        sizes.failed(WorkersFailed("one more"))
