"""Image classification: one class per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spikefleet.data_summary import DataSummary
from spikefleet.files import write_json
from spikefleet.tasks.task import EVALUATION, LossSettings, Task, TaskReport, check_class_count, metric_of
from spikefleet_models.class_loss import class_loss
from spikefleet_models.family import ModelConfig
from spikefleet_models.shortcut import ShortcutLogits, shortcut_loss
from spikefleet_pipelines.loading import Batch

if TYPE_CHECKING:
    import pandas as pd

    from spikefleet.tasks.mistakes import Confusion, Mistake
    from spikefleet.tasks.per_image import Answers

OVER_TIME = "over_time.png"
"""File name of the plot of the accuracy after each time step."""

_KEPT = 5


@dataclass(frozen=True)
class Ranking:
    """The most likely classes of one sample, best first, with their probabilities."""

    classes: tuple[int, ...]
    probabilities: tuple[float, ...]


class Classification(Task[Ranking, int]):
    """Cross entropy on logits `[B, K]`; top-1 and, for more than five classes, top-5 accuracy."""

    headline = ("top1",)

    def __init__(self, class_names: Sequence[str], loss: LossSettings = LossSettings()) -> None:  # noqa: B008 -- frozen
        self.class_names = tuple(class_names)
        self._shortcut, self._label_smoothing = loss.shortcut, loss.label_smoothing
        self._class_weights = None if loss.class_weights is None else torch.tensor(loss.class_weights)
        self.metric_names = ("top1", "top5") if len(class_names) > _KEPT else ("top1",)

    @classmethod
    def build(cls, model: ModelConfig, data: DataSummary, loss: LossSettings) -> Self:
        """The task for the classes of the data. Raises UserError if the network has another number of outputs."""
        check_class_count(model, data)
        return cls(data.class_names, loss)

    @property
    def report(self) -> ClassificationReport:
        """What plots and writes its results."""
        return ClassificationReport(self.class_names)

    def loss(self, network: nn.Module, batch: Batch, balance: float | torch.Tensor = 0.0) -> dict[str, torch.Tensor]:
        """`loss`, the mean over the batch, and `top1`, the accuracy of the network's own output.

        Of mixed samples, whose targets are probabilities, the likelier class counts as the right one.
        """
        assert isinstance(batch.targets, torch.Tensor)
        output = network(batch.network_input)
        if isinstance(output, ShortcutLogits):
            logits = output.main.float()
            weights = self._weights_on(logits.device)
            loss = shortcut_loss(output, batch.targets, balance, self._shortcut, self._label_smoothing, weights)
        else:
            logits = output.float()
            loss = class_loss(logits, batch.targets, self._label_smoothing, self._weights_on(logits.device))
        right = batch.targets.argmax(1) if batch.targets.ndim == 2 else batch.targets
        return {"loss": loss, "top1": (logits.detach().argmax(1) == right).float().mean()}

    def _weights_on(self, device: torch.device) -> torch.Tensor | None:
        """The weights of the classes; they stay on the device, since nothing is copied to it within a CUDA graph."""
        if self._class_weights is not None:
            self._class_weights = self._class_weights.to(device)
        return self._class_weights

    def random_targets(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A random class for each image."""
        return torch.randint(len(self.class_names), (len(images),), generator=generator)

    @torch.no_grad()
    def predict(self, network: nn.Module, batch: Batch) -> list[Ranking]:
        """The five most likely classes of each sample."""
        probabilities = _probabilities(network, batch)
        top = probabilities.topk(min(_KEPT, probabilities.shape[1]), dim=1)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [Ranking(tuple(classes), tuple(values)) for classes, values in rows]

    @torch.no_grad()
    def hits_over_time(self, network: nn.Module, batch: Batch, still_images: bool = False) -> torch.Tensor | None:
        """Of networks with `forward_over_time`, on frames of events; on images where they are asked for."""
        answer = getattr(network, "forward_over_time", None)
        if answer is None or (batch.images.ndim != 5 and not still_images):
            return None
        assert isinstance(batch.targets, torch.Tensor)
        logits: torch.Tensor = answer(batch.network_input)  # [T, B, K]
        return (logits.argmax(2) == batch.targets).sum(1)

    def targets(self, batch: Batch) -> list[int]:
        """The class of each sample."""
        assert isinstance(batch.targets, torch.Tensor)
        return batch.targets.tolist()

    def details(self, predictions: Sequence[Ranking], targets: Sequence[int]) -> dict[str, Any]:
        """`metrics` in [0, 1], `samples`, `classes` (name, samples, top1), `confusion` `[K, K]` (targets in rows)."""
        ranked, labels = np.array([p.classes for p in predictions]), np.array(targets)
        hits = ranked == labels[:, None]
        metrics = {"top1": float(hits[:, 0].mean())}
        if "top5" in self.metric_names:
            metrics["top5"] = float(hits.any(axis=1).mean())
        size = len(self.class_names)
        confusion = np.zeros((size, size), dtype=np.int64)
        np.add.at(confusion, (labels, ranked[:, 0]), 1)
        counts = confusion.sum(axis=1)
        return {
            "metrics": metrics,
            "samples": len(labels),
            "classes": [
                {"name": name, "samples": int(count), "top1": float(confusion[k, k] / count) if count else None}
                for k, (name, count) in enumerate(zip(self.class_names, counts, strict=True))
            ],
            "confusion": confusion.tolist(),
        }

    def per_image(self, predictions: Sequence[Ranking], targets: Sequence[int]) -> Answers:
        """The most likely class of each image with its probability, and the true class."""
        from spikefleet.tasks.per_image import Answers  # here, because a served classifier does without it

        return Answers(
            np.array([one.classes[0] for one in predictions], np.int32),
            np.array(targets, np.int32),
            np.array([one.probabilities[0] for one in predictions], np.float32),
        )

    def confidences(self, predictions: Sequence[Ranking], targets: Sequence[int]) -> list[tuple[float, bool]]:
        """The probability of the most likely class of each image, and whether it is the target."""
        pairs = zip(predictions, targets, strict=True)
        return [(prediction.probabilities[0], prediction.classes[0] == target) for prediction, target in pairs]

    def same_answer(self, one: Ranking, other: Ranking) -> bool:
        """Whether the most likely class is the same."""
        return one.classes[0] == other.classes[0]

    def flaw(self, evaluation: Mapping[str, Any]) -> str | None:
        """A classifier that answers one class for all images, or no better than by chance.

        By chance: with K classes in the split, its mean accuracy over them is at most 1/K and two standard errors of a
        random answer; at most half of the way from 1/K to 1, where images are few. From top-1 alone: at most 1/K.
        """
        size = len(self.class_names)
        counts = _confusion(evaluation, size)
        if counts is None:
            top1 = metric_of(evaluation, "top1")
            if top1 is None or size == 1 or top1 > 1 / size:
                return None
            return f"its top1 of {top1:.2%} is not above chance ({1 / size:.2%})"
        samples, answers = counts.sum(axis=1), counts.sum(axis=0)
        there = samples > 0
        kinds = int(there.sum())
        if kinds < 2:
            return None
        if np.count_nonzero(answers) == 1:
            return f"it answers {self.class_names[int(answers.argmax())]!r} for all {answers.sum()} images"
        accuracy = float((counts.diagonal()[there] / samples[there]).mean())
        chance = 1 / kinds
        error = float(np.sqrt((chance * (1 - chance) / samples[there]).sum())) / kinds
        margin = min(2 * error, (1 - chance) / 2)
        if accuracy > chance + margin:
            return None
        return (
            f"its mean accuracy over {kinds} classes, {accuracy:.2%}, is not above chance ({chance:.2%} ± {margin:.2%})"
        )

    @torch.no_grad()
    def serve(self, network: nn.Module, batch: Batch) -> pd.DataFrame:
        """Probabilities, a table `[B, K]` of float32 with the names of the classes."""
        import pandas as pd  # a dependency of MLflow, which serves

        return pd.DataFrame(_probabilities(network, batch).numpy(), columns=list(self.class_names))

    def joined(self, answers: Sequence[pd.DataFrame]) -> pd.DataFrame:
        """The probabilities of several batches, as one table."""
        import pandas as pd

        return pd.concat(answers, ignore_index=True)

    @property
    def served_columns(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.class_names


def _confusion(evaluation: Mapping[str, Any], classes: int) -> NDArray[np.int64] | None:
    """The counts `[K, K]` of an evaluation that was read from a file; None where it holds none."""
    try:
        counts = np.array(evaluation.get("confusion"), dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        return None
    return counts if counts.shape == (classes, classes) and counts.min() >= 0 else None


def _probabilities(network: nn.Module, batch: Batch) -> torch.Tensor:
    probabilities: torch.Tensor = network(batch.network_input).float().softmax(1)
    return probabilities


class ClassificationReport(TaskReport[Ranking, int]):
    """Images with their classes, accuracy by class, the confusion matrix."""

    files = (EVALUATION, "confusion.png", OVER_TIME)

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.class_names = class_names

    def draw(
        self, images: Sequence[torch.Tensor], predictions: Sequence[Ranking], targets: Sequence[int] | None, path: Path
    ) -> None:
        """Plots images with the predicted class and its probability; a wrong one in red, with the target."""
        from spikefleet import plots
        from spikefleet.plot_text import labels

        names = labels(self.class_names)
        captions: list[str] = []
        correct: list[bool | None] = []
        for position, prediction in enumerate(predictions):
            caption = f"{names[prediction.classes[0]]} {prediction.probabilities[0]:.0%}"
            is_correct = None if targets is None else prediction.classes[0] == targets[position]
            if targets is not None and not is_correct:
                caption += f"\nis {names[targets[position]]}"
            captions.append(caption)
            correct.append(is_correct)
        plots.image_grid(images, captions, correct, path)

    def draw_files(
        self, images: Sequence[torch.Tensor], predictions: Sequence[Ranking], names: Sequence[str], path: Path
    ) -> None:
        """Images over their files' names, under the predicted class and its probability."""
        from spikefleet import plots
        from spikefleet.plot_text import labels

        classes = labels(self.class_names)
        captions = [f"{classes[one.classes[0]]} {one.probabilities[0]:.0%}" for one in predictions]
        plots.image_grid(images, captions, [None] * len(captions), path, names)

    def draw_batch(self, images: Sequence[torch.Tensor], targets: torch.Tensor, path: Path) -> None:
        """Plots images of a training batch with their classes; of mixed ones with the likelier class."""
        from spikefleet import plots
        from spikefleet.plot_text import labels

        classes = labels(self.class_names)
        names = [classes[label] for label in (targets.argmax(1) if targets.ndim == 2 else targets).tolist()]
        plots.image_grid(images, names, [None] * len(names), path)

    def table(self, details: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Samples and accuracy of each class."""
        from spikefleet.plot_text import in_table

        return [
            ("class", "samples", "top1"),
            *(
                (name, str(one["samples"]), "-" if one["top1"] is None else f"{one['top1']:.2%}")
                for name, one in zip(
                    in_table([one["name"] for one in details["classes"]]), details["classes"], strict=True
                )
            ),
        ]

    def confusion(
        self, details: Mapping[str, Any], predictions: Sequence[Ranking], targets: Sequence[int]
    ) -> Confusion:
        """Images by their class and by the class that was answered."""
        from spikefleet.tasks.mistakes import Confusion

        counts = np.array(details["confusion"], dtype=np.int64)
        return Confusion(self.class_names, counts, "images: their class in rows, the answer in columns")

    def mistakes(self, predictions: Sequence[Ranking], targets: Sequence[int], most: int) -> list[Mistake]:
        """The images whose class is answered wrongly, the surest answer first."""
        from spikefleet.tasks.mistakes import wrong_answers

        answers = [one.classes[0] for one in predictions]
        return wrong_answers(answers, [one.probabilities[0] for one in predictions], targets, self.class_names, most)

    def answer(self, prediction: Ranking) -> dict[str, Any]:
        """`classes`: name and probability of the most likely classes."""
        return {
            "classes": [
                {"name": self.class_names[k], "probability": p}
                for k, p in zip(prediction.classes, prediction.probabilities, strict=True)
            ]
        }

    def csv_columns(self) -> tuple[str, ...]:
        """The most likely class, and its probability."""
        return ("class", "probability")

    def csv_rows(self, answer: Mapping[str, Any]) -> list[tuple[object, ...]]:
        """One row."""
        best = answer["classes"][0]
        return [(best["name"], best["probability"])]

    def answer_table(self, answers: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
        """The most likely class of each image, and the next two."""
        rows: list[tuple[str, ...]] = [("image", "class", "probability", "then")]
        for answer in answers:
            first, *others = answer["classes"]
            then = ", ".join(f"{other['name']} {other['probability']:.1%}" for other in others[:2])
            rows.append((answer["image"], first["name"], f"{first['probability']:.1%}", then))
        return rows

    def write(
        self, details: Mapping[str, Any], predictions: Sequence[Ranking], targets: Sequence[int], folder: Path
    ) -> None:
        """Writes `evaluation.json` and `confusion.png`, and `over_time.png` for a network on events."""
        from spikefleet import plots
        from spikefleet.plot_text import labels

        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / EVALUATION, details)
        plots.confusion_matrix(np.array(details["confusion"]), labels(self.class_names), folder / "confusion.png")
        if (over_time := details.get("over_time")) is not None:
            plots.accuracy_over_time(over_time["top1"], over_time["step_ms"], folder / OVER_TIME)
