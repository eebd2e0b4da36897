"""What weights of a lower precision change: the metrics of a split, its answers, and the integers of neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spikefleet.inference.trained_network import TrainedNetwork, evaluate_on_split, in_precision, open_split
from spikefleet.training.evaluation import Evaluation, first_batches
from spikefleet_models.low_precision import Precision, SpikeDifference, compare_spikes
from spikefleet_pipelines.loading import BatchLoader

_IMAGES_FOR_SPIKES = 4


@dataclass(frozen=True)
class RoundingEffect:
    """A network with rounded weights against itself in fp32, both deployed, on one split."""

    precision: Precision
    metric: str
    """The metric that chose the checkpoint."""
    metrics: Mapping[str, float]
    fp32: Mapping[str, float]
    """Metrics in fp32."""
    flipped: int
    """Samples with another answer (`Task.same_answer`)."""
    samples: int
    spikes: SpikeDifference
    """On the first few samples, each network on its own currents."""

    @property
    def sentence(self) -> str:
        """The effect in words."""
        points = 100 * (self.metrics[self.metric] - self.fp32[self.metric])
        return (
            f"weights in {self.precision}, against fp32: {self.metric} {points:+.2f} points, "
            f"{self.flipped:,} of {self.samples:,} answers differ ({self.flipped / self.samples:.2%}), "
            f"{self.spikes.share:.3%} of the emitted integers"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "fp32": dict(self.fp32),
            "answers_differ": self.flipped,
            "samples": self.samples,
            "integers_differ": self.spikes.differing,
            "integers": self.spikes.emitted,
        }


def rounding_effect(
    trained: TrainedNetwork,
    evaluation: Evaluation[Any, Any],
    split: str,
    stores_dir: Path,
    console: Console,
    *,
    precision: Precision,
    data: str | None = None,
    gpu: bool = False,
) -> RoundingEffect:
    """Evaluates a network in fp32 and compares.

    Args:
        trained: as it was trained.
        evaluation: of `in_precision(trained, precision)` on the same split.
        split: name of the split.
        stores_dir: directory of prepared stores.
        console: for progress.
        precision: of `evaluation`.
        data: location of another store; by default the data of the network's configuration.
        gpu: run on the GPU.

    Raises:
        UserError: as `evaluate_on_split`.
    """
    exact, low = in_precision(trained, "fp32"), in_precision(trained, precision)
    reference = evaluate_on_split(exact, split, stores_dir, console, data=data, gpu=gpu)
    pairs = zip(evaluation.predictions, reference.predictions, strict=True)
    rows = open_split(trained, split, stores_dir, console, data=data)
    loader = BatchLoader(rows, trained.config.transform, train=False)
    images = next(first_batches(loader, min(_IMAGES_FOR_SPIKES, len(rows)), 1)).network_input
    with torch.inference_mode():
        spikes = compare_spikes(exact.network.cpu(), low.network, images)
    task = trained.task
    return RoundingEffect(
        precision=precision,
        metric=trained.config.checkpoint.metric,
        metrics=task.metrics(evaluation.predictions, evaluation.targets),
        fp32=task.metrics(reference.predictions, reference.targets),
        flipped=sum(not task.same_answer(one, other) for one, other in pairs),
        samples=len(evaluation.predictions),
        spikes=spikes,
    )
