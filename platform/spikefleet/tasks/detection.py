"""Object detection: boxes with classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import write_json
from spikefleet.tasks.coco_metrics import (
    COCO_MAX_DETECTIONS,
    CocoMetrics,
    FoundBoxes,
    box_confusion,
    evaluate_boxes,
    found_objects,
    ground_truth,
    metric_names,
    results,
)
from spikefleet.tasks.task import EVALUATION, LossSettings, Task, TaskReport, check_class_count, metric_of
from spikefleet_models.detection import DetectionCriterion, Objects
from spikefleet_models.family import ModelConfig
from spikefleet_pipelines.loading import Batch
from spikefleet_pipelines.store.annotations import Annotations, Placement, Target
from spikefleet_tune.messages import counted

if TYPE_CHECKING:
    from spikefleet.tasks.mistakes import Confusion, Mistake
    from spikefleet.tasks.per_image import Boxes

SHOWN_SCORE = 0.3
"""Boxes below this score are not drawn."""

_EVENT_METRICS = tuple(f"{name}_{by}" for by in ("prophesee", "none") for name in ("map50_95", "map50", "map75"))
"""Metrics of recordings of events, by each protocol that reports have; see `event_metrics`."""

_SIZES = {"small": "below 32 x 32", "medium": "32 x 32 to 96 x 96", "large": "above 96 x 96"}
"""COCO's classes of size, by the area of an object in pixels."""

_RANDOM_BOXES = 3
_LEAST_MAP50 = 0.0001


class Detection(Task[FoundBoxes, Annotations]):
    """The loss and the decoding of the model family; COCO metrics."""

    headline = ("map50_95", "map50")
    any_size = True
    finds_boxes = True

    def __init__(
        self,
        criterion: DetectionCriterion,
        class_names: Sequence[str],
        category_ids: Sequence[int],
        global_divisor: bool = False,
        max_detections: int = COCO_MAX_DETECTIONS,
    ) -> None:
        self.metric_names, self._max_detections = metric_names(max_detections), max_detections
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)
        self._criterion, self._global_divisor = criterion, global_divisor

    @classmethod
    def build(cls, model: ModelConfig, data: DataSummary, loss: LossSettings) -> Self:
        """The task for the classes of the data. Raises UserError if the network has another number of classes."""
        check_class_count(model, data)
        task = cls(
            model.build_criterion(), data.class_names, data.category_ids, loss.global_divisor, loss.max_detections
        )
        if data.sensor is not None:
            task.metric_names += _EVENT_METRICS
        return task

    @property
    def report(self) -> DetectionReport:
        """What plots and writes its results."""
        return DetectionReport(self.class_names, self.category_ids)

    def loss(self, network: nn.Module, batch: Batch, balance: float | torch.Tensor = 0.0) -> dict[str, torch.Tensor]:
        """`loss` and its parts, normalised as in the paper of the family, or as sums with their `divisor`."""
        objects = [Objects(target.boxes, target.labels) for target in batch.targets]
        divided = not self._global_divisor
        return self._criterion.loss(network(batch.network_input), objects, _size(batch), divided=divided)

    def random_targets(self, images: torch.Tensor, generator: torch.Generator) -> tuple[Target, ...]:
        """A few boxes of random classes in each image, a quarter to a half of its sides."""
        height, width = images.shape[-2:]
        sides = torch.tensor([width, height])
        targets = []
        for _ in images:
            sizes = sides * (1 + torch.rand(_RANDOM_BOXES, 2, generator=generator)) / 4
            corners = torch.rand(_RANDOM_BOXES, 2, generator=generator) * (sides - sizes)
            labels = torch.randint(len(self.class_names), (_RANDOM_BOXES,), generator=generator)
            boxes = torch.cat((corners, corners + sizes), dim=1)
            targets.append(Target(boxes, labels, Placement(1.0, 1.0, 0.0, 0.0, height, width), None))
        return tuple(targets)

    @torch.no_grad()
    def predict(self, network: nn.Module, batch: Batch) -> list[FoundBoxes]:
        """The boxes of each image, in pixels of the stored image."""
        found = self._criterion.detect(network(batch.network_input), _size(batch))
        return [
            FoundBoxes(
                target.placement.to_stored_image(one.boxes.float().cpu()).double().numpy(),
                one.scores.double().cpu().numpy(),
                one.labels.cpu().numpy(),
            )
            for one, target in zip(found, batch.targets, strict=True)
        ]

    def targets(self, batch: Batch) -> list[Annotations]:
        """The stored annotations of each image."""
        annotations = [target.annotations for target in batch.targets]
        assert None not in annotations, "evaluation batches have annotations"
        return annotations

    def details(self, predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]) -> dict[str, Any]:
        """COCO metrics of a split.

        Returns:
            `metrics` (COCO's twelve, in [0, 1]), `description` (of the metrics), `remark` (if more objects of a class
            are in an image than detections count), `samples` (images), and `classes`, a list of name, objects, ap50_95,
            ap50 and precision50. Of recordings of events also what `event_details` returns, and the main metrics by
            each protocol among the metrics: `map50_95_prophesee`; and `map50_still` and `map50_moving`, where at some
            label times no object has moved since the one before.

        Raises:
            UserError: no image has an object.
        """
        most = self._max_detections
        measured = self._measured(predictions, targets)
        crowded = sum(_most_of_a_class(target) > most for target in targets)
        remark = (
            f"{counted(crowded, 'image')} of {len(targets)} {'has' if crowded == 1 else 'have'} more than {most} "
            "objects of a class, which cannot all be found; set evaluation.max_detections (and the model's "
            "criterion.max_detections) to more"
        )
        return {
            **self._of_recordings(predictions, targets),
            "metrics": {
                **measured.twelve,
                **self._by_protocol(predictions, targets),
                **self._by_stillness(predictions, targets),
            },
            "description": f"COCO's metrics of at most {most} detections of a class in an image "
            "(evaluation.max_detections)",
            **({"remark": remark} if crowded else {}),
            "samples": len(targets),
            "classes": [
                {
                    "name": one.name,
                    "objects": one.objects,
                    "ap50_95": one.ap50_95,
                    "ap50": one.ap50,
                    "precision50": list(one.precision50),
                }
                for one in measured.classes
            ],
        }

    def metrics(self, predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]) -> dict[str, float]:
        """Metrics of a whole split by name, without those of what stands still; see `details`.

        Raises:
            UserError: no image has an object.
        """
        twelve = self._measured(predictions, targets).twelve
        return {**twelve, **self._by_protocol(predictions, targets)}

    def _measured(self, predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]) -> CocoMetrics:
        annotations = ground_truth(targets, self.class_names, self.category_ids)
        if all(entry["iscrowd"] for entry in annotations["annotations"]):
            raise UserError(
                f"detection metrics need at least one object, found none in {counted(len(targets), 'image')}"
            )
        return evaluate_boxes(annotations, results(predictions, targets, self.category_ids), self._max_detections)

    def _by_protocol(self, predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]) -> dict[str, float]:
        from spikefleet.tasks import event_details  # here, because a served detector does without it

        if not event_details.are_label_times(targets):
            return {}
        return event_details.protocol_metrics(predictions, targets, self.class_names, self._max_detections)

    def _of_recordings(self, predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]) -> dict[str, Any]:
        from spikefleet.tasks import event_details  # here, because a served detector does without it

        if not event_details.are_label_times(targets):
            return {}
        return event_details.event_details(predictions, targets, self.class_names, self._max_detections)

    def _by_stillness(self, predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]) -> dict[str, float]:
        from spikefleet.tasks import event_details  # here, because a served detector does without it

        if not event_details.are_label_times(targets):
            return {}
        return event_details.stillness_metrics(predictions, targets, self.class_names, self._max_detections)

    def per_image(self, predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]) -> Boxes:
        """Boxes and objects of each image."""
        from spikefleet.tasks.per_image import Boxes  # here, because a served detector does without it

        return Boxes(predictions, targets, self._max_detections)

    def confidences(
        self, predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]
    ) -> list[tuple[float, bool]]:
        """Scores of at least 0.3, and whether the box has an object of its class, at an IoU of at least 0.5."""
        shown = [one.at_least(SHOWN_SCORE) for one in predictions]
        annotations = ground_truth(targets, self.class_names, self.category_ids)
        return found_objects(annotations, results(shown, targets, self.category_ids), self._max_detections)

    def flaw(self, evaluation: Mapping[str, Any]) -> str | None:
        """A detector that finds nothing: its mAP50 is below 0.01 %."""
        value = metric_of(evaluation, "map50")
        if value is None or value >= _LEAST_MAP50:
            return None
        return f"it finds nothing: map50 is {value:.3%}, less than {_LEAST_MAP50:.2%}"

    def confident(self, prediction: FoundBoxes, score: float) -> FoundBoxes:
        """The boxes with at least this score."""
        return prediction.at_least(score)

    def same_answer(self, one: FoundBoxes, other: FoundBoxes) -> bool:
        """Whether as many objects of each class have a score of at least 0.3."""
        shown, others = one.at_least(SHOWN_SCORE), other.at_least(SHOWN_SCORE)
        return np.array_equal(np.sort(shown.labels), np.sort(others.labels))

    def serve(self, network: nn.Module, batch: Batch) -> list[list[dict[str, Any]]]:
        """The objects of each image: name, score and box (x1 y1 x2 y2 in pixels)."""
        report = self.report
        return [report.answer(prediction)["objects"] for prediction in self.predict(network, batch)]


class DetectionReport(TaskReport[FoundBoxes, Annotations]):
    """Boxes on images, average precision by class, and files in COCO's formats."""

    files = (EVALUATION, "ground_truth.json", "predictions.json", "precision_recall.png", "confusion.png")
    draws_each = True

    def __init__(self, class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> None:
        self.class_names, self.category_ids = class_names, category_ids

    def table(self, details: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Objects and average precision by class; of recordings also by each protocol that leaves boxes out."""
        from spikefleet.plot_text import in_table

        classes = details["classes"]
        columns = [
            in_table([one["name"] for one in classes]),
            [str(one["objects"]) for one in classes],
            *_precision_columns(classes),
        ]
        header = ["class", "objects", "AP50-95", "AP50"]
        for name, by in details.get("protocols", {}).items():
            if name != "none" and by["classes"]:
                header += [f"AP50-95 {name}", f"AP50 {name}"]
                columns += _precision_columns(by["classes"])
        return [tuple(header), *zip(*columns, strict=True)]

    def draw(
        self,
        images: Sequence[torch.Tensor],
        predictions: Sequence[FoundBoxes],
        targets: Sequence[Annotations] | None,
        path: Path,
    ) -> None:
        """Plots images with the detected boxes (score at least 0.3), each to the right of the annotated image."""
        from spikefleet import plots
        from spikefleet.plot_text import labels as labels_of

        drawn, classes = [], labels_of(self.class_names)
        for position, (image, found) in enumerate(zip(images, predictions, strict=True)):
            if targets is not None:
                drawn.append(_annotated(image, targets[position], classes))
            drawn.append(self.draw_one(image, found.at_least(SHOWN_SCORE)))
        plots.image_sheet(drawn, path)

    def draw_one(self, image: torch.Tensor, prediction: FoundBoxes) -> torch.Tensor:
        """One image, uint8 `[C, H, W]`, with all boxes drawn on it, uint8 `[3, H', W']`."""
        from spikefleet import plots
        from spikefleet.plot_text import labels as labels_of

        labels = prediction.labels.tolist()
        classes = labels_of(self.class_names)
        captions = [f"{classes[k]} {score:.2f}" for k, score in zip(labels, prediction.scores, strict=True)]
        return plots.boxes_on_image(image, torch.as_tensor(prediction.boxes).float(), labels, captions)

    def confusion(
        self, details: Mapping[str, Any], predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]
    ) -> Confusion:
        """Objects and boxes with a score of at least 0.3, matched at an IoU of at least 0.5."""
        from spikefleet.tasks.mistakes import Confusion

        shown = [one.at_least(SHOWN_SCORE) for one in predictions]
        counts = box_confusion(shown, targets, len(self.class_names))
        says = f"objects in rows, boxes with a score of at least {SHOWN_SCORE} in columns, matched at an IoU of 0.5"
        return Confusion((*self.class_names, "background"), counts, says)

    def mistakes(self, predictions: Sequence[FoundBoxes], targets: Sequence[Annotations], most: int) -> list[Mistake]:
        """The images with most objects missed or taken for another class, and boxes on nothing."""
        from spikefleet.tasks.mistakes import worst_detections

        return worst_detections(predictions, targets, len(self.class_names), SHOWN_SCORE, most)

    def mistaken_images(
        self, image: torch.Tensor, prediction: FoundBoxes, target: Annotations
    ) -> list[tuple[str, torch.Tensor]]:
        """The image with its objects, and with the boxes that were found (score at least 0.3)."""
        from spikefleet.plot_text import labels as labels_of

        drawn = _annotated(image, target, labels_of(self.class_names))
        return [("annotated", drawn), ("found", self.draw_one(image, prediction.at_least(SHOWN_SCORE)))]

    def size_table(self, details: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Average precision and recall by COCO's classes of size, in pixels of an object's area."""
        metrics = details["metrics"]
        rows = [
            (f"{size} ({area})", *(_percent(metrics.get(f"{name}_{size}")) for name in ("map", "ar")))
            for size, area in _SIZES.items()
        ]
        return [("objects", "AP50-95", "AR"), *rows]

    def draw_batch(self, images: Sequence[torch.Tensor], targets: Sequence[Target], path: Path) -> None:
        """Plots images of a training batch with the boxes of the loss."""
        from spikefleet import plots
        from spikefleet.plot_text import labels as labels_of

        drawn, classes = [], labels_of(self.class_names)
        for image, target in zip(images, targets, strict=True):
            labels = target.labels.tolist()
            drawn.append(plots.boxes_on_image(image, target.boxes, labels, [classes[k] for k in labels]))
        plots.image_sheet(drawn, path)

    def answer(self, prediction: FoundBoxes) -> dict[str, Any]:
        """`objects`: name, score and box (x1 y1 x2 y2 in pixels) of each."""
        return {
            "objects": [
                {"name": self.class_names[label], "score": float(score), "box": [float(x) for x in box]}
                for box, score, label in zip(prediction.boxes, prediction.scores, prediction.labels, strict=True)
            ]
        }

    def csv_columns(self) -> tuple[str, ...]:
        """Class, score and corners in pixels of the image."""
        return ("class", "score", "x1", "y1", "x2", "y2")

    def csv_rows(self, answer: Mapping[str, Any]) -> list[tuple[object, ...]]:
        """A row for each object; a row of empty cells for an image without objects."""
        rows = [(found["name"], found["score"], *found["box"]) for found in answer["objects"]]
        return rows or [("",) * 6]

    def answer_table(self, answers: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
        """One row for each object, and one for each image without objects."""
        rows: list[tuple[str, ...]] = [("image", "object", "score", "x1 y1 x2 y2 (pixels)")]
        for answer in answers:
            for found in answer["objects"]:
                corners = " ".join(f"{x:.0f}" for x in found["box"])
                rows.append((answer["image"], found["name"], f"{found['score']:.2f}", corners))
            if not answer["objects"]:
                rows.append((answer["image"], "-", "-", "-"))
        return rows

    def write(
        self,
        details: Mapping[str, Any],
        predictions: Sequence[FoundBoxes],
        targets: Sequence[Annotations],
        folder: Path,
    ) -> None:
        """Writes `evaluation.json`, and the plots `precision_recall.png` and `confusion.png`.

        `ground_truth.json` and `predictions.json` are in COCO's formats. The confusion matrix has boxes with a score of
        at least 0.3, matched at an IoU of at least 0.5.
        """
        from spikefleet import plots
        from spikefleet.plot_text import labels as labels_of

        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / EVALUATION, details)
        write_json(folder / "ground_truth.json", ground_truth(targets, self.class_names, self.category_ids))
        write_json(folder / "predictions.json", results(predictions, targets, self.category_ids))
        classes = labels_of(self.class_names)
        named = zip(classes, details["classes"], strict=True)
        curves = {name: one["precision50"] for name, one in named if one["precision50"]}
        plots.precision_recall(curves, folder / "precision_recall.png")
        shown = [one.at_least(SHOWN_SCORE) for one in predictions]
        counts = box_confusion(shown, targets, len(self.class_names))
        plots.confusion_matrix(counts, [*classes, "background"], folder / "confusion.png")


def _annotated(image: torch.Tensor, target: Annotations, classes: Sequence[str]) -> torch.Tensor:
    """An image with its objects."""
    from spikefleet import plots

    boxes = torch.tensor(target.boxes).float().reshape(-1, 4)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    return plots.boxes_on_image(image, corners, target.labels.tolist(), [classes[label] for label in target.labels])


def _most_of_a_class(target: Annotations) -> int:
    """The largest number of objects of one class in an image, without crowds."""
    return int(np.bincount(target.labels[~target.crowd], minlength=1).max())


def _size(batch: Batch) -> tuple[int, int]:
    return batch.images.shape[-2], batch.images.shape[-1]


def _precision_columns(classes: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [[_percent(one[key]) for one in classes] for key in ("ap50_95", "ap50")]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
