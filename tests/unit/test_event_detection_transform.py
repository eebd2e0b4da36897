"""Frames and boxes of label times: one scale, zoom and flip for events and boxes, and what is no target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EpochPlan, EvaluationPlan
from spikefleet_pipelines.store.annotations import Annotations
from spikefleet_pipelines.store.event_samples import EventSamples
from spikefleet_pipelines.transforms.event_detection import cut_to_sensor
from spikefleet_pipelines.transforms.event_detection_config import EventDetectionTransformConfig
from support.event_stores import CATEGORY_IDS, LENGTH, boxed_store

SENSOR, T, HALF = (40, 56), 3, LENGTH // 2
ZOOMING = {"zoom": 0.9, "zoom_in": 2.0, "zoom_out": 1.6, "zoom_in_share": 0.5, "horizontal_flip": 0.5}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> EventSamples:
    found = boxed_store(tmp_path_factory.mktemp("boxed") / "store", "own", SENSOR, 10).samples("train")
    assert isinstance(found, EventSamples)
    return found


def config(**fields: Any) -> EventDetectionTransformConfig:
    given = {"window": "50ms", "divisor": 32, **fields}
    return EventDetectionTransformConfig.model_validate(given).for_timesteps(T)


def batch_of(samples: EventSamples, train: bool = False, seed: int = 0, **fields: Any) -> Batch:
    loader = BatchLoader(samples, config(**fields), train, seed)
    (batch,) = loader.epoch(EvaluationPlan(samples=len(samples), global_batch=len(samples)), 0)
    return batch


def inside(counts: NDArray[np.float32], box: list[float]) -> float:
    """Events of pixels whose centres are in a box."""
    x, y = np.arange(counts.shape[1]) + 0.5, np.arange(counts.shape[0]) + 0.5
    covered = ((y > box[1]) & (y < box[3]))[:, None] & (x > box[0]) & (x < box[2])
    return float(counts[covered].sum())


def test_a_sample_is_a_label_time(samples: EventSamples) -> None:
    assert len(samples) == 20
    assert [samples.label_time(row)[:2] for row in (0, 1, 2, 19)] == [(0, 0), (0, 1), (1, 0), (9, 1)]
    assert [samples.label_time(row).time for row in (0, 1)] == [HALF, LENGTH]
    assert samples.annotations(3).image_id == 3
    assert samples.annotations(3).labels.tolist() == [0, 0]
    assert samples.annotations(2).category_ids.tolist() == [CATEGORY_IDS[1], CATEGORY_IDS[0]]
    with pytest.raises(IndexError, match="row 20 is outside"):
        samples.label_time(20)


def test_frames_are_padded_and_boxes_enclose_the_events_of_their_window(samples: EventSamples) -> None:
    batch = batch_of(samples)
    assert batch.images.shape == (20, T, 2, 64, 64)
    assert config().input_shape(None, SENSOR) == (2, 64, 64)
    assert not batch.images[..., 40:, :].any()
    assert not batch.images[..., 56:].any()
    for row in range(20):
        counts = batch.images[row].sum((0, 1)).numpy()
        (box,) = batch.targets[row].boxes.tolist()  # the one beyond the sensor is no target
        assert inside(counts, box) == counts.sum() == 300
        assert inside(counts, [box[0] + 1, *box[1:]]) < 300
        assert batch.targets[row].annotations.labels.shape == (1,)
        assert batch.targets[row].placement.to_stored_image(batch.targets[row].boxes).tolist() == [box]


def test_the_window_ends_at_the_label_time_and_may_begin_before_the_recording(samples: EventSamples) -> None:
    whole = batch_of(samples, window="100ms").images
    assert [whole[row].sum() for row in (0, 1)] == [300, 600]  # of the second half there is nothing in the first one
    assert not whole[0, 0].any()
    short = batch_of(samples, window="1ms").images
    assert 0 < short.sum() < 20 * 30


def test_a_letterbox_scales_events_and_boxes_alike(samples: EventSamples) -> None:
    batch = batch_of(samples, fit="letterbox", size=128)
    assert batch.images.shape[-2:] == (128, 128)
    place = batch.targets[0].placement
    assert (place.left, place.top, place.height, place.width) == (0, 18, 40, 56)
    stored = batch_of(samples)
    for row in range(20):
        counts = batch.images[row].sum((0, 1)).numpy()
        (box,) = batch.targets[row].boxes.tolist()
        edge = [box[0] - 0.51, box[1] - 0.51, box[2] + 0.51, box[3] + 0.51]
        assert inside(counts, edge) == counts.sum() > 1200
        back = place.to_stored_image(batch.targets[row].boxes)
        assert torch.allclose(back, stored.targets[row].boxes, atol=1e-4)
    assert config(fit="letterbox", size=128).input_shape(None, SENSOR) == (2, 128, 128)


def test_one_zoom_and_flip_for_all_slices_and_the_boxes(samples: EventSamples) -> None:
    plain, zoomed = batch_of(samples), batch_of(samples, train=True, seed=4, **ZOOMING)
    changed, lost = 0, 0
    for row in range(20):
        counts = zoomed.images[row].sum((0, 1)).numpy()
        changed += not torch.equal(zoomed.images[row], plain.images[row])
        if not len(zoomed.targets[row].boxes):  # zoomed out of sight
            lost += 1
            assert counts.sum() < 40
            continue
        (box,) = zoomed.targets[row].boxes.tolist()
        edge = [box[0] - 0.51, box[1] - 0.51, box[2] + 0.51, box[3] + 0.51]
        assert inside(counts, edge) == counts.sum()
        assert min(box) >= 0
        assert max(box) <= 64
        assert zoomed.targets[row].annotations is None
    assert changed > 12
    assert lost < 8
    # Where a slice alone is moved, its events are outside the box: the check above can fail.
    row = next(row for row in range(20) if len(zoomed.targets[row].boxes))
    (box,) = zoomed.targets[row].boxes.tolist()
    moved = zoomed.images[row].roll(31, -1).sum((0, 1)).numpy()
    assert inside(moved, [box[0] - 0.51, box[1] - 0.51, box[2] + 0.51, box[3] + 0.51]) < moved.sum()


def test_a_flip_alone_mirrors_frames_and_boxes(samples: EventSamples) -> None:
    plain, flipped = batch_of(samples), batch_of(samples, train=True, horizontal_flip=1.0)
    assert torch.equal(flipped.images, plain.images.flip(-1))
    for one, other in zip(flipped.targets, plain.targets, strict=True):
        assert one.boxes[:, [0, 2]].tolist() == (64 - other.boxes[:, [2, 0]]).tolist()
    assert torch.equal(batch_of(samples, train=False, horizontal_flip=1.0).images, plain.images)


def test_a_flip_is_refused_where_labels_depend_on_it(tmp_path: Path) -> None:
    scenes = boxed_store(tmp_path / "s", "saccade_scenes", SENSOR, 2).samples("train")
    with pytest.raises(SourceError, match=r"horizontal_flip is 0\.5: it changes what the labels"):
        BatchLoader(scenes, config(horizontal_flip=0.5), True)
    BatchLoader(scenes, config(zoom=0.5), True)


def test_reversed_time_and_the_device(samples: EventSamples) -> None:
    plain = batch_of(samples).images
    assert torch.equal(batch_of(samples, reverse_time=True).images, plain.flip(1))
    assert not torch.equal(plain.flip(1), plain)
    for fields in (ZOOMING, {**ZOOMING, "reverse_time": True}, {"fit": "letterbox", "size": 96}):
        here, there = (batch_of(samples, train=True, bin_on=where, **fields) for where in ("loader", "device"))
        assert torch.equal(here.images, there.images)
        assert not torch.equal(here.images, batch_of(samples, train=True, seed=9, **ZOOMING).images)


def test_pixels_without_events_of_last_polarity(samples: EventSamples) -> None:
    frames = batch_of(samples, representation={"kind": "last_polarity"}).images
    assert frames.shape[2] == 1
    assert set(np.unique(frames.numpy())) == {np.float32(0), np.float32(127 / 255), np.float32(1)}
    assert torch.equal(frames[..., 40:, :], torch.full_like(frames[..., 40:, :], 127 / 255))


def test_processes_change_no_bit(samples: EventSamples) -> None:
    plan = EpochPlan(samples=20, global_batch=6, seed=1)
    loaders = [BatchLoader(samples, config(**ZOOMING), True, seed=2, processes=processes) for processes in (0, 2)]
    here, there = (list(loader.epoch(plan, 3)) for loader in loaders)
    assert len(here) == len(there) == 4
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images)
        assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(one.targets, other.targets, strict=True))


def test_label_times_without_targets_can_be_left_out(samples: EventSamples, tmp_path: Path) -> None:
    assert config().training_rows(samples).rows is None
    rows = config(skip_empty=True).training_rows(samples).rows
    assert rows is not None
    assert rows.tolist() == list(range(20))
    (columns,) = samples.annotation_columns
    columns.boxes[2] = [-50, 0, 50.5, 20]  # half a pixel wide after it is cut to the sensor
    changed = type("Changed", (), {"annotation_columns": [columns], "name": "train", "location": "here"})
    found = config(skip_empty=True).training_rows(changed).rows
    assert found is not None
    assert found.tolist() == [0, *range(2, 20)]


def test_boxes_are_cut_to_the_sensor() -> None:
    boxes = np.array([[-4.0, 2, 10, 10], [50, 30, 20, 20], [-9, 0, 9.5, 5], [60, 0, 5, 5], [1, 1, 0.5, 9]])
    number = np.arange(5)
    stored = Annotations(7, *SENSOR, boxes, number, number, number == 1, np.ones(5), number)
    cut = cut_to_sensor(stored)
    assert cut.boxes.tolist() == [[0, 2, 6, 10], [50, 30, 6, 10]]
    assert cut.areas.tolist() == [60, 60]
    assert (cut.labels.tolist(), cut.crowd.tolist(), cut.image_id) == ([0, 1], [False, True], 7)
    assert stored.boxes[0].tolist() == [-4, 2, 10, 10]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fit": "letterbox"}, "size is None, but fit is letterbox"),
        ({"size": 64}, "size is 64, but fit is pad"),
        ({"fit": "letterbox", "size": 100}, "size is 100, expected a multiple of divisor=32"),
        ({"window": "recording"}, "'recording' is no duration"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**wrong)


def test_windows_are_drawn_at_the_size_of_the_sensor(samples: EventSamples) -> None:
    loader = BatchLoader(samples, config(), False)
    pictures = loader.pictures([0, 1])
    assert [picture.shape for picture in pictures] == [(3, *SENSOR)] * 2
    assert not torch.equal(pictures[0], pictures[1])
    batch = batch_of(samples)
    drawn = config().pixels(batch.images[:2])
    assert drawn[0].shape == (3, 64, 64)
    assert torch.equal(drawn[0][:, :40, :56], pictures[0])


def test_boxes_are_chosen_for_training_by_their_size_on_the_sensor(samples: EventSamples) -> None:
    """Sides are 8 and 16; zoomed ones are others, but what is left out is not chosen by them."""
    rvt = {"least_diagonal": 12, "least_side": 10, "largest_width": 0.9}
    wide = [row for row in range(20) if samples.annotations(row).boxes[0, 2] == 16]
    assert 0 < len(wide) < 20

    def shown(train: bool, zoom: float = 0.0, **filters: float) -> list[int]:
        fields = {**ZOOMING, "zoom": zoom, "training_boxes": filters}
        batch = batch_of(samples, train, **fields)
        return [row for row, target in enumerate(batch.targets) if len(target.boxes)]

    assert shown(True, **rvt) == wide
    assert shown(True) == shown(False, **rvt) == list(range(20))
    assert set(shown(True, zoom=1.0, **rvt)) == set(wide) & set(shown(True, zoom=1.0))
    assert shown(True, least_diagonal=16 * 2**0.5 - 0.01) == wide
    assert shown(True, least_diagonal=16 * 2**0.5 + 0.01) == []
    assert shown(True, largest_width=16 / SENSOR[1] - 0.01) == [row for row in range(20) if row not in wide]
    rows = config(training_boxes=rvt, skip_empty=True).training_rows(samples).rows
    assert rows is not None
    assert rows.tolist() == wide
    with pytest.raises(ValueError, match=r"has no label time with a box to train on; set .*, other data.transform.tr"):
        config(training_boxes={"least_side": 17}, skip_empty=True).training_rows(samples)
    with pytest.raises(ValidationError, match="largest_width"):
        config(training_boxes={"largest_width": 0})
