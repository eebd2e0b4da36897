"""Images in memory become the batch that evaluation makes of the same images in a store."""

from typing import Any

import numpy as np
import pytest
import torch

from spikefleet_pipelines.in_memory import image_batch
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EvaluationPlan
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Split
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return prepare("digits", None, tmp_path_factory.mktemp("digits") / "store", upsample=2).split("val")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return prepare("scenes", None, tmp_path_factory.mktemp("scenes") / "store", train=1, val=9, test=1).split("val")


def evaluated(split: Split, transform: BatchTransformConfig) -> Batch:
    (batch,) = BatchLoader(split, transform, False).epoch(EvaluationPlan(samples=len(split), global_batch=1000), 0)
    return batch


@pytest.mark.parametrize(
    "config",
    [
        {"normalise": "digits"},
        {"random_resized_crop": 12, "resize": 14, "center_crop": 12, "normalise": "digits"},
        {"crop_padding": 2, "horizontal_flip": 1.0, "cutout": 4},
    ],
)
def test_classification_is_that_of_evaluation_without_classes(digits: Split, config: dict[str, Any]) -> None:
    transform, rows = TransformConfig(**config), np.arange(len(digits))
    expected, found = evaluated(digits, transform), image_batch(digits.gather(rows), transform, channels=1)
    assert torch.equal(found.images, expected.images)
    assert found.targets.tolist() == [-1] * len(digits)
    assert found.targets.dtype == expected.targets.dtype == torch.int64  # type: ignore[union-attr]
    assert torch.equal(found.indices, expected.indices)
    assert found.global_count == len(digits)


@pytest.mark.parametrize("config", [{"size": 64}, {"resize": "keep_ratio", "size": 100, "longest": 160, "divisor": 8}])
def test_detection_is_that_of_evaluation_without_objects(scenes: Split, config: dict[str, Any]) -> None:
    transform = DetectionTransformConfig(**config, normalise="imagenet", mosaic=0.0)
    expected = evaluated(scenes, transform)
    found = image_batch(scenes.gather(np.arange(len(scenes))), transform, channels=3)
    assert torch.equal(found.images, expected.images)
    assert any(len(target.boxes) for target in expected.targets)
    for row, (one, other) in enumerate(zip(found.targets, expected.targets, strict=True)):
        assert one.placement == other.placement
        assert one.boxes.shape == (0, 4)
        assert len(one.labels) == 0
        assert one.annotations.image_id == row
        assert (one.annotations.height, one.annotations.width) == (96, 96)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 1, 8, 8), np.float32), r"are float32 \[2, 1, 8, 8\], expected uint8 \[B, 1, H, W\]"),
        (np.zeros((1, 8, 8), np.uint8), r"are uint8 \[1, 8, 8\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"are uint8 \[2, 3, 8, 8\], expected uint8 \[B, 1, H, W\]"),
    ],
)
def test_other_pixels_are_refused(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_batch(images, TransformConfig(), channels=1)


def test_images_that_do_not_suit_the_transform_are_refused() -> None:
    transform = TransformConfig(normalise="imagenet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"normalise\.mean has 3 values, but the images have 1 channels"):
        image_batch(np.zeros((2, 1, 8, 8), np.uint8), transform, channels=1)


def test_the_given_images_stay_as_they_are() -> None:
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    before = images.copy()
    image_batch(images, DetectionTransformConfig(size=32), channels=3)
    image_batch(images, TransformConfig(normalise="imagenet"), channels=3)  # type: ignore[arg-type]
    assert np.array_equal(images, before)
