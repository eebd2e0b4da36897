"""The results of a split image by image, as arrays in a file: so two networks can be compared on the same images.

The file is NumPy's archive of plain arrays: nothing in it is ever unpickled. An image is known by its row in the split
and by the content hash of the data.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from spikefleet.errors import UserError
from spikefleet.tasks.coco_metrics import COCO_MAX_DETECTIONS, FoundBoxes, ground_truth, results
from spikefleet_pipelines.store.annotations import Annotations
from spikefleet_tune.atomic import write_atomically

if TYPE_CHECKING:  # pyarrow, which the training core does without
    from spikefleet.tasks.task import AnyTask
    from spikefleet_pipelines.store.reader import Samples

PER_IMAGE = "evaluation.npz"
"""File name of the results in a report and in a registered version, beside `evaluation.json`."""

MOST_BYTES = 64 << 20
"""Of the arrays: 5,000 images with 100 boxes each are 14 MB."""

_FORMAT = 1

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Answers:
    """One answer for each image, right or wrong."""

    predicted: NDArray[np.int32]
    """The class that was answered, [n]."""
    target: NDArray[np.int32]
    """The true class, [n]."""
    score: NDArray[np.float32]
    """The probability of the answer, [n]."""

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each answer is right, [n]."""
        return self.predicted == self.target

    def arrays(self) -> Arrays:
        """What is stored."""
        return {"predicted": self.predicted, "target": self.target, "score": self.score}

    @classmethod
    def of(cls, arrays: Arrays, images: int) -> Self:
        """Reads what `arrays` returned. Raises ValueError or KeyError if it is something else."""
        predicted, target, score = (_shaped(arrays[name], (images,)) for name in ("predicted", "target", "score"))
        return cls(_whole(predicted).astype(np.int32), _whole(target).astype(np.int32), score.astype(np.float32))


@dataclass(frozen=True)
class Boxes:
    """The detections and the objects of each image."""

    found: Sequence[FoundBoxes]
    targets: Sequence[Annotations]
    max_detections: int = COCO_MAX_DETECTIONS
    """Of a class in an image, so many count."""

    def coco(self, class_names: Sequence[str], category_ids: Sequence[int]) -> tuple[Any, list[Any]]:
        """Objects and detections in COCO's formats, as `coco_metrics.ground_truth` and `results` return them."""
        return ground_truth(self.targets, class_names, category_ids), results(self.found, self.targets, category_ids)

    def arrays(self) -> Arrays:
        """What is stored: the columns of all boxes and of all objects, and how many each image has."""
        return {
            "max_detections": np.array(self.max_detections),
            "found": np.array([len(one.scores) for one in self.found], np.int32),
            "boxes": _short(np.concatenate([np.zeros((0, 4)), *(one.boxes for one in self.found)])),
            "scores": _short(np.concatenate([np.zeros(0), *(one.scores for one in self.found)])),
            "labels": _joined([one.labels for one in self.found]).astype(np.int32),
            "objects": np.array([len(one.labels) for one in self.targets], np.int32),
            "image_ids": np.array([one.image_id for one in self.targets], np.int64),
            "sizes": np.array([(one.height, one.width) for one in self.targets], np.int32).reshape(-1, 2),
            "object_boxes": np.concatenate([np.zeros((0, 4)), *(one.boxes for one in self.targets)]),
            "object_categories": _joined([one.category_ids for one in self.targets]),
            "object_labels": _joined([one.labels for one in self.targets]).astype(np.int32),
            "object_crowds": _joined([one.crowd for one in self.targets]).astype(bool),
            "object_areas": np.concatenate([np.zeros(0), *(one.areas for one in self.targets)]),
        }

    @classmethod
    def of(cls, arrays: Arrays, images: int) -> Self:
        """Reads what `arrays` returned. Raises ValueError or KeyError if it is something else."""
        counts, objects = (_whole(_shaped(arrays[name], (images,))) for name in ("found", "objects"))
        if min(counts.min(initial=0), objects.min(initial=0)) < 0:
            raise ValueError("an image has fewer than 0 boxes")
        there, truth = int(counts.sum()), int(objects.sum())
        boxes = _parts(_shaped(arrays["boxes"], (there, 4)).astype(np.float64), counts)
        scores = _parts(_shaped(arrays["scores"], (there,)).astype(np.float64), counts)
        labels = _parts(_whole(_shaped(arrays["labels"], (there,))), counts)
        ids, sizes = _whole(_shaped(arrays["image_ids"], (images,))), _whole(_shaped(arrays["sizes"], (images, 2)))
        corners = _parts(_shaped(arrays["object_boxes"], (truth, 4)).astype(np.float64), objects)
        categories = _parts(_whole(_shaped(arrays["object_categories"], (truth,))), objects)
        classes = _parts(_whole(_shaped(arrays["object_labels"], (truth,))), objects)
        crowds = _parts(_shaped(arrays["object_crowds"], (truth,)).astype(bool), objects)
        areas = _parts(_shaped(arrays["object_areas"], (truth,)).astype(np.float64), objects)
        numbers = _parts(np.arange(truth), objects)
        targets = [
            Annotations(int(ids[k]), int(sizes[k, 0]), int(sizes[k, 1]), *columns)
            for k, columns in enumerate(zip(corners, categories, classes, crowds, areas, numbers, strict=True))
        ]
        return cls(
            [FoundBoxes(*one) for one in zip(boxes, scores, labels, strict=True)],
            targets,
            int(_whole(_shaped(arrays["max_detections"], ()))),
        )


Results = Answers | Boxes
_KINDS: dict[str, type[Answers] | type[Boxes]] = {"answers": Answers, "boxes": Boxes}


@dataclass(frozen=True)
class PerImage:
    """The results of one network on one split."""

    results: Results
    data_hash: str
    """Content hash of the data."""
    split: str
    """Name of the split."""
    rows: NDArray[np.int64]
    """Row of each image in the split, [n]."""

    def write(self, path: Path) -> None:
        """Writes the file, atomically; equal results give equal bytes. Raises OSError."""
        content = io.BytesIO()
        kind = next(name for name, one in _KINDS.items() if isinstance(self.results, one))
        header = {
            "format": np.array(_FORMAT),
            "kind": np.array(kind),
            "data_hash": np.array(self.data_hash),
            "split": np.array(self.split),
            "rows": self.rows,
        }
        np.savez_compressed(content, allow_pickle=False, **header, **self.results.arrays())
        write_atomically(path, content.getvalue())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the file; nothing is unpickled.

        Raises:
            UserError: it is missing, damaged, larger than 64 MiB, or of a later spikefleet.
        """
        try:
            with zipfile.ZipFile(path) as archive:  # before a byte of it is unpacked
                size = sum(entry.file_size for entry in archive.infolist())
            if size > MOST_BYTES:
                raise UserError(f"{path} has {size:,} bytes of arrays, more than {MOST_BYTES:,}; do not trust it")
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            if (found := int(_shaped(arrays["format"], ()))) != _FORMAT:
                raise UserError(f"{path}: expected format {_FORMAT}, found {found}; use the spikefleet that wrote it")
            kind, data_hash, split = (str(_shaped(arrays[name], ())) for name in ("kind", "data_hash", "split"))
            rows = _whole(arrays["rows"])
            if kind not in _KINDS or rows.ndim != 1:
                raise ValueError(f"it has results of kind {kind[:40]!r} of images [{rows.shape}]")
            return cls(_KINDS[kind].of(arrays, len(rows)), data_hash, split, rows)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged: it holds no results by image ({error!r:.200})") from None


def save_per_image(
    task: AnyTask, predictions: Sequence[Any], targets: Sequence[Any], split: Samples, folder: Path
) -> str | None:
    """Writes `evaluation.npz` for a whole split, if the task has results for single images.

    Args:
        task: made the predictions.
        predictions: of each row, in the order of the split.
        targets: of each row.
        split: of the images.
        folder: of the report.

    Returns:
        Why there is no file, for results that are too large; else None.
    """
    path = folder / PER_IMAGE
    path.unlink(missing_ok=True)  # of an earlier evaluation
    found = task.per_image(predictions, targets)
    if found is None:
        return None
    if (size := sum(array.nbytes for array in found.arrays().values())) > MOST_BYTES:
        return (
            f"the results of {len(targets):,} single images are not kept: they are {size >> 20} MiB, more than "
            f"{MOST_BYTES >> 20}; versions are compared by their metrics alone"
        )
    folder.mkdir(parents=True, exist_ok=True)
    PerImage(found, split.manifest.content_hash, split.name, np.arange(len(targets))).write(path)
    return None


def _short(values: NDArray[np.float64]) -> NDArray[Any]:
    """The values in float32, where that changes none: networks answer in float32."""
    short = values.astype(np.float32)
    return short if np.array_equal(short.astype(np.float64), values) else values


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _parts(column: NDArray[Any], counts: NDArray[np.int64]) -> list[NDArray[Any]]:
    return np.split(column, np.cumsum(counts)[:-1]) if len(counts) else []


def _shaped(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if array.shape != shape:
        raise ValueError(f"found shape {list(array.shape)}, expected {list(shape)}")
    return array


def _whole(array: NDArray[Any]) -> NDArray[np.int64]:
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"found {array.dtype}, expected integers")
    return array.astype(np.int64)
