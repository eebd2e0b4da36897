"""Trainings whose device crops, flips and cuts out: the bits of those whose loader does, however they are run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.loop import train
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.pixel_augmentation import PixelAugmentation
from support.events import KeptEvents
from support.ranks import run_undisturbed
from support.snapshots import assert_same_end, cut, differences, end_of

SETTINGS = [
    "model.stages=[1]",
    "model.width=0.125",
    "model.timesteps=2",
    "data.transform.crop_padding=2",
    "data.transform.horizontal_flip=0.5",
    "data.transform.cutout=3",
    "train.epochs=2",
    "train.global_batch=324",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=99",
    "tracking.every_steps=1",
]
DEVICE = "data.transform.augment_on=device"
STEPS = 8

pytestmark = pytest.mark.usefixtures("no_figures")


def config(*overrides: str) -> Config:
    return load_config("digits", parse_overrides([*SETTINGS, *overrides]))


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits")


@pytest.fixture
def augmented(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each batch that was augmented by `PixelAugmentation` in this process."""
    counts, moved = list[int](), PixelAugmentation.moved

    def counted(self: PixelAugmentation, pixels: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels))
        return moved(self, pixels)

    monkeypatch.setattr(PixelAugmentation, "moved", counted)
    return counts


def losses_of(config: Config, store: Store, run_dir: Path) -> dict[int, float]:
    sink = KeptEvents()
    train(config, store, run_dir, ProcessGroup.single(), sink)
    return sink.losses


@pytest.mark.parametrize("more", [(), ("train.accumulate=3",), ("train.channels_last=true",)], ids=str)
def test_where_images_are_augmented_changes_no_bit(
    store: Store, tmp_path: Path, augmented: list[int], more: tuple[str, ...]
) -> None:
    losses = losses_of(config(*more), store, tmp_path / "loader")
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert not augmented
    for processes in (0, 2):
        name = f"device-{processes}"
        found = losses_of(config(*more, DEVICE, f"data.loader_processes={processes}"), store, tmp_path / name)
        assert found == losses
        assert_same_end(tmp_path / name, tmp_path / "loader")
    assert sum(augmented) >= 2 * 2 * len(store.split("train"))


def test_other_augmentation_gives_other_losses(store: Store, tmp_path: Path) -> None:
    losses = losses_of(config("train.epochs=1"), store, tmp_path / "loader")
    other = losses_of(config("train.epochs=1", DEVICE, "data.transform.cutout=4"), store, tmp_path / "other")
    assert losses.keys() == other.keys()
    assert losses != other


def test_a_run_resumes_within_an_epoch_with_the_other_value(store: Store, tmp_path: Path, augmented: list[int]) -> None:
    losses = losses_of(config(), store, tmp_path / "whole")
    for step, rest in ((2, DEVICE), (5, DEVICE)):
        cut(tmp_path / "whole", step, tmp_path / f"cut-{step}")
        tail = losses_of(config(rest), store, tmp_path / f"cut-{step}")
        assert augmented
        assert tail == {number: loss for number, loss in losses.items() if number > step}
        assert_same_end(tmp_path / f"cut-{step}", tmp_path / "whole")
    cut(tmp_path / "cut-2", 3, tmp_path / "back")
    augmented.clear()
    tail = losses_of(config(), store, tmp_path / "back")
    assert not augmented
    assert tail == {number: loss for number, loss in losses.items() if number > 3}
    assert_same_end(tmp_path / "back", tmp_path / "whole")


def test_two_ranks_with_loader_processes(store: Store, tmp_path: Path) -> None:
    two, path = "cluster.workers=2", Path(store.absolute_location)
    here = run_undisturbed(config(two), path, tmp_path / "loader")
    there = run_undisturbed(config(two, DEVICE, "data.loader_processes=2"), path, tmp_path / "device")
    assert sorted(here.losses) == list(range(1, STEPS + 1))
    assert there.losses == here.losses
    assert differences(end_of(tmp_path / "device"), end_of(tmp_path / "loader")) == []
