"""I-LIF on the CPU in C++, without a batch norm before it: as in SpikeYOLO, where a convolution follows each neuron.

Integers of fp32 inputs equal those of the step equations to the bit. One bit of each number is saved for backward.
native_integers.h has the kernels.
"""

import ctypes
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikefleet_models.kernels.native_library import load_library
from spikefleet_models.membrane import IntegerDynamics

_TYPES = (torch.float32, torch.bfloat16)


class _Call(ctypes.Structure):
    """`Integers` of native_integers.h."""

    _fields_ = (
        ("T", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("bf16", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("bound", "leak", "scale")),
        *((name, ctypes.c_void_p) for name in ("x", "out", "bits", "v_from", "v_to")),
    )


def problem(x: Tensor, v: Tensor | None) -> str | None:
    """Why these kernels cannot compute a call on currents [T, ...] from v[0] [...] or rest; None where they can."""
    if x.device.type != "cpu" or type(x) not in (Tensor, torch.nn.Parameter):
        return f"the currents are a {type(x).__name__} on {x.device}, expected a tensor on the CPU"
    if x.dtype not in _TYPES:
        return f"the currents are {x.dtype}, expected float32 or bfloat16"
    if not x.numel() or _strides(x) is None:
        return f"the currents have shape {tuple(x.shape)} and strides {x.stride()}, expected steps without gaps"
    if v is not None and (v.shape, v.dtype, v.device) != (x.shape[1:], torch.float32, x.device):
        return f"the membrane is {v.dtype} {tuple(v.shape)} on {v.device}, expected float32 {tuple(x.shape[1:])}"
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit records operators of torch alone"
    return None


def _strides(x: Tensor) -> tuple[int, ...] | None:
    """Strides of [T, ...] in x's layout, with time outermost; None where x has gaps or another order."""
    if x.is_contiguous():
        return tuple(math.prod(x.shape[axis + 1 :]) for axis in range(x.dim()))
    # Read step by step: a view of all frames may not exist.
    if x.dim() != 5 or not x[0].is_contiguous(memory_format=torch.channels_last):
        return None
    channels, height, width = x.shape[2:]
    step = x[0].numel()
    if x.shape[0] > 1 and x.stride(0) != step:
        return None
    return step, channels * height * width, 1, width * channels, channels


def apply(x: Tensor, v: Tensor | None, dynamics: IntegerDynamics) -> tuple[Tensor, Tensor | None]:
    """Compute a call without a `problem`.

    Args:
        x: currents [T, ...].
        v: v[0], [...] in fp32; None is rest.
        dynamics: of the neurons.

    Returns:
        (integers [T, ...] of x's type and layout, v[T] or None).
    """
    emitted, v_last = _NativeIntegers.apply(x, v, dynamics)
    return emitted, v_last


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _like(x: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """The tensor itself, or a copy with these strides."""
    if x.shape == shape and x.stride() == strides:
        return x
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device).copy_(x)


class _NativeIntegers(torch.autograd.Function):
    """(x, v[0] or None) -> (integers, v[T] or None)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v_init: Tensor | None, dynamics: IntegerDynamics) -> tuple[Tensor, Tensor | None]:
        steps, n = x.shape[0], x[0].numel()
        strides = _strides(x)
        assert strides is not None
        new, trains = partial(torch.empty_strided, device=x.device), any(ctx.needs_input_grad)
        emitted = new(x.shape, strides, dtype=x.dtype)
        bits = torch.empty((steps, -(-n // 8)), dtype=torch.uint8, device=x.device) if trains else None
        v_from = None if v_init is None else _like(v_init, x.shape[1:], strides[1:])
        v_last = None if v_from is None else new(x.shape[1:], strides[1:], dtype=torch.float32)
        constants = n, x.dtype == torch.bfloat16, dynamics.bound, dynamics.leak, dynamics.input_scale
        addresses = x.data_ptr(), emitted.data_ptr(), _address(bits), _address(v_from), _address(v_last)
        _run(load_library().spikefleet_integers_forward, _Call(steps, *constants, *addresses))
        ctx.save_for_backward(bits)
        ctx.set_materialize_grads(False)
        ctx.constants, ctx.shape, ctx.strides, ctx.dtype = constants, x.shape, strides, x.dtype
        ctx.has_state = v_init is not None
        return emitted, v_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad, grad_v = grad_outputs
        (bits,) = ctx.saved_tensors
        shape, strides, new = ctx.shape, ctx.strides, partial(torch.empty_strided, device=bits.device)
        if grad is not None:
            grad = _like(grad.to(ctx.dtype), shape, strides)
        if grad_v is not None:
            grad_v = _like(grad_v, shape[1:], strides[1:])
        grad_x = new(shape, strides, dtype=ctx.dtype)
        to_v = new(shape[1:], strides[1:], dtype=torch.float32) if ctx.has_state else None
        addresses = _address(grad), grad_x.data_ptr(), bits.data_ptr(), _address(grad_v), _address(to_v)
        _run(load_library().spikefleet_integers_backward, _Call(shape[0], *ctx.constants, *addresses))
        return grad_x, to_v, None


def _run(function: Any, call: _Call) -> None:
    if function(ctypes.addressof(call)):
        raise RuntimeError("torch's threads failed in the native I-LIF")
