"""Detection of objects by boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikefleet import plots
from spikefleet.errors import UserError
from spikefleet.tasks.coco_metrics import FIGURES, FoundBoxes, box_confusion, evaluate_boxes, ground_truth, results
from spikefleet.training.checkpoints import write_json
from spikefleet_models.detection import DetectionCriterion, Objects
from spikefleet_pipelines.loading import Batch
from spikefleet_pipelines.store.annotations import Annotations, Target

SHOWN_SCORE = 0.3
"""Boxes below this score are not drawn."""


class Detection:
    """The loss and the decoding of a detector's family; COCO's figures."""

    metric_names: tuple[str, ...] = FIGURES

    def __init__(self, criterion: DetectionCriterion, class_names: Sequence[str], category_ids: Sequence[int]) -> None:
        self.class_names = tuple(class_names)
        self._criterion = criterion
        self._category_ids = tuple(category_ids)

    def loss(self, network: nn.Module, batch: Batch, balance: float = 0.0) -> dict[str, torch.Tensor]:
        """`loss` (normalised as the family's paper does) and its parts; detectors have no side branches."""
        objects = [Objects(target.boxes, target.labels) for target in batch.targets]
        return self._criterion.loss(network(batch.images), objects, _size(batch))

    @torch.no_grad()
    def predict(self, network: nn.Module, batch: Batch) -> list[FoundBoxes]:
        """The boxes of each picture, in its own pixels."""
        found = self._criterion.detect(network(batch.images), _size(batch))
        return [
            FoundBoxes(
                target.placement.to_picture(one.boxes.float().cpu()).double().numpy(),
                one.scores.double().cpu().numpy(),
                one.labels.cpu().numpy(),
            )
            for one, target in zip(found, batch.targets, strict=True)
        ]

    def truth(self, batch: Batch) -> list[Annotations]:
        """The annotations of each picture as they stand in the store."""
        truths = [target.annotations for target in batch.targets]
        assert None not in truths, "batches of evaluation carry their annotations"
        return truths

    def metrics(self, predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]) -> dict[str, float]:
        """COCO's twelve numbers in [0, 1]. Raises UserError where no picture has an object."""
        figures: dict[str, float] = self.details(predictions, targets)["metrics"]
        return figures

    def details(self, predictions: Sequence[FoundBoxes], targets: Sequence[Annotations]) -> dict[str, Any]:
        """`metrics`, `samples` (pictures), and `classes`: name, objects, ap50_95, ap50 and precision50 of each."""
        truth = ground_truth(targets, self.class_names, self._category_ids)
        if all(entry["iscrowd"] for entry in truth["annotations"]):
            raise UserError(f"none of the {len(targets)} pictures has an object, so nothing can be measured on them")
        figures = evaluate_boxes(truth, results(predictions, targets, self._category_ids))
        return {
            "metrics": figures.twelve,
            "samples": len(targets),
            "classes": [
                {
                    "name": one.name,
                    "objects": one.objects,
                    "ap50_95": one.ap50_95,
                    "ap50": one.ap50,
                    "precision50": list(one.precision50),
                }
                for one in figures.classes
            ],
        }

    def table(self, details: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Objects and average precision of each class; the first row is the header."""
        return [
            ("class", "objects", "AP50-95", "AP50"),
            *(
                (one["name"], str(one["objects"]), _percent(one["ap50_95"]), _percent(one["ap50"]))
                for one in details["classes"]
            ),
        ]

    def draw(
        self,
        images: Sequence[torch.Tensor],
        predictions: Sequence[FoundBoxes],
        targets: Sequence[Annotations] | None,
        path: Path,
    ) -> None:
        """Pictures with the boxes that were found (score at least 0.3), each to the right of the annotated one."""
        drawn = []
        for position, (image, found) in enumerate(zip(images, predictions, strict=True)):
            if targets is not None:
                truth = targets[position]
                boxes = torch.tensor(truth.boxes).float()
                corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
                names = [self.class_names[label] for label in truth.labels]
                drawn.append(plots.boxes_on_picture(image, corners, truth.labels.tolist(), names))
            drawn.append(self.draw_boxes(image, found))
        plots.picture_sheet(drawn, path)

    def draw_boxes(self, image: torch.Tensor, found: FoundBoxes, least: float = SHOWN_SCORE) -> torch.Tensor:
        """One picture `[C, H, W]` (uint8) with boxes of score `least` and above drawn on it, uint8 `[3, H', W']`."""
        shown = found.at_least(least)
        labels = shown.labels.tolist()
        captions = [f"{self.class_names[k]} {score:.2f}" for k, score in zip(labels, shown.scores, strict=True)]
        return plots.boxes_on_picture(image, torch.as_tensor(shown.boxes).float(), labels, captions)

    def draw_batch(self, images: Sequence[torch.Tensor], targets: Sequence[Target], path: Path) -> None:
        """Pictures of a training batch with the boxes that the loss sees."""
        drawn = []
        for image, target in zip(images, targets, strict=True):
            labels = target.labels.tolist()
            drawn.append(plots.boxes_on_picture(image, target.boxes, labels, [self.class_names[k] for k in labels]))
        plots.picture_sheet(drawn, path)

    def answer(self, prediction: FoundBoxes) -> dict[str, Any]:
        """`objects`: name, score and box (x1, y1, x2, y2 in pixels) of each."""
        return {
            "objects": [
                {"name": self.class_names[label], "score": float(score), "box": [float(x) for x in box]}
                for box, score, label in zip(prediction.boxes, prediction.scores, prediction.labels, strict=True)
            ]
        }

    def report(
        self,
        details: Mapping[str, Any],
        predictions: Sequence[FoundBoxes],
        targets: Sequence[Annotations],
        folder: Path,
    ) -> None:
        """`evaluation.json`, COCO's `ground_truth.json` and `predictions.json`, `precision_recall.png`, and
        `confusion.png`: which class a box that was found (score at least 0.3, IoU at least 0.5) stood for, and what was
        missed or found in the background."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "evaluation.json", details)
        write_json(folder / "ground_truth.json", ground_truth(targets, self.class_names, self._category_ids))
        write_json(folder / "predictions.json", results(predictions, targets, self._category_ids))
        curves = {one["name"]: one["precision50"] for one in details["classes"] if one["precision50"]}
        plots.precision_recall(curves, folder / "precision_recall.png")
        shown = [one.at_least(SHOWN_SCORE) for one in predictions]
        counts = box_confusion(shown, targets, len(self.class_names))
        plots.confusion_matrix(counts, [*self.class_names, "background"], folder / "confusion.png")


def _size(batch: Batch) -> tuple[int, int]:
    return batch.images.shape[-2], batch.images.shape[-1]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
