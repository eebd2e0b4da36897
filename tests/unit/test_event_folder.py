"""Anybody's recordings in class folders: splits are what the folders say, and nothing is guessed."""

import os
from pathlib import Path

import numpy as np
import pytest

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.events.readers import finding
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.sources import prepare, recordings
from support.event_files import (
    made_events,
    write_aedat2,
    write_aedat3,
    write_aedat4,
    write_atis_bin,
    write_csv,
    write_dat,
    write_evt2,
    write_evt3,
    write_evt21,
    write_hdf5,
    write_mat,
    write_npy,
    write_npz,
)
from support.event_sources import fill, same, stored

SENSOR = (34, 40)


def with_size(path: Path, events: EventArrays) -> None:
    write_dat(path, events, SENSOR)


def folders(root: Path, splits: tuple[str, ...] = ("train", "val", "test"), count: int = 4) -> Path:
    for number, split in enumerate(splits):
        for label, name in enumerate(("cat", "dog")):
            names = [f"{k}.dat" for k in range(count)]
            fill(root / split / name, names, with_size, SENSOR, 1000 * number + 100 * label)
    return root


def test_the_store_has_the_events_of_the_files_in_their_order(tmp_path: Path) -> None:
    root = folders(tmp_path / "raw")
    store = prepare("event_folder", root, tmp_path / "store")
    manifest = store.manifest
    assert manifest.splits == {"train": 8, "val": 8, "test": 8}
    assert (manifest.source, manifest.name, manifest.class_names) == ("event_folder", "raw", ("cat", "dog"))
    assert manifest.events is not None
    assert manifest.events.sensor == SENSOR
    for number, split in enumerate(("train", "val", "test")):
        assert store.recordings(split).labels.tolist() == [0] * 4 + [1] * 4
        seeds = [1000 * number + 100 * label + k for label in (0, 1) for k in range(4)]
        found = stored(store, split)
        assert all(same(a, made_events(40, SENSOR, seed)) for a, seed in zip(found, seeds, strict=True))
        assert not same(found[0], made_events(40, SENSOR, seeds[1]))


def test_class_folders_alone_need_a_holdout(tmp_path: Path) -> None:
    root = folders(tmp_path / "raw", ("train",), 10) / "train"
    with pytest.raises(SourceError, match=r"has neither val nor test; .* --option holdout=0\.1"):
        prepare("event_folder", root, tmp_path / "store")
    manifest = prepare("event_folder", root, tmp_path / "store", holdout=0.2).manifest
    assert manifest.splits == {"train": 16, "val": 4, "test": 4}
    assert manifest.audit.same_as == {"test": "val"}
    other = prepare("event_folder", root, tmp_path / "other", holdout=0.2, seed=1).manifest
    assert other.content_hash != manifest.content_hash


def test_a_holdout_beside_a_val_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"option holdout=0\.1: .*val is val; leave the option or the folder out"):
        prepare("event_folder", folders(tmp_path / "raw"), tmp_path / "store", holdout=0.1)
    root = folders(tmp_path / "two", ("train", "test"), 10)
    manifest = prepare("event_folder", root, tmp_path / "store", holdout=0.1).manifest
    assert manifest.splits == {"train": 18, "val": 2, "test": 20}


def test_folders_of_other_classes_are_refused(tmp_path: Path) -> None:
    root = folders(tmp_path / "raw")
    (root / "test" / "dog").rename(root / "test" / "dogs")
    with pytest.raises(SourceError, match=r"differ \(only in train: dog; only in test: dogs\)"):
        prepare("event_folder", root, tmp_path / "store")
    (root / "train").rename(root / "training")
    with pytest.raises(SourceError, match="has val and test, but no train"):
        prepare("event_folder", root, tmp_path / "store")


def test_what_files_do_not_say_is_an_option(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    for label, name in enumerate(("cat", "dog")):
        fill(root / name, ["0.npz", "1.npz", "2.npz"], write_npz, SENSOR, 10 * label)
    with pytest.raises(SourceError, match=r"cat/0\.npz does not state the size of its sensor; set sensor=HxW"):
        prepare("event_folder", root, tmp_path / "store", holdout=0.3)
    store = prepare("event_folder", root, tmp_path / "store", holdout=0.3, sensor="34x40")
    assert sum(map(len, stored(store, "train"))) == 4 * 40
    with pytest.raises(SourceError, match=r"option sensor='34': String should match"):
        prepare("event_folder", root, tmp_path / "other", holdout=0.3, sensor="34")


def test_unnamed_columns_and_the_unit_are_options(tmp_path: Path) -> None:
    root = tmp_path / "raw"

    def write(path: Path, events: EventArrays) -> None:
        write_csv(path, events, header="")

    fill(root / "train" / "a", ["0.csv"], write, SENSOR)
    fill(root / "test" / "a", ["0.csv"], write, SENSOR, 7)
    options = {"sensor": "34x40", "columns": "t,x,y,p"}
    store = prepare("event_folder", root, tmp_path / "us", **options)
    assert same(stored(store, "train")[0], made_events(40, SENSOR))
    in_ms = prepare("event_folder", root, tmp_path / "ms", **options, time="ms")
    assert (stored(in_ms, "train")[0].t == 1000 * made_events(40, SENSOR).t).all()
    with pytest.raises(SourceError, match=r"columns=t,x,y does not name t, x, y and p once each"):
        prepare("event_folder", root, tmp_path / "no", sensor="34x40", columns="t,x,y")


def test_a_folder_may_have_recordings_of_every_format(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    writers = {
        "0.dat": write_dat, "1.raw": write_evt2, "2.raw": write_evt21, "3.raw": write_evt3, "4.bin": write_atis_bin,
        "5.aedat": write_aedat2, "6.aedat": write_aedat3, "7.aedat4": write_aedat4, "8.npy": write_npy,
        "9.npz": write_npz, "a.mat": write_mat, "b.csv": write_csv, "c.h5": write_hdf5,
    }  # fmt: skip
    for split in ("train", "val"):
        (tmp_path / "raw" / split / "a").mkdir(parents=True)
        for place, (name, write) in enumerate(writers.items()):
            write(tmp_path / "raw" / split / "a" / name, made_events(40, (128, 128), place))
    store = prepare("event_folder", tmp_path / "raw", tmp_path / "store", sensor="128x128")
    assert {path.suffix for path in map(Path, writers)} == finding.RECORDING_SUFFIXES - {".aedat2", ".aedat3", ".hdf5"}
    found = stored(store, "train")
    for place, name in enumerate(writers):
        assert same(found[place], made_events(40, (128, 128), place)), name
        assert not same(found[place], made_events(40, (128, 128), place + 1)), name


def test_recordings_of_different_sensors_are_refused(tmp_path: Path) -> None:
    root = folders(tmp_path / "raw")
    write_dat(root / "val" / "dog" / "1.dat", made_events(40, SENSOR), (40, 34))
    wanted = r"0\.dat has sensor 34x40 and .*val/dog/1\.dat has 40x34 .*prepare each size from a directory of its own"
    with pytest.raises(SourceError, match=wanted):
        prepare("event_folder", root, tmp_path / "store", skip_bad=True)
    assert not (tmp_path / "store").exists()


def test_a_damaged_recording_is_refused_by_name_or_listed(tmp_path: Path) -> None:
    root = folders(tmp_path / "raw")
    whole = prepare("event_folder", root, tmp_path / "whole").manifest
    (root / "train" / "cat" / "2.dat").write_bytes(b"")  # a .dat without a header does not state its size
    outside = made_events(40, SENSOR)
    outside.x[7] = 40
    write_dat(root / "train" / "dog" / "1.dat", outside, SENSOR)
    with pytest.raises((SourceError, StoreError), match=r"train/cat/2\.dat does not state"):
        prepare("event_folder", root, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    manifest = prepare("event_folder", root, tmp_path / "store", skip_bad=True).manifest
    assert manifest.splits == {"train": 6, "val": 8, "test": 8}
    assert [Path(one.file).name for one in manifest.audit.skipped or ()] == ["2.dat", "1.dat"]
    assert "event 7 is at x=40" in (manifest.audit.skipped or ())[1].reason
    assert manifest.content_hash != whole.content_hash
    for path in (root / "train" / "cat" / "2.dat", root / "train" / "dog" / "1.dat"):
        path.unlink()
    without = prepare("event_folder", root, tmp_path / "without").manifest
    assert without.content_hash == manifest.content_hash


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    root = folders(tmp_path / "raw")
    (root / "train" / "cat" / "link.dat").symlink_to(tmp_path / "nowhere.dat")
    with pytest.raises(SourceError, match=r"cat/link\.dat cannot be read"):
        prepare("event_folder", root, tmp_path / "store")
    (root / "train" / "cat" / "link.dat").unlink()
    os.mkfifo(root / "val" / "dog" / "pipe.dat")
    with pytest.raises(SourceError, match=r"dog/pipe\.dat is not a regular file"):
        prepare("event_folder", root, tmp_path / "store")


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    root = folders(tmp_path / "raw")
    outside = made_events(40, SENSOR)
    outside.y[3:5] = 34
    write_dat(root / "train" / "dog" / "1.dat", outside, SENSOR)
    cut = root / "train" / "cat" / "0.dat"
    cut.write_bytes(cut.read_bytes() + b"\x01\x02\x03")
    write_dat(root / "train" / "cat" / "1.dat", made_events(0, SENSOR), SENSOR)
    (root / "train" / "cat" / "notes.txt").write_text("x")
    (root / "train" / "cat" / ".hidden.dat").write_bytes(b"x")
    (root / "about.pdf").write_text("x")
    manifest = prepare("event_folder", root, tmp_path / "store", outside="drop", empty="drop").manifest
    audit = (manifest.audit.events or {})["train"]
    assert (audit.recordings, audit.dropped, audit.dropped_recordings, audit.events) == (7, 2, 1, 7 * 40 - 2)
    assert manifest.audit.unused == {
        "bytes after the last whole event of a file": 3,
        "files in no class folder": 1,
        "files that are named as no recording": 1,
        "hidden files (names that start with a dot)": 1,
    }
    with pytest.raises(SourceError, match=r"cat/0\.dat has 3 bytes after its last whole event"):
        prepare("event_folder", root, tmp_path / "strict", outside="drop", strict=True)


def test_equal_files_give_an_equal_store_however_they_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folders(tmp_path / "raw")
    first = prepare("event_folder", root, tmp_path / "first").manifest
    again = prepare("event_folder", root, tmp_path / "again", parallel=1).manifest
    assert first.content_hash == again.content_hash
    assert [len(shards) for shards in first.shards.values()] == [1, 1, 1]
    monkeypatch.setattr(recordings, "SHARD_FILE_BYTES", 1000)
    divided = prepare("event_folder", root, tmp_path / "divided")
    assert [len(shards) for shards in divided.manifest.shards.values()] == [3, 3, 3]
    found = stored(divided, "train")
    whole = stored(prepare("event_folder", root, tmp_path / "first"), "train")
    assert all(same(a, b) for a, b in zip(found, whole, strict=True))


def test_progress_counts_recordings(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    prepare("event_folder", folders(tmp_path / "raw"), tmp_path / "s", progress=lambda *both: told.append(both))
    assert told == [(k, 24) for k in range(1, 25)]


def test_missing_folders_say_what_goes_where(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(SourceError, match=r"raw data of source 'event_folder' not found: .*put train/<class>/"):
        prepare("event_folder", tmp_path / "raw", tmp_path / "store")
    (tmp_path / "raw" / "train" / "a").mkdir(parents=True)
    with pytest.raises(SourceError, match=r"class folder .*train/a contains no recording"):
        prepare("event_folder", tmp_path / "raw", tmp_path / "store", holdout=0.1)


def test_times_that_run_far_back_are_refused_by_name(tmp_path: Path) -> None:
    root = folders(tmp_path / "raw")
    events = made_events(40, SENSOR)
    reversed_ = EventArrays(np.flip(events.t), events.x, events.y, events.p)
    write_dat(root / "train" / "dog" / "1.dat", reversed_, SENSOR)
    with pytest.raises(StoreError, match=r"dog/1\.dat"):
        prepare("event_folder", root, tmp_path / "store")
