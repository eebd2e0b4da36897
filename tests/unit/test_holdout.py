"""How many training images become val: as many as asked for, none with 0, and in a store of its own name and hash."""

import gzip
import pickle
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pydantic import ValidationError

from spikefleet_pipelines.data_config import DataConfig, store_name
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.opening import open_or_prepare
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.sources.contents import hold_out_validation
from spikefleet_pipelines.store.reader import Store

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")

DEFAULTS = {"digits": 0.1, "cifar10": 0.1, "cifar100": 0.1, "fashion_mnist": 1 / 12, "image_folder": None}
"""None: 0.02 of a train folder that has a val or test folder beside it, 0.1 of one that has none."""
DIGITS_HASH = "f438ba1aaf09ffd63df172d3883079cfddd11e88a5f2a26037bb7b25341606a5"


def cifar10(root: Path) -> None:
    """Sixty images a class, in the official files; each has its number in its first pixels."""
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        labels = (np.arange(120) % 10).tolist()
        pixels = np.zeros((120, 3072), np.uint8)
        pixels[:, 0], pixels[:, 1] = number, np.arange(120)
        (root / name).write_bytes(pickle.dumps({"labels": labels, "data": pixels}, protocol=2))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{n}" for n in range(10)]}, protocol=2))


def cifar100(root: Path) -> None:
    for name, count in (("train", 1200), ("test", 200)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 3072)).astype(np.uint8)
        labels = (np.arange(count) % 100).tolist()
        (root / name).write_bytes(pickle.dumps({"fine_labels": labels, "data": pixels}, protocol=2))
    (root / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"fine{n}" for n in range(100)]}, protocol=2))


def fashion_mnist(root: Path) -> None:
    for part, count in (("train", 720), ("t10k", 120)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28)).astype(np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", (np.arange(count) % 10).astype(np.uint8))):
            header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            (root / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes(), 1))


def image_folder(root: Path) -> None:
    for split, count in (("train", 60), ("val", 4)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                PIL.Image.new("RGB", (8, 8), (number, 9, len(label + split))).save(
                    root / split / label / f"{number}.png"
                )


FILES = {"cifar10": cifar10, "cifar100": cifar100, "fashion_mnist": fashion_mnist, "image_folder": image_folder}
COUNTS = {
    "digits": {None: (1295, 143, 359), 0: (1438, 0, 359), 0.5: (719, 719, 359)},
    "cifar10": {None: (540, 60, 120), 0: (600, 0, 120), 0.5: (300, 300, 120)},
    "cifar100": {None: (1100, 100, 200), 0: (1200, 0, 200), 0.5: (600, 600, 200)},
    "fashion_mnist": {None: (660, 60, 120), 0: (720, 0, 120), 0.5: (360, 360, 120)},
    "image_folder": {None: (118, 2, 8), 0: (120, 8, 8), 0.5: (60, 60, 8)},
}


@pytest.fixture
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    source = request.node.callspec.params["source"]
    if source not in FILES:
        return None
    folder = tmp_path / "raw"
    folder.mkdir()
    FILES[source](folder)
    return folder


def images_of(store: Store, split: str) -> list[bytes]:
    rows = store.split(split)
    return sorted(rows.image(row).numpy().tobytes() for row in range(len(rows)))


@pytest.mark.parametrize("source", COUNTS)
def test_as_many_are_held_out_as_asked_for(source: str, root: Path | None, tmp_path: Path) -> None:
    stores: dict[float | None, Store] = {}
    for holdout, (train, val, test) in COUNTS[source].items():
        options: dict[str, Any] = {} if holdout is None else {"holdout": holdout}
        stores[holdout] = prepare(source, root, tmp_path / str(holdout), **options)
        wanted = {"train": train, "val": val, "test": test}
        assert stores[holdout].manifest.splits == {name: count for name, count in wanted.items() if count}
        counts = stores[holdout].manifest.audit.images_per_class
        assert all(max(of_class) - min(of_class) <= 8 for of_class in counts.values())
    usual, all_of_them = stores[None], stores[0]
    # The same training images, and the same test images.
    if source != "image_folder":
        assert images_of(all_of_them, "train") == sorted(images_of(usual, "train") + images_of(usual, "val"))
        assert all_of_them.manifest.original("test") == "test"
        with pytest.raises(StoreError, match=r"has no split 'val', expected one of 'train', 'test'"):
            all_of_them.split("val")
    else:  # the val folder is val again, not a test
        assert all_of_them.manifest.audit.same_as == {"test": "val"}
        assert (all_of_them.manifest.original("test"), usual.manifest.original("test")) == ("val", "test")
        assert all_of_them.manifest.shards["test"] == all_of_them.manifest.shards["val"]
    assert images_of(all_of_them, "test") == images_of(usual, "test")
    assert len({store.manifest.content_hash for store in stores.values()}) == 3


@pytest.mark.parametrize("source", COUNTS)
def test_a_store_tells_its_holdout_where_it_is_not_the_usual(source: str, root: Path | None, tmp_path: Path) -> None:
    """So that stores without the option keep name and hash, and a store of another one is not taken for it."""
    usual = prepare(source, root, tmp_path / "store")
    assert "holdout" not in usual.manifest.options
    assert prepare(source, root, tmp_path / "store", holdout=DEFAULTS[source]).manifest == usual.manifest
    with pytest.raises(StoreError, match=r"already contains a store .* expected .*'holdout': 0\.0"):
        prepare(source, root, tmp_path / "store", holdout=0)
    names = [
        store_name(DataConfig(source=source, root=root, options=options))
        for options in ({}, {"holdout": DEFAULTS[source]}, {"holdout": 0}, {"holdout": 0.5})
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    whole = open_or_prepare(DataConfig(source=source, root=root, options={"holdout": 0}), tmp_path / "stores")
    assert Path(whole.location).name == names[2]
    assert whole.manifest.options["holdout"] == 0


def test_the_hash_of_a_usual_store_is_that_of_earlier_versions(tmp_path: Path) -> None:
    assert prepare("digits", None, tmp_path / "store").manifest.content_hash == DIGITS_HASH


@pytest.mark.parametrize("holdout", [-0.1, 1, 5000, "none"])
def test_other_fractions_are_refused(holdout: object, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="source 'digits': option holdout="):
        prepare("digits", None, tmp_path / "store", holdout=holdout)
    with pytest.raises((ValidationError, SourceError), match="holdout"):
        DataConfig(source="digits", options={"holdout": holdout})  # type: ignore[dict-item]


@pytest.mark.parametrize("source", [name for name in COUNTS if name != "image_folder"])
def test_fewer_training_images_are_a_part_of_more(source: str, root: Path | None, tmp_path: Path) -> None:
    usual = prepare(source, root, tmp_path / "all")
    more = prepare(source, root, tmp_path / "more", train_images=200)
    fewer = prepare(source, root, tmp_path / "fewer", train_images=100)
    assert "train_images" not in usual.manifest.options
    assert (len(fewer.split("train")), len(more.split("train"))) == (100, 200)
    kept = [Counter(images_of(store, "train")) for store in (fewer, more, usual)]
    assert kept[0] < kept[1] < kept[2]
    for split in ("val", "test"):
        assert images_of(fewer, split) == images_of(usual, split)
    counts, everything = (store.manifest.audit.images_per_class["train"] for store in (fewer, usual))
    share = 100 / len(usual.split("train"))
    assert all(abs(found - share * of) < 1 for found, of in zip(counts, everything, strict=True))


def test_one_image_more_takes_none_away() -> None:
    """Shares that are rounded to a sum would: at 432 of these digits."""
    labels = np.repeat(np.arange(10), (129, 132, 128, 132, 130, 131, 130, 129, 124, 130))
    images = np.arange(len(labels), dtype=np.uint16).view(np.uint8).reshape(-1, 1, 1, 2)
    before: set[bytes] = set()
    for count in range(15, len(labels) + 1):
        kept, classes = hold_out_validation(images, labels, 0.0, 0, count)["train"]
        now = {image.tobytes() for image in kept}
        assert before < now
        assert len(now) == count
        assert np.abs(np.bincount(classes) - np.bincount(labels) * count / len(labels)).max() < 1
        before = now


def test_too_many_or_too_few_training_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"train_images is 1,296, but after val 1,295 images are left"):
        prepare("digits", None, tmp_path / "many", train_images=1296)
    with pytest.raises(SourceError, match=r"train_images is 9: classes \[\d\] would keep no image"):
        prepare("digits", None, tmp_path / "few", train_images=9)
