"""The decoder of image files, to uint8 RGB: training, evaluation, prediction, serving and drawing use this one.

torchvision decodes JPEG, which it does faster. Pillow decodes the others: libpng in torchvision ends the process at
damaged data, torchvision decodes all frames of a GIF, and does not rotate WebP. Where both read a file, both give equal
pixels.
"""

import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikefleet_pipelines.store.image_header import ImageKind, check_png, check_size, declared_size, image_kind

if TYPE_CHECKING:
    from PIL.Image import Image

_DEEP = "convert it to 8 or 16 bits with a scale of your choice"
_ORIENTATION = 0x0112
_ON_THEIR_SIDE = frozenset({5, 6, 7, 8})
"""EXIF orientations that exchange height and width."""
_BITS_PER_SAMPLE = 258
_PIXELS_AT_ONCE = 1 << 22
_PLACE_IN_MEMORY = re.compile("cannot identify image file <.*")
_PLACE_IN_TORCHVISION = re.compile(r"^\w+, \S+:\d+, ")

# Of metadata that is not used, and of sizes that are checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_rgb(encoded: NDArray[np.uint8]) -> Tensor:
    """Decode a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM to uint8 [3, H, W], rotated by its EXIF orientation.

    Grey images are repeated to three channels, CMYK is converted, alpha channels are dropped, 16 bits become 8 by
    `>> 8`. Of several frames or pages the first is read.

    Raises:
        ValueError: the bytes are empty, damaged, not such an image, of more than `MAX_PIXELS` pixels, or hold integers
            of 32 bits or floats.
    """
    encoded = np.ascontiguousarray(encoded)
    kind = image_kind(encoded.data)
    # A JPEG is read where it is, in the mapped shard; Pillow takes bytes.
    data = encoded.data if kind == "JPEG" else encoded.tobytes()
    size = declared_size(data, kind)
    if size is not None:
        check_size(*size)
    if kind == "PNG":
        check_png(bytes(data))
    try:
        return _by_pillow(data, kind) if isinstance(data, bytes) else _by_torchvision(encoded)
    except _UnsupportedPixelsError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # a damaged file can fail in any way
        reason = _PLACE_IN_TORCHVISION.sub("", (str(error) or type(error).__name__).splitlines()[0])
        reason = _PLACE_IN_MEMORY.sub("its header is damaged", reason)
        raise ValueError(f"the image cannot be decoded as {kind} ({len(data)} bytes): {reason}") from error


def rgb_of(image: "Image") -> Tensor:
    """Convert an opened Pillow image as `decode_rgb` does: uint8 [3, H, W], rotated by its EXIF orientation.

    Raises:
        ValueError: it is damaged, of more than `MAX_PIXELS` pixels, or holds integers of 32 bits or floats.
    """
    try:
        return _of_pillow(image)
    except _UnsupportedPixelsError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"the image cannot be decoded: {error}") from error


class _UnsupportedPixelsError(ValueError):
    """An intact image whose pixels have no uint8 form, or which is too large."""


def _by_torchvision(encoded: NDArray[np.uint8]) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image  # seconds to import

    return decode_image(_as_tensor(encoded), ImageReadMode.RGB, apply_exif_orientation=True)


class _Writable:
    """An array that says that it can be written to, which torch asks for; decoders only read."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self._array = array
        described = array.__array_interface__
        self.__array_interface__ = {**described, "data": (described["data"][0], False)}


def _as_tensor(encoded: NDArray[np.uint8]) -> Tensor:
    """A tensor over the bytes of a mapped shard, without a copy."""
    return torch.from_numpy(np.asarray(encoded if encoded.flags.writeable else _Writable(encoded)))


def _by_pillow(data: bytes, kind: ImageKind) -> Tensor:
    from PIL import Image

    # Only the plug-in of the format that the bytes have: others start programs (Ghostscript for EPS).
    with Image.open(io.BytesIO(data), formats=[kind.upper()]) as opened:
        return _of_pillow(opened)


def _of_pillow(image: "Image") -> Tensor:
    try:
        check_size(*image.size)
    except ValueError as error:
        raise _UnsupportedPixelsError(str(error)) from None
    _check_depth(image)
    image.load()
    return torch.from_numpy(_eight_bits(_upright(image))).permute(2, 0, 1)


def _check_depth(image: "Image") -> None:
    """Refuse pixels that have no uint8 form; the scale of such images is known only to those who made them."""
    if image.mode in ("I", "F"):
        found = "floats" if image.mode == "F" else "integers of 32 bits"
        raise _UnsupportedPixelsError(f"its pixels are {found}, expected 8 or 16 bits; {_DEEP}")
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        if set(bits) != {16}:
            raise _UnsupportedPixelsError(f"its pixels are integers of {bits[0]} bits, expected 8 or 16; {_DEEP}")


def _eight_bits(image: "Image") -> NDArray[np.uint8]:
    """The pixels [H, W, 3], converted some rows at a time, so that a large image is not in memory three times."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _PIXELS_AT_ONCE // width)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        part = image if rows >= height else image.crop((0, top, width, bottom))
        if part.mode.startswith("I;16"):
            pixels[top:bottom] = (np.asarray(part) >> 8)[..., None]
        else:
            pixels[top:bottom] = np.asarray(part.convert("RGB"))
    return pixels


def upright_size(path: Path | bytes) -> tuple[int, int] | None:
    """Return the (height, width) that `decode_rgb` gives of an image file, from its header.

    Args:
        path: of the file, or its bytes.

    Returns:
        The size in pixels; None if the file cannot be read as an image.
    """
    from PIL import Image

    try:
        with io.BytesIO(path) if isinstance(path, bytes) else path.open("rb") as stream:
            kind = image_kind(stream.read(16))
            stream.seek(0)
            with Image.open(stream, formats=[kind.upper()]) as image:
                width, height = image.size
                return (width, height) if _orientation(image) in _ON_THEIR_SIDE else (height, width)
    except Exception:  # a damaged file can fail in any way; decoding it says how
        return None


def _orientation(image: "Image") -> int | None:
    """The EXIF orientation by which an image is to be rotated; Pillow has rotated a TIFF already."""
    from PIL import Image

    stored = image.info.get("exif")
    if image.format == "TIFF" or not stored:
        return None
    exif = Image.Exif()
    try:
        exif.load(stored)
        orientation = exif.get(_ORIENTATION)
    except Exception:  # damaged metadata are no reason to refuse pixels
        return None
    return orientation if isinstance(orientation, int) else None


def _upright(image: "Image") -> "Image":
    """The image rotated by its EXIF orientation."""
    from PIL import Image

    orientation = _orientation(image)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    turn = None if orientation is None else turns.get(orientation)
    return image if turn is None else image.transpose(turn)
