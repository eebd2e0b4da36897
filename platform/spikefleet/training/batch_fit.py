"""The largest batch that fits into memory: measured at growing sizes far below it, and a line through the peaks.

Memory grows by the same amount for each sample of a step (activations, their gradients, the images), beside what does
not depend on the batch (weights, gradients, optimizer, libraries). No size is tried whose predicted peak is above half
of the memory that is free, so that the machine is never filled.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from spikefleet.config.recipes import override_config
from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.malloc import keep_freed_memory
from spikefleet.training.splits import prepare_parts
from spikefleet.training.state import TrainingState
from spikefleet.training.step import Meter, training_step
from spikefleet_pipelines.store.reader import Store

SAFE_SHARE = {"cuda": 0.9, "cpu": 0.8}
"""Of the free memory that the answer may use, by device; the rest is for evaluation, loading and fragments."""

_TRIED_SHARE = 0.5
_STEPS = 3
_LONGEST_S = 60.0
_FIRST = 2


class Memory(Protocol):
    """The memory of a device as this process uses it, in bytes."""

    def restart(self) -> None:
        """Forgets the peak so far, where the system can."""

    def peak(self) -> int:
        """The most that was used at one moment since then."""

    def free(self) -> int:
        """What this process may still take."""


class GpuMemory:
    """Memory of a CUDA device, as torch's allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def restart(self) -> None:
        """Forgets the peak so far."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """The most that was reserved at one moment since then."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)

    def free(self) -> int:
        """What the device has left, with what the allocator keeps."""
        return torch.cuda.mem_get_info(self._device)[0] + torch.cuda.memory_reserved(self._device)


class HostMemory:
    """Main memory, as Linux counts it for this process."""

    _STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    _CGROUP = Path("/sys/fs/cgroup")

    def __init__(self) -> None:
        if not self._STATUS.is_file():
            raise UserError("main memory is measured by Linux's /proc, which is not there; measure with --gpu")

    def restart(self) -> None:
        """Sets the peak to the present use; where that is forbidden, the peak so far stays."""
        gc.collect()
        with suppress(OSError):
            self._CLEAR.write_text("5")

    def peak(self) -> int:
        """The largest resident size since then."""
        return _kilobytes(self._STATUS, "VmHWM") * 1024

    def free(self) -> int:
        """What the machine has available, or the control group of this process, where that is less."""
        free = _kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024
        with suppress(OSError, ValueError):  # "max", or no such group
            limit, used = (int((self._CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
            free = min(free, limit - used)
        return free


def _kilobytes(file: Path, key: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


@dataclass(frozen=True)
class Measured:
    """Steps of one size."""

    batch: int
    """Samples of a micro-batch."""
    peak_bytes: int
    """Above what the process had before."""
    images_per_second: float


@dataclass(frozen=True)
class BatchFit:
    """The largest batch, and what it follows from."""

    measured: tuple[Measured, ...]
    free_bytes: int
    """For each worker."""
    safe_share: float
    """Of the free bytes that the answer uses."""
    bytes_per_sample: float
    fixed_bytes: float
    micro_batch: int
    """The largest one of a worker."""
    global_batch: int
    """Over all workers and micro-batches, at most the samples of the training split."""
    learning_rate: float
    """For the global batch, from that of the configuration."""
    all_samples: bool
    """Whether the training split has no more samples, so that memory is not what limits."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def fit_line(sizes: list[int], peaks: list[int]) -> tuple[float, float]:
    """The line of least squares through peaks of memory.

    Args:
        sizes: of the batches, at least two.
        peaks: in bytes.

    Returns:
        Bytes per sample, and bytes of no sample, both at least 0.
    """
    slope, intercept = np.polyfit(np.array(sizes, np.float64), np.array(peaks, np.float64), 1)
    if intercept < 0:
        x, y = np.array(sizes, np.float64), np.array(peaks, np.float64)
        slope, intercept = float((x * y).sum() / (x * x).sum()), 0.0
    return max(float(slope), 0.0), float(intercept)


def growing_sizes(samples: int) -> Iterator[int]:
    """Sizes to try, each twice the one before, up to the samples that there are."""
    size = _FIRST
    while size <= samples:
        yield size
        size *= 2


def measure_batches(config: Config, store: Store, memory: Memory, group: ProcessGroup) -> list[Measured]:
    """Trains a few steps at growing sizes, in this process.

    Args:
        config: of the run.
        store: its data.
        memory: of the device.
        group: of this process alone.

    Raises:
        UserError: the configuration does not fit the data, or not even two sizes can be measured.
    """
    free, found = memory.free() // _sharing(config, group), list[Measured]()
    memory.restart()
    before = memory.peak()
    for size in growing_sizes(len(store.samples("train"))):
        if len(found) > 1:
            slope, fixed = fit_line([one.batch for one in found], [one.peak_bytes for one in found])
            if fixed + slope * size > _TRIED_SHARE * free or _STEPS * size / found[-1].images_per_second > _LONGEST_S:
                break
        try:
            found.append(_measured(config, store, memory, group, size, before))
        except torch.OutOfMemoryError:
            break
    if len(found) < 2 and len(store.samples("train")) < 2 * _FIRST:
        raise UserError(
            f"the training split has {len(store.samples('train'))} samples, too few to compare batches of {_FIRST} and "
            f"{2 * _FIRST}; give more data"
        )
    if len(found) < 2:
        raise UserError(
            f"a training of {config.recipe} at batches of {_FIRST} and {2 * _FIRST} samples already fills the memory; "
            "set a smaller model.width, model.timesteps or image size"
        )
    return found


def largest_batch(config: Config, samples: int, measured: list[Measured], free: int, device: str) -> BatchFit:
    """The largest batch by a line through what was measured.

    Args:
        config: of the run.
        samples: of the training split.
        measured: at two sizes or more.
        free: bytes for all workers of this machine or, on GPUs, for each.
        device: "cpu" or "cuda".

    Raises:
        UserError: not one sample fits.
    """
    workers, parts = config.cluster.most_workers, config.cluster.most_workers * config.train.accumulate
    mine, safe = free // (workers if device == "cpu" else 1), SAFE_SHARE[device]
    slope, fixed = fit_line([one.batch for one in measured], [one.peak_bytes for one in measured])
    most = max(1, samples // parts)
    fits = slope * most + fixed <= mine * safe
    micro = most if fits else int((mine * safe - fixed) / slope) if slope > 0 else 0
    if micro < 1:
        raise UserError(f"no batch of {config.recipe} fits into {mine:,} bytes; set a smaller network or image")
    micro = min(micro, most)
    whole = micro * parts
    rate = rate_for(config, whole)
    return BatchFit(tuple(measured), mine, safe, slope, fixed, micro, whole, rate, micro == most)


def rate_for(config: Config, global_batch: int) -> float:
    """The learning rate for another batch.

    With SGD it is proportional to the batch: Goyal et al., "Accurate, large minibatch SGD", 2017; with AdamW to its
    root: Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms", NeurIPS 2022. A loss that is
    a sum over the batch has the batch in it already.
    """
    if config.train.loss == "sum":
        return config.optim.lr
    factor = global_batch / config.train.global_batch
    return config.optim.lr * (factor if config.optim.kind == "sgd" else math.sqrt(factor))


def _sharing(config: Config, group: ProcessGroup) -> int:
    """Workers that share the memory: on CPUs those of one machine."""
    return config.cluster.most_workers if group.device.type == "cpu" else 1


def _measured(config: Config, store: Store, memory: Memory, group: ProcessGroup, size: int, before: int) -> Measured:
    overrides = {
        "train.global_batch": size,
        "train.accumulate": 1,
        "train.cuda_graphs": False,
        "train.compile": False,
        "cluster.workers": 0,
    }
    here = override_config(config, overrides, origin=f"batches of {size}")
    if group.device.type == "cpu":
        keep_freed_memory()
    task, splits, plan = prepare_parts(here, store, group)
    state = TrainingState(here, group, store.manifest.content_hash, plan.steps_per_epoch)
    memory.restart()
    timed_from, images, first = 0.0, 0, 0.0
    started = time.perf_counter()
    for step, batch in enumerate(splits.train.epoch(plan, 0)):
        if step == 1:  # the first one allocates
            timed_from = time.perf_counter()
        training_step(state, task, batch, Meter(), NullSink())
        images += len(batch.indices) if step else 0
        if step == 0:
            first = len(batch.indices) / (time.perf_counter() - started)
        if step == _STEPS - 1:
            break
    peak = memory.peak()
    rate = images / (time.perf_counter() - timed_from) if images else first
    del state, task, splits, plan
    return Measured(size, max(0, peak - before), rate)
