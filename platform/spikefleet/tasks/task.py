"""The seam between everything that trains, measures or serves a network, and one kind of problem.

A task is one module with a `Task` and its `TaskReport`, and one line in `spikefleet.config.task_table`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from torch import nn

from spikefleet import plots
from spikefleet.config.schema import Config
from spikefleet.config.task_table import find_task
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import write_json
from spikefleet_models.family import ModelConfig
from spikefleet_models.shortcut import ShortcutConfig
from spikefleet_pipelines.loading import Batch

Prediction = TypeVar("Prediction")
"""What a network says of one sample; plain and picklable."""

Target = TypeVar("Target")
"""What `metrics` compares a prediction with; plain and picklable."""


@dataclass(frozen=True)
class LossSettings:
    """What a training adds to a task's loss; its entry in the table of tasks says which it knows."""

    label_smoothing: float = 0.0
    shortcut: ShortcutConfig = field(default_factory=ShortcutConfig)


class Task(ABC, Generic[Prediction, Target]):
    """Loss, predictions and metrics of one kind of problem."""

    metric_names: tuple[str, ...]
    """Metrics over a split, all that `checkpoint.metric` may name."""

    headline: tuple[str, ...]
    """Those shown while it trains; shares of 1."""

    any_size: bool = False
    """Whether it takes images of any size; else they are resized to that of the training images."""

    @classmethod
    @abstractmethod
    def build(cls, model: ModelConfig, data: DataSummary, loss: LossSettings) -> Self:
        """The task for a network and its data. Raises UserError when they do not suit one another."""

    @property
    @abstractmethod
    def report(self) -> TaskReport[Prediction, Target]:
        """What draws and writes its results."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch, balance: float) -> dict[str, torch.Tensor]:
        """Runs a network that trains on a batch.

        Args:
            network: in training mode.
            batch: on the network's device.
            balance: coefficient of shortcut back-propagation, for networks with side branches.

        Returns:
            `{"loss": mean over the batch, parts...}`: scalars, `loss` with a gradient.
        """

    @abstractmethod
    def predict(self, network: nn.Module, batch: Batch) -> list[Prediction]:
        """One prediction for each sample of a batch."""

    @abstractmethod
    def targets(self, batch: Batch) -> list[Target]:
        """The target of each sample of an evaluation batch."""

    @abstractmethod
    def details(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> dict[str, Any]:
        """`metrics` (by name), `samples`, and whatever else describes an evaluation of a split; plain data."""

    def metrics(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> dict[str, float]:
        """Metrics over a whole split, each sample once."""
        metrics: dict[str, float] = self.details(predictions, targets)["metrics"]
        return metrics

    def confident(self, prediction: Prediction, score: float) -> Prediction:
        """A prediction without the parts below a score in [0, 1]; as it is where it has no parts."""
        return prediction

    def serve(self, network: nn.Module, batch: Batch) -> Any:
        """What a served model returns for a batch: an array, or plain data for each image."""
        return [self.report.answer(prediction) for prediction in self.predict(network, batch)]

    @property
    def served_shape(self) -> tuple[int, ...] | None:
        """Shape of a served float32 array, -1 for the batch; None where plain data are served."""
        return None


class TaskReport(ABC, Generic[Prediction, Target]):
    """Plots, tables and files of a task's results."""

    draws_each: bool = False
    """Whether a prediction is drawn on its image (`draw_one`), a file each; else `draw` puts all into one plot."""

    @abstractmethod
    def draw(
        self,
        images: Sequence[torch.Tensor],
        predictions: Sequence[Prediction],
        targets: Sequence[Target] | None,
        path: Path,
    ) -> None:
        """Plots images `[C, H, W]` (uint8) with their predictions, beside the targets where there are any."""

    def draw_files(
        self, images: Sequence[torch.Tensor], predictions: Sequence[Prediction], names: Sequence[str], path: Path
    ) -> None:
        """Plots images of files with their predictions; with the files' names, where a task draws them."""
        self.draw(images, predictions, None, path)

    def draw_one(self, image: torch.Tensor, prediction: Prediction) -> torch.Tensor:
        """An image `[C, H, W]` (uint8) with its prediction drawn on it, uint8 `[3, H', W']`."""
        raise TypeError(f"{type(self).__name__} draws no single images")

    def draw_batch(self, images: Sequence[torch.Tensor], targets: Any, path: Path) -> None:
        """Plots images `[C, H, W]` (uint8) of a training batch with its targets (`Batch.targets`); bare by default."""
        plots.picture_grid(images, [""] * len(images), [None] * len(images), path)

    def table(self, details: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Details for people, by class where there are classes; the first row is the header."""
        return [("metric", "value"), *((name, f"{value:.4g}") for name, value in details["metrics"].items())]

    @abstractmethod
    def answer(self, prediction: Prediction) -> dict[str, Any]:
        """One prediction as plain data with names."""

    def answer_table(self, answers: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
        """Answers, each with the name of its `image`, for people; the first row is the header."""
        header = tuple(answers[0]) if answers else ("image",)
        return [header, *(tuple(str(answer[key]) for key in header) for answer in answers)]

    def write(
        self,
        details: Mapping[str, Any],
        predictions: Sequence[Prediction],
        targets: Sequence[Target],
        folder: Path,
    ) -> None:
        """Writes details (`evaluation.json`) and the plots that go with them into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "evaluation.json", details)


AnyTask = Task[Any, Any]
"""A task whose predictions and targets pass from one of its methods to another, unread."""


def build_task(config: Config, data: DataSummary) -> AnyTask:
    """The task that a configuration names.

    Raises:
        UserError: the data do not suit the task or the network, or the task has no such metric.
    """
    loss = LossSettings(config.train.label_smoothing, config.shortcut)
    task = task_class(config.task).build(config.model, data, loss)
    if config.checkpoint.metric not in task.metric_names:
        known = ", ".join(task.metric_names)
        raise UserError(f"checkpoint.metric={config.checkpoint.metric!r} is not measured by this task; it has {known}")
    return task


def task_class(name: str) -> type[AnyTask]:
    """The class of a task, by the table's name. Raises ValueError for an unknown one."""
    module, _, attribute = find_task(name).implementation.partition(":")
    found: type[AnyTask] = getattr(importlib.import_module(module), attribute)
    return found


def check_class_count(model: ModelConfig, data: DataSummary) -> None:
    """Raises UserError unless the network has an output for each class of the data."""
    if len(data.class_names) != model.num_classes:
        raise UserError(
            f"model.num_classes={model.num_classes}, but the data have {len(data.class_names)} classes; "
            f"set model.num_classes={len(data.class_names)}"
        )
