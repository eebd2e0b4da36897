"""The task's metric of the trained network and of its binary form, in the type that is served, on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.status import Count, uncounted
from spikefleet.tasks import AnyTask
from spikefleet.training.evaluation import first_batches
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.slots import Layer
from spikefleet_pipelines.loading import BatchLoader

SERVED = "float32"
"""The type in which registered networks are loaded and served."""

MOST_IMAGES = 256
LEAST_IMAGES = 4
_PASSES_OF_A_STEP = 3
"""A training step costs about three forward passes."""
_SHARE_OF_TRAINING = 1 / 50
_MOST_MULTIPLICATIONS = 2e13
"""About five minutes of a few CPU cores."""


@dataclass(frozen=True)
class MetricLeg:
    """Metrics of both networks over the same images."""

    metric: str
    """The metric that decides."""
    trained: Mapping[str, float]
    binary: Mapping[str, float]
    images: int

    @property
    def difference(self) -> float:
        """Of the metric that decides: binary - trained."""
        return self.binary[self.metric] - self.trained[self.metric]

    @property
    def max_difference(self) -> float:
        """Largest difference of any metric."""
        return max(abs(self.binary[name] - value) for name, value in self.trained.items())

    @property
    def tolerance(self) -> float:
        """0.5 / sqrt(images): the largest standard error of a share over so many images; rounding changes less.

        Of a metric that may be larger than 1, that share of its value.
        """
        return 0.5 / self.images**0.5 * max(1.0, abs(self.trained[self.metric]))

    @property
    def passed(self) -> bool:
        """The metric that decides differs by no more than the tolerance."""
        return abs(self.difference) <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "metric": self.metric,
            "trained": dict(self.trained),
            "binary": dict(self.binary),
            "images": self.images,
            "dtype": SERVED,
            "difference": self.difference,
            "tolerance": self.tolerance,
            "passed": self.passed,
        }


@torch.inference_mode()
def compare_metrics(
    trained: nn.Module,
    binary: nn.Module,
    task: AnyTask,
    config: Config,
    loader: BatchLoader,
    count: int,
    progress: Count = uncounted,
) -> MetricLeg:
    """Measures both networks on the first images of a split.

    Args:
        trained: in evaluation mode, on the CPU, in fp32.
        binary: its binary form, likewise.
        task: computes the metrics.
        config: batch size of evaluation, and the metric that decides.
        loader: of the split.
        count: images to measure; the last batch may bring a few more, and there are more where the metric is not
            defined on these, as of a detector on images without objects.
        progress: called with (images measured, images to measure).
    """
    forms = {"trained": trained, "binary": binary}
    predictions: dict[str, list[Any]] = {name: [] for name in forms}
    targets: list[Any] = []
    for batch in first_batches(loader, min(config.train.eval_batch, count), len(loader.split)):
        targets += task.targets(batch)
        for name, form in forms.items():
            predictions[name] += task.predict(form, batch)
        progress(len(targets), max(count, len(targets)))
        if len(targets) >= count and _is_defined(config.checkpoint.metric, task, predictions["trained"], targets):
            break
    metrics = {name: task.metrics(found, targets) for name, found in predictions.items()}
    return MetricLeg(config.checkpoint.metric, metrics["trained"], metrics["binary"], len(targets))


def _is_defined(metric: str, task: AnyTask, predictions: Sequence[Any], targets: Sequence[Any]) -> bool:
    try:
        return metric in task.metrics(predictions, targets)
    except UserError:  # no image has an object
        return False


def affordable_images(network: nn.Module, image: Tensor, config: Config, train_samples: int) -> int:
    """On how many images a certification compares metrics, so that it stays short beside the training.

    It is a fiftieth of the training's forward passes, where the binary form counts D times, and at most 2e13
    multiplications; but 4 images at least and 256 at most. It depends on no clock, so a certification made again is
    the same.

    Args:
        network: in evaluation mode.
        image: [1, C, H, W], or frames [T, 1, C, H, W].
        config: of the training.
        train_samples: samples of the training split.
    """
    slots = max((int(node.bound) for node in spiking_nodes(network).values()), default=1)
    trained = _PASSES_OF_A_STEP * config.train.epochs * train_samples
    passes = min(trained * _SHARE_OF_TRAINING, _MOST_MULTIPLICATIONS / max(1, _multiplications(network, image)))
    return int(min(MOST_IMAGES, max(LEAST_IMAGES, passes / (1 + slots))))


@torch.inference_mode()
def _multiplications(network: nn.Module, image: Tensor) -> int:
    """Those of all layers in one forward pass."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, Layer)
        total += output.numel() * module.weight[0].numel()

    handles = [module.register_forward_hook(count) for module in network.modules() if isinstance(module, Layer)]
    try:
        network(image.clone())
    finally:
        for handle in handles:
            handle.remove()
    return total
