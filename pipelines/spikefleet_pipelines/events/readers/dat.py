"""Prophesee .dat: events of 8 bytes behind lines of text.

A word of time, u32 in us, and a word of address: x = bits 0 to 13, y = bits 14 to 27, p = bit 28, others 0. With a
header, two bytes before the events state their type (0x0C CD, 0x00 Event2D of old cameras) and size. Files of version 1
have neither. Times wrap after 71.6 min and are not always in order.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.blocks import head, read_blocks
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, ReadOptions
from spikefleet_pipelines.events.readers.packed_time import Unwrapper
from spikefleet_pipelines.events.readers.reader import Decoded, EventReader, ReadAudit, damaged, reading
from spikefleet_pipelines.events.readers.text_header import read_text_header
from spikefleet_pipelines.events.recording import Sensor

_MARK = b"% "
_CD, _EVENT2D, _TRIGGER = 0x0C, 0x00, 0x0E
_BYTES = 8
_BLOCK = 1 << 17  # events; block and results stay in the processor's cache
_BITS = 14  # of a coordinate
_POLARITY = 28


def read_dat(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open a .dat file.

    Raises:
        SourceError: it cannot be read, or its header is not one of CD or Event2D events.
    """
    with reading(path):
        header = read_text_header(path, _MARK)
        fields = dict(line.split(None, 1) for line in header.lines if len(line.split(None, 1)) == 2)
        offset = header.offset
        if header.lines:
            _check_type(path, head(path, offset + 2)[offset:], fields.get("Version", "2"))
            offset += 2
    return EventReader(path, _sensor(path, fields), lambda audit: _decode(path, offset, audit), options)


def _check_type(path: Path, raw: bytes, version: str) -> None:
    if version not in ("1", "2"):
        raise SourceError(f"{path} is of version {version}, expected 1 or 2; convert it to version 2")
    if len(raw) < 2:
        raise damaged(path, "it ends before the type of its events")
    if raw[0] == _TRIGGER:
        raise SourceError(
            f"{path} holds trigger events (type 0x0e), not events of pixels; give the recording's _td.dat"
        )
    if raw[0] not in (_CD, _EVENT2D) or raw[1] != _BYTES:
        raise damaged(
            path, f"its events have type {raw[0]:#04x} and {raw[1]} bytes, expected 0x0c (CD) or 0x00 (Event2D) and 8"
        )


def _sensor(path: Path, fields: dict[str, str]) -> Sensor | None:
    sides = [fields[name].strip() for name in ("Height", "Width") if name in fields]
    if not sides:
        return None
    if len(sides) == 1 or not all(re.fullmatch("[0-9]{1,5}", side) and int(side) for side in sides):
        raise damaged(path, f"its header has Height {fields.get('Height')} and Width {fields.get('Width')}")
    return int(sides[0]), int(sides[1])


def _decode(path: Path, offset: int, audit: ReadAudit) -> Iterator[Decoded]:
    unwrap = Unwrapper(32)
    number = 0
    for words in read_blocks(path, offset, "<u8", _BLOCK, audit):
        address = (words >> np.uint64(32)).astype(np.uint32)
        p = (address >> np.uint32(_POLARITY)).astype(np.uint8)
        if p.max() > 1:
            row = int(np.argmax(p > 1))
            raise damaged(path, f"event {number + row:,} has polarity {p[row]}, expected 0 or 1")
        low = np.uint32((1 << _BITS) - 1)
        x = (address & low).astype(np.uint16)
        y = (address >> np.uint32(_BITS) & low).astype(np.uint16)
        t = unwrap(words.astype(np.uint32))
        audit.wraps = unwrap.wraps
        number += len(words)
        yield Decoded(t, x, y, p)
