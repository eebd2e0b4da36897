"""Fields by name, units and sizes: what a file does not say is refused with the option that says it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.lib.recfunctions import repack_fields

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.finding import read_recording
from spikefleet_pipelines.events.readers.options import ReadOptions, parse_options
from spikefleet_pipelines.events.recording import EventArrays
from support import event_files as files
from support.event_files import same_events
from support.recordings import read

SENSOR = (64, 100)
EVENTS = files.made_events(300, SENSOR)


def columns(order: str = "xytp", dtype: str = "f8", unit: int = 1) -> np.ndarray:
    fields = {"t": EVENTS.t / unit if unit > 1 else EVENTS.t, "x": EVENTS.x, "y": EVENTS.y, "p": EVENTS.p}
    return np.stack([fields[name] for name in order], axis=1).astype(dtype)


@pytest.mark.parametrize(
    "names", [["t", "x", "y", "p"], ["ts", "x", "y", "pol"], ["timestamp", "X", "Y", "Polarity"]], ids="-".join
)
def test_fields_are_found_by_name_in_any_order(names: list[str], tmp_path: Path) -> None:
    rows = files.structured(EVENTS, names)
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "b.npy", repack_fields(rows[[names[2], names[0], names[3], names[1]]]))
    np.savez(tmp_path / "a.npz", **{name: rows[name] for name in reversed(names)})
    np.savez(tmp_path / "b.npz", rows)
    swapped_columns = [names[1], names[2], names[0], names[3]]
    lines = [",".join(str(rows[name][row]) for name in swapped_columns) for row in range(len(rows))]
    (tmp_path / "a.csv").write_text("\n".join([",".join(swapped_columns), *lines]) + "\n")
    for name in ("a.npy", "b.npy", "a.npz", "b.npz", "a.csv"):
        assert same_events(read(tmp_path / name)[0], EVENTS), name


def test_hdf5_groups_and_compound_sets(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "compound.h5", "w") as file:
        file["events"] = files.structured(EVENTS, ["t", "x", "y", "p"])
        file.attrs["height"], file.attrs["width"] = SENSOR
    with h5py.File(tmp_path / "two.h5", "w") as file:
        for name in ("t", "ts", "x", "y", "p"):
            file[f"events/{name}"] = EVENTS.t if name[0] == "t" else getattr(EVENTS, name)
    assert same_events(read(tmp_path / "compound.h5")[0], EVENTS)
    assert read_recording(tmp_path / "compound.h5").sensor == SENSOR
    with pytest.raises(SourceError, match=r"several fields \(t, ts\) for t"):
        read(tmp_path / "two.h5")
    assert same_events(read(tmp_path / "two.h5", ReadOptions(columns=("t:ts", "x:x", "y:y", "p:p")))[0], EVENTS)


def test_the_codec_ecf_is_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((16,))
        properties.set_filter(0x8ECF, h5py.h5z.FLAG_OPTIONAL)
        group = file.create_group("CD")
        kind = h5py.h5t.py_create(np.dtype([("x", "u2"), ("y", "u2"), ("p", "i2"), ("t", "i8")]))
        h5py.h5d.create(group.id, b"events", kind, h5py.h5s.create_simple((16,)), properties)
    with pytest.raises(SourceError, match=r"vendor's codec ECF.*metavision_file_to_dat"):
        read(tmp_path / "a.h5")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["f8", "i8", ">i4", "u8"])
def test_unnamed_columns_are_named_by_the_option(dtype: str, order: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asarray(columns(dtype=dtype), order="F" if order == "F" else "C"))
    options = parse_options({"columns": "x,y,t,p"})
    assert same_events(read(tmp_path / "a.npy", options)[0], EVENTS)
    assert not same_events(read(tmp_path / "a.npy", parse_options({"columns": "y,x,t,p"}))[0], EVENTS)
    with pytest.raises(SourceError, match="4 columns without names; set columns="):
        read(tmp_path / "a.npy")
    with pytest.raises(SourceError, match="4 columns, but columns=x,y,t,p,- names 5"):
        read(tmp_path / "a.npy", parse_options({"columns": "x,y,t,p,-"}))


def test_unnamed_columns_of_csv_and_npz(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "a.csv", EVENTS, header="")
    np.savez(tmp_path / "a.npz", columns("txyp"))
    np.savez(tmp_path / "f.npz", np.asarray(columns("txyp"), order="F"))
    options = ReadOptions(columns=("t", "x", "y", "p"))
    for name in ("a.csv", "a.npz"):
        assert same_events(read(tmp_path / name, options)[0], EVENTS)
        with pytest.raises(SourceError, match="4 columns without names"):
            read(tmp_path / name)
    with pytest.raises(SourceError, match="ascontiguousarray"):
        read(tmp_path / "f.npz", options)


def test_a_column_can_be_skipped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.c_[np.arange(len(EVENTS.t)), columns()])
    assert same_events(read(tmp_path / "a.npy", parse_options({"columns": "-,x,y,t,p"}))[0], EVENTS)


@pytest.mark.parametrize(("unit", "us"), [("us", 1), ("ms", 1000), ("s", 1_000_000)])
def test_times_have_the_unit_of_the_option(unit: str, us: int, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", columns(unit=us))
    lines = [f"{t},{x},{y},{p}" for t, x, y, p in zip(EVENTS.t / us, EVENTS.x, EVENTS.y, EVENTS.p, strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(["t,x,y,p", *lines]))
    options = parse_options({"columns": "x,y,t,p", "time": unit})
    assert same_events(read(tmp_path / "a.npy", options)[0], EVENTS)
    assert same_events(read(tmp_path / "a.csv", parse_options({"time": unit}))[0], EVENTS)
    # Of the formats that state it, the unit is not changed.
    files.write_dat(tmp_path / "a.dat", EVENTS)
    assert same_events(read(tmp_path / "a.dat", parse_options({"time": unit}))[0], EVENTS)


def test_whole_times_in_ms_are_exact(tmp_path: Path) -> None:
    events = EventArrays(EVENTS.t * 1000, EVENTS.x, EVENTS.y, EVENTS.p)
    files.write_npz(tmp_path / "a.npz", EVENTS)
    assert same_events(read(tmp_path / "a.npz", ReadOptions(time="ms"))[0], events)


def test_the_size_comes_from_the_file_or_the_option(tmp_path: Path) -> None:
    files.write_dat(tmp_path / "with.dat", EVENTS, SENSOR)
    files.write_npz(tmp_path / "without.npz", EVENTS)
    assert read_recording(tmp_path / "with.dat").require_sensor() == SENSOR
    option = parse_options({"sensor": "64x100"})
    assert read_recording(tmp_path / "without.npz", option).require_sensor() == SENSOR
    assert read_recording(tmp_path / "with.dat", option).require_sensor() == SENSOR
    with pytest.raises(SourceError, match="has sensor 64x100, but the option is sensor=100x64"):
        read_recording(tmp_path / "with.dat", parse_options({"sensor": "100x64"}))
    with pytest.raises(SourceError, match="does not state the size of its sensor; set sensor=HxW"):
        read_recording(tmp_path / "without.npz").require_sensor()


def test_y_counted_from_below_is_turned(tmp_path: Path) -> None:
    files.write_mat(tmp_path / "a.mat", EVENTS)
    turned, _ = read(tmp_path / "a.mat", ReadOptions(sensor=SENSOR, y_axis="up"))
    assert np.array_equal(turned.y, 63 - EVENTS.y)
    with pytest.raises(SourceError, match="set sensor=HxW"):
        read(tmp_path / "a.mat", ReadOptions(y_axis="up"))


def test_polarities_of_minus_1_are_off_events(tmp_path: Path) -> None:
    for dtype in ("i1", "f4"):
        np.savez(tmp_path / "a.npz", t=EVENTS.t, x=EVENTS.x, y=EVENTS.y, p=(EVENTS.p * 2.0 - 1).astype(dtype))
        assert same_events(read(tmp_path / "a.npz")[0], EVENTS)
    np.savez(tmp_path / "a.npz", t=EVENTS.t, x=EVENTS.x, y=EVENTS.y, p=EVENTS.p == 1)
    assert same_events(read(tmp_path / "a.npz")[0], EVENTS)


FIELDS = {"t": [1.0, 2, 3], "x": [1, 2, 3], "y": [1, 2, 3], "p": [0, 1, 1]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"p": [0, 1, 2]}, "event 2 has p=2, expected 0 or 1"),
        ({"p": [0, -1, 1]}, "polarity 0 at event 0 and -1 at event 1"),
        ({"p": np.array([0, 255, 1], np.uint8)}, "event 1 has p=255"),
        ({"t": [1.0, np.nan, 3]}, "event 1 has t=nan"),
        ({"t": [1.0, np.inf, 3]}, "event 1 has t=inf"),
        ({"t": np.array([1, 2**63, 3], np.uint64)}, "event 1 has t=9223372036854775808"),
        ({"x": [1, 2.5, 3]}, "event 1 has x=2.5, expected a whole number"),
        ({"x": [1, np.nan, 3]}, "event 1 has x=nan"),
        ({"y": [1, 2, -3]}, "event 2 is at x=3, y=-3, outside the sensor"),
        ({"x": [1, 2**40, 3]}, "event 1 is at x=1048576, y=2, outside the sensor 65536x65536"),
        ({"x": [1, 2]}, "one number an event"),
        ({"x": [[1, 2], [3, 4]]}, "one number an event"),
        ({"x": ["a", "b", "c"]}, "expected numbers"),
        ({"x": [1j, 2, 3]}, "expected numbers"),
        ({"x": np.array([1, None, 3], object)}, "are not unpickled"),
        ({"t": np.array(["2020-01-01"] * 3, "M8[us]")}, "expected numbers"),
        ({"pol": [0, 1, 1]}, "several fields .p, pol. for p"),
        ({"y": None}, "no field for y, among 't', 'x', 'p'; set columns=t:NAME"),
    ],
)
def test_values_that_a_field_cannot_have_are_refused(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    fields = {name: value for name, value in {**FIELDS, **changed}.items() if value is not None}
    np.savez(tmp_path / "a.npz", **{name: np.asarray(value) for name, value in fields.items()})
    with pytest.raises(SourceError, match=message):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("t,x,y,p\n1,2,3,on\n", "no table of numbers"),
        ("t,x,y,p\n1,2,3\n4,5,6,1\n", "no table of numbers"),
        ("t,x,y,p\n1,2,,1\n", "without a value for y"),
        ("t,x,y\n1,2,3\n", "no field for p"),
        ("t,x,x,y,p\n1,2,3,4,1\n", "columns of one name"),
        ("t;x;y;p\n1;2;3;1\n", "no field for t, among 't;x;y;p'"),
        ("t,x,y,p\n9e15,1,1,1\n", None),
        ("t,x,y,p\n9.1e15,1,1,1\n", "expected at most 2.53"),
    ],
)
def test_tables(text: str, message: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    if message is None:
        assert len(read(tmp_path / "a.csv")[0].t) == 1
        return
    with pytest.raises(SourceError, match=message):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("sensor", "240", "set sensor=HxW"),
        ("sensor", "0x10", "set sensor=HxW"),
        ("sensor", "99999x1", "set sensor=HxW"),
        ("time", "ns", "set time to us or ms or s"),
        ("columns", "x,y,t", "does not name t, x, y and p once each"),
        ("columns", "x,y,t,p,p", "once each"),
        ("columns", "t:a,x,y,p", "once each"),
        ("outside", "keep", "set outside to refuse or drop"),
        ("strict", "yes", "set strict to true or false"),
        ("sensors", "1x1", "option 'sensors' is unknown; set one of"),
    ],
)
def test_options_are_checked(option: str, value: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse_options({option: value})


def test_options_are_parsed() -> None:
    given = {"sensor": "240x304", "time": "ms", "columns": "x, y,t,p", "outside": "drop", "strict": "true"}
    assert parse_options(given) == ReadOptions((240, 304), "ms", ("x", "y", "t", "p"), "drop", True)
    assert parse_options({}) == ReadOptions()
