"""Configs of detection transforms: fields that do not go together, and stores and images that they do not suit."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 100}, "size is 100, expected a multiple of divisor=32"),
        ({"longest": 1333}, "longest is 1333, but resize is letterbox"),
        ({"resize": "keep_ratio"}, "longest is None, expected at least size=640"),
        ({"resize": "keep_ratio", "size": 800, "longest": 700}, "longest is 700"),
        ({"resize": "keep_ratio", "longest": 1333, "mosaic": 1.0}, "mosaic is 1.0, but resize is keep_ratio"),
        ({"hsv": (0.1, 1.5, 0)}, r"hsv is \(0.1, 1.5, 0.0\)"),
        ({"scale": 1.0}, "scale"),
        ({"mosaic": 1.5}, "mosaic"),
        ({"normalise": "cifar"}, "unknown normalisation 'cifar'.*imagenet"),
        ({"mosiac": 1.0}, "mosiac"),
    ],
)
def test_bad_configs_are_refused_by_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DetectionTransformConfig(**fields)  # type: ignore[arg-type]


def test_the_kind_chooses_the_transform_of_a_config() -> None:
    data = DataConfig(source="scenes", transform={"kind": "detection", "size": 96})  # type: ignore[arg-type]
    assert isinstance(data.transform, DetectionTransformConfig)
    assert isinstance(DataConfig(source="digits").transform, TransformConfig)
    assert isinstance(DataConfig(source="digits", transform={"cutout": 3}).transform, TransformConfig)  # type: ignore[arg-type]
    for config in (data, DataConfig(source="digits")):
        assert DataConfig.model_validate_json(config.model_dump_json()) == config
    wrong: list[tuple[Any, str]] = [
        ({"kind": "detektion"}, "kind is 'detektion', expected 'image' or 'detection'"),
        ({"kind": "detection", "cutout": 3}, "cutout"),
        ({"size": 96}, "size"),
    ]
    for transform, message in wrong:
        with pytest.raises(ValidationError, match=message):
            DataConfig(source="scenes", transform=transform)


def test_a_transform_for_the_other_task_is_refused(tmp_path: Path) -> None:
    scenes = prepare("scenes", None, tmp_path / "scenes", train=2, val=1, test=1).split("train")
    with pytest.raises(
        ValueError, match=r"is a store for detection, but transform\.kind is 'image'; set transform.kind to 'detec"
    ):
        BatchLoader(scenes, TransformConfig(), True)
    digits = prepare("digits", None, tmp_path / "digits").split("train")
    with pytest.raises(
        ValueError, match=r"is a store for classification, .* 'detection'; set transform.kind to 'image'"
    ):
        BatchLoader(digits, DetectionTransformConfig(), True)
    for config, message in (({"hsv": (0, 0.5, 0)}, "needs 3 channels"), ({"normalise": "imagenet"}, "have 1 channel")):
        with pytest.raises(ValueError, match=message):
            DetectionTransformConfig(**config).check_images((1, 8, 8))  # type: ignore[arg-type]
