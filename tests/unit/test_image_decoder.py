"""One decoder for every place: all modes and formats, damage of every kind, and sizes that would exhaust memory."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.decode import decode_rgb
from spikefleet_pipelines.store.image_header import MAX_PIXELS

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(
    PIL.Image.fromarray(RNG.integers(0, 256, (6, 7, 4), np.uint8)).resize((61, 43), PIL.Image.Resampling.BICUBIC)
)
DEEP = RNG.integers(0, 65536, (23, 31)).astype(np.uint16)
COLOUR = PIL.Image.fromarray(SMOOTH[..., :3].copy())


def modes() -> dict[str, PIL.Image.Image]:
    palette = COLOUR.convert("P")
    transparent = palette.copy()
    transparent.info["transparency"] = 3
    return {
        "1": COLOUR.convert("1"),
        "L": COLOUR.convert("L"),
        "LA": PIL.Image.fromarray(SMOOTH).convert("LA"),
        "RGB": COLOUR,
        "RGBA": PIL.Image.fromarray(SMOOTH),
        "P": palette,
        "P with transparency": transparent,
        "CMYK": COLOUR.convert("CMYK"),
        "YCbCr": COLOUR.convert("YCbCr"),
        "I;16": PIL.Image.fromarray(DEEP),
    }


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def files() -> Iterator[tuple[str, str, bytes]]:
    for mode, image in modes().items():
        for kind in FORMATS:
            stream = io.BytesIO()
            try:
                image.save(stream, kind)
            except (OSError, ValueError):  # the format has no such mode
                continue
            yield mode, kind, stream.getvalue()


def decoded(content: bytes) -> NDArray[np.uint8]:
    return decode_rgb(np.frombuffer(content, np.uint8)).numpy()


def by_torchvision(content: bytes) -> NDArray[np.uint8]:
    import torch
    from torchvision.io import ImageReadMode, decode_image

    image = decode_image(torch.from_numpy(np.frombuffer(content, np.uint8).copy()), ImageReadMode.RGB)
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return (image[0] if image.ndim == 4 else image).numpy()


def by_pillow(content: bytes) -> NDArray[np.uint8]:
    with PIL.Image.open(io.BytesIO(content)) as opened:
        if opened.mode.startswith("I"):
            grey = (np.asarray(opened).astype(np.int64) >> 8).astype(np.uint8)
            return np.repeat(grey[None], 3, 0)
        return np.asarray(opened.convert("RGB")).transpose(2, 0, 1)


def test_every_mode_and_format_has_the_pixels_of_both_libraries() -> None:
    compared = {"pillow": 0, "torchvision": 0}
    for mode, kind, content in files():
        if (mode, kind) == ("I;16", "PPM"):
            continue  # Pillow reads it as 32 bits, which is refused
        found = decoded(content)
        assert np.array_equal(found, by_pillow(content)), (mode, kind)
        compared["pillow"] += 1
        # Stores of earlier versions were decoded by torchvision; of a transparent GIF it shows the background.
        if kind in ("JPEG", "PNG", "WEBP", "GIF") and (mode, kind) != ("RGBA", "GIF"):
            assert np.array_equal(found, by_torchvision(content)), (mode, kind)
            compared["torchvision"] += 1
    assert compared["pillow"] >= 45, compared
    assert compared["torchvision"] >= 30


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight_by_their_upper_byte(kind: str) -> None:
    stream = io.BytesIO()
    PIL.Image.fromarray(DEEP).save(stream, kind)
    found = decoded(stream.getvalue())
    assert np.array_equal(found, np.repeat((DEEP >> 8).astype(np.uint8)[None], 3, 0))
    assert found.max() < 256
    assert len(np.unique(found)) > 200  # and not cut to white


@pytest.mark.parametrize(
    ("pixels", "said"), [(np.float32, "its pixels are floats"), (np.int32, "its pixels are integers of 32 bits")]
)
def test_pixels_without_a_scale_are_refused_with_the_remedy(pixels: type, said: str) -> None:
    stream = io.BytesIO()
    PIL.Image.fromarray(RNG.random((9, 9)).astype(pixels)).save(stream, "TIFF")
    with pytest.raises(ValueError, match=rf"{said}, expected 8 or 16 bits; convert it to 8 or 16 bits"):
        decoded(stream.getvalue())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_formats_are_rotated_by_their_exif_orientation(kind: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    blocks = np.kron(RNG.integers(0, 2, (2, 3, 1), np.uint8) * np.uint8(255), np.ones((16, 16, 3), np.uint8))
    blocks[:16, :16] = (255, 0, 0)
    stream = io.BytesIO()
    PIL.Image.fromarray(blocks).save(stream, kind, exif=exif)
    upright = {
        1: blocks,
        2: blocks[:, ::-1],
        3: blocks[::-1, ::-1],
        4: blocks[::-1],
        5: blocks.transpose(1, 0, 2),
        6: np.rot90(blocks, -1),
        7: np.rot90(blocks, 2).transpose(1, 0, 2),
        8: np.rot90(blocks, 1),
    }[orientation]
    found = decoded(stream.getvalue()).transpose(1, 2, 0)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 12  # lossy formats blur edges; another turn differs by > 60


def test_the_first_frame_of_many_is_read() -> None:
    frames = [PIL.Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "TIFF"):
        stream = io.BytesIO()
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
        assert (decoded(stream.getvalue())[:, 5, 5] == (255, 0, 0)).all()


def png(width: int, height: int, pixels: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_an_image_that_would_exhaust_memory_is_refused_by_its_header() -> None:
    assert decoded(png(2, 1, zlib.compress(bytes(7)))).shape == (3, 1, 2)
    with pytest.raises(ValueError, match=rf"size is 30000 x 30000, expected 1 to {MAX_PIXELS:,} pixels"):
        decoded(png(30_000, 30_000, zlib.compress(bytes(100))))
    stream = io.BytesIO()
    COLOUR.save(stream, "JPEG")
    whole = bytearray(stream.getvalue())
    frame = whole.find(b"\xff\xc0")
    struct.pack_into(">HH", whole, frame + 5, 65_500, 65_500)
    with pytest.raises(ValueError, match="size is 65500 x 65500"):
        decoded(bytes(whole))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a format that is read"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ", "AppleDouble"),
        (b"", r"empty \(0 bytes\)"),
        (b"RIFF\x10\0\0\0WAVE", "not an image of a format that is read"),
    ],
)
def test_only_formats_that_are_named_are_read(content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decoded(content)


def test_damaged_pixels_of_a_png_do_not_end_the_process(tmp_path: Path) -> None:
    stream = io.BytesIO()
    PIL.Image.fromarray(RNG.integers(0, 256, (96, 96, 3), np.uint8)).save(stream, "PNG")
    whole = bytearray(stream.getvalue())
    start = whole.find(b"IDAT") + 4
    for offset in range(40, 60):
        whole[start + offset] ^= 0xFF
    folder = tmp_path / "raw"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(3):
                COLOUR.save(place / f"{number}.png")
    (folder / "train" / "cat" / "damaged.png").write_bytes(whole)
    with pytest.raises(SourceError, match=r"train/cat/damaged\.png: the PNG is damaged: the checksum of its chunk"):
        prepare("image_folder", folder, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    (folder / "train" / "cat" / "damaged.png").unlink()
    assert prepare("image_folder", folder, tmp_path / "store").manifest.splits["train"] == 4


def test_what_the_check_keeps_from_torchvision_would_end_the_process() -> None:
    """The negative control: without the check the decoder is not safe at all."""
    program = """
import sys, numpy as np, torch
from torchvision.io import decode_image
whole = np.frombuffer(sys.stdin.buffer.read(), np.uint8)
for seed in range(400):
    rng, content = np.random.default_rng(seed), whole.copy()
    for at in rng.integers(40, len(content), 5):
        content[at] = rng.integers(0, 256)
    try:
        decode_image(torch.from_numpy(content))
    except RuntimeError:
        pass
"""
    stream = io.BytesIO()
    COLOUR.save(stream, "PNG")
    done = subprocess.run([sys.executable, "-c", program], input=stream.getvalue(), capture_output=True, check=False)
    assert done.returncode < 0, "torchvision's PNG decoder has become safe: use it again"
