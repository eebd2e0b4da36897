"""The last batch of an epoch, where the samples do not fill it: kept, dropped, or weighed by its share."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.config.train_config import TrainConfig
from spikefleet.errors import UserError
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import EpochDone, Started
from spikefleet.training.loop import train
from spikefleet_pipelines.store.reader import Store
from support.events import KeptEvents
from support.snapshots import assert_same_end, cut

# 1,295 training samples: 20 batches of 64 and 15 samples.
SMALL = [
    "model.width=0.125",
    "model.timesteps=1",
    "train.epochs=1",
    "optim.schedule=constant",
    "optim.warmup_epochs=0",
    "tracking.every_steps=1",
    "checkpoint.every_steps=10",
    "checkpoint.keep_last=9",
    "cluster.workers=0",
]
WHOLE, LEFT = 20, 15


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits")


def trained(store: Store, run_dir: Path, *overrides: str) -> tuple[Config, KeptEvents]:
    config, events = load_config("digits", parse_overrides([*SMALL, *overrides])), KeptEvents()
    train(config, store, run_dir, ProcessGroup.single(), events)
    return config, events


def test_each_choice_differs_in_the_last_step_alone(store: Store, tmp_path: Path, no_figures: None) -> None:
    runs = {
        choice: trained(store, tmp_path / choice, f"train.partial_batch={choice}")[1]
        for choice in ("keep", "drop", "weigh")
    }
    norms = {choice: [step.metrics["gradient/norm"] for step in run.steps] for choice, run in runs.items()}
    losses = {choice: [step.metrics["train/loss"] for step in run.steps] for choice, run in runs.items()}
    assert {choice: len(found) for choice, found in norms.items()} == {"keep": 21, "drop": 20, "weigh": 21}
    assert norms["keep"][:WHOLE] == norms["drop"] == norms["weigh"][:WHOLE]
    assert norms["weigh"][-1] == pytest.approx(norms["keep"][-1] * LEFT / 64, rel=1e-5)
    assert losses["weigh"] == losses["keep"], "the loss that is reported is the mean over the samples"
    for choice, run in runs.items():
        started = next(event for event in run.seen if isinstance(event, Started))
        steps = len(losses[choice])
        assert (started.steps_per_epoch, started.total_steps) == (steps, steps)
        done = next(event for event in run.seen if isinstance(event, EpochDone))
        counts = [64] * WHOLE + [LEFT] * (steps - WHOLE)
        mean = sum(loss * count for loss, count in zip(losses[choice], counts, strict=True)) / sum(counts)
        assert done.metrics["train/loss"] == pytest.approx(mean)


@pytest.mark.parametrize("choice", ["drop", "weigh"])
def test_resumption_is_exact_with_each_choice(choice: str, store: Store, tmp_path: Path, no_figures: None) -> None:
    chosen = [f"train.partial_batch={choice}", "train.epochs=2", "train.accumulate=2", "optim.schedule=cosine"]
    config, _ = trained(store, tmp_path / "whole", *chosen)
    for step in (10, 20 if choice == "drop" else 21, 30):
        cut(tmp_path / "whole", step, tmp_path / f"cut-{step}")
        rest = KeptEvents()
        train(config, store, tmp_path / f"cut-{step}", ProcessGroup.single(), rest)
        assert_same_end(tmp_path / f"cut-{step}", tmp_path / "whole")
        assert rest.steps[0].step == step + 1


def test_what_has_no_effect_or_leaves_nothing_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="partial_batch=weigh has no effect with loss=sum"):
        TrainConfig(epochs=1, global_batch=8, loss="sum", partial_batch="weigh")
    with pytest.raises(UserError, match="1295 samples are fewer than global_batch 2048"):
        trained(store, tmp_path, "train.partial_batch=drop", "train.global_batch=2048")
