"""Which boxes of a stored image are targets of a batch, and images that are empty, extreme or broken."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.store.annotations import AnnotationColumns, Target
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.reader import Split, Store
from spikefleet_pipelines.store.shards import write_shard
from spikefleet_pipelines.store.writer import StoreWriter, content_digests
from spikefleet_pipelines.transforms.detection import DetectionBatchTransform
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")

TABLE = (11, 22)


def columns(
    sizes: Sequence[tuple[int, int]], boxes: Sequence[list[list[float]]], crowd: Sequence[bool] = ()
) -> AnnotationColumns:
    """Objects of the first class: for each image of a size (height, width) its boxes."""
    flat = np.array([box for image in boxes for box in image], np.float64).reshape(-1, 4)
    heights, widths = np.array(sizes, np.int32).T
    return AnnotationColumns(
        np.arange(len(sizes)),
        heights,
        widths,
        np.cumsum([0, *map(len, boxes)]).astype(np.int32),
        flat,
        np.full(len(flat), TABLE[0]),
        np.array(crowd or [False] * len(flat), np.bool_),
        flat[:, 2] * flat[:, 3],
        np.arange(len(flat)),
    )


def make_boxes(out: Path, boxes: list[list[float]], crowd: Sequence[bool] = ()) -> Split:
    """One black raw image of 100 x 100 with these boxes."""
    image = ImageFormat(encoding="raw", shape=(3, 100, 100))
    with StoreWriter(out, source="test", class_names="ab", image=image, options={}, category_ids=TABLE) as writer:
        writer.write_images("train", np.zeros((1, 3, 100, 100), np.uint8), columns([(100, 100)], [boxes], crowd))
        writer.commit()
    return Store.open(out).split("train")


def make_encoded(out: Path, files: Sequence[bytes], objects: AnnotationColumns) -> Split:
    """Image files as they are, whatever is in them."""
    image = ImageFormat(encoding="encoded")
    with StoreWriter(out, source="test", class_names="ab", image=image, options={}, category_ids=TABLE) as writer:
        shard = write_shard(writer.directory / "train-00000.arrow", files, objects, image)
        writer.add_shard("train", shard, objects, content_digests(files))
        writer.commit()
    return Store.open(out).split("train")


def black_png(height: int, width: int) -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def targets_of(split: Split, train: bool = True, **config: Any) -> tuple[Target, ...]:
    transform = DetectionTransformConfig(**{"size": 100, "divisor": 4, **config})
    plan = EpochPlan(samples=len(split), global_batch=len(split), shuffle=False)
    batch = next(BatchLoader(split, transform, train).epoch(plan, 0))
    assert batch.images.isfinite().all()
    assert isinstance(batch.targets, tuple)
    return batch.targets


def test_which_boxes_are_targets(tmp_path: Path) -> None:
    boxes: list[list[float]] = [
        [10, 10, 20, 20],  # 0
        [10, 10, 0, 20],  # no area
        [90, 90, 30, 30],  # 2: clipped to 10 x 10
        [150, 10, 20, 20],  # outside
        [40, 40, 50, 50],  # a crowd
        [5, 50, 2, 40],  # too thin for training
        [1, 1, 98, 2.5],  # 6
    ]
    split = make_boxes(tmp_path / "store", boxes, [False] * 4 + [True] + [False] * 2)
    expected = [[10, 10, 30, 30], [90, 90, 100, 100], [5, 50, 7, 90], [1, 1, 99, 3.5]]
    (found,) = targets_of(split, train=False)
    assert found.boxes.tolist() == expected
    assert found.annotations is not None
    assert len(found.annotations.boxes) == 7
    (found,) = targets_of(split)
    assert found.boxes.tolist() == [expected[0], expected[1], expected[3]]
    assert found.annotations is None


def test_boxes_of_which_too_little_is_left_are_dropped(tmp_path: Path) -> None:
    """A strip of objects at the right border, seen through many shifts: kept exactly by the rule that is stated."""
    split = make_boxes(tmp_path / "store", [[60, 4 * k, 40, 3.5] for k in range(20)] + [[0, 90, 100, 0.5]])
    transform = DetectionBatchTransform(split, DetectionTransformConfig(size=100, divisor=4, translate=1.0), True, 0)
    kept = dropped = 0
    for epoch in range(200):
        _, (sample,) = transform(np.array([0]), epoch)
        place = sample.placement
        expected = []
        for x, y, width, height in split.annotations(0).boxes.tolist():
            x1, x2 = np.clip([x + place.left, x + width + place.left], 0, 100)
            y1, y2 = np.clip([y + place.top, y + height + place.top], 0, 100)
            sides = sorted((x2 - x1, y2 - y1))
            if sides[0] > 2 and sides[0] * sides[1] > 0.1 * width * height and sides[1] < 100 * sides[0]:
                expected.append([x1, y1, x2, y2])
            else:
                dropped += x2 > x1 and y2 > y1
        assert np.allclose(sample.boxes, np.array(expected).reshape(-1, 4), atol=1e-4)
        kept += len(expected)
    assert kept > 100 < dropped


def test_empty_and_crowded_images_have_empty_targets(tmp_path: Path) -> None:
    given: list[list[float]] = [[10, 10, 30, 30], [50, 50, 30, 30]]
    empty = make_boxes(tmp_path / "empty", [])
    crowded = make_boxes(tmp_path / "crowded", given, [True, True])
    alone = make_boxes(tmp_path / "alone", given)
    for mosaic in (0.0, 1.0):
        for split in (empty, crowded):
            for target in targets_of(split, mosaic=mosaic):
                assert target.boxes.shape == (0, 4)
                assert target.labels.shape == (0,)
        assert all(len(target.boxes) >= 2 for target in targets_of(alone, mosaic=mosaic))


def test_extreme_shapes_are_resized_to_at_least_a_pixel(tmp_path: Path) -> None:
    sizes = [(1, 1), (400, 60), (60, 400)]
    boxes = [[[0.0, 0.0, float(width), float(height)]] for height, width in sizes]
    split = make_encoded(tmp_path / "store", [black_png(*size) for size in sizes], columns(sizes, boxes))
    moving = {"translate": 0.1, "scale": 0.3, "horizontal_flip": 0.5}
    for config in ({"size": 32}, {"size": 64, "mosaic": 1.0, **moving}):
        assert len(targets_of(split, **config)) == 3


def test_an_image_of_another_size_than_its_annotations_is_refused(tmp_path: Path) -> None:
    split = make_encoded(tmp_path / "store", [black_png(9, 9)], columns([(9, 10)], [[]]))
    with pytest.raises(StoreError, match=r"row 0 of split 'train' in .*: the image is 9 x 9 pixels, expected 10 x 9"):
        targets_of(split)


@pytest.mark.parametrize("processes", [0, 1])
def test_errors_come_as_sentences_from_loader_processes(tmp_path: Path, processes: int) -> None:
    split = make_encoded(tmp_path / "store", [b"broken"], columns([(9, 9)], [[]]))
    loader = BatchLoader(split, DetectionTransformConfig(), True, processes=processes)
    with pytest.raises(StoreError, match=r"^row 0 of split 'train' in .*: it is not an image of a format that is read"):
        list(loader.epoch(EpochPlan(samples=1, global_batch=1), 0))
