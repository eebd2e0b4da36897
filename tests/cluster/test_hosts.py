"""Hosts that die, come back or do not, are cut off or taken away: what the user is told, and that no bit differs."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from spikefleet.training.checkpoints import CheckpointFolder
from support.cluster_runs import EPOCH, Training, assert_equal, standing_still
from support.hosts import TOOLS, Cluster, patience

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(3600)]

WAITS = "host {} is gone; the run waits for 1 more CPU (1 of 2 there)"


@pytest.fixture
def folder(hosts: Cluster, tmp_path: Path) -> Path:
    """For runs; the hosts are there when the test begins."""
    return tmp_path


def training(cluster: Cluster, folder: Path, stores_dir: Path, *more: str) -> Training:
    run = Training(cluster, folder, stores_dir, *more)
    run.start()
    run.wait_for_step(EPOCH + 2)
    return run


def kill_a_host(run: Training) -> str:
    """Kills the second host, and waits until the run says so; returns its address."""
    host = run.cluster.workers[1]
    assert host.die() > 3, "a raylet, its agents and a worker"
    waits = WAITS.format(host.address)
    run.wait_until(lambda: waits in run.said, "it says what it waits for", seconds=60)
    run.wait_until(lambda: run.record()["status"] == "waiting", "run.json says so", seconds=10)
    assert run.record()["waiting"]["for"] == waits
    lines = run.said.splitlines()
    first = next(line for line in lines if "failed" in line or "gone" in line)
    assert first.startswith(f"a worker failed: host {host.address} is gone"), "before what its workers say of it"
    assert "pair.cc" not in run.said
    return host.address


def test_a_host_that_dies_is_named_and_waited_for_and_comes_back(
    folder: Path, cluster: Cluster, clean: Training, stores_dir: Path
) -> None:
    run = training(cluster, folder, stores_dir)
    try:
        kill_a_host(run)
        cluster.mend()
        run.finish()
    finally:
        run.end()
    record = run.record()
    assert (record["status"], record["waiting"], record["restarts"]) == ("finished", None, 1)
    assert_equal(run, clean)


@pytest.mark.slow  # two trainings over hosts, one after the other
def test_a_host_that_does_not_come_back_ends_the_run_in_time(
    folder: Path, cluster: Cluster, clean: Training, stores_dir: Path
) -> None:
    run = training(cluster, folder, stores_dir, "cluster.wait_minutes=0.1")
    try:
        kill_a_host(run)
        said = run.finish(code=1, seconds=60)
        assert "and cluster.wait_minutes=0.1 are over; run the same command again to resume" in said
        assert "Traceback" not in said
        assert (run.record()["status"], run.record()["waiting"]) == ("failed", None)
        cluster.mend()
        run.start()
        run.finish()
    finally:
        run.end()
    assert_equal(run, clean)


@pytest.mark.slow  # two trainings over hosts, one after the other
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_waiting(
    folder: Path, cluster: Cluster, stores_dir: Path, signum: signal.Signals, code: int
) -> None:
    run = training(cluster, folder, stores_dir)
    try:
        kill_a_host(run)
        asked = time.monotonic()
        run.send(signum)
        said = run.finish(code, seconds=60)
    finally:
        run.end()
    assert time.monotonic() - asked < patience(10)
    assert "Traceback" not in said
    assert (run.record()["status"], run.record()["signal"]) == ("interrupted", signum.name)
    assert CheckpointFolder(run.run_dir / "checkpoints").latest() is not None


@pytest.mark.slow  # a training over hosts that waits for one
def test_a_host_that_is_taken_away_costs_no_failure_and_no_step(
    folder: Path, cluster: Cluster, clean: Training, stores_dir: Path
) -> None:
    run = training(cluster, folder, stores_dir, "cluster.max_failures=0", "checkpoint.every_epochs=100")
    host = cluster.workers[1]
    try:
        node = cluster.node_id(host)
        words = ["drain-node", "--address", cluster.address, "--node-id", node]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        with standing_still(cluster.workers[0]):
            cluster.head.call([str(TOOLS / "ray"), *words, "--deadline-remaining-seconds", "60"])
        gone = f"host {host.address} is being taken away; its steps are in a checkpoint"
        run.wait_until(lambda: gone in run.said, "it stops for the host", seconds=60)
        run.wait_until(lambda: run.record()["status"] == "waiting", "it waits for another one", seconds=60)
        stopped = CheckpointFolder(run.run_dir / "checkpoints").latest()
        assert stopped is not None, "where no checkpoint was due"
        cluster.wait_for_hosts(2)
        cluster.mend()
        said = run.finish()
    finally:
        run.end()
    assert f"resuming from {stopped.name}" in said
    assert_equal(run, clean)


@pytest.mark.slow  # a training over hosts that waits for one
def test_a_cluster_that_grows_is_waited_for(folder: Path, cluster: Cluster, clean: Training, stores_dir: Path) -> None:
    """The autoscaler is a host that joins later. Without `cluster.autoscaling` the missing CPU is refused."""
    assert cluster.workers[1].die() > 3
    cluster.wait_for_hosts(2)
    refused = Training(cluster, folder, stores_dir)
    refused.start()
    assert "the cluster has 1; lower --workers" in refused.finish(code=2)
    run = Training(cluster, folder, stores_dir, "cluster.autoscaling=true")
    run.start()
    try:
        run.wait_until(lambda: "the run waits for 1 more CPU (1 of 2 there)" in run.said, "it waits")
        assert "is gone" not in run.said
        cluster.mend()
        run.finish()
    finally:
        run.end()
    assert run.record()["restarts"] == 0
    assert_equal(run, clean)


@pytest.mark.slow  # Ray repeats its connections for seconds
def test_a_link_that_is_cut_for_some_seconds_restarts_nothing(
    folder: Path, cluster: Cluster, clean: Training, stores_dir: Path
) -> None:
    run = training(cluster, folder, stores_dir)
    host = cluster.workers[0]
    try:
        before = run.step()
        host.cut()
        time.sleep(8)
        during = run.step()
        host.cut(up=True)
        run.finish()
    finally:
        host.cut(up=True)
        run.end()
    assert during - before <= 2, "the link was cut"
    assert run.record()["restarts"] == 0
    assert_equal(run, clean)


@pytest.mark.slow  # until Ray gives the host up
def test_a_link_that_is_cut_until_the_host_is_given_up_is_a_host_that_is_gone(
    folder: Path, cluster: Cluster, clean: Training, stores_dir: Path
) -> None:
    """Its raylet ends by itself when the link is back, for the others have gone on without it."""
    run = training(cluster, folder, stores_dir)
    host = cluster.workers[1]
    try:
        host.cut()
        waits = WAITS.format(host.address)
        run.wait_until(lambda: waits in run.said, "it says what it waits for", seconds=100)
        assert host.find("raylet/raylet"), "the host itself lives"
        host.cut(up=True)
        run.wait_until(lambda: not host.find("raylet/raylet"), "its raylet has ended", seconds=60)
        cluster.mend()
        run.finish()
    finally:
        host.cut(up=True)
        run.end()
    assert (run.record()["status"], run.record()["restarts"]) == ("finished", 1)
    assert_equal(run, clean)


@pytest.mark.slow  # two trainings over hosts, one after the other
def test_a_killed_driver_resumes_by_the_same_command(
    folder: Path, cluster: Cluster, clean: Training, stores_dir: Path
) -> None:
    run = training(cluster, folder, stores_dir)
    run.send(signal.SIGKILL)
    run.finish(-signal.SIGKILL)
    run.start()
    run.finish()
    assert_equal(run, clean)


SEARCH = """
recipe: digits
overrides: {train.epochs: 3, model.width: 0.125, model.timesteps: 2}
space: {optim.lr: {uniform: [0.01, 0.2]}}
objectives: {val/top1: max}
sampler: random
budget: {trials: 4}
"""


@pytest.mark.slow  # two searches over hosts
def test_a_search_says_in_a_line_which_host_is_gone_and_which_trial_runs_again(
    folder: Path, cluster: Cluster, stores_dir: Path
) -> None:
    (folder / "small.yaml").write_text(SEARCH)
    found = []
    for fault in (False, True):
        runs = folder / f"fault {fault}"
        runs.mkdir()
        words = ["tune", str(folder / "small.yaml"), "--runs-dir", str(runs), "--stores-dir", str(stores_dir), "--json"]
        host = cluster.workers[1]
        with (runs / "out.txt").open("w") as out, (runs / "log.txt").open("w") as log:
            process = cluster.head.start(
                [str(TOOLS / "spikefleet"), *words, "--address", cluster.address], out, log.fileno()
            )
        if fault:
            trials = runs / "searches" / "small" / "trials"
            began = time.monotonic()
            while len(list(trials.glob("*/checkpoints/step-*"))) < 1:
                assert process.poll() is None, (runs / "log.txt").read_text()
                assert time.monotonic() - began < patience(100)
                time.sleep(0.1)
            assert host.die() > 3
        assert process.wait(patience(300)) == 0, (runs / "log.txt").read_text()
        said = (runs / "log.txt").read_text()
        assert "Traceback" not in said
        again = re.findall(rf"trial \S+  runs again: host {host.address} is gone, 1 of 2 trials at a time", said)
        assert len(again) == (1 if fault else 0), said
        ends = sorted(path.parent.parent for path in trials_of(runs))
        found.append({end.name: (end / "report" / "evaluation.json").read_bytes() for end in ends})
    assert found[0] == found[1], "every trial has the metrics that it has without a fault"


def trials_of(runs: Path) -> list[Path]:
    return list((runs / "searches" / "small" / "trials").glob("*/report/evaluation.json"))
