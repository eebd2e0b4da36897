"""Early stopping ends a training by its history alone: resumed anywhere, it stops at the same epoch, bit by bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from spikefleet.config.recipes import load_config
from spikefleet.errors import UserError
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.early_stopping import last_improvement, stops_early
from spikefleet.training.events import Event, Note
from spikefleet.training.loop import Outcome, _improves, train
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store
from support.snapshots import assert_same_end, cut

TINY = {"model.width": 0.125, "model.timesteps": 1, "train.global_batch": 500, "checkpoint.keep_last": 9}


class Notes:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Note):
            self.texts.append(event.text)


def history(*values: float | None) -> list[dict[str, float]]:
    rows = enumerate(values, 1)
    return [{"epoch": float(epoch)} | ({} if value is None else {"val/top1": value}) for epoch, value in rows]


def test_when_a_history_ends_a_training() -> None:
    config = load_config("digits", {"train.epochs": 9, "train.patience": 2, "train.min_delta": 0.01})
    assert last_improvement(config, history(0.1, 0.5, 0.505, 0.509)) == 2
    assert last_improvement(config, history(0.1, 0.5, 0.52, None)) == 3
    assert last_improvement(config, history(math.nan, 0.5, 0.9)) == 3, "what is not finite is not measured"
    assert last_improvement(config, history(None, math.nan)) == 0
    assert last_improvement(config, history(None, None)) is None
    assert stops_early(config, history(math.nan)) is None
    assert stops_early(config, history(None, None)) is None, "nothing was measured yet"
    never = "stopping early after epoch 2: val/top1 was never a finite number (train.patience=2)"
    assert stops_early(config, history(math.nan, math.nan)) == never
    assert stops_early(config, history(0.1, 0.5, 0.505)) is None
    said = "stopping early after epoch 4: val/top1 has not improved by more than 0.01 since epoch 2 (train.patience=2)"
    assert stops_early(config, history(0.1, 0.5, 0.505, 0.509)) == said
    assert stops_early(config, history(0.1, 0.5, 0.52, 0.6)) is None
    assert stops_early(config, history(0.5, 0.4, None)) is None  # the next evaluation may be better
    assert stops_early(config, history(*[0.5] * 9)) is None  # the last epoch ends it anyway
    assert stops_early(load_config("digits", {"train.epochs": 9}), history(*[0.5] * 8)) is None
    least = load_config("digits", {"train.patience": 1, "checkpoint.mode": "min"})
    assert stops_early(least, history(0.5, 0.4)) is None
    assert stops_early(least, history(0.5, 0.6)) is not None
    with pytest.raises(UserError, match=r"min_delta=0\.1 has no effect without patience"):
        load_config("digits", {"train.min_delta": 0.1})


def test_a_metric_that_is_no_number_is_not_the_best_for_ever() -> None:
    for mode in ("max", "min"):
        config = load_config("digits", {"checkpoint.mode": mode}).checkpoint
        assert _improves(config, None, {"top1": math.nan}), "the last epoch always has a best checkpoint"
        assert _improves(config, {"metrics": {"top1": math.nan}}, {"top1": 0.1})
        assert not _improves(config, {"metrics": {"top1": 0.1}}, {"top1": math.nan})
        assert _improves(config, {"metrics": {"top1": 0.1}}, {"top1": 0.2}) == (mode == "max")


def trained(store: Store, folder: Path, **overrides: object) -> tuple[Outcome, list[str]]:
    config, notes = load_config("digits", {**TINY, **overrides}), Notes()
    return train(config, store, folder, ProcessGroup.single(), notes), notes.texts


def test_a_training_that_does_not_improve_stops_and_so_does_the_resumed_one(
    stores_dir: Path, tmp_path: Path, no_figures: None
) -> None:
    store = Store.open(stores_dir / "digits")
    still = {
        "optim.lr": 1e-9,
        "train.epochs": 6,
        "train.patience": 2,
        "train.min_delta": 0.5,
        "checkpoint.every_epochs": 1,
    }
    whole, said = trained(store, tmp_path / "whole", **still)
    assert len(whole.history) == 3
    assert any("stopping early after epoch 3" in text for text in said)
    steps = whole.steps // 3
    for epoch in (1, 3):
        folder = tmp_path / f"cut{epoch}"
        cut(tmp_path / "whole", steps * epoch, folder)
        again, said = trained(store, folder, **still)
        assert any("stopping early after epoch 3" in text for text in said)
        assert (again.history, again.test) == (whole.history, whole.test)
        assert_same_end(folder, tmp_path / "whole")
    without, _ = trained(store, tmp_path / "without", **{**still, "train.patience": None, "train.min_delta": 0.0})
    assert len(without.history) == 6


def test_patience_needs_a_validation_split(tmp_path: Path) -> None:
    store = prepare("digits", None, tmp_path / "store", holdout=0)
    with pytest.raises(UserError, match=r"train\.patience=2 needs a validation split"):
        trained(store, tmp_path / "run", **{"train.patience": 2, "data.options": {"holdout": 0}})
