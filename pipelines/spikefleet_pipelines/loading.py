"""Batches: the rows of a plan, loaded and transformed in this process or in loader processes.

A batch is a pure function of (split, config, seed, epoch, step): the number of loader processes changes no bit of it.
"""

import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.sampling import Plan
from spikefleet_pipelines.shared_batches import (
    Allocate,
    CudaPageLock,
    InSlot,
    SharedBatches,
    SlotWriter,
    allocating,
    page_locked,
)
from spikefleet_pipelines.stream_plan import StreamStep
from spikefleet_pipelines.transforms.batch_transform import (
    AugmentsOnDevice,
    BatchTransform,
    BinsOnDevice,
    DrawsRows,
    KnowsStepTime,
    SendsPixels,
    Targets,
)
from spikefleet_pipelines.transforms.batch_transform_config import BatchTransformConfig
from spikefleet_pipelines.transforms.kinds import transform_kinds
from spikefleet_pipelines.transforms.normalise import PixelScaling
from spikefleet_pipelines.transforms.pixel_augmentation import PixelAugmentation

if TYPE_CHECKING:  # `in_memory.py` makes batches without a store
    from spikefleet_pipelines.store.reader import Samples


class Batch(NamedTuple):
    """The samples of one rank in one step."""

    images: Tensor
    """float32 [B, C, H, W], or of events frames [B, T, C, H, W]; normalised, or with `scaling`, uint8 pixels."""
    targets: Targets
    """Targets of the transform kind: classes, int64 [B], or of mixed samples their probabilities, float32 [B, K]; for
    detection one `Target` per image."""
    indices: Tensor
    """Positions in the split, int64 [B]."""
    global_count: int
    """Samples of all ranks in this step; of windows of a stream, those with a label."""
    stream: StreamStep | None = None
    """What the plan says of the windows, where they are those of streams."""
    scaling: PixelScaling | None = None
    """Normalises the images, where they are pixels; `to` applies it."""
    augmentation: PixelAugmentation | None = None
    """Augments the images, where they are pixels as they are stored; `to` applies it."""

    @property
    def network_input(self) -> Tensor:
        """What a network takes: images [B, C, H, W], or frames [T, B, C, H, W], a view with time first."""
        return self.images if self.images.ndim == 4 else self.images.transpose(0, 1)

    def to(self, device: torch.device | str, channels_last: bool = False) -> "Batch":
        """Copy images and targets to a device; copies from page-locked memory are non-blocking.

        Pixels are augmented and normalised there. On another stream than the current one: keep this batch until the
        current stream waits for the copy, for its memory is written again afterwards.

        Args:
            device: to copy to.
            channels_last: convert the images to the NHWC memory layout; frames so that T and B of `network_input`
                become one dimension of images in that layout without another copy.
        """
        layout = torch.channels_last if channels_last and self.images.ndim == 4 else torch.contiguous_format
        images, augmentation = self.images, self.augmentation
        if augmentation is not None:
            augmentation = augmentation.to(device)
            images = augmentation.moved(images.to(device, non_blocking=True))
        images = images.to(device, non_blocking=True, memory_format=layout)
        if channels_last and images.ndim == 5:
            together = images.transpose(0, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
            images = together.unflatten(0, (images.shape[1], images.shape[0])).transpose(0, 1)
        if self.scaling is not None:
            images = self.scaling(images)
        if augmentation is not None:
            images = augmentation.erased(images)
        if isinstance(self.targets, Tensor):
            targets: Targets = self.targets.to(device, non_blocking=True)
        else:
            targets = tuple(target.to(device, non_blocking=True) for target in self.targets)
        return self._replace(images=images, targets=targets, scaling=None, augmentation=None)


class _Request(NamedTuple):
    epoch: int
    indices: NDArray[np.int64]
    global_count: int
    slot: int | None
    """Where a loader process writes the batch."""


class _Loaded(NamedTuple):
    """A batch on its way from a loader process."""

    images: Tensor | InSlot
    packed: Any
    request: _Request


_PREFETCHED = 2
"""Batches that each loader process is asked for in advance."""
_IN_USE = 32
"""Batches that are used at once, such as that of a step and the one on its way to a GPU, before slots run out."""
_BY_VALUE = 1 << 14
"""Bytes of a tensor that cost less in the message of a batch than in /dev/shm, with a descriptor of its own."""
_SHARED_MEMORY = "/dev/shm"
_COPIED = (
    "batches of loader processes are copied, for they are not written where they are read: processes must be forked, a "
    "transform must allocate its batch by empty_batch, and a batch must not be used after many others"
)
_FAREWELL_S = 3.0
"""Seconds for which a loader process survives SIGTERM."""

_Item = _Loaded | ValueError


class _Batches(Dataset[_Item]):
    """A data set whose items are whole batches; a request contains everything, so loader processes have no state.

    Args:
        transform: makes the batches.
        allocate: in this process; None allocates as torch does.
        slots: for batches of loader processes, which have them by being forked from this one.
    """

    def __init__(
        self, transform: BatchTransform[Any, Targets], allocate: Allocate | None, slots: SharedBatches | None
    ) -> None:
        self._transform, self._allocate, self._slots = transform, allocate, slots

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slots": None}  # a process that is not forked has another memory

    def __getitem__(self, request: _Request) -> _Item:
        writer: SlotWriter | None = None
        if self._slots is not None and request.slot is not None:
            writer = self._slots.writer(request.slot)
        try:
            with allocating(writer or self._allocate):
                images, packed = self._transform(request.indices, request.epoch)
        except ValueError as error:
            return error  # raised again by the reader: a loader process would wrap the message in its traceback
        place = None if writer is None else writer.place_of(images)
        if get_worker_info() is not None:
            _share((() if place is not None else (images,), packed))
        return _Loaded(images if place is None else place, packed, request)


class _Requests(Sampler[_Request]):
    """The requests of the next epoch; set before each epoch."""

    def __init__(self, slots: SharedBatches | None) -> None:
        self._pending: Iterator[_Request] = iter(())
        self._slots = slots

    def start(self, plan: Plan, epoch: int, start_step: int) -> None:
        self._pending = self._of(plan, epoch, start_step)

    def _of(self, plan: Plan, epoch: int, start_step: int) -> Iterator[_Request]:
        """Asked for as loader processes become free; first when they have ended what an earlier epoch had asked for."""
        if self._slots is not None:
            self._slots.forget_asked()
        for batch in plan.batches(epoch, start_step):
            slot = None if self._slots is None else self._slots.claim()
            yield _Request(epoch, batch.indices, batch.global_count, slot)

    def __iter__(self) -> Iterator[_Request]:
        return self._pending


class BatchLoader:
    """Loads batches of one split.

    Args:
        split: to read.
        transform: config of the transform.
        train: apply the random transforms of training, else those of evaluation.
        seed: of the random transforms.
        processes: number of loader processes, kept between epochs; 0 loads in this process, which decodes encoded
            images in as many threads as torch has.
        pin_memory: put batches in page-locked memory, for non-blocking copies to a GPU; not without one.
        epochs: length of the run, so that mosaics can stop before its end; None if unknown.
        device: where events are counted with `bin_on=device`.
        pixels: leave the normalisation to `Batch.to`, where the transform allows it: a quarter of the bytes are copied;
            with `augment_on=device` the augmentation too.

    Raises:
        ValueError: the transform does not fit the images of the split, or its kind does not fit the task of the store.
    """

    def __init__(
        self,
        split: "Samples",
        transform: BatchTransformConfig,
        train: bool,
        seed: int = 0,
        processes: int = 0,
        pin_memory: bool = False,
        epochs: int | None = None,
        device: torch.device | str = "cpu",
        pixels: bool = False,
    ) -> None:
        if processes < 0:
            raise ValueError(f"processes is {processes}, expected at least 0")
        self.split = split
        self.config, self.processes = transform, processes
        _check_store(split, transform)
        self._transform: BatchTransform[Any, Targets] = transform.build(split, train, seed, epochs)
        self.device = device
        self._scaling: PixelScaling | None = None
        if pixels and isinstance(self._transform, SendsPixels):
            self._scaling = self._transform.send_pixels()
        self._pin = pin_memory and torch.cuda.is_available()
        self._slots: SharedBatches | None = None
        if processes:
            with suppress(OSError):  # no such addresses: batches are copied, which is counted
                pages = CudaPageLock(device) if self._pin else None
                self._slots = SharedBatches(_PREFETCHED * processes + _IN_USE, pages)
        self.copied_bytes = 0
        """Of images that loader processes could not write where they are read, or that were not page-locked there."""
        self._requests = _Requests(self._slots)
        self._loader = DataLoader(
            _Batches(self._transform, page_locked if self._pin else None, self._slots),
            batch_size=None,
            sampler=self._requests,
            num_workers=processes,
            persistent_workers=processes > 0,
            worker_init_fn=_begin_loading if processes else None,
            prefetch_factor=_PREFETCHED if processes else None,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # else each epoch draws a seed that nothing uses from torch's global generator
        )

    def epoch(self, plan: Plan, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from `start_step` on.

        Args:
            plan: the steps of this rank.
            epoch: number of the epoch, from 0.
            start_step: first step to load, for resuming within an epoch.

        Raises:
            ValueError: the plan was made for another number of samples.
            StoreError: an image cannot be decoded (the message names its row), or loader processes lack shared memory.
            RuntimeError: a loader process exited.
        """
        if plan.samples != len(self.split):
            raise ValueError(
                f"the plan is for {plan.samples} samples, but split {self.split.name!r} has {len(self.split)}; "
                "create the plan with samples=len(split)"
            )
        self._requests.start(plan, epoch, start_step)
        return self._read(iter(self._loader))

    def _read(self, loaded: Iterator[_Item]) -> Iterator[Batch]:
        for item in _checked(loaded):
            images = self._images(item)
            if isinstance(self._transform, BinsOnDevice):
                images = self._transform.on_device(images, item.packed, self.device)
            targets = self._transform.unpack(item.packed)
            if self._pin and isinstance(targets, Tensor):
                targets = targets.pin_memory()
            augmentation = None
            if isinstance(self._transform, AugmentsOnDevice):
                augmentation = self._transform.device_augmentation(item.packed)
            if self._pin and augmentation is not None:
                augmentation = augmentation.pin_memory()
            indices, global_count = item.request.indices, item.request.global_count
            batch = Batch(images, targets, torch.from_numpy(indices), global_count, None, self._scaling, augmentation)
            del item, images, targets  # no name here keeps the memory of a batch that its reader has left
            yield batch
            del batch
        if self._slots is not None:
            self._slots.release_memory()

    def _images(self, item: _Loaded) -> Tensor:
        """The images of a batch where they were written; copied, and counted, where that was not possible."""
        slot, copied = item.request.slot, False
        if isinstance(item.images, InSlot):
            assert self._slots is not None
            assert slot is not None
            images = self._slots.lend(slot, item.images)
        else:
            images, copied = item.images, self.processes > 0
            if self._slots is not None and slot is not None:
                self._slots.give_back(slot)
        if self._pin and not images.is_pinned():
            images, copied = images.pin_memory(), True
        if copied and images.nbytes:
            if not self.copied_bytes:
                warnings.warn(_COPIED, RuntimeWarning, stacklevel=4)
            self.copied_bytes += images.nbytes
        return images

    @property
    def step_ms(self) -> float | None:
        """Length of a time slice in milliseconds; None for images, and where samples differ in it."""
        return self._transform.step_ms() if isinstance(self._transform, KnowsStepTime) else None

    def pictures(self, rows: Sequence[int]) -> list[Tensor]:
        """Draw samples for reports, uint8 [C, H, W] each: stored images, or events as the transform sees them."""
        if isinstance(self._transform, DrawsRows):
            return self._transform.pictures(rows)
        return [self.split.image(row) for row in rows]


def _check_store(split: "Samples", transform: BatchTransformConfig) -> None:
    task, events = split.manifest.task, split.manifest.events is not None
    if (task, events) != (transform.store_task, transform.reads_events):
        what, kinds = ("of events for" if events else "for"), transform_kinds(task, events)
        raise ValueError(
            f"{split.location} is a store {what} {task}, but transform.kind is {transform.kind!r}; set "
            f"transform.kind to {' or '.join(map(repr, kinds))}"
        )


def _checked(loaded: Iterator[_Item]) -> Iterator[_Loaded]:
    """Batches as they arrive; errors as what the caller is told."""
    while True:
        try:
            item = next(loaded)
        except StopIteration:
            return
        except RuntimeError as error:
            if (shortage := _shortage_of_shared_memory(error)) is not None:
                raise StoreError(shortage) from None
            raise
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            # The shared memory of a killed process is gone; torch detects other exits itself, with a RuntimeError.
            raise RuntimeError(
                "a loader process exited unexpectedly; if it ran out of memory, set fewer loader_processes or a "
                "smaller batch size"
            ) from error
        if isinstance(item, ValueError):
            raise item
        yield item


def _begin_loading(worker: int) -> None:
    """Prepare a loader process."""
    _outlive_signals()
    ForkingPickler.register(Tensor, _reduced)


def _share(parts: Any) -> None:
    """Move large tensors to shared memory here: where they are sent, a thread would fail unseen if there is none."""
    if isinstance(parts, tuple):
        for part in parts:
            _share(part)
    elif isinstance(parts, Tensor) and parts.nbytes > _BY_VALUE:
        parts.share_memory_()


def _reduced(tensor: Tensor) -> tuple[Any, ...]:
    """How a tensor is sent by a loader process: a small one in the message, another in shared memory."""
    if tensor.layout == torch.strided and tensor.nbytes <= _BY_VALUE and not tensor.requires_grad:
        with suppress(TypeError):  # numpy has no such type
            return torch.from_numpy, (tensor.numpy(),)
    reduced: tuple[Any, ...] = reduce_tensor(tensor)
    return reduced


def _outlive_signals() -> None:
    """A terminal and Slurm signal all processes: loading continues until the one that trains has ended its step."""

    def leave_soon(signum: int, frame: FrameType | None) -> None:
        timer = threading.Timer(_FAREWELL_S, os._exit, (0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave_soon)


def _shortage_of_shared_memory(error: RuntimeError) -> str | None:
    """A sentence for an error of a loader process that had no shared memory for a batch; None for another error."""
    text = str(error)
    if not any(sign in text for sign in ("shared memory", "</torch_", "Bus error")):
        return None
    size = ""
    with suppress(OSError):
        usage = shutil.disk_usage(_SHARED_MEMORY)
        size = f" ({usage.total / 1e6:.4g} MB, {usage.free / 1e6:.4g} MB free)"
    return (
        f"loader processes need more shared memory than there is in {_SHARED_MEMORY}{size}; set "
        "data.loader_processes=0, lower train.global_batch, or enlarge it (docker run --shm-size=1g)"
    )


def _unchanged(batch: Any) -> Any:
    return batch
