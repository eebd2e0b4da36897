"""Predictions for image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from spikefleet.errors import UserError
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.training.distributed import pick_device
from spikefleet.training.precision import autocast
from spikefleet_pipelines.in_memory import image_batch
from spikefleet_tune.atomic import replacing

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


def predict_files(
    trained: TrainedNetwork, paths: Sequence[Path], *, out: Path | None = None, gpu: bool = False, score: float = 0.3
) -> list[dict[str, Any]]:
    """Predicts image files.

    Images are resized to the size of the training images, unless the task takes any size.

    Args:
        trained: the network.
        paths: image files, and folders of them.
        out: one PNG with all images (classification), or a folder for each image with its prediction (detection).
        gpu: run on the GPU.
        score: smallest score of an object.

    Returns:
        For each image, in order, `{"image": PATH, "classes": [{"name", "probability"}, ...]}`, or
        `{"image": PATH, "objects": [{"name", "score", "box"}, ...]}` with boxes x1 y1 x2 y2 in pixels of the image.

    Raises:
        UserError: a file is missing or not an image, a folder has no images, or `out` cannot be used.
    """
    task = trained.task
    report = task.report
    if out is not None and not report.draws_each and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    if out is not None and report.draws_each and out.is_file():
        raise UserError(f"--out {out} is a file; {trained.config.task} needs a folder")
    files = list(_image_files(paths))
    for file in files:
        _check(file)
    device = pick_device(gpu)
    network, transform = trained.network.to(device), trained.config.data.transform
    channels = trained.config.model.in_channels
    names = _names(files, out) if out is not None and report.draws_each else []
    answers: list[dict[str, Any]] = []
    images, predictions = [], []
    # One image at a time: photographs are large, and a folder may hold thousands.
    for position, file in enumerate(files):
        pixels = _read(file, channels, None if task.any_size else trained.data.image_shape)
        batch = image_batch(pixels[None], transform, channels).to(device)
        with autocast(trained.config.train.precision, device):
            (prediction,) = task.predict(network, batch)
        prediction = task.confident(prediction, score)
        if names:
            _write_image(report.draw_one(torch.from_numpy(pixels), prediction), names[position])
        elif out is not None:
            images.append(torch.from_numpy(pixels))
            predictions.append(prediction)
        answers.append({"image": str(file), **report.answer(prediction)})
    if images and out is not None:
        report.draw(images, predictions, None, out)
    return answers


def _names(files: Sequence[Path], folder: Path) -> list[Path]:
    """A unique PNG for each image, by its name. Raises UserError if one would overwrite an image."""
    names: list[Path] = []
    for file in files:
        number, path = 1, folder / f"{file.stem}.png"
        while path in names:
            number += 1
            path = folder / f"{file.stem}-{number}.png"
        names.append(path)
    originals = {file.resolve() for file in files}
    if lost := [path for path in names if path.resolve() in originals]:
        raise UserError(f"--out {folder} would overwrite the image {lost[0]}; use another folder")
    return names


def _image_files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not inside:
                raise UserError(f"folder {path} has no images ({', '.join(sorted(_SUFFIXES))})")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise UserError(f"image {path} does not exist")


def _write_image(image: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(partial, format="png")


def _check(file: Path) -> None:
    """Reads the header only, so that all files are checked before anything is written."""
    try:
        with Image.open(file):
            pass
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {file} cannot be read: {error}") from None


def _read(file: Path, channels: int, shape: tuple[int, int, int] | None) -> NDArray[np.uint8]:
    """Reads an image as uint8 `[C, H, W]`, rotated as its EXIF orientation says."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {file} cannot be read: {error}") from None
    if shape is not None and image.size != (shape[2], shape[1]):
        image = image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))
