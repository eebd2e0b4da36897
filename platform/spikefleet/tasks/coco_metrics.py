"""COCO's figures of detections, by pycocotools, which defines them.

The evaluation reads the same plain data that `ground_truth.json` and `predictions.json` of a report hold, so
pycocotools run by hand on those files gives the same figures.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spikefleet_pipelines.store.annotations import Annotations

FIGURES = (
    "map50_95",
    "map50",
    "map75",
    "map_small",
    "map_medium",
    "map_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)
"""COCO's twelve numbers, in its order: mean average precision, and average recall at 1, 10 and 100 boxes a picture."""

_IOU_50 = 0


@dataclass(frozen=True)
class FoundBoxes:
    """The detections in one picture, best first."""

    boxes: NDArray[np.float64]
    """[M, 4], x1 y1 x2 y2 in pixels of the stored picture."""
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    """[M], 0 to K - 1."""

    def at_least(self, score: float) -> FoundBoxes:
        """Those of this score and above."""
        kept = self.scores >= score
        return FoundBoxes(self.boxes[kept], self.scores[kept], self.labels[kept])


@dataclass(frozen=True)
class ClassFigures:
    """One class: its objects (without crowds), and average precision; None where it has no object."""

    name: str
    objects: int
    ap50_95: float | None
    ap50: float | None
    precision50: tuple[float, ...]
    """Precision at IoU 0.5 for recall 0, 0.01, ..., 1; empty where the class has no object."""


@dataclass(frozen=True)
class CocoFigures:
    """All figures of an evaluation; one of the twelve is left out where nothing in the data is of its kind."""

    twelve: dict[str, float]
    classes: tuple[ClassFigures, ...]


def ground_truth(truths: Sequence[Annotations], class_names: Sequence[str], category_ids: Sequence[int]) -> Any:
    """COCO's annotation format. Boxes without area stand in it as they were given.

    Annotations are numbered anew from 1: pycocotools takes the id 0 for "not matched".
    """
    numbers = itertools.count(1)
    return {
        "images": [{"id": truth.image_id, "height": truth.height, "width": truth.width} for truth in truths],
        "categories": [{"id": key, "name": name} for key, name in zip(category_ids, class_names, strict=True)],
        "annotations": [
            {
                "id": next(numbers),
                "image_id": truth.image_id,
                "category_id": int(category),
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(crowd),
            }
            for truth in truths
            for category, box, area, crowd in zip(
                truth.category_ids, truth.boxes, truth.areas, truth.crowd, strict=True
            )
        ],
    }


def results(found: Sequence[FoundBoxes], truths: Sequence[Annotations], category_ids: Sequence[int]) -> list[Any]:
    """COCO's result format: one entry a box, x y w h."""
    entries = []
    for one, truth in zip(found, truths, strict=True):
        for box, score, label in zip(one.boxes, one.scores, one.labels, strict=True):
            left, top, right, bottom = box.tolist()
            entries.append(
                {
                    "image_id": truth.image_id,
                    "category_id": category_ids[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "score": float(score),
                }
            )
    return entries


def evaluate_boxes(truth: Any, found: Sequence[Any]) -> CocoFigures:
    """COCO's figures of results (`results`) against annotations (`ground_truth`)."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = COCO()
        annotated.dataset = truth
        annotated.createIndex()
        evaluation = COCOeval(annotated, _detections(annotated, truth, found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    twelve = {name: float(value) for name, value in zip(FIGURES, evaluation.stats, strict=True) if value > -1}
    # [IoU, recall, class, area, boxes a picture]: all areas, 100 boxes a picture
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    counts = dict.fromkeys(evaluation.params.catIds, 0)
    for entry in truth["annotations"]:
        counts[entry["category_id"]] += not entry["iscrowd"]
    names = {category["id"]: category["name"] for category in truth["categories"]}
    classes = {
        key: _class_figures(names[key], counts[key], precision[:, :, position])
        for position, key in enumerate(evaluation.params.catIds)
    }
    return CocoFigures(twelve, tuple(classes[category["id"]] for category in truth["categories"]))


def box_confusion(
    found: Sequence[FoundBoxes], truths: Sequence[Annotations], classes: int, iou: float = 0.5
) -> NDArray[np.int64]:
    """Counts [K + 1, K + 1]; rows: the truth, columns: what was found; the last of each is the background.

    Each object is matched with the free box of any class that overlaps it most, at least by `iou`; the largest overlaps
    first. Crowds are left out, and so is what was found in them.
    """
    from torchvision.ops import box_iou  # seconds to import

    counts = np.zeros((classes + 1, classes + 1), np.int64)
    for one, truth in zip(found, truths, strict=True):
        crowd = truth.crowd.tolist()
        corners = [[x, y, x + width, y + height] for x, y, width, height in truth.boxes.tolist()]
        overlaps = np.zeros((len(corners), len(one.boxes)))
        if overlaps.size:
            boxes = torch.from_numpy(one.boxes).double()
            overlaps = box_iou(torch.tensor(corners, dtype=torch.float64), boxes).numpy()
        free_objects, free_boxes = {k for k, is_crowd in enumerate(crowd) if not is_crowd}, set(range(len(one.boxes)))
        for place in np.argsort(-overlaps, axis=None, kind="stable"):
            row, column = divmod(int(place), max(1, len(one.boxes)))
            if not overlaps[row, column] >= iou:  # NaN for two boxes without area
                break
            if row in free_objects and column in free_boxes:
                counts[truth.labels[row], one.labels[column]] += 1
                free_objects.remove(row)
                free_boxes.remove(column)
        for row in free_objects:
            counts[truth.labels[row], classes] += 1
        for column in free_boxes:
            if not any(crowd[row] and overlaps[row, column] > 0 for row in range(len(crowd))):
                counts[classes, one.labels[column]] += 1
    return counts


def _detections(annotated: COCO, truth: Any, found: Sequence[Any]) -> COCO:
    if found:
        return annotated.loadRes(list(found))
    nothing = COCO()  # loadRes reads the first result, and there is none
    nothing.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": []}
    nothing.createIndex()
    return nothing


def _class_figures(name: str, objects: int, precision: NDArray[np.float64]) -> ClassFigures:
    """`precision` is [IoU, recall]; -1 all over for a class without objects."""
    if (precision < 0).all():
        return ClassFigures(name, objects, None, None, ())
    curve = precision[_IOU_50]
    return ClassFigures(name, objects, float(precision.mean()), float(curve.mean()), tuple(curve.tolist()))
