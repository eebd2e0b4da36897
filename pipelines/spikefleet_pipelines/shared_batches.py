"""Memory of batches: a loader process writes a batch where the training process reads it, so that it is never copied.

Batches have slots in one anonymous mapping, made before the loader processes are forked. It needs nothing of /dev/shm,
ends with the last process that has it, and takes memory only where something was written. The training process alone
keeps the account: it chooses the slot of a batch when it asks a loader process for it, the lowest free one, so that no
more are touched than are in use at once. A slot is free again when the last tensor over it is gone, views and those in
other threads included; with a GPU, when in addition the work is done that the current stream had been given by then. A
batch without a slot, or that does not fit, is sent as any tensor is between processes: slower, and counted.
"""

import math
import mmap
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLOT_BYTES = 1 << 31
"""Addresses of a slot, not memory."""
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE, which Python has no name for before 3.13: what is never written is not counted as promised memory."""

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]

_allocate: ContextVar[Allocate | None] = ContextVar("allocate", default=None)


def empty_batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate a batch: in a loader process in its slot, for a GPU in page-locked memory.

    Transforms allocate by this what they return, before any other batch.
    """
    allocate = _allocate.get()
    return torch.empty(shape, dtype=dtype) if allocate is None else allocate(shape, dtype)


@contextmanager
def allocating(allocate: Allocate | None) -> Iterator[None]:
    """Allocate batches by a function; None allocates as torch does."""
    token = _allocate.set(allocate)
    try:
        yield
    finally:
        _allocate.reset(token)


def page_locked(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate in page-locked memory, which torch reuses."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class InSlot(NamedTuple):
    """What a loader process sends instead of a batch that is in its slot."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


class Done(Protocol):
    """A point in the work of a GPU; a `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether it is passed."""
        ...

    def synchronize(self) -> None:
        """Wait until it is passed."""
        ...


class PageLock(Protocol):
    """Locks memory for copies by a GPU."""

    def lock(self, address: int, nbytes: int) -> bool:
        """Lock pages; False if that is not possible."""
        ...

    def unlock(self, address: int) -> None:
        """Unlock what was locked at an address."""
        ...

    def reached(self) -> Done:
        """Mark the point up to which the GPU has been given work."""
        ...


class CudaPageLock:
    """`PageLock` of a CUDA device. Copies on another stream than the current one are the caller's to wait for."""

    def __init__(self, device: torch.device | str) -> None:
        found = torch.device(device)
        self._device = found if found.type == "cuda" else torch.device("cuda")

    def lock(self, address: int, nbytes: int) -> bool:
        """See `PageLock`."""
        return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)) == 0

    def unlock(self, address: int) -> None:
        """See `PageLock`."""
        torch.cuda.cudart().cudaHostUnregister(address)

    def reached(self) -> Done:
        """See `PageLock`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event


_FREE, _ASKED, _LENT, _COPIED = range(4)


class SharedBatches:
    """Slots for the batches of one loader.

    Args:
        slots: how many batches can be asked for or in use at once.
        pages: locks the pages of batches, for a GPU.
        slot_bytes: largest size of a batch, a multiple of the page size.

    Raises:
        OSError: so much address space is not to be had.
    """

    def __init__(self, slots: int, pages: PageLock | None = None, slot_bytes: int = SLOT_BYTES) -> None:
        self._map = mmap.mmap(-1, slots * slot_bytes, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        self._slot_bytes = slot_bytes
        self._states = bytearray(slots)
        self._written: dict[int, int] = {}
        """Bytes of each slot that has memory."""
        self._pages = pages
        self._locked: dict[int, int] = {}
        """Bytes of each slot that are page-locked."""
        self._copied: dict[int, Done] = {}
        self._address = self._memory(0, 1).ctypes.data
        if pages is not None:
            ending = weakref.finalize(self, _unlock_all, pages, self._address, slot_bytes, self._locked, self._copied)
            ending.atexit = False

    def claim(self) -> int | None:
        """Choose a slot for a batch that is asked for; None if all are in use."""
        self._free_copied()
        slot = self._states.find(_FREE)
        if slot < 0:
            return None
        self._states[slot] = _ASKED
        return slot

    def give_back(self, slot: int) -> None:
        """Free a slot whose batch came another way."""
        self._states[slot] = _FREE

    def forget_asked(self) -> None:
        """Free the slots of batches that nobody will read; no loader process may be writing any more."""
        for slot, state in enumerate(self._states):
            if state == _ASKED:
                self._states[slot] = _FREE

    def lend(self, slot: int, part: InSlot) -> Tensor:
        """Return the batch that was written into a slot; the slot is free when no tensor over its memory is left."""
        self._written[slot] = max(part.nbytes, self._written.get(slot, 0))
        self._lock(slot, part.nbytes)
        memory = self._memory(slot, part.nbytes)
        self._states[slot] = _LENT
        weakref.finalize(memory, self._returned, slot).atexit = False
        # Of `memory` there is no view but this tensor: numpy's views of views would keep the mapping alone.
        return torch.from_numpy(memory).view(part.dtype).view(part.shape)

    def release_memory(self) -> None:
        """Give the memory of free slots back to the system."""
        self._free_copied()
        for slot in [slot for slot in self._written if self._states[slot] == _FREE]:
            if self._pages is not None and self._locked.pop(slot, None) is not None:
                self._pages.unlock(self._address + slot * self._slot_bytes)
            self._map.madvise(mmap.MADV_REMOVE, slot * self._slot_bytes, _pages_of(self._written.pop(slot)))

    @property
    def in_use(self) -> int:
        """Number of slots that are not free."""
        self._free_copied()
        return len(self._states) - self._states.count(_FREE)

    def writer(self, slot: int) -> "SlotWriter":
        """What a loader process allocates by, to write into a slot."""
        return SlotWriter(self._memory(slot, self._slot_bytes))

    def _memory(self, slot: int, nbytes: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._map, np.uint8, nbytes, slot * self._slot_bytes)

    def _returned(self, slot: int) -> None:
        """Called where the last tensor ends, in any thread."""
        if self._pages is not None and slot in self._locked:
            self._states[slot] = _COPIED
            self._copied[slot] = self._pages.reached()
        else:
            self._states[slot] = _FREE

    def _free_copied(self) -> None:
        for slot in [slot for slot, done in list(self._copied.items()) if done.query()]:
            del self._copied[slot]
            self._states[slot] = _FREE

    def _lock(self, slot: int, nbytes: int) -> None:
        if self._pages is None or nbytes <= self._locked.get(slot, 0):
            return
        address = self._address + slot * self._slot_bytes
        if self._locked.pop(slot, None) is not None:
            self._pages.unlock(address)
        if self._pages.lock(address, _pages_of(nbytes)):
            self._locked[slot] = _pages_of(nbytes)


class SlotWriter:
    """Allocates the first batch that is asked for in a slot, and others elsewhere.

    Args:
        memory: of the slot.
    """

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory
        self._free = True

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate a batch."""
        nbytes = InSlot(shape, dtype).nbytes
        if not self._free or not 0 < nbytes <= len(self._memory):
            return torch.empty(shape, dtype=dtype)
        self._free = False
        return torch.from_numpy(self._memory[:nbytes]).view(dtype).view(shape)

    def place_of(self, images: Tensor) -> InSlot | None:
        """What is sent of a batch that is in the slot; None if it is elsewhere."""
        if self._free or not images.is_contiguous() or images.data_ptr() != self._memory.ctypes.data:
            return None
        return InSlot(tuple(images.shape), images.dtype)


def _pages_of(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _unlock_all(
    pages: PageLock, address: int, slot_bytes: int, locked: dict[int, int], copied: dict[int, Done]
) -> None:
    """No tensor over the memory is left; the last copies out of it may still run."""
    for done in copied.values():
        done.synchronize()
    for slot in locked:
        pages.unlock(address + slot * slot_bytes)
