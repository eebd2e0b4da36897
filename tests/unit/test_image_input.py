"""What prediction reads of an image is what training reads of it: the same decoder, the same resize."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from spikefleet.errors import UserError
from spikefleet.inference.image_input import read_image
from spikefleet_pipelines.in_memory import resized, with_channels
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.transforms.classification import resize
from unit.test_image_decoder import COLOUR, DEEP, SMOOTH, files


def test_prediction_and_store_have_the_same_pixels_of_every_mode_and_format(tmp_path: Path) -> None:
    contents = [(mode, kind, content) for mode, kind, content in files() if (mode, kind) != ("I;16", "PPM")]
    for split in ("train", "val"):
        (tmp_path / "raw" / split / "all").mkdir(parents=True)
    for number, (mode, kind, content) in enumerate(contents):
        suffix = {"JPEG": "jfif", "TIFF": "tif"}.get(kind, kind.lower())
        for split in ("train", "val"):
            (tmp_path / "raw" / split / "all" / f"{number:03d}_{mode}.{suffix}").write_bytes(content)
    store = prepare("image_folder", tmp_path / "raw", tmp_path / "store")
    paths = sorted((tmp_path / "raw" / "val" / "all").iterdir())
    assert len(store.split("test")) == len(paths) >= 45
    for row, path in enumerate(paths):
        stored = store.split("test").image(row).numpy()
        assert np.array_equal(read_image(path), stored), path.name
        with PIL.Image.open(path) as opened:
            assert np.array_equal(read_image(opened), stored), path.name
        grey = with_channels(read_image(path), 1)
        assert grey.shape == (1, *stored.shape[1:])
        assert np.array_equal(
            grey[0], np.asarray(PIL.Image.fromarray(np.ascontiguousarray(stored.transpose(1, 2, 0))).convert("L"))
        )


def test_arrays_are_read_in_each_layout() -> None:
    pixels = np.asarray(COLOUR)
    for array in (pixels, pixels.transpose(2, 0, 1)):
        assert np.array_equal(read_image(array), pixels.transpose(2, 0, 1))
    assert np.array_equal(with_channels(read_image(pixels[..., 0]), 3), np.repeat(pixels[None, ..., 0], 3, 0))
    for wrong in (DEEP, pixels / 255, np.zeros((0, 3), np.uint8), SMOOTH):
        with pytest.raises(UserError, match="expected uint8 pixels"):
            read_image(wrong)


def test_images_are_resized_as_in_training() -> None:
    pixels = np.array(COLOUR).transpose(2, 0, 1)
    assert np.array_equal(resized(pixels, (8, 8)), resize(pixels, 8, 8))
    assert resized(pixels, None) is pixels
    assert not np.array_equal(
        resized(pixels, (8, 8)),
        np.asarray(COLOUR.resize((8, 8), PIL.Image.Resampling.NEAREST)).transpose(2, 0, 1),
    )
    assert with_channels(with_channels(pixels, 1), 3).shape == pixels.shape


def test_what_is_no_image_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    for name, reason in (
        ("folder.png", "it is a folder"),
        ("gone.png", r"it is a link to .*nowhere\.png, which does not exist"),
        ("empty.png", "the file has 0 bytes"),
        ("text.png", "it is not an image of a format that is read"),
        ("missing.png", "No such file"),
    ):
        with pytest.raises(UserError, match=rf"image .*{name} cannot be read: {reason}"):
            read_image(tmp_path / name)
