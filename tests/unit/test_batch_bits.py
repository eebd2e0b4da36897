"""A batch is the same bits in every version, and moves to a device as a whole."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig

IMAGE: dict[str, Any] = {"crop_padding": 1, "horizontal_flip": 0.5, "cutout": 3, "normalise": "digits"}
# Without a resize, whose last bit is the processor's.
DETECTION: dict[str, Any] = {
    "size": 96, "mosaic": 0.8, "translate": 0.1, "horizontal_flip": 0.5, "hsv": (0.015, 0.7, 0.4)
}  # fmt: skip
CONFIGS: dict[str, BatchTransformConfig] = {
    "digits": TransformConfig(**IMAGE),
    "scenes": DetectionTransformConfig(**DETECTION),
}
PINS = {
    ("digits", True): "de35207393b60c36",
    ("digits", False): "8c38f9b0140b3422",
    ("scenes", True): "acac53f67d60d864",
    ("scenes", False): "b3da9ef93216a38e",
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("stores")
    scenes = prepare("scenes", None, folder / "scenes", train=48, val=8, test=8)
    return {"digits": prepare("digits", None, folder / "digits"), "scenes": scenes}


def load(store: Store, config: BatchTransformConfig, train: bool, processes: int = 0) -> Batch:
    split = store.split("train")
    loader = BatchLoader(split, config, train, seed=5, epochs=20, processes=processes)
    return next(loader.epoch(EpochPlan(samples=len(split), global_batch=16, seed=3), 2))


def digest(batch: Batch) -> str:
    """A hash of everything that a batch holds."""
    found = hashlib.sha256(batch.images.numpy().tobytes())
    if isinstance(batch.targets, Tensor):
        found.update(batch.targets.numpy().tobytes())
    else:
        for target in batch.targets:
            found.update(target.boxes.numpy().tobytes() + target.labels.numpy().tobytes())
            found.update(repr(tuple(target.placement)).encode())
            if target.annotations is not None:
                found.update(target.annotations.boxes.tobytes() + str(target.annotations.image_id).encode())
    found.update(batch.indices.numpy().tobytes() + str(batch.global_count).encode())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(("source", "train"), PINS)
def test_a_batch_is_the_bits_that_it_was(stores: dict[str, Store], source: str, train: bool, processes: int) -> None:
    batch = load(stores[source], CONFIGS[source], train, processes)
    assert digest(batch) == PINS[source, train]
    # The hash sees each part.
    shifted = batch._replace(images=batch.images + 1e-6)
    others = [shifted, batch._replace(indices=batch.indices + 1), batch._replace(targets=batch.targets[1:])]
    assert PINS[source, train] not in map(digest, others)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("source", CONFIGS)
def test_a_batch_moves_to_a_device_as_a_whole(stores: dict[str, Store], source: str, channels_last: bool) -> None:
    batch = load(stores[source], CONFIGS[source], train=False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    here, there = batch.to("cpu", channels_last), batch.to(torch.device("meta"), channels_last)
    assert digest(here._replace(images=here.images.contiguous())) == PINS[source, False]
    assert type(there) is Batch
    for moved, device in ((here, "cpu"), (there, "meta")):
        assert moved.images.device.type == device
        assert moved.images.is_contiguous(memory_format=layout)
        tensors = [moved.targets] if isinstance(moved.targets, Tensor) else [
            part for target in moved.targets for part in (target.boxes, target.labels)
        ]  # fmt: skip
        assert {tensor.device.type for tensor in tensors} == {device}
        assert len(moved.targets) == len(moved.images) == len(moved.indices)
        assert moved.global_count == batch.global_count
    assert batch.images.is_contiguous()
