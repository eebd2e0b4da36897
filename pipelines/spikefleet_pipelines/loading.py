"""Batches: the rows that a plan asks for, loaded and transformed, in this process or in loader processes.

A batch is a function of (split, config, seed, epoch, step): the number of loader processes changes no bit of it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from spikefleet_pipelines.batch_transform import BatchTransform
from spikefleet_pipelines.sampling import Plan
from spikefleet_pipelines.store import Split
from spikefleet_pipelines.transforms import TransformConfig


class Batch(NamedTuple):
    """What one rank trains on in one step."""

    images: Tensor
    """float32 [B, C, H, W], normalised."""
    targets: Tensor
    """Classes, int64 [B]."""
    indices: Tensor
    """Positions in the split, int64 [B]."""
    global_count: int
    """Samples of all ranks in this step."""


class _Request(NamedTuple):
    epoch: int
    indices: NDArray[np.int64]
    global_count: int


class _Batches(Dataset[Batch | ValueError]):
    """A data set whose items are whole batches; a loader process is sent what to load, so it needs no state."""

    def __init__(self, transform: BatchTransform) -> None:
        self._transform = transform

    def __getitem__(self, request: _Request) -> Batch | ValueError:
        try:
            images = self._transform(request.indices, request.epoch)
        except ValueError as error:
            return error  # raised again by the reader: a loader process would wrap the sentence in its traceback
        targets = torch.from_numpy(self._transform.split.labels[request.indices])
        return Batch(images, targets, torch.from_numpy(request.indices), request.global_count)


class _Requests(Sampler[_Request]):
    """What the loader processes are to load next; set before each epoch."""

    def __init__(self) -> None:
        self._pending: Iterator[_Request] = iter(())

    def start(self, plan: Plan, epoch: int, start_step: int) -> None:
        self._pending = (
            _Request(epoch, batch.indices, batch.global_count) for batch in plan.batches(epoch, start_step)
        )

    def __iter__(self) -> Iterator[_Request]:
        return self._pending


class BatchLoader:
    """Loads batches of one split.

    Args:
        train: apply the random transforms of training, else those of evaluation.
        seed: of the random transforms.
        processes: loader processes, kept between epochs; 0 loads in this process. Encoded images are then decoded by as
            many threads as torch has.
        pin_memory: put batches in page-locked memory, for copies to a GPU that do not block.

    Raises:
        ValueError: the transform does not suit the images of the split.
    """

    def __init__(
        self,
        split: Split,
        transform: TransformConfig,
        train: bool,
        seed: int = 0,
        processes: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if processes < 0:
            raise ValueError(f"processes is {processes}; it must be at least 0.")
        self.split = split
        self._requests = _Requests()
        self._loader = DataLoader(
            _Batches(BatchTransform(split, transform, train, seed)),
            batch_size=None,
            sampler=self._requests,
            num_workers=processes,
            persistent_workers=processes > 0,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else each epoch draws a seed that nothing uses from torch's global generator
        )

    def epoch(self, plan: Plan, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on.

        Raises:
            ValueError: the plan was made for another number of samples.
            StoreError: an image cannot be decoded; names its row.
            RuntimeError: a loader process died.
        """
        if plan.samples != len(self.split):
            raise ValueError(
                f"the plan is for {plan.samples} samples and split {self.split.name!r} has {len(self.split)}; "
                "make the plan with len(split)."
            )
        self._requests.start(plan, epoch, start_step)
        return _read(iter(self._loader))


def _read(loaded: Iterator[Batch | ValueError]) -> Iterator[Batch]:
    while True:
        try:
            item = next(loaded)
        except StopIteration:
            return
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            # The shared memory of a dead process is gone; torch notices other deaths itself, with a RuntimeError.
            raise RuntimeError(
                "A loader process died; if it ran out of memory, use fewer loader processes or smaller batches."
            ) from error
        if isinstance(item, ValueError):
            raise item
        yield item


def _unchanged(batch: Any) -> Any:
    return batch
