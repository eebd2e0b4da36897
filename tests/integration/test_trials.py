"""The training core as a one-worker trial of Ray Tune."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikefleet.trial import as_trial
from spikefleet_tune.trials import run_trials


def test_trials_train_in_their_own_process(ray_on_two_cpus: None, stores_dir: Path, tmp_path: Path) -> None:
    trainable = as_trial(
        "digits", ["train.epochs=2", "model.width=0.125"], str(stores_dir / "digits"), tmp_path / "runs"
    )
    points = [{"model.timesteps": 1}, {"model.timesteps": 2}, {"model.timesteps": 0}]
    results = run_trials(trainable, points, tmp_path / "tune", "steps")
    assert [result.overrides for result in results] == points
    for result in results[:2]:
        assert result.failure is None
        assert {"val/top1", "test/top1"} <= result.metrics.keys()
        assert (tmp_path / "runs" / result.name / "report" / "evaluation.json").exists()
    assert results[2].failure is not None
    assert "model.timesteps=0" in results[2].failure


def test_impossible_trials_are_refused(ray_on_two_cpus: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no points"):
        run_trials(lambda *_: {}, [], tmp_path, "none")
    with pytest.raises(ValueError, match="2 CPUs"):
        run_trials(lambda *_: {}, [{}], tmp_path, "large", cpus_per_trial=3)
