"""A retraining whose candidate is trained over the hosts; what it leaves behind is looked at by test_traces.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cluster_runs import SETTINGS, Training
from support.hosts import TOOLS, Cluster

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(1800)]


@pytest.mark.slow  # two trainings over hosts, one after the other
def test_a_retraining_over_two_hosts_registers_its_candidate(hosts: Cluster, stores_dir: Path, tmp_path: Path) -> None:
    registered = "registry.register_best=true"
    run = Training(hosts, tmp_path, stores_dir, settings=(*SETTINGS[:-1], registered, "train.epochs=1"), steps=6)
    run.start()
    run.finish()
    words = ["retrain", "sg_resnet_digits", "train.seed=1", "train.epochs=1", "--address", hosts.address, "--json"]
    words += ["--runs-dir", str(tmp_path), "--stores-dir", str(stores_dir)]
    outcome = hosts.head.answer([str(TOOLS / "spikefleet"), *words])
    assert outcome["candidate"] == 2, outcome
    run_dirs = [path.parent for path in tmp_path.glob("*/run.json")]
    (candidate,) = [path for path in run_dirs if path != run.run_dir]
    assert len(json.loads((candidate / "run.json").read_text())["threads"]) == 2, "one of each host"
