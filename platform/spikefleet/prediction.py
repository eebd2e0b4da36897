"""Predictions for picture files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from spikefleet.errors import UserError
from spikefleet.evaluation import autocast
from spikefleet.network_package import preprocess
from spikefleet.trained_network import TrainedNetwork
from spikefleet.world import pick_device
from spikefleet_pipelines.loading import Batch

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


def predict_files(
    trained: TrainedNetwork, paths: Sequence[Path], *, out: Path | None = None, gpu: bool = False
) -> list[dict[str, Any]]:
    """Likeliest classes of each picture, in order: `{"picture", "classes": [{"name", "probability"}, ...]}`.

    Pictures are brought to the size and number of channels of the training images, then treated as in evaluation.
    `out` gets a PNG with all of them. Raises UserError naming the file that is missing or no picture, or the folder
    without any.
    """
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    files = list(_picture_files(paths))
    pictures = [_read(file, trained.config.model.in_channels, trained.image_shape) for file in files]
    device = pick_device(gpu)
    network = trained.network.to(device)
    predictions = []
    for pixels in pictures:
        images = preprocess(pixels[None], trained.config.dump()).to(device)
        placeholder = torch.zeros(1, dtype=torch.int64, device=device)
        with autocast(trained.config, device):
            predictions += trained.task.predict(network, Batch(images, placeholder, placeholder, 1))
    if out is not None:
        trained.task.draw([torch.from_numpy(pixels) for pixels in pictures], predictions, None, out)
    return [
        {
            "picture": str(file),
            "classes": [
                {"name": trained.class_names[k], "probability": p}
                for k, p in zip(prediction.classes, prediction.probabilities, strict=True)
            ],
        }
        for file, prediction in zip(files, predictions, strict=True)
    ]


def _picture_files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not inside:
                raise UserError(f"folder {path} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise UserError(f"picture {path} does not exist")


def _read(file: Path, channels: int, shape: tuple[int, int, int] | None) -> NDArray[np.uint8]:
    """Pixels uint8 [C, H, W], upright."""
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"picture {file} cannot be read: {error}") from None
    if shape is not None and picture.size != (shape[2], shape[1]):
        picture = picture.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))
