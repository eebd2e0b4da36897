"""`tune --plan`: a range from the smallest and the largest trial, and nothing is started."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.recipes import load_config
from spikefleet.errors import UserError
from spikefleet.runs.options import Options
from spikefleet.search.planning import Plan, TrialTime, _measured, plan_search
from spikefleet.training.threads import usable_cores
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.search_file import search_of

SMALL = TrialTime({"model.timesteps": 1}, step_s=0.5, steps=100, evaluation_s=2.0, epochs=5)
LARGE = TrialTime({"model.timesteps": 4}, step_s=2.0, steps=100, evaluation_s=8.0, epochs=5)
PLAN = Plan(SMALL, LARGE, trials=7, at_a_time=2, device="a processor", hours=None, stops_early=False)


def test_trials_of_this_machine_run_in_rounds() -> None:
    assert SMALL.seconds == 60
    assert PLAN.seconds == (4 * 60, 4 * 240)
    assert replace(PLAN, at_a_time=1).seconds == (7 * 60, 7 * 240)
    assert replace(PLAN, smallest=LARGE, largest=SMALL).seconds == PLAN.seconds
    assert replace(PLAN, hours=0.1).seconds == (240, 360)
    assert replace(PLAN, trials=None).seconds is None


def options(folder: Path, stores_dir: Path, **changes: Any) -> Options:
    return replace(Options(folder / "runs", stores_dir, None, False, {}), **changes)


def search(**changes: Any) -> Any:
    tree = {
        "recipe": "digits",
        "overrides": {"model.width": 0.125, "model.stages": [1], "train.global_batch": 128, "train.epochs": 2},
        "space": {"model.timesteps": {"choice": [1, 8]}, "optim.lr": {"log_uniform": [0.01, 0.1]}},
        "objectives": {"val/top1": "max"},
        "budget": {"trials": 3},
        **changes,
    }
    return search_of(tree)


def test_what_it_cannot_measure_is_refused(stores_dir: Path, tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    with pytest.raises(UserError, match="--plan measures this machine"):
        plan_search(search(), "s", options(tmp_path, stores_dir, address="head:6379"), quiet)
    with pytest.raises(UserError, match=r"resources\.workers is 2"):
        plan_search(search(resources={"workers": 2}), "s", options(tmp_path, stores_dir), quiet)
    with pytest.raises(UserError, match="val/top7"):
        plan_search(search(objectives={"val/top7": "max"}), "s", options(tmp_path, stores_dir), quiet)


def test_the_command_measures_both_ends_and_starts_nothing(stores_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(search().dump()))
    folders = ["--runs-dir", str(tmp_path / "runs"), "--stores-dir", str(stores_dir)]
    result = CliRunner().invoke(app, ["tune", str(path), "--plan", "--json", "--cpus-per-worker", "1", *folders])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["smallest"]["point"]["model.timesteps"] == 1
    assert found["largest"]["point"]["model.timesteps"] == 8
    assert found["largest"]["step_s"] > found["smallest"]["step_s"] > 0
    assert found["smallest"]["steps"] == 2 * -(-1295 // 128)
    assert found["trials"] == 3
    low, high = found["seconds"]
    assert 0 < low < high
    assert not (tmp_path / "runs").exists()


def test_measured_checkpoints_do_not_reach_the_mirror(stores_dir: Path, tmp_path: Path) -> None:
    mirror, store = tmp_path / "mirror", Store.open(stores_dir / "digits", verify=False)
    settings = {**search().overrides, "checkpoint.mirror": f"file://{mirror}"}
    measured = _measured({}, load_config("digits", settings), store, gpu=False)
    assert measured.step_s > 0
    assert not mirror.exists()


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(search().dump()))
    for words in (["--extend", "2"], ["--confirm", "1"], ["--register", "knee"], ["--warm-start", "other"]):
        result = CliRunner().invoke(app, ["tune", str(path), "--plan", *words, "--runs-dir", str(tmp_path / "runs")])
        assert result.exit_code == 2
        assert f"--plan starts nothing, so {words[0]} would have no effect" in " ".join(result.stderr.split())


def test_a_trial_of_two_steps_counts_with_its_whole_time(stores_dir: Path) -> None:
    settings = {**search().overrides, "train.global_batch": 1295, "train.epochs": 2}
    store = Store.open(stores_dir / "digits", verify=False)
    measured = _measured({}, load_config("digits", settings), store, gpu=False)
    assert (measured.steps, measured.evaluation_s) == (2, 0.0)
    assert measured.seconds == pytest.approx(2 * measured.step_s)
    assert measured.seconds > 0


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "100000"}, 0.25),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_cores_are_those_of_the_container(files: dict[str, str], cores: float | None, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    assert usable_cores(tmp_path) == (len(os.sched_getaffinity(0)) if cores is None else cores)
