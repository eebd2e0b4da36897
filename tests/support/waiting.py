"""What a host must not do inside of a training step: read a value of a tensor, for which it would wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose results, or the shapes of them, a host has to know.
_OPERATIONS = frozenset(
    {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select", "allclose"}
    | {"_unique2", "unique_dim", "unique_consecutive", "bincount", "argwhere"}
)
# Python reads these of a tensor in main memory without an operation.
_METHODS = frozenset(
    {"tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero"}
)


_allowed: list[bool] = []


class WaitingError(AssertionError):
    """A host would wait for the device here."""


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and _has_mask(args[1])
        if (name in _OPERATIONS or masked) and not _allowed:
            raise WaitingError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METHODS and not _allowed:
            raise WaitingError(f"Tensor.{name} waits for the device")
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises WaitingError, on tensors of the CPU too, wherever the host would wait for a GPU."""
    with ExitStack() as stack:
        stack.enter_context(_Methods())
        stack.enter_context(_Operations())
        yield


@contextmanager
def waiting_allowed() -> Iterator[None]:
    """Inside of `no_waiting`: for what is known to be on the host."""
    _allowed.append(True)
    try:
        yield
    finally:
        _allowed.pop()
