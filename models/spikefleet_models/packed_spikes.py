"""Spikes that autograd keeps for the backward pass, as bits: one of each 0 or 1, a byte of each integer up to 255.

    with packed_spikes():
        loss = criterion(network(images), targets)
    loss.backward()

Whoever emits spikes notes their tensor with the largest value that it can hold (`note_spikes`): neurons, spiking units,
and pools, whose output has the values of their input. What autograd saves of a noted tensor, or of a view of it, is
packed, once for all operations that save it, and unpacked to the same numbers in the backward pass: losses and
gradients are equal to the last bit. Everything else is saved as it is. Nothing is read from a device to decide.

A tensor that is modified after it was noted is no longer packed; one that is modified after it was saved as it is, is
refused in the backward pass, as without the hooks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_LARGEST_BYTE = 255
# Eight bytes of 0 or 1 times this: the highest byte of the product has the i-th byte, from the lowest, as its i-th bit.
_GATHER = 0x0102040810204080
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool)


@contextmanager
def packed_spikes(observe: Callable[[Tensor], object] | None = None) -> Iterator[None]:
    """Packs the spikes that autograd saves in forward passes inside the block.

    Args:
        observe: called with each tensor that is kept: bits, bytes, or what was saved itself. For measurements.
    """
    noted = _Noted(observe)
    token = _NOTED.set(noted)
    try:
        with torch.autograd.graph.saved_tensors_hooks(noted.save, _restore):
            yield
    finally:
        _NOTED.reset(token)
        noted.marks.clear()


def note_spikes(spikes: Tensor, bound: int | None) -> None:
    """Notes a tensor of integers 0 to `bound`; without an effect outside of `packed_spikes`.

    Args:
        spikes: of any shape.
        bound: largest value; None where it is not known.
    """
    if torch.compiler.is_compiling():
        return
    noted = _NOTED.get()
    if noted is None or bound is None or bound > _LARGEST_BYTE or spikes.dtype not in _TYPES or not _is_plain(spikes):
        return
    noted.note(spikes, bound)


def noted_bound(spikes: Tensor | None) -> int | None:
    """The largest value of a noted tensor, or of a view of one; None where it is not known."""
    if torch.compiler.is_compiling():
        return None
    noted = _NOTED.get()
    mark = None if noted is None or spikes is None else noted.mark_of(spikes)
    return None if mark is None else mark.bound


@dataclass
class _Mark:
    """What is known of a storage."""

    bound: int
    dtype: torch.dtype
    version: int
    """Of the tensor, when it was noted."""
    packed: "_Packed | None" = None
    """Once it is saved."""


class _Noted:
    """The noted tensors of a forward pass, by their storage; a weak reference keeps its address from being reused."""

    def __init__(self, observe: Callable[[Tensor], object] | None) -> None:
        self.marks: dict[StorageWeakRef, _Mark] = {}
        self._observe = observe

    def note(self, spikes: Tensor, bound: int) -> None:
        """Marks the storage of a tensor that fills it."""
        storage = spikes.untyped_storage()
        before = self.mark_of(spikes)
        if spikes.numel() * spikes.itemsize == storage.nbytes() and (before is None or before.bound != bound):
            self.marks[StorageWeakRef(storage)] = _Mark(bound, spikes.dtype, spikes._version)

    def mark_of(self, tensor: Tensor) -> _Mark | None:
        """The mark of the storage that a tensor views; None where there is none, or it was modified since."""
        if not self.marks or not _is_plain(tensor):
            return None
        mark = self.marks.get(StorageWeakRef(tensor.untyped_storage()))
        known = mark is not None and (mark.dtype, mark.version) == (tensor.dtype, tensor._version)
        return mark if known else None

    def save(self, tensor: Tensor) -> "_Saved":
        """What autograd keeps in the place of a tensor."""
        mark = self.mark_of(tensor)
        if mark is None:
            # Without detach, an output that its own operation saves would hold itself.
            kept = tensor.detach()
            if self._observe is not None:
                self._observe(kept)
            return _AsItIs(kept, tensor._version)
        if mark.packed is None:
            storage_order = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
            mark.packed = _pack(storage_order, mark.bound)
            if self._observe is not None:
                self._observe(mark.packed.data)
        return _View(mark.packed, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


_NOTED: ContextVar[_Noted | None] = ContextVar("_NOTED", default=None)


@dataclass(frozen=True)
class _AsItIs:
    tensor: Tensor
    version: int


@dataclass(frozen=True)
class _Packed:
    """A whole storage: bits, eight a byte, or a byte of each number."""

    data: Tensor
    is_bits: bool
    count: int
    dtype: torch.dtype

    def unpack(self) -> Tensor:
        """The numbers in the order of the storage."""
        if not self.is_bits:
            return self.data.to(self.dtype)
        octets = _octets(self.data.device).index_select(0, self.data.to(torch.int32))
        return octets.view(torch.uint8)[: self.count].to(self.dtype)


@dataclass(frozen=True)
class _View:
    """A tensor as a view of a packed storage."""

    packed: _Packed
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


_Saved = _AsItIs | _View


def _restore(saved: _Saved) -> Tensor:
    if isinstance(saved, _View):
        return saved.packed.unpack().as_strided(saved.shape, saved.stride, saved.offset)
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            f"a {saved.tensor.dtype} tensor of shape {tuple(saved.tensor.shape)} that the backward pass needs was "
            f"modified by an in-place operation: it is at version {saved.tensor._version}, expected {saved.version}"
        )
    return saved.tensor


def _pack(numbers: Tensor, bound: int) -> _Packed:
    """Packs numbers [n]."""
    count, dtype = len(numbers), numbers.dtype
    if bound > 1:
        return _Packed(numbers.to(torch.uint8), False, count, dtype)
    # Torch converts to bool four times as fast as to uint8.
    ones = numbers.to(torch.bool, copy=True)
    if count % 8:
        ones = nn.functional.pad(ones, (0, -count % 8))
    words = ones.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56)
    return _Packed(words.to(torch.uint8), True, count, dtype)


@lru_cache(maxsize=16)
def _octets(device: torch.device) -> Tensor:
    """Byte -> its eight bits as the bytes of one int64, lowest first; [256]."""
    every = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return (every & 1).to(torch.uint8).view(torch.int64).flatten()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is strided numbers in memory of its own kind: no subclass, no sparse or quantised layout."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
