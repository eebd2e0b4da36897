"""Batches: the rows that a plan asks for, loaded and transformed, in this process or in loader processes.

A batch is a function of (split, config, seed, epoch, step): the number of loader processes changes no bit of it.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from spikefleet_pipelines.sampling import Plan
from spikefleet_pipelines.transforms.batch_transform import BatchTransform, Targets
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_pipelines.transforms.kinds import transform_kinds

if TYPE_CHECKING:  # batches are also made where no store is, by `in_memory.py`
    from spikefleet_pipelines.store.reader import Split


class Batch(NamedTuple):
    """What one rank trains on in one step."""

    images: Tensor
    """float32 [B, C, H, W], normalised."""
    targets: Targets
    """What the kind of transform makes: classes, int64 [B]; for detection a `Target` for each image."""
    indices: Tensor
    """Positions in the split, int64 [B]."""
    global_count: int
    """Samples of all ranks in this step."""

    def to(self, device: torch.device | str, channels_last: bool = False) -> "Batch":
        """The batch with images and targets on a device; copies from page-locked memory do not block.

        Args:
            channels_last: lay the images out as NHWC.
        """
        layout = torch.channels_last if channels_last else torch.contiguous_format
        images = self.images.to(device, non_blocking=True, memory_format=layout)
        if isinstance(self.targets, Tensor):
            return self._replace(images=images, targets=self.targets.to(device, non_blocking=True))
        targets = tuple(target.to(device, non_blocking=True) for target in self.targets)
        return self._replace(images=images, targets=targets)


class _Request(NamedTuple):
    epoch: int
    indices: NDArray[np.int64]
    global_count: int


class _Loaded(NamedTuple):
    """A batch on its way from a loader process."""

    images: Tensor
    packed: Any
    indices: Tensor
    global_count: int


_Item = _Loaded | ValueError


class _Batches(Dataset[_Item]):
    """A data set whose items are whole batches; a loader process is sent what to load, so it needs no state."""

    def __init__(self, transform: BatchTransform[Any, Targets]) -> None:
        self._transform = transform

    def __getitem__(self, request: _Request) -> _Item:
        try:
            images, packed = self._transform(request.indices, request.epoch)
        except ValueError as error:
            return error  # raised again by the reader: a loader process would wrap the sentence in its traceback
        return _Loaded(images, packed, torch.from_numpy(request.indices), request.global_count)


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
        epochs: how many the run has, so that mosaics can end before it does; None where that is unknown.

    Raises:
        ValueError: the transform does not suit the images of the split, or is for another task than its store.
    """

    def __init__(
        self,
        split: "Split",
        transform: BatchTransformConfig,
        train: bool,
        seed: int = 0,
        processes: int = 0,
        pin_memory: bool = False,
        epochs: int | None = None,
    ) -> None:
        if processes < 0:
            raise ValueError(f"processes is {processes}; it must be at least 0")
        self.split = split
        _check_store(split, transform)
        self._transform: BatchTransform[Any, Targets] = transform.build(split, train, seed, epochs)
        self._requests = _Requests()
        self._loader = DataLoader(
            _Batches(self._transform),
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
                "make the plan with len(split)"
            )
        self._requests.start(plan, epoch, start_step)
        return _read(iter(self._loader), self._transform)


def _check_store(split: "Split", transform: BatchTransformConfig) -> None:
    if split.is_detection != (transform.store_task == "detection"):
        task = split.manifest.task
        raise ValueError(
            f"{split.location} is a store for {task}, and transform.kind is {transform.kind!r}; it must "
            f"be {' or '.join(map(repr, transform_kinds(task)))}"
        )


def _read(loaded: Iterator[_Item], transform: BatchTransform[Any, Targets]) -> Iterator[Batch]:
    while True:
        try:
            item = next(loaded)
        except StopIteration:
            return
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            # The shared memory of a dead process is gone; torch notices other deaths itself, with a RuntimeError.
            raise RuntimeError(
                "A loader process died; if it ran out of memory, use fewer loader processes or smaller batches"
            ) from error
        if isinstance(item, ValueError):
            raise item
        yield Batch(item.images, transform.unpack(item.packed), item.indices, item.global_count)


def _unchanged(batch: Any) -> Any:
    return batch
