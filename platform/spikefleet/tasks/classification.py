"""Classification of one picture into one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from spikefleet import plots
from spikefleet.files import write_json
from spikefleet_models.shortcut import ShortcutConfig, ShortcutLogits, shortcut_loss
from spikefleet_pipelines.loading import Batch

_KEPT = 5


@dataclass(frozen=True)
class Ranking:
    """The likeliest classes of one sample, best first, with their probabilities."""

    classes: tuple[int, ...]
    probabilities: tuple[float, ...]


class Classification:
    """Cross entropy on the logits `[B, K]`; top-1 and top-5 accuracy."""

    def __init__(
        self, class_names: Sequence[str], label_smoothing: float = 0.0, shortcut: ShortcutConfig | None = None
    ) -> None:
        self.class_names = tuple(class_names)
        self.shortcut = shortcut or ShortcutConfig()
        self.label_smoothing = label_smoothing
        self.metric_names: tuple[str, ...] = ("top1", "top5") if len(class_names) > _KEPT else ("top1",)

    def loss(self, network: nn.Module, batch: Batch, balance: float = 0.0) -> dict[str, torch.Tensor]:
        """`loss` (mean over the batch) and `top1` (share of right answers of the network itself)."""
        assert isinstance(batch.targets, torch.Tensor)
        output = network(batch.images)
        if isinstance(output, ShortcutLogits):
            logits = output.main.float()
            loss = shortcut_loss(output, batch.targets, balance, self.shortcut, self.label_smoothing)
        else:
            logits = output.float()
            loss = F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing)
        return {"loss": loss, "top1": (logits.detach().argmax(1) == batch.targets).float().mean()}

    @torch.no_grad()
    def predict(self, network: nn.Module, batch: Batch) -> list[Ranking]:
        """The five likeliest classes of each sample."""
        probabilities = network(batch.images).float().softmax(1)
        top = probabilities.topk(min(_KEPT, probabilities.shape[1]), dim=1)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [Ranking(tuple(classes), tuple(values)) for classes, values in rows]

    def truth(self, batch: Batch) -> list[int]:
        """The class of each sample."""
        assert isinstance(batch.targets, torch.Tensor)
        return batch.targets.tolist()

    def metrics(self, predictions: Sequence[Ranking], targets: Sequence[int]) -> dict[str, float]:
        """`top1`, `top5` (where there are more than five classes): accuracies in [0, 1]."""
        ranked, truth = _arrays(predictions, targets)
        hits = ranked == truth[:, None]
        figures = {"top1": float(hits[:, 0].mean())}
        if "top5" in self.metric_names:
            figures["top5"] = float(hits.any(axis=1).mean())
        return figures

    def draw(
        self, images: Sequence[torch.Tensor], predictions: Sequence[Ranking], targets: Sequence[int] | None, path: Path
    ) -> None:
        """Pictures with the predicted class and its probability; a wrong answer in red beside the truth."""
        captions, right = [], []
        for position, prediction in enumerate(predictions):
            caption = f"{self.class_names[prediction.classes[0]]} {prediction.probabilities[0]:.0%}"
            correct = targets is None or prediction.classes[0] == targets[position]
            if targets is not None and not correct:
                caption += f"\nis {self.class_names[targets[position]]}"
            captions.append(caption)
            right.append(correct)
        plots.picture_grid(images, captions, right, path)

    def draw_batch(self, images: Sequence[torch.Tensor], targets: torch.Tensor, path: Path) -> None:
        """Pictures of a training batch under their classes."""
        names = [self.class_names[label] for label in targets.tolist()]
        plots.picture_grid(images, names, [True] * len(names), path)

    def details(self, predictions: Sequence[Ranking], targets: Sequence[int]) -> dict[str, Any]:
        """`metrics`, `samples`, `classes` (name, samples, top1 of each) and `confusion` (rows: the truth)."""
        ranked, truth = _arrays(predictions, targets)
        size = len(self.class_names)
        confusion = np.zeros((size, size), dtype=np.int64)
        np.add.at(confusion, (truth, ranked[:, 0]), 1)
        counts = confusion.sum(axis=1)
        return {
            "metrics": self.metrics(predictions, targets),
            "samples": len(truth),
            "classes": [
                {"name": name, "samples": int(count), "top1": float(confusion[k, k] / count) if count else None}
                for k, (name, count) in enumerate(zip(self.class_names, counts, strict=True))
            ],
            "confusion": confusion.tolist(),
        }

    def table(self, details: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Samples and accuracy of each class; the first row is the header."""
        return [
            ("class", "samples", "top1"),
            *(
                (one["name"], str(one["samples"]), "-" if one["top1"] is None else f"{one['top1']:.2%}")
                for one in details["classes"]
            ),
        ]

    def answer(self, prediction: Ranking) -> dict[str, Any]:
        """`classes`: name and probability of the likeliest."""
        return {
            "classes": [
                {"name": self.class_names[k], "probability": p}
                for k, p in zip(prediction.classes, prediction.probabilities, strict=True)
            ]
        }

    def report(
        self, details: Mapping[str, Any], predictions: Sequence[Ranking], targets: Sequence[int], folder: Path
    ) -> None:
        """`evaluation.json` and `confusion.png`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "evaluation.json", details)
        plots.confusion_matrix(np.array(details["confusion"]), self.class_names, folder / "confusion.png")


def _arrays(predictions: Sequence[Ranking], targets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p.classes for p in predictions]), np.array(targets)
