"""Preparing files as Ray tasks: the same store as in one process, and the same refusals."""

import io
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import ray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources import prepare, recordings
from spikefleet_pipelines.sources.coco import read_coco
from spikefleet_pipelines.sources.coco_config import CocoOptions
from spikefleet_pipelines.sources.image_folder import read_image_folder
from spikefleet_pipelines.sources.image_folder_config import ImageFolderOptions
from spikefleet_pipelines.sources.labelled_images import LabelledContents
from spikefleet_pipelines.sources.ray_tasks import run_tasks
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.writer import StoreWriter
from support.event_files import made_events, write_dat
from support.event_sources import fill

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("ignore:The image decoding")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root, rng = tmp_path / "raw", np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                stream = io.BytesIO()
                PIL.Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(stream, "JPEG")
                (root / split / name / f"{number:03d}.jpg").write_bytes(stream.getvalue())
    return root


@pytest.fixture
def coco(folder: Path) -> Path:
    """The pictures of the folder's cats and dogs with a box each, in COCO's layout."""
    root = folder.parent / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / split).rename(root / f"{split}2017")
        names = sorted(path.relative_to(root / f"{split}2017") for path in (root / f"{split}2017").rglob("*.jpg"))
        content = {
            "images": [
                {"id": 7 * row + 2, "file_name": str(name), "height": 24, "width": 32} for row, name in enumerate(names)
            ],
            "annotations": [
                {"id": row, "image_id": 7 * row + 2, "category_id": 18 - (name.parts[0] == "cat"), "bbox": [1, 2, 9, 8]}
                for row, name in enumerate(names)
            ],
            "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        }
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def many_shards(contents: LabelledContents, out: Path, parallel: int | None) -> Store:
    """Write with shards of about five images, so that there is something to do in parallel."""
    with StoreWriter(
        out, source="image_folder", class_names=contents.class_names, image=contents.image, options={}, shard_bytes=5000
    ) as writer:
        contents.write(writer, lambda done, total: None, parallel)
        writer.commit()
    return Store.open(out)


def test_tasks_write_the_same_store(ray_on_two_cpus: None, folder: Path, tmp_path: Path) -> None:
    contents = read_image_folder(folder, ImageFolderOptions(), 0)
    here = many_shards(contents, tmp_path / "here", parallel=1)
    assert len(here.manifest.shards["train"]) > 4
    for parallel in (None, 2):
        there = many_shards(contents, tmp_path / f"there{parallel}", parallel)
        assert there.manifest == here.manifest


def test_broken_image_is_named_without_a_traceback(ray_on_two_cpus: None, folder: Path, tmp_path: Path) -> None:
    broken = folder / "train" / "dog" / "007.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(SourceError) as caught:
        prepare("image_folder", folder, tmp_path / "store", parallel=2)
    assert str(caught.value).startswith(str(broken))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_tasks_write_the_same_detection_store(ray_on_two_cpus: None, coco: Path, tmp_path: Path) -> None:
    contents = read_coco(coco, CocoOptions(), 0)

    def written(out: Path, parallel: int | None) -> Store:
        with StoreWriter(
            out,
            source="coco",
            class_names=contents.class_names,
            image=contents.image,
            options={},
            shard_bytes=5000,
            category_ids=contents.category_ids,
            stand_ins=contents.stand_ins,
        ) as writer:
            contents.write(writer, lambda done, total: None, parallel)
            writer.commit()
        return Store.open(out)

    here, there = written(tmp_path / "here", 1), written(tmp_path / "there", 2)
    assert len(here.manifest.shards["train"]) > 4
    assert there.manifest == here.manifest
    # Splits that are added by tasks come to the same as well, and a broken file is named without a traceback.
    out = tmp_path / "added"
    for split in ("train", "val"):
        annotations = coco / "annotations" / f"instances_{split}2017.json"
        options = {"images": coco / f"{split}2017", "annotations": annotations, "split": split}
        store = prepare("coco", None, out, parallel=2, **options)
    assert store.manifest.shards == prepare("coco", coco, tmp_path / "whole", parallel=2).manifest.shards
    broken = coco / "train2017" / "dog" / "007.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(SourceError, match=rf"^{broken} \(image \d+\): the JPEG is truncated or damaged") as caught:
        prepare("coco", coco, tmp_path / "broken", parallel=2)
    assert "\n" not in str(caught.value)


def test_tasks_write_the_same_store_of_events(
    ray_on_two_cpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "SHARD_FILE_BYTES", 500)
    root = tmp_path / "raw"
    for number, split in enumerate(("train", "val")):
        names = [f"{k}.dat" for k in range(6)]
        fill(root / split / "a", names, lambda path, events: write_dat(path, events, (34, 40)), (34, 40), 10 * number)
    told: list[tuple[int, int]] = []
    here = prepare("event_folder", root, tmp_path / "here", parallel=1)
    there = prepare("event_folder", root, tmp_path / "there", parallel=2, progress=lambda *both: told.append(both))
    assert len(here.manifest.shards["train"]) > 2
    assert there.manifest == here.manifest
    assert told[-1] == (12, 12)
    write_dat(root / "train" / "a" / "3.dat", made_events(40, (50, 60)), (34, 40))
    with pytest.raises(SourceError, match=rf"^{root}/train/a/3\.dat: event \d+ is at") as caught:
        prepare("event_folder", root, tmp_path / "broken", parallel=2)
    assert "\n" not in str(caught.value)
    skipped = prepare("event_folder", root, tmp_path / "skipped", parallel=2, skip_bad=True).manifest
    assert (skipped.splits["train"], len(skipped.audit.skipped or ())) == (5, 1)


def test_a_running_ray_is_used_and_left_running(ray_on_two_cpus: None) -> None:
    def number_and_process(number: int) -> tuple[int, int]:
        return number, os.getpid()

    results = list(run_tasks(number_and_process, [0, 1, 2], None, images=3))
    assert [number for number, _ in results] == [0, 1, 2]
    assert os.getpid() not in {process for _, process in results}
    assert ray.is_initialized()


def test_ray_is_started_and_shut_down_when_there_is_much(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.shutdown()
    started = []
    monkeypatch.setattr("spikefleet_pipelines.sources.ray_tasks._WORTH_RAY", 48)
    monkeypatch.setattr(ray, "init", lambda begin=ray.init, **how: started.append(how) or begin(**how))  # type: ignore[func-returns-value]
    store = prepare("image_folder", folder, tmp_path / "store", parallel=None)
    assert [how["num_cpus"] for how in started] == [None]
    assert store.manifest.splits == {"train": 38, "val": 2, "test": 8}
    assert not ray.is_initialized()
    assert prepare("image_folder", folder, tmp_path / "alone", parallel=1).manifest == store.manifest


def test_parallel_below_one_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parallel is 0, expected at least 1"):
        prepare("image_folder", folder, tmp_path / "store", parallel=0)
