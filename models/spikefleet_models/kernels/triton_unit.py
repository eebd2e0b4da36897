"""The spiking unit on CUDA: batch norm, neuron and gate as Triton kernels, three launches forward and three backward.

It keeps the contract of `SpikingUnit`: spikes and running statistics of fp32 inputs equal those of the reference form,
which uses torch's native batch norm on CUDA, bit by bit; 16-bit inputs give the spikes of fp32 arithmetic on them; the
same inputs give the same bits. Statistics are torch's own (`batch_norm_update_stats`). Saved for backward are z, mean
and the inverse standard deviation, and the shortcut where the gate's backward reads it.

`problem` says why a call keeps the lean form. Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported) runs
the same kernels on the CPU, for tests.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from spikingjelly.activation_based import surrogate
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikefleet_models.gates import GateGradient
from spikefleet_models.kernels import triton_backward, triton_forward
from spikefleet_models.membrane import Dynamics, IntegerDynamics
from spikefleet_models.surrogates import Dspike
from spikefleet_models.unit_spec import UnitSpec

TRITON_VERSION: str = triton.__version__

INTERPRETED = not isinstance(triton_forward.forward, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, which takes tensors on the CPU."""

_SURROGATES: dict[type, str] = {
    surrogate.ATan: "atan",
    surrogate.Rect: "rect",
    surrogate.PiecewiseQuadratic: "piecewise_quadratic",
    surrogate.PiecewiseExp: "piecewise_exp",
    surrogate.Sigmoid: "sigmoid",
    surrogate.SoftSign: "soft_sign",
    surrogate.SuperSpike: "super_spike",
    surrogate.Erf: "erf",
    Dspike: "dspike",
}
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_STEPS = 32
_PROGRAMS = 1024
"""Programs of the kernel that sums: a constant, so that the order of additions does not depend on the device."""
_MOST_TILES = 64
"""Tiles that a place of a tile adds up in fp32 at most."""
TILES: dict[tuple[str, bool], tuple[int, int]] = {
    ("forward", True): (512, 64),
    ("backward_sums", True): (256, 32),
    ("backward_input", True): (512, 64),
    ("forward", False): (512, 1),
    ("backward_sums", False): (512, 1),
    ("backward_input", False): (512, 1),
}
"""(kernel, whether NHWC) -> elements of a step in a tile for up to four steps, and channels of a tile. The fastest of
seven on an H200: models/README.md."""
WARPS = 4
"""Warps of a program."""


def problem(z: Tensor, spec: UnitSpec) -> str | None:
    """Why these kernels cannot compute a call; None where they can."""
    if isinstance(spec.dynamics, IntegerDynamics):
        return "the neuron is I-LIF"
    function = spec.dynamics.surrogate_function
    if not z.is_cuda and not INTERPRETED:
        return f"z is on {z.device}, expected a CUDA device"
    if z.dtype not in _TYPES:
        return f"z is {z.dtype}, expected float32, bfloat16 or float16"
    if spec.bn.weight.dtype != torch.float32:
        return f"the batch norm is {spec.bn.weight.dtype}, expected float32"
    if spec.timesteps > _MOST_STEPS:
        return f"T is {spec.timesteps}, expected at most {_MOST_STEPS}"
    if type(function) not in _SURROGATES:
        return f"the surrogate gradient is {type(function).__name__}, expected one of {', '.join(_SURROGATES.values())}"
    elements = z.numel() * (spec.timesteps if spec.repeat else 1)
    if not 0 < elements < 1 << 31:
        return f"z has {elements} elements, expected 1 to 2^31 - 1"
    return None


def apply(z: Tensor, gamma: Tensor, beta: Tensor, shortcut: Tensor | None, w: Tensor | None, spec: UnitSpec) -> Tensor:
    """Compute spikes [T, B, C, H, W] of a call without a `problem`.

    Args:
        z: [T * B, C, H, W], or static [B, C, H, W].
        gamma: weight of the batch norm, [C].
        beta: bias of the batch norm, [C].
        shortcut: [T, B, C, H, W], for a gate or post-addition.
        w: of PLIF, whose 1 / tau is sigmoid(w).
        spec: the rest.

    Raises:
        ValueError: the shortcut is missing, or has another shape or device than the spikes; the kernels would read
            memory that is not its own.
    """
    if spec.gate is not None or spec.post_add:
        frames = z.shape[0] * (spec.timesteps if spec.repeat else 1)
        expected = (spec.timesteps, frames // spec.timesteps, *z.shape[1:])
        found = None if shortcut is None else (tuple(shortcut.shape), shortcut.device)
        if found != (expected, z.device):
            raise ValueError(f"shortcut: shape and device are {found}, expected {expected} on {z.device}")
    spikes: Tensor = _TritonFunction.apply(z, gamma, beta, shortcut, w, spec)
    return spikes


class _Launch(NamedTuple):
    """Number of programs and the arguments by name of one kernel."""

    grid: tuple[int]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    """The launches of a unit for tensors of one shape and layout."""

    layout: torch.memory_format
    shape: tuple[int, ...]
    """Of the spikes, [T * B, C, H, W]."""
    groups: int
    """Partial sums of each channel."""
    forward: _Launch
    backward_sums: _Launch
    finish_sums: _Launch
    backward_input: _Launch

    def laid_out(self, tensor: Tensor) -> Tensor:
        """[T, B, C, H, W] as [T * B, C, H, W] in the layout of z; a copy only where it has another."""
        return tensor.flatten(0, 1).contiguous(memory_format=self.layout)


def _plan_of(z: Tensor, spec: UnitSpec, learned: bool) -> _Plan:
    # Planes of one element have both layouts.
    plane = z.shape[2] * z.shape[3]
    last = z.is_contiguous(memory_format=torch.channels_last) and (plane == 1 or not z.is_contiguous())
    assert isinstance(spec.dynamics, Dynamics)
    function = spec.dynamics.surrogate_function
    call = spec.timesteps, spec.repeat, spec.gate, spec.gate_gradient, spec.post_add
    return _plan(tuple(z.shape), last, z.is_cuda, learned, *call, spec.dynamics, float(function.alpha), WARPS)


@lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...],
    last: bool,
    on_cuda: bool,
    learned: bool,
    timesteps: int,
    repeat: bool,
    gate: str | None,
    gate_gradient: GateGradient,
    post_add: bool,
    dynamics: Dynamics,
    alpha: float,
    warps: int,
) -> _Plan:
    """Kept, because building it takes as long as launching what it describes."""
    frames, channels, height, width = shape
    plane = height * width
    positions = (frames if repeat else frames // timesteps) * plane
    # What the kernels call one multiply-add is one, and nothing else: the reference rounds each operation.
    options = {"enable_fp_fusion": False, "num_warps": warps}
    leak, tau = _leak(dynamics, on_cuda)
    shared = {
        "position_count": positions,
        "channel_count": channels,
        "plane": plane,
        "slab": positions * channels,
        "threshold": float(dynamics.v_threshold),
        "rest": float(dynamics.rest),
        "tau": tau,
        "T": timesteps,
        "REPEAT": repeat,
        "CHANNELS_LAST": last,
        "GATE": gate or "none",
        "POST_ADD": post_add,
        "LEAK": "learned" if learned else leak,
        "DECAY_INPUT": dynamics.decay_input,
        "SOFT": dynamics.v_reset is None,
        **options,
    }
    backward = {
        "EXACT": gate_gradient == "exact",
        "DETACHED": dynamics.detach_reset,
        "SURROGATE": _SURROGATES[type(dynamics.surrogate_function)],
        "ALPHA": alpha,
    }

    def tiled(kernel: str, extra: dict[str, Any]) -> tuple[int, int, dict[str, Any]]:
        """Rows and columns of tiles, and the arguments of a kernel."""
        elements, block = TILES[kernel, last]
        # Registers hold the membranes of all steps.
        elements = max(128, 4 * elements // max(4, _power_of_two(timesteps)))
        block = min(block, _power_of_two(channels))
        P = elements // block
        return -(-positions // P), -(-channels // block), {**shared, **extra, "P": P, "CB": block}

    rows, columns, arguments = tiled("forward", {})
    forward = _Launch((rows * columns,), arguments)
    rows, columns, arguments = tiled("backward_input", backward)
    backward_input = _Launch((rows * columns,), arguments)
    rows, columns, arguments = tiled("backward_sums", {**backward, "LEARNS_Q": learned})
    groups = min(rows, max(_PROGRAMS // columns, -(-rows // _MOST_TILES)))
    backward_sums = _Launch((groups * columns,), {**arguments, "groups": groups})
    count = frames * plane
    finish = {"count": count, "channel_count": channels, "groups": groups, "G": 128, "CB": 8, **options}
    finish_sums = _Launch((-(-channels // 8),), finish)
    emitted = (frames * (timesteps if repeat else 1), channels, height, width)
    layout = torch.channels_last if last else torch.contiguous_format
    return _Plan(layout, emitted, groups, forward, backward_sums, finish_sums, backward_input)


def _leak(dynamics: Dynamics, on_cuda: bool) -> tuple[str, float]:
    """How the kernels leak, and by which number.

    Torch divides by a number on CUDA by multiplying with its rounded inverse; on the CPU it divides.
    """
    if dynamics.tau is None:
        return "none", 0.0
    if on_cuda:
        return "factor", float(np.float32(1) / np.float32(dynamics.tau))
    return "division", float(dynamics.tau)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _statistics(z: Tensor, spec: UnitSpec) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation [C], as torch's native batch norm has them; updates the running ones."""
    bn = spec.bn
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.momentum is not None
    if bn.training:
        mean, variance = torch.ops.aten.batch_norm_update_stats(z, bn.running_mean, bn.running_var, bn.momentum)
    else:
        mean, variance = bn.running_mean, bn.running_var
    if z.is_cuda:
        return mean, torch.rsqrt(variance + bn.eps)
    return mean, (1 / (variance.double() + bn.eps).sqrt()).float()


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class _TritonFunction(torch.autograd.Function):
    """(z, gamma, beta, shortcut, w) -> spikes."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, gamma: Tensor, beta: Tensor, shortcut: Tensor | None, w: Tensor | None, spec: UnitSpec
    ) -> Tensor:
        plan = _plan_of(z, spec, w is not None)
        z = z.contiguous(memory_format=plan.layout)
        mean, invstd = _statistics(z, spec)
        q = None if w is None else w.float().sigmoid()
        shortcut = None if shortcut is None else plan.laid_out(shortcut)
        spikes = torch.empty(plan.shape, dtype=z.dtype, device=z.device, memory_format=plan.layout)
        grid, arguments = plan.forward
        with _on_device_of(z):
            triton_forward.forward[grid](
                z, z if shortcut is None else shortcut, mean, invstd, gamma, beta, z if q is None else q, spikes,
                **arguments,
            )  # fmt: skip
        ctx.save_for_backward(z, gamma, beta, mean, invstd, shortcut if spec.saves_shortcut else None, q)
        ctx.plan, ctx.gate, ctx.timesteps = plan, spec.gate, spec.timesteps
        ctx.w_dtype = None if w is None else w.dtype
        return spikes.unflatten(0, (spec.timesteps, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_spikes,) = grad_outputs
        z, gamma, beta, mean, invstd, shortcut, q = ctx.saved_tensors
        plan: _Plan = ctx.plan
        grad = plan.laid_out(grad_spikes)
        to_shortcut = shortcut is not None and ctx.needs_input_grad[3]
        grad_shortcut = torch.empty_like(shortcut) if to_shortcut else None
        channels = z.shape[1]
        sums = torch.empty((2 if q is None else 3, plan.groups, channels), dtype=torch.float64, device=z.device)
        grad_gamma, grad_beta, centre, slope = torch.empty((4, channels), dtype=torch.float32, device=z.device).unbind()
        grad_z = torch.empty_like(z)
        read, parameters = (z, z if shortcut is None else shortcut, grad), (mean, invstd, gamma, beta)
        factor = z if q is None else q
        with _on_device_of(z):
            grid, arguments = plan.backward_sums
            triton_backward.backward_sums[grid](
                *read, grad if grad_shortcut is None else grad_shortcut, *parameters, factor, sums,
                TO_SHORTCUT=to_shortcut, **arguments,
            )  # fmt: skip
            grid, arguments = plan.finish_sums
            triton_backward.finish_sums[grid](sums, invstd, grad_gamma, grad_beta, centre, slope, **arguments)
            grid, arguments = plan.backward_input
            triton_backward.backward_input[grid](*read, *parameters, factor, centre, slope, grad_z, **arguments)
        grad_w = None if q is None else (sums[2].sum() * q * (1 - q)).to(ctx.w_dtype)
        if grad_shortcut is not None:
            grad_shortcut = grad_shortcut.unflatten(0, (ctx.timesteps, -1))
        if ctx.gate == "add":
            grad_shortcut = grad_spikes
        return grad_z, grad_gamma, grad_beta, grad_shortcut, grad_w, None
