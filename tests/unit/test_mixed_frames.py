"""Augmentation of frames in batches of events: the same for any batch and process, and mixed labels in the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from spikefleet.tasks.classification import Classification
from spikefleet_pipelines.events.augmentation import Sample
from spikefleet_pipelines.events.frame_augmentation import cut_mix, cutout, draw_mix, nda
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EpochPlan, EvaluationPlan
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_samples import EventSamples
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig
from support.event_arrays import random_events

SENSOR, T, COUNT, SEED = (24, 30), 3, 12, 5
ALL = {"nda": "dvs_cifar10", "cutout": 0.3, "cut_mix": 0.6}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> EventSamples:
    out = tmp_path_factory.mktemp("own") / "store"
    with EventStoreWriter(
        out, source="own", class_names=tuple("abcd"), events=EventFormat.of(SENSOR), options={}
    ) as writer:
        given = [random_events(400, SENSOR, 100_000, n) for n in range(COUNT)]
        writer.write_recordings(
            "train", [SourceRecording([one], n % 4, name=str(n), t0=0) for n, one in enumerate(given)]
        )
        writer.commit()
    found = Store.open(out).samples("train")
    assert isinstance(found, EventSamples)
    return found


def transform(**fields: Any) -> EventsTransformConfig:
    return EventsTransformConfig.model_validate(fields).for_timesteps(T)


def loaded(samples: EventSamples, train: bool = True, size: int = COUNT, processes: int = 0, **fields: Any) -> Batch:
    """All samples in the order of the split, in batches of a size."""
    loader = BatchLoader(samples, transform(**fields), train, seed=SEED, processes=processes)
    batches = list(loader.epoch(EvaluationPlan(samples=COUNT, global_batch=size), epoch=2))
    parts = [(batch.images, batch.targets, batch.indices) for batch in batches]
    images, targets, indices = (torch.cat([part[k] for part in parts]) for k in range(3))  # type: ignore[misc]
    return Batch(images, targets, indices, COUNT)


def test_every_sample_is_changed_as_its_numbers_say(samples: EventSamples) -> None:
    plain, changed = loaded(samples), loaded(samples, frame_augmentation=ALL)
    assert isinstance(changed.targets, Tensor)
    mixed = 0
    for row in range(COUNT):
        sample = Sample(SEED, 2, row)
        expected = cutout(nda(plain.images[row], "dvs_cifar10", sample), 0.3, sample)
        target = torch.nn.functional.one_hot(torch.tensor(row % 4), 4).float()
        mix = draw_mix(0.6, COUNT, SENSOR, sample)
        if mix is not None:
            expected = cut_mix(expected, plain.images[mix.partner], mix.area)
            other = torch.nn.functional.one_hot(torch.tensor(mix.partner % 4), 4).float()
            target = (1 - mix.share) * target + mix.share * other
            mixed += 1
        assert torch.equal(changed.images[row], expected)
        assert torch.allclose(changed.targets[row], target)
    assert 3 <= mixed <= 11
    assert not torch.equal(changed.images, plain.images)


@pytest.mark.parametrize(("size", "processes"), [(5, 0), (1, 0), (4, 2)])
def test_batches_and_processes_make_no_difference(samples: EventSamples, size: int, processes: int) -> None:
    whole = loaded(samples, frame_augmentation=ALL)
    other = loaded(samples, size=size, processes=processes, frame_augmentation=ALL)
    assert torch.equal(other.images, whole.images)
    assert torch.equal(other.targets, whole.targets)  # type: ignore[arg-type]


def test_evaluation_changes_nothing(samples: EventSamples) -> None:
    plain = loaded(samples, train=False)
    found = loaded(samples, train=False, frame_augmentation=ALL)
    assert torch.equal(found.images, plain.images)
    assert torch.equal(found.targets, plain.targets)  # type: ignore[arg-type]
    assert found.targets.dtype == torch.int64  # type: ignore[union-attr]


def test_labels_stay_classes_without_mixing(samples: EventSamples) -> None:
    found = loaded(samples, frame_augmentation={"nda": "ncaltech101"})
    assert found.targets.tolist() == [row % 4 for row in range(COUNT)]  # type: ignore[union-attr]


def test_what_is_outside_has_the_value_of_no_event(samples: EventSamples) -> None:
    normalise = {"mean": [1.0, 2.0], "std": [0.5, 4.0]}
    found = loaded(samples, normalise=normalise, frame_augmentation={"cutout": 1.0}).images
    values, counts = np.unique(found[:, :, 0].numpy(), return_counts=True)
    assert values[counts.argmax()] == -2.0  # (0 - 1) / 0.5
    assert (found[:, :, 1] == -0.5).float().mean() > 0.7
    assert float(found[:, :, 0].min()) == -2.0


def test_a_batch_of_mixed_labels_trains(samples: EventSamples) -> None:
    loader = BatchLoader(samples, transform(frame_augmentation=ALL), True, seed=SEED)
    batch = next(loader.epoch(EpochPlan(samples=COUNT, global_batch=COUNT, seed=SEED), 0))
    task = Classification(tuple("abcd"))

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 4)

        def forward(self, frames: Tensor) -> Tensor:
            result: Tensor = self.linear(frames.mean((0, 3, 4)))
            return result

    values = task.loss(Sums(), batch)
    values["loss"].backward()  # type: ignore[no-untyped-call]
    assert 0 <= float(values["top1"]) <= 1
    assert torch.isfinite(values["loss"])


def test_words_on_the_device_have_no_frames_to_change() -> None:
    with pytest.raises(ValidationError, match=r"frame_augmentation changes frames in the loader, .* set bin_on=loader"):
        transform(bin_on="device", frame_augmentation={"cutout": 0.5})
    assert transform(bin_on="device").frame_augmentation.is_none


def test_a_mixed_batch_is_drawn(samples: EventSamples, tmp_path: Path) -> None:
    config = transform(frame_augmentation=ALL)
    batch = loaded(samples, frame_augmentation=ALL)
    Classification(tuple("abcd")).report.draw_batch(
        config.pixels(batch.images[:4]), batch.targets[:4], tmp_path / "b.png"
    )
    assert (tmp_path / "b.png").stat().st_size > 1000
