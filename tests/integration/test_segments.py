"""Runs that end before their last epoch, or are trained further after it: what is said of them, and what is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from spikefleet import api, registry
from spikefleet.config.recipes import load_config, override_config
from spikefleet.config.train_config import SegmentConfig
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.runs.run_dir import Run
from spikefleet.runs.segments import begin_extension, extended, is_complete, registered_before, schedule_of
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Event, NullSink, StepDone
from spikefleet.training.loop import Outcome, train
from spikefleet.training.time_limit import TrainingClock, no_time_left
from spikefleet_pipelines.store.reader import Store
from support.snapshots import assert_same_end, cut, small_snapshot

TINY: dict[str, Any] = {"model.width": 0.125, "model.timesteps": 1, "train.global_batch": 500, "train.epochs": 3}


def test_an_epoch_that_does_not_fit_is_not_begun() -> None:
    seconds = [0.0]
    clock = TrainingClock(lambda: seconds[0])
    config = load_config("digits", {"train.epochs": 9, "train.max_minutes": 1})
    seconds[0] = 25
    assert no_time_left(config, 1, clock) is None
    clock.end_epoch()
    seconds[0] = 40
    assert no_time_left(config, 2, clock) == (
        "ending after epoch 2 of 9: 0.667 of train.max_minutes=1 are used, and an epoch takes 0.417"
    )
    assert no_time_left(config, 9, clock) is None  # the last epoch ends it anyway
    assert no_time_left(load_config("digits"), 2, clock) is None
    clock.restart(30, 10)
    seconds[0] += 20
    assert clock.seconds == 50
    assert no_time_left(config, 2, clock) is not None


def trained(store: Store, folder: Path, **overrides: object) -> Outcome:
    return train(load_config("digits", {**TINY, **overrides}), store, folder, ProcessGroup.single(), NullSink())


def test_a_training_out_of_time_is_measured_and_resumes_bit_by_bit(
    stores_dir: Path, tmp_path: Path, no_figures: None
) -> None:
    store = Store.open(stores_dir / "digits")
    rare: dict[str, Any] = {"train.evaluate_every": 3, "checkpoint.every_epochs": 3}
    whole = trained(store, tmp_path / "whole", **rare)
    assert whole.ended is None
    short = trained(store, tmp_path / "cut", **rare, **{"train.max_minutes": 1e-6})
    assert short.ended is not None
    assert short.ended.why.startswith("ending after epoch 1 of 3: ")
    assert len(short.history) == 1
    assert "val/top1" in short.history[0]  # measured, though the evaluation was not due
    assert trained(store, tmp_path / "cut", **rare, **{"train.max_minutes": 1e-6}).history == short.history
    resumed = trained(store, tmp_path / "cut", **rare, **{"train.max_minutes": 60})
    assert resumed.ended is None
    assert (resumed.history[1:], resumed.last) == (whole.history[1:], whole.last)


class Rates:
    """Keeps the learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.rates.append(event.metrics["lr"])


def test_a_segment_starts_the_schedule_anew_and_resumes_bit_by_bit(
    stores_dir: Path, tmp_path: Path, no_figures: None
) -> None:
    store, all_kept = Store.open(stores_dir / "digits"), {"checkpoint.keep_last": 9, "tracking.every_steps": 1}
    base = trained(store, tmp_path / "base", **all_kept, **{"train.epochs": 1})
    per_epoch = base.steps
    longer = {**all_kept, "train.epochs": 3, "optim.lr": 0.02, "optim.schedule": "linear", "optim.warmup_epochs": 0}
    segment = {**longer, "train.segment": {"from_step": per_epoch, "from_epoch": 1}}
    for name in ("whole", "other"):
        shutil.copytree(tmp_path / "base", tmp_path / name)
    sink = Rates()
    whole = train(load_config("digits", {**TINY, **segment}), store, tmp_path / "whole", ProcessGroup.single(), sink)
    steps = 2 * per_epoch
    assert sink.rates == pytest.approx([0.02 * (1 - step / steps) for step in range(steps)])
    assert whole.history[0] == base.history[0]
    cut(tmp_path / "whole", 2 * per_epoch, tmp_path / "cut")
    assert trained(store, tmp_path / "cut", **segment).history == whole.history
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(UserError, match=r"cannot be resumed with another configuration: optim\.lr: expected"):
        trained(store, tmp_path / "other", **longer)
    with pytest.raises(UserError, match=r"another configuration: model\.timesteps: expected 1, found 2; use its"):
        trained(store, tmp_path / "other", **segment, **{"model.timesteps": 2})
    with pytest.raises(UserError, match=r"train\.segment is set, but there is no checkpoint"):
        trained(store, tmp_path / "new", **segment)


def run(place: Path, stores_dir: Path, **overrides: Any) -> api.Run:
    return api.train(
        "digits",
        {**TINY, "registry.name": "cut_short", **overrides},
        workers=0,
        name="limited",
        runs_dir=place,
        stores_dir=stores_dir,
        console=Console(quiet=True),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("segments") / "runs"


@pytest.mark.slow
def test_a_run_out_of_time_is_finished_and_says_so(place: Path, stores_dir: Path) -> None:
    first = run(place, stores_dir, **{"train.max_minutes": 1e-6}).finished
    record = first.run.record()
    assert record["status"] == "finished"
    assert record["ended"]["why"].startswith("ending after epoch 1 of 3")
    assert record["ended"]["max_minutes"] == 1e-6
    uri = f"sqlite:///{place / 'mlflow.db'}"
    tags = MlflowClient(uri).search_runs(["1"])[0].data.tags
    assert tags["ended"] == record["ended"]["why"]
    assert is_complete(first.run, load_config("digits", {**TINY, "train.max_minutes": 1e-6}))
    assert not is_complete(first.run, load_config("digits", TINY))
    longer = run(place, stores_dir).finished.run
    record = longer.record()
    assert "ended" not in record or record["ended"] is None
    assert record["registered"] in ("cut_short/1", "cut_short/2")
    assert [one["registered"] for one in record["segments"]] == ["cut_short/1"]
    assert json.loads((longer.path / "config-1.json").read_text())["train"]["max_minutes"] == 1e-6
    assert (longer.path / "report-1" / "evaluation.json").is_file()
    assert "ended" not in MlflowClient(uri).search_runs(["1"])[0].data.tags
    newest = registry.card_text("models:/cut_short/1", tracking_uri=uri)
    assert "limited" in newest


def extend(
    place: Path, stores_dir: Path, epochs: int, recipe: str = "digits", name: str | None = "limited", **more: Any
) -> api.Run:
    return api.train(
        recipe,
        more,
        workers=0,
        resume=name,
        extend_epochs=epochs,
        runs_dir=place,
        stores_dir=stores_dir,
        console=Console(quiet=True),
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, stores_dir: Path) -> Path:
    """A runs directory with a run that was interrupted after its first epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    store, run = Store.open(stores_dir / "digits"), Run(folder / "limited")
    config = load_config("digits", {**TINY, "train.max_minutes": 1e-6, "cluster.workers": 0})
    run.begin(config, DataSummary.of(store.manifest))
    train(config, store, run.path, ProcessGroup.single(), NullSink())
    run.note(status="interrupted", signal="SIGINT")
    return folder


def test_an_extension_begins_where_the_run_stopped_and_its_repetition_resumes_it(stopped: Path) -> None:
    run = Run(stopped / "limited")
    held, state = run.config(), run.checkpoints.newest_state()
    assert state is not None
    longer = extended(run, override_config(held, {"optim.lr": 0.03}, "test"), 4)
    assert longer.train.epochs == 5
    assert longer.train.segment == SegmentConfig(from_step=state.steps_per_epoch, from_epoch=1)
    assert schedule_of(longer).startswith("epochs 2 to 5: learning rate 0.03, cosine to 0 times that")
    other = Run(stopped / "other")
    shutil.copytree(run.path, other.path)
    begin_extension(other, longer)
    assert [one["best_step"] for one in other.record()["segments"]] == [state.steps_per_epoch]
    assert other.config() == longer
    assert json.loads((other.path / "config-1.json").read_text()) == held.dump()
    assert extended(other, longer, 4) == longer
    assert extended(other, longer, 2).train.epochs == 3  # another length is another segment
    other.checkpoints.save(9, small_snapshot(best_step=9))
    with pytest.raises(UserError, match=r"was trained to step 4 meanwhile, and its extension was planned from step 3"):
        begin_extension(other, longer)


@pytest.mark.parametrize(
    ("epochs", "name", "recipe", "more", "message"),
    [
        (0, "limited", "digits", {}, "--extend-epochs is 0; set it to 1 or more epochs"),
        (2, "gone", "digits", {}, "run 'gone' does not exist.*expected one of limited"),
        (2, None, "digits", {}, "--extend-epochs 2 extends an existing run; name it by --resume RUN"),
        (2, "limited", "digits_ann", {}, "was trained by recipe 'digits', not 'digits_ann'"),
        (2, "limited", "digits", {"train.global_batch": 250}, "cannot be extended with train.global_batch=250: only"),
        (2, "limited", "digits", {"train.epochs": 9}, "are two lengths; leave train.epochs out"),
        (
            2,
            "limited",
            "digits",
            {"optim.schedule": "step", "optim.milestones": [1, 2]},
            r"optim\.milestones=\[2\] are beyond the 2 epochs of the segment",
        ),
    ],
)
def test_an_extension_without_sense_is_refused(
    stopped: Path, stores_dir: Path, epochs: int, name: str | None, recipe: str, more: dict[str, Any], message: str
) -> None:
    before = (stopped / "limited" / "run.json").read_text()
    with pytest.raises(UserError, match=message):
        extend(stopped, stores_dir, epochs, recipe, name, **more)
    assert (stopped / "limited" / "run.json").read_text() == before


@pytest.mark.slow  # on the run of the test above
def test_an_extended_run_keeps_the_record_of_both(place: Path, stores_dir: Path) -> None:
    before = Run(place / "limited").record()
    done = extend(place, stores_dir, 2, **{"optim.lr": 0.1, "optim.schedule": "constant"}).finished.run
    record = done.record()
    assert record["segments"][-1]["validation"] == before["validation"]
    assert record["status"] == "finished"
    assert done.config().train.epochs == 5
    assert json.loads((done.path / "config-2.json").read_text())["train"]["epochs"] == 3
    state = done.checkpoints.newest_state()
    assert state is not None
    assert [row["epoch"] for row in state.history] == [1, 2, 3, 4, 5]
    uri = f"sqlite:///{place / 'mlflow.db'}"
    tags = MlflowClient(uri).search_runs(["1"])[0].data.tags
    assert tags["changed.train.epochs"] == "5"
    assert "epochs 4 to 5: learning rate 0.1, constant" in tags["segments"]
    better = state.best is not None and state.best.epoch > 3
    assert (record["registered"] != before["registered"]) == better
    if better:
        card = registry.card_text(f"models:/{record['registered']}", tracking_uri=uri)
        assert "* segments: epochs 1 to 3: " in card
    with pytest.raises(UserError, match="it was extended: --resume limited resumes it"):
        run(place, stores_dir)


def test_what_no_later_checkpoint_betters_stays_registered(tmp_path: Path) -> None:
    run = Run(tmp_path / "mine")
    run.path.mkdir()
    run.note(status="created", segments=[{"best_step": 3, "registered": "digits/7"}])
    run.checkpoints.save(3, small_snapshot(best_step=3))
    assert registered_before(run) == "digits/7"
    run.checkpoints.save(5, small_snapshot(best_step=5))
    assert registered_before(run) is None
