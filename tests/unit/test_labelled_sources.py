"""YOLO, Pascal VOC, tables and exports: what hand-written files say is in the store, image by image and box by box."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.sources.layouts import source_of
from spikefleet_pipelines.store.reader import Split, Store
from support.labelled_files import CLASSES, boxes_of, csv_lines, picture, size_of, voc_xml, yolo_lines

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")

YAML = """path: ../datasets/mine
train: ../train/images
val: ../valid/images
test:

nc: 3
names: [cat, no, 'small dog']
"""


def roboflow_yolo(root: Path) -> dict[str, list[int]]:
    """`train/images`, `train/labels`, `valid/...` and a data.yaml whose paths are of another directory."""
    for split, numbers in (("train", range(8)), ("valid", range(8, 12))):
        for number in numbers:
            picture(root / split / "images" / f"{number}.png", number, size_of(number))
            labels = root / split / "labels" / f"{number}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            if boxes_of(number):  # an image without objects has no file of labels
                labels.write_text(yolo_lines(number))
    (root / "data.yaml").write_text(YAML)
    return {"train": list(range(8)), "val": [10, 11, 8, 9]}  # in the order of their names


def ultralytics(root: Path) -> dict[str, list[int]]:
    """`images/train`, `labels/train`, a list of images for val, and classes as a mapping."""
    for number in range(10):
        picture(root / "images" / "train" / f"{number}.jpg", number, size_of(number))
        labels = root / "labels" / "train" / f"{number}.txt"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text("﻿" + yolo_lines(number).replace("\n", "\r\n"))
    (root / "val.txt").write_text("./images/train/8.jpg\nimages/train/9.jpg\n")
    (root / "only.txt").write_text("\n".join(f"data/images/train/{number}.jpg" for number in range(8)))
    names = "".join(f"  {label}: {name}\n" for label, name in enumerate(CLASSES))
    (root / "mine.yaml").write_text(f"train: only.txt\nval: [val.txt]\nnames:\n{names}download: rm -rf /\n")
    return {"train": list(range(8)), "val": [8, 9]}


def roboflow_voc(root: Path) -> dict[str, list[int]]:
    """Images and XML files in the folders train, valid and test."""
    splits = {"train": list(range(8)), "valid": [8, 9], "test": [10, 11]}
    for split, numbers in splits.items():
        for number in numbers:
            picture(root / split / f"{number}.jpg", number, size_of(number))
            (root / split / f"{number}.xml").write_text(voc_xml(number, f"{number}.jpg"))
    return {"train": splits["train"], "val": splits["valid"], "test": splits["test"]}


def devkit(root: Path) -> dict[str, list[int]]:
    """The VOCdevkit, with lists of images."""
    year = root / "VOCdevkit" / "VOC2007"
    for number in range(10):
        picture(year / "JPEGImages" / f"{number:06d}.jpg", number, size_of(number))
        (year / "Annotations").mkdir(exist_ok=True)
        (year / "Annotations" / f"{number:06d}.xml").write_text(voc_xml(number, "x.jpg"))
    lists = year / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("".join(f"{number:06d}\n" for number in range(7)))
    (lists / "val.txt").write_text("".join(f"{number:06d}  1\n" for number in (7, 8)))
    (lists / "test.txt").write_text("000009\n")
    return {"train": list(range(7)), "val": [7, 8], "test": [9]}


def retinanet(root: Path) -> dict[str, list[int]]:
    """Tables without a header, one for each split."""
    splits = {"train": list(range(7)), "val": [7, 8, 9]}
    for split, numbers in splits.items():
        for number in numbers:
            picture(root / "images" / f"{number}.png", number, size_of(number))
        rows = [line for number in numbers for line in csv_lines(number, f"images/{number}.png")]
        (root / f"{split}.csv").write_text("\n".join(rows))
    return splits


def with_header(root: Path) -> dict[str, list[int]]:
    """One table with a header, semicolons, a column of splits, and columns that are not used."""
    rows = ["filename;width;height;Class;xmin;ymin;xmax;ymax;split"]
    for number in range(8):
        picture(root / f"{number}.png", number, size_of(number))
        of_image = csv_lines(number, f"{number}.png")
        for path, x1, y1, x2, y2, label in (line.split(",") for line in of_image):
            rows.append(
                ";".join([path, *map(str, size_of(number)), label, x1, y1, x2, y2, "Valid" if number > 5 else "train"])
            )
    (root / "labels.csv").write_text("\r\n".join(rows) + "\r\n")
    return {"train": list(range(6)), "val": [6, 7]}


def roboflow_coco(root: Path) -> dict[str, list[int]]:
    """A JSON in each folder, and a category that only groups."""
    splits = {"train": list(range(8)), "valid": [8, 9], "test": [10, 11]}
    for split, numbers in splits.items():
        content: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        content["categories"] = [{"id": 0, "name": "pets", "supercategory": "none"}]
        content["categories"] += [{"id": k, "name": name, "supercategory": "pets"} for k, name in enumerate(CLASSES, 1)]
        for number in numbers:
            picture(root / split / f"{number}.jpg", number, size_of(number))
            width, height = size_of(number)
            content["images"].append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
            for name, *box in boxes_of(number):
                entry = {"id": len(content["annotations"]), "image_id": number, "bbox": box, "category_id": 1}
                content["annotations"].append({**entry, "category_id": 1 + CLASSES.index(name)})
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return {"train": splits["train"], "val": splits["valid"], "test": splits["test"]}


LAYOUTS: dict[str, tuple[str, Callable[[Path], dict[str, list[int]]]]] = {
    layout.__name__: (source, layout)
    for source, layout in (
        ("yolo", roboflow_yolo),
        ("yolo", ultralytics),
        ("voc", roboflow_voc),
        ("voc", devkit),
        ("csv", retinanet),
        ("csv", with_header),
        ("coco", roboflow_coco),
    )
}


def found_in(split: Split) -> list[tuple[tuple[int, int], list[tuple[str, list[float]]]]]:
    """Size and objects of each image."""
    rows = [split.annotations(row) for row in range(len(split))]
    return [
        (
            (one.width, one.height),
            sorted((split.class_names[k], box) for k, box in zip(one.labels, one.boxes.round(4).tolist(), strict=True)),
        )
        for one in rows
    ]


def known(numbers: list[int]) -> list[tuple[tuple[int, int], list[tuple[str, list[float]]]]]:
    return [(size_of(n), sorted((name, [float(v) for v in box]) for name, *box in boxes_of(n))) for n in numbers]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_known_and_its_boxes_are_in_the_store(layout: str, tmp_path: Path) -> None:
    source, write = LAYOUTS[layout]
    root = tmp_path / "my data"
    root.mkdir()
    splits = write(root)
    assert source_of(root) == source
    store = prepare(source, root, tmp_path / "store")
    assert (store.manifest.name, store.manifest.class_names) == ("my_data", CLASSES)
    for split, numbers in splits.items():
        assert found_in(store.split(split)) == known(numbers)
    assert store.manifest.original("test") == ("test" if "test" in splits else "val")
    assert all(store.split("train").annotations(0).ids > 0) or source == "coco"


def test_sizes_are_of_the_image_as_it_is_seen(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for number, (suffix, how) in enumerate((("jpg", {"exif": exif}), ("png", {"exif": exif}), ("tif", {"exif": exif}))):
        PIL.Image.new("RGB", (40, 20), (9 * number, 0, 0)).save(tmp_path / f"{number}.{suffix}", **how)
        (tmp_path / f"{number}.txt").write_text("0 0.5 0.25 0.5 0.5\n")
    (tmp_path / "classes.txt").write_text("cat\n\n")
    store = prepare("yolo", tmp_path, tmp_path / "store", holdout=0)
    assert found_in(store.split("train")) == [((20, 40), [("cat", [5.0, 0.0, 10.0, 20.0])])] * 3
    assert set(store.manifest.splits) == {"train"}


def test_keypoints_after_a_box_are_left_out(tmp_path: Path) -> None:
    ultralytics(tmp_path)
    label = tmp_path / "labels/train/0.txt"
    label.write_text("0 0.5 0.5 0.5 0.5 0.1 0.2 2 0.3 0.4 0\n")
    yaml = (tmp_path / "mine.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(yaml + "kpt_shape: [2, 3]\n")
    store = prepare("yolo", tmp_path, tmp_path / "store")
    assert found_in(store.split("train"))[0] == ((40, 20), [("cat", [10.0, 5.0, 20.0, 10.0])])


def test_voc_objects_that_are_difficult_and_pixels_from_zero(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / "images" / f"{number}.jpg", number, size_of(number))
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / "Annotations" / f"{number}.xml").write_text(voc_xml(number, "", first=0))
    picture(tmp_path / "images" / "more.jpg", 9, (8, 8))
    store = prepare("voc", tmp_path, tmp_path / "store", first_pixel=0, difficult=False, holdout=0)
    assert [len(objects) for _, objects in found_in(store.split("train"))] == [1, 1, 1, 1]
    assert found_in(store.split("train"))[0][1] == [(name, [float(v) for v in box]) for name, *box in boxes_of(0)[:1]]
    assert store.manifest.audit.unused == {
        "image files without an .xml of their name": 1,
        "objects that are marked as difficult": 4,
    }


def table(root: Path, text: str, name: str = "labels.csv", count: int = 12) -> Path:
    for number in range(count):
        picture(root / "img" / f"{number} x.png", number, (8, 9))
    (root / name).write_text(text)
    return root


def labels_of(store: Store, split: str) -> list[str]:
    return [store.manifest.class_names[label] for label in store.split(split).labels]


def test_a_table_of_classes_with_splits(tmp_path: Path) -> None:
    rows = [f'"img/{n} x.png",{(10, 9)[n % 2]},{("training", "VAL", "test")[n // 8 + n // 10]}' for n in range(12)]
    store = prepare("csv", table(tmp_path, "image,label,split\n" + "\n".join(rows)), tmp_path / "store")
    assert store.manifest.class_names == ("9", "10")  # as numbers
    assert store.manifest.splits == {"train": 8, "val": 2, "test": 2}
    assert labels_of(store, "train") == ["10", "9"] * 4
    expected = np.asarray(PIL.Image.open(tmp_path / "img" / "3 x.png")).transpose(2, 0, 1)
    assert (store.split("train").image(3).numpy() == expected).all()


def test_a_list_of_files_and_a_held_out_part(tmp_path: Path) -> None:
    rows = [f"img/{n} x.png {'ab'[n % 2]}" for n in range(12)]
    store = prepare("csv", table(tmp_path, "\n".join(rows), "list.txt"), tmp_path / "store", holdout=0.2)
    assert store.manifest.splits == {"train": 10, "val": 2, "test": 2}
    assert sorted(labels_of(store, "val")) == ["a", "b"]


def test_groups_stay_together(tmp_path: Path) -> None:
    rows = [f"img/{n} x.png,{'ab'[n // 6]},p{n // 3}" for n in range(12)]
    root = table(tmp_path, "path,label,group\n" + "\n".join(rows))
    store = prepare("csv", root, tmp_path / "store", holdout=0.5)
    val = [store.split("val").encoded_image(row).tobytes() for row in range(6)]
    of = [n // 3 for n in range(12) if (root / "img" / f"{n} x.png").read_bytes() in val]
    assert of in ([0, 0, 0, 2, 2, 2], [0, 0, 0, 3, 3, 3], [1, 1, 1, 2, 2, 2], [1, 1, 1, 3, 3, 3])
    with pytest.raises(
        SourceError, match=r"4 groups, of which none is within 10\.00% of a class; set option holdout to 0\.50 or more,"
    ):
        prepare("csv", root, tmp_path / "other", holdout=0.1)
    # The same by a pattern in the names: the first digit of the number.
    (root / "labels.csv").write_text("path,label\n" + "\n".join(row.rpartition(",")[0] for row in rows))
    with pytest.raises(SourceError, match=r"option group='\(q\)' is not found in the name of image 'img/0 x.png'"):
        prepare("csv", root, tmp_path / "other", group="(q)")
    with pytest.raises(SourceError, match=r"option group='\(': it is no regular expression"):
        prepare("csv", root, tmp_path / "other", group="(")


def test_groups_of_several_classes_are_a_part_of_all_images(tmp_path: Path) -> None:
    """A frame of a video is of any class, so a video is more than the part of one."""
    rows = [f"img/{n} x.png,{'abcd'[n % 4]},clip{n // 3}" for n in range(12)]
    root = table(tmp_path, "path,label,group\n" + "\n".join(rows))
    with pytest.raises(SourceError, match=r"within 20\.00% of the images; set option holdout to 0\.25 or more, "):
        prepare("csv", root, tmp_path / "store", holdout=0.2)
    store = prepare("csv", root, tmp_path / "store", holdout=0.25)
    val = [store.split("val").encoded_image(row).tobytes() for row in range(3)]
    assert len({n // 3 for n in range(12) if (root / "img" / f"{n} x.png").read_bytes() in val}) == 1


def test_a_group_in_two_splits_is_refused(tmp_path: Path) -> None:
    rows = [f"img/{n} x.png,{'ab'[n % 2]},{'train' if n < 8 else 'val'},p{n // 3}" for n in range(12)]
    root = table(tmp_path, "path,label,split,group\n" + "\n".join(rows))
    with pytest.raises(SourceError, match=r"group 'p2' has images in train and in val \(1 groups"):
        prepare("csv", root, tmp_path / "store")


def test_images_without_a_group_are_no_group_of_their_own(tmp_path: Path) -> None:
    rows = [f"img/{n} x.png,{'ab'[n % 2]},{'g1' if n < 4 else ''},{'val' if n > 9 else 'train'}" for n in range(12)]
    root = table(tmp_path / "raw", "\n".join(["path,label,group,split", *rows]) + "\n")
    store = prepare("csv", root, tmp_path / "store")
    assert {split: len(store.split(split)) for split in ("train", "val")} == {"train": 10, "val": 2}


def test_class_folders_alone(tmp_path: Path) -> None:
    for number in range(40):
        picture(tmp_path / "raw" / "ab"[number % 2] / f"{number}.png", number, (8, 8))
    assert source_of(tmp_path / "raw") == "image_folder"
    store = prepare("image_folder", tmp_path / "raw", tmp_path / "store")
    assert store.manifest.splits == {"train": 36, "val": 4, "test": 4}
    assert store.manifest.original("test") == "val"
    grouped = prepare("image_folder", tmp_path / "raw", tmp_path / "grouped", holdout=0.3, group=r"(\d)\.png$")
    digits = {
        path.stem[-1]
        for path in (tmp_path / "raw").glob("*/*.png")
        if path.read_bytes() in [grouped.split("val").encoded_image(k).tobytes() for k in range(8)]
    }
    assert len(digits) == 2  # of each class one group, of which all four images; a second is over 30 %
    assert grouped.manifest.splits["val"] == 8


def test_missing_and_damaged_images_are_named_or_skipped(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    roboflow_yolo(root)
    (root / "train/images/2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(SourceError, match=r"2\.png.*PNG"):
        prepare("yolo", root, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    store = prepare("yolo", root, tmp_path / "store", skip_bad=True)
    assert found_in(store.split("train")) == known([0, 1, 3, 4, 5, 6, 7])
    assert [one.file for one in store.manifest.audit.skipped or ()] == [str(root / "train/images/2.png")]


WRONG_YOLO: dict[str, tuple[str, str, str]] = {
    "class beyond": ("train/labels/0.txt", "7 0.5 0.5 0.1 0.1", r"0\.txt, line 1: class is '7', expected 0 to 2"),
    "class of text": ("train/labels/0.txt", "cat 0.5 0.5 0.1 0.1", r"line 1: 'cat' is no number"),
    "half a class": ("train/labels/0.txt", "0.5 0.5 0.5 0.1 0.1", r"class is '0\.5'"),
    "pixels": ("train/labels/0.txt", "0 0.5 0.5 0.1 0.1\n1 12 30 5 5", r"line 2: coordinate is 12, expected 0 to 1"),
    "not finite": ("train/labels/0.txt", "0 nan 0.5 0.1 0.1", r"'nan' is no number"),
    "confidence": ("train/labels/0.txt", "0 0.5 0.5 0.1 0.1 0.9", r"has 5 numbers after the class, expected 4"),
    "binary": ("train/labels/0.txt", "\x00\x01", "has a NUL character"),
    "nc": ("data.yaml", YAML.replace("nc: 3", "nc: 4"), "nc is '4', but names has 3 classes"),
    "no names": ("data.yaml", "train: train/images\n", "names is None, expected a list"),
    "gap": ("data.yaml", "train: train/images\nnames: {0: a, 2: b}\n", "names has the key '2', expected 0 to 1"),
    "twice": ("data.yaml", "train: train/images\nnames: [a, a]\n", "classes 0 and 1 have the same name 'a'"),
    "key twice": ("data.yaml", "train: a\ntrain: b\n", r"line 2 is not YAML .*'train' occurs twice"),
    "alias": ("data.yaml", "train: &a x\nval: *a\n", r"line 2 .*an alias"),
    "no place": ("data.yaml", "train: gone\nnames: [a]\n", "train is 'gone', which is not found in"),
    "outside": ("data.yaml", "train: ../../etc\nnames: [a]\n", r"train is '\.\./\.\./etc', which is not found in"),
    "not yaml": ("data.yaml", "train: [", r"data\.yaml, line 1 is not YAML"),
    "list": ("data.yaml", "- 1\n", "expected fields train, val and names"),
    "deep": ("data.yaml", "[" * 5000, "line 1 is not YAML .*deeper than 20"),
}


@pytest.mark.parametrize("case", WRONG_YOLO)
def test_what_is_wrong_in_yolo_is_named_and_nothing_is_left(case: str, tmp_path: Path) -> None:
    file, text, message = WRONG_YOLO[case]
    root = tmp_path / "raw"
    root.mkdir()
    roboflow_yolo(root)
    (root / file).write_text(text)
    with pytest.raises(SourceError, match=message):
        prepare("yolo", root, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


BOX = (
    "<annotation>\n<object><name>cat</name>\n<bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox></object>"
    "</annotation>"
)
WRONG_VOC: dict[str, tuple[str, str]] = {
    "cut": ("<annotation><object>", r"0\.xml, line 1: it is no XML"),
    "bomb": ('<!DOCTYPE x [<!ENTITY a "aa">]><annotation>&a;</annotation>', "line 1: a document type"),
    "another": ("<html></html>", "line 1: it is <html>, expected <annotation>"),
    "no box": ("<annotation>\n<object><name>cat</name></object></annotation>", "line 2: the object has no <bndbox>"),
    "no name": ("<annotation><object><bndbox/></object></annotation>", "the object has no <name>"),
    "no number": (BOX.format("x", 4), "line 3: xmin is 'x', expected a number"),
    "underscore": (BOX.format("1_0", 40), "line 3: xmin is '1_0', expected a number"),
    "turned": (BOX.format(5, 4), "line 3: xmax is 4 and xmin 5"),
    "zero": (BOX.format(0, 4), r"line 3: xmin is 0, expected at least 1.*--option first_pixel=0"),
    "size": ("<annotation><size><width>9</width><height>9</height></size></annotation>", "says 9 x 9 pixels"),
    "deep": ("<a>" * 100, "nested deeper than 50"),
}


@pytest.mark.parametrize("case", WRONG_VOC)
def test_what_is_wrong_in_voc_is_named_and_nothing_is_left(case: str, tmp_path: Path) -> None:
    text, message = WRONG_VOC[case]
    root = tmp_path / "raw"
    roboflow_voc(root)
    (root / "train/0.xml").write_text(text)
    with pytest.raises(SourceError, match=message):
        prepare("voc", root, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


WRONG_CSV: dict[str, tuple[str, str]] = {
    "ragged": ("img/0 x.png,a\nimg/1 x.png,a,b\n", r"labels\.csv, line 2 has 3 columns, expected 2"),
    "no class": ("path,label\nimg/0 x.png,\n", "line 2: image 'img/0 x.png' has no class"),
    "two classes": ("img/0 x.png,a\nimg/0 x.png,b\n", "line 2: image 'img/0 x.png' has a class at .*line 1 already"),
    "split": ("img/0 x.png,a,dev\n", "line 1: split is 'dev', expected train, val or test"),
    "no train": ("img/0 x.png,a,val\n", "no row of .* is of split train"),
    "quote": ('path,label\n"img,a\n', "it is no CSV"),
    "four columns": ("a,b,c,d\n", "has 4 columns without a header that is known"),
    "two paths": ("file,image,label\n", "'file' and 'image' can both be the path"),
    "no label": ("path,colour\n", r"no column that is known as label .*columns=path:NAME,label:NAME"),
    "three edges": ("path,label,x1,y1,x2\n", "no column that is known as y2"),
    "edges": ("img/0 x.png,4,4,2,8,a\n", "line 1: the box is 4, 4, 2, 8"),
    "no edge": ("img/0 x.png,4,,2,8,a\n", "line 1: y1 is '', expected a number"),
    "outside": ("../../x.png,a\n", r"line 1: '\.\./\.\./x\.png' is not found in"),
    "underscore": ("img/0 x.png,1_0,4,20,8,a\n", "line 1: x1 is '1_0', expected a number"),
    "missing": ("img/0 x.png,a\nimg/99.png,a\n", r"99\.png: No such file"),
    "empty": ("", "is empty"),
    "header alone": ("path,label\n", "has a header and no row"),
}


@pytest.mark.parametrize("case", WRONG_CSV)
def test_what_is_wrong_in_a_table_is_named_and_nothing_is_left(case: str, tmp_path: Path) -> None:
    text, message = WRONG_CSV[case]
    root = table(tmp_path / "raw", text, count=3)
    with pytest.raises(SourceError, match=message):
        prepare("csv", root, tmp_path / "store", holdout=0)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(("source", "write"), [("yolo", roboflow_yolo), ("voc", roboflow_voc)])
def test_two_folders_of_one_split_are_refused(source: str, write: Callable[[Path], object], tmp_path: Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    write(root)
    (root / "data.yaml").unlink(missing_ok=True)
    (root / "classes.txt").write_text("a\nb\nc\n")
    prepare(source, root, tmp_path / "first")
    there = next(root / name for name in ("val", "valid") if (root / name).exists())
    shutil.copytree(there, root / "validation")
    with pytest.raises(SourceError, match=f"has {there.name} and validation, which are both val; keep one"):
        prepare(source, root, tmp_path / "second")


def test_numbers_of_thousands_of_digits_are_no_error_of_python(tmp_path: Path) -> None:
    digits = "1" * 5000
    root = table(tmp_path / "table", f"img/0 x.png,{digits}\nimg/1 x.png,2\nimg/2 x.png,10\n", count=3)
    assert prepare("csv", root, tmp_path / "csv", holdout=0).manifest.class_names == ("2", "10", digits)
    roboflow_voc(tmp_path / "voc")
    (tmp_path / "voc/train/0.xml").write_text(
        f"<annotation><size><width>{digits}</width><height>9</height></size></annotation>"
    )
    prepare("voc", tmp_path / "voc", tmp_path / "store")


def test_a_directory_without_a_known_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no layout that is known \(it holds nothing\)"):
        source_of(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train.json").touch()
    picture(tmp_path / "images" / "train" / "0.png", 0, size_of(0))
    with pytest.raises(SourceError, match=r"prepare coco --images DIR --annotations .*instances_train\.json --split"):
        source_of(tmp_path)
    (tmp_path / "labels.csv").touch()
    (tmp_path / "data.yaml").touch()
    with pytest.raises(SourceError, match="can be read as yolo and as csv; name the source"):
        source_of(tmp_path)
