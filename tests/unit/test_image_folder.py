"""Splits are what the user named; a file that is not used is counted with its reason."""

from io import StringIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from spikefleet.cli.data import _print_store
from spikefleet.data_access import prepare_store
from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.manifest import Manifest, parse_manifest


def fill(root: Path, splits: tuple[str, ...], classes: tuple[str, ...] = ("cat", "dog"), count: int = 4) -> Path:
    for number, split in enumerate(splits):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = np.full((8, 9, 3), 20 + 60 * label + 16 * number + image, np.uint8)
                PIL.Image.fromarray(pixels).save(root / split / name / f"{image}.png")
    return root


def levels(manifest_store: Path, split: str) -> set[int]:
    from spikefleet_pipelines.store.reader import Store

    rows = Store.open(manifest_store).split(split)
    return {int(rows.image(row)[0, 0, 0]) for row in range(len(rows))}


def test_a_given_test_folder_is_the_test_split(tmp_path: Path) -> None:
    root = fill(tmp_path / "raw", ("train", "val", "test"))
    manifest = prepare("image_folder", root, tmp_path / "store").manifest
    assert manifest.splits == {"train": 8, "val": 8, "test": 8}
    assert levels(tmp_path / "store", "val") == {36, 37, 38, 39, 96, 97, 98, 99}
    assert levels(tmp_path / "store", "test") == {52, 53, 54, 55, 112, 113, 114, 115}


@pytest.mark.parametrize("reported", ["val", "test"])
def test_with_one_folder_beside_train_a_part_of_train_is_val(tmp_path: Path, reported: str) -> None:
    root = fill(tmp_path / "raw", ("train", reported))
    manifest = prepare("image_folder", root, tmp_path / "store").manifest
    assert manifest.splits == {"train": 6, "val": 2, "test": 8}
    assert levels(tmp_path / "store", "test") == {36, 37, 38, 39, 96, 97, 98, 99}


def test_the_command_says_where_val_and_test_come_from(tmp_path: Path) -> None:
    told = {}
    for name, splits in (("two", ("train", "val")), ("three", ("train", "val", "test"))):
        console = Console(file=StringIO(), width=400)
        prepare_store("image_folder", fill(tmp_path / name, splits), tmp_path / f"{name}_store", console, {})
        told[name] = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"test: the images of {tmp_path / 'two' / 'val'}; val: 2 images held out of train" in told["two"]
    assert "held out" not in told["three"]


def test_a_test_folder_without_classes_is_no_split(tmp_path: Path) -> None:
    root = fill(tmp_path / "raw", ("train", "val"))
    before = prepare("image_folder", root, tmp_path / "before").manifest
    (root / "test").mkdir()
    for number in range(3):
        PIL.Image.new("RGB", (9, 8)).save(root / "test" / f"{number}.jpg")
    manifest = prepare("image_folder", root, tmp_path / "store").manifest
    assert manifest.content_hash == before.content_hash
    assert manifest.audit.unused == {"image files in folders beside train, val and test": 3}


def test_splits_of_other_classes_are_refused(tmp_path: Path) -> None:
    root = fill(tmp_path / "raw", ("train", "val", "test"))
    (root / "test" / "dog").rename(root / "test" / "dogs")
    with pytest.raises(SourceError, match=r"train and .*/test differ \(only in train: dog; only in test: dogs\)"):
        prepare("image_folder", root, tmp_path / "store")


def with_other_files(root: Path) -> dict[str, int]:
    image = (root / "train" / "cat" / "0.png").read_bytes()
    for name in ("train/cat/session2/more.png", "train/cat/session2/deep/more.png", "train/dog/.hidden/x.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image)
    for name in ("train/cat/notes.txt", "train/cat/._0.png", ".DS_Store", "labels.csv", "val/loose.png"):
        (root / name).write_bytes(image)
    (root / "train" / "cat" / "linked").symlink_to(root / "val" / "cat")
    (root / "extra").mkdir()
    (root / "extra" / "x.png").write_bytes(image)
    return {
        "files that are named as no image": 2,
        "hidden files (names that start with a dot)": 2,
        "image files in a sub-folder": 3,
        "image files in folders beside train, val and test": 1,
        "image files in no class folder": 1,
        "links to folders": 1,
    }


def test_files_that_are_not_used_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = fill(tmp_path / "raw", ("train", "val"))
    before = prepare("image_folder", root, tmp_path / "before").manifest
    assert before.audit.unused is None
    expected = with_other_files(root)
    manifest = prepare("image_folder", root, tmp_path / "store").manifest
    assert manifest.audit.unused == expected
    assert manifest.splits == before.splits
    assert manifest.content_hash == before.content_hash  # what is not in a store does not change it
    text = (tmp_path / "store" / "manifest.json").read_bytes()
    assert parse_manifest(text, "manifest").audit.unused == expected
    _print_store(manifest, "store", as_json=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "3 image files in a sub-folder" in said
    _print_store(before, "store", as_json=False)
    assert "not used" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["bmp", "gif", "tif", "TIFF", "jfif", "webp", "JPEG", "ppm"])
def test_files_of_every_format_are_used(tmp_path: Path, suffix: str) -> None:
    root = fill(tmp_path / "raw", ("train", "val"))
    kind = {"tif": "TIFF", "jfif": "JPEG"}.get(suffix, suffix.upper())
    PIL.Image.new("RGB", (9, 8)).save(root / "train" / "cat" / f"scan.{suffix}", kind)
    manifest: Manifest = prepare("image_folder", root, tmp_path / "store").manifest
    assert manifest.splits["train"] + manifest.splits["val"] == 9
    assert manifest.audit.unused is None


def test_a_link_to_nothing_and_a_folder_named_as_an_image_are_named(tmp_path: Path) -> None:
    root = fill(tmp_path / "raw", ("train", "val"))
    odd = root / "train" / "cat" / "odd.jpg"
    odd.symlink_to("/nowhere/gone.jpg")
    with pytest.raises(SourceError, match=r"cat/odd\.jpg: it is a link to /nowhere/gone\.jpg, which does not exist"):
        prepare("image_folder", root, tmp_path / "store")
    odd.unlink()
    odd.mkdir()
    with pytest.raises(SourceError, match=r"cat/odd\.jpg: it is a folder, although it is named as an image"):
        prepare("image_folder", root, tmp_path / "store")


def test_a_class_whose_name_is_not_unicode_is_named(tmp_path: Path) -> None:
    root = fill(tmp_path / "raw", ("train", "val"))
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / "caf\udce9")
    with pytest.raises(SourceError, match=r"class folder 'caf.udce9' of .*/train has a name that is not UTF-8"):
        prepare("image_folder", root, tmp_path / "store")


@pytest.mark.parametrize("parallel", [1, None])
def test_bad_files_are_skipped_on_request_and_listed(
    tmp_path: Path, parallel: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    root = fill(tmp_path / "raw", ("train", "val", "test"))
    cat = root / "train" / "cat"
    before = prepare("image_folder", root, tmp_path / "before").manifest
    (cat / "cut.png").write_bytes((cat / "0.png").read_bytes()[:60])
    (cat / "empty.png").touch()
    (cat / "gone.png").symlink_to("/nowhere/gone.png")
    (root / "test" / "dog" / "text.jpg").write_text("text")
    with pytest.raises(SourceError, match=r"cat/empty\.png: the file has 0 bytes"):
        prepare("image_folder", root, tmp_path / "store")
    manifest = prepare("image_folder", root, tmp_path / "store", skip_bad=True, parallel=parallel).manifest
    skipped = manifest.audit.skipped
    assert skipped is not None
    assert [(one.split, Path(one.file).name) for one in skipped] == [
        ("train", "cut.png"), ("train", "empty.png"), ("train", "gone.png"), ("test", "text.jpg"),
    ]  # fmt: skip
    assert "the PNG is truncated" in skipped[0].reason
    assert "link to /nowhere/gone.png" in skipped[2].reason
    assert manifest.splits == before.splits
    assert [shard.sha256 for shards in manifest.shards.values() for shard in shards] == [
        shard.sha256 for shards in before.shards.values() for shard in shards
    ]
    assert levels(tmp_path / "store", "train") == levels(tmp_path / "before", "train")
    _print_store(manifest, "store", as_json=False)
    assert "empty.png: the file has 0 bytes" in " ".join(capsys.readouterr().out.split())


def test_a_class_of_bad_files_alone_is_refused_also_when_they_are_skipped(tmp_path: Path) -> None:
    root = fill(tmp_path / "raw", ("train", "val", "test"))
    for path in (root / "train" / "dog").iterdir():
        path.write_text("text")
    with pytest.raises(ValueError, match="no training image of class 'dog'"):
        prepare("image_folder", root, tmp_path / "store", skip_bad=True)
    assert not (tmp_path / "store").exists()
