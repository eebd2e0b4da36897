"""Files from elsewhere that are legal but unusual are read; others are refused with file, place and reason, at once."""

import json
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.sources.python2_pickle import read_plain_pickle
from spikefleet_pipelines.store.reader import Store

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 3072), np.uint8)


def cifar(root: Path, protocol: int = 2, labels: Any = None, first: bytes | None = None) -> Path:
    root.mkdir()
    for part in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        content = {b"labels": [k % 10 for k in range(20)] if labels is None else labels, b"data": PIXELS}
        (root / part).write_bytes(pickle.dumps(content, protocol))
    (root / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % k for k in range(10)]}, protocol))
    if first is not None:
        (root / "data_batch_1").write_bytes(first)
    return root


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("kind", ["int", "numpy.int64", "numpy.uint8", "array"])
def test_plain_data_of_every_protocol_are_read(tmp_path: Path, protocol: int, kind: str) -> None:
    numbers = [k % 10 for k in range(20)]
    labels: Any = {
        "int": numbers,
        "numpy.int64": [np.int64(k) for k in numbers],
        "numpy.uint8": [np.uint8(k) for k in numbers],
        "array": np.array(numbers),
    }[kind]
    store = prepare("cifar10", cifar(tmp_path / "raw", protocol, labels), tmp_path / "store")
    assert store.manifest.class_names == tuple(f"c{k}" for k in range(10))
    test = store.split("test")
    assert test.labels.tolist() == numbers
    assert np.array_equal(test.gather(np.arange(20)).reshape(20, -1), PIXELS)


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (pickle.dumps({b"data": print}, 2), r"refused: the pickle contains __builtin__\.print"),
        (b"\x80\x02Nr\x00\x00\x00\x10.", "names place 268435456 of the memo"),
        (b"\x80\x02\x8b" + struct.pack("<i", 100) + b"\x7f" * 100 + b".", "has more than 16 bytes"),
        (pickle.dumps({b"labels": [True] * 20, b"data": PIXELS}, 2), "label of image 0 is True"),
        (pickle.dumps({b"labels": [1.0] * 20, b"data": PIXELS}, 2), "label of image 0 is 1.0"),
        (b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "truncated or damaged"),
    ],
)
def test_a_hostile_batch_is_a_sentence_at_once(tmp_path: Path, first: bytes, said: str) -> None:
    root = cifar(tmp_path / "raw", first=first)
    start = time.monotonic()
    with pytest.raises(SourceError, match=rf"data_batch_1.*{said}"):
        prepare("cifar10", root, tmp_path / "store")
    assert time.monotonic() - start < 2
    assert not (tmp_path / "store").exists()


def test_a_nest_that_would_unfold_without_end_is_read_flat(tmp_path: Path) -> None:
    nest: dict[str, Any] = {}
    for _ in range(60):
        nest = {"a": nest, "b": nest}
    (tmp_path / "file").write_bytes(pickle.dumps(nest, 2))
    start = time.monotonic()
    assert set(read_plain_pickle(tmp_path / "file")) == {"a", "b"}
    assert time.monotonic() - start < 2


def test_idx_without_pixels_is_refused(tmp_path: Path) -> None:
    for part, count in (("train", 240), ("t10k", 60)):
        labels = bytes(k % 10 for k in range(count))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", count) + labels)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", count, 0, 0))
    with pytest.raises(SourceError, match=r"train-images-idx3-ubyte: the header declares the shape \[240, 0, 0\]"):
        prepare("fashion_mnist", tmp_path, tmp_path / "store")


def coco(folder: Path, **changes: Any) -> dict[str, Path | str]:
    (folder / "images").mkdir()
    PIL.Image.new("RGB", (40, 32)).save(folder / "images" / "p.jpg")
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 10, 8], "area": 80, "iscrowd": 0}
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "p.jpg", "width": 40, "height": 32}],
        "annotations": [{**box, **changes.get("box", {})}],
        "categories": [{"id": 1, "name": "ball", **changes.get("category", {})}],
    }
    content["images"][0] |= changes.get("image", {})
    for name in changes.get("without", ()):
        del content[name]
    (folder / "boxes.json").write_text(json.dumps(content))
    return {"images": folder / "images", "annotations": folder / "boxes.json", "split": "train"}


def test_a_missing_crowd_flag_means_no_crowd(tmp_path: Path) -> None:
    store = prepare("coco", None, tmp_path / "store", **coco(tmp_path, box={"iscrowd": None}))
    assert store.split("train").annotations(0).crowd.tolist() == [False]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"without": ["annotations"]}, "list 'annotations' is missing, so it is not the JSON of a labelled data set"),
        ({"box": {"category_id": 10**30}}, "annotation 1: category_id is 1000"),
        ({"category": {"id": 10**30}}, "id of entry 0 of 'categories' is 1000"),
        ({"category": {"name": "\ud800"}}, "category 1: name is '.ud800', expected a non-empty string of Unicode text"),
        ({"image": {"file_name": "p\ud800.jpg"}}, "image 1: file_name is 'p.ud800.jpg'"),
        ({"image": {"width": 10**30}}, "image 1 .*: height and width are 32 and 1000"),
        ({"box": {"iscrowd": [1]}}, r"iscrowd is \[1\], expected 0 or 1"),
    ],
)
def test_odd_annotations_are_refused_with_field_and_value(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError, match=rf"boxes\.json.*{said}"):
        prepare("coco", None, tmp_path / "store", **coco(tmp_path, **changes))


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": ["\ud800"] * 10},
        {"audit": {"duplicates": 0, "cross_split_duplicates": 0, "images_per_class": {}, "empty_classes": {}}},
        {"image": {"encoding": "raw", "shape": [10**9, 10**9, 10**9]}},
        {"task": "detection", "category_ids": [10**30, *range(9)]},
    ],
)
def test_a_manifest_that_no_writer_writes_is_refused_by_field(tmp_path: Path, change: dict[str, Any]) -> None:
    prepare("digits", None, tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(StoreError, match=r"manifest\.json: field .* is invalid"):
        Store.open(tmp_path / "store")


def export(folder: Path, split: str, used: tuple[int, ...]) -> dict[str, Path | str]:
    """As exports of labelling tools are: a category 0 that only groups the others."""
    images = folder / split
    images.mkdir()
    for number in range(1, 4):
        PIL.Image.new("RGB", (40, 32), (number, 0, 0)).save(images / f"{number}.jpg")
    content = {
        "images": [{"id": k, "file_name": f"{k}.jpg", "width": 40, "height": 32} for k in range(1, 4)],
        "annotations": [
            {"id": k, "image_id": 1 + k % 3, "category_id": one, "bbox": [1, 1, 9, 9]} for k, one in enumerate(used)
        ],
        "categories": [
            {"id": 0, "name": "ball", "supercategory": "none"},
            {"id": 1, "name": "ball", "supercategory": "ball"},
            {"id": 2, "name": "bat", "supercategory": "ball"},
        ],
    }
    (folder / f"{split}.json").write_text(json.dumps(content))
    return {"images": images, "annotations": folder / f"{split}.json", "split": split}


def test_a_category_that_only_groups_is_left_out_and_said(tmp_path: Path) -> None:
    out = tmp_path / "store"
    for split in ("train", "val"):
        manifest = prepare("coco", None, out, **export(tmp_path, split, (1, 2, 1))).manifest
    assert manifest.category_ids == (1, 2)
    assert manifest.class_names == ("ball", "bat")
    assert manifest.audit.unused == {"category that only groups others ('ball', id 0)": 1}


def test_a_category_with_objects_or_nothing_below_it_is_a_class(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="category 1 'ball': its id or its name occurs twice"):
        prepare("coco", None, tmp_path / "store", **export(tmp_path, "train", (0, 1)))
    plain = coco(tmp_path, category={"supercategory": "ball"})  # COCO's person is under person
    assert prepare("coco", None, tmp_path / "plain", **plain).manifest.category_ids == (1,)


def test_bad_images_of_coco_are_skipped_with_their_boxes(tmp_path: Path) -> None:
    how = export(tmp_path, "train", (1, 2, 1))
    (tmp_path / "train" / "1.jpg").unlink()
    (tmp_path / "train" / "2.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SourceError, match=r"1\.jpg is missing: image 1"):
        prepare("coco", None, tmp_path / "store", **how)
    store = prepare("coco", None, tmp_path / "store", skip_bad=True, **how)
    assert store.manifest.splits == {"train": 1}
    assert store.split("train").annotations(0).image_id == 3
    assert [(Path(one.file).name, one.reason[:10]) for one in store.manifest.audit.skipped or ()] == [
        ("1.jpg", "it is miss"), ("2.jpg", "the header"),
    ]  # fmt: skip
    assert store.manifest.audit.boxes is not None
    assert store.manifest.audit.boxes["train"].objects == 1
    both = prepare("coco", None, tmp_path / "store", **export(tmp_path, "val", (1, 2)))
    assert len(both.manifest.audit.skipped or ()) == 2
