"""Writes recordings of all formats from arrays, binary ones byte by byte; shares no code with the readers.

Each writer is checked by an independent reader: tests/unit/test_event_writers.py.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spikefleet_pipelines.events.recording import EventArrays, Sensor


def made_events(number: int, sensor: Sensor, seed: int = 0, step_us: int = 40) -> EventArrays:
    """Events in time order, with runs of neighbouring pixels at one time, as vectors encode them."""
    rng = np.random.default_rng(seed)
    height, width = sensor
    t = np.cumsum(rng.integers(0, step_us, number)) + 1000
    x, y, p = rng.integers(0, width, number), rng.integers(0, height, number), rng.integers(0, 2, number)
    for start in range(0, number - 8, 16):
        run = slice(start, start + 8)
        t[run], y[run], p[run] = t[start], y[start], p[start]
        x[run] = (x[start] * (width - 20) // width) + np.sort(rng.choice(20, 8, replace=False))
    t = np.maximum.accumulate(t)
    return EventArrays(t.astype(np.int64), x.astype(np.uint16), y.astype(np.uint16), p.astype(np.uint8))


def swapped(events: EventArrays) -> EventArrays:
    """The events with x and y exchanged, for negative controls."""
    return EventArrays(events.t, events.y, events.x, events.p)


def same_events(first: EventArrays, second: EventArrays) -> bool:
    """Whether all fields are equal, in dtype too."""
    pairs = ((getattr(first, name), getattr(second, name)) for name in ("t", "x", "y", "p"))
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def write_dat(path: Path, events: EventArrays, sensor: Sensor | None = None, kind: int | None = 0x0C) -> None:
    """Prophesee .dat; kind 0 is Event2D, None version 1 without a header."""
    header = b""
    if kind is not None:
        lines = [b"Data file containing %s events" % (b"CD" if kind else b"Event2D"), b"Version 2"]
        lines += [b"Date 2017-6-20 15:42:31"]
        lines += [b"Height %d" % sensor[0], b"Width %d" % sensor[1]] if sensor else []
        header = b"".join(b"%% %s\n" % line for line in lines) + bytes([kind, 8])
    words = np.empty((len(events.t), 2), "<u4")
    words[:, 0] = events.t % 2**32
    words[:, 1] = events.x.astype("u4") | events.y.astype("u4") << 14 | events.p.astype("u4") << 28
    path.write_bytes(header + words.tobytes())


def raw_header(encoding: str, version: str, sensor: Sensor | None, more: str = "") -> bytes:
    """The header of a Prophesee RAW file."""
    size = f";height={sensor[0]};width={sensor[1]}" if sensor else ""
    geometry = f"% geometry {sensor[1]}x{sensor[0]}\n" if sensor else ""
    return f"% camera made\n% evt {version}\n% format {encoding}{size}{more}\n{geometry}% end\n".encode()


def write_evt2(path: Path, events: EventArrays, sensor: Sensor | None = None) -> None:
    """Prophesee RAW EVT2."""
    words: list[int] = []
    high = None
    for t, x, y, p in _rows(events):
        if high != t >> 6:
            high = t >> 6
            words.append(8 << 28 | high % 2**28)
        words.append(p << 28 | (t & 63) << 22 | x << 11 | y)
    path.write_bytes(raw_header("EVT2", "2.0", sensor) + np.array(words, "<u4").tobytes())


def write_evt21(path: Path, events: EventArrays, sensor: Sensor | None = None, halves: str | None = "little") -> None:
    """Prophesee RAW EVT2.1; halves: as the header states it, None for a header that does not."""
    words: list[int] = []
    high, last = None, (-1, -1, -1, -1, 0)
    for t, x, y, p in _rows(events):
        group, bit = (t, x // 32, y, p), x % 32
        if high != t >> 6:
            high = t >> 6
            words.append(8 << 60 | (high % 2**28) << 32)
            last = (-1, -1, -1, -1, 0)
        if (*group, 0) == (*last[:4], 0) and 1 << bit > last[4]:
            words[-1] |= 1 << bit
        else:
            words.append(p << 60 | (t & 63) << 54 | (x - bit) << 43 | y << 32 | 1 << bit)
        last = (*group, 1 << bit)
    raw = np.array(words, "<u8")
    if halves == "legacy":
        raw = raw >> np.uint64(32) | raw << np.uint64(32)
    more = f";endianness={halves}" if halves else ""
    path.write_bytes(raw_header("EVT21", "2.1", sensor, more) + raw.tobytes())


def write_evt3(path: Path, events: EventArrays, sensor: Sensor | None = None) -> None:
    """Prophesee RAW EVT3: neighbouring pixels of one time, row and polarity as vectors, others one by one."""
    words: list[int] = []
    high, low, row = None, None, None
    rows = list(_rows(events))
    at = 0
    while at < len(rows):
        t, x, y, p = rows[at]
        for passed in range(high + 1 if high is not None and t >> 12 > high else t >> 12, (t >> 12) + 1):
            if passed != high:  # every value of the high counter is sent, as cameras do
                words.append(8 << 12 | passed % 4096)
                high, low = passed, None
        if low != t & 4095:
            low = t & 4095
            words.append(6 << 12 | low)
        if row != y:
            row = y
            words.append(y)
        run = [x]
        while at + len(run) < len(rows) and _continues(rows[at + len(run)], (t, run[-1], y, p), x + 32):
            run.append(rows[at + len(run)][1])
        if len(run) == 1:
            words.append(2 << 12 | p << 11 | x)
        else:
            bits = sum(1 << (one - x) for one in run)
            words += [3 << 12 | p << 11 | x, 4 << 12 | bits & 4095, 4 << 12 | bits >> 12 & 4095, 5 << 12 | bits >> 24]
        at += len(run)
    path.write_bytes(raw_header("EVT3", "3.0", sensor) + np.array(words, "<u2").tobytes())


def write_atis_bin(path: Path, events: EventArrays) -> None:
    """.bin of N-MNIST; a row of y = 240 for each 2^13 us that do not fit into 23 bits."""
    raw = bytearray()
    overflows = 0
    for t, x, y, p in _rows(events):
        while t - overflows * 2**13 >= 2**23:
            raw += bytes([0, 240, 0, 0, 0])
            overflows += 1
        raw += bytes([x, y]) + (p << 23 | (t - overflows * 2**13)).to_bytes(3, "big")
    path.write_bytes(bytes(raw))


def write_aedat2(path: Path, events: EventArrays) -> None:
    """AEDAT 2.0 of a DVS128."""
    header = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Timestamps tick is 1 us\r\n"
    address = (127 - events.x.astype(">u4")) << 8 | (127 - events.y.astype(">u4")) << 1 | (1 - events.p.astype(">u4"))
    words = np.stack([address, events.t % 2**32], axis=1).astype(">u4")
    path.write_bytes(header + words.tobytes())


AEDAT3_HEADER = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#Start-Time: 2016-1-1\r\n#!END-HEADER\r\n"


def aedat3_packet(events: EventArrays, valid: NDArray[np.bool_] | None = None, kind: int = 1) -> bytes:
    """One packet; all its times share their bits from 31 on."""
    number = len(events.t)
    good = np.ones(number, "u4") if valid is None else valid.astype("u4")
    words = np.empty((number, 2), "<u4")
    words[:, 0] = good | events.p.astype("u4") << 1 | events.y.astype("u4") << 2 | events.x.astype("u4") << 17
    words[:, 1] = events.t % 2**31
    overflow = int(events.t[0]) >> 31 if number else 0
    return struct.pack("<HHIIIIII", kind, 1, 8, 4, overflow, number, number, int(good.sum())) + words.tobytes()


def write_aedat3(path: Path, events: EventArrays, packet: int = 100) -> None:
    """AEDAT 3.1, with a packet of another kind among those of polarity."""
    parts = [AEDAT3_HEADER]
    borders = sorted({0, len(events.t), *range(0, len(events.t), packet), *np.flatnonzero(np.diff(events.t >> 31)) + 1})
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        parts.append(aedat3_packet(part(events, start, end)))
        if number == 0:
            parts.append(struct.pack("<HHIIIIII", 0, 1, 8, 4, 0, 1, 1, 1) + bytes(8))
    path.write_bytes(b"".join(parts))


def write_aedat4(
    path: Path,
    events: EventArrays,
    sensor: Sensor = (128, 128),
    codec: str | None = "lz4",
    closed: bool = True,
    others: bool = False,
) -> None:
    """AEDAT 4 with 100 events a packet.

    Not closed: without the list of packets at its end, as a recording that was stopped. Others: with packets of another
    stream, whose content is none.
    """
    size = f'<attr key="sizeX" type="int">{sensor[1]}</attr><attr key="sizeY" type="int">{sensor[0]}</attr>'
    kinds = [f'<attr key="typeIdentifier" type="string">{kind}</attr>' for kind in ("IMUS", "EVTS")]
    nodes = f'<node name="0">{kinds[0]}</node><node name="1">{kinds[1]}<node name="info">{size}</node></node>'
    text = f'<dv version="2.0"><node name="outInfo" path="/outInfo/">{nodes}</node></dv>'.encode()
    packets = b""
    for start in range(0, len(events.t), 100):
        table = compressed(_aedat4_table(part(events, start, start + 100)), codec)
        packets += struct.pack("<ii", 0, 4) + b"none" if others else b""
        packets += struct.pack("<ii", 1, len(table)) + table
    # After the size: place of the root table, identifier; places of the table's fields; the table: place of that list,
    # compression, end of the packets, place of the text.
    rest = struct.pack("<I4s5H2x", 20, b"IOHE", 10, 20, 4, 8, 16)
    end = 14 + 4 + len(rest) + 20 + 4 + len(text) + 1 + len(packets) if closed else -1
    rest += struct.pack("<iiqII", 12, {None: 0, "lz4": 1, "zstd": 3}[codec], end, 4, len(text)) + text + b"\0"
    path.write_bytes(
        b"#!AER-DAT4.0\r\n"
        + struct.pack("<I", len(rest))
        + rest
        + packets
        + (compressed(struct.pack("<II4s2x3HiII", 28, 16, b"FTAB", 6, 8, 4, 6, 4, 0), codec) if closed else b"")
    )


def compressed(raw: bytes, codec: str | None) -> bytes:
    """An LZ4 frame or Zstandard."""
    return raw if codec is None else pa.Codec(codec).compress(raw, asbytes=True)


def _aedat4_table(events: EventArrays) -> bytes:
    """A flatbuffer with one field, the list of events."""
    rows = np.zeros(len(events.t), "V16")
    fields = rows.view(np.dtype([("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "u1"), ("", "V3")]))
    for name in ("t", "x", "y", "p"):
        fields[name] = getattr(events, name)
    rest = struct.pack("<I4s2x3HiII", 16, b"EVTS", 6, 8, 4, 6, 4, len(rows)) + rows.tobytes()
    return struct.pack("<I", len(rest)) + rest


def write_npy(path: Path, events: EventArrays, names: str = "txyp") -> None:
    """A structured array with such names of t, x, y, p."""
    np.save(path, structured(events, list(names)))


def structured(events: EventArrays, names: list[str]) -> NDArray[np.void]:
    """The events as one structured array."""
    rows = np.empty(len(events.t), list(zip(names, ("i8", "u2", "u2", "u1"), strict=True)))
    for name, values in zip(names, (events.t, events.x, events.y, events.p), strict=True):
        rows[name] = values
    return rows


def write_npz(path: Path, events: EventArrays, packed: bool = False) -> None:
    """Keys ts, x, y, polarity."""
    (np.savez_compressed if packed else np.savez)(path, ts=events.t, x=events.x, y=events.y, polarity=events.p)


def write_mat(path: Path, events: EventArrays) -> None:
    """MATLAB 5: variables ts, x, y, pol of doubles, each [N, 1]."""
    raw = b"MATLAB 5.0 MAT-file, made".ljust(124) + struct.pack("<H2s", 0x0100, b"IM")
    for name, values in (("ts", events.t), ("x", events.x), ("y", events.y), ("pol", events.p)):
        numbers = values.astype("<f8").tobytes()
        element = struct.pack("<IIII", 6, 8, 6, 0) + struct.pack("<IIii", 5, 8, len(values), 1)
        element += struct.pack("<II", 1, len(name)) + name.encode().ljust(8, b"\0")
        element += struct.pack("<II", 9, len(numbers)) + numbers
        raw += struct.pack("<II", 14, len(element)) + element
    path.write_bytes(raw)


def write_csv(path: Path, events: EventArrays, header: str = "timestamp,x,y,polarity\n") -> None:
    """One event a line, in the order t, x, y, p."""
    path.write_text(header + "".join(f"{t},{x},{y},{p}\n" for t, x, y, p in _rows(events)))


def write_hdf5(path: Path, events: EventArrays, sensor: Sensor | None = None, group: str = "events") -> None:
    """A group with t, x, y, p, and height and width where there is a size; needs h5py."""
    import h5py

    with h5py.File(path, "w") as file:
        place = file.require_group(group) if group else file
        for name in ("t", "x", "y", "p"):
            place.create_dataset(name, data=getattr(events, name), maxshape=(None,), compression="gzip")
        for name, side in zip(("height", "width"), sensor or (), strict=False):
            place[name] = side


def write_annotation(path: Path, box: NDArray[np.int16], contour: NDArray[np.int16]) -> None:
    """N-Caltech101: two contours [2, N], each rows, columns and values in column-major order."""
    parts = [struct.pack("<hh", *one.shape) + one.astype("<i2").tobytes(order="F") for one in (box, contour)]
    path.write_bytes(b"".join(parts))


GEN1_FIRST = [
    ("ts", "<u8"), ("x", "<f4"), ("y", "<f4"), ("w", "<f4"), ("h", "<f4"), ("class_id", "u1"), ("confidence", "<f4"),
    ("track_id", "<u4"),
]  # fmt: skip
GEN1_LATER = {
    "names": ["t", "x", "y", "w", "h", "class_id", "track_id", "class_confidence"],
    "formats": ["<i8", "<f4", "<f4", "<f4", "<f4", "<u4", "<u4", "<f4"],
    "offsets": [0, 8, 12, 16, 20, 24, 28, 32],
    "itemsize": 40,
}


def part(events: EventArrays, start: int, end: int) -> EventArrays:
    """Some of the events."""
    return EventArrays(*(getattr(events, name)[start:end] for name in ("t", "x", "y", "p")))


def _continues(row: tuple[int, int, int, int], last: tuple[int, int, int, int], end: int) -> bool:
    t, x, y, p = row
    return (t, y, p) == (last[0], last[2], last[3]) and last[1] < x < end


def _rows(events: EventArrays) -> Iterator[tuple[int, int, int, int]]:
    return zip(events.t.tolist(), events.x.tolist(), events.y.tolist(), events.p.tolist(), strict=True)


def joined(chunks: list[EventArrays]) -> EventArrays:
    """Chunks one after another; no events where there are no chunks."""
    empty = EventArrays(np.empty(0, np.int64), np.empty(0, np.uint16), np.empty(0, np.uint16), np.empty(0, np.uint8))
    return EventArrays(
        *(np.concatenate([getattr(chunk, name) for chunk in [empty, *chunks]]) for name in ("t", "x", "y", "p"))
    )
