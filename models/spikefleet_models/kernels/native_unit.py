"""The spiking unit on the CPU in C++: batch norm, neuron and gate in one call forward and one backward.

It keeps the contract of `SpikingUnit`: spikes and running statistics of fp32 inputs equal those of the reference form
bit by bit; bf16 inputs give the spikes of fp32 arithmetic on them. Saved for backward are z, mean and the inverse
standard deviation, and the shortcut where the gate's backward reads it. native_unit.cpp has the kernels,
native_library.py compiles them, native_check.py proves them before their first use.

Sums of batch statistics in NCHW are those of torch in fp64 in another order: both round to the same fp32 number unless
it lies within some 1e-9 of its distance to the next one.
"""

import ctypes
import math
from functools import lru_cache
from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikefleet_models.gates import GateGradient
from spikefleet_models.kernels.native_library import load_library
from spikefleet_models.membrane import Dynamics, IntegerDynamics
from spikefleet_models.surrogates import Dspike
from spikefleet_models.unit_spec import UnitSpec

_GATES = ("none", "bsg", "add", "and", "iand", "post_add")
_LEAKS = ("none", "division", "product", "integers")
_SURROGATES: dict[type, int] = {
    surrogate.ATan: 0,
    surrogate.Rect: 1,
    surrogate.PiecewiseQuadratic: 2,
    surrogate.SoftSign: 3,
    surrogate.SuperSpike: 4,
    surrogate.Sigmoid: 5,
    surrogate.PiecewiseExp: 6,
    surrogate.Erf: 7,
    Dspike: 8,
}
_FIRES_ABOVE_HALF = 0.5 + 2.0**-24
"""The smallest fp32 number that I-LIF with D = 1 rounds up: the threshold that gates see."""
_TYPES = (torch.float32, torch.bfloat16)


class _Spec(ctypes.Structure):
    """`Spec` of native_unit.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("T", "B", "C", "plane")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "channels_last", "bf16", "repeat", "gate", "exact", "leak", "decay_input", "soft", "detached",
                "surrogate", "threads", "learned",
            )
        ),
        *((name, ctypes.c_float) for name in ("threshold", "rest", "tau", "alpha", "bound", "scale")),
    )  # fmt: skip


class _Forward(ctypes.Structure):
    """`Forward` of native_unit.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "z", "shortcut", "gamma", "beta", "q", "running_mean", "running_var", "mean", "invstd", "out",
            )
        ),
        ("momentum", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("train", ctypes.c_int32),
        ("v_init", ctypes.c_void_p),
        ("v_last", ctypes.c_void_p),
    )  # fmt: skip


class _Backward(ctypes.Structure):
    """`Backward` of native_unit.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "z", "shortcut", "grad", "gamma", "beta", "mean", "invstd", "q", "grad_z", "grad_shortcut", "rest",
            "grad_gamma", "grad_beta", "grad_q", "v_init", "grad_v", "grad_v_init",
        )
    )  # fmt: skip


def problem(z: Tensor, shortcut: Tensor | None, spec: UnitSpec, v_init: Tensor | None = None) -> str | None:
    """Why these kernels cannot compute a call; None where they can."""
    bn = spec.bn
    integers = isinstance(spec.dynamics, IntegerDynamics)
    function = None if isinstance(spec.dynamics, IntegerDynamics) else spec.dynamics.surrogate_function
    if z.device.type != "cpu" or type(z) not in (Tensor, torch.nn.Parameter):
        return f"z is a {type(z).__name__} on {z.device}, expected a tensor on the CPU"
    if z.dtype not in _TYPES:
        return f"z is {z.dtype}, expected float32 or bfloat16"
    if shortcut is not None and shortcut.dtype != z.dtype:
        return f"the shortcut is {shortcut.dtype}, expected the {z.dtype} of z"
    parameters = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    if any(p is None or p.dtype != torch.float32 or p.device != z.device or not p.is_contiguous() for p in parameters):
        return f"the batch norm is {bn.weight.dtype} on {bn.weight.device}, expected float32 on {z.device}"
    if z.dim() != 4 or z.shape[1] != bn.num_features:
        return f"z has shape {tuple(z.shape)}, expected [T * B, {bn.num_features}, H, W]"
    if not integers and type(function) not in _SURROGATES:
        names = ", ".join(kind.__name__ for kind in _SURROGATES)
        return f"the surrogate gradient is {type(function).__name__}, expected one of {names}"
    if not z.numel() or not (z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last)):
        return f"z has shape {tuple(z.shape)} and strides {z.stride()}, expected elements in NCHW or NHWC"
    if z.numel() // z.shape[1] <= torch.get_num_threads():
        return f"{z.numel() // z.shape[1]} elements of a channel are no more than torch's threads"
    if v_init is not None:
        found, expected = (v_init.shape, v_init.dtype, v_init.device), (_state_shape(z, spec), torch.float32, z.device)
        if found != expected:
            return f"the membrane has shape, type and device {found}, expected {expected}"
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit records operators of torch alone"
    return None


def _state_shape(z: Tensor, spec: UnitSpec) -> torch.Size:
    """Shape [B, C, H, W] of the membrane."""
    return torch.Size((z.shape[0] if spec.repeat else z.shape[0] // spec.timesteps, *z.shape[1:]))


def apply(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shortcut: Tensor | None,
    w: Tensor | None,
    spec: UnitSpec,
    v_init: Tensor | None = None,
) -> Any:
    """Compute spikes [T, B, C, H, W] of a call without a `problem`; with `v_init`, (spikes, v[T] [B, C, H, W]).

    Args:
        z: [T * B, C, H, W], or static [B, C, H, W].
        gamma: weight of the batch norm, [C].
        beta: bias of the batch norm, [C].
        shortcut: [T, B, C, H, W], for a gate or post-addition.
        w: of PLIF, whose 1 / tau is sigmoid(w).
        spec: the rest.
        v_init: v[0], [B, C, H, W] in fp32; None is the reset state.

    Raises:
        ValueError: T does not divide the number of frames; or the shortcut is missing, or has another shape or device
            than the spikes. The kernels would read memory that is not its own.
    """
    frames = z.shape[0] * (spec.timesteps if spec.repeat else 1)
    if frames % spec.timesteps:
        raise ValueError(f"z has {frames} frames, expected a multiple of the {spec.timesteps} time steps")
    if spec.gate is not None or spec.post_add:
        expected = (spec.timesteps, frames // spec.timesteps, *z.shape[1:])
        found = None if shortcut is None else (tuple(shortcut.shape), shortcut.device)
        if found != (expected, z.device):
            raise ValueError(f"shortcut: shape and device are {found}, expected {expected} on {z.device}")
    spikes, v_last = _NativeFunction.apply(z, gamma, beta, shortcut, w, spec, v_init)
    return spikes if v_init is None else (spikes, v_last)


def _is_channels_last(z: Tensor) -> bool:
    # Planes of one element have both layouts; torch sums them as NHWC.
    plane = z.shape[2] * z.shape[3]
    return z.is_contiguous(memory_format=torch.channels_last) and (plane == 1 or not z.is_contiguous())


@lru_cache(maxsize=4096)
def _spec(
    shape: tuple[int, ...],
    last: bool,
    bf16: bool,
    learned: bool,
    threads: int,
    timesteps: int,
    repeat: bool,
    gate: str | None,
    gate_gradient: GateGradient,
    post_add: bool,
    dynamics: Dynamics | IntegerDynamics,
    alpha: float,
) -> _Spec:
    """Kept, because building it takes as long as the call of a small unit."""
    frames, channels, height, width = shape
    call = (
        timesteps, frames if repeat else frames // timesteps, channels, height * width,
        last, bf16, repeat, _GATES.index("post_add" if post_add else gate or "none"), gate_gradient == "exact",
    )  # fmt: skip
    if isinstance(dynamics, IntegerDynamics):
        leak, bound, scale = dynamics.leak, dynamics.bound, dynamics.input_scale
        none = 0, 0, 0, 0
        return _Spec(
            *call, _LEAKS.index("integers"), *none, threads, 0, _FIRES_ABOVE_HALF, 0.0, leak, 0.0, bound, scale
        )
    kind, tau = ("product", 0.0) if learned else _leak(dynamics)
    return _Spec(
        *call, _LEAKS.index(kind), dynamics.decay_input, dynamics.v_reset is None, dynamics.detach_reset,
        _SURROGATES[type(dynamics.surrogate_function)], threads, learned,
        dynamics.v_threshold, dynamics.rest, tau, alpha, 0.0, 0.0,
    )  # fmt: skip


def _leak(dynamics: Dynamics) -> tuple[str, float]:
    """How the kernels leak, and by which number."""
    if dynamics.tau is None:
        return "none", 0.0
    # The inverse of a power of two is exact: a product rounds as the division does, and is faster.
    if math.frexp(dynamics.tau)[0] == 0.5:
        return "product", 1 / dynamics.tau
    return "division", dynamics.tau


def _spec_of(z: Tensor, spec: UnitSpec, learned: bool) -> _Spec:
    alpha = 0.0 if isinstance(spec.dynamics, IntegerDynamics) else float(spec.dynamics.surrogate_function.alpha)
    call = spec.timesteps, spec.repeat, spec.gate, spec.gate_gradient, spec.post_add, spec.dynamics, alpha
    bf16 = z.dtype == torch.bfloat16
    return _spec(tuple(z.shape), _is_channels_last(z), bf16, learned, torch.get_num_threads(), *call)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _laid_out(tensor: Tensor, spec: _Spec) -> Tensor:
    """[T, B, C, H, W] as [T * B, C, H, W] in the layout of z; a copy only where it has another."""
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    return tensor.flatten(0, 1).contiguous(memory_format=layout)


def _call(function: Any, spec: _Spec, arguments: ctypes.Structure) -> None:
    if function(ctypes.addressof(spec), ctypes.addressof(arguments)):
        raise MemoryError("the native spiking unit could not allocate memory")


class _NativeFunction(torch.autograd.Function):
    """(z, gamma, beta, shortcut, w, v[0] or None) -> (spikes, v[T] or None)."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        gamma: Tensor,
        beta: Tensor,
        shortcut: Tensor | None,
        w: Tensor | None,
        spec: UnitSpec,
        v_init: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        native, bn = _spec_of(z, spec, w is not None), spec.bn
        gamma, beta = gamma.contiguous(), beta.contiguous()
        assert bn.running_mean is not None
        assert bn.running_var is not None
        q = None if w is None else w.float().sigmoid()
        shortcut = None if shortcut is None else _laid_out(shortcut, native)
        layout = torch.channels_last if native.channels_last else torch.contiguous_format
        frames = native.T * native.B
        spikes = torch.empty((frames, *z.shape[1:]), dtype=z.dtype, device=z.device, memory_format=layout)
        mean, invstd = torch.empty((2, z.shape[1]), dtype=torch.float32, device=z.device).unbind()
        v_init = None if v_init is None else v_init.contiguous(memory_format=layout)
        v_last = None if v_init is None else torch.empty_like(v_init)
        arguments = _Forward(
            z.data_ptr(), _address(shortcut), gamma.data_ptr(), beta.data_ptr(), _address(q),
            bn.running_mean.data_ptr(), bn.running_var.data_ptr(), mean.data_ptr(), invstd.data_ptr(),
            spikes.data_ptr(), bn.momentum, bn.eps, bn.training, _address(v_init), _address(v_last),
        )  # fmt: skip
        _call(load_library().spikefleet_forward, native, arguments)
        if bn.training and not bn.running_mean.is_inference():
            torch.autograd.graph.increment_version((bn.running_mean, bn.running_var))
        ctx.save_for_backward(z, gamma, beta, mean, invstd, shortcut if spec.saves_shortcut else None, q, v_init)
        ctx.set_materialize_grads(False)
        ctx.native, ctx.gate = native, spec.gate
        ctx.w_dtype = None if w is None else w.dtype
        return spikes.unflatten(0, (spec.timesteps, -1)), v_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_spikes, grad_v = grad_outputs
        z, gamma, beta, mean, invstd, shortcut, q, v_init = ctx.saved_tensors
        native: _Spec = ctx.native
        layout = torch.channels_last if native.channels_last else torch.contiguous_format
        if grad_spikes is None:  # only v[T] is used
            grad_spikes = z.new_zeros((native.T, native.B, *z.shape[1:]))
        grad = _laid_out(grad_spikes, native)
        grad_v = None if grad_v is None else grad_v.contiguous(memory_format=layout)
        grad_v_init = None if v_init is None else torch.empty_like(v_init)
        grad_z = torch.empty_like(z)
        # dL/dx waits in the place of dL/dz; what bf16 does not hold of it waits here.
        rest = torch.empty_like(z) if native.channels_last and native.bf16 else None
        grad_shortcut = None if shortcut is None else torch.empty_like(shortcut)
        grad_gamma, grad_beta = torch.empty((2, z.shape[1]), dtype=torch.float32, device=z.device).unbind()
        grad_q = None if q is None else torch.empty_like(q)
        arguments = _Backward(
            z.data_ptr(), _address(shortcut), grad.data_ptr(), gamma.data_ptr(), beta.data_ptr(), mean.data_ptr(),
            invstd.data_ptr(), _address(q), grad_z.data_ptr(), _address(grad_shortcut), _address(rest),
            grad_gamma.data_ptr(), grad_beta.data_ptr(), _address(grad_q),
            _address(v_init), _address(grad_v), _address(grad_v_init),
        )  # fmt: skip
        _call(load_library().spikefleet_backward, native, arguments)
        grad_w = None if q is None or grad_q is None else (grad_q * q * (1 - q)).to(ctx.w_dtype)
        if grad_shortcut is not None:
            grad_shortcut = grad_shortcut.unflatten(0, (native.T, -1))
        if ctx.gate == "add":
            grad_shortcut = grad_spikes
        return grad_z, grad_gamma, grad_beta, grad_shortcut, grad_w, None, grad_v_init
