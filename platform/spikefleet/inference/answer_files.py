"""Files of predictions: drawn images, crops of objects, labels in YOLO's format, a data set in COCO's.

Each file appears complete or not at all. Nothing is written over an input, and over other files only where the user
says so (`force`); that is checked before the first image is read.
"""

from __future__ import annotations

import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from spikefleet.errors import UserError
from spikefleet.inference.image_entry import ImageEntry, Loaded
from spikefleet.inference.image_input import Pixels
from spikefleet.inference.image_lists import ImageList
from spikefleet.inference.trained_network import TrainedNetwork
from spikefleet.outputs import check_output_folder, check_outputs
from spikefleet.tasks.coco_metrics import FoundBoxes
from spikefleet_tune.atomic import replacing, write_atomically

MOST_DRAWN = 64
"""Most images in one PNG: they are held in memory, and more are too small to see."""

_CLASSES = "classes.txt"
_NO_NAME = re.compile(r"[^\w .-]")


class AnswerFiles(ABC):
    """Something that is written of the predictions, one after the other."""

    left_out: int = 0
    """Images that have no place in it."""

    @abstractmethod
    def add(self, entry: int, image: Loaded, pixels: Pixels, prediction: Any) -> None:
        """Takes a prediction.

        Args:
            entry: number of the image's entry in the list.
            image: where it is from.
            pixels: that the network was given, uint8 `[C, H, W]`.
            prediction: of the task.
        """

    def finish(self) -> None:
        """Writes what needs all predictions; nothing by default."""
        return


class _Names:
    """A path for each image: the name of its entry, or, of a video, the number of the frame in a folder of its name.

    Paths differ in more than case and form of Unicode: file systems of macOS and Windows take such names for one.
    """

    def __init__(self, entries: Sequence[ImageEntry], folder: Path, suffix: str, *, nested: bool) -> None:
        self._suffix = suffix
        self.paths: list[Path] = []
        taken: set[str] = set()
        numbers: Counter[str] = Counter()
        for entry in entries:
            place = entry.place if nested else PurePosixPath(entry.place.name)
            if nested and (".." in place.parts or place.is_absolute()):
                raise UserError(f"image {entry.name}: its name {place} leads out of {folder}; give its folder instead")
            ending = suffix if entry.frames is None else ""
            stem = place.with_suffix("") if entry.frames is None else place
            path, key = folder / f"{stem}{ending}", _folded(f"{stem}{ending}")
            first = key
            while key in taken:
                numbers[first] += 1  # the next number and not the first free one, for there may be 100,000 of a name
                numbered = f"{stem}-{numbers[first] + 1}{ending}"
                path, key = folder / numbered, _folded(numbered)
            taken.add(key)
            self.paths.append(path)

    def of(self, entry: int, image: Loaded) -> Path:
        path = self.paths[entry]
        return path if image.frame is None else path / f"{image.frame:06d}{self._suffix}"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _check_names(names: _Names, images: ImageList, trained: TrainedNetwork, force: bool, option: str) -> None:
    inputs = [*images.local, *trained.folders]
    files = [path for path, entry in zip(names.paths, images.entries, strict=True) if entry.frames is None]
    check_outputs(files, inputs=inputs, force=force, option=option)
    for path, entry in zip(names.paths, images.entries, strict=True):
        if entry.frames is not None:
            check_output_folder(path, option, inputs=inputs, force=force)


class DrawnImages(AnswerFiles):
    """Each image with its prediction drawn on it, as a PNG in a folder; or the only one at the path of a PNG."""

    def __init__(self, trained: TrainedNetwork, images: ImageList, out: Path, force: bool) -> None:
        self._report = trained.task.report
        single = out.suffix.lower() == ".png" and not out.is_dir()
        task = trained.config.task
        several = len(images.entries) > 1 or any(entry.frames is not None for entry in images.entries)
        if single and several:
            raise UserError(
                f"--out {out} is one image, and there are {images.expected} to predict; for {task}, give a folder"
            )
        if not single and out.is_file():
            raise UserError(f"--out {out} is a file; for {task}, give a folder, or a .png when there is one image")
        self._names = _Names(images.entries, out.parent if single else out, ".png", nested=False)
        if single:
            self._names.paths = [out]
        _check_names(self._names, images, trained, force, "--out")

    def add(self, entry: int, image: Loaded, pixels: Pixels, prediction: Any) -> None:
        """Draws the image."""
        drawn = self._report.draw_one(torch.tensor(pixels), prediction)
        _write_png(drawn.permute(1, 2, 0).numpy(), self._names.of(entry, image))


class DrawnSheet(AnswerFiles):
    """The first `MOST_DRAWN` images with their predictions in one PNG."""

    def __init__(self, trained: TrainedNetwork, images: ImageList, out: Path, force: bool) -> None:
        if out.suffix.lower() != ".png":
            raise UserError(f"--out {out} must end in .png")
        check_outputs([out], inputs=[*images.local, *trained.folders], force=force)
        self._report, self._out = trained.task.report, out
        self._images: list[torch.Tensor] = []
        self._predictions: list[Any] = []
        self._names: list[str] = []

    def add(self, entry: int, image: Loaded, pixels: Pixels, prediction: Any) -> None:
        """Keeps the image, as far as it is drawn."""
        if len(self._images) == MOST_DRAWN:
            self.left_out += 1
            return
        self._images.append(torch.tensor(pixels))
        self._predictions.append(prediction)
        name = Path(image.name).name
        self._names.append(name if image.frame is None else f"{name} frame {image.frame}")

    def finish(self) -> None:
        """Draws the sheet."""
        if self._images:
            self._report.draw_files(self._images, self._predictions, self._names, self._out)


class Crops(AnswerFiles):
    """Each object as a PNG of its own, in a folder for each class."""

    def __init__(self, trained: TrainedNetwork, images: ImageList, folder: Path, force: bool) -> None:
        check_output_folder(folder, "--crops", inputs=[*images.local, *trained.folders], force=force)
        names = list(map(_folder_name, trained.data.class_names))
        repeated = {name for name, count in Counter(map(str.casefold, names)).items() if count > 1}
        self._folders = [
            folder / (f"{number} {name}" if name.casefold() in repeated else name) for number, name in enumerate(names)
        ]
        self._names = _Names(images.entries, Path(), "", nested=False)

    def add(self, entry: int, image: Loaded, pixels: Pixels, prediction: FoundBoxes) -> None:
        """Writes the objects; the pixels that a box touches."""
        _, height, width = pixels.shape
        named = self._names.of(entry, image)
        for number, (box, label) in enumerate(zip(prediction.boxes, prediction.labels, strict=True)):
            left, top = np.floor(box[:2]).astype(int).clip(0, [width - 1, height - 1])
            right, bottom = np.ceil(box[2:]).astype(int).clip([left + 1, top + 1], [width, height])
            path = self._folders[label] / named.with_name(f"{named.name}-{number}.png")
            crop = pixels[:, top:bottom, left:right]
            _write_png((crop[0] if len(crop) == 1 else crop.transpose(1, 2, 0)), path)


class YoloLabels(AnswerFiles):
    """A text file for each image, a line `class x_center y_center width height` for each object; and `classes.txt`.

    Coordinates are fractions of the image; scores have no place in the format.
    """

    def __init__(self, trained: TrainedNetwork, images: ImageList, folder: Path, force: bool) -> None:
        self._names = _Names(images.entries, folder, ".txt", nested=True)
        _refuse_shared(images, "--yolo", lambda entry: entry.place.with_suffix(""))
        self._classes = folder / _CLASSES
        if self._classes in self._names.paths:
            raise UserError(
                f"--yolo: an image is named 'classes', whose labels would be the file {_CLASSES}; rename it"
            )
        _check_names(self._names, images, trained, force, "--yolo")
        inputs = [*images.local, *trained.folders]
        check_outputs([self._classes], inputs=inputs, force=force, option="--yolo")
        self._class_names = [" ".join(name.split()) or "-" for name in trained.data.class_names]

    def add(self, entry: int, image: Loaded, pixels: Pixels, prediction: FoundBoxes) -> None:
        """Writes the labels of an image; an empty file where there is no object."""
        _, height, width = pixels.shape
        lines = []
        for box, label in zip(prediction.boxes, prediction.labels, strict=True):
            left, top, right, bottom = (box / [width, height, width, height]).tolist()
            values = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
            lines.append(f"{label} " + " ".join(f"{value:.17g}" for value in values) + "\n")
        _write(self._names.of(entry, image), "".join(lines))

    def finish(self) -> None:
        """Writes the names of the classes."""
        _write(self._classes, "".join(f"{name}\n" for name in self._class_names))


class CocoFile(AnswerFiles):
    """A data set in COCO's format: images, categories, and annotations with a `score`."""

    def __init__(self, trained: TrainedNetwork, images: ImageList, path: Path, force: bool) -> None:
        _refuse_shared(images, "--coco", lambda entry: entry.place)
        check_outputs([path], inputs=[*images.local, *trained.folders], force=force, option="--coco")
        self._path, self._entries, self._ids = path, images.entries, trained.data.category_ids
        self._categories = [
            {"id": key, "name": name} for key, name in zip(self._ids, trained.data.class_names, strict=True)
        ]
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, entry: int, image: Loaded, pixels: Pixels, prediction: FoundBoxes) -> None:
        """Keeps the objects of an image."""
        _, height, width = pixels.shape
        key = len(self._images) + 1
        frame = {} if image.frame is None else {"frame": image.frame, "time_s": image.time_s}
        name = str(self._entries[entry].place)
        self._images.append({"id": key, "file_name": name, "height": height, "width": width, **frame})
        for box, score, label in zip(prediction.boxes, prediction.scores, prediction.labels, strict=True):
            left, top, right, bottom = box.tolist()
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": key,
                    "category_id": self._ids[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                    "score": float(score),
                }
            )

    def finish(self) -> None:
        """Writes the file."""
        content = {"images": self._images, "annotations": self._annotations, "categories": self._categories}
        _write(self._path, json.dumps(content) + "\n")


def _refuse_shared(images: ImageList, option: str, name: Any) -> None:
    """Labels go with images by their names below the folder; two of one name could not be told apart."""
    found: dict[PurePosixPath, str] = {}
    for entry in images.entries:
        before = found.setdefault(name(entry), entry.name)
        if before != entry.name:
            raise UserError(
                f"{option}: {before} and {entry.name} would both be {name(entry)}; give the folder that holds both, "
                "with --recursive"
            )


def _folder_name(name: str) -> str:
    """The name of a class as that of a folder: without separators, and none that means another folder."""
    return _NO_NAME.sub("_", name).strip(" .")[:100] or "_"


def _write_png(pixels: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        Image.fromarray(np.ascontiguousarray(pixels)).save(partial, format="png")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
