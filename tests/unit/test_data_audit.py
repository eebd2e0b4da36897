"""Near-duplicates between splits, and what differs between two stores: planted ones are found, and nothing else."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.difference import compare_stores
from spikefleet_pipelines.store.near_duplicates import look_at_all, near_pairs, rows_of, similar_images
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.splitting import image_digests, take_split
from support.labelled_files import boxes_of, csv_lines, picture, size_of

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")

TILES = [
    PIL.Image.fromarray(image[y : y + 64, x : x + 64])
    for image in load_sample_images().images
    for y in range(128, 384, 64)
    for x in range(0, 640, 64)
]
"""Of two photographs, below the sky."""


def save(image: PIL.Image.Image, path: Path, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)


@pytest.fixture(scope="module")
def leaking(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Tiles of two classes; of the val images, three are copies of training images in another form."""
    root = tmp_path_factory.mktemp("leaks")
    for number, tile in enumerate(TILES):
        split = ("train", "val", "test")[0 if number < 50 else 1 + number % 2]
        save(tile, root / "raw" / split / "ab"[number % 3 // 2] / f"{number:03d}.png")
    bright = PIL.Image.fromarray((np.asarray(TILES[0]) * 0.6 + 40).astype(np.uint8))
    save(bright, root / "raw/val/a/900.png")
    save(TILES[1].resize((32, 32), PIL.Image.Resampling.BILINEAR), root / "raw/val/b/901.png")
    save(TILES[45].crop((1, 1, 63, 63)), root / "raw/val/a/902.jpg", quality=90)
    save(TILES[4], root / "raw/test/b/903.png")  # equal, with another class
    save(PIL.Image.new("RGB", (64, 64), (9, 9, 9)), root / "raw/val/a/904.png")
    save(PIL.Image.new("RGB", (64, 64), (90, 90, 90)), root / "raw/train/a/905.png")  # of one grey: nothing to compare
    return prepare("image_folder", root / "raw", root / "store")


def test_copies_in_another_form_are_found_and_nothing_else(leaking: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = look_at_all(leaking)
    pairs = near_pairs(seen)
    digest = {d: (name, row) for name in seen for row, d in enumerate(image_digests(leaking.split(name)))}
    train = [path.name for path in sorted(Path(leaking.location).parent.glob("raw/train/*/*"))]
    assert len(train) == len(leaking.split("train"))
    assert {(train[pair.row], pair.other_split) for pair in pairs if pair.split == "train"} == {
        ("000.png", "val"),
        ("001.png", "val"),
        ("045.png", "val"),
        ("004.png", "test"),
    }
    assert len(rows_of(pairs, "val")) == 3
    assert len(digest) == sum(len(one.sizes) for one in seen.values()) - 1  # the equal one is another matter
    assert [pair.correlation for pair in pairs] == sorted((pair.correlation for pair in pairs), reverse=True)
    assert {tuple(size) for size in seen["val"].sizes.tolist()} == {(64, 64), (32, 32), (62, 62)}
    assert len(near_pairs(seen, 0.5)) > len(pairs)  # the threshold acts
    monkeypatch.setattr("spikefleet_pipelines.store.near_duplicates._MOST_PAIRS", 3)
    with pytest.raises(StoreError, match=r"more than 3 pairs of images are alike to 0\.98, such as row"):
        near_pairs(seen)
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(StoreError, match="the correlation of near-duplicates is"):
            near_pairs(seen, wrong)


def test_near_duplicates_stay_together_in_a_split(tmp_path: Path) -> None:
    for number, tile in enumerate(TILES[-30:]):
        for copy in range(2):
            image = PIL.Image.fromarray((np.asarray(tile) * (1 - 0.3 * copy)).astype(np.uint8))
            save(image, tmp_path / "raw/train" / "ab"[number % 2] / f"{number:02d}{copy}.png")
    store = prepare("image_folder", tmp_path / "raw", tmp_path / "store", holdout=0)
    train = store.split("train")
    groups = similar_images(train, 0.98)
    assert len(set(groups)) == 30
    for out, given, parted_pairs, size in (("near", groups, False, 16), ("plain", None, True, 18)):
        taken = tmp_path / out
        take_split(store, taken, "gate", 0.3, groups=given)
        parted = Store.open(taken)
        seen = look_at_all(parted)
        assert bool(near_pairs(seen)) == parted_pairs
        assert parted.manifest.splits["gate"] == size


def boxes_store(root: Path, changes: dict[int, list[str]], numbers: range) -> Store:
    rows = []
    for number in numbers:
        picture(root / "raw" / f"{number}.png", number, size_of(number))
        rows += changes.get(number, csv_lines(number, f"{number}.png"))
    (root / "raw/labels.csv").write_text("\n".join(rows))
    return prepare("csv", root / "raw", root / "store", holdout=0)


def test_boxes_that_changed_are_counted_by_kind(tmp_path: Path) -> None:
    before = boxes_store(tmp_path / "before", {}, range(8))
    (one, x, y, w, h), second = boxes_of(0)
    keep = csv_lines(0, "0.png")[1]
    changes = {
        0: [f"0.png,{x + 1},{y},{x + w},{y + h},{one}", keep, "0.png,0,0,3,3,cat"],
        1: csv_lines(1, "1.png")[::-1],  # another order is no change
        2: [csv_lines(2, "2.png")[0].rpartition(",")[0] + ",bird", *csv_lines(2, "2.png")[1:]],
        3: csv_lines(3, "3.png")[:1],
    }
    now = boxes_store(tmp_path / "now", changes, range(9))
    found = compare_stores(before, now)
    assert second
    assert found.classes_added == ("bird",)
    assert found.classes_removed == ()
    assert found.added == [("train", 8)]
    assert not found.removed
    assert not found.moved
    assert not found.relabelled
    assert found.boxes == [
        (("train", 0), {"added": 1, "moved": 1}),
        (("train", 2), {"relabelled": 1}),
        (("train", 3), {"removed": 1}),
    ]
    assert found.same == 5
    assert compare_stores(before, before).is_empty
    back = compare_stores(now, before)
    assert back.removed == [("train", 8)]
    assert back.box_changes == {
        "removed": 1,
        "moved": 1,
        "relabelled": 1,
        "added": 1,
    }


def test_labels_and_splits_that_changed(tmp_path: Path, leaking: Store) -> None:
    for name in ("before", "now"):
        for number in range(12):
            moved = name == "now" and number == 11
            split = "val" if number % 4 == 3 and not moved else "train"
            label = "ab"[number % 2] if (name, number) != ("now", 2) else "b"
            save(TILES[number], tmp_path / name / split / label / f"{number:02d}.png")
    save(TILES[20], tmp_path / "now/train/a/20.png")
    (tmp_path / "now/train/a/00.png").unlink()
    save(TILES[21], tmp_path / "now/val/a/21.png")
    save(TILES[21], tmp_path / "before/val/a/21.png")
    stores = {
        name: prepare("image_folder", tmp_path / name, tmp_path / f"{name}_store", holdout=0)
        for name in ("before", "now")
    }
    found = compare_stores(stores["before"], stores["now"])
    assert [(was, now) for _, was, now in found.relabelled] == [("a", "b")]
    assert [(was[0], now[0]) for was, now in found.moved] == [("val", "train")]
    assert (len(found.added), len(found.removed)) == (1, 1)
    assert found.same == 13 - 3
    with pytest.raises(StoreError, match="compare stores of one task"):
        compare_stores(leaking, boxes_store(tmp_path / "boxes", {}, range(3)))


def test_the_commands(leaking: Store, tmp_path: Path) -> None:
    runner = CliRunner()
    plots = ["--out", str(tmp_path / "a.png"), "--pairs", str(tmp_path / "p.png")]
    result = runner.invoke(app, ["data", "audit", leaking.location, *plots])
    assert result.exit_code == 0, result.output
    assert "near-duplicates in val" in result.output
    assert "3 of" in result.output
    for name in ("a.png", "p.png"):
        with PIL.Image.open(io.BytesIO((tmp_path / name).read_bytes())) as image:
            assert image.size != (900, 120)  # the image of a plot that cannot be drawn
    record = json.loads(runner.invoke(app, ["data", "audit", leaking.location, "--json"]).stdout)
    assert record["near_duplicates"] == {"train": 4, "val": 3, "test": 1}
    assert len(record["pairs"]) == 4
    same = runner.invoke(app, ["data", "diff", leaking.location, leaking.location])
    assert "have the same" in same.output
    difference = json.loads(runner.invoke(app, ["data", "diff", leaking.location, leaking.location, "--json"]).stdout)
    assert difference["added"] == []
    assert difference["same"] == 86
    assert runner.invoke(app, ["data", "audit", leaking.location, "--out", "x.jpg"]).exit_code != 0
