"""Predictions for images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spikefleet.errors import UserError
from spikefleet.inference.image_input import ImageInput, Pixels, read_image, read_unnamed
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.outputs import check_outputs
from spikefleet.status import Count, uncounted
from spikefleet.training.distributed import pick_device
from spikefleet.training.precision import autocast
from spikefleet_pipelines.in_memory import image_batch, resized, with_channels
from spikefleet_pipelines.store.image_files import counted_reasons, list_images
from spikefleet_pipelines.store.image_header import IMAGE_SUFFIXES
from spikefleet_tune.atomic import replacing


@dataclass
class Predicted:
    """What became of image files."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    """For each image that was read, in order; see `predict_files`."""
    bad: list[tuple[Path, str]] = field(default_factory=list)
    """Files that are no image that can be read, with the reasons."""
    unused: str = ""
    """Numbers of other files in the folders by reason, such as images in sub-folders."""


def _unheard(answer: Mapping[str, Any]) -> None:
    """Tells nobody."""


def predict_files(
    trained: TrainedNetwork,
    paths: Sequence[Path],
    *,
    out: Path | None = None,
    force: bool = False,
    recursive: bool = False,
    gpu: bool = False,
    score: float = 0.3,
    progress: Count = uncounted,
    answered: Callable[[Mapping[str, Any]], None] = _unheard,
) -> Predicted:
    """Predicts image files; one that cannot be read does not keep the others from their answers.

    Images are resized to the size of the training images, unless the task takes any size.

    Args:
        trained: the network.
        paths: image files, and folders of them.
        out: one PNG with all images (classification); a folder for each image with its prediction, or a PNG when there
            is one image (detection).
        force: replace files that are there, unless they are among the images.
        recursive: of folders, read the images in sub-folders too.
        gpu: run on the GPU.
        score: smallest score of an object.
        progress: called with (images done, images in all).
        answered: called with each answer as soon as it is there, and with `{"image": PATH, "error": REASON}` for a
            file that cannot be read.

    Returns:
        The answers, `{"image": PATH, "classes": [{"name", "probability"}, ...]}`, or
        `{"image": PATH, "objects": [{"name", "score", "box"}, ...]}` with boxes x1 y1 x2 y2 in pixels of the image; and
        the files that could not be read.

    Raises:
        UserError: a path is missing, a folder has no images, or `out` cannot be used.
    """
    report = trained.task.report
    if out is not None and not report.draws_each and out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png")
    files, unused = _image_files(paths, recursive)
    names = _names(files, out, trained.config.task) if out is not None and report.draws_each else []
    if out is not None:
        check_outputs(names or [out], inputs=[*files, *trained.folders], force=force)
    done = Predicted(unused=unused)
    predict = _Predictor(trained, gpu, score)
    images, predictions, shown = [], [], []
    for position, file in enumerate(files):
        try:
            image = read_unnamed(file)
        except ValueError as error:
            done.bad.append((file, str(error)))
            answered({"image": str(file), "error": str(error)})
            progress(position + 1, len(files))
            continue
        pixels, prediction = predict(image)
        if names:
            _write_image(report.draw_one(torch.tensor(pixels), prediction), names[position])
        elif out is not None:
            images.append(torch.tensor(pixels))
            predictions.append(prediction)
            shown.append(file.name)
        done.answers.append({"image": str(file), **report.answer(prediction)})
        answered(done.answers[-1])
        progress(position + 1, len(files))
    if images and out is not None:
        report.draw_files(images, predictions, shown, out)
    return done


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
    predict = _Predictor(trained, gpu, score)
    for image in images:
        yield predict(read_image(image))


class _Predictor:
    """A network on its device: RGB or grey pixels -> the pixels that it was given, and its prediction."""

    def __init__(self, trained: TrainedNetwork, gpu: bool, score: float) -> None:
        self._task, self._score = trained.task, score
        self._device = pick_device(gpu)
        self._network = trained.network.to(self._device)
        self._transform, self._precision = trained.config.transform, trained.config.train.precision
        self._channels = trained.config.model.in_channels
        self._size = self._task.input_size(trained.data)

    def __call__(self, image: Pixels) -> tuple[Pixels, Any]:
        pixels = resized(with_channels(image, self._channels), self._size)
        batch = image_batch(pixels[None], self._transform, self._channels).to(self._device)
        with autocast(self._precision, self._device):
            (prediction,) = self._task.predict(self._network, batch)
        return pixels, self._task.confident(prediction, self._score)


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


def _image_files(paths: Sequence[Path], recursive: bool) -> tuple[list[Path], str]:
    """The images of files and folders, and the numbers of other files in the folders by reason.

    Hidden files that are named as images are among them, so that those of macOS beside each image are named.
    """
    files: list[Path] = []
    unused: Counter[str] = Counter()
    for path in paths:
        if path.is_dir() and path.suffix.lower() not in IMAGE_SUFFIXES:
            found = list_images(path, recursive, hidden=True)
            if not found.images:
                others = f"; it has {found.summary}" if found.unused else ""
                raise UserError(f"folder {path} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}){others}")
            files += found.images
            unused.update(reason for _, reason in found.unused)
        elif path.exists() or path.is_symlink():
            files.append(path)
        else:
            raise UserError(f"image {path} does not exist")
    return files, counted_reasons(unused)


def _write_image(image: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(partial, format="png")
