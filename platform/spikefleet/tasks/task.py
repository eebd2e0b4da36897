"""The interface of a task: everything that trains, evaluates or serves a network depends on it.

A task is one module with a `Task` and its `TaskReport`, and one line in `spikefleet.config.task_table`. The module
travels with each registered version: what draws and what measures is imported where it is used.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar

import torch
from torch import nn

from spikefleet.config.messages import did_you_mean
from spikefleet.config.schema import Config
from spikefleet.config.task_table import find_task
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import write_json
from spikefleet_models.family import ModelConfig
from spikefleet_models.shortcut import ShortcutConfig
from spikefleet_pipelines.loading import Batch
from spikefleet_pipelines.transforms.batch_transform import Targets
from spikefleet_tune.messages import counted

if TYPE_CHECKING:
    from spikefleet.tasks.mistakes import Confusion, Mistake
    from spikefleet.tasks.per_image import Results

EVALUATION = "evaluation.json"
"""File name of the evaluation of a split, in a report and in a registered version."""

Prediction = TypeVar("Prediction")
"""The prediction for one sample; plain and picklable."""

Target = TypeVar("Target")
"""The target of one sample, which `metrics` compares with its prediction; plain and picklable."""


@dataclass(frozen=True)
class LossSettings:
    """Settings of loss and evaluation; the task's entry in the table of tasks says which it supports."""

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    """Factor of each class in the loss; None: 1."""
    global_divisor: bool = True
    """Losses with a divisor of their own return sums and that divisor; the training divides."""
    shortcut: ShortcutConfig = field(default_factory=ShortcutConfig)
    max_detections: int = 100
    """Detection: `evaluation.max_detections`."""


class Task(ABC, Generic[Prediction, Target]):
    """Loss, predictions and metrics of one kind of problem."""

    metric_names: tuple[str, ...]
    """Metrics of a split: the allowed values of `checkpoint.metric`."""

    headline: tuple[str, ...]
    """Metrics in [0, 1] to show during training."""

    any_size: bool = False
    """Whether the task takes images of any size; if not, they are resized to that of the training images."""

    finds_boxes: bool = False
    """Whether a prediction is a `FoundBoxes`, of which crops, files of labels and merged tiles can be made."""

    @classmethod
    @abstractmethod
    def build(cls, model: ModelConfig, data: DataSummary, loss: LossSettings) -> Self:
        """The task for a network and its data.

        Args:
            model: configuration of the network.
            data: summary of the data.
            loss: settings of the loss.

        Raises:
            UserError: the network does not fit the data.
        """

    @property
    @abstractmethod
    def report(self) -> TaskReport[Prediction, Target]:
        """What plots and writes its results."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch, balance: float | torch.Tensor) -> dict[str, torch.Tensor]:
        """Runs a network on a training batch.

        Args:
            network: in training mode.
            batch: on the network's device.
            balance: coefficient of shortcut back-propagation, for networks with side branches.

        Returns:
            Scalars by name: `loss`, the mean over the batch, with a gradient; and its parts or other metrics. A loss
            with its own divisor, such as the number of objects, returns sums and a `divisor`; training adds those of
            all ranks and divides.
        """

    def random_targets(self, images: torch.Tensor, generator: torch.Generator) -> Targets:
        """Targets `Batch.targets` for images that have none, for checks that need no data.

        Args:
            images: `[B, C, H, W]`.
            generator: of the random numbers.

        Raises:
            UserError: the task has none.
        """
        raise UserError(f"task {type(self).__name__} has no random targets; measure on data")

    @abstractmethod
    def predict(self, network: nn.Module, batch: Batch) -> list[Prediction]:
        """One prediction for each sample of a batch."""

    def hits_over_time(self, network: nn.Module, batch: Batch, still_images: bool = False) -> torch.Tensor | None:
        """How many samples of an evaluation batch are right after each of the T time steps, int64 `[T]`.

        None for a task, a network or a batch that has no answer before the last step.

        Args:
            network: in evaluation mode.
            batch: on the network's device.
            still_images: answer for images too, which the network sees at each step; else for frames alone.
        """
        return None

    @abstractmethod
    def targets(self, batch: Batch) -> list[Target]:
        """The target of each sample of an evaluation batch."""

    @abstractmethod
    def details(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> dict[str, Any]:
        """The evaluation of a split as plain data: `metrics` by name, `samples`, and further keys of the task.

        Among them may be `description`, of the metrics, `protocol_remark`, on the protocols that they are by, and
        `remark`, which are shown beside them.
        """

    def metrics(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> dict[str, float]:
        """Metrics of a whole split by name."""
        metrics: dict[str, float] = self.details(predictions, targets)["metrics"]
        return metrics

    def per_image(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> Results | None:
        """The results of single images, by which two networks are compared; None for a task that has none."""
        return None

    def flaw(self, evaluation: Mapping[str, Any]) -> str | None:
        """Why a network with such an evaluation must not be used, in words; None if nothing speaks against it.

        Args:
            evaluation: as `details` returned it, maybe for an earlier version, or `metrics` alone.
        """
        return None

    def confidences(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> list[tuple[float, bool]]:
        """How sure each answer is, in [0, 1], and whether it is right; by default none."""
        return []

    def confident(self, prediction: Prediction, score: float) -> Prediction:
        """A prediction without the parts whose score in [0, 1] is smaller; by default all of it."""
        return prediction

    def same_answer(self, one: Prediction, other: Prediction) -> bool:
        """Whether two predictions for one sample say the same to a user, whatever their scores; by default equality."""
        return self.report.answer(one) == self.report.answer(other)

    def serve(self, network: nn.Module, batch: Batch) -> Any:
        """The answer of a served model for a batch: an array, or plain data for each image."""
        return [self.report.answer(prediction) for prediction in self.predict(network, batch)]

    def joined(self, answers: Sequence[Any]) -> Any:
        """The answers of `serve` for several batches, as one."""
        return [one for answer in answers for one in answer]

    @property
    def served_columns(self) -> tuple[str, ...] | None:
        """Names of the columns of the served table of float32; None for plain data."""
        return None

    def input_size(self, data: DataSummary) -> tuple[int, int] | None:
        """(height, width) in pixels that images are resized to before the transform; None: they keep their size."""
        return None if self.any_size or data.image_shape is None else data.image_shape[1:]


class TaskReport(ABC, Generic[Prediction, Target]):
    """Plots, tables and files of a task's results."""

    files: tuple[str, ...] = (EVALUATION,)
    """Names of the files that `write` writes."""
    draws_each: bool = False
    """Whether each prediction is drawn on its image (`draw_one`) in a file of its own; if not, `draw` plots all."""

    @abstractmethod
    def draw(
        self,
        images: Sequence[torch.Tensor],
        predictions: Sequence[Prediction],
        targets: Sequence[Target] | None,
        path: Path,
    ) -> None:
        """Plots images with their predictions, and with the targets if there are any.

        Args:
            images: uint8 `[C, H, W]` each.
            predictions: one for each image.
            targets: one for each image, or None.
            path: the PNG.
        """

    def draw_files(
        self, images: Sequence[torch.Tensor], predictions: Sequence[Prediction], names: Sequence[str], path: Path
    ) -> None:
        """Plots images of files with their predictions; with the files' names, where a task draws them."""
        self.draw(images, predictions, None, path)

    def draw_one(self, image: torch.Tensor, prediction: Prediction) -> torch.Tensor:
        """An image, uint8 `[C, H, W]`, with its prediction drawn on it, uint8 `[3, H', W']`.

        Raises:
            TypeError: `draws_each` is False.
        """
        raise TypeError(f"{type(self).__name__} does not draw single images")

    def draw_batch(self, images: Sequence[torch.Tensor], targets: Any, path: Path) -> None:
        """Plots images of a training batch with their targets; without targets by default.

        Args:
            images: uint8 `[C, H, W]` each.
            targets: those of `Batch.targets`.
            path: the PNG.
        """
        from spikefleet import plots

        plots.image_grid(images, [""] * len(images), [None] * len(images), path)

    def confusion(
        self, details: Mapping[str, Any], predictions: Sequence[Prediction], targets: Sequence[Target]
    ) -> Confusion | None:
        """What was taken for what; None for a task that has no such counts.

        Args:
            details: of these predictions.
            predictions: one for each sample.
            targets: one for each sample.
        """
        return None

    def mistakes(self, predictions: Sequence[Prediction], targets: Sequence[Target], most: int) -> list[Mistake]:
        """The samples that the network has most wrong, the worst first; none by default."""
        return []

    def mistaken_images(
        self, image: torch.Tensor, prediction: Prediction, target: Target
    ) -> list[tuple[str, torch.Tensor]]:
        """How a mistake is shown: captions and images, uint8 `[C, H, W]`; by default the image as it is.

        Args:
            image: uint8 `[C, H, W]`.
            prediction: of the image.
            target: of the image.
        """
        return [("", image)]

    def size_table(self, details: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Metrics by the size of what is looked for; the first row is the header. Empty for a task without sizes."""
        return []

    def table(self, details: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """A table of the details, by class if there are classes; the first row is the header."""
        return [("metric", "value"), *((name, f"{value:.4g}") for name, value in details["metrics"].items())]

    @abstractmethod
    def answer(self, prediction: Prediction) -> dict[str, Any]:
        """A prediction as plain data with class names."""

    def answer_table(self, answers: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
        """A table of answers, each with the path of its `image`; the first row is the header."""
        header = tuple(answers[0]) if answers else ("image",)
        return [header, *(tuple(str(answer[key]) for key in header) for answer in answers)]

    def csv_columns(self) -> tuple[str, ...]:
        """Names of the columns of `csv_rows`."""
        return ("answer",)

    def csv_rows(self, answer: Mapping[str, Any]) -> list[tuple[object, ...]]:
        """What `answer` returned, as rows of a CSV file; at least one, so that each image is in it."""
        return [(json.dumps(answer),)]

    def write(
        self,
        details: Mapping[str, Any],
        predictions: Sequence[Prediction],
        targets: Sequence[Target],
        folder: Path,
    ) -> None:
        """Writes the details (`evaluation.json`) and the plots of an evaluation into a folder.

        Args:
            details: as `Task.details` returns them.
            predictions: of the split.
            targets: of the split.
            folder: the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / EVALUATION, details)


AnyTask = Task[Any, Any]
"""A task whose predictions and targets the caller only passes between its methods."""


def build_task(config: Config, data: DataSummary, samples: Sequence[int] | None = None) -> AnyTask:
    """The task of a configuration.

    Args:
        config: of the run.
        data: summary of its data.
        samples: to train on, of each class, for balanced class weights; None where no loss is needed.

    Raises:
        UserError: the network does not fit the data, or the task has no such `checkpoint.metric`.
    """
    loss = LossSettings(
        label_smoothing=config.train.label_smoothing,
        class_weights=class_weights(config.train.class_weights, data.class_names, samples),
        global_divisor=config.train.loss_divisor == "global",
        shortcut=config.shortcut,
        max_detections=config.evaluation.max_detections,
    )
    task = task_class(config.task).build(config.model, data, loss)
    if config.checkpoint.metric not in task.metric_names:
        known = ", ".join(task.metric_names)
        raise UserError(f"checkpoint.metric={config.checkpoint.metric!r} must be a metric of the task: {known}")
    return task


def class_weights(
    wanted: Literal["none", "balanced"] | Mapping[str, float], names: Sequence[str], samples: Sequence[int] | None
) -> tuple[float, ...] | None:
    """The factor of each class in the loss.

    Balanced weights are n / (K n_k), as scikit-learn's, with K classes that have samples; their mean over the samples
    is 1.

    Args:
        wanted: `train.class_weights`.
        names: of the classes.
        samples: to train on, of each class; None where no loss is needed.

    Returns:
        The factors; None: no weights.

    Raises:
        UserError: a name is that of no class.
    """
    if wanted == "none" or (wanted == "balanced" and samples is None):
        return None
    if isinstance(wanted, str):
        there = [count for count in samples or () if count]
        return tuple(sum(there) / (len(there) * count) if count else 0.0 for count in samples or ())
    for name in wanted:
        if name not in names:
            hint = did_you_mean(name, list(names), f"expected one of {', '.join(names[:20])}")
            raise UserError(f"train.class_weights has {name!r}, which is no class of the data; {hint}")
    return tuple(wanted.get(name, 1.0) for name in names)


def task_class(name: str) -> type[AnyTask]:
    """The class of a task by its name in the table. Raises ValueError for an unknown one."""
    module, _, attribute = find_task(name).implementation.partition(":")
    found: type[AnyTask] = getattr(importlib.import_module(module), attribute)
    return found


def metric_of(evaluation: Mapping[str, Any], name: str) -> float | None:
    """A metric of an evaluation that was read from a file; None if it has none, or no number in its place."""
    metrics = evaluation.get("metrics")
    value = metrics.get(name) if isinstance(metrics, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def check_class_count(model: ModelConfig, data: DataSummary) -> None:
    """Raises UserError unless the network has one output for each class of the data."""
    if len(data.class_names) != model.num_classes:
        raise UserError(
            f"model.num_classes={model.num_classes}, but the data has "
            f"{counted(len(data.class_names), 'class', 'classes')}; set model.num_classes={len(data.class_names)}"
        )
