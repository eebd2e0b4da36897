"""Parquet, WebDataset and npz: files of other libraries become stores; what is damaged is refused by name."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources import parquet_images, prepare
from spikefleet_pipelines.sources.layouts import source_of
from spikefleet_pipelines.sources.split_names import split_of
from spikefleet_pipelines.store.reader import Store

SHARDS = Path(__file__).parents[1] / "fixtures" / "shards"
"""Written by the libraries `datasets` and `webdataset`; see `write.py` there."""

NAMES = ("ant", "bee", "cat")


def pixels(number: int) -> NDArray[np.uint8]:
    """What `write.py` put into image `number`."""
    found = np.random.default_rng(number).integers(0, 256, (7, 9, 3), np.uint8)
    found[0, 0] = number
    return found


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels(number)).save(stream, format="png")
    return stream.getvalue()


def numbers_of(store: Store, split: str) -> dict[int, int]:
    """The class of each image of a split, whose pixels are compared."""
    samples, found = store.split(split), {}
    for row in range(len(samples)):
        image = samples.image(row).permute(1, 2, 0).numpy()
        number = int(image[0, 0, 0])
        assert np.array_equal(image, pixels(number))
        found[number] = int(samples.labels[row])
    return found


def expected(numbers: range) -> dict[int, int]:
    return {number: number % 3 for number in numbers}


# ---------------------------------------------------------------------------------------- Parquet


def test_parquet_of_the_library_datasets(tmp_path: Path) -> None:
    assert source_of(SHARDS / "labelled") == "parquet"
    store = prepare("parquet", SHARDS / "labelled", tmp_path / "store", parallel=1)
    assert store.manifest.class_names == NAMES
    for split, numbers in (("train", range(12)), ("val", range(12, 15)), ("test", range(15, 18))):
        assert numbers_of(store, split) == expected(numbers)
    boxed = prepare("parquet", SHARDS / "boxed", tmp_path / "boxed", holdout=0, parallel=1)
    assert boxed.manifest.class_names == NAMES
    for row in range(6):
        found = boxed.split("train").annotations(row)
        assert found.boxes.tolist() == [[1, 2, 3 + place, 2.5] for place in range(row % 3)]
        assert found.labels.tolist() == [(row + place) % 3 for place in range(row % 3)]
        assert (found.height, found.width) == (7, 9)


def table(folder: Path, name: str = "train.parquet", **columns: Any) -> Path:
    """A Parquet file by pyarrow, without the metadata of `datasets`."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name, row_group_size=4)
    return folder


def images(numbers: range) -> list[bytes]:
    return [encoded(number) for number in numbers]


def test_parquet_of_other_programs(tmp_path: Path) -> None:
    names = [NAMES[number % 3] for number in range(9)]
    root = table(tmp_path / "names", "part 1.parquet", picture=images(range(9)), kind=names)
    store = prepare("parquet", root, tmp_path / "store", label="kind", holdout=0, parallel=1)
    assert store.manifest.class_names == NAMES
    assert numbers_of(store, "train") == expected(range(9))
    # Objects as a struct of lists, with corners, and a row without any.
    objects = [{"bbox": [[1, 2, 4, 6]], "category": [number % 3]} for number in range(5)] + [None]
    root = table(tmp_path / "boxes", image=images(range(6)), objects=objects)
    store = prepare("parquet", root, tmp_path / "boxed", boxes="xyxy", holdout=0, parallel=1)
    split = store.split("train")
    assert [split.annotations(row).boxes.tolist() for row in (0, 5)] == [[[1, 2, 3, 4]], []]
    # Rows without a class are counted, and what is held out depends on neither the place nor the number of tasks.
    root = table(tmp_path / "gaps", image=images(range(12)), label=[*(n % 3 for n in range(10)), -1, None])
    store = prepare("parquet", root, tmp_path / "gaps store", parallel=1)
    assert store.manifest.audit.unused == {"images without a class (label -1 or none)": 2}
    assert numbers_of(store, "train") | numbers_of(store, "val") == expected(range(10))
    moved = Path(shutil.copytree(root, tmp_path / "elsewhere"))
    assert (
        prepare("parquet", moved, tmp_path / "moved", parallel=1).manifest.content_hash == store.manifest.content_hash
    )


def test_a_parquet_file_that_was_corrected_is_read_anew(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "set"
    for number, read in enumerate((range(3), range(3, 6))):
        table(root, image=images(read), label=[0, 1, 2])
        table(root / ".hidden", image=images(range(9)), label=[0] * 9)
        store = prepare("parquet", root, tmp_path / f"store {number}", holdout=0, parallel=1)
        assert numbers_of(store, "train") == expected(read)


def test_large_row_groups_are_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = table(tmp_path / "root", image=images(range(8)), label=[0, 1, 2, 0, 1, 2, 0, 1])
    monkeypatch.setattr(parquet_images, "MAX_GROUP_BYTES", 800)
    with pytest.raises(SourceError, match=r"row group 0 of column 'image' has [0-9,]+ bytes, .*row_group_size=100"):
        prepare("parquet", root, tmp_path / "store", holdout=0, parallel=1)
    monkeypatch.setattr(parquet_images, "MAX_GROUP_BYTES", 2000)
    assert len(prepare("parquet", root, tmp_path / "store", holdout=0, parallel=1).split("train")) == 8


def test_damaged_parquet_is_refused_by_name(tmp_path: Path) -> None:
    def refused(name: str, message: str, root: Path | None = None, **options: Any) -> None:
        with pytest.raises(SourceError, match=message):
            prepare("parquet", root or tmp_path / name, tmp_path / f"{name} store", parallel=1, **options)
        assert not (tmp_path / f"{name} store").exists()

    cut = Path(shutil.copytree(SHARDS / "labelled", tmp_path / "cut"))
    file = cut / "data" / "train-00000-of-00001.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused("cut", r"train-00000-of-00001.parquet cannot be read as Parquet: ")
    torn = [*images(range(3)), encoded(3)[:40]]
    table(tmp_path / "torn", image=torn, label=[0, 1, 2, 0])
    refused("torn", r"train.parquet, row 3.*; replace the file, or leave the image out with --skip-bad", holdout=0)
    store = prepare("parquet", tmp_path / "torn", tmp_path / "kept", parallel=1, holdout=0, skip_bad=True)
    assert numbers_of(store, "train") == expected(range(3))
    paths = [{"bytes": None, "path": f"photos/{number}.png"} for number in range(3)]
    table(
        tmp_path / "paths",
        image=pa.array(paths, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        label=[0, 1, 2],
    )
    refused("paths", r"row 0: it holds the path 'photos/0.png' and not the image; write", holdout=0)
    refused(
        "labels",
        "none of its columns .image, kind. is known",
        table(tmp_path / "k", image=images(range(3)), kind=[0, 1, 2]),
    )
    refused("label", "option label='x', but its columns are image, kind", tmp_path / "k", label="x")
    refused("pixels", "none of its columns is of images", table(tmp_path / "p", label=[1], width=[2]))
    refused(
        "float",
        "class 0.5 is no index from 0 and no name",
        table(tmp_path / "f", image=images(range(2)), label=[0.5, 1]),
    )
    refused(
        "large",
        "row 1: class 1699999999 is no index from 0 to 999,999; write indices from 0",
        table(tmp_path / "l", image=images(range(2)), label=[0, 1699999999]),
    )
    bad = [[{"bbox": [1.0, 2, -3, 4], "category": 0}]]
    refused(
        "box",
        r"box \[1.0, 2.0, -3.0, 4.0\] is not x y width height",
        table(tmp_path / "b", image=images(range(1)), objects=bad),
    )
    (tmp_path / "none").mkdir()
    refused("none", "raw data of source 'parquet' not found")


# ---------------------------------------------------------------------------------------- WebDataset


def test_shards_of_the_library_webdataset(tmp_path: Path) -> None:
    web = Path(shutil.copytree(SHARDS / "web", tmp_path / "web"))
    assert source_of(web) == "webdataset"
    (web / "classnames.txt").write_text("ant\nbee\ncat\n")
    store = prepare("webdataset", web, tmp_path / "store", parallel=1)
    assert store.manifest.class_names == NAMES
    assert numbers_of(store, "train") == expected(range(12))
    assert numbers_of(store, "val") == expected(range(12, 15))
    grouped = prepare("webdataset", SHARDS / "web", tmp_path / "grouped", group="photo([0-9]+)", parallel=1)
    assert grouped.manifest.class_names == ("0", "1", "2")


def shard(folder: Path, *members: tuple[str, bytes], name: str = "train-0.tar", form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar by the standard library."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / name, "w", format=form) as opened:
        for path, content in members:
            header = tarfile.TarInfo(path)
            header.size = len(content)
            opened.addfile(header, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_fields_of_samples(tmp_path: Path, form: int) -> None:
    long = "a folder with a long name/" * 3
    members = []
    for number in range(6):
        members += [(f"{long}{number}.PNG", encoded(number)), (f"{long}{number}.txt", NAMES[number % 3].encode())]
        members.append((f"{long}{number}.seg.png", b"another field"))
    store = prepare(
        "webdataset", shard(tmp_path / "txt", *members, form=form), tmp_path / "store", holdout=0, parallel=1
    )
    assert store.manifest.class_names == NAMES
    assert numbers_of(store, "train") == expected(range(6))
    assert store.manifest.audit.unused == {"fields .seg.png of samples": 6}
    boxes = [{"bbox": [1, 1, 2, 3], "category": "bee"}, {"bbox": [0, 0, 4, 4], "category": "ant"}]
    content = json.dumps({"objects": boxes, "other": 1}).encode()
    root = shard(tmp_path / "json", ("1.png", encoded(1)), ("1.json", content), form=form)
    found = prepare("webdataset", root, tmp_path / "boxed", holdout=0, parallel=1).split("train").annotations(0)
    assert found.boxes.tolist() == [[1, 1, 2, 3], [0, 0, 4, 4]]
    assert found.labels.tolist() == [1, 0]


def test_damaged_and_hostile_shards_are_refused_by_name(tmp_path: Path) -> None:
    one = (("1.png", encoded(1)), ("1.cls", b"0"))

    def refused(name: str, message: str, *members: tuple[str, bytes]) -> None:
        if members:
            shard(tmp_path / name, *members)
        with pytest.raises(SourceError, match=message):
            prepare("webdataset", tmp_path / name, tmp_path / f"{name} store", holdout=0, parallel=1)
        assert not (tmp_path / f"{name} store").exists()

    refused("no image", "sample 2 has no image .'cls'., expected one of jpg", *one, ("2.cls", b"1"))
    refused("two", "sample 1 has 2 images", *one, ("1.jpg", encoded(1)))
    refused("again", "'1.cls' is there twice", *one, ("1.cls", b"1"))
    refused(
        "apart", "the files of sample '1' are not next to one another", *one, ("2.png", encoded(2)), ("1.txt", b"a")
    )
    refused("word", "sample 1: .cls is 'ant', expected a whole number", ("1.png", encoded(1)), ("1.cls", b"ant"))
    refused("json", "sample 1: .json cannot be read", ("1.png", encoded(1)), ("1.json", b"{"))
    refused(
        "keys", "sample 1: .json holds 'note', expected objects or", ("1.png", encoded(1)), ("1.json", b'{"note": 1}')
    )
    refused("both", "some classes of .* are numbers and some names", *one, ("2.png", encoded(2)), ("2.txt", b"ant"))
    refused("torn", "train-0.tar: 2.png: .*; write the shard anew", *one, ("2.png", encoded(2)[:50]), ("2.cls", b"1"))
    shard(tmp_path / "cut", *one, ("2.png", encoded(2)), ("2.cls", b"0"))
    file = tmp_path / "cut" / "train-0.tar"
    file.write_bytes(file.read_bytes()[: 512 * 5 + 100])
    refused("cut", "train-0.tar.* is cut off|train-0.tar cannot be read as tar")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.tar").write_bytes(b"no tar" * 1000)
    refused("text", "train.tar cannot be read as tar")
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "train.tar.gz", "w:gz"):
        pass
    refused("packed", "train.tar.gz is compressed.*; unpack it to .tar")
    # Links and paths that lead elsewhere are names alone: nothing is extracted, and no link is followed.
    with tarfile.open(tmp_path / "cut" / "train-0.tar", "w") as opened:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(link)
        for path, content in (("../../1.png", encoded(1)), ("../../1.cls", b"0")):
            header = tarfile.TarInfo(path)
            header.size = len(content)
            opened.addfile(header, io.BytesIO(content))
    store = prepare("webdataset", tmp_path / "cut", tmp_path / "hostile", holdout=0, parallel=1)
    assert numbers_of(store, "train") == {1: 0}
    assert store.manifest.audit.unused == {"links, folders and hidden files in shards": 1}
    assert not (tmp_path.parent / "1.png").exists()


def test_names_and_captions_of_shards(tmp_path: Path) -> None:
    members = []
    for number in range(6):
        content = json.dumps({"class": number % 3, "url": "x"}).encode()
        caption = f"photograph {number}".encode()
        members += [(f"{number}.png", encoded(number)), (f"{number}.txt", caption), (f"{number}.json", content)]
    root = shard(tmp_path / "root", ("folder/.hidden", b""), *members)
    with tarfile.open(root / "train-0.tar", "a") as opened:
        folder = tarfile.TarInfo("empty")
        folder.type = tarfile.DIRTYPE
        opened.addfile(folder)
    with pytest.raises(SourceError, match=r"each class has one image, such as 'photograph 0', .*option label=KEY"):
        prepare("webdataset", root, tmp_path / "store", holdout=0, parallel=1)
    (root / "classnames.txt").write_text("ant\n\nbee\ncat\n")
    options: dict[str, Any] = {"label": "class", "holdout": 0, "parallel": 1}
    with pytest.raises(SourceError, match=r"classnames.txt, line 2 is empty"):
        prepare("webdataset", root, tmp_path / "store", **options)
    (root / "classnames.txt").write_text("ant\nbee\ncat\n\n")
    store = prepare("webdataset", root, tmp_path / "store", **options)
    assert numbers_of(store, "train") == expected(range(6))
    assert store.manifest.class_names == NAMES
    shard(root, *members)
    store = prepare("webdataset", root, tmp_path / "without hidden", **options)
    assert store.manifest.audit.unused == {"fields .txt of samples": 6}


def test_a_shard_that_leads_back_to_its_start_is_refused(tmp_path: Path) -> None:
    one = (("1.png", encoded(1)), ("1.cls", b"0"))
    file = shard(tmp_path / "back", *one, (".hidden", b""), form=tarfile.GNU_FORMAT) / "train-0.tar"
    content = bytearray(file.read_bytes())
    start = content.index(b".hidden")
    header = tarfile.TarInfo(".hidden")
    header.size = -start - tarfile.BLOCKSIZE
    content[start : start + tarfile.BLOCKSIZE] = header.tobuf(tarfile.GNU_FORMAT)
    file.write_bytes(content)
    with pytest.raises(SourceError, match=r"'.hidden' has -[0-9,]+ bytes; write the shard anew"):
        prepare("webdataset", tmp_path / "back", tmp_path / "store", holdout=0, parallel=1)


def test_the_split_of_a_shard_is_a_word_of_its_name(tmp_path: Path) -> None:
    for path, split in {
        "train-00000-of-00002.parquet": "train",
        "data/validation-00000-of-00001.parquet": "val",
        "imagenet1k-valid-000012.tar": "val",
        "test/0000.tar": "test",
        "test/train_000.tar": "train",
        "default/training/0.parquet": "train",
        "constraint.tar": None,
        "contest/0.tar": None,
    }.items():
        assert split_of(tmp_path, tmp_path / path) == split, path


# ---------------------------------------------------------------------------------------- npz

COLOUR = np.stack([pixels(number) for number in range(18)])
CLASSES = np.arange(18) % 3


@pytest.mark.parametrize("form", ["keras", "medmnist", "channels first", "files", "one"])
def test_arrays_under_usual_names(tmp_path: Path, form: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    train, val, test = slice(0, 12), slice(12, 15), slice(15, 18)
    if form == "keras":
        arrays = {
            "x_train": COLOUR[:15],
            "y_train": CLASSES[:15, None],
            "x_test": COLOUR[test],
            "y_test": CLASSES[test],
        }
        np.savez_compressed(root / "set.npz", **arrays)
    elif form == "medmnist":
        splits = {"train": train, "val": val, "test": test}
        arrays = {f"{name}_images": COLOUR[part] for name, part in splits.items()}
        arrays |= {f"{name}_labels": CLASSES[part, None].astype(np.uint8) for name, part in splits.items()}
        np.savez(root / "set.npz", **arrays, class_names=np.array(NAMES))
    elif form == "channels first":
        np.savez(root / "set.npz", data=COLOUR.transpose(0, 3, 1, 2), labels=CLASSES)
    elif form == "files":
        for name, part in (("train", train), ("valid", val), ("test", test)):
            np.savez(root / f"{name}.npz", images=COLOUR[part], labels=CLASSES[part])
    else:
        np.savez(root / "set.npz", images=COLOUR, labels=CLASSES)
    assert source_of(root) == "npz"
    store = prepare("npz", root, tmp_path / "store")
    assert store.manifest.class_names == (NAMES if form == "medmnist" else ("0", "1", "2"))
    found = [numbers_of(store, split) for split in store.manifest.splits]
    assert {key: label for part in found for key, label in part.items()} == expected(range(18))
    if form in ("medmnist", "files"):
        assert found == [expected(range(12)), expected(range(12, 15)), expected(range(15, 18))]
    elif form == "keras":
        assert numbers_of(store, "test") == expected(range(15, 18))
        assert len(numbers_of(store, "val")) == 0 or set(numbers_of(store, "val")) <= set(range(15))


def test_grey_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x_train=COLOUR[..., 0], y_train=CLASSES)
    store = prepare("npz", tmp_path, tmp_path / "store", holdout=0)
    assert store.manifest.image_shape == (1, 7, 9)
    assert np.array_equal(store.split("train").gather(np.arange(18))[:, 0], COLOUR[..., 0])


def test_damaged_and_hostile_arrays_are_refused_by_name(tmp_path: Path) -> None:
    def refused(message: str, **arrays: Any) -> None:
        if arrays:
            np.savez(tmp_path / "set.npz", **arrays)
        with pytest.raises(SourceError, match=message):
            prepare("npz", tmp_path, tmp_path / "store")
        assert not (tmp_path / "store").exists()

    good = {"images": COLOUR, "labels": CLASSES}
    refused("array 'images' is float64, expected uint8", **{**good, "images": COLOUR / 255})
    refused(r"array 'images' has shape \[18, 63\]", **{**good, "images": COLOUR[..., 0].reshape(18, 63)})
    refused(
        r"array 'labels' is int64 \[17\], expected a whole number for each of the 18",
        **{**good, "labels": CLASSES[:17]},
    )
    refused("label of image 3 is -1", **{**good, "labels": np.where(np.arange(18) == 3, -1, CLASSES)})
    refused("holds 'a'; name the arrays x_train", a=COLOUR)
    refused("a label is 2, but there are names of 2 classes", **good, class_names=np.array(["a", "b"]))
    refused("have other shapes", x_train=COLOUR, y_train=CLASSES, x_test=COLOUR[:, :5], y_test=CLASSES)
    refused("the .npz files have no training images, only test", x_test=COLOUR, y_test=CLASSES)

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harm",))

    np.savez(tmp_path / "set.npz", allow_pickle=True, images=COLOUR, labels=np.array([Harm()] * 18, object))
    refused("array 'labels' holds Python objects, which only pickle reads")
    (tmp_path / "set.npz").write_bytes(pickle.dumps(Harm()))
    refused("set.npz is damaged or no .npz file")
    assert not (tmp_path / "harm").exists()
    np.savez(tmp_path / "set.npz", **good)
    whole = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "set.npz").write_bytes(whole[: len(whole) // 2])
    refused("set.npz is damaged or no .npz file")
    np.savez_compressed(tmp_path / "set.npz", **good)
    with zipfile.ZipFile(tmp_path / "set.npz") as archive:
        start = archive.infolist()[0].header_offset
    whole = (tmp_path / "set.npz").read_bytes()
    names = sum(int.from_bytes(whole[start + place : start + place + 2], "little") for place in (26, 28))
    for offset in (0, 200):  # of the header of the array, and of its values
        damaged = bytearray(whole)
        first = start + 30 + names + offset
        damaged[first : first + 40] = b"\xff" * 40
        (tmp_path / "set.npz").write_bytes(damaged)
        refused("array 'images' is damaged: ")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 8)})
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
        archive.writestr("labels.npy", header.getvalue())
    refused("would take 70,368,744,177,664 bytes, expected at most")
    np.savez(tmp_path / "other.npz", **good)
    refused("has 2 .npz files .other.npz, set.npz.; choose one with option file=NAME")
