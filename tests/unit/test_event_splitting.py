"""A split taken out of training recordings: nothing lost, nothing twice, twins together; and gate stores of events."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.retrain_config import RetrainConfig
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.gates.gate_store import check_gate_store, open_gate_store
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.events.label_frames import OBJECT_FIELDS
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_reader import EventSplit
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_splitting import recording_digests, timeless_digests
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.splitting import take_split
from support.event_arrays import random_events
from support.event_stores import boxed_store, labelled_store

SENSOR = (12, 16)
PARTS = 2
PART_US = 50_000


def twin_store(out: Path, twins: int) -> Store:
    """Rows 2 n and 2 n + 1 are the same two parts in both orders, of classes 0 and 1; clocks start at 1,000,000."""
    recordings = []
    for n in range(twins):
        parts = [random_events(40, SENSOR, PART_US, seed=PARTS * n + k) for k in range(PARTS)]
        for label, order in enumerate((parts, parts[::-1])):
            moved = [EventArrays(p.t + 1_000_000 + PART_US * k, p.x, p.y, p.p) for k, p in enumerate(order)]
            recordings.append(SourceRecording(moved, label, name=str(n), t0=1_000_000, duration=PARTS * PART_US))
    with EventStoreWriter(
        out, source="saccades", class_names=("a", "b"), events=EventFormat.of(SENSOR), options={}, name="twins"
    ) as writer:
        writer.write_recordings("train", recordings)
        writer.write_recordings("val", recordings[:2])
        writer.commit()
    return Store.open(out)


def rows_of(split: EventSplit) -> Counter[object]:
    """Everything that a split has of each recording."""
    rows: Counter[object] = Counter()
    for row in range(len(split)):
        recording = split.recording(row)
        plain = (recording.words.tobytes(), recording.ticks.tobytes(), recording.t0, recording.duration)
        if split.is_detection:
            frames = split.frames(row)
            rows[plain, *(getattr(frames, name).tobytes() for name in ("times", "offsets", *OBJECT_FIELDS))] += 1
        else:
            rows[plain, split.label(row)] += 1
    return rows


@pytest.mark.parametrize("kind", ["labels", "boxes", "twins"])
def test_training_recordings_are_divided_and_all_else_is_the_same(kind: str, tmp_path: Path) -> None:
    if kind == "labels":
        store = labelled_store(tmp_path / "store", "saccades", SENSOR, [50] * 40, classes=4)
    elif kind == "boxes":
        store = boxed_store(tmp_path / "store", "saccade_scenes", (32, 48), 20, events=30)
    else:
        store = twin_store(tmp_path / "store", 10)
    before = rows_of(store.recordings("train"))
    manifest = take_split(store, tmp_path / "out", "gate", 0.2, seed=3, shard_bytes=2_000)
    out = Store.open(tmp_path / "out", verify=True)
    train, gate = (rows_of(out.recordings(name)) for name in ("train", "gate"))
    assert train + gate == before
    assert not train.keys() & gate.keys()
    assert len(out.recordings("gate")) == 0.2 * before.total()
    assert len(manifest.shards["train"]) > 1
    assert rows_of(out.recordings("val")) == rows_of(store.recordings("val"))
    assert (manifest.events, manifest.name, manifest.category_ids) == (
        store.manifest.events,
        store.manifest.name,
        store.manifest.category_ids,
    )
    assert manifest.options["taken_gate"] == {
        "split": "gate",
        "fraction": 0.2,
        "seed": 3,
        "of": store.manifest.content_hash,
    }


def test_recordings_of_the_same_events_at_other_times_stay_together(tmp_path: Path) -> None:
    store = twin_store(tmp_path / "store", 10)
    split = store.recordings("train")
    assert len(set(recording_digests(split))) == 20
    assert len(set(timeless_digests(split))) == 10
    shared = []
    for name, groups in (("together", None), ("alone", recording_digests(split))):
        take_split(store, tmp_path / name, "gate", 0.3, groups=groups)
        out = Store.open(tmp_path / name)
        parts = [set(timeless_digests(out.recordings(part))) for part in ("train", "gate")]
        shared.append(len(parts[0] & parts[1]))
    assert shared[0] == 0
    assert shared[1] > 0, "without groups twins are divided, or this test shows nothing"


def test_the_choice_depends_on_seed_and_events_alone(tmp_path: Path) -> None:
    store = labelled_store(tmp_path / "store", "saccades", SENSOR, [30] * 40, classes=4)
    gates = []
    for number, seed in enumerate((0, 0, 1)):
        take_split(store, tmp_path / f"out{number}", "gate", 0.2, seed)
        gates.append(rows_of(Store.open(tmp_path / f"out{number}").recordings("gate")))
    assert gates[0] == gates[1] != gates[2]
    labels = Store.open(tmp_path / "out0").recordings("gate").labels
    assert np.bincount(labels).tolist() == [2, 2, 2, 2]


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    store = labelled_store(tmp_path / "store", "saccades", SENSOR, [30] * 8, classes=4)
    with pytest.raises(StoreError, match=r"of the 8 training recordings of .* is no recording of any class"):
        take_split(store, tmp_path / "out", "gate", 0.01)
    assert not (tmp_path / "out").exists()
    run = CliRunner().invoke(app, ["data", "split", str(tmp_path / "store"), "--gate", "0.5", "--near", "0.9"])
    assert run.exit_code == 2
    assert "--near=0.9 compares thumbnails of images, but" in " ".join(run.output.split())
    made = CliRunner().invoke(app, ["data", "split", str(tmp_path / "store"), "--gate", "0.5"])
    assert made.exit_code == 0, made.output
    assert Store.open(tmp_path / "store-gate").manifest.splits["gate"] == 4


def test_gate_stores_of_events_are_opened_and_checked(tmp_path: Path) -> None:
    whole = labelled_store(tmp_path / "store", "saccades", SENSOR, [30] * 40, classes=4)
    take_split(whole, tmp_path / "divided", "gate", 0.2)
    divided, settings = Store.open(tmp_path / "divided"), RetrainConfig(gate_store="divided")
    gate = open_gate_store(settings, tmp_path)
    data = DataSummary.of(divided.manifest)
    assert len(gate.split) == 8
    assert check_gate_store(gate, data, divided) == gate
    with pytest.raises(UserError, match=r"8 of its 8 different images are also in the split 'train'"):
        check_gate_store(gate, DataSummary.of(whole.manifest), whole)
    other = labelled_store(tmp_path / "other", "saccades", (12, 20), [30] * 4, classes=4)
    with pytest.raises(UserError, match="has events of 16x12 pixels read as as-read, expected events of 20x12 pixels"):
        check_gate_store(gate, DataSummary.of(other.manifest), other)
    with pytest.raises(UserError, match="events of 16x12 pixels read as as-read, expected images, as the training"):
        check_gate_store(gate, replace(data, sensor=None, orientation=""), None)
