"""Frames of recordings in batches: what a window, a slice table and an augmentation make of them, bit by bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.binning_config import BinningConfig
from spikefleet_pipelines.events.durations import duration_us
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.events.representations import bin_events
from spikefleet_pipelines.events.windows import recording_of
from spikefleet_pipelines.events_in_memory import parts_of
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.opening import open_or_prepare
from spikefleet_pipelines.sampling import EpochPlan, EvaluationPlan
from spikefleet_pipelines.store.event_samples import EventSamples
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.events import window_of
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig
from support.event_arrays import at_times
from support.event_stores import LENGTH, labelled_store

SENSOR, T = (12, 20), 5
EVERYTHING = {
    "polarity_swap": 0.5, "time_reversal": 0.5, "horizontal_flip": 0.5, "shift": 0.2, "time_crop": 0.8,
    "time_jitter_us": 300.0, "event_drop": True,
}  # fmt: skip


def made_store(out: Path, source: str = "own") -> Store:
    return labelled_store(out, source, SENSOR, [40 * n for n in range(12)], classes=4)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> EventSamples:
    found = made_store(tmp_path_factory.mktemp("own") / "store").samples("train")
    assert isinstance(found, EventSamples)
    return found


def config(timesteps: int = T, **fields: Any) -> EventsTransformConfig:
    return EventsTransformConfig.model_validate(fields).for_timesteps(timesteps)


def batch_of(samples: EventSamples, transform: EventsTransformConfig, train: bool = False, **given: Any) -> Batch:
    loader = BatchLoader(samples, transform, train, seed=3, **given)
    plan = EvaluationPlan(samples=len(samples), global_batch=len(samples))
    (batch,) = loader.epoch(plan, epoch=given.get("epoch", 0))
    return batch


def test_a_batch_has_the_frames_of_its_windows(samples: EventSamples) -> None:
    batch = batch_of(samples, config())
    assert batch.images.shape == (12, T, 2, *SENSOR)
    assert batch.images.dtype == torch.float32
    assert batch.network_input.shape == (T, 12, 2, *SENSOR)
    assert torch.equal(batch.network_input[2, 3], batch.images[3, 2])
    assert batch.targets.tolist() == samples.labels.tolist()
    for row in range(12):
        window = samples.recording(row).window(0, LENGTH + 7)
        assert np.array_equal(batch.images[row].numpy(), bin_events(window, BinningConfig(slices=T)))
        assert batch.images[row].sum() == 40 * row  # no event is lost
    by_number = batch_of(samples, config(representation={"by": "number"})).images
    assert not torch.equal(by_number, batch.images)
    assert torch.equal(by_number.sum(1), batch.images.sum(1))


def test_images_are_their_own_network_input() -> None:
    batch = Batch(torch.zeros(2, 3, 4, 5), torch.zeros(2), torch.zeros(2), 2)
    assert batch.network_input is batch.images


@pytest.mark.parametrize("channels_last", [False, True])
def test_frames_keep_their_values_in_either_layout(samples: EventSamples, channels_last: bool) -> None:
    batch = batch_of(samples, config())
    there = batch.to("cpu", channels_last=channels_last)
    assert torch.equal(there.images, batch.images)
    together = there.network_input.flatten(0, 1)
    assert together.is_contiguous(memory_format=torch.channels_last) == channels_last
    if channels_last:
        assert together.data_ptr() == there.images.data_ptr()  # a view: the network copies nothing


@pytest.mark.parametrize("window", ["recording", "span", "30ms", "250ms"])
def test_a_window_is_what_its_name_says(window: str) -> None:
    recording = recording_of(at_times([5_000, 40_000, 60_000, 99_999], SENSOR), SENSOR)
    found = window_of(recording, window)
    start, length, events = {
        "recording": (0, 100_000, 4),
        "span": (5_000, 95_000, 4),
        "30ms": (70_000, 30_000, 1),
        "250ms": (-150_000, 250_000, 4),
    }[window]
    assert (found.start, found.length, len(found)) == (start, length, events)


def test_a_long_window_has_nothing_at_its_start(samples: EventSamples) -> None:
    frames = batch_of(samples, config(timesteps=4, window="400ms")).images
    assert frames[:, :2].sum() == 0
    assert frames[:, 2:].sum() == sum(40 * n for n in range(12))


@pytest.mark.parametrize("wrong", ["half", "250", "-1ms", "0us", "1e3ms", "99999999999s", ""])
def test_a_wrong_window_is_refused(wrong: str) -> None:
    with pytest.raises(ValidationError, match="is no duration, expected a number with a unit"):
        config(window=wrong)
    with pytest.raises(ValueError, match="duration"):
        duration_us(wrong)


def test_durations() -> None:
    assert [duration_us(text) for text in ("1us", "250ms", "2.5s", "0.5ms")] == [1, 250_000, 2_500_000, 500]


REPRESENTATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"by": "number"},
    {"kind": "binary"},
    {"compat": "spikingjelly"},
    {"size": [6, 10], "resize": "area", "normalise": "slice_max"},
    {"size": [7, 9], "normalise": "slice_max", "clip": 0.6},
    {"clip": 2.0},
)


@pytest.mark.parametrize("representation", REPRESENTATIONS, ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_the_device_counts_what_the_loader_counts(
    samples: EventSamples, representation: dict[str, Any], train: bool
) -> None:
    fields: dict[str, Any] = {
        "representation": representation,
        "normalise": {"mean": [0.1, 0.3], "std": [0.7, 1.3]},
        "augmentation": EVERYTHING,
        "keep_slices": 3,
        "slice_order": "shuffled",
    }
    for fill in ("drop", "zero"):
        here = batch_of(samples, config(keep_fill=fill, **fields), train)
        there = batch_of(samples, config(keep_fill=fill, bin_on="device", **fields), train)
        assert there.images.shape == here.images.shape
        assert torch.equal(there.images, here.images)
        assert torch.equal(there.targets, here.targets)
    control = {**fields, "representation": {"kind": "binary", "by": "number"}}
    other = batch_of(samples, config(keep_fill=fill, bin_on="device", **control), train)
    assert other.images.shape[-2:] != here.images.shape[-2:] or not torch.equal(other.images, here.images)


@pytest.mark.parametrize(
    ("representation", "field"),
    [
        ({"kind": "voxel"}, "kind"),
        ({"normalise": "std"}, "normalise"),
        ({"size": [4, 4], "resize": "bilinear"}, "resize"),
    ],
)
def test_what_the_device_does_not_count_is_refused(representation: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=f"representation.{field} is .* bin_on=loader"):
        config(representation=representation, bin_on="device")
    assert config(representation=representation).bin_on == "loader"


@pytest.mark.parametrize("kind", ["count", "binary", "last_polarity", "histogram", "voxel", "time_surface"])
def test_frames_have_the_declared_shape(samples: EventSamples, kind: str) -> None:
    transform = config(representation={"kind": kind, "bins": 3, "size": [6, 5]})
    shape = transform.input_shape(None, SENSOR)
    assert shape is not None
    assert batch_of(samples, transform).images.shape == (12, T, *shape)
    strips = transform.pixels(batch_of(samples, transform).images)
    assert len(strips) == 12
    assert strips[0].dtype == torch.uint8
    assert strips[0].shape == (3, 6, 5 * T + 2 * (T - 1))


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("bin_on", ["loader", "device"])
def test_processes_and_resumes_change_no_bit(samples: EventSamples, processes: int, bin_on: str) -> None:
    transform = config(augmentation=EVERYTHING, keep_slices=3, bin_on=bin_on)
    plan = EpochPlan(samples=12, global_batch=4, seed=1)
    whole = list(BatchLoader(samples, transform, True, seed=5).epoch(plan, 2))
    loader = BatchLoader(samples, transform, True, seed=5, processes=processes)
    for start in (0, 2):
        found = list(loader.epoch(plan, 2, start))
        assert len(found) == len(whole[start:]) > 0
        for one, other in zip(found, whole[start:], strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.targets, other.targets)
    (other_seed,) = BatchLoader(samples, transform, True, seed=6).epoch(EvaluationPlan(samples=12, global_batch=12), 2)
    (same_rows,) = BatchLoader(samples, transform, True, seed=5).epoch(EvaluationPlan(samples=12, global_batch=12), 2)
    assert not torch.equal(other_seed.images, same_rows.images)


def test_slices_are_deleted_in_training_alone(samples: EventSamples) -> None:
    whole = batch_of(samples, config()).images
    dropped, zeroed = (
        batch_of(samples, config(keep_slices=3, keep_fill=fill), train=True).images for fill in ("drop", "zero")
    )
    assert dropped.shape[1] == 3
    assert zeroed.shape[1] == T
    shown = zeroed.flatten(2).any(2)[1:]  # the first recording has no events
    assert (shown.sum(1) == 3).all()
    assert len({tuple(row) for row in shown.tolist()}) > 1
    for row in range(1, 12):
        assert torch.equal(dropped[row], whole[row][shown[row - 1]])
    together = batch_of(samples, config(keep_slices=3, keep_fill="zero", keep_per="batch"), train=True).images
    assert len({tuple(row) for row in together.flatten(2).any(2)[1:].tolist()}) == 1
    assert torch.equal(batch_of(samples, config(keep_slices=3)).images, whole)
    with pytest.raises(ValueError, match="keep_slices is 6, expected 1 to 5"):
        batch_of(samples, config(keep_slices=6), train=True)


def test_slices_are_shown_in_another_order_in_evaluation_alone(samples: EventSamples) -> None:
    whole = batch_of(samples, config()).images
    assert torch.equal(batch_of(samples, config(slice_order="reversed")).images, whole.flip(1))
    shuffled = batch_of(samples, config(slice_order="shuffled")).images
    orders = set()
    for one, other in zip(shuffled[1:], whole[1:], strict=True):
        order = tuple(next(k for k in range(T) if torch.equal(frame, other[k])) for frame in one)
        assert sorted(order) == list(range(T))
        orders.add(order)
    assert len(orders) > 5
    assert torch.equal(batch_of(samples, config(slice_order="shuffled"), train=True).images, whole)


def test_a_flip_changes_labels_as_the_source_declares(tmp_path: Path) -> None:
    flip = {"augmentation": {"horizontal_flip": 1.0}}
    with pytest.raises(SourceError, match=r"horizontal_flip is 1.0: it changes what the labels"):
        BatchLoader(made_store(tmp_path / "digits", "saccades").samples("train"), config(**flip), True)
    moving = made_store(tmp_path / "moving", "apparent_motion").samples("train")
    assert isinstance(moving, EventSamples)
    batch = batch_of(moving, config(**flip), train=True)
    assert batch.targets.tolist() == [(4 - label) % 8 for label in moving.labels.tolist()]
    plain = batch_of(moving, config())
    assert torch.equal(batch.images, plain.images.flip(-1))
    assert plain.targets.tolist() == moving.labels.tolist()
    free = made_store(tmp_path / "free").samples("train")
    assert isinstance(free, EventSamples)
    assert batch_of(free, config(**flip), train=True).targets.tolist() == free.labels.tolist()


def test_samples_pickle_as_paths_and_draw(samples: EventSamples) -> None:
    again = pickle.loads(pickle.dumps(samples))
    assert len(pickle.dumps(samples)) < 20_000
    assert len(again) == len(samples) == 12
    assert torch.equal(again.image(5), samples.image(5))
    image = samples.image(5)
    assert image.dtype == torch.uint8
    assert image.shape == samples.image_shape == (3, *SENSOR)
    assert not torch.equal(image, samples.image(6))
    assert samples.gather(np.array([5, 6])).shape == (2, 3, *SENSOR)
    with pytest.raises(IndexError, match="row 12 is outside"):
        samples.image(12)


def test_kinds_and_stores_must_fit(samples: EventSamples, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a store of events for classification, .* set transform.kind to 'events'"):
        BatchLoader(samples, TransformConfig(), True)
    digits = open_or_prepare(DataConfig(source="digits"), tmp_path).split("train")
    with pytest.raises(ValueError, match=r"is a store for classification, .* set transform.kind to 'image'"):
        BatchLoader(digits, config(), True)
    with pytest.raises(SourceError, match=r"data.source=saccades has recordings of events, .*kind to 'events'"):
        open_or_prepare(DataConfig(source="saccades"), tmp_path)
    with pytest.raises(SourceError, match=r"data.source=digits has images, .*kind to 'image'"):
        open_or_prepare(DataConfig.model_validate({"source": "digits", "transform": {"kind": "events"}}), tmp_path)
    assert not (tmp_path / "saccades").exists()


def test_a_transform_needs_the_time_steps_of_a_network(samples: EventSamples) -> None:
    with pytest.raises(ValueError, match="no number of time slices; call for_timesteps"):
        BatchLoader(samples, EventsTransformConfig(), True)
    unbound = EventsTransformConfig()
    assert unbound.for_timesteps(3).timesteps == 3
    assert "timesteps" not in str(unbound.for_timesteps(3).model_dump())
    assert pickle.loads(pickle.dumps(unbound.for_timesteps(3))).timesteps == 3


def test_statistics_and_sizes_must_fit(samples: EventSamples) -> None:
    with pytest.raises(ValueError, match=r"normalise.mean has 3 values"):
        BatchLoader(samples, config(normalise="imagenet"), True)
    with pytest.raises(ValueError, match=r"representation.size has height 5, which does not divide the sensor's 12"):
        BatchLoader(samples, config(representation={"size": [5, 10], "resize": "area"}), True)


def test_an_empty_recording_is_zeros_in_training(samples: EventSamples) -> None:
    frames = batch_of(samples, config(augmentation=EVERYTHING), train=True).images
    assert frames[0].sum() == 0 < frames[11].sum()


def test_augmented_events_of_a_part_of_a_recording(samples: EventSamples) -> None:
    """A reversal turns the window, not the recording."""
    transform = config(window="30ms", augmentation={"time_reversal": 1.0})
    plain = batch_of(samples, config(window="30ms")).images
    turned = batch_of(samples, transform, train=True).images
    window = samples.recording(7).window(LENGTH + 7 - 30_000, 30_000)
    events = window.events()
    assert plain[7].sum() == turned[7].sum() == len(events) > 0
    back = EventArrays(29_999 - (events.t - window.start)[::-1], events.x[::-1], events.y[::-1], 1 - events.p[::-1])
    expected = bin_events(recording_of(back, SENSOR).window(0, 30_000), BinningConfig(slices=T))
    assert np.array_equal(turned[7].numpy(), expected)


def test_parts_cover_a_recording_to_its_end() -> None:
    events = at_times([5, 12, 13], (3, 5))
    parts = [(part.t0, part.whole().length, len(part)) for part in parts_of([events], (3, 5), 10, start_us=0)]
    assert parts == [(0, 10, 1), (10, 10, 2)]
    longer = [(part.t0, len(part)) for part in parts_of([events], (3, 5), 10, start_us=0, end_us=35)]
    assert longer == [(0, 1), (10, 2), (20, 0), (30, 0)]
    whole = [(part.t0, part.whole().length, len(part)) for part in parts_of([events], (3, 5), None, end_us=40)]
    assert whole == [(5, 35, 3)]
    nothing = at_times([], (3, 5))
    assert [len(part) for part in parts_of([nothing], (3, 5), 10, start_us=0, end_us=15)] == [0, 0]
    assert not list(parts_of([nothing], (3, 5), 10))
