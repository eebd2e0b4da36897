"""Prophesee RAW: the header that says which encoding follows, and the table of encodings."""

import re
from pathlib import Path

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.events.readers.evt2 import decode_evt2
from spikefleet_pipelines.events.readers.evt3 import decode_evt3
from spikefleet_pipelines.events.readers.evt21 import decode_evt21
from spikefleet_pipelines.events.readers.options import DEFAULT_OPTIONS, Evt21Halves, ReadOptions
from spikefleet_pipelines.events.readers.reader import EventReader, damaged, reading
from spikefleet_pipelines.events.readers.text_header import read_text_header
from spikefleet_pipelines.events.recording import Sensor

_VERSIONS = {"2.0": "EVT2", "2.1": "EVT21", "3.0": "EVT3"}


def read_prophesee_raw(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> EventReader:
    """Open a RAW file of encoding EVT2, EVT2.1 or EVT3.

    Raises:
        SourceError: it cannot be read, has no header, or another encoding.
    """
    with reading(path):
        header = read_text_header(path, b"% ", last=b"end")
    encoding, sensor, halves = _header(path, header.lines)
    offset = header.offset
    if encoding == "EVT2":
        return EventReader(path, sensor, lambda audit: decode_evt2(path, offset, audit), options)
    if encoding == "EVT3":
        return EventReader(path, sensor, lambda audit: decode_evt3(path, offset, audit), options)
    order = halves or options.evt21
    if order is None:
        raise SourceError(
            f"{path} is EVT2.1 and its header does not state the order of the halves of its words; set evt21=legacy "
            "(cameras with IMX636) or evt21=little (GenX320)"
        )
    return EventReader(path, sensor, lambda audit: decode_evt21(path, offset, order == "legacy", audit), options)


def _header(path: Path, lines: tuple[str, ...]) -> tuple[str, Sensor | None, Evt21Halves | None]:
    """Encoding, size and order of halves that a header states."""
    fields = dict(parts for line in lines if len(parts := line.split(None, 1)) == 2)
    encoding, _, rest = fields.get("format", "").partition(";")
    details = dict(pair.split("=", 1) for pair in rest.split(";") if "=" in pair)
    by_version = _VERSIONS.get(fields.get("evt", ""))
    encoding = encoding or by_version or ""
    if encoding not in _VERSIONS.values():
        stated = f"format {fields.get('format')!r}, evt {fields.get('evt')!r}"
        raise SourceError(
            f"{path} has a header with {stated}, expected EVT2, EVT21 or EVT3; convert it to .dat with the vendor's "
            "metavision_file_to_dat"
        )
    if by_version and by_version != encoding:
        raise damaged(path, f"its header states both evt {fields['evt']} and format {encoding}")
    halves = details.get("endianness")
    if halves not in (None, "little", "legacy") or (halves == "legacy" and encoding != "EVT21"):
        raise SourceError(
            f"{path} has endianness={halves} in its header, expected little, or legacy for EVT2.1; convert it to .dat "
            "with the vendor's metavision_file_to_dat"
        )
    return encoding, _sensor(path, fields, details), "legacy" if halves == "legacy" else "little" if halves else None


def _sensor(path: Path, fields: dict[str, str], details: dict[str, str]) -> Sensor | None:
    sizes = []
    if "height" in details or "width" in details:
        sizes.append((details.get("height", ""), details.get("width", "")))
    if "geometry" in fields:
        width, _, height = fields["geometry"].partition("x")
        sizes.append((height, width))
    for size in sizes:
        if not all(re.fullmatch("[0-9]{1,5}", side) and int(side) for side in size) or size != sizes[0]:
            raise damaged(path, f"its header states the sizes (height, width) {', '.join(map(str, sizes))}")
    return (int(sizes[0][0]), int(sizes[0][1])) if sizes else None
