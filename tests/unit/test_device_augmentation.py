"""Crop, flip and cutout on the device: the bits of the loader, for every image, however batches are made and cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config, differences
from spikefleet.errors import UserError
from spikefleet.training.prefetch import ahead
from spikefleet.training.splits import training_loader
from spikefleet.training.step import Meter, micro_batches, settle, training_step
from spikefleet.training.step_reading import DeviceNumbers
from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.reader import Split, Store
from spikefleet_pipelines.store.writer import StoreWriter
from spikefleet_pipelines.transforms.classification import shifted_crop
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.pixel_augmentation import PixelAugmentation
from support.events import KeptEvents
from support.training_steps import CLASSIFIER, STEPS, task_of, training_state
from support.waiting import no_waiting, waiting_allowed

SHAPE = (3, 13, 18)
COUNT = 300
EVERYTHING: dict[str, Any] = {"crop_padding": 3, "horizontal_flip": 0.5, "cutout": 5}
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "crop": {"crop_padding": 2},
    "wide crop": {"crop_padding": 30},
    "flip": {"horizontal_flip": 0.5},
    "flip of all": {"horizontal_flip": 1.0},
    "cutout": {"cutout": 4},
    "cutout of all": {"cutout": 60},
    "everything": EVERYTHING,
    "nothing": {},
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    """The digits, and coloured images wider than high in several shards."""
    place = tmp_path_factory.mktemp("stores")
    images = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE), np.uint8)
    image = ImageFormat(encoding="raw", shape=SHAPE)
    options: Any = {"source": "test", "class_names": "abc", "image": image, "options": {}}
    with StoreWriter(place / "colours", **options, shard_bytes=70 * images[0].nbytes) as writer:
        writer.write_images("train", images, np.arange(COUNT) % 3)
        writer.commit()
    colours = Store.open(place / "colours")
    assert len(colours.manifest.shards["train"]) > 2
    return {"digits": prepare("digits", None, place / "digits").split("train"), "colours": colours.split("train")}


def loader(split: Split, on: str, processes: int = 0, **fields: Any) -> BatchLoader:
    normalise = "digits" if split.image_shape == (1, 8, 8) else "cifar10"
    config = TransformConfig(normalise=normalise, augment_on=on, **fields)  # type: ignore[arg-type]
    return BatchLoader(split, config, train=True, seed=5, processes=processes, pixels=on == "device")


def plan(split: Split, **fields: int) -> EpochPlan:
    return EpochPlan(samples=len(split), global_batch=64, seed=3, **fields)


def on_device(batch: Batch, channels_last: bool = False) -> Batch:
    """As the device of a step has it; nothing may wait for that."""
    with no_waiting():
        return batch.to("cpu", channels_last)


def assert_same(mine: Batch, theirs: Batch) -> None:
    """In every bit, the sign of zero too, and in the layout."""
    assert mine.images.dtype == theirs.images.dtype == torch.float32
    assert mine.images.stride() == theirs.images.stride()
    assert torch.equal(mine.images.view(torch.int32), theirs.images.view(torch.int32))
    assert torch.equal(mine.indices, theirs.indices)
    assert isinstance(mine.targets, Tensor)
    assert isinstance(theirs.targets, Tensor)
    assert torch.equal(mine.targets, theirs.targets)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("data", ["digits", "colours"])
def test_every_image_is_the_loaders_to_the_bit(
    splits: dict[str, Split], data: str, augmentation: str, channels_last: bool
) -> None:
    split, fields, seen = splits[data], AUGMENTATIONS[augmentation], 0
    here, there = loader(split, "loader", **fields), loader(split, "device", **fields)
    for epoch in (0, 1):
        for mine, sent in zip(here.epoch(plan(split), epoch), there.epoch(plan(split), epoch), strict=True):
            assert sent.augmentation is not None
            assert torch.equal(sent.images, torch.from_numpy(split.gather(sent.indices.numpy())))
            theirs = on_device(sent, channels_last)
            assert (theirs.scaling, theirs.augmentation) == (None, None)
            assert_same(mine.to("cpu", channels_last), theirs)
            seen += len(mine.indices)
    assert seen == 2 * len(split)


def test_other_draws_are_seen(splits: dict[str, Split]) -> None:
    """Each of them; `assert_same` also tells zeros of both signs apart."""
    split = splits["colours"]
    (mine, *_), (sent, *_) = (loader(split, on, **EVERYTHING).epoch(plan(split), 0) for on in ("loader", "device"))
    assert sent.augmentation is not None
    assert sent.augmentation.draws.shape == (64, 5)
    for column in range(5):
        draws = sent.augmentation.draws.clone()
        draws[:, column] = 1 - draws[:, column] if column == 2 else draws[:, column] + 1
        with pytest.raises(AssertionError):
            assert_same(mine, on_device(sent._replace(augmentation=PixelAugmentation(draws, 5))))
    assert bool((mine.images.view(torch.int32) == -(2**31)).any())
    with pytest.raises(AssertionError):
        assert_same(mine, mine._replace(images=mine.images + 0.0))


@pytest.mark.parametrize("data", ["digits", "colours"])
def test_loader_processes_and_resumes_change_no_bit(splits: dict[str, Split], data: str) -> None:
    split = splits[data]
    here, there = loader(split, "loader", **EVERYTHING), loader(split, "device", processes=2, **EVERYTHING)
    for epoch, start in ((0, 0), (1, 3), (2, 0)):
        batches = [of.epoch(plan(split), epoch, start) for of in (here, there)]
        for mine, sent in zip(*batches, strict=True):
            assert_same(mine, on_device(sent))
    assert there.copied_bytes == 0


def test_ranks_have_the_images_of_one(splits: dict[str, Split]) -> None:
    split = splits["digits"]
    images: dict[int, torch.Tensor] = {}
    for rank in range(3):
        of = loader(split, "device", **EVERYTHING)
        steps = EpochPlan(samples=len(split), global_batch=63, seed=3, world_size=3, rank=rank)
        for batch in map(on_device, of.epoch(steps, 1)):
            images |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
    assert len(images) == len(split)
    for mine in loader(split, "loader", **EVERYTHING).epoch(plan(split), 1):
        for row, image in zip(mine.indices.tolist(), mine.images, strict=True):
            assert torch.equal(image, images[row])


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_micro_batches_are_cut_with_their_draws(splits: dict[str, Split], parts: int) -> None:
    split = splits["colours"]
    (mine, *_), (sent, *_) = (loader(split, on, **EVERYTHING).epoch(plan(split), 0) for on in ("loader", "device"))
    cut = list(zip(micro_batches(mine, parts), micro_batches(sent, parts), strict=True))
    assert len(cut) == parts
    for one, other in cut:
        assert_same(one, on_device(other))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_size_and_place(data: st.DataObject) -> None:
    def number(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    count, channels, height, width, side = number(0, 4), number(1, 3), number(1, 9), number(1, 9), number(0, 12)
    places = st.tuples(*[st.integers(-12, 12)] * 2, st.integers(0, 1), *[st.integers(-12, 12)] * 2)
    draws = np.array([data.draw(places) for _ in range(count)], np.int32).reshape(count, 5)
    rng = np.random.default_rng(number(0, 99))
    pixels = rng.integers(1, 256, (count, channels, height, width), np.uint8)
    expected, erased = np.zeros_like(pixels), np.ones(pixels.shape, np.float32)
    for image, out, ones, (down, right, flip, top, left) in zip(pixels, expected, erased, draws.tolist(), strict=True):
        shifted_crop(image, down, right, out[..., ::-1] if flip else out)
        ones[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
    todo = PixelAugmentation(torch.from_numpy(draws), side)
    with no_waiting():
        moved = todo.moved(torch.from_numpy(pixels))
        kept = todo.erased(torch.ones(pixels.shape))
    assert torch.equal(moved, torch.from_numpy(expected))
    assert torch.equal(kept, torch.from_numpy(erased))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"random_resized_crop": 8, "resize": 9, "center_crop": 8},
            "random_resized_crop is 8, which augment_on=device does not compute; set augment_on=loader",
        ),
        (
            {"auto_augment": "cifar10"},
            "auto_augment is 'cifar10', which augment_on=device does not compute; set augment",
        ),
        ({"mixup": 0.5}, r"mixup is 0\.5, which augment_on=device does not compute; set augment_on=loader"),
        ({"cut_mix": 1.0}, r"cut_mix is 1\.0, which augment_on=device does not compute; set augment_on=loader"),
        ({"augment_on": "gpu"}, "augment_on"),
    ],
)
def test_what_the_device_does_not_compute_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TransformConfig(**{"augment_on": "device"} | fields)
    assert TransformConfig(**fields | {"augment_on": "loader"}).augments_on_device is False


def test_images_of_varying_sizes_and_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"augment_on is 'device', but the images have varying sizes; set .*=loader"):
        TransformConfig(augment_on="device", resize=9, center_crop=8).check_images(None)
    with pytest.raises(ValidationError, match=r"kind 'detection' has no such field; kind 'image' has it"):
        DataConfig(source="scenes", transform={"kind": "detection", "augment_on": "device"})  # type: ignore[arg-type]


def test_a_refusal_is_one_sentence(tmp_path: Path) -> None:
    words = ["train", "digits", "--workers", "0", "--runs-dir", str(tmp_path / "runs")]
    given = ["data.transform.augment_on=device", "data.transform.mixup=0.5"]
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*words, *given])
    assert done.exit_code == 2
    assert (
        "data.transform: mixup is 0.5, which augment_on=device does not compute; set augment_on=loader" in done.stderr
    )
    assert "Traceback" not in done.output
    assert not (tmp_path / "runs").exists()


def digits(*overrides: str) -> Config:
    return load_config("digits", parse_overrides(list(overrides)))


def test_a_run_resumes_with_the_other_value() -> None:
    """It changes no bit of the result, and runs of earlier versions have no value."""
    plain, other = digits(), digits("data.transform.augment_on=device")
    assert plain.digest() == other.digest()
    assert differences(plain.dump(), other.dump()) == []
    earlier = plain.dump()
    del earlier["data"]["transform"]["augment_on"]
    assert differences(earlier, other.dump()) == []
    assert differences(plain.dump(), digits("data.transform.cutout=2").dump()) != []


def test_a_training_leaves_it_to_its_device_and_evaluation_has_nothing_to_leave(stores_dir: Path) -> None:
    store, config = Store.open(stores_dir / "digits"), digits("data.transform.augment_on=device")
    of = training_loader(store, config)
    batch = next(ahead(of.epoch(plan(store.split("train")), 0), torch.device("cpu"), False))
    assert batch.images.dtype == torch.uint8
    assert batch.augmentation is not None
    assert batch.augmentation.draws.shape == (64, 3)
    # Who does not ask for pixels has finished images, and so has who evaluates.
    for train in (True, False):
        finished = next(BatchLoader(of.split, config.transform, train).epoch(plan(store.split("train")), 0))
        assert (finished.images.dtype, finished.augmentation) == (torch.float32, None)
    evaluated = BatchLoader(of.split, config.transform, train=False, pixels=True)
    assert next(evaluated.epoch(plan(store.split("train")), 0)).augmentation is None
    with pytest.raises(UserError, match="augment_on"):
        digits("data.transform.augment_on=nowhere")


def test_a_step_waits_for_nothing(splits: dict[str, Split], monkeypatch: pytest.MonkeyPatch) -> None:
    """Training steps in the mode that raises where a host would wait, with the losses of the loader's images."""
    split, read = splits["digits"], DeviceNumbers.read

    def from_main_memory(numbers: DeviceNumbers) -> list[float]:
        with waiting_allowed():
            return read(numbers)

    monkeypatch.setattr(DeviceNumbers, "read", from_main_memory)

    def losses(on: str) -> list[float]:
        state, events = training_state(CLASSIFIER, torch.device("cpu")), KeptEvents()
        state.reads_late = True
        task, meter = task_of(state), Meter()
        for _, batch in zip(range(STEPS), loader(split, on, **EVERYTHING).epoch(plan(split), 0), strict=False):
            with no_waiting():
                training_step(state, task, batch, meter, events)
        settle(state, events)
        return list(events.losses.values())

    assert len(losses("loader")) == STEPS
    assert losses("device") == losses("loader")
