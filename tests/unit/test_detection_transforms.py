"""Detection batches: boxes stay on their objects, none is lost or doubled, and each is a function of its row alone."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EpochPlan, EvaluationPlan
from spikefleet_pipelines.store.annotations import AnnotationColumns, Target
from spikefleet_pipelines.store.manifest import ImageFormat
from spikefleet_pipelines.store.reader import Split, Store
from spikefleet_pipelines.store.shards import write_shard
from spikefleet_pipelines.store.writer import StoreWriter, content_digests
from spikefleet_pipelines.transforms.detection import DetectionBatchTransform
from spikefleet_pipelines.transforms.detection_config import DetectionTransformConfig

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")

PICTURES = 16
TABLE = tuple(11 * (number + 1) for number in range(5))
# Every object has a colour of its own: red tells its class, green its picture, blue its number in the picture.
SHAPES = [(96, 96), (60, 120), (150, 80), (110, 70)]  # height, width
MOVING = {"translate": 0.1, "scale": 0.3, "horizontal_flip": 0.5}


def painted(row: int, height: int, width: int) -> tuple[NDArray[np.uint8], list[list[float]], list[int]]:
    """A black picture with up to four solid rectangles that do not touch: pixels [H, W, 3], boxes and classes."""
    rng = np.random.default_rng(row)
    image = np.zeros((height, width, 3), np.uint8)
    boxes, classes = [], []
    for number in range(row % 5):
        label = int(rng.integers(len(TABLE)))
        cell = (number // 2 * (height // 2), number % 2 * (width // 2))
        box_height, box_width = (int(rng.integers(16, side // 2 - 8)) for side in (height, width))
        top = cell[0] + int(rng.integers(2, height // 2 - box_height - 2))
        left = cell[1] + int(rng.integers(2, width // 2 - box_width - 2))
        image[top : top + box_height, left : left + box_width] = colour(label, row, number)
        boxes.append([left, top, box_width, box_height])
        classes.append(label)
    return image, boxes, classes  # type: ignore[return-value]


def colour(label: int, row: int, number: int) -> tuple[int, int, int]:
    return 50 + 50 * label, 15 + 15 * row, 60 + 60 * number


def columns(sizes: Sequence[tuple[int, int]], found: Sequence[Any]) -> AnnotationColumns:
    boxes = np.array([box for _, boxes, _ in found for box in boxes], np.float64).reshape(-1, 4)
    labels = [label for _, _, labels in found for label in labels]
    return AnnotationColumns(
        np.arange(len(sizes)) + 500,
        np.array([height for height, _ in sizes], np.int32),
        np.array([width for _, width in sizes], np.int32),
        np.cumsum([0, *(len(labels) for _, _, labels in found)]).astype(np.int32),
        boxes,
        np.array([TABLE[label] for label in labels], np.int64),
        np.zeros(len(labels), np.bool_),
        boxes[:, 2] * boxes[:, 3],
        np.arange(len(labels)),
    )


def make_store(out: Path, sizes: Sequence[tuple[int, int]], raw: bool) -> Split:
    found = [painted(row, *size) for row, size in enumerate(sizes)]
    shape = (3, *sizes[0]) if raw else None
    image = ImageFormat(encoding="raw" if raw else "encoded", shape=shape)
    targets = columns(sizes, found)
    with StoreWriter(
        out, source="test", class_names="abcde", image=image, options={}, category_ids=TABLE, stand_ins={}
    ) as writer:
        if raw:
            writer.write_images("train", np.stack([pixels.transpose(2, 0, 1) for pixels, _, _ in found]), targets)
        else:
            files = [png(pixels) for pixels, _, _ in found]
            shard = write_shard(writer.directory / "train-00000.arrow", files, targets, image)
            writer.add_shard("train", shard, targets, content_digests(files))
        writer.commit()
    return Store.open(out).split("train")


def png(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return make_store(tmp_path_factory.mktemp("raw") / "store", [(96, 96)] * PICTURES, raw=True)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Split:
    sizes = [SHAPES[row % 4] for row in range(PICTURES)]
    return make_store(tmp_path_factory.mktemp("encoded") / "store", sizes, raw=False)


def load(
    split: Split, epoch: int = 0, train: bool = True, epochs: int | None = None, seed: int = 0, **config: Any
) -> Batch:
    transform = DetectionTransformConfig(**{"size": 128, **config})
    loader = BatchLoader(split, transform, train, seed=seed, epochs=epochs)
    return next(loader.epoch(EpochPlan(samples=len(split), global_batch=len(split), shuffle=False), epoch))


def targets_of(batch: Batch) -> tuple[Target, ...]:
    assert isinstance(batch.targets, tuple)
    return batch.targets


def check_boxes_are_on_their_objects(split: Split, batch: Batch, zoom: float = 0.0) -> int:
    """Compare the boxes of a batch with the colours that its pixels show; returns how many boxes there were.

    `zoom`: by how much a letterboxed picture is enlarged at most, where objects may be cut and, if only a tenth is
    left, have no box.
    """
    every = {
        (label, row, number): colour(label, row, number)
        for row in range(len(split))
        for number, label in enumerate(split.annotations(row).labels.tolist())
    }
    total = 0
    for image, target in zip(batch.images, targets_of(batch), strict=True):
        pixels = (image * 255).round().to(torch.uint8).numpy().astype(int)
        height, width = pixels.shape[1:]
        shown = {}
        for key, value in every.items():
            mask = (np.abs(pixels - np.array(value)[:, None, None]) <= 2).all(0)
            if mask.any():
                shown[key] = mask
        # Partners may come twice into one mosaic, so objects are told apart by their place: claim pixels box by box.
        unclaimed = {key: mask.copy() for key, mask in shown.items()}
        for (x1, y1, x2, y2), label in zip(target.boxes.tolist(), target.labels.tolist(), strict=True):
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            middle = int((y1 + y2) / 2), int((x1 + x2) / 2)
            owners = [key for key, mask in shown.items() if mask[middle]]
            if not owners and min(x2 - x1, y2 - y1) < 5:
                continue  # all rim: interpolation leaves no pixel of the pure colour
            (owner,) = owners
            assert owner[0] == label
            y, x = slice(max(0, int(y1) - 1), int(y2) + 2), slice(max(0, int(x1) - 1), int(x2) + 2)
            inside = unclaimed[owner][y, x]
            assert inside.any(), "two boxes for one object"
            rows, places = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            found = np.array([x.start + places[0], y.start + rows[0], x.start + places[-1] + 1, y.start + rows[-1] + 1])
            assert np.abs(found - [x1, y1, x2, y2]).max() <= 2, "the box is not where its object is"
            inside[:] = False
            total += 1
        for key, mask in unclaimed.items():
            stored = split.annotations(key[1])
            ratio = zoom * max(batch.images.shape[2:]) / max(stored.height, stored.width)
            tenth = 0.1 * ratio**2 * float(stored.areas[key[2]])
            assert mask.sum() <= max(tenth, 20 if zoom else 0), f"object {key} shows and has no box"
    return total


CASES: dict[str, dict[str, Any]] = {
    "letterbox": {"size": 128},
    "smaller": {"size": 64},
    "flip": {"size": 128, "horizontal_flip": 1.0},
    "moving": {"size": 128, **MOVING},
    "mosaic": {"size": 128, "mosaic": 1.0},
    "everything": {"size": 128, "mosaic": 0.7, **MOVING},
    "keep_ratio": {"resize": "keep_ratio", "size": 100, "longest": 160, "horizontal_flip": 0.5},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["raw", "encoded"])
def test_boxes_are_on_their_objects_and_none_is_lost_or_doubled(
    raw: Split, encoded: Split, kind: str, case: str
) -> None:
    split = raw if kind == "raw" else encoded
    zoom = 1 + CASES[case].get("scale", 0) if "mosaic" in CASES[case] or "scale" in CASES[case] else 0.0
    total = sum(
        check_boxes_are_on_their_objects(split, load(split, epoch=epoch, **CASES[case]), zoom) for epoch in range(3)
    )
    objects = sum(len(split.annotations(row).ids) for row in range(PICTURES))
    assert total > 2 * objects
    if "mosaic" not in CASES[case] and "scale" not in CASES[case]:
        assert total == 3 * objects


def test_the_check_finds_a_lost_a_doubled_and_a_moved_box(raw: Split) -> None:
    batch = load(raw)
    targets = list(targets_of(batch))
    whole = targets[4]

    def changed(boxes: torch.Tensor, labels: torch.Tensor) -> Batch:
        return batch._replace(targets=(*targets[:4], whole._replace(boxes=boxes, labels=labels), *targets[5:]))

    twice = torch.cat([whole.boxes, whole.boxes[:1]]), torch.cat([whole.labels, whole.labels[:1]])
    for boxes, labels in (
        (whole.boxes[1:], whole.labels[1:]),
        twice,
        (whole.boxes + 4, whole.labels),
        (whole.boxes, (whole.labels + 1) % 5),
    ):
        with pytest.raises((AssertionError, ValueError)):
            check_boxes_are_on_their_objects(raw, changed(boxes, labels))


# ---------------------------------------------------------------- a function of (seed, epoch, row)

EVERYTHING = DetectionTransformConfig(size=96, mosaic=0.8, **MOVING, hsv=(0.015, 0.7, 0.4), close_mosaic_epochs=2)


def assert_equal(one: Sequence[Batch], other: Sequence[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.indices, b.indices)
        assert a.global_count == b.global_count
        for x, y in zip(targets_of(a), targets_of(b), strict=True):
            assert torch.equal(x.boxes, y.boxes)
            assert torch.equal(x.labels, y.labels)
            assert x.placement == y.placement
            assert (x.annotations is None) == (y.annotations is None)
            if x.annotations is not None and y.annotations is not None:
                assert all(np.array_equal(p, q) for p, q in zip(x.annotations, y.annotations, strict=True))


@pytest.mark.parametrize("kind", ["raw", "encoded"])
def test_loader_processes_change_no_bit(raw: Split, encoded: Split, kind: str) -> None:
    split = raw if kind == "raw" else encoded
    plan = EpochPlan(samples=PICTURES, global_batch=6, seed=3)
    here = BatchLoader(split, EVERYTHING, True, seed=5, epochs=4)
    there = BatchLoader(split, EVERYTHING, True, seed=5, processes=2, epochs=4)
    for epoch in (0, 3):
        whole = list(here.epoch(plan, epoch))
        assert_equal(whole, list(there.epoch(plan, epoch)))
        assert_equal(whole[1:], list(here.epoch(plan, epoch, start_step=1)))
    every = EvaluationPlan(samples=PICTURES, global_batch=6)
    evaluation = [BatchLoader(split, EVERYTHING, False, processes=processes) for processes in (0, 1)]
    assert_equal(*(list(loader.epoch(every, 0)) for loader in evaluation))


def test_a_picture_does_not_depend_on_its_batch(raw: Split) -> None:
    def by_row(world: int) -> dict[int, tuple[torch.Tensor, Target]]:
        return {
            int(row): (image, target)
            for rank in range(world)
            for batch in BatchLoader(raw, EVERYTHING, True).epoch(
                EpochPlan(samples=PICTURES, global_batch=8, world_size=world, rank=rank), 1
            )
            for row, image, target in zip(batch.indices, batch.images, targets_of(batch), strict=True)
        }

    alone, four = by_row(1), by_row(4)
    assert alone.keys() == four.keys() == set(range(PICTURES))
    for row, (image, target) in alone.items():
        assert torch.equal(image, four[row][0])
        assert torch.equal(target.boxes, four[row][1].boxes)


def test_seed_and_epoch_change_the_mosaic_and_the_last_epochs_have_none(raw: Split) -> None:
    config = {"size": 96, "mosaic": 1.0, "close_mosaic_epochs": 2, "epochs": 5}
    plain = load(raw, size=96)
    images = {epoch: load(raw, epoch=epoch, **config).images for epoch in range(5)}  # type: ignore[arg-type]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], load(raw, seed=1, **config).images)  # type: ignore[arg-type]
    assert not torch.equal(images[2], plain.images)
    assert torch.equal(images[3], plain.images)
    assert torch.equal(images[4], plain.images)
    endless = {**config, "epochs": None}
    assert not torch.equal(load(raw, epoch=4, **endless).images, plain.images)  # type: ignore[arg-type]


def test_transforms_pickle_and_leave_the_global_generators_alone(raw: Split) -> None:
    transform = DetectionBatchTransform(raw, EVERYTHING, True, 0)
    states = torch.get_rng_state(), np.random.get_state()[1]
    images, samples = transform(np.arange(PICTURES), 0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    again, others = pickle.loads(pickle.dumps(transform))(np.arange(PICTURES), 0)
    assert torch.equal(images, again)
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(samples, others, strict=True))


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    "config",
    [{"size": 32}, {"size": 128}, {"size": 640}, {"resize": "keep_ratio", "size": 100, "longest": 133}],
)
def test_evaluation_maps_back_to_the_stored_picture(encoded: Split, config: dict[str, Any]) -> None:
    batch = load(encoded, train=False, **config)
    for row, target in enumerate(targets_of(batch)):
        stored = encoded.annotations(row)
        assert target.annotations is not None
        assert np.array_equal(target.annotations.boxes, stored.boxes)
        assert np.array_equal(target.annotations.category_ids, stored.category_ids)
        corners = torch.from_numpy(stored.boxes.copy())
        corners[:, 2:] += corners[:, :2]
        assert torch.allclose(target.placement.to_stored_image(target.boxes).double(), corners, atol=1e-3)
        assert target.labels.tolist() == stored.labels.tolist()
        assert target.boxes.dtype == torch.float32
        assert target.labels.dtype == torch.int64


def test_a_letterbox_is_centred_and_filled(encoded: Split) -> None:
    batch = load(encoded, train=False, size=192, fill=7)
    assert batch.images.shape == (PICTURES, 3, 192, 192)
    for row, target in enumerate(targets_of(batch)):
        height, width = SHAPES[row % 4]
        shown = torch.full((192, 192), True)
        down, right = round(height * 192 / max(height, width)), round(width * 192 / max(height, width))
        top, left = (192 - down) // 2, (192 - right) // 2
        shown[top : top + down, left : left + right] = False
        filled = (batch.images[row] * 255).round() == 7
        assert filled.all(0)[shown].all()
        assert not filled.all(0)[~shown].any()
        assert (target.placement.left, target.placement.top) == (left, top)
        assert target.placement.scale_x == right / width


def test_keep_ratio_follows_the_shorter_side_up_to_the_longest(encoded: Split) -> None:
    batch = load(encoded, train=False, resize="keep_ratio", size=100, longest=160)
    # 96x96 -> 100x100, 60x120 -> 80x160, 150x80 -> 160x85, 110x70 -> 157x100; sides are multiples of 32
    assert batch.images.shape == (PICTURES, 3, 160, 160)
    sizes = [(100, 100), (80, 160), (160, 85), (157, 100)]
    for row, target in enumerate(targets_of(batch)):
        height, width = sizes[row % 4]
        place = target.placement
        assert (place.left, place.top) == (0, 0)
        assert (round(place.scale_y * place.height, 6), round(place.scale_x * place.width, 6)) == (height, width)
        assert ((batch.images[row, :, height:] * 255).round() == 114).all()
        assert ((batch.images[row, :, :, width:] * 255).round() == 114).all()


def test_normalisation_is_the_last_step(raw: Split) -> None:
    plain, normal = load(raw), load(raw, normalise="imagenet")
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(normal.images, (plain.images - mean) / std, atol=1e-5)


# ---------------------------------------------------------------- colours


def test_jitter_in_a_batch_changes_colours_and_no_box(raw: Split) -> None:
    plain, jittered = load(raw), load(raw, hsv=(0.015, 0.7, 0.4))
    assert not torch.equal(plain.images, jittered.images)
    for one, other in zip(targets_of(plain), targets_of(jittered), strict=True):
        assert torch.equal(one.boxes, other.boxes)
