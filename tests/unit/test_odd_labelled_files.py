"""Labelled files that are damaged, joined, enlarged or spelled in another way: refused by name, or read whole."""

from __future__ import annotations

import io
import os
import re
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources import parquet_images, prepare
from spikefleet_pipelines.sources.parquet_images_config import ParquetOptions
from spikefleet_pipelines.store.reader import Store

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "résumé") for form in ("NFC", "NFD"))


def png(number: int, side: int = 8) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)).save(stream, "png")
    return stream.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(source: str, root: Path, tmp_path: Path, **options: object) -> Store:
    return prepare(source, root, tmp_path / f"store {len(list(tmp_path.iterdir()))}", parallel=1, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- shards of tar


def shard(path: Path, numbers: range) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as opened:
        for number in numbers:
            for suffix, content in (("png", png(number)), ("cls", b"0")):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))
    return path


def headers(path: Path) -> list[int]:
    with tarfile.open(path) as opened:
        return [member.offset for member in opened]


def _flip_a_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[headers(path)[4]] ^= 0xFF
    path.write_bytes(content)


def _cut_after_a_member(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: headers(path)[4]])


def _cut_in_a_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: headers(path)[4] + 100])


def _join_by_cat(path: Path) -> None:
    path.write_bytes(path.read_bytes() + shard(path.parent / "other", range(9, 12)).read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_a_header, "is damaged at byte [0-9,]+, where the header of a file should be"),
        (_cut_after_a_member, "is cut off at byte [0-9,]+: .*truncate -s .1024 FILE"),
        (_cut_in_a_header, "is cut off at byte"),
        (_join_by_cat, "more follows the end of the archive at byte .*tar --concatenate"),
    ],
)
def test_a_shard_whose_rest_tar_would_drop_is_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = shard(tmp_path / "set" / "train.tar", range(5))
    assert len(read("webdataset", path.parent, tmp_path, holdout=0).split("train")) == 5
    damage(path)
    with pytest.raises(SourceError, match=f"train.tar.*{message}"):
        read("webdataset", path.parent, tmp_path, holdout=0)


def test_a_shard_without_its_end_is_read_where_the_user_adds_it(tmp_path: Path) -> None:
    path = shard(tmp_path / "set" / "train.tar", range(5))
    (path.parent / "folder.tar").mkdir()
    _cut_after_a_member(path)
    os.truncate(path, path.stat().st_size + 1024)
    assert len(read("webdataset", path.parent, tmp_path, holdout=0).split("train")) == 2


# ---------------------------------------------------------------------------------------- Parquet


def test_an_image_that_a_dictionary_repeats_is_not_unfolded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, image = 3000, png(1, 64)
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([image], pa.binary()))
    path = tmp_path / "train.parquet"
    columns = {"image": repeated, "label": np.arange(rows) % 2}
    pq.write_table(pa.table(columns), path, row_group_size=rows, store_schema=False)
    assert path.stat().st_size < 3 * len(image) < rows * len(image) / 500
    monkeypatch.setattr(parquet_images, "MAX_BATCH_BYTES", 20 * len(image))

    def most_bytes() -> int:
        """Bytes of the batches that are decoded, at most."""
        with pq.ParquetFile(path) as file:
            return max(batch.nbytes for batch in parquet_images._batches(file, 0, "image"))

    assert most_bytes() <= 21 * len(image)
    _, records = parquet_images._read_file(path, ParquetOptions())
    assert [records[row].image.read() == image for row in (0, 1, 40, 2, rows - 1)] == [True] * 5
    assert [record.label for record in records[:3]] == [0, 1, 0]
    assert len(records) == rows
    monkeypatch.setattr(parquet_images, "MAX_BATCH_BYTES", 1 << 40)
    assert most_bytes() > 500 * len(image)  # as it was


def test_rows_before_damage_are_kept_and_the_others_have_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_images, "MAX_BATCH_BYTES", 1)  # a row at a time
    path = write(tmp_path / "set" / "train.parquet", b"")
    table = pa.table({"image": [png(number, 32) for number in range(60)], "label": [0] * 60})
    pq.write_table(table, path, data_page_size=4000, write_batch_size=1, use_dictionary=False)
    assert len(read("parquet", path.parent, tmp_path, holdout=0).split("train")) == 60
    with pq.ParquetFile(path) as file:
        chunk = file.metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start, end = chunk.data_page_offset + chunk.total_compressed_size // 2, chunk.data_page_offset
    content[start : end + chunk.total_compressed_size] = b"\xff" * (end + chunk.total_compressed_size - start)
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"train.parquet, row [0-9]+: .*; replace the file, or leave the image out"):
        read("parquet", path.parent, tmp_path, holdout=0)
    store = read("parquet", path.parent, tmp_path, holdout=0, skip_bad=True)
    skipped = store.manifest.audit.skipped or ()
    assert len(store.split("train")) + len(skipped) == 60
    assert 15 < len(store.split("train")) < 31
    assert not any("it has" in one.reason for one in skipped)


def test_classes_that_take_no_bytes_in_the_file_are_counted_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = pa.array([{"bbox": [[1.0, 1, 2, 2]] * 50, "category": [0] * 50}] * 2)
    pq.write_table(pa.table({"image": [png(1), png(2)], "objects": boxes}), write(tmp_path / "s/train.parquet", b""))
    monkeypatch.setattr(parquet_images, "MAX_GROUP_VALUES", 300)
    with pytest.raises(SourceError, match=r"row group 0 of column 'objects' has 400 values.*row_group_size=100"):
        read("parquet", tmp_path / "s", tmp_path, holdout=0)
    monkeypatch.setattr(parquet_images, "MAX_GROUP_VALUES", 400)
    assert len(read("parquet", tmp_path / "s", tmp_path, holdout=0).split("train")) == 2


def test_text_of_an_image_is_no_class(tmp_path: Path) -> None:
    def table(label: str) -> Path:
        path = tmp_path / label[:2] / "train.parquet"
        write(path, b"")
        pq.write_table(pa.table({"image": [png(1), png(2)], "label": [label, label]}), path)
        return path.parent

    assert read("parquet", table("a" * 1000), tmp_path, holdout=0).manifest.class_names == ("a" * 1000,)
    with pytest.raises(SourceError, match=r"row 0: class 'bbb.* is no index from 0 and no name .text of at most 1,000"):
        read("parquet", table("b" * 1001), tmp_path, holdout=0)


def test_columns_that_are_there_twice_and_folders_of_spark(tmp_path: Path) -> None:
    images = [png(1), png(2)]
    part = write(tmp_path / "set" / "train.parquet" / "part-0.parquet", b"")
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), part)
    assert len(read("parquet", tmp_path / "set", tmp_path, holdout=0).split("train")) == 2
    for twice in (["image", "label", "label"], ["image", "image", "label"]):
        pq.write_table(pa.Table.from_arrays([pa.array(images), pa.array(images), pa.array([0, 1])], names=twice), part)
        with pytest.raises(SourceError, match=f"has several columns '{twice[1]}'; write the file anew"):
            read("parquet", tmp_path / "set", tmp_path, holdout=0)


# ---------------------------------------------------------------------------------------- text, XML and tables


@pytest.mark.parametrize("relative", [False, True])
def test_lists_lead_nowhere_outside_of_the_root(
    relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "set"
    for name in ("elsewhere/y", "set/x"):
        write(tmp_path / f"{name}.png", png(len(name)))
        write(tmp_path / f"{name}.txt", "0 0.5 0.5 0.2 0.2")
    write(root / "data.yaml", "train: list.txt\nnames: [a]\n")
    monkeypatch.chdir(root)
    given = Path() if relative else root
    write(root / "list.txt", "x.png\n")
    assert len(read("yolo", given, tmp_path, holdout=0).split("train")) == 1
    write(root / "list.txt", "x.png\n../elsewhere/y.png\n")
    with pytest.raises(SourceError, match=r"list.txt, line 2: '../elsewhere/y.png' is not found in"):
        read("yolo", given, tmp_path, holdout=0)
    write(root / "data.yaml", "train: ../elsewhere\nnames: [a]\n")
    with pytest.raises(SourceError, match=r"train is '../elsewhere', which is not found in"):
        read("yolo", given, tmp_path, holdout=0)
    write(root / "labels.csv", "path,label\n../elsewhere/y.png,a\n")
    with pytest.raises(SourceError, match=r"line 2: '../elsewhere/y.png' is not found in"):
        read("csv", given, tmp_path, holdout=0)


BOX = (
    "<annotation>{}<object><name>a</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox>"
    "</object></annotation>"
)


def test_names_with_spaces_in_lists_of_voc(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("im 1", "im 2", "3", "im 3 1"):
        write(root / "JPEGImages" / f"{name}.png", png(len(name)))
        write(root / "Annotations" / f"{name}.xml", BOX.format(""))
    write(root / "ImageSets/Main/train.txt", "im 1\n3  1\nim 3 1\n")
    write(root / "ImageSets/Main/val.txt", "im 2 -1\n")
    store = read("voc", root, tmp_path)
    assert {split: len(store.split(split)) for split in ("train", "val")} == {"train": 3, "val": 1}
    write(root / "ImageSets/Main/val.txt", "im 4 -1\n")
    with pytest.raises(SourceError, match=r"val.txt, line 1: image 'im 4' is not in"):
        read("voc", root, tmp_path)


@pytest.mark.parametrize("encoding", ["wingdings", "shift_jis"])
def test_an_encoding_of_xml_that_is_not_read_is_said(encoding: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    write(root / "1.png", png(1))
    write(root / "1.xml", f'<?xml version="1.0" encoding="{encoding}"?>' + BOX.format(""))
    with pytest.raises(SourceError, match=r"1.xml: its encoding cannot be read .*; save the file as UTF-8"):
        read("voc", root, tmp_path, holdout=0)
    write(root / "1.xml", '<?xml version="1.0" encoding="iso-8859-1"?>' + BOX.format(""))
    assert len(read("voc", root, tmp_path, holdout=0).split("train")) == 1


def test_boxes_of_an_image_of_another_size_are_refused(tmp_path: Path) -> None:
    header = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
    root = write(tmp_path / "set" / "labels.csv", header + "1.png,8,8,a,1,2,4,6\n2.png,3,4,a,1,2,4,6\n").parent
    for number in (1, 2):
        write(root / f"{number}.png", png(number))
    store = read("csv", root, tmp_path, holdout=0)  # the second row has the size of its box
    assert [store.split("train").annotations(row).boxes.tolist() for row in (0, 1)] == [[[1, 2, 3, 4]]] * 2
    write(root / "labels.csv", header + "1.png,80,80,a,10,20,40,60\n")
    with pytest.raises(SourceError, match=r"line 2 says 80 x 80 pixels .width, height., but '1.png' has 8 x 8"):
        read("csv", root, tmp_path, holdout=0)


# ---------------------------------------------------------------------------------------- forms of Unicode


def test_a_path_in_another_form_of_unicode_is_found(tmp_path: Path) -> None:
    write(tmp_path / "set" / f"{DECOMPOSED}.png", png(1))
    write(tmp_path / "set" / "b.png", png(2))
    root = write(tmp_path / "set" / "labels.csv", f"{COMPOSED}.png,a\nb.png,b\n").parent
    assert len(read("csv", root, tmp_path, holdout=0).split("train")) == 2
    write(root / "labels.csv", "resume.png,a\nb.png,b\n")
    with pytest.raises(SourceError, match=r"resume.png: No such file"):
        read("csv", root, tmp_path, holdout=0)


def test_two_classes_of_one_text_are_refused(tmp_path: Path) -> None:
    for name in (COMPOSED, DECOMPOSED):
        write(tmp_path / "both" / "train" / name / "1.png", png(len(name)))
    with pytest.raises(StoreError, match=re.escape(f"two forms of Unicode, {DECOMPOSED!a} and {COMPOSED!a};")):
        read("image_folder", tmp_path / "both", tmp_path, holdout=0)
    for name in ("Cat", "cat"):  # letters of both cases are classes of their own
        write(tmp_path / "cases" / "train" / name / "1.png", png(ord(name[0])))
    assert read("image_folder", tmp_path / "cases", tmp_path, holdout=0).manifest.class_names == ("Cat", "cat")
    for split, name in (("train", COMPOSED), ("val", DECOMPOSED)):
        write(tmp_path / "splits" / split / name / "1.png", png(len(split)))
    with pytest.raises(SourceError, match=r"differ .*two forms of Unicode; rename those of one"):
        read("image_folder", tmp_path / "splits", tmp_path)


def test_many_classes_without_an_image_are_not_all_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "set" / "data.npz", images=images, labels=[0, 0, 90_000, 90_000])
    with pytest.raises(StoreError, match=r"class '1', '2', .*'10' and 89,989 more; add images") as refused:
        read("npz", tmp_path / "set", tmp_path, holdout=0)
    assert len(str(refused.value)) < 300


def test_files_of_macos_and_windows_beside_the_labels(tmp_path: Path) -> None:
    for name in ("npz/._data.npz", "yolo/._mine.yaml"):
        write(tmp_path / name, b"\0\5\x16\7Mac OS X")
    np.savez(tmp_path / "npz" / "data.npz", images=np.zeros((4, 8, 8), np.uint8), labels=[0, 0, 1, 1])
    assert len(read("npz", tmp_path / "npz", tmp_path, holdout=0).split("train")) == 4
    np.savez(tmp_path / "npz" / "more.npz", images=np.zeros(1))
    with pytest.raises(SourceError, match=r"has 2 .npz files .data.npz, more.npz.; choose one"):
        read("npz", tmp_path / "npz", tmp_path, holdout=0)
    write(tmp_path / "yolo" / "mine.yaml", "train: images\nnames: [a]\n")
    write(tmp_path / "voc" / "Annotations" / "1.XML", BOX.format(""))
    for name, content in {
        "1.TXT": "0 0.5 0.5 0.5 0.5",
        "2.txt": "0 0.5 0.5 0.25 0.5",
        "3.tXt": "0 0.5 0.5 1 1",
    }.items():
        write(tmp_path / "yolo" / "labels" / name, content)
        write(tmp_path / "yolo" / "images" / f"{name[0]}.png", png(int(name[0])))
    write(tmp_path / "voc" / "images" / "1.png", png(1))
    split = read("yolo", tmp_path / "yolo", tmp_path, holdout=0).split("train")
    assert [split.annotations(row).boxes.tolist() for row in range(3)] == [[[2, 2, 4, 4]], [[3, 2, 2, 4]], []]
    assert len(read("voc", tmp_path / "voc", tmp_path, holdout=0).split("train")) == 1
