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
from spikefleet.status import Count, uncounted
from spikefleet.training.distributed import pick_device
from spikefleet.training.precision import autocast
from spikefleet_pipelines.in_memory import image_batch
from spikefleet_tune.atomic import replacing

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


def predict_files(
    trained: TrainedNetwork,
    paths: Sequence[Path],
    *,
    out: Path | None = None,
    gpu: bool = False,
    score: float = 0.3,
    progress: Count = uncounted,
) -> list[dict[str, Any]]:
    """What the network says of each image, in order: `{"image", "classes": [{"name", "probability"}, ...]}`, or
    `{"image", "objects": [{"name", "score", "box"}, ...]}` with boxes x1 y1 x2 y2 in the image's own pixels.

    Where the task says so, images are resized to the size of the training images.

    Args:
        trained: the network.
        paths: image files, or folders of them.
        out: a PNG with all of them; where each is drawn by itself, a folder, or a PNG when there is one image.
        gpu: predict on a GPU.
        score: parts of a prediction below it are left out.
        progress: called with (images done, images in all).

    Raises:
        UserError: names the file that is missing or no image, or the folder without any.
    """
    task = trained.task
    report = task.report
    if out is not None and not report.draws_each and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    files = list(_image_files(paths))
    for file in files:
        _check(file)
    device = pick_device(gpu)
    network, transform = trained.network.to(device), trained.config.data.transform
    channels = trained.config.model.in_channels
    names = _names(files, out, trained.config.task) if out is not None and report.draws_each else []
    answers: list[dict[str, Any]] = []
    pictures, predictions = [], []
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
            pictures.append(torch.from_numpy(pixels))
            predictions.append(prediction)
        answers.append({"image": str(file), **report.answer(prediction)})
        progress(position + 1, len(files))
    if pictures and out is not None:
        report.draw_files(pictures, predictions, [file.name for file in files], out)
    return answers


def _names(files: Sequence[Path], out: Path, task: str) -> list[Path]:
    """A PNG for each image in the folder `out`, by its name; of a single one, `out` itself where it ends in .png.

    No two are the same. Raises UserError where one of them is one of the images.
    """
    single = out.suffix.lower() == ".png" and not out.is_dir()
    if single and len(files) > 1:
        raise UserError(f"--out {out} is one image, and there are {len(files)} to predict; for {task}, give a folder")
    if not single and out.is_file():
        raise UserError(f"--out {out} is a file; for {task}, give a folder, or a .png when there is one image")
    names: list[Path] = [out] if single else _names_in(files, out)
    originals = {file.resolve() for file in files}
    if lost := [path for path in names if path.resolve() in originals]:
        raise UserError(f"--out {out} would overwrite the image {lost[0]}; give another place")
    return names


def _names_in(files: Sequence[Path], folder: Path) -> list[Path]:
    names: list[Path] = []
    for file in files:
        number, path = 1, folder / f"{file.stem}.png"
        while path in names:
            number += 1
            path = folder / f"{file.stem}-{number}.png"
        names.append(path)
    return names


def _image_files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not inside:
                raise UserError(f"folder {path} holds no images ({', '.join(sorted(_SUFFIXES))})")
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
    """Reads the header only, so that all files are looked at before anything is written."""
    try:
        with Image.open(file):
            pass
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {file} cannot be read: {error}") from None


def _read(file: Path, channels: int, shape: tuple[int, int, int] | None) -> NDArray[np.uint8]:
    """Pixels uint8 [C, H, W], upright."""
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {file} cannot be read: {error}") from None
    if shape is not None and picture.size != (shape[2], shape[1]):
        picture = picture.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))
