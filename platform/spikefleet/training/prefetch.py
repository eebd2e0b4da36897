"""Batches on the device one step before they are used, so that copies run beside the kernels of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from spikefleet_pipelines.loading import Batch


class _OnItsWay(NamedTuple):
    source: Batch
    """Kept until the current stream waits for the copy: the loader writes its memory again when it is gone."""
    batch: Batch
    copied: torch.cuda.Event


def ahead(batches: Iterable[Batch], device: torch.device, channels_last: bool) -> Iterator[Batch]:
    """Iterates over batches, on a GPU each copied there while the step before runs; on a CPU over the batches as given.

    The loader is asked for a batch while the step before runs, on a CPU too: each is a pure function of its step.

    Args:
        batches: in page-locked memory for a GPU, so that copies do not wait.
        device: of the training.
        channels_last: memory layout of the images on the device.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    waiting: _OnItsWay | None = None
    for batch in batches:
        if batch.images.is_cuda:  # frames that were counted there, by kernels of the current stream
            stream.wait_stream(torch.cuda.current_stream(device))
            batch.images.record_stream(stream)
        with torch.cuda.stream(stream):
            moved = batch.to(device, channels_last)
            copied = torch.cuda.Event()
            copied.record(stream)
        if waiting is not None:
            yield _arrived(waiting)
        waiting = _OnItsWay(batch, moved, copied)
    if waiting is not None:
        yield _arrived(waiting)


def _arrived(waiting: _OnItsWay) -> Batch:
    """The batch, for kernels of the current stream; its memory is not given to another copy before they have run."""
    current = torch.cuda.current_stream()
    current.wait_event(waiting.copied)
    batch = waiting.batch
    targets = (batch.targets,) if isinstance(batch.targets, torch.Tensor) else batch.targets
    for tensor in (batch.images, *(one for target in targets for one in _tensors(target))):
        if tensor.is_cuda:
            tensor.record_stream(current)
    return batch


def _tensors(target: object) -> Iterator[torch.Tensor]:
    if isinstance(target, torch.Tensor):
        yield target
    elif isinstance(target, tuple):
        yield from (part for part in target if isinstance(part, torch.Tensor))
