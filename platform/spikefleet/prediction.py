"""Predictions for picture files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from spikefleet.coco_metrics import FoundBoxes
from spikefleet.errors import UserError
from spikefleet.evaluation import autocast
from spikefleet.network_package import picture_batch
from spikefleet.tasks.detection import Detection
from spikefleet.trained_network import TrainedNetwork
from spikefleet.world import World, pick_device

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


def predict_files(
    trained: TrainedNetwork, paths: Sequence[Path], *, out: Path | None = None, gpu: bool = False, score: float = 0.3
) -> list[dict[str, Any]]:
    """What the network says of each picture, in order: `{"picture", "classes": [{"name", "probability"}, ...]}`, or
    `{"picture", "objects": [{"name", "score", "box"}, ...]}` with boxes x1 y1 x2 y2 in the picture's own pixels.

    For classification, pictures are brought to the size of the training images; `out` gets one PNG with all of them.
    For detection, `out` is a folder that gets each picture with its boxes drawn; boxes below `score` are left out.
    Raises UserError naming the file that is missing or no picture, or the folder without any.
    """
    detects = isinstance(trained.task, Detection)
    if out is not None and not detects and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    if out is not None and detects and out.is_file():
        raise UserError(f"--out {out} is a file; for detection, give a folder")
    files = list(_picture_files(paths))
    shape = None if detects else trained.image_shape
    pictures = [_read(file, trained.config.model.in_channels, shape) for file in files]
    device = pick_device(gpu)
    world, network, config = World(0, 1, device), trained.network.to(device), trained.config.dump()
    predictions = []
    for pixels in pictures:
        batch = world.place(picture_batch(pixels[None], config), channels_last=False)
        with autocast(trained.config, device):
            predictions += trained.task.predict(network, batch)
    if isinstance(trained.task, Detection):
        predictions = [prediction.at_least(score) for prediction in predictions]
        if out is not None:
            _draw_each(trained.task, files, pictures, predictions, out)
    elif out is not None:
        trained.task.draw([torch.from_numpy(pixels) for pixels in pictures], predictions, None, out)
    return [
        {"picture": str(file), **trained.task.answer(prediction)}
        for file, prediction in zip(files, predictions, strict=True)
    ]


def _draw_each(
    task: Detection,
    files: Sequence[Path],
    pictures: Sequence[NDArray[np.uint8]],
    predictions: Sequence[FoundBoxes],
    folder: Path,
) -> None:
    """PICTURE.png for each picture; of two pictures with one name, the second is PICTURE-2.png."""
    folder.mkdir(parents=True, exist_ok=True)
    taken: Counter[str] = Counter()
    for file, pixels, found in zip(files, pictures, predictions, strict=True):
        taken[file.stem] += 1
        name = file.stem if taken[file.stem] == 1 else f"{file.stem}-{taken[file.stem]}"
        drawn = task.draw_boxes(torch.from_numpy(pixels), found, least=0.0)
        partial = folder / f".{name}.partial"
        Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(partial, format="png")
        partial.replace(folder / f"{name}.png")


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
