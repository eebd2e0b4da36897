"""Balanced sampling and class weights: as many of each class, every sample as often, a loss that no slice changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from spikefleet.config.recipes import load_config
from spikefleet.errors import UserError
from spikefleet.tasks.classification import Classification
from spikefleet.tasks.task import class_weights
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Event, Note
from spikefleet.training.loop import Outcome, train
from spikefleet.training.splits import prepare_parts
from spikefleet_models.class_loss import class_loss
from spikefleet_models.shortcut import ShortcutConfig, ShortcutLogits, shortcut_loss
from spikefleet_pipelines.class_balance import ClassBalance
from spikefleet_pipelines.sampling import EpochPlan, TrainingRows
from spikefleet_pipelines.store.reader import Store
from support.snapshots import assert_same_end, cut

LABELS = np.array([0] * 70 + [1] * 20 + [3] * 9)  # class 2 has no samples
NAMES = ("cat", "dog", "emu", "fox")


def plan(rank: int = 0, world: int = 1, balanced: bool = True) -> EpochPlan:
    rows = TrainingRows(balance=ClassBalance(LABELS, 5) if balanced else None)
    return EpochPlan(samples=len(LABELS), global_batch=9, world_size=world, rank=rank, seed=5, training=rows)


def indices(one: EpochPlan, epoch: int, start: int = 0) -> list[list[int]]:
    return [batch.indices.tolist() for batch in one.batches(epoch, start)]


def test_an_epoch_has_as_many_of_each_class_and_all_epochs_every_sample_as_often() -> None:
    seen = np.zeros(len(LABELS), np.int64)
    for epoch in range(20):
        chosen = np.concatenate(indices(plan(), epoch))
        assert np.bincount(LABELS[chosen], minlength=4).tolist() == [33, 33, 0, 33]
        np.add.at(seen, chosen, 1)
        for label in (0, 1, 3):
            assert np.ptp(seen[label == LABELS]) <= 1
    natural = np.concatenate(indices(plan(balanced=False), 0))
    assert np.bincount(LABELS[natural], minlength=4).tolist() == [70, 20, 0, 9]
    assert indices(plan(), 0) != indices(plan(), 1)


def test_ranks_share_the_batches_of_one_and_a_resumed_epoch_has_the_same_end() -> None:
    whole, parts = indices(plan(), 3), [indices(plan(rank, 3), 3) for rank in range(3)]
    assert [[row for part in slices for row in part] for slices in zip(*parts, strict=True)] == whole
    assert {tuple(map(len, slices)) for slices in zip(*parts, strict=True)} == {(3, 3, 3)}
    assert indices(plan(), 3, start=4) == whole[4:]
    assert plan().samples_of(3) == 99
    assert plan().steps_per_epoch == len(whole) == 11


def test_the_coverage_of_an_epoch_is_said() -> None:
    assert ClassBalance(LABELS, 5).coverage(NAMES) == (
        "balanced sampling: an epoch has 33 samples of each of 3 classes, 99 of 99 in all; those of fox (9) 3.67 "
        "times, of cat (70) 0.471 times"
    )


def test_weights_of_classes() -> None:
    counts = [70, 20, 0, 9]
    found = class_weights("balanced", NAMES, counts)
    assert found is not None
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=LABELS)
    assert [found[k] for k in (0, 1, 3)] == pytest.approx(expected)
    assert found[2] == 0
    assert np.average(found, weights=counts) == pytest.approx(1)
    assert class_weights({"dog": 2.5}, NAMES, counts) == (1, 2.5, 1, 1)
    assert class_weights("none", NAMES, counts) is None
    with pytest.raises(UserError, match=r"train\.class_weights has 'dig', which is no class of the data; did you mean"):
        class_weights({"dig": 2.0}, NAMES, counts)


@pytest.mark.parametrize("soft", [False, True])
def test_a_weighted_loss_does_not_depend_on_how_a_batch_is_cut(soft: bool) -> None:
    torch.manual_seed(0)
    logits, weights = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0.2, 1.0, 3.0])
    classes = torch.tensor([0, 0, 0, 1, 2, 1])
    targets = torch.rand(6, 3, dtype=torch.float64).softmax(1) if soft else classes
    whole = class_loss(logits, targets, 0.1, weights)
    parts = [class_loss(logits[part], targets[part], 0.1, weights) for part in (slice(0, 3), slice(3, 6))]
    assert torch.allclose(torch.stack(parts).mean(), whole)
    probabilities = targets if soft else torch.nn.functional.one_hot(classes, 3).double()
    smoothed = probabilities * 0.9 + 0.1 / 3
    assert torch.allclose(whole, -(smoothed * weights.double() * logits.log_softmax(1)).sum(1).mean())
    if not soft:  # torch's mean does depend on it
        theirs = [
            torch.nn.functional.cross_entropy(logits[part], classes[part], weights.double())
            for part in (slice(0, 3), slice(3, 6), slice(0, 6))
        ]
        assert not torch.allclose((theirs[0] + theirs[1]) / 2, theirs[2])


def test_side_branches_are_weighted_too() -> None:
    torch.manual_seed(0)
    logits = ShortcutLogits(torch.randn(4, 3), (torch.randn(4, 3),))
    targets, weights = torch.tensor([0, 1, 2, 2]), torch.tensor([0.5, 1.0, 2.0])
    for kind in ("summed_logits", "sum_losses", "own_and_summed"):
        config = ShortcutConfig(loss=kind)
        whole = shortcut_loss(logits, targets, 0.25, config, 0.0, weights)
        each = [
            shortcut_loss(ShortcutLogits(logits.main[[k]], (logits.sides[0][[k]],)), targets[[k]], 0.25, config)
            for k in range(4)
        ]
        assert torch.allclose(whole, (torch.stack(each) * weights[targets]).mean())


TINY: dict[str, Any] = {
    "model.width": 0.125,
    "model.timesteps": 1,
    "train.global_batch": 500,
    "train.epochs": 2,
    "train.class_weights": "balanced",
    "data.sampling": "balanced",
    "data.transform.mixup": 0.5,
    "data.transform.cut_mix": 0.3,
}


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Note):
            self.texts.append(event.text)


def trained(store: Store, folder: Path, **overrides: object) -> tuple[Outcome, list[str]]:
    notes, config = Notes(), load_config("digits", {**TINY, **overrides})
    return train(config, store, folder, ProcessGroup.single(), notes), notes.texts


def test_a_balanced_mixed_and_weighted_training_resumes_bit_by_bit(
    stores_dir: Path, tmp_path: Path, no_figures: None
) -> None:
    store, often = Store.open(stores_dir / "digits"), {"checkpoint.every_steps": 2, "checkpoint.keep_last": 9}
    task, _, _ = prepare_parts(load_config("digits", TINY), store, ProcessGroup.single())
    assert isinstance(task, Classification)
    assert task._class_weights is not None
    assert task._class_weights.mean() == pytest.approx(1, abs=0.01)  # digits are nearly balanced
    whole, said = trained(store, tmp_path / "whole", **often)
    assert any(text.startswith("balanced sampling: an epoch has ") for text in said)
    cut(tmp_path / "whole", 2, tmp_path / "cut")
    again, _ = trained(store, tmp_path / "cut", **often)
    assert again.history == whole.history
    assert_same_end(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.class_weights": "balanced"}, "train.class_weights=balanced has no effect for task=detection"),
        ({"data.sampling": "balanced"}, "data.sampling=balanced has no effect for task=detection"),
    ],
)
def test_a_detector_is_refused_both(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("scenes_spike_yolo", overrides)


def test_what_is_not_used_leaves_the_names_of_runs() -> None:
    plain = load_config("digits")
    assert load_config("digits", {"train.class_weights": "none", "data.sampling": "every"}).digest() == plain.digest()
    for used in ({"train.class_weights": {"3": 2.0}}, {"data.sampling": "balanced"}, {"data.transform.mixup": 0.1}):
        assert load_config("digits", used).digest() != plain.digest()
