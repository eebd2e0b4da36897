"""A detector over two hosts, of which one worker is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet_pipelines.sources import prepare
from support.cluster_runs import Training, kill_worker
from support.hosts import Cluster
from support.ranks import run_undisturbed
from support.snapshots import differences, end_of

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(3600)]

EPOCH, EPOCHS = 3, 10
SETTINGS = (
    f"train.epochs={EPOCHS}",
    "data.transform.size=64",
    "model.criterion.score_threshold=0",
    "tracking.every_steps=1",
    "registry.register_best=false",
)


@pytest.mark.slow  # trains a detector twice
def test_a_detector_over_two_hosts_loses_no_bit_with_its_worker(
    hosts: Cluster, stores_dir: Path, tmp_path: Path
) -> None:
    store = stores_dir / "scenes"
    prepare("scenes", None, store, train=48, val=16, test=16, size=64)
    chosen = f"data.store={store}"
    run = Training(
        hosts,
        tmp_path,
        stores_dir,
        chosen,
        recipe="scenes_spike_yolo",
        settings=SETTINGS,
        steps=EPOCH * EPOCHS,
    )
    run.start()
    try:
        run.wait_for_step(EPOCH + 2)
        kill_worker(hosts.workers[1])
        run.finish()
    finally:
        run.end()
    assert (run.record()["status"], run.record()["restarts"]) == ("finished", 1)
    config = load_config("scenes_spike_yolo", parse_overrides([*SETTINGS, chosen, "cluster.workers=2"]))
    clean = run_undisturbed(config, store, tmp_path / "clean")
    losses = run.losses()
    assert sorted(losses) == list(range(1, EPOCH * EPOCHS + 1))
    assert losses == clean.losses
    assert differences(end_of(run.run_dir), end_of(tmp_path / "clean")) == []
