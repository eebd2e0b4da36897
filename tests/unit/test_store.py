"""Stores: what is written is read back; what is damaged is refused by name; a half-written store is not there."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest
from numpy.typing import NDArray

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.manifest import ImageFormat, parse_manifest
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.writer import StoreWriter

SHAPE = (3, 4, 5)
RAW = ImageFormat(encoding="raw", shape=SHAPE)


FIRST_VERSION = {
    "schema_version": 1,
    "source": "test",
    "task": "classification",
    "class_names": ["a", "b"],
    "image": {"encoding": "raw", "shape": [1, 8, 8]},
    "options": {"seed": 0},
    "shards": {"train": [{"file": "train-00000.arrow", "rows": 5, "bytes": 100, "sha256": "0" * 64}]},
    "audit": {
        "duplicates": 0,
        "cross_split_duplicates": 0,
        "images_per_class": {"train": [2, 3]},
        "empty_classes": {},
    },
}


def pixels(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), np.uint8)


def labels(count: int) -> NDArray[np.int64]:
    return np.arange(count) % 3


def writer(out: Path, shard_bytes: int = 60 * 10, **changes: object) -> StoreWriter:
    fields = {"source": "test", "class_names": "abc", "image": RAW, "options": {"seed": 0}, "shard_bytes": shard_bytes}
    return StoreWriter(out, **{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A store of 25 training images in three shards and 4 test images in one."""
    path = tmp_path / "store"
    with writer(path) as open_writer:
        open_writer.write_images("train", pixels(25), labels(25))
        open_writer.write_images("test", pixels(4, seed=1), labels(4))
        open_writer.commit()
    return path


def test_reads_back_what_was_written(out: Path) -> None:
    store = Store.open(out)
    assert store.manifest.splits == {"train": 25, "test": 4}
    assert store.manifest.image_shape == SHAPE
    assert store.manifest.class_names == ("a", "b", "c")
    assert len(store.manifest.shards["train"]) == 3
    split = store.split("train")
    assert len(split) == 25
    assert np.array_equal(split.labels, labels(25))
    assert [split.label(row) for row in (0, 10, 24)] == [0, 1, 0]
    rows = np.array([24, 0, 9, 10, 10, 3])
    assert np.array_equal(split.gather(rows), pixels(25)[rows])
    assert np.array_equal(split.image(11).numpy(), pixels(25)[11])
    assert split.gather(np.empty(0, np.int64)).shape == (0, *SHAPE)
    for row in (25, -1):
        with pytest.raises(IndexError, match=f"row {row} is outside"):
            split.image(row)


def test_one_and_many_shards_give_the_same_batches(out: Path, tmp_path: Path) -> None:
    with writer(tmp_path / "one", shard_bytes=1 << 20) as open_writer:
        open_writer.write_images("train", pixels(25), labels(25))
        open_writer.commit()
    one, many = Store.open(tmp_path / "one").split("train"), Store.open(out).split("train")
    rows = np.random.default_rng(2).permutation(25)
    assert np.array_equal(one.gather(rows), many.gather(rows))


def test_single_shard_is_mapped_not_read(tmp_path: Path) -> None:
    with writer(tmp_path / "one", shard_bytes=1 << 26) as open_writer:
        open_writer.write_images("train", pixels(200_000), labels(200_000))
        open_writer.commit()
    before = pa.total_allocated_bytes()
    split = Store.open(tmp_path / "one", verify=False).split("train")
    split.gather(np.array([5]))
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_split_pickles_by_its_paths(out: Path) -> None:
    split = Store.open(out).split("train")
    text = pickle.dumps(split)
    assert len(text) < 5000
    again = pickle.loads(text)
    assert np.array_equal(again.gather(np.arange(25)), split.gather(np.arange(25)))


def test_content_hash_follows_the_content(out: Path, tmp_path: Path) -> None:
    def written(name: str, images: NDArray[np.uint8]) -> str:
        with writer(tmp_path / name) as open_writer:
            open_writer.write_images("train", images, labels(25))
            return open_writer.commit().content_hash

    changed = pixels(25)
    changed[24, 0, 0, 0] ^= 1
    assert written("a", pixels(25)) == written("b", pixels(25)) != written("c", changed)


def test_stores_of_the_first_version_keep_their_text_and_their_hash(tmp_path: Path) -> None:
    """What detection added is absent from a classification manifest: this text was written before there was any."""
    text = json.dumps(FIRST_VERSION, indent=2) + "\n"
    manifest = parse_manifest(text.encode(), "here")
    assert manifest.to_json() == text
    assert manifest.content_hash == "e7db78a25f3ae6b9f577b226fea65090c74e41720acce8e97b380b147e550c9d"
    assert prepare("digits", None, tmp_path / "store").manifest.content_hash == (
        "f438ba1aaf09ffd63df172d3883079cfddd11e88a5f2a26037bb7b25341606a5"
    )


def test_audit_counts_duplicates_and_classes(tmp_path: Path) -> None:
    images = pixels(12)
    images[5] = images[2]
    with writer(tmp_path / "store") as open_writer:
        open_writer.write_images("train", images, labels(12))
        open_writer.write_images("test", images[[2, 7]], np.array([2, 1]))
        audit = open_writer.commit().audit
    assert audit.duplicates == 3
    assert audit.cross_split_duplicates == 2
    assert audit.images_per_class == {"train": (4, 4, 4), "test": (0, 1, 1)}
    assert audit.empty_classes == {"test": ("a",)}


def test_label_out_of_range_and_empty_class_are_refused(tmp_path: Path) -> None:
    with (
        writer(tmp_path / "store") as open_writer,
        pytest.raises(StoreError, match=r"split 'train': label is 3 \(image 1 .*, expected 0 to 2"),
    ):
        open_writer.write_images("train", pixels(3), np.array([0, 3, 1]))
    with writer(tmp_path / "store") as open_writer:
        open_writer.write_images("train", pixels(3), np.array([0, 0, 1]))
        with pytest.raises(StoreError, match="no training image of class 'c'"):
            open_writer.commit()
    assert not any(tmp_path.iterdir())


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    with (
        writer(tmp_path / "store") as open_writer,
        pytest.raises(StoreError, match=r"\[2, 3, 5, 4\] with 3 labels, expected"),
    ):
        open_writer.write_images("train", np.zeros((2, 3, 5, 4), np.uint8), labels(3))


def test_nothing_appears_before_commit_or_after_failure(tmp_path: Path) -> None:
    with writer(tmp_path / "store") as open_writer:
        open_writer.write_images("train", pixels(3), labels(3))
        assert not Store.is_store(tmp_path / "store")
    assert not any(tmp_path.iterdir())
    with pytest.raises(StoreError, match="store is not a store: there is no such directory"):
        Store.open(tmp_path / "store")


def test_second_writer_of_the_same_store_keeps_the_first(tmp_path: Path) -> None:
    with writer(tmp_path / "store") as one, writer(tmp_path / "store") as two:
        for open_writer in (one, two):
            open_writer.write_images("train", pixels(6), labels(6))
        one.commit()
        inode = (tmp_path / "store").stat().st_ino
        two.commit()
    assert (tmp_path / "store").stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_another_store_is_replaced_only_when_asked(out: Path) -> None:
    for overwrite in (False, True):
        with writer(out, overwrite=overwrite) as open_writer:
            open_writer.write_images("train", pixels(6), labels(6))
            if overwrite:
                open_writer.commit()
            else:
                with pytest.raises(StoreError, match="already contains another store"):
                    open_writer.commit()
        assert Store.open(out).manifest.splits["train"] == (6 if overwrite else 25)
    assert [path.name for path in out.parent.iterdir()] == ["store"]


def flip_a_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def test_flipped_bit_is_found_with_both_hashes(out: Path) -> None:
    expected = Store.open(out).manifest.shards["train"][1].sha256
    flip_a_bit(out / "train-00001.arrow")
    with pytest.raises(
        StoreError, match=rf"train-00001\.arrow is corrupt: SHA-256 is [0-9a-f]{{64}}, expected {expected}"
    ):
        Store.open(out)
    Store.open(out, verify=False)  # the check is what finds it


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda shard: shard.write_bytes(shard.read_bytes()[:-7]),
            r"train-00000\.arrow is corrupt: it has .* bytes, expected",
        ),
        (lambda shard: shard.unlink(), r"train-00000\.arrow cannot be read: No such file"),
    ],
)
def test_truncated_or_missing_shard_is_found_without_hashing(
    out: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(out / "train-00000.arrow")
    with pytest.raises(StoreError, match=message):
        Store.open(out, verify=False)


def test_swapped_shards_are_found(out: Path) -> None:
    shutil.copy(out / "train-00001.arrow", out / "train-00000.arrow")
    with pytest.raises(StoreError, match=r"train-00000\.arrow is corrupt"):
        Store.open(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2, expected 1"),
        ({"task": "detection"}, "field 'category_ids' is invalid: .*a detection store needs category ids"),
        ({"task": "segmentation"}, "field 'task' is invalid"),
        ({"category_ids": [1, 2, 3]}, "field 'category_ids' is invalid: .*a classification store must not have"),
        ({"class_names": []}, "field 'class_names' is invalid"),
        ({"unknown": 1}, "field 'unknown' is invalid"),
        ({"class_names": ["a", "b"]}, r"train-00000.arrow row 2: label is 2, expected 0 to 1"),
        (
            {"image": {"encoding": "raw", "shape": [3, 4, 4]}},
            r"expected 10 rows of \(image: fixed_size_binary\[48\]",
        ),
        ({"image": {"encoding": "encoded", "shape": None}}, r"expected 10 rows of \(image: large_binary"),
    ],
)
def test_wrong_manifest_is_refused_by_field(out: Path, change: dict[str, object], message: str) -> None:
    manifest = out / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(StoreError, match=message):
        Store.open(out).split("train")


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", ".hidden", "a/b", ""])
def test_manifest_cannot_point_outside_its_store(out: Path, name: str) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"]["train"][0]["file"] = name
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"field 'shards\.train\.0\.file' is invalid"):
        Store.open(out)


def test_manifest_that_is_not_json_is_refused(out: Path) -> None:
    (out / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(StoreError, match=r"manifest\.json is not JSON"):
        Store.open(out)


def test_unknown_split_is_refused(out: Path) -> None:
    with pytest.raises(StoreError, match="no split 'val', expected one of 'train', 'test'"):
        Store.open(out).split("val")


def test_file_uri_is_read_in_place(out: Path, tmp_path: Path) -> None:
    spaced = out.rename(tmp_path / "a store")
    store = Store.open(spaced.as_uri(), cache_dir=tmp_path / "cache")
    assert np.array_equal(store.split("train").gather(np.arange(25)), pixels(25))
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def remote(out: Path) -> pyarrow.fs.SubTreeFileSystem:
    """The store's parent directory as a file system that is not the local one."""
    return pyarrow.fs.SubTreeFileSystem(str(out.parent), pyarrow.fs.LocalFileSystem())


def test_remote_shards_are_fetched_once(remote: pyarrow.fs.SubTreeFileSystem, out: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store = Store.open("store", cache, filesystem=remote)
    assert np.array_equal(store.split("train").gather(np.arange(25)), pixels(25))
    names = {shard.sha256 for shards in store.manifest.shards.values() for shard in shards}
    assert {path.name for path in cache.iterdir()} == {f"{name}.arrow" for name in names}
    for shard in out.glob("*.arrow"):
        shard.unlink()
    again = Store.open("store", cache, filesystem=remote)
    assert np.array_equal(again.split("train").gather(np.arange(25)), pixels(25))


def test_damaged_cache_heals_and_damaged_remote_is_refused(
    remote: pyarrow.fs.SubTreeFileSystem, out: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shard = Store.open("store", cache, filesystem=remote).manifest.shards["train"][0]
    flip_a_bit(cache / f"{shard.sha256}.arrow")
    store = Store.open("store", cache, filesystem=remote)
    assert np.array_equal(store.split("train").gather(np.arange(25)), pixels(25))
    flip_a_bit(out / shard.file)
    Store.open("store", cache, filesystem=remote)  # the cache holds the right one
    with pytest.raises(StoreError, match=rf"store/{shard.file} is corrupt: .*, expected {shard.sha256}"):
        Store.open("store", tmp_path / "other", filesystem=remote)
    assert not list((tmp_path / "other").glob("*.part"))


def test_missing_remote_store_and_shard_are_refused(
    remote: pyarrow.fs.SubTreeFileSystem, out: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="nowhere is not a store"):
        Store.open("nowhere", tmp_path / "cache", filesystem=remote)
    (out / "test-00000.arrow").unlink()
    with pytest.raises(StoreError, match=r"store/test-00000\.arrow cannot be fetched"):
        Store.open("store", tmp_path / "cache", filesystem=remote)
    with pytest.raises(StoreError, match=r"store 'nosuch://bucket/store' cannot be opened"):
        Store.open("nosuch://bucket/store")
