"""What a search may change in a training, and how a trial goes on from another one's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spikefleet.certificates.latency import LATENCY
from spikefleet.data_summary import DataSummary
from spikefleet.files import read_json
from spikefleet.runs.run_dir import Run
from spikefleet.search.costs import COSTS
from spikefleet.search.run_search import _possible_config
from spikefleet.search.trial import (
    ReportSink,
    TrialSetting,
    _report_best_so_far,
    _start_from,
    as_trial,
    mutable_keys,
    refusal_of,
    reportable,
)
from spikefleet.training.checkpoints import checkpoint_hash, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import CheckpointSaved, EpochDone, NullSink
from spikefleet.training.loop import train
from spikefleet_pipelines.store.reader import Store
from spikefleet_tune.search_file import search_of
from spikefleet_tune.trials import TrialPruned, TrialStopped
from support.snapshots import differences, end_of

SMALL = {"model.width": 0.125, "model.stages": [1], "train.epochs": 2, "train.global_batch": 512}


@pytest.fixture
def setting(stores_dir: Path, tmp_path: Path, no_figures: None) -> TrialSetting:
    return TrialSetting("digits", str(stores_dir / "digits"), tmp_path / "trials", shares_checkpoints=True)


def test_a_trial_with_one_worker_needs_no_group(setting: TrialSetting) -> None:
    config = setting.config(SMALL)
    assert config.cluster.workers == 0
    assert config.checkpoint.every_epochs == 1
    assert config.model.width == 0.125  # type: ignore[attr-defined]


def test_time_steps_change_only_where_no_weight_depends_on_them(setting: TrialSetting) -> None:
    by_rate = mutable_keys(setting.config(SMALL), ["model.timesteps", "optim.lr"])
    assert by_rate("model.timesteps")
    assert by_rate("optim.lr")
    assert by_rate("shortcut.lambda0")
    assert not by_rate("model.width")
    by_attention = mutable_keys(setting.config({**SMALL, "model.decoder": "asd", "model.asd_channel_reduction": 4}), [])
    assert not by_attention("model.timesteps")
    assert by_attention("optim.lr")
    twin = {**SMALL, "model.decoder": "asd", "model.asd_channel_reduction": 4, "model.connection": "ann"}
    assert not mutable_keys(setting.config(twin), ["model.connection"])("model.timesteps")
    either = mutable_keys(setting.config(SMALL), ["model.timesteps", "model.decoder"])
    assert not either("model.timesteps")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"model.timesteps": 0}, "model.timesteps=0"),
        ({"model.neuron.bound": 2}, "does not use bound=2"),
        ({"data.seed": 3}, "share one store"),
        ({"data": {"source": "scenes"}}, "share one store"),
        ({"cluster": {"workers": 2}}, "set the search's resources"),
        ({"cluster.workers": 2}, "set the search's resources"),
        ({"optim.lrr": 2}, "optim.lr"),
    ],
)
def test_what_no_training_accepts_is_refused_by_name(
    overrides: dict[str, object], part: str, setting: TrialSetting
) -> None:
    complaint = refusal_of(setting)(overrides)
    assert complaint is not None
    assert part in complaint
    assert refusal_of(setting)({"data.transform.crop_padding": 0}) is None
    assert refusal_of(setting)({"data.transform": {"kind": "image", "normalise": "digits"}}) is None
    assert refusal_of(setting, fixed=["data.seed"])({"data.seed": 3}) is None


def test_what_the_space_replaces_need_not_be_possible(setting: TrialSetting) -> None:
    """64 samples cannot be divided among three workers, and no trial asks for that."""
    tree = {
        "recipe": "digits",
        "space": {"train.global_batch": {"choice": [63, 96]}},
        "objectives": {"val/top1": "max"},
    }
    search = search_of({**tree, "sampler": "grid"})
    assert _possible_config(search, replace(setting, workers=3)).train.global_batch == 63


def test_a_search_pursues_no_test_figure() -> None:
    assert reportable(("top1", "top5")) == {"val/top1", "val/top5", "energy_mj", "latency_ms", "parameters"}


def test_a_start_from_brings_weights_but_not_the_best_of_another_configuration(
    setting: TrialSetting, stores_dir: Path
) -> None:
    store = Store.open(stores_dir / "digits", verify=False)
    donor, taker = Run(setting.runs_dir / "donor"), Run(setting.runs_dir / "taker")
    config = setting.config(SMALL)
    donor.begin(config, DataSummary.of(store.manifest))
    train(config, store, donor.path, ProcessGroup.single(), NullSink())
    middle, end = donor.checkpoints.committed()
    changed = setting.config({**SMALL, "optim.lr": 0.01})
    _start_from(taker, changed, middle)
    taken = load_checkpoint(taker.checkpoints.latest())  # type: ignore[arg-type]
    assert taken.state["best"] is None
    assert taken.config == changed.dump()
    assert taken.tensors["model"].keys() == load_checkpoint(middle).tensors["model"].keys()
    outcome = train(changed, store, taker.path, ProcessGroup.single(), NullSink())
    assert outcome.steps == load_checkpoint(end).state["epoch"] * load_checkpoint(end).state["steps_per_epoch"]
    with pytest.raises(TrialPruned, match="nothing to train"):
        _start_from(taker, setting.config({**SMALL, "optim.lr": 0.02}), end)


BRANCHED = {"model.stages": [1, 1], "shortcut.where": "stage"}
COUNTING = {"model.neuron.kind": "ilif", "model.connection": "add", "model.neuron.bound": 4}


@pytest.mark.parametrize(
    ("fixed", "change"),
    [
        ({}, {"model.timesteps": 1}),
        (COUNTING, {"model.neuron.bound": 1, "model.timesteps": 2}),
        (BRANCHED, {"shortcut.lambda0": 0.1}),
        (BRANCHED, {"shortcut.schedule": "cosine"}),
    ],
    ids=["T", "D and T", "lambda0", "schedule"],
)
def test_a_training_goes_on_under_other_time_steps_bound_and_balance(
    fixed: dict[str, object], change: dict[str, object], setting: TrialSetting, stores_dir: Path
) -> None:
    """With the donor's weights, optimizer and position, to a figure of its own."""
    store = Store.open(stores_dir / "digits", verify=False)
    donor, taker = Run(setting.runs_dir / "donor"), Run(setting.runs_dir / "taker")
    config, changed = setting.config({**SMALL, **fixed}), setting.config({**SMALL, **fixed, **change})
    assert all(map(mutable_keys(config, list(change)), change))
    donor.begin(config, DataSummary.of(store.manifest))
    train(config, store, donor.path, ProcessGroup.single(), NullSink())
    middle, _ = donor.checkpoints.committed()
    _start_from(taker, changed, middle)
    taken, given = (load_checkpoint(path) for path in (taker.checkpoints.committed()[-1], middle))
    for group in ("model", "optimizer"):
        for name, tensor in given.tensors[group].items():
            assert torch.equal(taken.tensors[group][name], tensor)
    outcome = train(changed, store, taker.path, ProcessGroup.single(), NullSink())
    assert [row["epoch"] for row in outcome.history] == [1.0, 2.0]
    assert load_checkpoint(taker.checkpoints.committed()[-1]).state["best"]["epoch"] == 2


@pytest.mark.parametrize("given", [0, 1])
def test_a_trial_that_is_given_its_own_checkpoint_keeps_what_it_has(
    given: int, setting: TrialSetting, stores_dir: Path
) -> None:
    """One that was paused, at its last checkpoint; one whose process died, at an earlier one."""
    store = Store.open(stores_dir / "digits", verify=False)
    run, config = Run(setting.runs_dir / "paused"), setting.config(SMALL)
    run.begin(config, DataSummary.of(store.manifest))
    train(config, store, run.path, ProcessGroup.single(), NullSink())
    before = run.checkpoints.committed()
    _start_from(run, config, before[given])
    assert run.checkpoints.committed() == before
    assert load_checkpoint(before[-1]).state["best"] is not None


class Reports:
    """Keeps what a trial reports."""

    start_from = None

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.checkpoints: list[Path | None] = []
        self.signal: str | None = None

    def stop_signal(self) -> str | None:
        return self.signal

    def __call__(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        self.rows.append(dict(metrics))
        self.checkpoints.append(checkpoint)


def test_energy_comes_with_each_new_best_epoch() -> None:
    reports = Reports()
    sink = ReportSink(
        reports, shares_checkpoints=False, costs_of=lambda checkpoint: {"energy_mj": float(checkpoint.name)}
    )
    sink.emit(EpochDone(1, 10, {"val/top1": 0.5}, best=True))
    assert reports.rows == []  # its checkpoint is still to come
    sink.emit(CheckpointSaved(10, "7"))
    sink.emit(EpochDone(2, 20, {"val/top1": 0.4}, best=False))
    sink.emit(CheckpointSaved(20, "8"))
    assert reports.rows == [
        {"val/top1": 0.5, "epoch": 1.0, "best": 1.0, "energy_mj": 7.0},
        {"val/top1": 0.4, "epoch": 2.0, "best": 0.0},
    ]
    assert reports.checkpoints == [None, None]


def test_a_trial_that_goes_on_tells_its_best_epoch_again(setting: TrialSetting, stores_dir: Path) -> None:
    """And a trial that may be stopped early has its energy, and its card, with each best epoch."""
    alone = replace(setting, shares_checkpoints=False, energy_by_epoch=True, latency=True)
    first = Reports()
    figures = as_trial(alone)(SMALL, "trial", first)
    *_, best = (row for row in first.rows if row["best"])
    assert best["val/top1"] == max(row["val/top1"] for row in first.rows)
    assert best["energy_mj"] == figures["energy_mj"]
    assert best["latency_ms"] > 0
    recorded = read_json(setting.runs_dir / "trial" / "report" / LATENCY)
    assert figures["latency_ms"] == recorded["median_ms"]
    # A certification measures anew what is not of its checkpoint.
    assert recorded["checkpoint"] == checkpoint_hash(Run(setting.runs_dir / "trial").best_checkpoint())
    assert best["val/top1"] == figures["val/top1"]
    assert (setting.runs_dir / "trial" / "report" / "energy.json").is_file()
    again = Reports()
    _report_best_so_far(Run(setting.runs_dir / "trial"), ReportSink(again, shares_checkpoints=False))
    assert again.rows == [{key: value for key, value in best.items() if key not in COSTS}]
    _report_best_so_far(Run(setting.runs_dir / "none"), ReportSink(again, shares_checkpoints=False))
    assert len(again.rows) == 1


def test_a_trial_that_is_asked_to_stop_resumes_bit_by_bit(setting: TrialSetting, stores_dir: Path) -> None:
    """Asked in its first step, and when its first epoch is reported."""
    alone = replace(setting, shares_checkpoints=False)
    clean = as_trial(alone)(SMALL, "clean", Reports())

    class AskedInTheFirstEpoch(Reports):
        def __call__(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
            super().__call__(metrics, checkpoint)
            self.signal = "SIGTERM"

    early, later, steps = Reports(), AskedInTheFirstEpoch(), []
    early.signal = "SIGINT"
    run = Run(setting.runs_dir / "stopped")
    for reports, name in ((early, "SIGINT"), (later, "SIGTERM")):
        with pytest.raises(TrialStopped):
            as_trial(alone)(SMALL, "stopped", reports)
        assert (run.record()["status"], run.record()["signal"]) == ("interrupted", name)
        steps.append(end_of(run.path).state["step_in_epoch"])
    assert steps == [1, 1], "one step of the first epoch, and one of the second"
    assert as_trial(alone)(SMALL, "stopped", Reports()) == clean
    assert differences(end_of(run.path), end_of(setting.runs_dir / "clean")) == []
    assert (run.record()["status"], run.record()["signal"]) == ("finished", None)
