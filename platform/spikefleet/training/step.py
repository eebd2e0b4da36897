"""One optimizer step on all ranks, its metrics, and its check for values that are not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from spikefleet.config.schema import TrainConfig
from spikefleet.errors import RunError
from spikefleet.tasks import AnyTask
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import EventSink, Note, StepDone
from spikefleet.training.optimizer import large_step
from spikefleet.training.rank_statistics import average_statistics
from spikefleet.training.state import TrainingState
from spikefleet.training.stopping import StopRequested, never
from spikefleet.training.stream import pass_over, stream_loss
from spikefleet_models.gradient_flow import LARGEST_STEP, largest_relative_step
from spikefleet_models.health import SpikeMonitor
from spikefleet_pipelines.loading import Batch

_SMALLEST_LOSS_SCALE = 1.0


class NonFiniteError(RunError):
    """A loss or a gradient is not finite; every rank raises it at the same step, before the optimizer step."""


class Meter:
    """Images per second of all workers; includes the time for loading, not that for evaluation."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts a new measurement."""
        self._images, self._since = 0, time.perf_counter()

    def count(self, images: int) -> None:
        """Adds images."""
        self._images += images

    def rate(self) -> float:
        """Images per second since the last call or restart."""
        rate = self._images / (time.perf_counter() - self._since)
        self.restart()
        return rate


def training_step(
    state: TrainingState,
    task: AnyTask,
    batch: Batch,
    meter: Meter,
    sink: EventSink,
    stop_requested: StopRequested = never,
) -> bool:
    """Trains on one global batch: forward and backward passes of its micro-batches, all-reduce, optimizer step.

    Args:
        state: of the training, modified in place.
        task: the task.
        batch: this rank's slice of the global batch.
        meter: measures images per second.
        sink: receives the metrics of the step if they are due.
        stop_requested: asked on rank 0.

    Returns:
        Whether to stop after this step; the same on all ranks.

    Raises:
        NonFiniteError: the loss or a gradient is not finite; raised on all ranks, before the optimizer step.
    """
    config, group = state.config, state.group
    if batch.stream is not None and not batch.global_count:
        return _step_without_labels(state, batch, stop_requested)
    monitor = _monitor_if_due(state)
    rate, balance = state.set_learning_rate(), state.balance
    state.train_mode()
    state.optimizer.zero_grad(set_to_none=True)
    local: dict[str, torch.Tensor] = {}
    divisor = _Divisor(group)
    parts = list(micro_batches(batch, config.train.accumulate))
    for position, part in enumerate(parts):
        here = part.to(group.device, config.train.channels_last)
        last = position == len(parts) - 1
        # DDP all-reduces gradients in the backward pass of the last micro-batch only.
        sync = nullcontext() if last or group.size == 1 else state.ddp_model.no_sync()  # type: ignore[operator]
        counted = len(part.targets)
        replayed = None
        if state.graphed is not None and monitor is None:
            share = counted / batch.global_count
            replayed = state.graphed(task, here, balance, share * _batch_weight(config.train, batch))
        if replayed is not None:
            values, count = replayed, None
        else:
            with sync:
                with state.autocast(), monitor if monitor is not None and position == 0 else nullcontext():
                    if here.stream is None:
                        values = task.loss(state.ddp_model, here, balance)
                    else:
                        values, counted = stream_loss(task, state.ddp_model, state.lanes, here, balance)
                count = divisor.add(values.pop("divisor", None))
                # DDP divides by the number of ranks; the mean is over the samples, or by the divisor, of all ranks.
                share = counted / batch.global_count
                part_weight = share if count is None else (1 / count).to(values["loss"].dtype)
                weight = group.size * part_weight * _batch_weight(config.train, batch)
                state.scaler.scale(values["loss"] * weight).backward()
        for name, value in values.items():
            local[name] = local.get(name, 0) + value.detach().double() * (counted if count is None else 1)
    asked = group.is_main and stop_requested()
    means, stopping = _global_means(local, divisor.total(batch.global_count), group, asked)
    state.scaler.unscale_(state.optimizer)
    divisor.correct(state.train_model.parameters())
    norms = _gradient_norms(state)
    _refuse_non_finite(state, means, local, norms["gradient/norm"])
    if config.train.clip_norm is not None:
        clip_grads_with_norm_(
            state.train_model.parameters(), config.train.clip_norm, torch.tensor(norms["gradient/norm"])
        )
    _note_large_step(state, rate, sink)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    average_statistics(state.network, group)
    if state.ema is not None:
        state.ema.update_parameters(state.network)
    for name, mean in means.items():
        state.sums[name] = state.sums.get(name, 0.0) + mean * batch.global_count
    state.step_in_epoch += 1
    meter.count(batch.global_count)
    if due(config.tracking.every_steps, state.step) or monitor is not None:
        metrics = {f"train/{name}": mean for name, mean in means.items()} | norms
        metrics |= {"lr": rate, "images_per_second": meter.rate()}
        if config.shortcut.enabled:
            metrics["balance_coefficient"] = balance
        if monitor is not None:
            metrics |= {f"spikes/{name}": value for name, value in monitor.summary().items()}
        sink.emit(StepDone(state.epoch, state.step, metrics))
    return stopping


def _step_without_labels(state: TrainingState, batch: Batch, stop_requested: StopRequested) -> bool:
    """Runs windows of which no rank has a label: membranes and batch statistics are moved on, weights stay."""
    state.train_mode()
    with state.autocast():
        pass_over(state.ddp_model, state.lanes, batch.to(state.group.device, state.config.train.channels_last))
    average_statistics(state.network, state.group)
    state.step_in_epoch += 1
    return any(state.group.all_gather(state.group.is_main and stop_requested()))


def _batch_weight(config: TrainConfig, batch: Batch) -> float:
    """The weight of a global batch beside others: 1, or its number of samples, or its share of a full one."""
    if config.loss == "sum":
        return batch.global_count
    if config.partial_batch == "weigh":  # each sample of an epoch then counts the same
        return batch.global_count / config.global_batch
    return 1.0


def micro_batches(batch: Batch, parts: int) -> Iterator[Batch]:
    """Iterates over slices of nearly equal size; the sampling plan leaves none empty."""
    if parts == 1:
        yield batch
        return
    start = 0
    for images, indices in zip(batch.images.tensor_split(parts), batch.indices.tensor_split(parts), strict=True):
        stop = start + len(indices)
        yield Batch(images, batch.targets[start:stop], indices, batch.global_count)
        start = stop


def _monitor_if_due(state: TrainingState) -> SpikeMonitor | None:
    is_due = state.group.is_main and due(state.config.tracking.health_every_steps, state.step + 1)
    return SpikeMonitor(state.network) if is_due else None


class _Divisor:
    """The divisor of a loss that counts it itself, such as its objects, over all micro-batches of all ranks.

    Each micro-batch is divided by the count of the first, which keeps fp16 gradients in range; `correct` rescales the
    gradients when all are counted.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._parts: list[torch.Tensor] = []
        self._first: torch.Tensor | None = None
        self._total: torch.Tensor | None = None

    def add(self, count: torch.Tensor | None) -> torch.Tensor | None:
        """Adds the count of a micro-batch; returns its divisor, or None for a loss that is a mean over samples."""
        if count is None:
            return None
        self._parts.append(count.detach().double())
        if self._first is None:
            self._first = self._over_ranks(self._parts[0])
        return self._first

    def total(self, samples: int) -> torch.Tensor | int:
        """The divisor of sums over all ranks: the total count, or the number of samples."""
        if self._first is None:
            return samples
        self._total = self._first if len(self._parts) == 1 else self._over_ranks(torch.stack(self._parts).sum())
        return self._total

    def correct(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divides gradients by `total` instead of the first micro-batch's count."""
        if self._first is None or self._total is None or len(self._parts) == 1:
            return
        factor = self._first / self._total
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))

    def _over_ranks(self, count: torch.Tensor) -> torch.Tensor:
        return self._group.all_reduce(count.clone()).clamp_min(1)


def _global_means(
    local: Mapping[str, torch.Tensor], total: torch.Tensor | int, group: ProcessGroup, asked: bool
) -> tuple[dict[str, float], bool]:
    """Means over all ranks, and whether rank 0 was asked to stop, which costs no further collective."""
    values = [value.double() for value in local.values()]
    sums = group.all_reduce(torch.stack([*values, torch.full_like(values[0], float(asked))]))
    return dict(zip(local, (sums[:-1] / total).tolist(), strict=True)), bool(sums[-1] > 0)


def _gradient_norms(state: TrainingState) -> dict[str, float]:
    """L2 norms of the averaged gradient before clipping: over all parameters, and of the first layer's weight."""
    first = next(p for p in state.network.parameters() if p.ndim > 1)
    first_norm = 0.0 if first.grad is None else float(first.grad.norm())
    whole = get_total_norm([p.grad for p in state.train_model.parameters() if p.grad is not None])
    return {"gradient/norm": float(whole), "gradient/first_layer_norm": first_norm}


def _note_large_step(state: TrainingState, rate: float, sink: EventSink) -> None:
    """Warns once, on rank 0, of a layer that this step changes by more than its own weights.

    Looked for in the first step and where metrics are logged: it reads all weights and gradients once.
    """
    looks = state.step == 0 or due(state.config.tracking.every_steps, state.step + 1)
    if not looks or not state.group.is_main or state.noted_large_step:
        return
    largest = largest_relative_step(state.network, rate, adaptive=state.config.optim.kind == "adamw")
    if largest is not None and LARGEST_STEP < largest[1] < math.inf:  # the scaler skips a step that overflows
        state.noted_large_step = True
        where = f"step {state.step + 1} (epoch {state.epoch + 1})"
        sink.emit(Note(f"{where}: {large_step(*largest, rate)}; `spikefleet gradients` shows every layer"))


def _refuse_non_finite(
    state: TrainingState, means: Mapping[str, float], local: Mapping[str, torch.Tensor], norm: float
) -> None:
    """Raises NonFiniteError on all ranks: the mean loss and the averaged gradient are the same on all of them."""
    where = f"step {state.step + 1} (epoch {state.epoch + 1})"
    remedy = "the step was not applied; lower optim.lr, set train.clip_norm, or check the data of this step"
    if not math.isfinite(means["loss"]):
        losses = state.group.all_gather(float(local["loss"]))
        ranks = [str(rank) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        raise NonFiniteError(f"the loss is {means['loss']} at {where}, on rank {', '.join(ranks)}; {remedy}")
    if math.isfinite(norm):
        return
    if not state.scaler.is_enabled():
        bad = [name for name, p in state.train_model.named_parameters() if p.grad is not None and not _finite(p.grad)]
        named = f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else "".join(bad) or "their norm"
        raise NonFiniteError(f"the gradient is not finite at {where}: {named}; {remedy}")
    if state.scaler.get_scale() <= _SMALLEST_LOSS_SCALE:  # the scaler skips a step that overflows
        raise NonFiniteError(
            f"the fp16 gradient overflows at {where} even at loss scale {state.scaler.get_scale()}; {remedy}"
        )


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def due(every: int | None, count: int) -> bool:
    """Whether something that happens at every multiple of `every` happens at `count`; never if `every` is None."""
    return every is not None and count % every == 0
