"""Predictions for images: of arrays and files for programs, of all that a user names for the command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from spikefleet.errors import UserError
from spikefleet.inference.answer_files import AnswerFiles, CocoFile, Crops, DrawnImages, DrawnSheet, YoloLabels
from spikefleet.inference.image_entry import Loaded
from spikefleet.inference.image_input import ImageInput, Pixels, read_image
from spikefleet.inference.image_lists import ImageList
from spikefleet.inference.predictor import Predictor
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.status import Count, uncounted


@dataclass(frozen=True)
class Written:
    """What is written beside the answers."""

    out: Path | None = None
    """One PNG with all images (classification); a folder for each image with its prediction, or a PNG when there is one
    image (detection)."""
    crops: Path | None = None
    """A folder for each object as a PNG, by class."""
    yolo: Path | None = None
    """A folder for labels in YOLO's format."""
    coco: Path | None = None
    """A file for a data set in COCO's format."""
    force: bool = False
    """Replace files that are there, unless they are among the images."""


@dataclass
class Predicted:
    """What became of images."""

    answered: int = 0
    """Images that were read."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Those that cannot be read, with the reasons."""
    not_drawn: int = 0
    """Images that were answered, and are not in the PNG of all."""


def _unheard(answer: Mapping[str, Any]) -> None:
    """Tells nobody."""


def predict_files(
    trained: TrainedNetwork,
    images: ImageList,
    predictor: Predictor,
    *,
    written: Written | None = None,
    progress: Count = uncounted,
    answered: Callable[[Mapping[str, Any]], None] = _unheard,
) -> Predicted:
    """Predicts images as they are read; one that cannot be read does not keep the others from their answers.

    Images are resized to the size of the training images, unless the task takes any size.

    Args:
        trained: the network.
        images: as `list_of_images` finds them.
        predictor: of the network.
        written: files of the answers.
        progress: called with (images done, images in all); of videos as many as their headers promise.
        answered: called with each answer as soon as it is there: `{"image": NAME, "classes": [{"name", "probability"},
            ...]}`, or `"objects": [{"name", "score", "box"}, ...]` with boxes x1 y1 x2 y2 in pixels of the image; of a
            frame with its `frame` and `time_s`. Of an image that cannot be read `{"image": NAME, "error": REASON}`.

    Returns:
        How many were answered, and which could not be read.

    Raises:
        UserError: a place to write to cannot be used, or the network finds no boxes to write.
    """
    files = _files(trained, images, written or Written())
    report, done, total = trained.task.report, Predicted(), images.expected
    for chunk in _chunks(_loaded(images), predictor.batch):
        predictions = iter(predictor([image.pixels for _, image in chunk if image.pixels is not None]))
        for entry, image in chunk:
            if image.pixels is None:
                done.bad.append((image.name, image.error))
                answered({"image": image.name, "error": image.error})
            else:
                pixels, prediction = next(predictions)
                for one in files:
                    one.add(entry, image, pixels, prediction)
                done.answered += 1
                answered({**image.origin, **report.answer(prediction)})
        count = done.answered + len(done.bad)
        progress(count, max(total, count))
    for one in files:
        one.finish()
        done.not_drawn += one.left_out
    return done


def predict_images(
    trained: TrainedNetwork, images: Iterable[ImageInput], *, gpu: bool = False, score: float = 0.3, batch: int = 1
) -> Iterator[tuple[Pixels, Any]]:
    """Iterates over predictions, as few images at a time as `batch`: a folder may hold thousands of photographs.

    Args:
        trained: the network.
        images: files, PIL images or arrays; resized to the size of the training images, unless the task takes any
            size.
        gpu: run on the GPU.
        score: smallest score of an object.
        batch: the most images that the network sees at once.

    Yields:
        The pixels of each image, uint8 `[C, H, W]` before normalisation, with the task's prediction.

    Raises:
        UserError: an image cannot be read, or there is no GPU.
    """
    predictor = Predictor(trained, gpu=gpu, score=score, batch=batch)
    rest = iter(images)
    while chunk := list(islice(rest, batch)):
        yield from predictor([read_image(image) for image in chunk])


def _loaded(images: ImageList) -> Iterator[tuple[int, Loaded]]:
    for number, entry in enumerate(images.entries):
        yield from ((number, image) for image in entry.images())


def _chunks(images: Iterator[tuple[int, Loaded]], size: int) -> Iterator[Sequence[tuple[int, Loaded]]]:
    """As many images as the network sees at once, with those between them that cannot be read."""
    chunk: list[tuple[int, Loaded]] = []
    readable = 0
    for one in images:
        chunk.append(one)
        readable += one[1].pixels is not None
        if readable == size or not readable:
            yield chunk
            chunk, readable = [], 0
    if chunk:
        yield chunk


def _files(trained: TrainedNetwork, images: ImageList, written: Written) -> list[AnswerFiles]:
    task, files = trained.task, list[AnswerFiles]()
    of_boxes = {"--crops": written.crops, "--yolo": written.yolo, "--coco": written.coco}
    for option, place in of_boxes.items():
        if place is not None and not task.finds_boxes:
            raise UserError(f"{option} {place} is for boxes, and {trained.reference} finds none; leave it out")
    force = written.force
    if written.out is not None:
        drawn = DrawnImages if task.report.draws_each else DrawnSheet
        files.append(drawn(trained, images, written.out, force))
    if written.crops is not None:
        files.append(Crops(trained, images, written.crops, force))
    if written.yolo is not None:
        files.append(YoloLabels(trained, images, written.yolo, force))
    if written.coco is not None:
        files.append(CocoFile(trained, images, written.coco, force))
    return files
