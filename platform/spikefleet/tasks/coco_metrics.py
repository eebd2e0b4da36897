"""COCO metrics of detections, computed by pycocotools, which defines them.

The evaluation reads the same plain data that a report saves in `ground_truth.json` and `predictions.json`, so running
pycocotools on these files gives the same metrics.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from spikefleet_pipelines.store.annotations import Annotations

if TYPE_CHECKING:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

COCO_METRICS = (
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
"""COCO's twelve metrics, in its order: mean average precision, and average recall at 1, 10 and 100 boxes per image."""

COCO_MAX_DETECTIONS = 100
"""The most detections of a class in an image that COCO's metrics count."""

_IOU_50 = 0


@dataclass(frozen=True)
class FoundBoxes:
    """The detections in one image, best first."""

    boxes: NDArray[np.float64]
    """`[M, 4]`, x1 y1 x2 y2 in pixels of the stored image."""
    scores: NDArray[np.float64]
    """`[M]`, in [0, 1]."""
    labels: NDArray[np.int64]
    """`[M]`, 0 to K - 1."""

    def at_least(self, score: float) -> FoundBoxes:
        """The detections with at least this score."""
        kept = self.scores >= score
        return FoundBoxes(self.boxes[kept], self.scores[kept], self.labels[kept])


@dataclass(frozen=True)
class ClassMetrics:
    """One class: its number of objects (without crowds), and average precision; None for a class without objects."""

    name: str
    objects: int
    ap50_95: float | None
    ap50: float | None
    precision50: tuple[float, ...]
    """Precision at IoU 0.5 for recall 0, 0.01, ..., 1; empty for a class without objects."""


@dataclass(frozen=True)
class CocoMetrics:
    """All metrics of an evaluation."""

    twelve: dict[str, float]
    """COCO's twelve metrics by name, without those that are undefined (no large object, for example)."""
    classes: tuple[ClassMetrics, ...]


def ground_truth(targets: Sequence[Annotations], class_names: Sequence[str], category_ids: Sequence[int]) -> Any:
    """Annotations in COCO's format; boxes without area are kept.

    Annotations get new ids from 1: to pycocotools the id 0 means "not matched".

    Args:
        targets: annotations of each image.
        class_names: of the K classes.
        category_ids: COCO's id of each class.
    """
    numbers = itertools.count(1)
    return {
        "images": [{"id": target.image_id, "height": target.height, "width": target.width} for target in targets],
        "categories": [{"id": key, "name": name} for key, name in zip(category_ids, class_names, strict=True)],
        "annotations": [
            {
                "id": next(numbers),
                "image_id": target.image_id,
                "category_id": int(category),
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(crowd),
            }
            for target in targets
            for category, box, area, crowd in zip(
                target.category_ids, target.boxes, target.areas, target.crowd, strict=True
            )
        ],
    }


def results(found: Sequence[FoundBoxes], targets: Sequence[Annotations], category_ids: Sequence[int]) -> list[Any]:
    """Detections in COCO's result format: one entry per box, x y w h.

    Args:
        found: detections of each image.
        targets: annotations of each image, which have its id.
        category_ids: COCO's id of each class.
    """
    entries = []
    for one, target in zip(found, targets, strict=True):
        for box, score, label in zip(one.boxes, one.scores, one.labels, strict=True):
            left, top, right, bottom = box.tolist()
            entries.append(
                {
                    "image_id": target.image_id,
                    "category_id": category_ids[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "score": float(score),
                }
            )
    return entries


def metric_names(max_detections: int = COCO_MAX_DETECTIONS) -> tuple[str, ...]:
    """The names of COCO's twelve metrics, where other than 100 detections count: `ar100` is `ar300` with 300."""
    return tuple(f"ar{max_detections}" if name == "ar100" else name for name in COCO_METRICS)


def evaluate_boxes(annotations: Any, found: Sequence[Any], max_detections: int = COCO_MAX_DETECTIONS) -> CocoMetrics:
    """COCO metrics.

    Args:
        annotations: as `ground_truth` returns them.
        found: as `results` returns them.
        max_detections: the best detections of a class in an image that count, more than 10; COCO's number is 100.
    """
    evaluation = match_boxes(annotations, found, max_detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    # [IoU, recall, class, area, boxes per image]: all areas, the most boxes per image
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    if max_detections != COCO_MAX_DETECTIONS:  # pycocotools looks for 100 boxes in the first of its metrics
        defined = precision[precision > -1]
        evaluation.stats[0] = defined.mean() if defined.size else -1
    names = metric_names(max_detections)
    twelve = {name: float(value) for name, value in zip(names, evaluation.stats, strict=True) if value > -1}
    counts = dict.fromkeys(evaluation.params.catIds, 0)
    for entry in annotations["annotations"]:
        counts[entry["category_id"]] += not entry["iscrowd"]
    named = {category["id"]: category["name"] for category in annotations["categories"]}
    classes = {
        key: _class_metrics(named[key], counts[key], precision[:, :, position])
        for position, key in enumerate(evaluation.params.catIds)
    }
    return CocoMetrics(twelve, tuple(classes[category["id"]] for category in annotations["categories"]))


def match_boxes(annotations: Any, found: Sequence[Any], max_detections: int = COCO_MAX_DETECTIONS) -> COCOeval:
    """Match boxes and objects of each image: the first half of pycocotools' evaluation; see `evaluate_boxes`."""
    from pycocotools.coco import COCO  # here, because a served detector does without it
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        annotated = COCO()
        annotated.dataset = annotations
        annotated.createIndex()
        evaluation = COCOeval(annotated, _detections(annotated, annotations, found), "bbox")
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
    return evaluation


def found_objects(
    annotations: Any, found: Sequence[Any], max_detections: int = COCO_MAX_DETECTIONS
) -> list[tuple[float, bool]]:
    """The score of each box, and whether it has found an object at an IoU of 0.5; without boxes on crowds.

    Arguments as of `evaluate_boxes`.
    """
    evaluation = match_boxes(annotations, found, max_detections)
    all_areas = evaluation.params.areaRng[0]
    return [
        (float(score), bool(matched))
        for image in evaluation.evalImgs
        if image is not None and image["aRng"] == all_areas
        for score, matched, ignored in zip(
            image["dtScores"], image["dtMatches"][_IOU_50], image["dtIgnore"][_IOU_50], strict=True
        )
        if not ignored
    ]


def box_confusion(
    found: Sequence[FoundBoxes], targets: Sequence[Annotations], classes: int, iou: float = 0.5
) -> NDArray[np.int64]:
    """Confusion matrix of detections.

    Objects and boxes of any class are matched one to one, the largest overlaps first. Crowds are left out, and so are
    the boxes that overlap them.

    Args:
        found: detections of each image.
        targets: annotations of each image.
        classes: number K of classes.
        iou: smallest overlap of a match.

    Returns:
        Counts `[K + 1, K + 1]`, targets in rows and detections in columns; the last of each is the background.
    """
    from torchvision.ops import box_iou  # seconds to import

    counts = np.zeros((classes + 1, classes + 1), np.int64)
    for one, target in zip(found, targets, strict=True):
        crowd = target.crowd.tolist()
        corners = [[x, y, x + width, y + height] for x, y, width, height in target.boxes.tolist()]
        overlaps = np.zeros((len(corners), len(one.boxes)))
        if overlaps.size:
            boxes = torch.from_numpy(one.boxes).double()
            overlaps = box_iou(torch.tensor(corners, dtype=torch.float64), boxes).numpy()
        free_objects, free_boxes = {k for k, is_crowd in enumerate(crowd) if not is_crowd}, set(range(len(one.boxes)))
        for place in np.argsort(-overlaps, axis=None, kind="stable"):
            row, column = divmod(int(place), max(1, len(one.boxes)))
            if not overlaps[row, column] >= iou:  # the IoU of two boxes without area is NaN
                break
            if row in free_objects and column in free_boxes:
                counts[target.labels[row], one.labels[column]] += 1
                free_objects.remove(row)
                free_boxes.remove(column)
        for row in free_objects:
            counts[target.labels[row], classes] += 1
        for column in free_boxes:
            if not any(crowd[row] and overlaps[row, column] > 0 for row in range(len(crowd))):
                counts[classes, one.labels[column]] += 1
    return counts


def _detections(annotated: COCO, annotations: Any, found: Sequence[Any]) -> COCO:
    if found:
        return annotated.loadRes(list(found))
    from pycocotools.coco import COCO

    nothing = COCO()  # loadRes fails on an empty list
    nothing.dataset = {"images": annotations["images"], "categories": annotations["categories"], "annotations": []}
    nothing.createIndex()
    return nothing


def _class_metrics(name: str, objects: int, precision: NDArray[np.float64]) -> ClassMetrics:
    """The metrics of one class; `precision` `[IoU, recall]` is -1 everywhere for a class without objects."""
    if (precision < 0).all():
        return ClassMetrics(name, objects, None, None, ())
    curve = precision[_IOU_50]
    return ClassMetrics(name, objects, float(precision.mean()), float(curve.mean()), tuple(curve.tolist()))
