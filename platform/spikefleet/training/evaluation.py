"""Evaluation of a network on a split: each sample once, with any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from torch import nn

from spikefleet.config.train_config import TrainConfig
from spikefleet.errors import UserError
from spikefleet.status import Count, uncounted
from spikefleet.tasks import Task
from spikefleet.tasks.task import Prediction, Target
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.precision import autocast
from spikefleet.training.stopping import StopRequested
from spikefleet.training.stream import Lanes, predict_window
from spikefleet_models.health import SpikeMonitor
from spikefleet_pipelines.loading import Batch, BatchLoader
from spikefleet_pipelines.sampling import EvaluationPlan, StepBatch
from spikefleet_pipelines.stream_plan import EventStreamPlan


@dataclass(frozen=True)
class Evaluation(Generic[Prediction, Target]):
    """Predictions and targets in the order of the split, with spike health of the first batch."""

    predictions: list[Prediction]
    targets: list[Target]
    layers: tuple[dict[str, Any], ...]
    """Spike health by layer."""
    health: dict[str, float]
    """Spike health of the whole network."""
    split: str
    """Name of the split."""
    over_time: tuple[float, ...] = ()
    """Accuracy of the answer after each time step; empty unless asked for, and for networks without such answers."""
    step_ms: float | None = None
    """Length of a time step of the data; None where samples differ in it, and for images."""

    def details(self, task: Task[Prediction, Target]) -> dict[str, Any]:
        """What `task.details` returns, with the name of the split, and `over_time` if there is one."""
        details = {**task.details(self.predictions, self.targets), "split": self.split}
        if self.over_time:
            details["over_time"] = {"step_ms": self.step_ms, "top1": list(self.over_time)}
        return details


class EvaluationStopped(Exception):  # noqa: N818  # no error
    """An evaluation ended before all samples, as requested."""


@torch.no_grad()
def evaluate(
    network: nn.Module,
    task: Task[Prediction, Target],
    loader: BatchLoader,
    config: TrainConfig,
    group: ProcessGroup,
    progress: Count = uncounted,
    stop_requested: StopRequested | None = None,
    over_time: bool = False,
    still_images: bool = False,
) -> Evaluation[Prediction, Target] | None:
    """Predicts every sample of the loader's split; with `config.stream`, at the end of its recording's windows.

    Args:
        network: on the device of the group; its mode is restored.
        task: the task.
        loader: of the split.
        config: batch size and precision.
        group: this process's rank and group.
        progress: called with (samples done, samples in all), as far as this rank knows.
        stop_requested: asked on each rank after each batch.
        over_time: measure the answers after each time step too, by another forward pass; not of streams.
        still_images: with `over_time`, also those to images, which the network sees at each step.

    Returns:
        The evaluation on rank 0; None on other ranks.

    Raises:
        EvaluationStopped: a rank was asked to stop; raised on all ranks.
        UserError: the network was trained on streams, and the split cannot be read as such.
    """
    if config.stream is not None:
        return _evaluate_streams(network, task, loader, config, group, progress, stop_requested)
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
    hits: list[int] | None = None
    stopped = False
    for position, batch in enumerate(loader.epoch(plan, epoch=0)):
        here = batch.to(group.device, config.channels_last)
        with autocast(config.precision, group.device), monitor if position == 0 else nullcontext():
            predictions = task.predict(network, here)
        if over_time:
            with autocast(config.precision, group.device):
                here_right = task.hits_over_time(network, here, **({"still_images": True} if still_images else {}))
            if here_right is not None:
                counts: list[int] = here_right.tolist()
                hits = counts if hits is None else [one + more for one, more in zip(hits, counts, strict=True)]
        rows += zip(batch.indices.tolist(), predictions, task.targets(batch), strict=True)
        progress(min(len(rows) * group.size, len(loader.split)), len(loader.split))
        if stop_requested is not None and stop_requested():
            stopped = True
            break
    network.train(was_training)
    # Ranks have different numbers of batches: that they stop is agreed once, after the loop.
    if stop_requested is not None and any(group.all_gather(stopped)):
        raise EvaluationStopped
    right = [part for part in group.gather(hits) or () if part is not None] if over_time else []
    merged = _gathered(rows, group)
    if merged is None:
        return None
    return Evaluation(
        *merged,
        tuple(monitor.table()),
        monitor.summary(),
        loader.split.name,
        tuple(sum(counts) / len(merged[0]) for counts in zip(*right, strict=True)),
        loader.step_ms,
    )


def _gathered(
    rows: list[tuple[int, Prediction, Target]], group: ProcessGroup
) -> tuple[list[Prediction], list[Target]] | None:
    """Predictions and targets of all ranks in the order of the split, on rank 0."""
    parts = group.gather(rows)
    if parts is None:
        return None
    merged = sorted((row for part in parts for row in part), key=lambda row: row[0])
    return [row[1] for row in merged], [row[2] for row in merged]


def _evaluate_streams(
    network: nn.Module,
    task: Task[Prediction, Target],
    loader: BatchLoader,
    config: TrainConfig,
    group: ProcessGroup,
    progress: Count,
    stop_requested: StopRequested | None,
) -> Evaluation[Prediction, Target] | None:
    """As `evaluate`, with every recording read window by window, and predictions for those with a label."""
    from spikefleet_pipelines.streams import StreamLoader  # a store of events, with pyarrow

    assert config.stream is not None
    try:
        stream = StreamLoader.beside(loader)
    except ValueError as error:
        raise UserError(f"the network was trained on streams (train.stream): {error}") from error
    was_training = network.training
    network.eval()
    recordings = len(stream.split.windows.counts)
    lanes = min(config.eval_batch, -(-recordings // group.size)) * group.size
    plan = EventStreamPlan(
        windows=stream.split.windows, lanes=lanes, world_size=group.size, rank=group.rank, fill=False, shuffle=False
    )
    membranes, monitor = Lanes(carries=config.stream.state == "carried"), SpikeMonitor(network)
    rows: list[tuple[int, Prediction, Target]] = []
    stopped = False
    for batch in stream.epoch(plan, epoch=0):
        assert batch.stream is not None
        here = batch.to(group.device, config.channels_last)
        with autocast(config.precision, group.device), monitor if batch.stream.step == 0 else nullcontext():
            rows += predict_window(task, network, membranes, here)
        progress(min(len(rows) * group.size, len(loader.split)), len(loader.split))
        if stop_requested is not None and stop_requested():
            stopped = True
            break
    network.train(was_training)
    if stop_requested is not None and any(group.all_gather(stopped)):
        raise EvaluationStopped
    merged = _gathered(rows, group)
    if merged is None:
        return None
    return Evaluation(*merged, tuple(monitor.table()), monitor.summary(), loader.split.name)


@dataclass(frozen=True)
class SpreadPlan:
    """Single samples, evenly spread over a split, whose first samples may all be of one class."""

    samples: int
    """Samples of the split."""
    count: int
    """Samples to take."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches."""
        return min(self.count, self.samples)

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[StepBatch]:
        """Iterates over the batches from `start_step` on."""
        rows = np.linspace(0, self.samples - 1, self.steps_per_epoch).round().astype(np.int64)
        for step in range(start_step, len(rows)):
            yield StepBatch(step, rows[step : step + 1], 1)


@dataclass(frozen=True)
class ChosenPlan:
    """One batch of given samples."""

    samples: int
    """Samples of the split."""
    positions: tuple[int, ...]
    """In the split."""

    steps_per_epoch = 1

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[StepBatch]:
        """Iterates over the one batch, from `start_step` on."""
        if not start_step:
            yield StepBatch(0, np.array(self.positions, dtype=np.int64), len(self.positions))


def first_batches(loader: BatchLoader, size: int, count: int) -> Iterator[Batch]:
    """Iterates over batches of `size` in the order of the split, until at least `count` samples, or all."""
    seen = 0
    for batch in loader.epoch(EvaluationPlan(samples=len(loader.split), global_batch=size), epoch=0):
        yield batch
        seen += len(batch.indices)
        if seen >= count:
            return
