"""What a network is trained for. The worker loop knows tasks, not models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.tasks.classification import Classification
from spikefleet.tasks.detection import Detection
from spikefleet_models.build import build_criterion
from spikefleet_pipelines.loading import Batch


class Task(Protocol):
    """The seam between the worker loop and a kind of problem."""

    metric_names: tuple[str, ...]

    def loss(self, network: nn.Module, batch: Batch, balance: float) -> dict[str, torch.Tensor]:
        """`{"loss": mean over the batch, parts...}`; scalars, `loss` with a gradient.

        `balance` is the coefficient of shortcut back-propagation, for networks with side branches.
        """
        ...

    def predict(self, network: nn.Module, batch: Batch) -> list[Any]:
        """One plain, picklable prediction for each sample of the batch."""
        ...

    def truth(self, batch: Batch) -> list[Any]:
        """What `metrics` compares each prediction with; plain and picklable."""
        ...

    def metrics(self, predictions: Sequence[Any], targets: Sequence[Any]) -> dict[str, float]:
        """Figures over a whole split, each sample once."""
        ...

    def draw(
        self, images: Sequence[torch.Tensor], predictions: Sequence[Any], targets: Sequence[Any] | None, path: Path
    ) -> None:
        """A grid of pictures `[C, H, W]` (uint8) with predictions, beside the truth where there is one."""
        ...

    def draw_batch(self, images: Sequence[torch.Tensor], targets: Any, path: Path) -> None:
        """Pictures `[C, H, W]` (uint8) of a training batch with its targets (`Batch.targets`)."""
        ...

    def details(self, predictions: Sequence[Any], targets: Sequence[Any]) -> dict[str, Any]:
        """`metrics`, `samples`, and whatever else describes an evaluation; plain data."""
        ...

    def table(self, details: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Details by class, for people; the first row is the header."""
        ...

    def answer(self, prediction: Any) -> dict[str, Any]:
        """One prediction as plain data with names."""
        ...

    def report(
        self, details: Mapping[str, Any], predictions: Sequence[Any], targets: Sequence[Any], folder: Path
    ) -> None:
        """Writes details and the pictures that go with them into a folder."""
        ...


def build_task(config: Config, class_names: Sequence[str], category_ids: Sequence[int] = ()) -> Task:
    """The task that a configuration names.

    `category_ids` are those of the data, in the order of `class_names`; detection writes them into its results.
    Raises UserError when the task has no such metric or not as many classes.
    """
    if len(class_names) != config.model.num_classes:
        raise UserError(
            f"model.num_classes={config.model.num_classes}, but the data have {len(class_names)} classes; "
            f"set model.num_classes={len(class_names)}"
        )
    task: Task
    if config.task == "detection":
        task = Detection(build_criterion(config.model), class_names, category_ids)
    else:
        task = Classification(class_names, config.train.label_smoothing, config.shortcut)
    if config.checkpoint.metric not in task.metric_names:
        known = ", ".join(task.metric_names)
        raise UserError(f"checkpoint.metric={config.checkpoint.metric!r} is not measured by this task; it has {known}")
    return task
