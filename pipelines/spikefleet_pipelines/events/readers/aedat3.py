"""AEDAT 3.1, as DVS128 Gesture was published: packets of events behind lines of text.

A packet has a header of 28 bytes: type (1: polarity), source, size of an event, place of its time, overflow of the time
(from bit 31 on), capacity, number, number of valid events. An event has two words of 32 bits: valid = bit 0, p = bit 1,
y = bits 2 to 16, x = bits 17 to 31; then the time in us.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, ReadOptions
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, ReadAudit, damaged, reading
from spikefleet_pipelines.events.readers.text_header import read_text_header
from spikefleet_pipelines.events.recording import Sensor

_FIRST_LINE = "!AER-DAT3.1"
_LAST_LINE = "!END-HEADER"
_SENSORS = {"DVS128": (128, 128)}  # by the model that the header names
_HEADER = struct.Struct("<hhiiiiii")
_POLARITY = 1
_BYTES = 8
_TIME_PLACE = 4
_MOST_TYPE = 15  # of packets
_BLOCK = 1 << 17  # events


def read_aedat3(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open an AEDAT 3.1 file.

    Raises:
        SourceError: it cannot be read, or its header is not that of the format.
    """
    with reading(path):
        header = read_text_header(path, b"#", last=_LAST_LINE.encode())
    lines = header.lines
    if lines[:1] != (_FIRST_LINE,) or lines[-1] != _LAST_LINE:
        raise SourceError(
            f"{path} has no header from #{_FIRST_LINE} to #{_LAST_LINE}, so it is no AEDAT 3.1; give the original file"
        )
    formats = [line.partition(":")[2].strip() for line in lines if line.startswith("Format:")]
    if formats not in ([], ["RAW"]):
        raise SourceError(f"{path} has packets of format {formats}, expected RAW; save it again uncompressed")
    return EventReader(path, _sensor(lines), lambda audit: _decode(path, header.offset, audit), options)


def _sensor(lines: tuple[str, ...]) -> Sensor | None:
    sources = [line.partition(":")[2].strip() for line in lines if line.startswith("Source ")]
    return _SENSORS.get(sources[0]) if len(sources) == 1 else None


def _decode(path: Path, offset: int, audit: ReadAudit) -> Iterator[Decoded]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(offset)
        while raw := stream.read(_HEADER.size):
            if len(raw) < _HEADER.size:
                audit.cut_bytes += len(raw)
                return
            at = stream.tell()
            kind, _, item, place, overflow, _, number, _ = _HEADER.unpack(raw)
            if not 0 <= kind <= _MOST_TYPE or item <= 0 or number < 0:
                raise damaged(
                    path, f"the packet at byte {at - _HEADER.size:,} has type {kind} and {number} x {item} bytes"
                )
            if kind != _POLARITY:
                audit.other_words += 1
                end = at + item * number
                if end > size:
                    audit.cut_bytes += size - at
                    return
                stream.seek(end)
                continue
            if item != _BYTES or place != _TIME_PLACE or overflow < 0:
                raise damaged(
                    path,
                    f"the packet at byte {at - _HEADER.size:,} has events of {item} bytes, their time at {place} and "
                    f"overflow {overflow}, expected 8, 4 and 0 or more",
                )
            yield from _events(path, stream, number, overflow << 31, audit)


def _events(path: Path, stream: BinaryIO, number: int, base: int, audit: ReadAudit) -> Iterator[Decoded]:
    while number:
        raw = stream.read(min(number, _BLOCK) * _BYTES)
        whole = len(raw) // _BYTES
        audit.cut_bytes += len(raw) % _BYTES
        pairs = np.frombuffer(raw, "<u4", 2 * whole).reshape(-1, 2)
        number = number - whole if whole == min(number, _BLOCK) else 0
        valid = pairs[:, 0] & 1 == 1
        audit.invalid += whole - int(np.count_nonzero(valid))
        words, t = pairs[valid, 0], pairs[valid, 1]
        if len(t) and t.max() >> 31:
            raise damaged(path, f"an event has time {t.max()}, expected less than 2^31 in a packet")
        yield Decoded(
            t.astype(np.int64) + base,
            (words >> 17).astype(np.uint16),
            (words >> 2 & 32767).astype(np.uint16),
            (words >> 1 & 1).astype(np.uint8),
        )
