"""What the first bytes of an image file say: its format and its size, before any decoder sees it.

A decoder allocates what a header declares, and libpng in torchvision ends the process at damaged data; so formats,
sizes and PNG's checksums are read here, from the bytes alone.
"""

import re
import struct
import zlib
from collections.abc import Callable
from typing import Any, Literal

ImageKind = Literal["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "PPM"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
"""Suffixes, in lower case, of the files that are taken for images; what they hold is known by their first bytes."""

FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF or PPM"
"""The formats that are read, for error messages."""

MAX_PIXELS = 1 << 26
"""Largest number of pixels of an image: 192 MiB as RGB, and less than 1 GB while it is decoded."""

_STARTS: tuple[tuple[bytes, ImageKind], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    *((b"P%d" % number, "PPM") for number in range(1, 7)),
)
_APPLE_DOUBLE = b"\x00\x05\x16\x07"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})
_JPEG_PIXELS = frozenset({0xD9, 0xDA})
_JPEG_MARKER = re.compile(b"\xff")


def image_kind(data: bytes | memoryview) -> ImageKind:
    """Return the format of an image file, by its first bytes.

    Raises:
        ValueError: it has none of the formats that are read; the message says what it is instead, if that is known.
    """
    if not data:
        raise ValueError("the image is empty (0 bytes)")
    first = bytes(data[:16])
    for start, kind in _STARTS:
        if first.startswith(start):
            return kind
    if first[:4] == b"RIFF" and first[8:12] == b"WEBP":
        return "WebP"
    if first.startswith(_APPLE_DOUBLE):
        raise ValueError(f"it is no image but a file of macOS beside one (AppleDouble, {len(data)} bytes)")
    raise ValueError(
        f"it is not an image of a format that is read ({FORMATS}): it starts with {first[:4]!r} ({len(data)} bytes)"
    )


def check_size(width: int, height: int) -> None:
    """Check the size that a header declares, in pixels.

    Raises:
        ValueError: the image has no pixel or more than `MAX_PIXELS`.
    """
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        raise ValueError(
            f"its size is {width} x {height}, expected 1 to {MAX_PIXELS:,} pixels; make the image smaller or replace it"
        )


def declared_size(data: bytes | memoryview, kind: ImageKind) -> tuple[int, int] | None:
    """Return the (width, height) that the header of a JPEG, PNG, WebP or GIF declares; None for other formats.

    Raises:
        ValueError: the header is truncated or damaged.
    """
    read = _SIZES.get(kind)
    try:
        return None if read is None else read(data)
    except (struct.error, IndexError):
        raise ValueError(f"the header of the {kind} is truncated ({len(data)} bytes)") from None


def check_png(data: bytes) -> None:
    """Check the checksums of the critical chunks of a PNG, which decoders check in part or not at all.

    Raises:
        ValueError: a chunk is truncated, or its checksum is wrong.
    """
    view, at = memoryview(data), 8
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name, end = data[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(data):
            raise ValueError(f"the PNG is truncated ({len(data)} bytes): its chunk {name!r} at byte {at} has no end")
        # Bit 5 of the first letter marks chunks that an image does not need.
        if not name[0] & 0x20 and zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ValueError(f"the PNG is damaged: the checksum of its chunk {name!r} at byte {at} is wrong")
        if name == b"IEND":
            return
        at = end + 4


def _png_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _gif_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    """The size of the canvas: RFC 9649, sections 2.5 to 2.7."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        data[29]
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError(f"the WebP is damaged: its first chunk is {chunk!r}")


def _jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """The size in the frame header: ITU-T T.81, annex B."""
    at = 2
    while (found := _JPEG_MARKER.search(data, at)) is not None:
        at = found.start()
        marker = data[at + 1]
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        if marker in _JPEG_PIXELS:
            break
        if marker == 0xFF:
            at += 1
        elif marker in _JPEG_WITHOUT_LENGTH:
            at += 2
        else:
            at += 2 + max(2, struct.unpack_from(">H", data, at + 2)[0])
    raise ValueError(f"the JPEG is truncated or damaged ({len(data)} bytes): it has no frame header")


_SIZES: dict[ImageKind, Callable[[Any], tuple[int, int]]] = {
    "JPEG": _jpeg_size,
    "PNG": _png_size,
    "WebP": _webp_size,
    "GIF": _gif_size,
}
