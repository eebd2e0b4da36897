"""A data set has a name: its source's, its folder's, or the one that was asked for; it is no part of the content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from torchvision.models._meta import _COCO_CATEGORIES
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.recipes import list_recipes, load_config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.opening import open_or_prepare
from spikefleet_pipelines.sources import find_source, list_sources, prepare
from spikefleet_pipelines.store.data_set_name import (
    PUBLISHED,
    check_data_set_name,
    name_after,
    published_name,
    without_digests,
)
from spikefleet_pipelines.store.manifest import Manifest, parse_manifest
from spikefleet_pipelines.store.reader import Store

COCO = {number: name for number, name in enumerate(_COCO_CATEGORIES) if name not in ("__background__", "N/A")}
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def folders(root: Path, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for image in range(2):
                PIL.Image.fromarray(PIXELS + 20 * number + image).save(root / split / name / f"{image}.png")
    return root


def boxes(root: Path, split: str, at: Path | None = None) -> dict[str, Path]:
    """Boxes of one's own in COCO's format: options of a single split."""
    images = root / f"{split}2017"
    images.mkdir(parents=True)
    PIL.Image.fromarray(PIXELS).save(images / "1.png")
    content: dict[str, Any] = {"images": [{"id": 1, "file_name": "1.png", "height": 4, "width": 4}]}
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0}]
    content["categories"] = [{"id": 3, "name": "leaf"}]
    annotations = at or root / "annotations" / f"instances_{split}2017.json"
    annotations.parent.mkdir(exist_ok=True, parents=True)
    annotations.write_text(json.dumps(content))
    return {"images": images, "annotations": annotations}


def forget_name(store: Path) -> None:
    """Makes a store one of an earlier version."""
    content = json.loads((store / "manifest.json").read_text())
    del content["name"]
    (store / "manifest.json").write_text(json.dumps(content))


# -------------------------------------------------------------------------------------------------------- defaults


def test_a_built_in_set_is_named_after_its_source(tmp_path: Path) -> None:
    assert prepare("digits", None, tmp_path / "elsewhere").manifest.name == "digits"
    assert published_name("cifar10", ("a",), None, 7) == "cifar10"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("flowers", "flowers"),
        ("My Flowers (2024)", "My_Flowers_2024"),
        ("..dots..", "dots"),
        ("größe", "groe"),
        ("图片", "image_folder"),
        ("x" * 200, "x" * 64),
        ("imagenet", "own_imagenet"),
        ("COCO", "own_COCO"),
        ("digits", "own_digits"),
    ],
)
def test_image_folders_are_named_after_their_folder(folder: str, name: str, tmp_path: Path) -> None:
    assert name_after(tmp_path / folder, "image_folder") == check_data_set_name(name)


def test_an_image_folder_and_its_store_have_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folders(tmp_path / "my flowers")
    first = prepare("image_folder", root, tmp_path / "a")
    monkeypatch.chdir(root)
    for place in (Path(), Path("train/..")):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        assert prepare("image_folder", place, tmp_path / "b").manifest.name == "my_flowers"
    moved = shutil.copytree(root, tmp_path / "other")
    other = prepare("image_folder", moved, tmp_path / "c")
    assert (first.manifest.name, other.manifest.name) == ("my_flowers", "other")
    assert first.manifest.content_hash == other.manifest.content_hash
    config = DataConfig(source="image_folder", root=root)
    assert open_or_prepare(config, tmp_path / "stores").manifest.name == "my_flowers"


def test_imagenet_is_known_by_its_classes_and_images() -> None:
    classes = tuple((Path(__file__).parents[1] / "fixtures/imagenet_classes.txt").read_text().split())
    assert published_name("image_folder", classes, None, 1_331_167) == "imagenet"
    assert published_name("image_folder", classes, None, 1_331_166) is None
    assert published_name("image_folder", classes[1:], None, 1_331_167) is None


@pytest.mark.parametrize("images", [5_000, 118_287, 123_287])
def test_coco_is_known_by_its_categories_and_images(images: int) -> None:
    names, ids = tuple(COCO.values()), tuple(COCO)
    assert published_name("coco", names, ids, images) == "coco"
    assert published_name("coco", names, ids, images - 1) is None
    assert published_name("coco", names, tuple(range(1, 81)), images) is None  # an export that numbers them anew
    assert published_name("coco", ("human", *names[1:]), ids, images) is None
    assert published_name("coco", names[:-1], ids[:-1], images) is None


def test_own_boxes_are_named_after_their_folder(tmp_path: Path) -> None:
    root = tmp_path / "leaves"
    splits = {split: boxes(root, split) for split in ("train", "val")}
    assert prepare("coco", root, tmp_path / "whole").manifest.name == "leaves"
    for split, options in splits.items():
        store = prepare("coco", None, tmp_path / "parts", split=split, **options)
    assert (store.manifest.name, set(store.manifest.splits)) == ("leaves", {"train", "val", "test"})
    beside = boxes(tmp_path / "roboflow", "valid", tmp_path / "roboflow/valid2017/_annotations.coco.json")
    (tmp_path / "roboflow/valid2017").rename(tmp_path / "roboflow/valid")
    beside = {key: tmp_path / "roboflow/valid" / (path.name if key != "images" else "") for key, path in beside.items()}
    assert prepare("coco", None, tmp_path / "r", split="val", **beside).manifest.name == "roboflow"
    assert prepare("coco", None, tmp_path / "n", split="val", dataset="mine", **beside).manifest.name == "mine"


def test_own_boxes_in_a_folder_of_that_name_are_not_coco(tmp_path: Path) -> None:
    boxes(tmp_path / "coco", "train")
    boxes(tmp_path / "coco", "val")
    assert prepare("coco", tmp_path / "coco", tmp_path / "store").manifest.name == "own_coco"


def test_every_set_that_a_source_stands_for_is_taken() -> None:
    """A new source of one data set adds its name; other data do not get it from their folder."""
    anybodys = {"image_folder", "coco", "event_folder", "csv", "voc", "yolo", "tonic", "parquet", "webdataset", "npz"}
    assert {name for name in list_sources() if find_source(name).name not in anybodys} <= PUBLISHED


# --------------------------------------------------------------------------------------------------- names asked for


def test_a_name_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    for bad in ("", "a b", "a/b", ".a", "a..b", "x" * 65, "ä", "a\n", "%s"):
        with pytest.raises(StoreError, match="must have 1 to 64 letters"):
            prepare("digits", None, tmp_path / "store", dataset=bad)
    assert not (tmp_path / "store").exists()
    text = prepare("digits", None, tmp_path / "store").manifest.to_json().replace('"digits"', '"../x"', 2)
    with pytest.raises(StoreError, match="field 'name' is invalid"):
        parse_manifest(text.encode(), "here")


def test_a_store_that_is_there_is_renamed_and_stays_what_it_is(tmp_path: Path) -> None:
    root = folders(tmp_path / "raw")
    before = prepare("image_folder", root, tmp_path / "store")
    written = (tmp_path / "store/manifest.json").stat().st_mtime_ns
    renamed = prepare("image_folder", root, tmp_path / "store", dataset="flowers")
    assert (before.manifest.name, renamed.manifest.name) == ("raw", "flowers")
    assert renamed.manifest.content_hash == before.manifest.content_hash
    assert (tmp_path / "store/manifest.json").stat().st_mtime_ns == written
    assert prepare("image_folder", root, tmp_path / "store").manifest.name == "flowers"  # nothing was asked for
    assert prepare("image_folder", root, tmp_path / "store", overwrite=True).manifest.name == "raw"
    assert {path.name for path in (tmp_path / "store").iterdir()} >= {"manifest.json", "origin.json"}
    assert not list((tmp_path / "store").glob(".*"))


def test_the_command_says_the_name(tmp_path: Path) -> None:
    def ask(*words: str, code: int = 0) -> str:
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["data", *words, "--stores-dir", str(tmp_path)])
        assert done.exit_code == code, done.output
        return done.stdout if code == 0 else done.stderr

    assert json.loads(ask("prepare", "digits", "--name", "mine", "--json"))["name"] == "mine"
    assert json.loads(ask("show", "digits", "--json"))["name"] == "mine"
    assert "mine" in ask("show", "digits")
    assert "set another --name" in ask("prepare", "digits", "--name", "a b", code=2)
    assert json.loads(ask("show", "digits", "--json"))["name"] == "mine"


# ---------------------------------------------------------------------------------------- stores of earlier versions


def test_stores_without_a_name_are_read_with_the_default_name(tmp_path: Path) -> None:
    prepare("digits", None, tmp_path / "d")
    prepare("image_folder", folders(tmp_path / "flowers"), tmp_path / "image_folder")
    prepare("coco", None, tmp_path / "leaves", split="train", **boxes(tmp_path / "raw", "train"))
    stores = {"d": "digits", "image_folder": "flowers", "leaves": "leaves"}
    hashes = {folder: Store.open(tmp_path / folder).manifest.content_hash for folder in stores}
    for folder, name in stores.items():
        forget_name(tmp_path / folder)
        manifest = Store.open(tmp_path / folder).manifest
        assert (manifest.name, manifest.content_hash) == (name, hashes[folder])
        assert DataSummary.of(manifest).dataset == name
        assert Store.open(f"file://{tmp_path / folder}").manifest.name == name
    (tmp_path / "image_folder/origin.json").unlink()  # of a version before that record, too
    assert Store.open(tmp_path / "image_folder").manifest.name == "image_folder"
    assert without_digests("image_folder-fe9e549a7bd5-12345678") == "image_folder"
    assert without_digests("leaves-2024") == "leaves-2024"


def test_a_store_of_coco_without_a_name_is_coco(tmp_path: Path) -> None:
    """As far as a manifest can say: with 5,000 images it is, with 4,999 it is not."""
    prepare("coco", None, tmp_path / "coco", split="val", **boxes(tmp_path / "raw", "val"))
    content = json.loads((tmp_path / "coco/manifest.json").read_text())
    content |= {"class_names": list(COCO.values()), "category_ids": list(COCO)}
    for rows, name in ((5_000, "coco"), (4_999, None)):
        for shards in content["shards"].values():
            shards[0]["rows"] = rows
        manifest = Manifest.model_validate(content)
        found = published_name(manifest.source, manifest.class_names, manifest.category_ids, manifest.own_images)
        assert found == name


def test_a_summary_without_a_name_has_that_of_its_source(tmp_path: Path) -> None:
    data = DataSummary("coco", "d" * 64, ("leaf",), (3,), None, "leaves")
    data.write(tmp_path)
    assert DataSummary.read(tmp_path) == data
    plain = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps({key: plain[key] for key in plain if key != "name"}))
    assert DataSummary.read(tmp_path).dataset == "coco"
    for bad in (3, "../x"):
        (tmp_path / "data.json").write_text(json.dumps({**plain, "name": bad}))
        with pytest.raises(UserError, match="is damaged"):
            DataSummary.read(tmp_path)


# ------------------------------------------------------------------------------------------------- registered models


@pytest.mark.parametrize("recipe", list_recipes())
def test_each_recipe_states_its_data_set(recipe: str) -> None:
    config = load_config(recipe)
    assert config.registry.name is None  # that is the user's
    stated = config.registry.dataset
    assert stated == {"image_folder": "imagenet"}.get(config.data.source, config.data.source)
    assert config.registered_name(stated) == (config.registry.default_name or recipe)
    assert config.registered_name("mydata") == f"{config.model.family}_mydata"


def test_the_registered_name_follows_the_data_set_alone(tmp_path: Path) -> None:
    places = {"data.root": str(tmp_path), "data.store": str(tmp_path)}
    for overrides in ({}, *({key: value} for key, value in places.items())):
        config = load_config("digits", overrides)
        assert config.registered_name("digits") == "sg_resnet_digits"
        assert config.registered_name("mydata") == "sg_resnet_mydata"
        assert config.digest() == load_config("digits").digest()
    named = load_config("digits", {"registry.name": "mine"})
    assert (named.registered_name("digits"), named.registered_name("mydata")) == ("mine", "mine")
    (tmp_path / "own.yaml").write_text("base: digits\nregistry: {name: own}\n")
    assert load_config(str(tmp_path / "own.yaml")).registered_name("mydata") == "own"
    (tmp_path / "any.yaml").write_text("base: digits\nregistry: {dataset: null, default_name: any}\n")
    assert load_config(str(tmp_path / "any.yaml")).registered_name("mydata") == "any"
    old = load_config("digits", {"registry": {"register_best": True, "name": "sg_resnet_digits"}})  # of an earlier run
    assert old.registered_name("mydata") == "sg_resnet_digits"
