"""Predictions for images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spikefleet.errors import UserError
from spikefleet.inference.image_input import ImageInput, Pixels, check_image_file, read_image
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.outputs import check_outputs
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
    force: bool = False,
    gpu: bool = False,
    score: float = 0.3,
    progress: Count = uncounted,
) -> list[dict[str, Any]]:
    """Predicts image files.

    Images are resized to the size of the training images, unless the task takes any size.

    Args:
        trained: the network.
        paths: image files, and folders of them.
        out: one PNG with all images (classification); a folder for each image with its prediction, or a PNG when there
            is one image (detection).
        force: replace files that are there, unless they are among the images.
        gpu: run on the GPU.
        score: smallest score of an object.
        progress: called with (images done, images in all).

    Returns:
        For each image, in order, `{"image": PATH, "classes": [{"name", "probability"}, ...]}`, or
        `{"image": PATH, "objects": [{"name", "score", "box"}, ...]}` with boxes x1 y1 x2 y2 in pixels of the image.

    Raises:
        UserError: a file is missing or not an image, a folder has no images, or `out` cannot be used.
    """
    report = trained.task.report
    if out is not None and not report.draws_each and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    files = list(_image_files(paths))
    for file in files:
        check_image_file(file)
    names = _names(files, out, trained.config.task) if out is not None and report.draws_each else []
    if out is not None:
        check_outputs(names or [out], inputs=[*files, *trained.folders], force=force)
    answers: list[dict[str, Any]] = []
    images, predictions = [], []
    for position, (pixels, prediction) in enumerate(predict_images(trained, files, gpu=gpu, score=score)):
        if names:
            _write_image(report.draw_one(torch.tensor(pixels), prediction), names[position])
        elif out is not None:
            images.append(torch.tensor(pixels))
            predictions.append(prediction)
        answers.append({"image": str(files[position]), **report.answer(prediction)})
        progress(position + 1, len(files))
    if images and out is not None:
        report.draw_files(images, predictions, [file.name for file in files], out)
    return answers


def predict_images(
    trained: TrainedNetwork, images: Iterable[ImageInput], *, gpu: bool = False, score: float = 0.3
) -> Iterator[tuple[Pixels, Any]]:
    """Iterates over predictions, one image at a time: photographs are large, and a folder may hold thousands.

    Args:
        trained: the network.
        images: files, PIL images or arrays; resized to the size of the training images, unless the task takes any
            size.
        gpu: run on the GPU.
        score: smallest score of an object.

    Yields:
        The pixels of each image, uint8 `[C, H, W]` before normalisation, with the task's prediction.

    Raises:
        UserError: an image cannot be read, or there is no GPU.
    """
    task, device = trained.task, pick_device(gpu)
    network, transform = trained.network.to(device), trained.config.data.transform
    channels, shape = trained.config.model.in_channels, trained.data.image_shape
    size = None if task.any_size or shape is None else shape[1:]
    for image in images:
        pixels = read_image(image, channels, size)
        batch = image_batch(pixels[None], transform, channels).to(device)
        with autocast(trained.config.train.precision, device):
            (prediction,) = task.predict(network, batch)
        yield pixels, task.confident(prediction, score)


def _names(files: Sequence[Path], out: Path, task: str) -> list[Path]:
    """A PNG for each image in the folder `out`, by its name; of a single one, `out` itself where it ends in .png.

    No two are the same.
    """
    single = out.suffix.lower() == ".png" and not out.is_dir()
    if single and len(files) > 1:
        raise UserError(f"--out {out} is one image, and there are {len(files)} to predict; for {task}, give a folder")
    if not single and out.is_file():
        raise UserError(f"--out {out} is a file; for {task}, give a folder, or a .png when there is one image")
    return [out] if single else _names_in(files, out)


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
