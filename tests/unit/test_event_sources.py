"""Published sets of events, from folders in their layouts: splits, sensors, labels and boxes."""

from pathlib import Path

import numpy as np
import pytest

from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.events.recording import EventArrays
from spikefleet_pipelines.sources import find_source, prepare
from spikefleet_pipelines.sources.dvs_cifar10 import _CLASSES as CIFAR
from support.event_files import (
    GEN1_FIRST,
    made_events,
    write_aedat2,
    write_aedat3,
    write_aedat4,
    write_annotation,
    write_atis_bin,
    write_dat,
    write_mat,
)
from support.event_sources import fill, same, stored

PUBLISHED = ("nmnist", "ncars", "asl_dvs", "dvs_cifar10", "dvs_gesture", "ncaltech101", "gen1")
DVS128 = (128, 128)


def no_size(path: Path, events: EventArrays) -> None:
    write_dat(path, events, None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_files_say_what_goes_where(name: str, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(SourceError, match=rf"'{name}' not found: .* put .* run `spikefleet data prepare {name} DIR"):
        prepare(name, tmp_path / "raw", tmp_path / "store")
    with pytest.raises(SourceError, match="root is not set"):
        prepare(name, None, tmp_path / "store")
    assert find_source(name).events


@pytest.mark.parametrize("inside", ["", "NMNIST"])
def test_nmnist(inside: str, tmp_path: Path) -> None:
    for split, count in (("Train", 4), ("Test", 2)):
        for digit in range(10):
            names = [f"{k:05d}.bin" for k in range(count)]
            seed = 1000 * count + 10 * digit
            fill(tmp_path / "raw" / inside / split / str(digit), names, write_atis_bin, (34, 34), seed)
    store = prepare("nmnist", tmp_path / "raw", tmp_path / "store", holdout=0.25)
    manifest = store.manifest
    assert manifest.splits == {"train": 30, "val": 10, "test": 20}
    assert (manifest.name, manifest.options["holdout"]) == ("nmnist", 0.25)
    assert store.recordings("test").labels.tolist() == [digit for digit in range(10) for _ in range(2)]
    found = stored(store, "test")
    assert all(
        same(found[2 * digit + k], made_events(40, (34, 34), 2000 + 10 * digit + k)) for digit in (0, 9) for k in (0, 1)
    )
    (tmp_path / "raw" / inside / "Train" / "7").rename(tmp_path / "seven")
    with pytest.raises(SourceError, match=r"class folder .*Train/7 is missing"):
        prepare("nmnist", tmp_path / "raw", tmp_path / "other")


def test_ncars(tmp_path: Path) -> None:
    for split, count in (("n-cars_train", 10), ("n-cars_test", 3)):
        for label, name in enumerate(("background", "cars")):
            names = [f"obj_{k:06d}_td.dat" for k in range(count)]
            fill(tmp_path / "raw" / split / name, names, no_size, (100, 120), 100 * count + 20 * label)
    manifest = prepare("ncars", tmp_path / "raw", tmp_path / "store").manifest
    assert manifest.splits == {"train": 18, "val": 2, "test": 6}
    assert manifest.events is not None
    assert manifest.events.sensor == (100, 120)
    with pytest.raises(SourceError, match=r"outside the sensor 50x60 .*set the right sensor=HxW"):
        prepare("ncars", tmp_path / "raw", tmp_path / "small", sensor="50x60")


def test_asl_dvs_counts_rows_from_below(tmp_path: Path) -> None:
    for number, letter in enumerate("abcdefghiklmnopqrstuvwxy"):
        names = [f"{letter}_{k:04d}.mat" for k in range(10)]
        fill(tmp_path / "raw" / letter, names, write_mat, (180, 240), 50 * number, 30)
    store = prepare("asl_dvs", tmp_path / "raw", tmp_path / "store")
    assert store.manifest.splits == {"train": 24 * 7, "val": 24, "test": 48}
    assert store.manifest.options == {"split_rule": "random", "test": 0.2, "holdout": 0.1, "seed": 0}
    every = [events for split in ("train", "val", "test") for events in stored(store, split)]
    made = made_events(30, (180, 240), 0)
    turned = EventArrays(made.t, made.x, (179 - made.y.astype(np.int64)).astype(np.uint16), made.p)
    assert sum(same(events, turned) for events in every) == 1
    assert not any(same(events, made) for events in every)


def cifar(root: Path, count: int = 20, suffix: str = ".aedat") -> Path:
    write = write_aedat2 if suffix == ".aedat" else write_aedat4
    for number, name in enumerate(CIFAR):
        names = sorted(f"cifar10_{name}_{k}{suffix}" for k in range(95, 95 + count))
        fill(root / name, names, write, DVS128, 100 * number, 30)
    return root


def test_splits_of_dvs_cifar10(tmp_path: Path) -> None:
    root = cifar(tmp_path / "raw")
    store = prepare("dvs_cifar10", root, tmp_path / "sew", holdout=0.0)
    assert store.manifest.splits == {"train": 180, "test": 20}
    assert store.manifest.options["split_rule"] == "sew"
    assert store.manifest.events is not None
    assert store.manifest.events.orientation == "aedat2-spikingjelly"
    # By name as text, "100" to "114" come before "95" to "99": the last two are 98 and 99, written as 18 and 19.
    for found, seed in zip(stored(store, "test")[:2], (18, 19), strict=True):
        assert same(found, made_events(30, DVS128, seed))
    hundred = prepare("dvs_cifar10", root, tmp_path / "hundred", holdout=0.0, split_rule="first_hundred")
    assert hundred.manifest.splits == {"train": 150, "test": 50}
    random = prepare("dvs_cifar10", root, tmp_path / "random", split_rule="random")
    assert random.manifest.splits == {"train": 160, "val": 20, "test": 20}
    assert len({one.manifest.content_hash for one in (store, hundred, random)}) == 3
    with pytest.raises(SourceError, match="option split_rule='tet': must be 'sew', 'first_hundred' or 'random'"):
        prepare("dvs_cifar10", root, tmp_path / "no", split_rule="tet")


def test_releases_of_dvs_cifar10_are_told_apart(tmp_path: Path) -> None:
    root = cifar(tmp_path / "raw", 10, ".aedat4")
    manifest = prepare("dvs_cifar10", root, tmp_path / "store").manifest
    assert manifest.events is not None
    assert manifest.events.orientation == "aedat4"
    write_aedat2(root / "truck" / "cifar10_truck_5.aedat", made_events(30, DVS128, 5000))
    with pytest.raises(SourceError, match=r"is AEDAT 4 and .*truck_5\.aedat is AEDAT 2\.0, .*files of one release"):
        prepare("dvs_cifar10", root, tmp_path / "mixed")


def test_dvs_gesture_is_cut_at_its_labels(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    made = {}
    for number, name in enumerate(("user01_led", "user02_led", "user24_led")):
        made[name] = events = made_events(400, DVS128, number)
        write_aedat3(root / f"{name}.aedat", events)
        middle = int(events.t[200])
        # The second gesture starts before the first one ends.
        lines = [f"1,{events.t[0]},{middle + 100}", f"11,{middle},{events.t[-1]}"]
        lines += [f"{k},{events.t[20 * k]},{events.t[20 * k + 30]}" for k in range(2, 11)]
        (root / f"{name}_labels.csv").write_text("class,startTime_usec,endTime_usec\n" + "\n".join(lines) + "\n")
    (root / "trials_to_train.txt").write_text("user01_led.aedat\nuser02_led.aedat\n")
    (root / "trials_to_test.txt").write_text("user24_led.aedat\n\n")
    store = prepare("dvs_gesture", root, tmp_path / "store", holdout=0.0)
    assert store.manifest.splits == {"train": 22, "test": 11}
    assert store.recordings("test").labels.tolist() == [0, 10, *range(1, 10)]
    events = made["user24_led"]
    first, second = stored(store, "test")[:2]
    middle = int(events.t[200])
    assert same(first, events.select(events.t < middle + 100))
    assert same(second, events.select((events.t >= middle) & (events.t < events.t[-1])))
    assert store.recordings("test").recording(1).duration == events.t[-1] - middle
    halved = prepare("dvs_gesture", root, tmp_path / "halved", holdout=0.5)
    assert halved.manifest.splits == {"train": 11, "val": 11, "test": 11}
    assert halved.manifest.audit.cross_split_duplicates == 0  # val is another person than train
    (root / "trials_to_test.txt").write_text("user25_led.aedat\n")
    with pytest.raises(SourceError, match=r"trials_to_test\.txt names 'user25_led\.aedat', which is not in"):
        prepare("dvs_gesture", root, tmp_path / "other")


def test_dvs_gesture_as_tonic_has_it(tmp_path: Path) -> None:
    def write(path: Path, events: EventArrays) -> None:
        np.save(path, np.stack([events.x, events.y, events.p, events.t / 1000], axis=1).astype(np.float64))

    for split, people in (("Train", 2), ("Test", 1)):
        for user in range(people):
            names = [f"{label}.npy" for label in range(11)]
            folder = tmp_path / "raw" / "DVSGesture" / f"ibmGesture{split}" / f"user{user:02d}_led"
            fill(folder, names, write, DVS128, 100 * people + 20 * user)
    store = prepare("dvs_gesture", tmp_path / "raw", tmp_path / "store", holdout=0.5)
    assert store.manifest.splits == {"train": 11, "val": 11, "test": 11}
    # Names as text: 0, 1, 10, 2, ...
    assert store.recordings("test").labels.tolist() == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    assert np.abs(stored(store, "test")[0].t - made_events(40, DVS128, 100).t).max() <= 1


def test_ncaltech101(tmp_path: Path) -> None:
    for number, name in enumerate(("airplanes", "BACKGROUND_Google")):
        names = [f"image_{k:04d}.bin" for k in range(20)]
        fill(tmp_path / "raw" / "Caltech101" / name, names, write_atis_bin, (180, 240), 100 * number)
    manifest = prepare("ncaltech101", tmp_path / "raw", tmp_path / "store").manifest
    assert manifest.class_names == ("BACKGROUND_Google", "airplanes")
    assert manifest.splits == {"train": 28, "val": 4, "test": 8}
    assert manifest.options == {"split_rule": "random", "test": 0.2, "holdout": 0.1, "seed": 0}


def test_ncaltech101_with_boxes(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    contour = np.zeros((2, 4), np.int16)
    for number, name in enumerate(("BACKGROUND_Google", "airplanes", "bonsai")):
        names = [f"image_{k:04d}.bin" for k in range(1, 11)]
        fill(raw / "NCALTECH101" / "Caltech101" / name, names, write_atis_bin, (180, 240), 100 * number)
        (raw / "NCALTECH101" / "Caltech101_annotations" / name).mkdir(parents=True)
        for k in range(1, 11):
            box = np.array([[10 * number, 10 * number + k, 5], [30, 40, 35 + k]], np.int16)
            if number:
                write_annotation(
                    raw / "NCALTECH101/Caltech101_annotations" / name / f"annotation_{k:04d}.bin", box, contour
                )
    store = prepare("ncaltech101", raw, tmp_path / "store", task="detection")
    assert (store.manifest.task, store.manifest.options["task"]) == ("detection", "detection")
    assert (store.manifest.class_names, store.manifest.category_ids) == (("airplanes", "bonsai"), (0, 1))
    assert store.manifest.splits == {"train": 14, "val": 2, "test": 4}
    split = store.recordings("test")
    events = stored(store, "test")
    for row in range(4):
        label = row // 2
        seeds = [k for k in range(10) if same(events[row], made_events(40, (180, 240), 100 * (label + 1) + k))]
        (k,) = (seed + 1 for seed in seeds)
        frames, left = split.frames(row), 10 * (label + 1)
        assert (frames.times.tolist(), frames.category_ids.tolist()) == ([300_000], [label])
        rows = [30, 40, 35 + k]
        assert frames.boxes.tolist() == [[5, 30, left + k - 5, max(rows) - 30]]
    annotation = raw / "NCALTECH101/Caltech101_annotations/bonsai/annotation_0003.bin"
    annotation.rename(annotation.with_name("annotation_0033.bin"))
    with pytest.raises(SourceError, match=r"bonsai/image_0003\.bin has no .*annotation_0003\.bin; add that file"):
        prepare("ncaltech101", raw, tmp_path / "other", task="detection")
    annotation.write_bytes(annotation.with_name("annotation_0033.bin").read_bytes())
    with pytest.raises(SourceError, match=r"annotation_0033\.bin has no recording in Caltech101/bonsai"):
        prepare("ncaltech101", raw, tmp_path / "other", task="detection")


def boxes_of(events: EventArrays, class_id: int = 1) -> np.ndarray:  # type: ignore[type-arg]
    rows = np.zeros(3, GEN1_FIRST)
    rows["ts"] = [events.t[10], events.t[10], events.t[-1] + 1000]
    rows["x"], rows["y"], rows["w"], rows["h"] = [5, -3, 20], [6, 0, 7], [30, 20, 10], [20, 10, 5]
    rows["class_id"], rows["track_id"] = [0, class_id, 0], [4, 5, 4]
    return rows


def test_gen1(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        fill(tmp_path / "raw" / split, ["b_td.dat", "a_td.dat"], no_size, (240, 304), 10 * number)
        for place, name in enumerate(("b", "a")):
            np.save(
                tmp_path / "raw" / split / f"{name}_bbox.npy",
                boxes_of(made_events(40, (240, 304), 10 * number + place)),
            )
    store = prepare("gen1", tmp_path / "raw", tmp_path / "store")
    manifest = store.manifest
    assert manifest.splits == {"train": 2, "val": 2, "test": 2}
    assert (manifest.task, manifest.class_names, manifest.category_ids) == ("detection", ("car", "pedestrian"), (0, 1))
    made = made_events(40, (240, 304), 11)  # val's "a", which comes first
    assert same(stored(store, "val")[0], made)
    frames = store.recordings("val").frames(0)
    assert frames.times.tolist() == [made.t[10], made.t[-1] + 1000]
    assert frames.offsets.tolist() == [0, 2, 3]
    assert frames.boxes.tolist() == [[5, 6, 30, 20], [-3, 0, 20, 10], [20, 7, 10, 5]]
    assert (frames.category_ids.tolist(), frames.track_ids.tolist()) == ([0, 1, 0], [4, 5, 4])
    late = (manifest.audit.events or {})["val"].late_labels
    assert late == 2


def test_flaws_of_gen1_are_refused_by_name(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        fill(tmp_path / "raw" / split, ["a_td.dat"], no_size, (240, 304))
        np.save(tmp_path / "raw" / split / "a_bbox.npy", boxes_of(made_events(40, (240, 304))))
    wrong = boxes_of(made_events(40, (240, 304)), class_id=2)
    np.save(tmp_path / "raw" / "val" / "a_bbox.npy", wrong)
    with pytest.raises(SourceError, match=r"val/a_bbox\.npy: the box at .* us has class 2, expected one of 0, 1"):
        prepare("gen1", tmp_path / "raw", tmp_path / "store")
    wrong = boxes_of(made_events(40, (240, 304)))
    wrong["ts"][2] += 2_000_000
    np.save(tmp_path / "raw" / "val" / "a_bbox.npy", wrong)
    with pytest.raises(StoreError, match=r"val/a_td\.dat: a label is .*same recording"):
        prepare("gen1", tmp_path / "raw", tmp_path / "store")
    (tmp_path / "raw" / "val" / "a_bbox.npy").unlink()
    with pytest.raises(SourceError, match=r"val/a_td\.dat has no a_bbox\.npy beside it"):
        prepare("gen1", tmp_path / "raw", tmp_path / "store")
    assert not (tmp_path / "store").exists()
