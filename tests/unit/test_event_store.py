"""Stores of events: manifest, audit, reading by row, by window and by frame; damage is refused by name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.events.label_frames import LabelFrames
from spikefleet_pipelines.events.readers.finding import read_recording
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.store.event_format import EventFormat
from spikefleet_pipelines.store.event_shard_writer import SourceRecording
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.extension import StoreExtension
from spikefleet_pipelines.store.manifest import ImageFormat, Manifest
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.store.writer import StoreWriter
from support.event_arrays import equal, random_events
from support.event_files import write_dat

SENSOR = (34, 34)


def recording(seed: int) -> EventArrays:
    return random_events(1000 + seed, SENSOR, 300_000, seed)


def boxes(seed: int) -> LabelFrames:
    """Objects at 100, 200 and 300 ms by a clock that starts at 5 s: 1, 2 and 3 of them."""
    random = np.random.default_rng(seed)
    times = np.array([1, 2, 2, 3, 3, 3]) * 100_000 + 5_000_000
    places = random.integers(0, 20, (6, 4)) + 1.0
    return LabelFrames.of_objects(times[::-1], places[::-1], np.array([7, 3, 7, 3, 7, 3]), np.arange(6) % 3)


def write_classes(out: Path, **changes: object) -> Manifest:
    fields = {"source": "test", "class_names": "ab", "events": EventFormat.of(SENSOR), "options": {"seed": 0}}
    with EventStoreWriter(out, **{**fields, "shard_bytes": 15_000, **changes}) as writer:  # type: ignore[arg-type]
        writer.write_recordings("train", (SourceRecording([recording(n)], label=n % 2, t0=0) for n in range(9)))
        writer.write_recordings("test", [SourceRecording([recording(3)], label=1, t0=0)])
        return writer.commit()


def moved(events: EventArrays, by: int) -> EventArrays:
    return EventArrays(events.t + by, events.x, events.y, events.p)


def write_boxes(out: Path) -> Manifest:
    fields = {"source": "test", "class_names": "ab", "events": EventFormat.of(SENSOR), "options": {"seed": 0}}
    with EventStoreWriter(out, category_ids=[3, 7], shard_bytes=15_000, **fields) as writer:  # type: ignore[arg-type]
        given = (
            SourceRecording([moved(recording(n), 5_000_000)], frames=boxes(n), t0=5_000_000, name=str(n))
            for n in range(5)
        )
        writer.write_recordings("train", given)
        return writer.commit()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_classes(tmp_path / "store")
    return tmp_path / "store"


def test_recordings_come_back(out: Path) -> None:
    store = Store.open(out)
    assert store.manifest.splits == {"train": 9, "test": 1}
    assert [shard.rows for shard in store.manifest.shards["train"]] == [4, 4, 1]
    train = store.recordings("train")
    assert train.labels.tolist() == [0, 1] * 4 + [0]
    for row in (0, 3, 4, 8):
        stored = train.recording(row)
        assert equal(stored.events(), recording(row))
        assert (train.label(row), stored.t0) == (row % 2, 0)
        inside = (recording(row).t >= 100_000) & (recording(row).t < 150_000)
        assert equal(stored.window(100_000, 50_000).events(), recording(row).select(inside))
    for row in (9, -1):
        with pytest.raises(IndexError, match=f"row {row} is outside split 'train', expected 0 to 8"):
            train.recording(row)
    assert equal(pickle.loads(pickle.dumps(train)).recording(5).events(), recording(5))
    assert not list(out.glob(".*"))


def test_words_are_views_of_the_map(out: Path) -> None:
    train = Store.open(out).recordings("train")
    first, again = train.recording(1), train.recording(1)
    assert np.shares_memory(first.words, again.words)
    assert np.shares_memory(first.window(0, 100).ticks, again.ticks)
    assert not first.words.flags.writeable


def test_manifest_and_audit(out: Path) -> None:
    manifest = Store.open(out).manifest
    assert manifest.events == EventFormat(sensor=SENSOR, address_bits=13, tick_bits=19, orientation="as-read")
    assert manifest.image_shape is None
    plain = json.loads((out / "manifest.json").read_text())
    assert "image" not in plain
    assert (plain["task"], plain["audit"]["images_per_class"]) == ("classification", {"train": [5, 4], "test": [0, 1]})
    assert (plain["audit"]["duplicates"], plain["audit"]["cross_split_duplicates"]) == (1, 1)
    audit = plain["audit"]["events"]["train"]
    whole = [recording(n) for n in range(9)]
    rates = sorted(len(one) * 1e6 / (one.t[-1] + 1) for one in whole)
    assert audit["events"] == sum(map(len, whole))
    assert audit["on_share"] == sum(int(one.p.sum()) for one in whole) / audit["events"]
    assert [audit[f"rate_{name}"] for name in ("min", "median", "max")] == pytest.approx([rates[0], rates[4], rates[8]])
    assert audit["duration_us"] == sum(int(one.t[-1]) + 1 for one in whole)
    assert (audit["hot_pixels"], audit["hottest"]) == (0, [])


def test_hot_pixels_are_listed(tmp_path: Path) -> None:
    events = random_events(20_000, SENSOR, 300_000)
    events.x[:2000], events.y[:2000] = 7, 9
    with EventStoreWriter(
        tmp_path / "s", source="test", class_names="a", events=EventFormat.of(SENSOR), options={}
    ) as writer:
        writer.write_recordings("train", [SourceRecording([events], label=0)])
        audit = (writer.commit().audit.events or {})["train"]
    (hot,) = audit.hottest
    assert (hot.x, hot.y, audit.hot_pixels) == (7, 9, 1)
    assert hot.events == ((events.x == 7) & (events.y == 9)).sum()
    assert audit.hot_share == hot.events / 20_000


def test_equal_recordings_make_equal_stores(tmp_path: Path) -> None:
    hashes = [write_classes(tmp_path / name).content_hash for name in "ab"]
    other = write_classes(tmp_path / "c", events=EventFormat.of(SENSOR, "aedat4")).content_hash
    assert hashes[0] == hashes[1] != other


def test_frames_of_boxes(tmp_path: Path) -> None:
    manifest = write_boxes(tmp_path / "store")
    train = Store.open(tmp_path / "store").recordings("train")
    assert (manifest.task, len(manifest.shards["train"])) == ("detection", 2)
    for row in (0, 4):
        frames, expected = train.frames(row), boxes(row)
        assert frames.times.tolist() == [100_000, 200_000, 300_000]
        for name in ("offsets", "boxes", "category_ids", "crowd", "areas", "ids", "track_ids"):
            assert np.array_equal(getattr(frames, name), getattr(expected, name)), name
        second = train.annotations(row, 1)
        assert (second.image_id, second.height, second.width) == (3 * row + 1, 34, 34)
        assert np.array_equal(second.boxes, expected.boxes[1:3])
        assert second.labels.tolist() == [[3, 7].index(one) for one in expected.category_ids[1:3]]
    assert manifest.audit.boxes is not None
    assert manifest.audit.events is not None
    assert (manifest.audit.boxes["train"].objects, manifest.audit.boxes["train"].empty_images) == (30, 0)
    audit = manifest.audit.events["train"]
    late = sum(3 for n in range(5) if recording(n).t[-1] < 300_000)
    assert (audit.early_labels, audit.late_labels) == (30, late)
    with pytest.raises(StoreError, match="is for detection: it has frames and no labels"):
        _ = train.labels
    with pytest.raises(IndexError, match="frame 3 is outside recording 0, expected 0 to 2"):
        train.annotations(0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": np.array([5_000_000 + 1_400_000])}, "1,400,000 us after the start, expected 0 to 1,2"),
        ({"times": np.array([4_999_999])}, "-1 us after the start"),
        ({"boxes": np.array([[1.0, 1, np.nan, 2]])}, "box is .*nan.*, expected finite values"),
        ({"category_ids": np.array([4])}, "category id is 4, expected one of the category ids"),
    ],
)
def test_wrong_labels_are_refused(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    good = {"times": np.array([5_100_000]), "boxes": np.ones((1, 4)), "category_ids": np.array([3])}
    fields = {"source": "test", "class_names": "ab", "events": EventFormat.of(SENSOR), "options": {}}
    for given, refused in ((good, False), ({**good, **change}, True)):
        with EventStoreWriter(tmp_path / "s", category_ids=[3, 7], **fields) as writer:  # type: ignore[arg-type]
            one = SourceRecording(
                [moved(recording(1), 5_000_000)], frames=LabelFrames.of_objects(**given), t0=5_000_000
            )
            if refused:
                with pytest.raises(StoreError, match=message):
                    writer.write_recordings("train", [one])
            else:
                writer.write_recordings("train", [one])
    assert not list(tmp_path.iterdir())


def test_parked_boxes_are_counted(tmp_path: Path) -> None:
    times, same = np.array([1, 2, 3, 3]) * 1000, np.array([[1.0, 2, 3, 4]] * 4)
    frames = LabelFrames.of_objects(times, same, np.array([3, 3, 3, 3]), np.array([8, 8, 8, 9]))
    fields = {"source": "test", "class_names": "ab", "events": EventFormat.of(SENSOR), "options": {}}
    with EventStoreWriter(tmp_path / "s", category_ids=[3, 7], **fields) as writer:  # type: ignore[arg-type]
        writer.write_recordings("train", [SourceRecording([recording(1)], frames=frames, t0=0)])
        assert (writer.manifest().audit.events or {})["train"].repeated_boxes == 2


def rewrite(store: Path, column: str, values: pa.Array) -> None:
    """Replace a column of the first shard, with its entry in the manifest."""
    manifest = json.loads((store / "manifest.json").read_text())
    shard = manifest["shards"]["train"][0]
    path = store / shard["file"]
    with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
        batch = reader.get_batch(0)
    columns = [values if name == column else batch.column(name) for name in batch.schema.names]
    changed = pa.record_batch(columns, schema=batch.schema)
    other = path.with_suffix(".new")
    with pa.OSFile(str(other), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(changed)
    other.replace(path)
    shard["bytes"] = path.stat().st_size
    (store / "manifest.json").write_text(json.dumps(manifest))


def test_damaged_shards_are_refused(out: Path) -> None:
    shard = out / "train-00000.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(StoreError, match=r"train-00000.arrow is corrupt: it has .* bytes"):
        Store.open(out)
    at = len(content) // 2  # a word
    shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(StoreError, match=r"train-00000.arrow is corrupt: SHA-256"):
        Store.open(out)
    shard.write_bytes(content)
    Store.open(out)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", pa.array([0, 1, 2, 0]), "row 2: label is 2, expected 0 to 1"),
        ("ticks", [[0, 1000], [0, 1001], [0, 1001], [0, 1003]], "row 2: its index does not fit its events"),
        ("ticks", [[0, 1000], [0, 1001], [0, 1002], [3, 1003]], "row 3: its index does not fit its events"),
        ("ticks", [[0, 1000], [0, 5, 4, 1001], [0, 1002], [0, 1003]], "row 1: its index does not fit its events"),
        ("ticks", [[0, 1000], [], [0, 1002], [0, 1003]], "row 1: its index does not fit its events"),
        ("ticks", [[0, 1000], [0, 1001], [0, 1002], [0, 1003]], None),
    ],
)
def test_shards_that_do_not_fit_are_refused(out: Path, column: str, values: object, message: str | None) -> None:
    kind = pa.large_list(pa.field("item", pa.uint32(), nullable=False))
    rewrite(out, column, pa.array(values, kind) if column == "ticks" else values)  # type: ignore[arg-type]
    store = Store.open(out, verify=False)
    if message is None:
        assert len(store.recordings("train")) == 9
        return
    with pytest.raises(StoreError, match=message):
        store.recordings("train")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("category_id", [[3, 7, 7, 7, 3, 4]] * 4, "image 2, annotation 5: category id is 4"),
        ("frame_t", [[1, 2, 2]] * 4, "row 0: its label times do not fit its objects"),
        ("frame_offsets", [[0, 1, 3, 6]] * 3 + [[0, 1, 6]], "row 3: its label times do not fit its objects"),
        ("track_id", [[1] * 6, [1] * 6, [1] * 6, [1] * 5], "the numbers of boxes and of their fields differ"),
        ("frame_t", [[1, 2, 3]] * 4, None),
    ],
)
def test_frames_that_do_not_fit_are_refused(tmp_path: Path, column: str, values: object, message: str | None) -> None:
    write_boxes(tmp_path / "s")
    kind = pa.int32() if column == "frame_offsets" else pa.int64()
    rewrite(tmp_path / "s", column, pa.array(values, pa.list_(pa.field("item", kind, nullable=False))))
    store = Store.open(tmp_path / "s", verify=False)
    if message is None:
        assert store.recordings("train").frames(0).times.tolist() == [1, 2, 3]
        return
    with pytest.raises(StoreError, match=message):
        store.recordings("train")


def test_bad_recordings_are_skipped_if_asked(tmp_path: Path) -> None:
    def chunks() -> Iterator[EventArrays]:
        yield recording(1)
        raise SourceError("b.dat is damaged")

    given = [SourceRecording([recording(n)], label=n, name=f"{n}.dat") for n in range(2)]
    given.insert(1, SourceRecording(chunks(), label=0, name="b.dat"))
    fields = {"source": "test", "class_names": "ab", "events": EventFormat.of(SENSOR), "options": {}}
    with EventStoreWriter(tmp_path / "s", skip_bad=True, **fields) as writer:  # type: ignore[arg-type]
        writer.write_recordings("train", given)
        manifest = writer.commit()
    assert [(one.file, one.reason) for one in manifest.audit.skipped or ()] == [("b.dat", "b.dat is damaged")]
    train = Store.open(tmp_path / "s").recordings("train")
    assert len(train) == 2
    for row in (0, 1):
        stored = train.recording(row)
        assert equal(moved(stored.events(), stored.t0), recording(row))
    given[1] = SourceRecording(chunks(), label=0, name="b.dat")
    with (
        pytest.raises(SourceError, match=r"b\.dat is damaged"),
        EventStoreWriter(tmp_path / "t", **fields) as writer,  # type: ignore[arg-type]
    ):
        writer.write_recordings("train", given)
    assert not (tmp_path / "t").exists()


def test_a_recording_goes_from_its_file_into_the_store(tmp_path: Path) -> None:
    events = random_events(3000, SENSOR, 300_000)
    late = np.arange(3000)
    late[[100, 2000]] += 4  # two events come later than those that follow them
    given = events.select(np.argsort(late, kind="stable"))
    write_dat(tmp_path / "a.dat", given, SENSOR)
    fields = {"source": "test", "class_names": "a", "events": EventFormat.of(SENSOR), "options": {}}
    with EventStoreWriter(tmp_path / "s", **fields) as writer:  # type: ignore[arg-type]
        reader = read_recording(tmp_path / "a.dat")
        writer.write_recordings("train", [SourceRecording(reader, label=0, name="a.dat", t0=0)])
        audit = (writer.commit().audit.events or {})["train"]
    stored = Store.open(tmp_path / "s").recordings("train").recording(0)
    assert equal(stored.events(), given.select(np.argsort(given.t, kind="stable")))
    assert audit.out_of_order == (np.maximum.accumulate(given.t) > given.t).sum() > 0


def test_images_and_events_are_not_confused(out: Path, tmp_path: Path) -> None:
    store = Store.open(out)
    with pytest.raises(StoreError, match="holds recordings of events, not images"):
        store.split("train")
    with pytest.raises(StoreError, match="no split 'val'"):
        store.recordings("val")
    with pytest.raises(StoreError, match="holds recordings of events"):
        StoreExtension(out, options={})
    image = ImageFormat(encoding="raw", shape=(1, 2, 2))
    with StoreWriter(tmp_path / "i", source="test", class_names="a", image=image, options={}) as writer:
        writer.write_images("train", np.zeros((1, 1, 2, 2), np.uint8), np.zeros(1, np.int64))
        writer.commit()
    with pytest.raises(StoreError, match="holds images, not recordings of events"):
        Store.open(tmp_path / "i").recordings("train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"events": None}, "either the field image or the field events"),
        ({"image": {"encoding": "raw", "shape": [1, 2, 2]}}, "either the field image or the field events"),
        ({"events": {"sensor": [34, 34], "address_bits": 12, "tick_bits": 20}}, "expected 13 and 19"),
        ({"events": {"sensor": [9999, 9999], "address_bits": 29, "tick_bits": 3}}, "9999 x 9999"),
        ({}, None),
    ],
)
def test_wrong_manifests_are_refused(out: Path, change: dict[str, object], message: str | None) -> None:
    plain = json.loads((out / "manifest.json").read_text()) | change
    plain = {key: value for key, value in plain.items() if value is not None}
    (out / "manifest.json").write_text(json.dumps(plain))
    if message is None:
        Store.open(out)
        return
    with pytest.raises(StoreError, match=message):
        Store.open(out)


def test_four_bytes_an_event(tmp_path: Path) -> None:
    events = random_events(1_000_000, SENSOR, 10_000_000)
    fields = {"source": "test", "class_names": "a", "events": EventFormat.of(SENSOR), "options": {}}
    with EventStoreWriter(tmp_path / "s", **fields) as writer:  # type: ignore[arg-type]
        writer.write_recordings("train", [SourceRecording([events], label=0)])
        shard = writer.commit().shards["train"][0]
    assert shard.bytes <= 4.01 * len(events)
