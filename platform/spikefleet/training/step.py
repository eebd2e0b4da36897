"""One optimizer step on all ranks, its metrics, and its check for values that are not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from spikefleet.config.train_config import TrainConfig
from spikefleet.tasks import AnyTask
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import EventSink, Note, StepDone
from spikefleet.training.optimizer import large_step, smaller_steps
from spikefleet.training.rank_statistics import average_statistics
from spikefleet.training.state import TrainingState
from spikefleet.training.step_reading import DeviceNumbers, StepNumbers, StepReading
from spikefleet.training.stopping import StopRequested, never
from spikefleet.training.stream import pass_over, stream_loss
from spikefleet_models.gradient_flow import LARGEST_STEP, StepSizes, step_sizes
from spikefleet_models.health import SpikeMonitor
from spikefleet_pipelines.loading import Batch


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
        NonFiniteError: the loss or a gradient is not finite; raised on all ranks, before the weights change. Where
            `state.reads_late`, it is that of the step before, which changed no weight.
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
                watched = monitor if monitor is not None and position == 0 else nullcontext()
                with state.autocast(), state.packing(), watched:
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
    sums, total = _global_sums(local, group, asked), divisor.total(batch.global_count)
    means = dict(zip(local, sums[:-1] / total, strict=True))
    if state.reads_late:
        _spoil_if_not_finite(state, means["loss"])
    state.scaler.unscale_(state.optimizer)
    divisor.correct(state.train_model.parameters())
    norms = _gradient_norms(state)
    reading = StepReading(
        sums[:-1] / total,
        tuple(local),
        asked=sums[-1],
        local=local["loss"],
        norm=norms.whole,
        first_norm=norms.first,
        scale=state.scaler.scale(torch.ones_like(norms.whole)),
        gradients=norms.by_parameter,
    )
    done = UnreadStep(reading, state.epoch, state.step + 1, batch.global_count, rate)
    if state.reads_late:
        stopping = settle(state, sink)  # the step before; its error leaves the weights as they are
        _skip_if_not_finite(state, means["loss"], norms.whole)
    else:
        stopping = done.check(state)
    if config.train.clip_norm is not None:
        clip_grads_with_norm_(state.train_model.parameters(), config.train.clip_norm, norms.whole)
    done.sizes = _sizes_if_looked_for(state)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    average_statistics(state.network, group)
    if state.ema is not None:
        state.ema.update_parameters(state.network)
    state.step_in_epoch += 1
    meter.count(batch.global_count)
    if due(config.tracking.every_steps, state.step) or monitor is not None:
        done.logged = {"lr": rate, "images_per_second": meter.rate()}
        if config.shortcut.enabled:
            done.logged["balance_coefficient"] = balance
        done.monitor = monitor
    if state.reads_late:
        state.unread = done
        # A single process knows already; of several, each learns it from the numbers.
        return asked if group.size == 1 else stopping
    done.finish(state, sink)
    return stopping


@dataclass
class UnreadStep:
    """A step whose numbers are on their way to the host, and what is left to do with them."""

    reading: StepReading
    epoch: int
    step: int
    """Steps of the training with this one."""
    samples: int
    """Of all ranks."""
    rate: float
    """Learning rate of the weights."""
    sizes: tuple[StepSizes, DeviceNumbers] | None = None
    """What tells whether the step, clipped where that is set, is large, where that is looked for."""
    logged: dict[str, float] | None = None
    """Metrics that the host knows, where metrics are due."""
    monitor: SpikeMonitor | None = None
    numbers: StepNumbers | None = None

    def check(self, state: TrainingState) -> bool:
        """Reads the numbers; whether to stop, the same on all ranks. Raises NonFiniteError on all ranks."""
        self.numbers = self.reading.read()
        bad = None
        if not state.reads_late and not math.isfinite(self.numbers.norm):  # its gradients are still there
            named = state.train_model.named_parameters()
            bad = [name for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
        self.numbers.refuse_non_finite(self._where, state.group, bad, state.scaler.is_enabled())
        return self.numbers.stop

    def finish(self, state: TrainingState, sink: EventSink) -> None:
        """Adds the means to those of the epoch, and tells the metrics if they are due."""
        numbers = self.numbers
        assert numbers is not None, "numbers are checked before"
        self._note_if_large(state, sink)
        for name, mean in numbers.means.items():
            state.sums[name] = state.sums.get(name, 0.0) + mean * self.samples
        if self.logged is None:
            return
        metrics = {f"train/{name}": mean for name, mean in numbers.means.items()}
        metrics |= {"gradient/norm": numbers.norm, "gradient/first_layer_norm": numbers.first_norm, **self.logged}
        if self.monitor is not None:
            metrics |= {f"spikes/{name}": value for name, value in self.monitor.summary().items()}
        sink.emit(StepDone(self.epoch, self.step, metrics))

    @property
    def _where(self) -> str:
        return f"step {self.step} (epoch {self.epoch + 1})"

    def _note_if_large(self, state: TrainingState, sink: EventSink) -> None:
        """Warns once, on rank 0, of a layer that this step changes by more than its own weights."""
        if self.sizes is None or state.noted_large_step:
            return
        sizes, numbers = self.sizes
        largest = sizes.largest(self.rate, numbers.read())
        if largest is not None and LARGEST_STEP < largest[1] < math.inf:  # the scaler skips a step that overflows
            state.noted_large_step = True
            remedy = smaller_steps(state.config.optim, state.config.train.clip_norm)
            said = large_step(*largest, self.rate, remedy)
            sink.emit(Note(f"{self._where}: {said}; `spikefleet gradients` shows every layer"))


def settle(state: TrainingState, sink: EventSink) -> bool:
    """Reads what the last step has left to be read, and does what was left to do.

    Called before the weights change again, and before they are evaluated or saved.

    Returns:
        Whether to stop, the same on all ranks; false if nothing was left.

    Raises:
        NonFiniteError: the loss or a gradient of that step is not finite, so that it was not applied; on all ranks.
    """
    done, state.unread = state.unread, None
    if done is None:
        return False
    stopping = done.check(state)
    done.finish(state, sink)
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
        augmentation = None if batch.augmentation is None else batch.augmentation.part(start, stop)
        yield Batch(images, batch.targets[start:stop], indices, batch.global_count, None, batch.scaling, augmentation)
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


def _global_sums(local: Mapping[str, torch.Tensor], group: ProcessGroup, asked: bool) -> torch.Tensor:
    """Sums over all ranks, fp64; the last: of ranks that were asked to stop, which costs no further collective."""
    values = [value.double() for value in local.values()]
    return group.all_reduce(torch.stack([*values, torch.full_like(values[0], float(asked))]))


class _Norms(NamedTuple):
    """L2 norms of the averaged gradient before clipping, on the device."""

    whole: torch.Tensor
    first: torch.Tensor
    """Of the first layer's weight."""
    by_parameter: Mapping[str, torch.Tensor]
    """Empty where gradients are still there when numbers are read."""


def _gradient_norms(state: TrainingState) -> _Norms:
    first = next(p for p in state.network.parameters() if p.ndim > 1)
    gradients = {name: p.grad for name, p in state.train_model.named_parameters() if p.grad is not None}
    whole = get_total_norm(gradients.values())
    first_norm = torch.zeros_like(whole) if first.grad is None else first.grad.norm()
    return _Norms(whole, first_norm, {name: g.norm() for name, g in gradients.items()} if state.reads_late else {})


def _sizes_if_looked_for(state: TrainingState) -> tuple[StepSizes, DeviceNumbers] | None:
    """In the first step and where metrics are logged: it reads all weights and clipped gradients once."""
    looks = state.step == 0 or due(state.config.tracking.every_steps, state.step + 1)
    if not looks or not state.group.is_main or state.noted_large_step:
        return None
    sizes = step_sizes(state.network, adaptive=state.config.optim.kind == "adamw")
    return sizes, DeviceNumbers(sizes.numbers)


def _spoil_if_not_finite(state: TrainingState, loss: torch.Tensor) -> None:
    """Makes one gradient NaN where the loss is not finite, for a scaler, which looks at gradients alone."""
    if state.scaler.is_enabled():
        given = (p.grad for p in state.train_model.parameters() if p.grad is not None)
        smallest = min(given, key=torch.Tensor.numel)
        smallest.add_((loss * 0).to(smallest.dtype))


def _skip_if_not_finite(state: TrainingState, loss: torch.Tensor, norm: torch.Tensor) -> None:
    """Tells a fused optimizer on the device whether to leave the weights alone; a scaler does so itself."""
    if not state.scaler.is_enabled():
        finite = loss.isfinite() & norm.isfinite()
        state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]


def due(every: int | None, count: int) -> bool:
    """Whether something that happens at every multiple of `every` happens at `count`; never if `every` is None."""
    return every is not None and count % every == 0
