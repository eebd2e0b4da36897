"""The built-in sets of events as stores, `data show` of them, and what a run on a store of events is told."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet_pipelines.data_config import DataConfig
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.events.saccade_scenes import SaccadeScenes
from spikefleet_pipelines.events.saccades import Digits, Saccades
from spikefleet_pipelines.events.twins import ApparentMotion
from spikefleet_pipelines.opening import open_or_prepare
from spikefleet_pipelines.sources import find_source, prepare
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions
from spikefleet_pipelines.sources.event_sets import CATEGORY_IDS, EventSetContents
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.reader import Store
from support.event_files import write_csv
from support.event_sources import fill, same, stored

SMALL = {"train": 20, "val": 4, "test": 4}


@pytest.fixture(scope="module")
def digits() -> Digits:
    return read_digits(None, DigitsOptions(), 0).splits


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return prepare("saccade_scenes", None, tmp_path_factory.mktemp("scenes") / "store", **SMALL)


def test_scenes_are_stored_with_their_boxes(digits: Digits, scenes: Store) -> None:
    assert scenes.manifest.splits == SMALL
    assert (scenes.manifest.task, scenes.manifest.category_ids) == ("detection", CATEGORY_IDS)
    events, frames = SaccadeScenes(digits).sample("val", 3)
    assert same(stored(scenes, "val")[3], events)
    split = scenes.recordings("val")
    assert (split.recording(3).t0, split.recording(3).duration) == (0, 200_000)
    found = split.frames(3)
    assert found.times.tolist() == [one.t for one in frames]
    for number, (start, stop) in enumerate(pairwise(found.offsets.tolist())):
        assert np.array_equal(found.boxes[start:stop], frames[number].boxes)
        assert found.category_ids[start:stop].tolist() == [11 * (label + 1) for label in frames[number].labels]
        assert found.track_ids[start:stop].tolist() == list(range(stop - start))


def test_the_seed_is_that_of_the_store(scenes: Store, tmp_path: Path) -> None:
    again = prepare("saccade_scenes", None, tmp_path / "again", **SMALL).manifest
    assert again == scenes.manifest
    other = prepare("saccade_scenes", None, tmp_path / "other", seed=1, **SMALL).manifest
    assert other.content_hash != again.content_hash
    with pytest.raises(SourceError, match="the source is built in and reads no files; remove root"):
        prepare("saccade_scenes", tmp_path, tmp_path / "root")


def written(task: Saccades | ApparentMotion, out: Path) -> tuple[Store, list[tuple[int, int]]]:
    contents, told = EventSetContents(task), []
    with EventStoreWriter(
        out, source="saccades", class_names=contents.class_names, events=contents.events, options={}
    ) as writer:
        contents.write(writer, lambda *both: told.append(both), None)
        writer.commit()
    return Store.open(out), told


def test_saccades_are_recorded_in_batches(digits: Digits, tmp_path: Path) -> None:
    few = {
        split: (images[:count], labels[:count])
        for (split, (images, labels)), count in zip(digits.items(), (150, 10, 10), strict=True)
    }
    store, told = written(Saccades(few), tmp_path / "s")
    assert told == [(128, 170), (150, 170), (160, 170), (170, 170)]
    assert store.manifest.splits == {"train": 150, "val": 10, "test": 10}
    assert store.recordings("train").labels.tolist() == few["train"][1].tolist()
    found = stored(store, "train")
    for row in (0, 127, 128, 149):
        assert same(found[row], Saccades(few).sample("train", row)[0])
    assert not same(found[0], found[1])


@pytest.mark.parametrize("name", ["saccades", "first_digit", "apparent_motion", "saccade_scenes"])
def test_every_set_has_its_source(name: str, digits: Digits) -> None:
    source = find_source(name)
    assert source.events
    assert source.files is None
    contents = source.load_reader()(Path(), source.options(), 0)
    assert isinstance(contents, EventSetContents)
    names = {"saccades": "Saccades", "first_digit": "FirstDigit", "apparent_motion": "ApparentMotion"}
    assert type(contents.task).__name__ == names.get(name, "SaccadeScenes")
    assert set(contents.task.counts) == {"train", "val", "test"}


def test_twins_are_in_the_same_split(digits: Digits, tmp_path: Path) -> None:
    store, told = written(ApparentMotion(digits), tmp_path / "s")
    assert store.manifest.splits == {"train": 1920, "val": 240, "test": 480}
    labels = store.recordings("test").labels
    assert np.array_equal((labels[::2] + 4) % 8, labels[1::2])
    assert told[-1] == (2640, 2640)


def test_a_run_on_images_refuses_a_store_of_events(scenes: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is a store of source 'saccade_scenes', expected 'digits'"):
        open_or_prepare(DataConfig(source="digits", store=scenes.location), tmp_path)
    with pytest.raises(SourceError, match=r"^data\.source=saccade_scenes has recordings of events, but .* is 'image'"):
        open_or_prepare(DataConfig(source="saccade_scenes", root=Path(scenes.location)), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert open_or_prepare(DataConfig(source="digits"), tmp_path).manifest.splits["train"] == 1295


def test_commands_prepare_and_show_events(tmp_path: Path) -> None:
    for split in ("train", "test"):
        fill(tmp_path / "mine" / split / "a", ["0.csv"], lambda path, events: write_csv(path, events, ""), (34, 40))
    out = str(tmp_path / "store")
    words = ["data", "prepare", "event_folder", str(tmp_path / "mine"), "--out", out, "--option", "columns=t,x,y,p"]
    refused = CliRunner().invoke(app, words)
    assert "does not state the size of its sensor" in " ".join(refused.output.split())
    made = CliRunner().invoke(app, [*words, "--option", "sensor=34x40", "--option", "time=ms", "--skip-bad"])
    assert made.exit_code == 0, made.exception
    assert "preparing event_folder: 2 recordings" in made.output.replace("\n", " ")
    shown = json.loads(CliRunner().invoke(app, ["data", "show", out, "--json"]).stdout)
    assert (shown["name"], shown["splits"], shown["events"]["sensor"]) == ("mine", {"train": 1, "test": 1}, [34, 40])
    assert (shown["options"]["columns"], shown["options"]["time"]) == ("t,x,y,p", "ms")
    assert "1 recordings" in CliRunner().invoke(app, ["data", "show", out]).stdout


def test_every_store_of_events_is_drawn(scenes: Store, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    done = CliRunner().invoke(app, ["data", "show", scenes.location, "--n", "2", "--out", str(out)])
    assert done.exit_code == 0, done.exception
    assert out.read_bytes().startswith(b"\x89PNG")
