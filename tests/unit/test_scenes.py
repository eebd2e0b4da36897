"""Scenes: real digits with boxes tight around them, the same for a seed, and no digit in two splits."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.opening import open_or_prepare
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions
from spikefleet_pipelines.sources.scenes import CATEGORY_IDS, enlarge, read_scenes
from spikefleet_pipelines.sources.scenes_config import ScenesOptions
from spikefleet_pipelines.store.reader import Store

SMALL = {"train": 200, "val": 20, "test": 20}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return prepare("scenes", None, tmp_path_factory.mktemp("scenes") / "store", **SMALL)


def test_what_a_store_of_scenes_holds(store: Store) -> None:
    manifest = store.manifest
    assert manifest.task == "detection"
    assert manifest.splits == SMALL
    assert manifest.image_shape == (3, 96, 96)
    assert manifest.category_ids == CATEGORY_IDS
    assert set(CATEGORY_IDS).isdisjoint(range(10))
    assert manifest.class_names == tuple("0123456789")
    assert manifest.audit.duplicates == 0
    assert manifest.audit.boxes is not None
    train = manifest.audit.boxes["train"]
    assert (train.crowds, train.no_area, train.beyond_border, train.outside) == (0, 0, 0, 0)
    assert min(train.objects_per_class) > 20
    split = store.split("train")
    pictures = [split.annotations(row) for row in range(len(split))]
    counts = Counter(len(picture.ids) for picture in pictures)
    assert set(counts) == {0, 1, 2, 3, 4, 5}
    assert 2 <= counts[0] <= 25
    sides = np.concatenate([picture.boxes[:, 3] for picture in pictures])
    assert sides.min() < 18 < 40 < sides.max() <= 48
    every = [store.split(name) for name in SMALL]
    ids = [number for part in every for row in range(len(part)) for number in part.annotations(row).ids.tolist()]
    images = [part.annotations(row).image_id for part in every for row in range(len(part))]
    assert len(set(ids)) == len(ids)
    assert len(set(images)) == len(images)


def test_boxes_are_tight_around_bright_strokes(store: Store) -> None:
    """On the rim of a box there is the digit, and around it the dark background."""
    split = store.split("train")
    inside, outside = [], []
    for row in range(len(split)):
        brightness = split.image(row).numpy().max(0).astype(int)
        for x, y, width, height in split.annotations(row).boxes.astype(int).tolist():
            box = brightness[y : y + height, x : x + width]
            inside += [box[0].max(), box[-1].max(), box[:, 0].max(), box[:, -1].max()]
            if y >= 2:
                outside.append(np.median(brightness[y - 2, x : x + width]))
    assert np.mean(inside) > np.mean(outside) + 60


def test_labels_are_those_of_the_digits(tmp_path: Path) -> None:
    """A nearest neighbour among the split's own digits recognises what is in the boxes: labels go with pixels."""
    contents = read_scenes(Path(), ScenesOptions(objects=1), 0)
    images, labels = contents.digits["val"]
    right = total = 0
    for number in range(60):
        picture, objects = contents.scene("val", number)
        for (x, y, width, height), digit in zip(objects.boxes, objects.digits, strict=True):
            grey = picture[:, y : y + height, x : x + width].max(0).astype(float)
            distances = []
            for image in images[:, 0]:
                side = 24
                opacity = enlarge(image, side)
                rows, columns = (np.flatnonzero((opacity >= 0.3).any(axis)) for axis in (1, 0))
                tight = opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                down = np.linspace(0, tight.shape[0] - 1, 10).round().astype(int)
                right_ = np.linspace(0, tight.shape[1] - 1, 10).round().astype(int)
                of_scene = grey[np.linspace(0, height - 1, 10).round().astype(int)]
                of_scene = of_scene[:, np.linspace(0, width - 1, 10).round().astype(int)]
                distances.append(-np.corrcoef(tight[down][:, right_].ravel(), of_scene.ravel())[0, 1])
            right += int(labels[int(np.argmin(distances))]) == digit
            total += 1
    assert total > 45
    assert right / total > 0.85


def test_objects_hardly_overlap(store: Store) -> None:
    split = store.split("train")
    for row in range(len(split)):
        boxes = split.annotations(row).boxes
        for i in range(len(boxes)):
            for j in range(i):
                start = np.maximum(boxes[i, :2], boxes[j, :2])
                end = np.minimum(boxes[i, :2] + boxes[i, 2:], boxes[j, :2] + boxes[j, 2:])
                common = np.prod(np.clip(end - start, 0, None))
                assert common <= 0.2 * min(np.prod(boxes[i, 2:]), np.prod(boxes[j, 2:])) + 1e-9


def test_splits_share_no_digit() -> None:
    contents = read_scenes(Path(), ScenesOptions(), 3)
    expected = read_digits(None, DigitsOptions(), 3).splits
    for name, (images, labels) in contents.digits.items():
        assert np.array_equal(images, expected[name][0])
        assert np.array_equal(labels, expected[name][1])
    counts = {name: len(labels) for name, (_, labels) in contents.digits.items()}
    assert counts == {"train": 1295, "val": 143, "test": 359}


def test_scenes_follow_the_seed_and_not_their_number(store: Store, tmp_path: Path) -> None:
    again = prepare("scenes", None, tmp_path / "again", **SMALL)
    assert again.manifest.content_hash == store.manifest.content_hash
    other = prepare("scenes", None, tmp_path / "other", seed=1, **SMALL)
    assert not np.array_equal(other.split("val").gather(np.arange(20)), store.split("val").gather(np.arange(20)))
    fewer = prepare("scenes", None, tmp_path / "fewer", train=30, val=5, test=5)
    assert np.array_equal(fewer.split("train").gather(np.arange(30)), store.split("train").gather(np.arange(30)))


def test_options_are_checked_and_reach_the_store(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    options = {"size": 64, "objects": 2, "train": 70, "val": 3, "test": 3}
    store = prepare("scenes", None, tmp_path / "store", progress=lambda *call: calls.append(call), **options)
    assert store.manifest.image_shape == (3, 64, 64)
    assert calls == [(64, 76), (76, 76)]
    for wrong, message in (({"size": 63}, "size"), ({"size": 68}, "multiple of 8"), ({"objects": 0}, "objects")):
        with pytest.raises(SourceError, match=message):
            prepare("scenes", None, tmp_path / "other", **wrong)
    with pytest.raises(SourceError, match="built in and reads no files; remove root"):
        prepare("scenes", tmp_path, tmp_path / "other")


def test_a_config_prepares_scenes(tmp_path: Path) -> None:
    config = DataConfig(source="scenes", options={"train": 12, "val": 3, "test": 3}, transform={"kind": "detection"})  # type: ignore[arg-type]
    assert config.transform.kind == "detection"
    assert open_or_prepare(config, tmp_path).manifest.splits == {"train": 12, "val": 3, "test": 3}
