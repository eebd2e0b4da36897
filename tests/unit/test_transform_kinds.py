"""Transform kinds: an open table, errors at their fields, and targets of a kind that the loader does not know."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.in_memory import image_batch
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.rows import Rows
from spikefleet_pipelines.transforms import kinds
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.detection import DetectionBatchTransform
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig
from spikefleet_pipelines.transforms.kinds import register_transform_kind, transform_kinds


class CountConfig(BatchTransformConfig):
    """Counts the objects of each image of a detection store."""

    store_task: ClassVar[Literal["classification", "detection"]] = "detection"

    kind: Literal["count"] = "count"
    most: int = 3

    def build(self, split: Rows, train: bool, seed: int, epochs: int | None = None) -> "CountTransform":
        return CountTransform(split, self, train, seed, epochs)


class CountTransform:
    """The images of detection; counts travel as a list."""

    def __init__(self, split: Rows, config: CountConfig, train: bool, seed: int, epochs: int | None) -> None:
        detection = DetectionTransformConfig(size=96, normalise=config.normalise, horizontal_flip=0.5)
        self._detect = DetectionBatchTransform(split, detection, train, seed, epochs)
        self._most = config.most

    def __call__(self, rows: NDArray[np.int64], epoch: int) -> tuple[Tensor, list[int]]:
        images, samples = self._detect(rows, epoch)
        return images, [min(self._most, len(sample.labels)) for sample in samples]

    def unpack(self, packed: list[int]) -> Tensor:
        return torch.tensor(packed)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return prepare("scenes", None, tmp_path_factory.mktemp("scenes") / "store", train=40, val=4, test=4)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    register_transform_kind(CountConfig)


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("processes", [0, 1])
def test_a_third_kind_of_target_needs_no_change_of_the_loader(scenes: Store, processes: int) -> None:
    data = DataConfig(source="scenes", transform={"kind": "count", "most": 4, "normalise": "imagenet"})  # type: ignore[arg-type]
    assert isinstance(data.transform, CountConfig)
    assert DataConfig.model_validate_json(data.model_dump_json()) == data
    assert data.model_dump()["transform"]["most"] == 4  # what the class has beyond the common fields is dumped too
    split = scenes.split("train")
    loader = BatchLoader(split, data.transform, train=True, processes=processes)
    counted = 0
    for batch in loader.epoch(EpochPlan(samples=40, global_batch=16), 0):
        expected = [min(4, len(split.annotations(int(row)).labels)) for row in batch.indices]
        assert isinstance(batch.targets, Tensor)
        assert batch.targets.tolist() == expected
        assert batch.images.shape == (len(batch.indices), 3, 96, 96)
        counted += sum(expected)
    assert counted > 40
    batch = image_batch(np.zeros((2, 3, 50, 60), np.uint8), data.transform, channels=3)
    assert batch.targets.tolist() == [0, 0]


@pytest.mark.usefixtures("outside")
def test_a_kind_that_does_not_suit_the_store_is_refused_with_all_that_do(scenes: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is 'image'; set transform\.kind to 'detection' or 'count'"):
        BatchLoader(scenes.split("train"), TransformConfig(), True)
    digits = prepare("digits", None, tmp_path / "digits").split("train")
    with pytest.raises(
        ValueError, match=r"store for classification, but transform\.kind is 'count'; set transform\.kind to 'image'"
    ):
        BatchLoader(digits, CountConfig(), True)


@pytest.mark.usefixtures("outside")
def test_registering_again_is_harmless_and_another_class_is_refused() -> None:
    before = transform_kinds()
    assert list(before) == ["image", "detection", "events", "event_detection", "count"]
    register_transform_kind(CountConfig)
    register_transform_kind(TransformConfig)

    class Other(DetectionTransformConfig):
        pass

    class Nameless(BatchTransformConfig):
        pass

    class Storeless(BatchTransformConfig):
        kind: Literal["storeless"] = "storeless"

    with pytest.raises(
        ValueError, match=r"kind 'detection' is already registered by .*DetectionTransformConfig; give .*Other another"
    ):
        register_transform_kind(Other)
    with pytest.raises(ValueError, match="Nameless has no kind; declare"):
        register_transform_kind(Nameless)  # type: ignore[type-abstract]
    with pytest.raises(ValueError, match="Storeless has no store_task; set it to 'classification' or 'detection'"):
        register_transform_kind(Storeless)  # type: ignore[type-abstract]
    assert transform_kinds() == before
    assert list(transform_kinds("classification")) == ["image", "events"]
    assert list(transform_kinds("classification", events=False)) == ["image"]


def test_without_registration_the_kind_is_unknown() -> None:
    with pytest.raises(ValidationError, match="kind is 'count', expected 'image' or 'detection'"):
        DataConfig(source="scenes", transform={"kind": "count"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("transform", "location", "message"),
    [
        ({"crop_padding": "x"}, ("transform", "crop_padding"), "valid integer"),
        (
            {"crop_paddin": 1},
            ("transform", "crop_paddin"),
            "kind 'image' has no such field; did you mean 'crop_padding'",
        ),
        ({"mosaic": 1.0}, ("transform", "mosaic"), "kind 'image' has no such field; kind 'detection' has it"),
        ({"kind": "detection", "xyz": 1}, ("transform", "xyz"), "its fields are kind, normalise, resize"),
        ({"normalise": {"mean": [0], "std": [0]}}, ("transform", "normalise"), "expected values above 0"),
        ({"normalise": {"meen": [0]}}, ("transform", "normalise", "meen"), "not permitted"),
        ({"kind": ["image"]}, ("transform",), r"kind is \['image'\], expected 'image' or 'detection'"),
        (3, ("transform",), "valid dictionary"),
    ],
)
def test_errors_are_at_their_field_without_the_tag_of_a_union(
    transform: Any, location: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        DataConfig(source="digits", transform=transform)
    (error,) = caught.value.errors()
    assert error["loc"] == location
