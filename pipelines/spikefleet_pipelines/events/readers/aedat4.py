"""AEDAT 4: flatbuffers, compressed packet by packet with LZ4 or Zstandard, which pyarrow decompresses.

A first line, a table (compression, where the packets end, XML that describes the streams), then packets: stream (i32),
size (i32), compressed table. A table of events is a list of 16 bytes each: t (i64, us), x, y (i16), on (bool).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

import numpy as np

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.flat_buffer import FlatTable
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, ReadOptions
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, ReadAudit, damaged, reading
from spikefleet_pipelines.events.recording import Sensor

_FIRST_LINE = b"#!AER-DAT4.0\r\n"
_CODECS = {0: None, 1: "lz4", 2: "lz4", 3: "zstd", 4: "zstd"}
_COMPRESSION, _END, _DESCRIPTION = 0, 1, 2  # fields of the header
_EVENTS = "EVTS"
_MOST_HEADER = 1 << 20  # bytes
_MOST_PACKET = 1 << 26  # bytes, also when decompressed: 2^22 events
_PACKET = struct.Struct("<ii")
_EVENT = np.dtype(
    {"names": ["t", "x", "y", "on"], "formats": ["<i8", "<i2", "<i2", "u1"], "offsets": [0, 8, 10, 12], "itemsize": 16}
)


@dataclass(frozen=True)
class _Header:
    codec: str | None
    start: int
    end: int  # of the packets, in bytes
    stream: int
    sensor: Sensor | None


def read_aedat4(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open an AEDAT 4 file. A file that was cut is refused: what is left of a compressed packet means nothing.

    Raises:
        SourceError: it cannot be read, is damaged, or has not exactly one stream of events.
    """
    with reading(path), path.open("rb") as stream:
        first = stream.read(len(_FIRST_LINE))
        raw = stream.read(4)
        size = int.from_bytes(raw, "little")
        if first != _FIRST_LINE or len(raw) < 4 or size > _MOST_HEADER:
            raise damaged(path, f"it starts with {first!r} and a header of {size:,} bytes")
        raw += stream.read(size)
        length = path.stat().st_size
    header = _read_header(path, raw, length)
    return EventReader(path, header.sensor, lambda audit: _decode(path, header, audit), options)


def _read_header(path: Path, raw: bytes, length: int) -> _Header:
    try:
        table = FlatTable(raw, b"IOHE")
        compression = table.integer(_COMPRESSION, "i", 0)
        end = table.integer(_END, "q", -1)
        tree = ElementTree.fromstring(table.text(_DESCRIPTION))
    except (ValueError, struct.error, ElementTree.ParseError) as error:
        raise damaged(path, f"its header cannot be read ({error})") from error
    if compression not in _CODECS:
        raise SourceError(f"{path} has compression {compression}, expected none, LZ4 or Zstandard; save it with one")
    start = len(_FIRST_LINE) + len(raw)
    end = length if end == -1 else end  # a recording that was not closed has no list of packets at its end
    if not start <= end <= length:
        raise damaged(path, f"its packets end at byte {end:,}, and it has {length:,} bytes")
    streams = [
        node
        for node in tree.iterfind("./node[@name='outInfo']/node")
        if node.findtext("./attr[@key='typeIdentifier']") == _EVENTS
    ]
    if len(streams) != 1:
        raise SourceError(
            f"{path} has {len(streams)} streams of events, expected 1; export one stream to a file of its own"
        )
    number = streams[0].get("name", "")
    if not (number.isascii() and number.isdigit()):
        raise damaged(path, f"its stream of events has the name {number!r}, expected a number")
    return _Header(_CODECS[compression], start, end, int(number), _sensor(path, streams[0]))


def _sensor(path: Path, stream: ElementTree.Element) -> Sensor | None:
    texts = [stream.findtext(f"./node[@name='info']/attr[@key='{key}']") for key in ("sizeY", "sizeX")]
    if texts == [None, None]:
        return None
    sides = [int(text) if text and text.isascii() and text.isdigit() and len(text) < 6 else 0 for text in texts]
    if min(sides) < 1:
        raise damaged(path, f"its stream of events has height {texts[0]} and width {texts[1]}")
    return sides[0], sides[1]


def _decode(path: Path, header: _Header, audit: ReadAudit) -> Iterator[Decoded]:
    number = 0
    with path.open("rb") as stream:
        stream.seek(header.start)
        while (at := stream.tell()) < header.end:
            kind, raw = _packet(path, stream, at, header.end)
            if kind != header.stream:
                audit.other_words += 1
                continue
            events = _events(path, _decompress(path, raw, header.codec, at), at)
            on = np.ascontiguousarray(events["on"])
            if len(on) and on.max() > 1:
                row = int(np.argmax(on > 1))
                raise damaged(path, f"event {number + row:,} has polarity {on[row]}, expected 0 or 1")
            number += len(on)
            yield Decoded(events["t"].astype(np.int64), events["x"], events["y"], on)


def _packet(path: Path, stream: BinaryIO, at: int, end: int) -> tuple[int, bytes]:
    """Read (stream, compressed bytes) of the packet at a place."""
    head = stream.read(_PACKET.size)
    kind, size = _PACKET.unpack(head) if len(head) == _PACKET.size else (0, -1)
    if not 0 <= size <= min(end - at - _PACKET.size, _MOST_PACKET):
        raise damaged(path, f"the packet at byte {at:,} has {size:,} bytes, and its packets end at byte {end:,}")
    return kind, stream.read(size)


def _decompress(path: Path, raw: bytes, codec: str | None, at: int) -> bytes:
    if codec is None:
        return raw
    import pyarrow as pa

    parts: list[bytes] = []
    whole = 0
    try:
        with pa.CompressedInputStream(pa.BufferReader(raw), codec) as stream:
            # pyarrow allocates what it is asked for, so it is asked for what a packet usually has.
            while whole <= _MOST_PACKET and (part := stream.read(4 * len(raw) + 64)):
                parts.append(part)
                whole += len(part)
    except (OSError, ValueError, MemoryError) as error:  # of pyarrow
        raise damaged(path, f"the packet at byte {at:,} cannot be decompressed ({str(error)[:100]})") from error
    if whole > _MOST_PACKET:
        raise damaged(path, f"the packet at byte {at:,} has more than {_MOST_PACKET:,} bytes")
    return b"".join(parts)


def _events(path: Path, raw: bytes, at: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    try:
        start, number = FlatTable(raw, _EVENTS.encode()).vector(0)
        return np.frombuffer(raw, _EVENT, number, start) if number else np.empty(0, _EVENT)
    except (ValueError, struct.error) as error:
        raise damaged(path, f"the packet at byte {at:,} is no table of events ({error})") from error
