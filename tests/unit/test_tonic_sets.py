"""Data sets of tonic: what tonic reads is in the store, in an order that no directory decides."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.lib import recfunctions

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.event_samples import EventSamples
from spikefleet_pipelines.store.reader import Store
from support.event_arrays import random_events

tonic = pytest.importorskip("tonic", reason="tonic is not installed (the extra spikefleet[tonic], GPL-3.0)")
datasets = pytest.importorskip("tonic.datasets")

WORDS = ("accused", "action")
DTYPE = [("t", np.int32), ("x", np.int16), ("y", np.int16), ("p", np.int8)]


def lip_files(root: Path, shuffle: int = 0) -> Path:
    """DVS-Lip as it is published, with fewer and shorter recordings; tonic asks for 100 files of a part."""
    names = [(part, word, n) for part in ("train", "test") for word in WORDS for n in range(50)]
    random.Random(shuffle).shuffle(names)  # the order in which a directory lists them
    for part, word, n in names:
        events = random_events(
            5 + n % 3, (128, 128), 100_000, seed=n + 1000 * WORDS.index(word) + 10_000 * (part == "test")
        )
        rows = np.empty(len(events), DTYPE)
        rows["t"], rows["x"], rows["y"], rows["p"] = events.t, events.x, events.y, events.p
        path = root / "DVSLip" / "DVS-Lip" / part / word / f"{n}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rows)
    return root


@pytest.fixture(scope="module")
def lips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lip_files(tmp_path_factory.mktemp("lips"))


def contents_of(store: Store, split: str) -> set[tuple[object, ...]]:
    samples = store.samples(split)
    assert isinstance(samples, EventSamples)
    found: set[tuple[object, ...]] = set()
    for row in range(len(samples)):
        recording = samples.recording(row)
        events = recording.events()
        columns = (events.t + recording.t0, events.x, events.y, events.p)
        found.add((int(samples.labels[row]), *(column.astype(np.int64).tobytes() for column in columns)))
    return found


def test_the_events_are_those_of_tonic(lips: Path, tmp_path: Path) -> None:
    store = prepare("tonic", lips, tmp_path / "store", data_set="DVSLip", holdout=0.2)
    manifest = store.manifest
    assert (manifest.source, manifest.class_names) == ("tonic", WORDS)
    assert {split: len(store.samples(split)) for split in manifest.splits} == {"train": 80, "val": 20, "test": 100}
    of_tonic = [datasets.DVSLip(save_to=str(lips), train=train) for train in (True, False)]
    expected = [
        {
            (int(target), *(events[name].astype(np.int64).tobytes() for name in ("t", "x", "y", "p")))
            for events, target in part
        }
        for part in of_tonic
    ]
    assert contents_of(store, "test") == expected[1]
    assert contents_of(store, "train") | contents_of(store, "val") == expected[0] != expected[1]


def test_the_order_of_a_directory_does_not_count(lips: Path, tmp_path: Path) -> None:
    other = lip_files(tmp_path / "other", shuffle=1)
    first = prepare("tonic", lips, tmp_path / "first", data_set="DVSLip")
    second = prepare("tonic", other, tmp_path / "second", data_set="DVSLip")
    assert first.manifest.content_hash == second.manifest.content_hash


class Kept(tonic.dataset.Dataset):  # type: ignore[misc,name-defined]
    """A data set in memory without a test part, whose order differs from one opening to the next."""

    classes: ClassVar = {"cat": 0, "dog": 1}
    sensor_size: tuple[int, int, int] | None = (5, 3, 2)
    opened = 0
    dtype = np.dtype([("x", int), ("y", int), ("t", int), ("p", bool)])

    def __init__(self, save_to: str) -> None:
        super().__init__(save_to)
        self.data: list[Any] = []
        order = list(range(20))
        random.Random(Kept.opened).shuffle(order)
        Kept.opened += 1
        for n in order:
            events = random_events(60, (3, 5), 1000, seed=n)
            rows = np.empty(len(events), Kept.dtype)
            rows["t"], rows["x"], rows["y"], rows["p"] = events.t, events.x, events.y, events.p
            self.data.append(rows)
            self.targets.append(n % 2)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index], self.targets[index]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    monkeypatch.setattr(datasets, "KEPT", Kept, raising=False)
    return Kept


def test_a_set_in_memory_without_a_test_part(kept: type[Kept], tmp_path: Path) -> None:
    stores = [
        prepare("tonic", tmp_path, tmp_path / name, data_set="KEPT", test=0.3, holdout=0.0) for name in ("one", "two")
    ]
    assert {split: len(stores[0].samples(split)) for split in ("train", "test")} == {"train": 14, "test": 6}
    assert stores[0].manifest.class_names == ("cat", "dog")
    assert stores[0].recordings("train").layout.sensor == (3, 5)
    assert stores[0].manifest.content_hash == stores[1].manifest.content_hash


def test_a_sensor_that_is_given_counts(kept: type[Kept], tmp_path: Path) -> None:
    store = prepare("tonic", tmp_path, tmp_path / "store", data_set="KEPT", sensor="7x9")
    assert store.recordings("train").layout.sensor == (7, 9)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"data_set": "KEPTT"}, "tonic has no data set 'KEPTT'; set the option data_set to one of ASLDVS"),
        ({}, {"data_set": None}, "source 'tonic' reads many data sets; set the option data_set to one of ASLDVS"),
        ({"sensor_size": None}, {}, "tonic does not state the sensor of KEPT; set --option sensor=HxW"),
        ({"sensor_size": (5, 2, 2)}, {}, r"sample \d+ of KEPT \(\w+\) has y from 0 to 2, but the sensor is 2x5"),
        ({"fields": ["x", "t", "p"]}, {}, "fields x, t, p and no y: it is not of an event camera"),
        ({"target": 1.5}, {}, "sample 0 of tonic's KEPT has the target 1.5, expected a class"),
        ({"target": {"boxes": 1}}, {}, "expected a class; its samples are not for classification"),
        ({"fails": True}, {}, "tonic cannot open KEPT in .*: OSError: the disk is away"),
        ({"leaves": True}, {}, "tonic cannot open KEPT in .*: download it by hand"),
        ({"downloads": True}, {}, "does not have the whole of tonic's KEPT .* by --option download=true"),
    ],
)
def test_what_is_no_set_of_events_with_classes_is_refused(
    change: dict[str, Any], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Changed(Kept):
        def __init__(self, save_to: str) -> None:
            if "fails" in change:
                raise OSError("the disk is away")
            if "leaves" in change:
                print("download it by hand")
                raise SystemExit
            if "downloads" in change:
                self.download()
            super().__init__(save_to)
            if "fields" in change:
                self.data = [recfunctions.repack_fields(rows[change["fields"]]) for rows in self.data]
            if "target" in change:
                self.targets = [change["target"]] * len(self.data)

    if "sensor_size" in change:
        Changed.sensor_size = change["sensor_size"]
    monkeypatch.setattr(datasets, "KEPT", Changed, raising=False)
    with pytest.raises(SourceError, match=message):
        prepare("tonic", tmp_path, tmp_path / "store", **{"data_set": "KEPT", **options})
    assert not (tmp_path / "store").exists()
