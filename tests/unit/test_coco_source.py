"""COCO's format: odd but sound files survive a round trip; what is wrong is refused with its file and id."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Split, Store

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")

DIGITS = load_digits()
# COCO's own ids have gaps and are in no order in some files; the table has to put them right.
CATEGORIES = [{"id": 90, "name": "ninety"}, {"id": 1, "name": "one"}, {"id": 13, "name": "thirteen"}]
SIZES = [(40, 60), (61, 33), (48, 48), (30, 71)]  # height, width


def picture(number: int) -> bytes:
    """A real digit on a picture of one of the sizes; JPEG, PNG or grey PNG."""
    height, width = SIZES[number % 4]
    digit = PIL.Image.fromarray((DIGITS.images[number] * 15.9).astype(np.uint8)).resize((24, 24))
    canvas = PIL.Image.new("RGB" if number % 3 else "L", (width, height), 30)
    canvas.paste(digit, (number % 5, 4))
    stream = io.BytesIO()
    canvas.save(stream, "JPEG" if number % 3 == 1 else "PNG")
    return stream.getvalue()


def write_split(root: Path, split: str, count: int, first: int = 0) -> dict[str, Any]:
    """One split in COCO's layout: pictures of which every fifth is empty, one crowd, one box over the border."""
    folder = root / f"{split}2017"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(first, first + count):
        height, width = SIZES[number % 4]
        name = f"{number:06d}.{'jpg' if number % 3 == 1 else 'png'}"
        (folder / name).write_bytes(picture(number))
        images.append({"id": 1000 - number, "file_name": name, "height": height, "width": width, "license": 3})
        for k in range(number % 5):
            box = [number % 5 + k, 4, 24.5 - k, 24]
            annotations.append(
                {
                    "id": 10_000 + 10 * number + k,
                    "image_id": 1000 - number,
                    "category_id": CATEGORIES[(number + k) % 3]["id"],
                    "bbox": box,
                    "area": 100.25 + k,
                    "iscrowd": int(number == first + 1),
                    "segmentation": [[1.5, 2.5, 3.5, 4.5, 5.5, 6.5]],
                }
            )
    content = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations[::-1]}
    content["categories"] = CATEGORIES
    save(root, split, content)
    return content


def json_path(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def save(root: Path, split: str, content: Any) -> Path:
    path = json_path(root, split)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path / "raw", "train", 20)
    write_split(tmp_path / "raw", "val", 6, first=30)
    return tmp_path / "raw"


def content_of(root: Path, split: str) -> dict[str, Any]:
    return json.loads(json_path(root, split).read_text())


def assert_same(split: Split, content: dict[str, Any], folder: Path) -> None:
    """Every picture and every annotation is there once, as it was given."""
    by_id = {image["id"]: image for image in content["images"]}
    expected: dict[int, list[dict[str, Any]]] = {number: [] for number in by_id}
    for annotation in content["annotations"]:
        expected[annotation["image_id"]].append(annotation)
    assert len(split) == len(by_id)
    for row in range(len(split)):
        found = split.annotations(row)
        image = by_id.pop(found.image_id)
        assert split.encoded_image(row).tobytes() == (folder / image["file_name"]).read_bytes()
        assert split.image(row).shape == (3, found.height, found.width) == (3, image["height"], image["width"])
        given = expected[found.image_id]
        assert found.ids.tolist() == [one["id"] for one in given]
        assert found.boxes.tolist() == [one["bbox"] for one in given]
        assert found.category_ids.tolist() == [one["category_id"] for one in given]
        assert found.crowd.tolist() == [bool(one["iscrowd"]) for one in given]
        assert found.areas.tolist() == [one["area"] for one in given]
        names = {one["id"]: one["name"] for one in content["categories"]}
        assert [split.class_names[label] for label in found.labels] == [names[one["category_id"]] for one in given]
    assert not by_id


def test_a_directory_becomes_a_store(root: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    store = prepare("coco", root, tmp_path / "store", progress=lambda *call: calls.append(call))
    assert calls[-1] == (26, 26)
    manifest = store.manifest
    assert manifest.task == "detection"
    assert manifest.category_ids == (1, 13, 90)
    assert manifest.class_names == ("one", "thirteen", "ninety")
    assert manifest.splits == {"train": 20, "val": 6, "test": 6}
    for split, folder in (("train", "train2017"), ("val", "val2017"), ("test", "val2017")):
        assert_same(store.split(split), content_of(root, split if split != "test" else "val"), root / folder)
    # The test split is the val split under a second name, and nobody is told otherwise.
    assert manifest.audit.same_as == {"test": "val"}
    assert manifest.shards["test"] == manifest.shards["val"]
    assert manifest.audit.boxes is not None
    assert "test" not in manifest.audit.boxes
    assert (manifest.audit.duplicates, manifest.audit.cross_split_duplicates) == (0, 0)
    train = manifest.audit.boxes["train"]
    assert (train.objects, train.crowds, train.empty_images, train.computed_areas) == (40, 1, 4, 0)
    assert prepare("coco", root, tmp_path / "store").manifest == manifest
    assert not list((tmp_path / "store").glob("test-*"))


def test_held_out_training_pictures_become_val(root: Path, tmp_path: Path) -> None:
    store = prepare("coco", root, tmp_path / "store", holdout=0.2)
    assert store.manifest.splits == {"train": 16, "val": 4, "test": 6}
    assert store.manifest.audit.same_as is None
    ids = {
        name: [store.split(name).annotations(row).image_id for row in range(len(store.split(name)))]
        for name in ("train", "val", "test")
    }
    assert sorted(ids["train"] + ids["val"]) == sorted(image["id"] for image in content_of(root, "train")["images"])
    assert_same(store.split("test"), content_of(root, "val"), root / "val2017")
    other = prepare("coco", root, tmp_path / "other", holdout=0.2, seed=1)
    assert [other.split("val").annotations(row).image_id for row in range(4)] != ids["val"]


def split_options(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {"images": root / f"{name}2017", "annotations": json_path(root, name), "split": name} | changes


def test_splits_are_added_one_by_one(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    first = prepare("coco", None, out, **split_options(root, "train"))
    assert first.manifest.splits == {"train": 20}
    with pytest.raises(StoreError, match="no split 'val', expected one of 'train'"):
        first.split("val")
    both = prepare("coco", None, out, **split_options(root, "val"))
    assert both.manifest.splits == {"train": 20, "val": 6, "test": 6}
    assert both.manifest.audit.same_as == {"test": "val"}
    whole = prepare("coco", root, tmp_path / "whole").manifest
    assert both.manifest.shards == whole.shards
    assert both.manifest.audit == whole.audit
    assert both.manifest.options["val_annotations"] == "instances_val2017.json"
    # The same again changes nothing; a real test split takes the place of the second name.
    inode = (out / "manifest.json").stat().st_ino
    assert prepare("coco", None, out, **split_options(root, "train")).manifest == both.manifest
    assert (out / "manifest.json").stat().st_ino == inode
    content = write_split(root, "test", 5, first=50)
    three = prepare("coco", None, out, **split_options(root, "test"))
    assert three.manifest.splits == {"train": 20, "val": 6, "test": 5}
    assert three.manifest.audit.same_as is None
    assert_same(three.split("test"), content, root / "test2017")
    assert_same(three.split("train"), content_of(root, "train"), root / "train2017")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "store", "whole"]


def test_a_split_is_replaced_only_when_asked(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    for split in ("train", "val"):
        prepare("coco", None, out, **split_options(root, split))
    reader = Store.open(out).split("train")
    content = content_of(root, "train")
    content["annotations"] = content["annotations"][:9]
    save(root, "train", content)
    with pytest.raises(
        StoreError, match=r"already contains split 'train' from instances_train2017\.json; .* --overwrite"
    ):
        prepare("coco", None, out, **split_options(root, "train"))
    after = prepare("coco", None, out, overwrite=True, **split_options(root, "train"))
    assert_same(after.split("train"), content, root / "train2017")
    assert_same(after.split("val"), content_of(root, "val"), root / "val2017")
    assert {path.name for path in out.iterdir()} == {
        "manifest.json", *(shard.file for shards in after.manifest.shards.values() for shard in shards)
    }  # fmt: skip
    # Who had it open goes on reading what there was.
    assert sum(len(reader.annotations(row).ids) for row in range(len(reader))) == 40


def test_an_added_split_shows_copies_of_what_was_there(root: Path, tmp_path: Path) -> None:
    (root / "val2017" / "000030.png").write_bytes((root / "train2017" / "000002.png").read_bytes())
    height, width = SIZES[2]
    content = content_of(root, "val")
    content["images"][0] |= {"height": height, "width": width}
    save(root, "val", content)
    for split in ("train", "val"):
        store = prepare("coco", None, tmp_path / "store", **split_options(root, split))
    assert (store.manifest.audit.duplicates, store.manifest.audit.cross_split_duplicates) == (1, 1)


def test_nothing_is_added_when_adding_fails(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    before = prepare("coco", None, out, **split_options(root, "train")).manifest
    (root / "val2017" / "000031.jpg").write_bytes(picture(31)[:200])
    with pytest.raises(SourceError, match=r"val2017/000031\.jpg \(image 969\): the image cannot be decoded"):
        prepare("coco", None, out, **split_options(root, "val"))
    assert Store.open(out).manifest == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "raw"] == ["store"]
    content = content_of(root, "val")
    content["categories"] = [{"id": 1, "name": "uno"}, *content["categories"][2:], {"id": 90, "name": "ninety"}]
    save(root, "val", content)
    with pytest.raises(SourceError, match=r"val2017\.json: category 1 is 'uno', expected 'one' of the store"):
        prepare("coco", None, out, **split_options(root, "val"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "valid"}, "source 'coco': option split='valid': must be 'train', 'val' or 'test'"),
        ({"images": "absent"}, "absent, which is not a directory"),
        ({"annotations": "absent.json"}, r"absent\.json, which is not a file"),
        ({"split": "val", "holdout": 0.1}, "holdout is 0.1 for split 'val', expected 0; only split 'train'"),
        ({"holdot": 0.1}, "source 'coco': unknown option 'holdot'; did you mean 'holdout'"),
    ],
)
def test_wrong_split_options_are_refused(root: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        prepare("coco", None, tmp_path / "store", **split_options(root, "train", **changes))
    assert not (tmp_path / "store").exists()


def test_other_stores_are_not_extended(root: Path, tmp_path: Path) -> None:
    prepare("digits", None, tmp_path / "digits")
    with pytest.raises(StoreError, match="already contains a store of 'digits'"):
        prepare("coco", None, tmp_path / "digits", **split_options(root, "train"))
    with pytest.raises(SourceError, match="source 'coco': option 'annotations' is missing"):
        prepare("coco", None, tmp_path / "store", split="train", images=root)
    with pytest.raises(SourceError, match=r"root is .*; remove root"):
        prepare("coco", root, tmp_path / "store", **split_options(root, "train"))


# ---------------------------------------------------------------- what is odd, and sound


def test_odd_but_sound_files_survive(root: Path, tmp_path: Path) -> None:
    content = content_of(root, "train")
    first, second = content["annotations"][:2]
    for key in ("area", "iscrowd", "segmentation"):
        del first[key]
    second["bbox"] = [1, 2, 0, 5]  # no area
    content["annotations"][2]["bbox"] = [-7.5, 3, 20, 2000.25]  # over the border
    content["annotations"][3]["iscrowd"] = True
    content["annotations"][3]["segmentation"] = {"counts": '}]{[\\"', "size": [1, 2]}
    content["categories"].append({"id": 2**40, "name": "Zoë's \U0001f98e"})
    odd = {"annotations": content.pop("annotations"), "type": "instances", "version": 1.5, **content}
    path = save(root, "train", odd)
    path.write_text("\ufeff\n  " + json.dumps(odd, ensure_ascii=False, indent=1) + "\n\n", encoding="utf-8")
    val = content_of(root, "val")
    save(root, "val", {**val, "categories": odd["categories"], "annotations": []})
    store = prepare("coco", root, tmp_path / "store")
    first |= {"area": first["bbox"][2] * first["bbox"][3], "iscrowd": 0}
    assert_same(store.split("train"), odd, root / "train2017")
    assert store.manifest.category_ids == (1, 13, 90, 2**40)
    audit = store.manifest.audit
    assert audit.boxes is not None
    train = audit.boxes["train"]
    assert (train.computed_areas, train.no_area, train.beyond_border) == (1, 1, 1)
    assert audit.empty_classes == {"train": ("Zoë's \U0001f98e",), "val": store.manifest.class_names}
    assert audit.boxes["val"].empty_images == 6


def test_pictures_in_folders_and_an_exif_orientation(root: Path, tmp_path: Path) -> None:
    """The boxes of a turned picture are those of what is seen: then its size in the JSON is that of what is seen."""
    canvas = PIL.Image.new("RGB", (20, 30), 100)
    canvas.save(root / "train2017" / "turned.jpg", exif=orientation(6))
    (root / "train2017" / "a" / "b").mkdir(parents=True)
    (root / "train2017" / "turned.jpg").rename(root / "train2017" / "a" / "b" / "turned.jpg")
    content = content_of(root, "train")
    content["images"].append({"id": 5000, "file_name": "a/b/turned.jpg", "height": 20, "width": 30})
    save(root, "train", content)
    assert prepare("coco", root, tmp_path / "store").split("train").image(20).shape == (3, 20, 30)
    content["images"][-1] |= {"height": 30, "width": 20}
    save(root, "train", content)
    with pytest.raises(
        SourceError, match=r"turned\.jpg \(image 5000\) is 30 x 20 pixels, expected 20 x 30 .* EXIF orientation"
    ):
        prepare("coco", root, tmp_path / "other")


def orientation(number: int) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x0112] = number
    return exif


# ---------------------------------------------------------------- what is wrong


def change_annotation(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["annotations"][7].update(fields)


def change_image(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["images"][7].update(fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_annotation(image_id=4), r"annotation 10171: image_id is 4, expected the id"),
        (change_annotation(category_id=2), r"annotation 10171: category_id is 2, expected the id"),
        (change_annotation(id=10190), r"annotation id 10190 occurs twice"),
        (change_annotation(id="7"), r"id of entry 7 of 'annotations' is '7', expected an integer"),
        (change_annotation(id=True), r"id of entry 7 of 'annotations' is True"),
        (change_annotation(id=2**64), r"id of entry 7"),
        (change_annotation(image_id=983.0), r"annotation 10171: image_id is 983.0, expected an integer"),
        (
            change_annotation(bbox=[1, 2, float("nan"), 4]),
            r"annotation 10171 of image 983: bbox is \[1, 2, nan, 4\]",
        ),
        (change_annotation(bbox=[1, 2, float("inf"), 4]), r"annotation 10171 of image 983: bbox"),
        (change_annotation(bbox=[1, 2, -3, 4]), r"annotation 10171 of image 983: bbox .*of at least 0"),
        (change_annotation(bbox=[1, 2, 3]), r"annotation 10171 of image 983: bbox"),
        (change_annotation(bbox=[1, 2, 10**400, 4]), r"annotation 10171 of image 983: bbox"),
        (change_annotation(bbox="1 2 3 4"), r"annotation 10171 of image 983: bbox"),
        (change_annotation(bbox=None), r"annotation 10171 of image 983: bbox is None"),
        (change_annotation(area=-1), r"annotation 10171 of image 983: area is -1, expected"),
        (change_annotation(area=float("nan")), r"area is nan"),
        (change_annotation(iscrowd=2), r"iscrowd is 2, expected 0 or 1"),
        (change_image(id=995), r"image id 995 occurs twice"),
        (change_image(file_name="../secret.png"), r"image 993: file_name is '\.\./secret\.png', expected a path below"),
        (change_image(file_name="/etc/passwd"), r"image 993: file_name"),
        (change_image(file_name=None), r"image 993: file_name is None"),
        (
            change_image(file_name="gone.png"),
            r"train2017/gone\.png is missing: image 993 of .*instances_train2017\.json",
        ),
        (change_image(height=0), r"image 993 \(000007\.jpg\): height and width are 0 and 71"),
        (change_image(width="71"), r"height and width are 30 and '71'"),
        (change_image(width=70), r"000007\.jpg \(image 993\) is 71 x 30 pixels, expected 70 x 30 of its annotations;"),
        (lambda content: content["categories"].append({"id": 1, "name": "x"}), r"category 1 'x': its id or its name"),
        (lambda content: content["categories"].append({"id": 2, "name": "one"}), r"category 2 'one': its id or its"),
        (lambda content: content["categories"].append({"id": 2}), r"category 2: name is None"),
        (lambda content: content.pop("categories"), r"list 'categories' is missing or empty"),
        (lambda content: content.update(images=[]), r"list 'images' is missing or empty"),
        (lambda content: content["images"].append(3), r"entry 20 of 'images' is 3, expected a JSON object"),
    ],
)
def test_wrong_entries_are_refused_with_file_and_id(
    root: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = content_of(root, "train")
    damage(content)
    path = save(root, "train", content)
    with pytest.raises(SourceError, match=message) as caught:
        prepare("coco", root, tmp_path / "store")
    assert str(path) in str(caught.value) or "train2017/" in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("content", [b"", b"not an image", picture(4)[:-300], picture(3)[:90]])
def test_broken_pictures_are_named_with_their_id(root: Path, tmp_path: Path, content: bytes) -> None:
    (root / "train2017" / "000004.jpg").write_bytes(content)
    with pytest.raises(SourceError, match=r"train2017/000004\.jpg \(image 996\): .*; replace the file"):
        prepare("coco", root, tmp_path / "store")


def test_missing_files_are_counted_and_missing_parts_named(root: Path, tmp_path: Path) -> None:
    for name in ("000003.png", "000004.jpg"):
        (root / "train2017" / name).unlink()
    with pytest.raises(
        SourceError, match=r"000003\.png is missing: image 997 of .* \(2 of its 20 images are missing\)"
    ):
        prepare("coco", root, tmp_path / "store")
    json_path(root, "val").unlink()
    with pytest.raises(SourceError, match=r"instances_val2017\.json is missing.*spikefleet data prepare coco DIR"):
        prepare("coco", root, tmp_path / "store")


# ---------------------------------------------------------------- command line


def test_the_command_adds_splits_and_shows_what_was_found(root: Path, tmp_path: Path) -> None:
    from spikefleet.cli import app

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["data", *map(str, arguments)], env={"COLUMNS": "200"})

    out = tmp_path / "store"
    for split in ("train", "val"):
        options = ("--images", root / f"{split}2017", "--annotations", json_path(root, split), "--split", split)
        result = run("prepare", "coco", "--out", out, *options)
        assert result.exit_code == 0, result.output
    shown = run("show", out).output
    for words in ("6 images, the same images as val", "40, 1 around crowds; 4 images without objects", "1, 13, 90"):
        assert words in shown, shown
    half = run("prepare", "coco", "--out", out, "--split", "train")
    assert half.exit_code == 2
    assert "--split given without --images and --annotations" in " ".join(half.output.split())
