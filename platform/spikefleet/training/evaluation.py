"""Evaluation of a network on a split, each sample once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from torch import nn

from spikefleet.config.schema import TrainConfig
from spikefleet.status import Count, uncounted
from spikefleet.tasks import Task
from spikefleet.tasks.task import Prediction, Target
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.precision import autocast
from spikefleet_models.health import SpikeMonitor
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EvaluationPlan, StepBatch


@dataclass(frozen=True)
class Evaluation(Generic[Prediction, Target]):
    """Predictions in the order of the split, their targets, and the firing of the first batch by layer."""

    predictions: list[Prediction]
    targets: list[Target]
    layers: tuple[dict[str, Any], ...]
    health: dict[str, float]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    task: Task[Prediction, Target],
    loader: BatchLoader,
    config: TrainConfig,
    group: ProcessGroup,
    progress: Count = uncounted,
) -> Evaluation[Prediction, Target] | None:
    """Predictions for every sample of the loader's split; on rank 0, None elsewhere.

    `progress` is called with (samples done, samples in all), as far as this rank knows.
    """
    was_training = network.training
    network.eval()
    plan = EvaluationPlan(
        samples=len(loader.split),
        global_batch=config.eval_batch * group.size,
        world_size=group.size,
        rank=group.rank,
    )
    monitor = SpikeMonitor(network)
    rows: list[tuple[int, Prediction, Target]] = []
    for position, batch in enumerate(loader.epoch(plan, epoch=0)):
        here = batch.to(group.device, config.channels_last)
        with autocast(config.precision, group.device), monitor if position == 0 else nullcontext():
            predictions = task.predict(network, here)
        rows += zip(batch.indices.tolist(), predictions, task.targets(batch), strict=True)
        progress(min(len(rows) * group.size, len(loader.split)), len(loader.split))
    network.train(was_training)
    parts = group.gather(rows)
    if parts is None:
        return None
    merged = sorted((row for part in parts for row in part), key=lambda row: row[0])
    return Evaluation([row[1] for row in merged], [row[2] for row in merged], tuple(monitor.table()), monitor.summary())


@dataclass(frozen=True)
class SpreadPlan:
    """Single samples, evenly spread over a split: its first ones may all be of one class."""

    samples: int
    count: int

    @property
    def steps_per_epoch(self) -> int:
        return min(self.count, self.samples)

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[StepBatch]:
        rows = np.linspace(0, self.samples - 1, self.steps_per_epoch).round().astype(np.int64)
        for step in range(start_step, len(rows)):
            yield StepBatch(step, rows[step : step + 1], 1)


def first_batches(loader: BatchLoader, size: int, count: int) -> Iterator[Batch]:
    """Batches of `size` in the order of the split, until `count` samples have been seen, or all."""
    seen = 0
    for batch in loader.epoch(EvaluationPlan(samples=len(loader.split), global_batch=size), epoch=0):
        yield batch
        seen += len(batch.indices)
        if seen >= count:
            return
