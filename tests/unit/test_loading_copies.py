"""From a shard to what a step reads, images are written once, into the memory that it reads: copies are counted."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.io
from numpy.typing import NDArray

from spikefleet_pipelines import loading
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.shared_batches import SharedBatches, allocating
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Samples
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_pipelines.transforms.classification_config import TransformConfig
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig
from spikefleet_pipelines.transforms.normalise import FloatStage
from support.event_stores import labelled_store

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding", "error:batches of loader processes")

BATCH = 24
CONFIGS: dict[str, BatchTransformConfig] = {
    "raw": TransformConfig(crop_padding=1, horizontal_flip=0.5),
    "stored": TransformConfig(crop_padding=1, horizontal_flip=0.5, cutout=3, augment_on="device"),
    "jpeg": TransformConfig(random_resized_crop=48, horizontal_flip=0.5, resize=48, center_crop=48),
    "boxes": DetectionTransformConfig(kind="detection", size=64, mosaic=0.5, scale=0.5, horizontal_flip=0.5),
    "sizes": DetectionTransformConfig(kind="detection", size=64, resize="keep_ratio", longest=128, divisor=8),
    "events": EventsTransformConfig().for_timesteps(3),
    "words": EventsTransformConfig(bin_on="device").for_timesteps(3),
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Samples]:
    place = tmp_path_factory.mktemp("copies")
    rng = np.random.default_rng(0)
    for number in range(2 * BATCH):
        folder = place / "files" / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (60 + number, 80, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.jpg")
    (place / "files" / "val").symlink_to(place / "files" / "train")
    raw = prepare("digits", None, place / "raw")
    jpeg = prepare("image_folder", place / "files", place / "jpeg", parallel=1)
    scenes = prepare("scenes", None, place / "scenes", train=60, val=4, test=4)
    events = labelled_store(place / "events", "own", (12, 20), [40 * n for n in range(60)], classes=4)
    boxes, recordings = scenes.samples("train"), events.samples("train")
    return {
        "raw": raw.samples("train"),
        "stored": raw.samples("train"),
        "jpeg": jpeg.samples("train"),
        "boxes": boxes,
        "sizes": boxes,
        "events": recordings,
        "words": recordings,
    }


def loader(splits: dict[str, Samples], kind: str, processes: int = 1, **more: Any) -> BatchLoader:
    return BatchLoader(splits[kind], CONFIGS[kind], train=True, seed=5, processes=processes, **more)


def epoch(of: BatchLoader, number: int = 0) -> Iterator[Batch]:
    return of.epoch(EpochPlan(samples=len(of.split), global_batch=BATCH, seed=3), number)


def parts(batch: Batch) -> list[torch.Tensor]:
    targets = (batch.targets,) if isinstance(batch.targets, torch.Tensor) else batch.targets
    boxes = [part for target in targets for part in ([target] if torch.is_tensor(target) else target[:2])]
    return [batch.images, batch.indices, *boxes]


def assert_equal(one: Batch, other: Batch) -> None:
    found = list(zip(parts(one), parts(other), strict=True))
    assert all(torch.equal(mine, theirs) and mine.dtype == theirs.dtype for mine, theirs in found)
    assert one.global_count == other.global_count


def compare(here: BatchLoader, there: BatchLoader) -> int:
    """Compares an epoch of both; returns how many batches of the second are in their slots."""
    shared = 0
    for one, other in zip(epoch(here), epoch(there), strict=True):
        assert_equal(one, other)
        shared += in_slot(there, other.images)
    return shared


def in_slot(of: BatchLoader, images: torch.Tensor) -> bool:
    slots = of._slots
    return slots is not None and 0 <= images.data_ptr() - slots._address < len(slots._map)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("pixels", [False, True])
def test_the_step_reads_what_the_loader_process_wrote(splits: dict[str, Samples], kind: str, pixels: bool) -> None:
    here, there = loader(splits, kind, 0, pixels=pixels), loader(splits, kind, 2, pixels=pixels)
    for number in (0, 1):
        for one, other in zip(epoch(here, number), epoch(there, number), strict=True):
            assert_equal(one, other)
            # Of words the frames are made on the device; what was sent is seen below.
            assert kind == "words" or in_slot(there, other.images)
    assert there.copied_bytes == 0


class OwnMemory(FloatStage):
    """A transform that does not ask for the memory of its batch."""

    def __call__(self, images: NDArray[np.uint8]) -> torch.Tensor:
        return super().__call__(images).clone()


def test_memory_of_another_kind_is_counted_and_said(splits: dict[str, Samples]) -> None:
    here, there = loader(splits, "raw", 0), loader(splits, "raw", 1)
    images = there._transform._images  # type: ignore[attr-defined]
    images._normalise = OwnMemory(CONFIGS["raw"].normalise)  # type: ignore[attr-defined]
    with pytest.warns(RuntimeWarning, match="must allocate its batch by empty_batch") as said:
        assert compare(here, there) == 0
    assert there.copied_bytes == 4 * 64 * len(here.split)
    assert len(said) == 1


def largest_intermediate(of: BatchLoader, again: Any = None) -> tuple[int, int]:
    """Bytes that numpy and Python take at most while a batch is written into its slot, and bytes of the batch."""
    slots = SharedBatches(1)
    writer = slots.writer(0)
    rows = np.arange(BATCH)
    of._transform(rows, 0)  # what is allocated once
    tracemalloc.start()
    try:
        with allocating(writer):
            images, _ = of._transform(rows, 0)
            if again is not None:
                again(images)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    place = writer.place_of(images)
    assert place is not None
    return peak, place.nbytes


@pytest.mark.parametrize("kind", ["raw", "stored", "jpeg", "boxes"])
def test_between_shard_and_slot_there_is_no_other_batch(splits: dict[str, Samples], kind: str) -> None:
    """As a GPU is sent them: pixels, which a quarter of the bytes of a copy would show."""
    config = CONFIGS[kind]
    if kind in ("raw", "stored"):  # large ones, so that numbers of single rows do not count
        enlarged = prepare("digits", None, Path(splits["raw"].location).with_name(f"large {kind}"), upsample=4)
        of = BatchLoader(enlarged.samples("train"), config, train=True, seed=5, pixels=True)
    else:
        of = loader(splits, kind, 0, pixels=True)
    peak, size = largest_intermediate(of)
    assert peak < size * 3 / 4
    # Negative control: one copy of the batch is seen.
    assert largest_intermediate(of, lambda images: images.numpy().copy())[0] >= size


def test_a_jpeg_is_decoded_where_it_is(splits: dict[str, Samples], monkeypatch: pytest.MonkeyPatch) -> None:
    split, decode, seen = splits["jpeg"], torchvision.io.decode_image, []

    def watched(encoded: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        seen.append(encoded.data_ptr())
        return decode(encoded, *arguments, **more)

    monkeypatch.setattr(torchvision.io, "decode_image", watched)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not writable")
        split.image(3)
    assert seen == [split.encoded_image(3).ctypes.data]  # type: ignore[attr-defined]


def test_batches_that_are_kept_are_not_written_again(splits: dict[str, Samples]) -> None:
    here, there = loader(splits, "raw", 0), loader(splits, "raw", 2)
    expected = list(epoch(here))
    kept = []
    for number, batch in enumerate(epoch(there)):
        kept.append(batch.images[1:3] if number % 6 == 0 else batch.images.numpy()[1:3] if number % 6 == 1 else None)
    for number in (1, 2):
        assert sum(1 for _ in epoch(there, number)) == len(expected)
    for batch, part in zip(expected, kept, strict=True):
        assert part is None or np.array_equal(batch.images[1:3].numpy(), np.asarray(part))
    del batch, part, kept
    gc.collect()
    assert there._slots is not None
    assert (there._slots.in_use, there.copied_bytes) == (0, 0)


def test_more_batches_than_slots_are_sent_another_way(
    splits: dict[str, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_IN_USE", 3)
    here, there = loader(splits, "raw", 0), loader(splits, "raw", 1)
    with pytest.warns(RuntimeWarning, match="must not be used after many others"):
        kept = list(epoch(there))
    shared = sum(in_slot(there, batch.images) for batch in kept)
    assert shared == 5
    assert there.copied_bytes == sum(batch.images.nbytes for batch in kept[shared:])
    for one, other in zip(epoch(here), kept, strict=True):
        assert_equal(one, other)
    del one, other, kept
    count = there.copied_bytes
    for one, other in zip(epoch(here, 1), epoch(there, 1), strict=True):
        assert_equal(one, other)
    assert there.copied_bytes == count


@pytest.mark.parametrize("kind", ["raw", "sizes", "words"])
def test_batches_larger_than_a_slot(splits: dict[str, Samples], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SharedBatches", functools.partial(SharedBatches, slot_bytes=4096))
    here, there = loader(splits, kind, 0), loader(splits, kind, 1)
    with pytest.warns(RuntimeWarning, match="are copied"):
        compare(here, there)
    assert there.copied_bytes > 0


def test_without_addresses_batches_are_copied(splits: dict[str, Samples], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> SharedBatches:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(loading, "SharedBatches", refused)
    here, there = loader(splits, "boxes", 0), loader(splits, "boxes", 1)
    with pytest.warns(RuntimeWarning, match="are copied"):
        assert compare(here, there) == 0


def test_an_epoch_that_is_left_gives_its_slots_back(splits: dict[str, Samples]) -> None:
    here, there = loader(splits, "raw", 0), loader(splits, "raw", 2)
    for number in range(12):
        first = next(epoch(there, number))
        assert_equal(next(epoch(here, number)), first)
    for one, other in zip(epoch(here, 20), epoch(there, 20), strict=True):
        assert_equal(one, other)
    assert there.copied_bytes == 0


def test_loaders_beside_each_other(splits: dict[str, Samples]) -> None:
    kinds = ("raw", "jpeg", "boxes")
    expected = {kind: list(epoch(loader(splits, kind, 0))) for kind in kinds}
    running = {kind: epoch(loader(splits, kind, 1)) for kind in kinds}
    for number in range(2):
        for kind in kinds:
            assert_equal(expected[kind][number], next(running[kind]))


SPAWNED = """
import multiprocessing, sys
import torch
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.classification_config import TransformConfig

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    split = Store.open(sys.argv[1]).split("train")
    plan = EpochPlan(samples=len(split), global_batch=400)
    here, there = (BatchLoader(split, TransformConfig(), train=True, processes=count) for count in (0, 1))
    pairs = zip(here.epoch(plan, 0), there.epoch(plan, 0), strict=True)
    print(all(torch.equal(one.images, other.images) for one, other in pairs), there.copied_bytes)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_are_not_forked_copy(splits: dict[str, Samples], method: str, tmp_path: Path) -> None:
    (tmp_path / "spawned.py").write_text(SPAWNED)
    command = [sys.executable, str(tmp_path / "spawned.py"), splits["raw"].location, method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == ["True", str(4 * 64 * len(splits["raw"]))]
    assert done.stderr.count("processes must be forked") == 1


def test_a_loader_that_is_gone_leaves_its_batches(splits: dict[str, Samples]) -> None:
    there = loader(splits, "jpeg", 1)
    batches = epoch(there)
    batch = next(batches)
    expected = batch.images.clone()
    del there, batches
    gc.collect()
    for _ in epoch(loader(splits, "jpeg", 1), 1):
        pass
    assert torch.equal(batch.images, expected)
