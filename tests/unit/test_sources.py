"""Sources: real formats become stores; what is damaged, missing or hostile is refused by name."""

import gzip
import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.sources.fashion_mnist import read_idx
from spikefleet_pipelines.sources.python2_pickle import ForbiddenPickleError, read_plain_pickle
from spikefleet_pipelines.store.reader import Store

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")

DIGITS = load_digits()
# 600 real images of 28x28 and 32x32x3 in the ranges of the real data sets, with balanced labels.
ENLARGED = np.kron(DIGITS.images[:600] * 15.9, np.ones((4, 4))).astype(np.uint8)
LABELS = np.arange(600) % 10


def snapshot(store: Store) -> tuple[str, dict[str, int]]:
    return store.manifest.content_hash, store.manifest.splits


# ---------------------------------------------------------------- digits


@pytest.mark.parametrize("upsample", [1, 2, 4])
def test_digits(tmp_path: Path, upsample: int) -> None:
    store = prepare("digits", None, tmp_path / "store", upsample=upsample)
    assert store.manifest.image_shape == (1, 8 * upsample, 8 * upsample)
    splits = {name: store.split(name) for name in ("train", "val", "test")}
    assert [len(split) for split in splits.values()] == [1295, 143, 359]
    counts = store.manifest.audit.images_per_class
    assert max(counts["test"]) - min(counts["test"]) <= 2
    assert max(counts["val"]) - min(counts["val"]) <= 1
    whole = np.concatenate([split.gather(np.arange(len(split))) for split in splits.values()])
    assert whole.max() == 255
    if upsample == 1:
        # The three splits hold each original image once, scaled, with its label.
        expected = sorted(
            (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
            for image, label in zip(DIGITS.images, DIGITS.target, strict=True)
        )
        labels = np.concatenate([split.labels for split in splits.values()])
        assert sorted((image.tobytes(), int(label)) for image, label in zip(whole, labels, strict=True)) == expected


def test_preparing_is_deterministic_and_follows_the_seed(tmp_path: Path) -> None:
    one, two, other = (prepare("digits", None, tmp_path / str(n), seed=seed) for n, seed in enumerate((0, 0, 1)))
    assert snapshot(one) == snapshot(two)
    assert one.manifest.content_hash != other.manifest.content_hash
    assert not np.array_equal(one.split("test").gather(np.arange(359)), other.split("test").gather(np.arange(359)))


def test_existing_store_is_reused_refused_or_replaced(tmp_path: Path) -> None:
    out = tmp_path / "store"
    first = prepare("digits", None, out)
    inode = out.stat().st_ino
    assert prepare("digits", None, out).manifest == first.manifest
    assert out.stat().st_ino == inode
    with pytest.raises(
        StoreError, match=r"already contains a store of 'digits' with .*'seed': 0.* expected 'digits' with"
    ):
        prepare("digits", None, out, seed=1)
    assert prepare("digits", None, out, seed=1, overwrite=True).manifest.options["seed"] == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(StoreError, match="full is neither empty nor a store"):
        prepare("digits", None, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_overwriting_heals_a_corrupt_store(tmp_path: Path) -> None:
    first = prepare("digits", None, tmp_path / "store").manifest
    shard = tmp_path / "store" / first.shards["train"][0].file
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=r"train-00000\.arrow is corrupt.* prepare the store again with --overwrite"):
        prepare("digits", None, tmp_path / "store")
    prepare("digits", None, tmp_path / "store", overwrite=True)
    assert Store.open(tmp_path / "store").manifest == first


def test_unwritable_place_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/store cannot be created: "):
        prepare("digits", None, tmp_path / "file" / "store")


def test_root_of_a_built_in_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="built in and reads no files"):
        prepare("digits", tmp_path, tmp_path / "store")


# ---------------------------------------------------------------- Fashion-MNIST


def write_idx(path: Path, values: NDArray[Any], compress: bool) -> None:
    content = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    content += values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


def write_fashion_mnist(root: Path, compress: bool) -> None:
    root.mkdir()
    suffix = ".gz" if compress else ""
    for part, rows in (("train", slice(0, 480)), ("t10k", slice(480, 600))):
        write_idx(root / f"{part}-images-idx3-ubyte{suffix}", ENLARGED[rows, 2:30, 2:30], compress)
        write_idx(root / f"{part}-labels-idx1-ubyte{suffix}", LABELS[rows], compress)


def test_fashion_mnist(tmp_path: Path) -> None:
    stores = []
    for compress in (False, True):
        root = tmp_path / f"raw{compress}"
        write_fashion_mnist(root, compress)
        stores.append(prepare("fashion_mnist", root, tmp_path / f"store{compress}"))
    assert snapshot(stores[0]) == snapshot(stores[1])
    assert stores[0].manifest.splits == {"train": 440, "val": 40, "test": 120}
    assert stores[0].manifest.class_names[9] == "Ankle boot"
    test = stores[0].split("test")
    assert np.array_equal(test.gather(np.arange(120))[:, 0], ENLARGED[480:, 2:30, 2:30])
    assert np.array_equal(test.labels, LABELS[480:])


@pytest.mark.parametrize("compress", [False, True])
def test_truncated_idx_is_refused_with_sizes(tmp_path: Path, compress: bool) -> None:
    write_fashion_mnist(tmp_path / "raw", compress)
    (path,) = (tmp_path / "raw").glob("train-images*")
    path.write_bytes(path.read_bytes()[:-1000])
    sizes = r"\d,?\d+ bytes" if compress else r"found 375,320 values, expected 376,320 for shape \[480, 28, 28\]"
    with pytest.raises(SourceError, match=rf"{path}.*{sizes}"):
        prepare("fashion_mnist", tmp_path / "raw", tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file of unsigned bytes: it starts with nothing"),
        (b"PK\x03\x04", "it starts with 504b0304"),
        (b"\0\0\x08\x03\0\0", "is truncated: the header has 6 bytes, expected 16"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "the header declares"),
        (b"\0\0\x08\x01\0\0\0\x02abc", "found more values"),
    ],
)
def test_damaged_idx_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_idx(tmp_path / "file")


def test_missing_and_mismatched_idx_files_are_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "raw", False)
    labels = tmp_path / "raw" / "t10k-labels-idx1-ubyte"
    write_idx(labels, LABELS[:7], False)
    with pytest.raises(SourceError, match=r"\[120, 28, 28\] and .*t10k-labels-idx1-ubyte \[7\]"):
        prepare("fashion_mnist", tmp_path / "raw", tmp_path / "store")
    labels.unlink()
    with pytest.raises(
        SourceError, match=r"t10k-labels-idx1-ubyte\[\.gz\] is missing.*spikefleet data prepare fashion"
    ):
        prepare("fashion_mnist", tmp_path / "raw", tmp_path / "store")
    write_idx(labels, LABELS[480:] + 5, False)
    with pytest.raises(StoreError, match=r"split 'test': label is 10 .*, expected 0 to 9"):
        prepare("fashion_mnist", tmp_path / "raw", tmp_path / "store")


# ---------------------------------------------------------------- CIFAR


def python2_array(values: NDArray[np.uint8]) -> bytes:
    """An array as Python 2 with numpy 1 pickled it: the opcodes of the official files."""

    def text(content: bytes) -> bytes:
        return (
            b"T" + struct.pack("<I", len(content)) + content
            if len(content) > 255
            else b"U" + bytes([len(content)]) + content
        )

    shape = b"".join(b"M" + struct.pack("<H", size) for size in values.shape)
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01" + shape + b"\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + text(values.tobytes()) + b"tb"
    )


def python2_batch(images: NDArray[np.uint8], labels: list[int]) -> bytes:
    entries = b"U\x04data" + python2_array(images)
    entries += b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + entries + b"u."


def colour(rows: slice) -> NDArray[np.uint8]:
    """[n, 3072], three different channels."""
    grey = ENLARGED[rows].reshape(-1, 1, 1024)
    return np.concatenate([grey, 255 - grey, grey // 2], axis=1).reshape(-1, 3072)


def write_cifar10(root: Path, bytes_keys: bool = False) -> None:
    root.mkdir()
    for number, name in enumerate(
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    ):
        rows = slice(number * 100, number * 100 + 100)
        batch: dict[Any, Any] = {"batch_label": name, "labels": LABELS[rows].tolist(), "data": colour(rows)}
        if bytes_keys:
            batch = {key.encode(): value for key, value in batch.items()}
        (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {"label_names": [f"class{n}" for n in range(10)], "num_vis": 3072}
    (root / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))


def test_cifar10(tmp_path: Path) -> None:
    stores = []
    for number, bytes_keys in enumerate((False, True)):
        root = tmp_path / f"raw{number}"
        write_cifar10(root, bytes_keys)
        stores.append(prepare("cifar10", root, tmp_path / f"store{number}"))
    # As Python 2 wrote them, in the folder that the archive unpacks to.
    root = tmp_path / "raw2" / "cifar-10-batches-py"
    root.parent.mkdir()
    write_cifar10(root)
    (root / "test_batch").write_bytes(python2_batch(colour(slice(500, 600)), LABELS[500:].tolist()))
    stores.append(prepare("cifar10", root.parent, tmp_path / "store2"))
    assert snapshot(stores[0]) == snapshot(stores[1]) == snapshot(stores[2])
    assert stores[0].manifest.splits == {"train": 450, "val": 50, "test": 100}
    assert stores[0].manifest.image_shape == (3, 32, 32)
    assert stores[0].manifest.audit.images_per_class["val"] == (5,) * 10
    test = stores[0].split("test")
    assert np.array_equal(test.gather(np.arange(100)).reshape(100, -1), colour(slice(500, 600)))
    assert np.array_equal(test.labels, LABELS[500:])
    assert test.class_names[3] == "class3"


def test_cifar100(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    for name, count in (("train", 400), ("test", 200)):
        fine = (np.arange(count) % 100).tolist()
        batch = {"fine_labels": fine, "coarse_labels": [0] * count, "data": colour(slice(0, count))}
        (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {"fine_label_names": [f"fine{n}" for n in range(100)], "coarse_label_names": ["x"]}
    (root / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    store = prepare("cifar100", root, tmp_path / "store")
    assert len(store.manifest.class_names) == 100
    assert np.array_equal(store.split("test").labels, np.arange(200) % 100)
    assert store.manifest.audit.cross_split_duplicates == 200
    assert store.manifest.audit.duplicates == 200


class _Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks(marker: Path) -> dict[str, bytes]:
    shell = f"touch {marker}"
    objects = np.array([_Calls(os.system, shell)], dtype=object)
    opcodes = shell.encode()
    return {
        "posix.system": pickle.dumps(_Calls(os.system, shell), protocol=2),
        "eval": pickle.dumps(_Calls(eval, f"open({str(marker)!r}, 'w')"), protocol=2),
        "dtype": pickle.dumps(np.array([None, 1], dtype=object), protocol=2),
        "object array": pickle.dumps({"data": objects}, protocol=2),
        "nested": pickle.dumps({"labels": [0], "data": [{"x": _Calls(os.mkdir, str(marker))}]}, protocol=2),
        "getattr": pickle.dumps(_Calls(getattr, "text", "upper"), protocol=4),
        "numpy.load": b"\x80\x02cnumpy\nload\nU\x04file\x85R.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93\x8c\x04file\x85R.",
        "inst": b"(S'" + opcodes + b"'\nios\nsystem\n.",
        "newobj": b"\x80\x02csubprocess\nPopen\n(U\x02ls" + b"t\x81.",
        "rot13": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
        "persistent": b"\x80\x02U\x01xQ.",
    }


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_hostile_pickle_is_refused_and_does_nothing(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    write_cifar10(tmp_path / "raw")
    (tmp_path / "raw" / "data_batch_1").write_bytes(attacks(marker)[name])
    with pytest.raises(ValueError, match=r"data_batch_1") as caught:
        prepare("cifar10", tmp_path / "raw", tmp_path / "store")
    if name in ("posix.system", "eval", "getattr", "numpy.load"):
        assert name in str(caught.value)
        assert isinstance(caught.value, ForbiddenPickleError)
    assert not marker.exists()
    assert not (tmp_path / "store").exists()


def test_the_attack_works_on_an_unrestricted_reader(tmp_path: Path) -> None:
    pickle.loads(attacks(tmp_path / "marker")["posix.system"])
    assert (tmp_path / "marker").exists()


def test_pickle_cannot_change_what_a_later_one_is_read_with(tmp_path: Path) -> None:
    """BUILD sets attributes on what a name resolves to; the next file must get an untouched one."""
    poison = b"\x80\x02cnumpy\ndtype\nN}U\x0c__defaults__)s\x86b0c_codecs\nencode\nN}U\x08__code__Ns\x86b."
    (tmp_path / "poison").write_bytes(poison)
    with pytest.raises(ValueError, match="poison"):
        read_plain_pickle(tmp_path / "poison")
    (tmp_path / "good").write_bytes(pickle.dumps({"data": colour(slice(0, 3))}, protocol=2))
    assert np.array_equal(read_plain_pickle(tmp_path / "good")["data"], colour(slice(0, 3)))


def test_arrays_of_other_layouts_are_read_right(tmp_path: Path) -> None:
    for values in (np.asfortranarray(colour(slice(0, 5))), np.arange(6).reshape(2, 3), np.arange(3, dtype=np.int32)):
        (tmp_path / "file").write_bytes(pickle.dumps(values, protocol=2))
        found = read_plain_pickle(tmp_path / "file")
        assert np.array_equal(found, values)
        assert found.dtype == values.dtype
    (tmp_path / "file").write_bytes(pickle.dumps(np.arange(3, dtype=">i4"), protocol=2))
    with pytest.raises(ForbiddenPickleError, match="byte order '>'"):
        read_plain_pickle(tmp_path / "file")


def damaged(change: dict[str, Any]) -> bytes:
    return pickle.dumps({"labels": LABELS[:100].tolist(), "data": colour(slice(0, 100)), **change}, protocol=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            damaged({})[:50_000],
            r"data_batch_2 is truncated or damaged: it has 50,000 bytes.* 10,000 images in more than",
        ),
        (b"", r"data_batch_2 is truncated or damaged: it has 0 bytes"),
        (
            damaged({"data": colour(slice(0, 100))[:, :3000]}),
            r"data is uint8 \[100, 3000\], expected uint8 \[n, 3072\]",
        ),
        (damaged({"data": [1, 2]}), r"data is list, expected uint8 \[n, 3072\]"),
        (damaged({"labels": [0] * 99}), "has 100 images and 99 labels"),
        (damaged({"labels": [0] * 99 + [10]}), "label of image 99 is 10, expected an integer from 0 to 9"),
        (damaged({"labels": ["a"] * 100}), "label of image 0 is 'a'"),
        (pickle.dumps({"data": colour(slice(0, 9))}, protocol=2), "has no list 'labels'"),
        (pickle.dumps([1], protocol=2), "data is NoneType"),
    ],
)
def test_damaged_cifar_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_cifar10(tmp_path / "raw")
    (tmp_path / "raw" / "data_batch_2").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        prepare("cifar10", tmp_path / "raw", tmp_path / "store")


def test_missing_cifar_file_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "raw")
    (tmp_path / "raw" / "data_batch_4").unlink()
    with pytest.raises(SourceError, match=r"raw/data_batch_4 is missing.*spikefleet data prepare cifar10 DIR"):
        prepare("cifar10", tmp_path / "raw", tmp_path / "store")


# ---------------------------------------------------------------- image folder


def jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    stream = io.BytesIO()
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    coarse.resize((40 + seed % 9, 30 + seed % 7), PIL.Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    for split, count in (("train", 60), ("val", 5)):
        for label, name in enumerate(("cat", "dog", "eel")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                seed = 1000 * label + number + (500 if split == "val" else 0)
                (root / split / name / f"{number:03d}.JPEG").write_bytes(jpeg(seed))
    (root / "train" / "cat" / ".DS_Store").touch()
    (root / "train" / "notes.txt").touch()
    return root


def test_image_folder_keeps_the_bytes(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    store = prepare("image_folder", folder, tmp_path / "store", progress=lambda *call: calls.append(call))
    assert store.manifest.splits == {"train": 177, "val": 3, "test": 15}
    assert store.manifest.class_names == ("cat", "dog", "eel")
    assert store.manifest.image_shape is None
    assert store.manifest.audit.images_per_class["val"] == (1, 1, 1)
    assert calls[-1] == (195, 195)
    found = {
        (split.encoded_image(row).tobytes(), split.label(row))
        for split in map(store.split, ("train", "val"))
        for row in range(len(split))
    }
    names = store.manifest.class_names
    assert found == {(p.read_bytes(), names.index(p.parent.name)) for p in (folder / "train").glob("*/*.JPEG")}
    assert store.split("test").image(0).shape[0] == 3


def test_class_folders_must_match(folder: Path, tmp_path: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "fox")
    with pytest.raises(SourceError, match=r"differ \(only in train: dog; only in val: fox\)"):
        prepare("image_folder", folder, tmp_path / "store")


@pytest.mark.parametrize("content", [b"", b"not an image", jpeg(1)[:-400]])
def test_broken_image_is_named(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "train" / "dog" / "031.JPEG").write_bytes(content)
    with pytest.raises(SourceError, match=r"train/dog/031\.JPEG: .*; replace or remove the file"):
        prepare("image_folder", folder, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_missing_folders_and_empty_classes_are_named(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "val" / "eel").iterdir():
        file.unlink()
    with pytest.raises(SourceError, match=r"val/eel contains no image \(\.bmp, \.gif"):
        prepare("image_folder", folder, tmp_path / "store")
    with pytest.raises(SourceError, match=r"dog/train is missing.*train/<class>"):
        prepare("image_folder", folder / "train" / "dog", tmp_path / "store")
