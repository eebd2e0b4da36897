"""Damaged and odd recordings: refused with file, value and remedy, or read and counted; never anything else."""

from __future__ import annotations

import random
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.finding import read_recording
from spikefleet_pipelines.events.readers.options import ReadOptions
from spikefleet_pipelines.events.readers.reader import MOST_EVENTS
from spikefleet_pipelines.events.readers.time_order import in_time_order, scan
from spikefleet_pipelines.events.recording import EventArrays
from support import event_files as files
from support.damage import draws
from support.event_files import joined, part, same_events
from support.recordings import read
from unit.test_event_readers import BINARY, WRITERS, write

SENSOR = (128, 128)


def late(number: int, every: int, back: int, seed: int = 0) -> EventArrays:
    """Events of which one in `every` is late."""
    events = files.made_events(number, SENSOR, seed)
    t = events.t.copy()
    t[every::every] = t[every - 1 :: every][: len(t[every::every])] - back
    return EventArrays(t, events.x, events.y, events.p)


@pytest.mark.parametrize("name", ["sized.dat", "a.npz", "evt2.raw"])
def test_an_event_outside_the_sensor_is_refused_or_left_out(name: str, tmp_path: Path) -> None:
    events = files.made_events(500, SENSOR)
    events.x[[40, 90]] = 128
    events.y[41] = 200
    path = write(tmp_path, name, events)
    with pytest.raises(SourceError, match=r"event 40 is at x=128, y=[0-9]+, outside the sensor 128x128") as caught:
        read(path, ReadOptions(sensor=SENSOR))
    assert str(path) in str(caught.value)
    assert "outside=drop" in str(caught.value)
    found, audit = read(path, ReadOptions(sensor=SENSOR, outside="drop"))
    inside = (events.x < 128) & (events.y < 128)
    assert same_events(found, EventArrays(*(getattr(events, name)[inside] for name in ("t", "x", "y", "p"))))
    assert (audit.outside, audit.events) == (3, 497)


def test_upper_bits_of_polarity_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "sized.dat", files.made_events(100, SENSOR))
    raw = bytearray(path.read_bytes())
    raw[-1] |= 0x40
    path.write_bytes(raw)
    with pytest.raises(SourceError, match=r"event 99 has polarity [45], expected 0 or 1"):
        read(path)


def test_times_that_run_back_a_little_are_counted_and_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = late(4000, 150, 700)
    path = write(tmp_path, "sized.dat", events)
    found, audit = read(path)
    assert same_events(found, events)
    latest = np.maximum.accumulate(events.t)
    assert audit.out_of_order == np.count_nonzero(events.t < latest) == 26
    assert audit.largest_step_back == (latest - events.t).max()
    order = np.argsort(events.t, kind="stable")
    expected = EventArrays(*(getattr(events, name)[order] for name in ("t", "x", "y", "p")))
    for most in (MOST_EVENTS, 700, 3):
        monkeypatch.setattr("spikefleet_pipelines.events.readers.reader.MOST_EVENTS", most)
        assert same_events(joined(list(in_time_order(read_recording(path)))), expected)
    assert not same_events(found, expected)


def test_events_in_order_are_passed_on(tmp_path: Path) -> None:
    events = files.made_events(300, SENSOR)
    path = write(tmp_path, "a.npy", events)
    assert same_events(joined(list(in_time_order(read_recording(path)))), events)
    assert not list(in_time_order(read_recording(write(tmp_path, "a.bin", part(events, 0, 0)))))


@pytest.mark.parametrize(
    ("every", "back", "refused"),
    [(101, 900, False), (99, 900, True), (50, 900, True), (1500, 999_000, False), (1500, 1_000_000, True)],
)
def test_times_that_run_back_more_are_refused(every: int, back: int, refused: bool, tmp_path: Path) -> None:
    events = late(3000, every, back)
    events = EventArrays(events.t - events.t[0] + 2_000_000, events.x, events.y, events.p)
    path = write(tmp_path, "a.npz", events)
    if refused:
        with pytest.raises(SourceError, match=r"is not in time order: [0-9]+ of 3,000 events are earlier"):
            next(in_time_order(read_recording(path)))
    else:
        assert scan(read_recording(path)).out_of_order


@pytest.mark.parametrize(
    ("name", "cut", "left"),
    [("sized.dat", 3, 5), ("evt2.raw", 1, 3), ("evt3.raw", 1, 1), ("evt21.raw", 5, 3), ("a.bin", 2, 3),
     ("two.aedat", 7, 1)],
)  # fmt: skip
def test_a_file_cut_inside_an_event_keeps_whole_events(name: str, cut: int, left: int, tmp_path: Path) -> None:
    events = EventArrays(*(getattr(files.made_events(90, SENSOR), field)[::2] for field in ("t", "x", "y", "p")))
    path = write(tmp_path, name, events)
    path.write_bytes(path.read_bytes()[:-cut])
    found, audit = read(path)
    assert audit.cut_bytes == left
    assert same_events(found, part(events, 0, len(found.t)))
    assert 44 - 7 <= len(found.t) < 45
    with pytest.raises(SourceError, match=f"has {left} bytes after its last whole event; replace the file"):
        read(path, ReadOptions(strict=True))


def test_a_file_cut_inside_a_packet(tmp_path: Path) -> None:
    events = files.made_events(60, SENSOR)
    path = tmp_path / "a.aedat"
    path.write_bytes(files.AEDAT3_HEADER + files.aedat3_packet(events) + files.aedat3_packet(events)[:20])
    found, audit = read(path)
    assert same_events(found, events)
    assert audit.cut_bytes == 20
    path.write_bytes(files.AEDAT3_HEADER + files.aedat3_packet(events)[:-3])
    found, audit = read(path)
    assert same_events(found, part(events, 0, 59))
    assert audit.cut_bytes == 5
    path.write_bytes(files.AEDAT3_HEADER + files.aedat3_packet(events, kind=3)[:-9])
    assert read(path)[1].cut_bytes == 60 * 8 - 9


@pytest.mark.parametrize("name", ["lz4.aedat4", "zstd.aedat4", "plain.aedat4"])
def test_an_aedat4_file_that_was_cut_is_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, files.made_events(300, SENSOR))
    raw = path.read_bytes()
    for kept in (15, 17, 60, 400, len(raw) - 700, len(raw) - 150):
        path.write_bytes(raw[:kept])
        with pytest.raises(SourceError, match="is damaged"):
            read(path)


def test_a_packet_that_expands_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.aedat4"
    files.write_aedat4(path, files.made_events(10, SENSOR), codec="zstd", closed=False)
    bomb = files.compressed(bytes(1 << 27), "zstd")
    with path.open("ab") as stream:
        stream.write((1).to_bytes(4, "little") + len(bomb).to_bytes(4, "little") + bomb)
    with pytest.raises(SourceError, match="has more than 67,108,864 bytes"):
        read(path)


def test_a_csv_cut_inside_its_last_line(tmp_path: Path) -> None:
    events = files.made_events(30, SENSOR)
    files.write_csv(tmp_path / "a.csv", events)
    text = (tmp_path / "a.csv").read_text().rstrip("\n").rpartition(",")[0]
    (tmp_path / "a.csv").write_text(text)
    found, audit = read(tmp_path / "a.csv")
    assert same_events(found, part(events, 0, 29))
    assert audit.cut_bytes == len(text.rpartition("\n")[2])


def test_invalid_events_of_aedat3_are_left_out_and_counted(tmp_path: Path) -> None:
    events = files.made_events(50, SENSOR)
    valid = np.arange(50) % 5 > 0
    path = tmp_path / "a.aedat"
    path.write_bytes(files.AEDAT3_HEADER + files.aedat3_packet(events, valid))
    found, audit = read(path)
    assert np.array_equal(found.t, events.t[valid])
    assert audit.invalid == 10
    with pytest.raises(SourceError, match="has 10 invalid events"):
        read(path, ReadOptions(strict=True))


def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    peaks = []
    for number in (400_000, 1_600_000):
        t = 10 + 2 * np.arange(number)
        t[500::500] -= 5
        zeros = np.zeros(number, np.uint16)
        files.write_dat(tmp_path / "a.dat", EventArrays(t, zeros, zeros, zeros.astype(np.uint8)), SENSOR)
        tracemalloc.start()
        assert sum(len(chunk.t) for chunk in in_time_order(read_recording(tmp_path / "a.dat"))) == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 20e6
    assert peaks[1] < 13 * 1_600_000  # less than the events


@pytest.mark.parametrize("name", ["evt2.raw", "evt3.raw", "evt21.raw"])
def test_words_of_no_type_are_refused_with_their_number(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, files.made_events(50, SENSOR))
    raw = bytearray(path.read_bytes())
    raw[-1] = raw[-1] & 15 | 0xB0
    path.write_bytes(raw)
    with pytest.raises(SourceError, match=r"word [0-9]+ has type 0xb, which the encoding does not have"):
        read(path)


def test_headers_that_state_more_than_the_file_has(tmp_path: Path) -> None:
    files.write_npy(tmp_path / "a.npy", files.made_events(50, SENSOR))
    raw = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(raw.replace(b"(50,)", b"(9**9,)"[:5]))
    with pytest.raises(SourceError, match="is damaged"):
        read(tmp_path / "a.npy")
    for size in (b"(99,)", b"(-9,)"):
        (tmp_path / "a.npy").write_bytes(raw.replace(b"(50,)", size))
        with pytest.raises(SourceError, match=r"is damaged: its header states \[-?[0-9]+\]"):
            read(tmp_path / "a.npy")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.dat").mkdir()
    for name in WRITERS:
        with pytest.raises(SourceError, match="cannot be read: No such file"):
            read(tmp_path / name)
    with pytest.raises(SourceError, match="cannot be read: Is a directory"):
        read(tmp_path / "folder.dat")


def test_a_file_that_vanishes_is_an_error_of_the_source(tmp_path: Path) -> None:
    for name in WRITERS:
        reader = read_recording(write(tmp_path, name, files.made_events(20, SENSOR)))
        (tmp_path / name).unlink()
        with pytest.raises(SourceError, match=r"cannot be read|is damaged"):
            list(reader)


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files_give_events_or_an_error_of_the_source(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, files.made_events(300, SENSOR))
    raw = path.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_or_refuse(path)
    outcomes: set[int | str] = set()
    for rng in draws(60 if name in BINARY else 40):
        path.write_bytes(damaged(raw, rng))
        outcomes.add(read_or_refuse(path))
    assert "refused" in outcomes or len(outcomes) > 1
    assert {outcome for outcome in outcomes if isinstance(outcome, str)} <= {"refused"}  # with the file's name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """A file cut anywhere, or with a few flipped bits, more often near its start."""
    if rng.random() < 0.4:
        return raw[: rng.randrange(len(raw))]
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 3, 20))):
        end = rng.choice((len(raw), min(len(raw), 400)))
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def read_or_refuse(path: Path) -> int | str:
    """The number of events, or "refused"; whatever is read is valid."""
    try:
        reader = read_recording(path)
        height, width = reader.sensor or (1 << 16, 1 << 16)
        number = 0
        for chunk in reader:
            assert [chunk.t.dtype, chunk.x.dtype, chunk.y.dtype, chunk.p.dtype] == ["i8", "u2", "u2", "u1"]
            assert 0 < len(chunk.t) == len(chunk.x) == len(chunk.y) == len(chunk.p) <= MOST_EVENTS
            assert chunk.x.max() < width
            assert chunk.y.max() < height
            assert chunk.p.max() <= 1
            number += len(chunk.t)
    except SourceError as error:
        return "refused" if str(path) in str(error) else str(error)
    return number
