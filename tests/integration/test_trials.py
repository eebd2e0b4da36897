"""The training core as a one-worker trial of a search on Ray Tune."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikefleet.search.trial import TrialSetting, as_trial
from spikefleet_tune.search import run_search
from spikefleet_tune.search_file import search_of

pytestmark = pytest.mark.xdist_group("ray")


@pytest.mark.slow  # test_tune.py trains such trials by the command, test_search.py has one that fails
def test_trials_train_in_their_own_process(ray_on_two_cpus: None, stores_dir: Path, tmp_path: Path) -> None:
    trainable = as_trial(TrialSetting("digits", str(stores_dir / "digits"), tmp_path / "runs"))
    fixed = {"train.epochs": 2, "model.width": 0.125, "model.stages": [1, 1], "train.global_batch": 216}
    points = [{"model.timesteps": 1}, {"model.timesteps": 2}, {"model.timesteps": 0}]
    search = search_of(
        {
            "recipe": "digits",
            "overrides": fixed,
            "points": points,
            "sampler": "listed",
            "objectives": {"val/top1": "max", "energy_mj": "min"},
        }
    )
    result = run_search(search, trainable, tmp_path / "searches", "steps")
    assert [record.point for record in result.records] == points
    for record in result.records[:2]:
        assert record.status == "finished", record.reason
        assert {"val/top1", "test/top1", "energy_mj", "parameters"} <= record.metrics.keys()
        assert (tmp_path / "runs" / record.name / "report" / "evaluation.json").exists()
    assert result.records[2].status == "failed"
    assert "model.timesteps=0" in result.records[2].reason
    assert result.knee in result.records[:2]
