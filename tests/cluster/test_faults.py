"""What a run over two hosts survives, bit by bit: each fault is seen to have happened."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from spikefleet.training.stopping import STOP
from support.cluster_runs import EPOCH, STEPS, Training, assert_equal, kill_worker, standing_within_an_epoch
from support.hosts import Cluster
from support.snapshots import differences, end_of

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(3600)]


@pytest.fixture
def run(hosts: Cluster, stores_dir: Path, tmp_path: Path) -> Iterator[Training]:
    training = Training(hosts, tmp_path, stores_dir)
    yield training
    training.end()


def test_a_clean_run_trains_on_both_hosts(clean: Training) -> None:
    """And what the faults below are compared with can differ: one weight alone is seen."""
    assert clean.record()["status"] == "finished"
    assert clean.record()["restarts"] == 0
    losses = clean.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert len(set(losses.values())) > STEPS // 2
    other = end_of(clean.run_dir)
    weights = next(tensor for tensor in other.tensors["model"].values() if tensor.is_floating_point())
    weights.view(-1)[0] += 1e-3
    assert differences(other, end_of(clean.run_dir)) != []


def test_a_killed_worker_restarts_the_group_and_sigterm_commits_a_checkpoint_that_the_same_command_resumes(
    run: Training, clean: Training
) -> None:
    run.start()
    run.wait_for_step(EPOCH + 2)
    kill_worker(run.cluster.workers[0])
    run.wait_until(lambda: len(run.groups()) == 2, "the group restarts")
    with standing_within_an_epoch(run, run.cluster.workers[1]):
        run.wait_until(lambda: run.record()["restarts"] == 1, "the driver counts the restart")
        run.send(signal.SIGTERM)
        run.wait_until(lambda: list(run.run_dir.glob(f"ray/*/{STOP}")), "the workers are asked to stop")
    said = run.finish(143, seconds=60)
    assert said.count("a worker failed:") == 1, said
    assert "Traceback" not in said
    assert "***" not in said, "no native stack"
    stopped = end_of(run.run_dir).state
    assert stopped["step_in_epoch"] != 0, "in the middle of an epoch, where no checkpoint was due"
    assert run.record()["status"] == "interrupted"
    run.start()
    run.finish()
    assert_equal(run, clean)
