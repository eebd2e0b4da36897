"""A run whose number of workers follows the hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikefleet.training.stopping import STOP
from support.cluster_runs import EPOCH, STEPS, Training, standing_still
from support.hosts import Cluster
from support.snapshots import differences, end_of

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(3600)]


@pytest.mark.slow  # three groups, one after the other
def test_a_run_continues_with_the_hosts_that_are_left_and_with_those_that_join(
    hosts: Cluster, clean: Training, stores_dir: Path, tmp_path: Path
) -> None:
    run = Training(hosts, tmp_path, stores_dir, "cluster.grow_after_s=2", workers="1:2")
    run.start()
    try:
        run.wait_for_step(EPOCH + 2)
        assert hosts.workers[1].die() > 3
        run.wait_until(lambda: "the run continues with 1 worker instead of 2" in run.said, "it has fewer workers")
        assert f"a worker failed: host {hosts.workers[1].address} is gone" in run.said
        assert "the run waits for" not in run.said
        run.wait_for_step(2 * EPOCH + 2)
        with standing_still(hosts.workers[0]):  # or it might be done before the driver has seen the host
            hosts.mend()
            run.wait_until(lambda: list(run.run_dir.glob(f"ray/*/{STOP}")), "the smaller group is asked to stop")
        said = run.finish()
    finally:
        run.end()
    assert "the run continues with 2 workers instead of 1" in said
    assert "1 to 2 Ray Train workers on CPU" in said
    assert "not repeatable bit for bit" in said
    assert (run.record()["status"], run.record()["restarts"]) == ("finished", 2)
    end = end_of(run.run_dir).state
    sizes = end["world_sizes"]
    assert [size["workers"] for size in sizes] == [2, 1, 2]
    assert sizes[1]["from_step"] == EPOCH
    assert sizes[2]["from_step"] > 2 * EPOCH + 2, "no step was done again for the host that joined"
    losses, undisturbed = run.losses(), clean.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert [losses[step] for step in range(1, EPOCH + 1)] == [undisturbed[step] for step in range(1, EPOCH + 1)]
    assert differences(end_of(run.run_dir), end_of(clean.run_dir)) != [], "batch statistics of other slices"
