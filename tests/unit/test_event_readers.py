"""Readers give the events that were written, exactly: hand-written bytes, round trips, negative controls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers import evt3
from spikefleet_pipelines.events.readers.finding import FORMATS, find_reader, read_recording
from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.events.readers.packed_time import Unwrapper
from spikefleet_pipelines.events.recording import EventArrays
from support import event_files as files
from support.event_files import joined, part, same_events, swapped
from support.recordings import read

SENSOR = (128, 128)
Write = Callable[[Path, EventArrays], None]

WRITERS: dict[str, Write] = {
    "sized.dat": lambda path, events: files.write_dat(path, events, SENSOR),
    "old.dat": lambda path, events: files.write_dat(path, events, SENSOR, kind=0),
    "version1.dat": lambda path, events: files.write_dat(path, events, kind=None),
    "evt2.raw": lambda path, events: files.write_evt2(path, events, SENSOR),
    "evt21.raw": lambda path, events: files.write_evt21(path, events, SENSOR),
    "evt21legacy.raw": lambda path, events: files.write_evt21(path, events, SENSOR, "legacy"),
    "evt3.raw": lambda path, events: files.write_evt3(path, events, SENSOR),
    "a.bin": files.write_atis_bin,
    "two.aedat": files.write_aedat2,
    "three.aedat": files.write_aedat3,
    "lz4.aedat4": lambda path, events: files.write_aedat4(path, events, SENSOR, others=True),
    "zstd.aedat4": lambda path, events: files.write_aedat4(path, events, SENSOR, "zstd", closed=False),
    "plain.aedat4": lambda path, events: files.write_aedat4(path, events, SENSOR, None),
    "a.npy": files.write_npy,
    "a.npz": files.write_npz,
    "packed.npz": lambda path, events: files.write_npz(path, events, packed=True),
    "a.mat": files.write_mat,
    "a.csv": files.write_csv,
    "a.h5": lambda path, events: files.write_hdf5(path, events, SENSOR),
    "top.h5": lambda path, events: files.write_hdf5(path, events, group=""),
}
NO_SIZE = {"version1.dat", "a.bin", "a.npy", "a.npz", "packed.npz", "a.mat", "a.csv", "top.h5"}
BINARY = [name for name in WRITERS if name.endswith((".dat", ".raw", ".bin", ".aedat"))]


def one(t: int, x: int, y: int, p: int) -> EventArrays:
    return EventArrays(np.array([t]), np.array([x], np.uint16), np.array([y], np.uint16), np.array([p], np.uint8))


def write(folder: Path, name: str, events: EventArrays) -> Path:
    if name.endswith(".h5"):
        pytest.importorskip("h5py")
    path = folder / name
    WRITERS[name](path, events)
    return path


@pytest.mark.parametrize("name", WRITERS)
def test_events_are_read_as_written(name: str, tmp_path: Path) -> None:
    # 4 ms between events: more than a wrap of EVT3's time, and overflows of .bin.
    events = files.made_events(9000, SENSOR, step_us=8000)
    path = write(tmp_path, name, events)
    reader = read_recording(path)
    found = joined(list(reader))
    assert same_events(found, events)
    assert not same_events(found, swapped(events))
    assert reader.sensor == (None if name in NO_SIZE else SENSOR)
    assert reader.audit.events == 9000
    assert not reader.audit.out_of_order
    assert not reader.audit.cut_bytes
    assert same_events(joined(list(reader)), events)  # a second iteration reads again
    assert reader.audit.events == 9000


@pytest.mark.parametrize("name", WRITERS)
def test_no_events_are_none(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, part(files.made_events(20, SENSOR), 0, 0))
    found, audit = read(path)
    assert len(found.t) == audit.events == 0


@pytest.mark.parametrize("name", BINARY)
def test_one_flipped_bit_and_wrong_byte_order_are_found(name: str, tmp_path: Path) -> None:
    events = files.made_events(400, SENSOR)
    path = write(tmp_path, name, events)
    raw = path.read_bytes()
    offset = len(raw) - len(raw.split(b"% end\n")[-1]) if b"% end" in raw else 0
    if name in ("sized.dat", "old.dat"):
        offset = raw.index(bytes([0x0C if name == "sized.dat" else 0, 8]))
    if name.endswith(".aedat"):
        offset = raw.index(b"#!END-HEADER\r\n") + 14 if name == "three.aedat" else raw.index(b"1 us\r\n") + 6
    size = {"evt3.raw": 2, "evt2.raw": 4, "evt21.raw": 8, "evt21legacy.raw": 8, "a.bin": 5}.get(name, 4)
    # The byte with the type of a word, packet or file; where there is none, that with the polarity.
    place = {
        "sized.dat": 0, "old.dat": 0, "version1.dat": 7, "a.bin": 2, "two.aedat": 3, "three.aedat": 0,
        "evt21legacy.raw": 3 + 8,
    }.get(name, 2 * size - 1)  # fmt: skip
    bit = {"version1.dat": 4, "a.bin": 7, "two.aedat": 0, "three.aedat": 0}.get(name, 4)
    flipped = bytearray(raw)
    flipped[offset + place] ^= 1 << bit
    words = offset + 2 * (name in ("sized.dat", "old.dat"))
    body = raw[words : len(raw) - (len(raw) - words) % size]
    turned = raw[:words] + np.frombuffer(body, np.uint8).reshape(-1, size)[:, ::-1].tobytes()
    for damaged in (bytes(flipped), turned):
        assert damaged != raw
        path.write_bytes(damaged)
        try:
            found, _ = read(path)
        except SourceError:
            continue
        assert not same_events(found, events)


@pytest.mark.parametrize(
    ("name", "raw", "events"),
    [
        ("a.dat", b"% Version 2\n" + bytes([12, 8, 7, 0, 0, 0, 5, 0xC0, 0, 0x10]), one(7, 5, 3, 1)),
        ("a.dat", bytes([7, 1, 0, 0, 5, 0xC0, 0, 0]), one(263, 5, 3, 0)),
        # Events whose bytes look like a line of the header.
        ("a.dat", b"% Version 2\n" + bytes([12, 8]) + b"% \n\0\5\0\0\0", one(0x0A2025, 5, 0, 0)),
        ("a.raw", b"% evt 2.0\n% end\n" + bytes([1, 0, 0, 0x80, 3, 0x28, 0x40, 0x10]), one(64 + 1, 5, 3, 1)),
        ("a.bin", bytes([5, 3, 0x81, 2, 3]), one(0x010203, 5, 3, 1)),
        ("a.bin", bytes([0, 240, 0, 0, 0, 5, 3, 0, 0, 9]), one(8192 + 9, 5, 3, 0)),
        ("a.aedat", b"#!AER-DAT2.0\r\n" + bytes([0, 0, 127 - 5, 2 * (127 - 3), 0, 0, 0, 7]), one(7, 5, 3, 1)),
        (
            "a.aedat",
            b"#!AER-DAT3.1\r\n#!END-HEADER\r\n"
            + bytes([1, 0, 0, 0, 8, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0])
            + bytes([15, 0, 10, 0, 7, 0, 0, 0]),
            one(2**31 + 7, 5, 3, 1),
        ),
        (
            "a.raw",
            b"% evt 2.1\n% format EVT21;endianness=little\n% end\n"
            + (8 << 60 | 1 << 32).to_bytes(8, "little")
            + (1 << 60 | 2 << 54 | 32 << 43 | 3 << 32 | 1 << 31).to_bytes(8, "little"),
            one(64 + 2, 63, 3, 1),
        ),
    ],
)
def test_hand_written_bytes(name: str, raw: bytes, events: EventArrays, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    found, _ = read(tmp_path / name)
    assert same_events(found, events), found


def test_evt3_words_change_what_holds_for_later_ones(tmp_path: Path) -> None:
    words = [
        0x2801,  # x=1 on, before any time: invalid
        0x8001, 0x6002, 0x0005,  # t=4098, y=5
        0x2801, 0x2002,  # x=1 on, x=2 off
        0x4001,  # a vector before any base: invalid
        0x3810, 0x4801, 0x4001, 0x5081,  # base 16 on: pixels 16 and 27, then 28, then 40 and 47
        0x5001,  # the base has moved on by 12 + 12 + 8
        0xA001, 0xE123, 0x7004, 0xF001,  # triggers and others
        0x8001, 0x2003,  # the same TIME_HIGH keeps the low bits
        0x8002, 0x2004,  # another one clears them
        0x6001, 0x2005,
        0x8000, 0x2006,  # a wrap of less than half the range is none of the counter's, but a step back
        0x8FFF, 0x8000, 0x2007,  # a wrap
    ]  # fmt: skip
    path = tmp_path / "a.raw"
    path.write_bytes(b"% evt 3.0\n% end\n" + np.array(words, "<u2").tobytes())
    found, audit = read(path)
    assert found.x.tolist() == [1, 2, 16, 27, 28, 40, 47, 48, 3, 4, 5, 6, 7]
    assert found.p.tolist() == [1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert set(found.y.tolist()) == {5}
    assert found.t.tolist() == [4098] * 9 + [8192, 8193, 0, 1 << 24]
    assert (audit.invalid, audit.other_words, audit.wraps, audit.out_of_order) == (2, 4, 1, 1)


@pytest.mark.parametrize("block", [3, 64, 1000])
@pytest.mark.parametrize("name", ["evt2.raw", "evt21.raw", "evt3.raw", "a.bin", "three.aedat", "sized.dat"])
def test_blocks_of_any_size_give_the_same(
    name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = files.made_events(700, SENSOR, step_us=8000)
    path = write(tmp_path, name, events)
    for module in ("evt2", "evt21", "evt3", "atis_bin", "aedat3", "dat"):
        monkeypatch.setattr(f"spikefleet_pipelines.events.readers.{module}._BLOCK", block)
    assert block == evt3._BLOCK
    assert same_events(read(path)[0], events)


def test_dat_times_wrap_and_stay_in_the_order_of_the_file(tmp_path: Path) -> None:
    # Late events before, at and after the wrap of 32 bits move none of the others.
    t = np.array([5, 9, 2, 2**31, 2**32 - 5, 2**32 + 3, 2**32 - 2, 2**32 + 7, 2**33 - 2**31 + 2, 2**33 + 1])
    zeros = np.zeros(len(t), np.uint16)
    events = EventArrays(t, zeros, zeros, zeros.astype(np.uint8))
    path = tmp_path / "a.dat"
    files.write_dat(path, events)
    found, audit = read(path)
    assert found.t.tolist() == t.tolist()
    assert (audit.out_of_order, audit.largest_step_back, audit.wraps) == (2, 7, 2)


def test_an_event_before_the_first_time_0_is_no_wrap(tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    path.write_bytes(np.array([3, 0, 2**32 - 4, 0, 5, 0], "<u4").tobytes())
    assert read(path)[0].t.tolist() == [3, -4, 5]


def test_a_counter_that_never_runs_back_counts_long_gaps() -> None:
    gap = np.array([0, 3000, 100], np.uint16)
    assert Unwrapper(12, sorted_source=True)(gap).tolist() == [0, 3000, 4096 + 100]
    assert Unwrapper(12)(gap).tolist() == [0, 3000 - 4096, 100]


def test_aedat3_times_go_beyond_31_bits(tmp_path: Path) -> None:
    events = files.made_events(50, SENSOR)
    events = EventArrays(events.t + 2**31 - 1200, events.x, events.y, events.p)
    path = tmp_path / "a.aedat"
    files.write_aedat3(path, events)
    assert events.t[0] < 2**31 < events.t[-1]
    assert same_events(read(path)[0], events)


def test_chunks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spikefleet_pipelines.events.readers.reader.MOST_EVENTS", 64)
    path = write(tmp_path, "sized.dat", files.made_events(1000, SENSOR))
    assert {len(chunk.t) for chunk in read_recording(path)} == {64, 1000 % 64}


def test_formats_are_found_by_suffix_and_content(tmp_path: Path) -> None:
    events = files.made_events(20, SENSOR)
    found = {name: find_reader(write(tmp_path, name, events)).name for name in WRITERS}
    assert set(found.values()) == {format_.name for format_ in FORMATS}
    assert found["two.aedat"] == "AEDAT 2.0"
    assert found["three.aedat"] == "AEDAT 3.1"
    (tmp_path / "UPPER.DAT").write_bytes((tmp_path / "sized.dat").read_bytes())
    assert find_reader(tmp_path / "UPPER.DAT").name == "Prophesee .dat"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"1 2 3 4", "has suffix '.txt', expected one of"),
        ("a", b"", "has suffix ''"),
        ("a.npy", b"PK\x03\x04", "is named as .npy, but its content is .npz"),
        ("a.dat", b"\x89HDF\r\n\x1a\n", "is named as Prophesee .dat, but its content is HDF5"),
        ("a.aedat", b"#!AER-DAT1.0\r\n", "its content is of no known format"),
        ("a.raw", b"\0\0", "of no known format"),
        ("moorea_bbox.npy", b"\x93NUMPY", "holds boxes, not events"),
        ("user_labels.csv", b"class,start,end", "holds labels, not events"),
        ("annotation_0001.bin", b"", "is an annotation, not events"),
        ("a.raw", b"% evt 4.0\n% end\n", "evt '4.0', expected EVT2, EVT21 or EVT3"),
        ("a.raw", b"% evt 2.1\n% end\n", "set evt21=legacy"),
        ("a.raw", b"% evt 3.0\n% format EVT2\n% end\n", "states both evt 3.0 and format EVT2"),
        ("a.raw", b"% evt 3.0\n% format EVT3;endianness=big\n% end\n", "endianness=big"),
        ("a.raw", b"% evt 3.0\n% format EVT3;height=2;width=3\n% geometry 3x4\n% end\n", "states the sizes"),
        ("a.dat", b"% Version 2\n\x0e\x08", "trigger events"),
        ("a.dat", b"% Version 2\n\x0c\x0a", "10 bytes, expected 0x0c"),
        ("a.dat", b"% Version 2\n\x0c", "ends before the type"),
        ("a.dat", b"% Version 3\n\x0c\x08", "is of version 3"),
        ("a.dat", b"% Height 240\n\x0c\x08", "has Height 240 and Width None"),
        ("a.aedat", b"#!AER-DAT3.1\r\n#Format: RAW\r\n", "has no header from"),
        ("a.aedat", b"#!AER-DAT3.1\r\n#Format: SerializedTS\r\n#!END-HEADER\r\n", "expected RAW"),
        ("a.aedat", b"#!AER-DAT2.0\r\n" + bytes([0x80, 0, 0, 1, 0, 0, 0, 0]), "none of a DVS128"),
        ("a.mat", b"MATLAB 7.3 MAT-file" + bytes(600), "save it with save"),
    ],
)
def test_what_is_no_recording_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message.replace("(", r"\(")) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert not str(caught.value).endswith(".")


def test_a_missing_extra_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(SourceError, match=r"needs h5py; install the extra: pip install 'spikefleet\[hdf5\]'"):
        read(tmp_path / "a.h5")


def test_streams_of_aedat4(tmp_path: Path) -> None:
    path = tmp_path / "a.aedat4"
    files.write_aedat4(path, files.made_events(250, SENSOR), others=True)
    assert read(path)[1].other_words == 3
    raw = path.read_bytes()
    for old, new, message in (
        (b"EVTS</attr>", b"EVTX</attr>", "has 0 streams of events, expected 1"),
        (b"IMUS</attr>", b"EVTS</attr>", "has 2 streams of events, expected 1"),
        (b'"int">128<', b'"int">-28<', "has height 128 and width -28"),
        (b'name="1"', b'name="x"', "has the name 'x'"),
        (b"</dv>", b"</dw>", "header cannot be read"),
        (b"IOHE", b"IOHX", "header cannot be read"),
    ):
        path.write_bytes(raw.replace(old, new, 1))
        with pytest.raises(SourceError, match=message):
            read(path)


def test_evt21_without_order_of_halves_is_read_by_the_option(tmp_path: Path) -> None:
    events = files.made_events(200, SENSOR)
    path = tmp_path / "a.raw"
    files.write_evt21(path, events, SENSOR, halves=None)
    assert same_events(read(path, ReadOptions(evt21="little"))[0], events)
    with pytest.raises(SourceError, match="damaged"):
        read(path, ReadOptions(evt21="legacy"))
