"""Windows of streams as samples: nothing lost, nothing twice, the targets of what they stand for."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EvaluationPlan
from spikefleet_pipelines.store.event_samples import EventSamples
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.stream_plan import NO_FRAME, NO_WINDOW, EventStreamPlan
from spikefleet_pipelines.streams import StreamLoader, StreamSamples, recordings_of
from spikefleet_pipelines.transforms.event_detection_config import EventDetectionTransformConfig
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig
from support.streams import LENGTHS, WINDOW_US, stream_config, write_streams
from unit.test_event_store import write_boxes

T = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_streams(tmp_path_factory.mktemp("streams") / "store")


def samples_of(store: Store) -> EventSamples:
    found = store.samples("train")
    assert isinstance(found, EventSamples)
    return found


def transform(timesteps: int, window: str) -> EventsTransformConfig:
    return EventsTransformConfig.model_validate({"window": window}).for_timesteps(timesteps)


def test_windows_in_a_row_are_the_recording(store: Store) -> None:
    samples = samples_of(store)
    stream = StreamSamples(samples, WINDOW_US)
    assert len(stream) == sum(LENGTHS)
    windows = transform(T, "10ms").build(stream, train=True, seed=0)
    frames, packed = windows(np.arange(len(stream)), 0)
    assert packed[0].tolist() == np.repeat(samples.labels, LENGTHS).tolist() == stream.labels.tolist()
    for row, length in enumerate(LENGTHS):
        whole = transform(T * length, f"{10 * length}ms").build(samples, train=True, seed=0)
        expected, _ = whole(np.array([row]), 0)
        start = stream.windows.offsets[row]
        assert torch.equal(frames[start : start + length].flatten(0, 1), expected[0])
    assert frames.sum() == sum(len(samples.recording(row)) for row in range(len(samples)))
    assert stream.windows.frame_index[stream.windows.offsets[1:] - 1].tolist() == [0] * len(LENGTHS)


def test_no_window_is_empty(store: Store) -> None:
    stream = StreamSamples(samples_of(store), WINDOW_US)
    frames, _ = transform(T, "10ms").build(stream, train=False, seed=0)(np.array([NO_WINDOW, 0]), 0)
    assert not frames[0].any()
    assert frames[1].any()


@pytest.mark.parametrize("processes", [0, 1])
def test_batches_say_where_recordings_start_and_where_labels_are(store: Store, processes: int) -> None:
    stream = pickle.loads(pickle.dumps(StreamSamples(samples_of(store), WINDOW_US)))
    loader = StreamLoader(stream, transform(T, "10ms"), train=True, processes=processes)
    plan = EventStreamPlan(windows=stream.windows, lanes=4, seed=1)
    whole = list(loader.epoch(plan, 1))
    assert len(whole) == plan.steps_per_epoch
    for batch, step in zip(whole, plan.batches(1), strict=True):
        assert batch.stream is not None
        assert batch.indices.tolist() == step.indices.tolist()
        assert batch.stream.starts.tolist() == step.starts.tolist()
        assert batch.stream.frame_index.tolist() == step.frame_index.tolist()
        assert batch.global_count == (step.frame_index != NO_FRAME).sum()
        assert batch.to("cpu").stream is batch.stream
    tail = list(loader.epoch(plan, 1, start_step=2))
    assert all(torch.equal(one.images, other.images) for one, other in zip(tail, whole[2:], strict=True))
    with pytest.raises(TypeError, match="expected EventStreamPlan"):
        next(loader.epoch(EvaluationPlan(samples=len(stream), global_batch=4), 0))


def test_windows_are_counted_on_the_device_too(store: Store) -> None:
    stream = StreamSamples(samples_of(store), WINDOW_US)
    plan = EventStreamPlan(windows=stream.windows, lanes=4, fill=False)
    here, there = (
        list(StreamLoader(stream, transform(T, "10ms").model_copy(update=fields), train=True).epoch(plan, 0))
        for fields in ({}, {"bin_on": "device"})
    )
    assert all(torch.equal(one.images, other.images) for one, other in zip(here, there, strict=True))
    assert any((batch.indices == NO_WINDOW).any() for batch in here)


def test_windows_of_a_detection_store_end_at_their_labels(tmp_path: Path) -> None:
    write_boxes(tmp_path / "store")
    samples = Store.open(tmp_path / "store").samples("train")
    assert isinstance(samples, EventSamples)
    stream = StreamSamples(samples, 50_000)
    labelled = np.flatnonzero(stream.windows.frame_index != NO_FRAME)
    assert len(labelled) == len(samples)
    for row, window in enumerate(labelled.tolist()):
        place, expected = stream.label_time(window), samples.label_time(row)
        assert place == expected
        found = stream.annotations(window)
        assert found.boxes.tolist() == samples.annotations(row).boxes.tolist()
        assert found.labels.tolist() == samples.annotations(row).labels.tolist()
    bare = int(np.flatnonzero(stream.windows.frame_index == NO_FRAME)[0])
    assert len(stream.annotations(bare).boxes) == len(stream.annotations(NO_WINDOW).boxes) == 0
    with pytest.raises(
        ValueError, match=r"has a label at \d+ us, to which no window of 250000 us .* data.transform.window"
    ):
        StreamSamples(samples, 250_000)


def test_windows_of_a_recording_are_flipped_and_zoomed_alike(tmp_path: Path) -> None:
    write_boxes(tmp_path / "store")
    samples = Store.open(tmp_path / "store").samples("train")
    stream = StreamSamples(recordings_of(samples), 50_000)
    fields = {"window": "50ms", "horizontal_flip": 0.5, "zoom": 1.0}
    config = EventDetectionTransformConfig.model_validate(fields).for_timesteps(2)
    rows = np.arange(len(stream))
    flips, places = config.build(stream, train=True, seed=0)._places(rows, 3)
    recordings = stream.windows.recordings(rows).tolist()
    drawn = {(recording, flip, place) for recording, flip, place in zip(recordings, flips, places, strict=True)}
    assert len(drawn) == len(samples.recordings) == len({place for _, _, place in drawn})  # type: ignore[union-attr]
    alone = EventDetectionTransformConfig.model_validate({**fields, "window": "50ms"}).for_timesteps(2)
    _, apart = alone.build(samples, train=True, seed=0)._places(np.arange(len(samples)), 3)
    assert len(set(apart)) == len(samples)


def test_images_have_no_streams() -> None:
    class Images:
        name, location = "train", "there"

    class Loader:
        split = Images()

    with pytest.raises(ValueError, match="has images, not recordings of events"):
        StreamLoader.beside(Loader())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"data__transform__window": "recording"},
            r"train.stream: data.transform.window=recording: .* set, for example",
        ),
        ({"data__transform__augmentation": {"polarity_swap": 0.5}}, "augmentation draws anew for each window"),
        (
            {"data__transform__frame_augmentation": {"cutout": 0.5}},
            "frame_augmentation draws anew for each window",
        ),
        ({"data__transform__keep_slices": 2}, "keep_slices=2 deletes other slices of each window"),
        ({"data__transform__slice_order": "shuffled"}, "slice_order=shuffled changes their order"),
        ({"data__transform": {}, "data__source": "digits", "model__in_channels": 1}, "reads no windows of events"),
        ({"train__accumulate": 2}, r"train.stream cannot be combined with train.accumulate=2; leave that out"),
        ({"train__compile": True}, "cannot be combined with train.compile=true"),
        ({"train__partial_batch": "drop"}, "cannot be combined with train.partial_batch=drop"),
        ({"shortcut__where": "stage", "model__stages": [1, 1]}, "cannot be combined with shortcut.where=stage"),
        ({"train__stream": {"state": "kept"}}, "carried"),
        ({"train__stream": {"mix": 1.0}}, "less than 1"),
    ],
)
def test_configurations_without_whole_streams_are_refused(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stream_config(**overrides)


def test_a_configuration_with_streams_is_taken() -> None:
    config = stream_config()
    assert config.train.stream is not None
    assert config.data.transform.stream_window_us() == WINDOW_US
    assert BatchLoader is not StreamLoader
