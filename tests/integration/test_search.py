"""Searches on a real Ray Tune with two CPUs: what ends, what goes on, and what is never run twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from spikefleet_tune.errors import SearchError, WaitedTooLong
from spikefleet_tune.journal import SearchFolder, TrialRecord, WarmStartPoint
from spikefleet_tune.ledger import Counts, SilentObserver, TrialStart
from spikefleet_tune.pareto import front
from spikefleet_tune.search import read_search_result, run_search
from spikefleet_tune.search_file import Search, search_of
from spikefleet_tune.trials import Report, Trainable, TrialPruned

pytestmark = pytest.mark.xdist_group("ray")


def _search(trials: int | None = 4, **changes: Any) -> Search:
    tree: dict[str, Any] = {
        "recipe": "none",
        "space": {"x": {"choice": [0, 1, 2, 3]}},
        "objectives": {"gain": "max", "cost": "min"},
        "sampler": "grid",
        **changes,
    }
    return search_of({**tree, "budget": {"trials": trials, **changes.get("budget", {})}})


def _counting(folder: Path) -> Trainable:
    """A trainable that leaves a mark for each time that it is run."""

    def trainable(overrides: Mapping[str, Any], name: str, report: Report) -> dict[str, float]:
        with (folder / f"{name}.runs").open("a") as marks:
            marks.write("x")
        x = overrides["x"]
        return {"gain": float(x), "cost": float(x % 2)}

    return trainable


def _runs(folder: Path) -> dict[str, int]:
    return {path.stem: len(path.read_text()) for path in sorted(folder.glob("*.runs"))}


class Diary(SilentObserver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []
        self.last: Counts | None = None

    def on_trial_started(self, trial: TrialStart, counts: Counts) -> None:
        self.entries.append(("started", trial.name))

    def on_trial_finished(self, record: TrialRecord, counts: Counts) -> None:
        self.entries.append((record.status, record.name))
        self.last = counts

    def on_trial_pruned(self, record: TrialRecord, counts: Counts) -> None:
        self.entries.append(("pruned", record.name))
        self.last = counts

    def on_trial_failed(self, record: TrialRecord, counts: Counts) -> None:
        self.entries.append(("failed", record.name))
        self.last = counts
        raise RuntimeError("an observer's own trouble")  # must stop nothing

    def on_trial_lost(self, trial: TrialStart, reason: str) -> None:
        assert reason
        self.entries.append(("lost", trial.name))


def test_every_trial_is_recorded_with_its_fate(ray_on_two_cpus: None, tmp_path: Path) -> None:
    def trainable(overrides: Mapping[str, Any], name: str, report: Report) -> dict[str, float]:
        x = overrides["x"]
        for epoch in (1, 2):
            report({"epoch": epoch, "gain": 9.0, "loss": float("nan") if x == 1 and epoch == 2 else 1.0})
        if x == 2:
            raise ValueError("the second line counts:\nwidth=0 is too small")
        if x == 3:
            raise TrialPruned("gradients grew without end")
        if x == 4:
            return {"gain": 1.0}
        if x == 5:
            return {"gain": float("inf"), "cost": 1.0}
        if x == 6 or (x == 7 and not (tmp_path / "died").exists()):
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"gain": float(x), "cost": 1.0, "fixed": float(overrides["fixed"])}

    diary = Diary()
    search = _search(None, space={"x": {"int": [0, 7]}}, overrides={"fixed": 5})
    result = run_search(search, trainable, tmp_path, "fates", diary)
    fates = {record.overrides["x"]: (record.status, record.reason) for record in result.records}
    assert fates[0] == ("finished", "")
    assert fates[1] == ("pruned", "loss is nan in epoch 2")
    assert fates[2] == ("failed", "ValueError: width=0 is too small")
    assert fates[3] == ("pruned", "gradients grew without end")
    assert fates[4] == ("failed", "the trainable returned no 'cost', found gain")
    assert fates[5] == ("pruned", "gain is inf")
    assert fates[6][0] == "failed"
    assert fates[6][1]
    assert fates[7][0] == "finished"  # its process died once, and was started again
    assert result.complete
    assert {record.overrides["x"] for record in result.front} == {7}
    assert result.records[0].metrics.get("fixed", 5.0) == 5.0
    assert diary.last == Counts(total=8, finished=2, pruned=3, failed=3)
    assert sum(kind == "started" for kind, _ in diary.entries) >= 8
    died = {record.name for record in result.records if record.overrides["x"] in (6, 7)}
    assert {name for kind, name in diary.entries if kind == "lost"} == died, "each is said to run again"
    read = read_search_result(tmp_path, "fates")
    assert (read.records, read.complete) == (result.records, True)


def test_a_list_grows_and_what_was_tried_stays(ray_on_two_cpus: None, tmp_path: Path) -> None:
    def listed(*values: int) -> Search:
        return search_of(
            {
                "recipe": "none",
                "sampler": "listed",
                "points": [{"x": value} for value in values],
                "objectives": {"gain": "max"},
            }
        )

    diary = Diary()
    run_search(listed(3, 5), _counting(tmp_path), tmp_path / "searches", "list", diary)
    assert diary.last == Counts(total=2, finished=2)
    grown = run_search(listed(5, 7, 3), _counting(tmp_path), tmp_path / "searches", "list", diary)
    assert diary.last == Counts(total=3, finished=3)
    assert [record.overrides["x"] for record in grown.records] == [3, 5, 7]
    assert grown.complete
    assert run_search(listed(5), _counting(tmp_path), tmp_path / "searches", "list").records == grown.records
    assert _runs(tmp_path) == {"list-0000": 1, "list-0001": 1, "list-0002": 1}


def test_a_finished_search_runs_nothing_moves_and_is_extended(ray_on_two_cpus: None, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    search = _search(2, sampler="tpe")
    first = run_search(search, _counting(marks), tmp_path / "here", "moved")
    assert len(first.records) == 2
    with pytest.raises(SearchError, match="started with other settings: seed: expected 0, found 1"):
        run_search(_search(2, sampler="tpe", seed=1), _counting(marks), tmp_path / "here", "moved")
    shutil.move(tmp_path / "here", tmp_path / "there")
    again = run_search(search, _counting(marks), tmp_path / "there", "moved")
    assert again.records == first.records
    more = run_search(search, _counting(marks), tmp_path / "there", "moved", extend=1)
    assert more.records[:2] == first.records
    assert len(more.records) == 3
    assert _runs(marks) == {"moved-0000": 1, "moved-0001": 1, "moved-0002": 1}
    assert len({json.dumps(dict(record.point)) for record in more.records}) == 3
    assert len(run_search(search, _counting(marks), tmp_path / "there", "moved", extend=1).records) == 4
    with pytest.raises(SearchError, match=r"cannot be extended"):
        run_search(search, _counting(marks), tmp_path / "there", "moved", extend=1)
    curve = more.hypervolume_curve
    assert curve == sorted(curve)
    rows = [[record.metrics["gain"], record.metrics["cost"]] for record in more.records]
    assert [record.number for record in sorted(more.front, key=lambda one: one.number)] == front(rows, ("max", "min"))


def test_known_points_are_tried_first_or_told(ray_on_two_cpus: None, tmp_path: Path) -> None:
    known = [WarmStartPoint({"x": 2}), WarmStartPoint({"x": 1}, {"gain": 5.0, "cost": 0.0}, "run a")]
    search = _search(1, sampler="random")
    result = run_search(search, _counting(tmp_path), tmp_path, "warm", warm_start=known)
    assert [record.point for record in result.records] == [{"x": 2}]
    with pytest.raises(SearchError, match=r"run b: x=9 is outside the space"):
        run_search(search, _counting(tmp_path), tmp_path, "warm", warm_start=[WarmStartPoint({"x": 9}, None, "run b")])
    assert len(SearchFolder(tmp_path, "warm").read().warm_start) == 2


def test_groups_of_workers_never_wait_for_one_another(ray_on_two_cpus: None, tmp_path: Path) -> None:
    """Four trials of two one-CPU workers on two CPUs: one group at a time, and the trial itself holds no CPU."""

    def trainable(overrides: Mapping[str, Any], name: str, report: Report) -> dict[str, float]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        @ray.remote(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(None))
        class Worker:
            def work(self, x: int) -> int:
                return x

        workers = [Worker.remote() for _ in range(2)]  # type: ignore[attr-defined]
        found = ray.get([worker.work.remote(overrides["x"]) for worker in workers])
        return {"gain": float(sum(found)), "cost": 0.0}

    search = _search(resources={"workers": 2})
    result = run_search(search, trainable, tmp_path, "groups")
    assert sorted(record.metrics["gain"] for record in result.records) == [0.0, 2.0, 4.0, 6.0]
    with pytest.raises(SearchError, match=r"a trial needs 3 x 1 CPUs, but the cluster has 2 CPUs"):
        run_search(_search(resources={"workers": 3}), trainable, tmp_path, "large")


@pytest.mark.parametrize(
    "scheduler", [{"kind": "asha", "grace_epochs": 2, "reduction": 2}, {"kind": "median", "grace_epochs": 2}]
)
def test_schedulers_stop_trials_and_keep_their_best_epoch(
    scheduler: dict[str, Any], ray_on_two_cpus: None, tmp_path: Path
) -> None:
    def trainable(overrides: Mapping[str, Any], name: str, report: Report) -> dict[str, float]:
        x = overrides["x"]
        for epoch in range(1, 7):
            gain = x + (0.5 if epoch == 1 else 0.0)  # the first epoch is the best one
            report({"epoch": epoch, "gain": gain, "cost": float(epoch)})
        return {"gain": x + 0.5, "cost": 1.0}

    # In falling order, each later trial is worse than those before it at every rung.
    points = [{"x": x} for x in (3, 2, 1, 0)]
    search = _search(
        points=points,
        scheduler={**scheduler, "metric": "gain"},
        resources={"max_concurrent": 1},
    )
    result = run_search(search, trainable, tmp_path, "stopping")
    by_x = {record.overrides["x"]: record for record in result.records}
    assert by_x[3].status == "finished"
    assert by_x[0].status == "stopped"
    assert by_x[0].reason == f"stopped by {scheduler['kind']} after epoch 2"
    assert by_x[0].metrics == {"gain": 0.5, "cost": 1.0}  # of epoch 1, not of epoch 2
    assert by_x[0].epoch == 1.0


def test_pbt_changes_only_what_may_change(ray_on_two_cpus: None, tmp_path: Path) -> None:
    def trainable(overrides: Mapping[str, Any], name: str, report: Report) -> dict[str, float]:
        total, done = 0.0, 0
        if report.start_from is not None:
            state = json.loads((report.start_from / "state.json").read_text())
            total, done = state["total"], state["done"]
        for epoch in range(done + 1, 7):
            time.sleep(0.3)
            total += overrides["rate"]
            folder = tmp_path / f"{name}-{epoch}"
            folder.mkdir(exist_ok=True)
            (folder / "state.json").write_text(json.dumps({"total": total, "done": epoch}))
            report({"epoch": epoch, "gain": total, "cost": 1.0}, checkpoint=folder)
        return {"gain": total, "cost": 1.0}

    space = {"rate": {"choice": [1, 2, 4, 8]}, "width": {"choice": [16, 32]}}
    pbt = {"kind": "pbt", "metric": "gain", "interval_epochs": 2, "quantile": 0.5}
    points = [{"rate": 1, "width": 16}, {"rate": 8, "width": 32}]
    search = _search(2, space=space, scheduler=pbt, points=points, sampler="random")
    result = run_search(search, trainable, tmp_path, "pbt", mutable=lambda key: key == "rate")
    slow = result.records[0]
    assert [record.status for record in result.records] == ["finished", "finished"]
    assert slow.changes[0]["point"] == {"rate": 1, "width": 16}
    assert slow.overrides["width"] == 32  # it went on from the other's state, width included
    assert slow.metrics["gain"] > 6.0  # what a rate of 1 could have reached
    with pytest.raises(SearchError, match="needs a key that may change"):
        run_search(search, trainable, tmp_path, "firm", mutable=lambda key: False)
    asked = _search(2, space=space, scheduler={**pbt, "mutate": ["width"]}, sampler="random")
    with pytest.raises(SearchError, match=r"width cannot change during training; keys that can: rate"):
        run_search(asked, trainable, tmp_path, "asked", mutable=lambda key: key == "rate")


def test_hours_end_a_search_and_count_over_launches(ray_on_two_cpus: None, tmp_path: Path) -> None:
    def trainable(overrides: Mapping[str, Any], name: str, report: Report) -> dict[str, float]:
        for epoch in range(1, 1000):
            report({"epoch": epoch, "gain": float(-epoch), "cost": 1.0})
            time.sleep(0.2)
        return {"gain": 0.0, "cost": 0.0}

    search = _search(3, budget={"hours": 8 / 3600})
    result = run_search(search, trainable, tmp_path, "hours")
    assert result.seconds < 40
    assert not result.complete
    assert result.records[0].status == "stopped"
    assert result.records[0].metrics["gain"] == -1.0
    assert "used up" in result.records[0].reason
    since = time.monotonic()
    again = run_search(search, trainable, tmp_path, "hours")
    assert again.records == result.records
    assert time.monotonic() - since < 5


_DRIVER = """
import sys
import json
from pathlib import Path
import ray
from spikefleet_tune.search import run_search
from spikefleet_tune.search_file import search_of

root = Path(sys.argv[1])

def trainable(overrides, name, report):
    import time
    with (root / f"{name}.runs").open("a") as marks:
        marks.write("x")
    time.sleep(600 if overrides["x"] >= 2 else 0)
    return {"gain": float(overrides["x"]), "cost": float(overrides["x"] % 2)}

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
run_search(search_of(json.loads((root / "search.json").read_text())), trainable, root / "tune", "killed")
"""


def test_a_killed_driver_is_gone_on_with_elsewhere(ray_on_two_cpus: None, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(_DRIVER)
    search = _search(4, points=[{"x": 0}, {"x": 1}], sampler="tpe")
    (tmp_path / "search.json").write_text(json.dumps(search.dump()))
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: len(_runs(tmp_path)) >= 3)
        with pytest.raises(SearchError, match=rf"already running \(process {driver.pid} on "):
            run_search(search, _counting(tmp_path), tmp_path / "tune", "killed")
    finally:
        driver.kill()
        driver.wait()
    past = SearchFolder(tmp_path / "tune", "killed").read()
    assert (sorted(past.ended), past.unfinished) == ([0, 1], [2])
    shutil.move(tmp_path / "tune", tmp_path / "elsewhere")
    result = run_search(search, _counting(tmp_path), tmp_path / "elsewhere", "killed")
    assert list(result.records[:2]) == past.records
    assert result.records[2].point == past.started[2]["point"]
    assert [record.status for record in result.records] == ["finished"] * 4
    assert _runs(tmp_path) == {"killed-0000": 1, "killed-0001": 1, "killed-0002": 2, "killed-0003": 1}


def test_ctrl_c_frees_the_workers_and_leaves_a_search_to_go_on_with(ray_on_two_cpus: None, tmp_path: Path) -> None:
    mark = _counting(tmp_path)

    def trainable(overrides: Mapping[str, Any], name: str, report: Report) -> dict[str, float]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        @ray.remote(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(None))
        class Worker:
            def work(self) -> None:
                while overrides["x"] == 1 and not (tmp_path / "released").exists():
                    time.sleep(0.1)

        workers = [Worker.remote() for _ in range(2)]  # type: ignore[attr-defined]
        figures = mark(overrides, name, report)
        ray.get([worker.work.remote() for worker in workers])
        return dict(figures)

    search = _search(2, points=[{"x": 0}, {"x": 1}], resources={"workers": 2})

    def interrupt() -> None:
        _wait_for(lambda: len(_runs(tmp_path)) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_search(search, trainable, tmp_path, "interrupted", grace_s=0.5)  # it never looks at the signal
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler
    between = read_search_result(tmp_path, "interrupted")
    assert ([record.number for record in between.records], between.complete) == ([0], False)
    (tmp_path / "released").touch()
    result = run_search(search, trainable, tmp_path, "interrupted")
    assert ([record.number for record in result.records], result.complete) == ([0, 1], True)
    assert _runs(tmp_path) == {"interrupted-0000": 1, "interrupted-0001": 2}


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.1)


def test_failed_trials_are_tried_once_more_when_asked(ray_on_two_cpus: None, tmp_path: Path) -> None:
    def trainable(overrides: Mapping[str, Any], name: str, report: Report) -> dict[str, float]:
        if overrides["x"] == 0 and not (tmp_path / "mended").exists():
            raise OSError("disk full")
        if overrides["x"] == 1:
            raise ValueError("never")
        return {"gain": 1.0, "cost": 1.0}

    objectives = {"gain": "max", "cost": "min"}
    search = search_of(
        {"recipe": "none", "space": {"x": {"choice": [0, 1]}}, "objectives": objectives, "sampler": "grid"}
    )
    first = run_search(search, trainable, tmp_path, "retry")
    assert {record.status for record in first.records} == {"failed"}
    (tmp_path / "mended").touch()
    second = run_search(search, trainable, tmp_path, "retry", retry_failed=True)
    assert sorted(record.status for record in second.records) == ["failed", "finished"]
    third = run_search(search, trainable, tmp_path, "retry", retry_failed=True)
    assert third.records == second.records


@pytest.mark.slow  # waits for hosts that do not come
def test_a_search_on_a_cluster_that_grows_waits_for_hosts_and_resumes_where_there_are_some(
    ray_on_two_cpus: None, tmp_path: Path
) -> None:
    class Waiting(SilentObserver):
        said: ClassVar[list[str]] = []

        def on_waiting(self, what: str) -> None:
            self.said.append(what)

    large = {"cpus_per_worker": 3, "autoscaling": True}
    with pytest.raises(SearchError, match=r"set resources\.autoscaling=true where hosts will join"):
        run_search(_search(resources={"cpus_per_worker": 3}), _counting(tmp_path), tmp_path, "grows")
    with pytest.raises(WaitedTooLong, match=r"the search waits for hosts: a trial needs 1 x 3 CPUs, and .* are over"):
        run_search(_search(resources=large), _counting(tmp_path), tmp_path, "grows", Waiting(), wait_minutes=0.05)
    assert len(Waiting.said) == 1
    assert _runs(tmp_path) == {}
    assert run_search(_search(), _counting(tmp_path), tmp_path, "grows").complete
    assert set(_runs(tmp_path).values()) == {1}
