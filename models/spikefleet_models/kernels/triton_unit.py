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
from typing import Any

import numpy as np
import torch
import triton
from spikingjelly.activation_based import surrogate
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikefleet_models.kernels import triton_backward, triton_forward
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
ELEMENTS = 512
"""Elements of a step in a tile, for up to four steps."""
CHANNELS = 32
"""Channels of a tile in NHWC."""
WARPS = 4
"""Warps of a program."""


def problem(z: Tensor, spec: UnitSpec) -> str | None:
    """Why these kernels cannot compute a call; None where they can."""
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


@dataclass(frozen=True)
class _Tiling:
    """Sizes of a launch, and the layout of its tensors."""

    layout: torch.memory_format
    positions: int
    channels: int
    plane: int
    slab: int
    P: int
    CB: int

    @classmethod
    def of(cls, z: Tensor, spec: UnitSpec) -> "_Tiling":
        samples = z.shape[0] if spec.repeat else z.shape[0] // spec.timesteps
        channels, plane = z.shape[1], z.shape[2] * z.shape[3]
        # Planes of one element have both layouts.
        last = z.is_contiguous(memory_format=torch.channels_last) and (plane == 1 or not z.is_contiguous())
        # Registers hold the membranes of all steps.
        elements = max(128, 4 * ELEMENTS // max(4, _power_of_two(spec.timesteps)))
        block = min(CHANNELS, _power_of_two(channels)) if last else 1
        layout = torch.channels_last if last else torch.contiguous_format
        return cls(layout, samples * plane, channels, plane, samples * channels * plane, elements // block, block)

    @property
    def columns(self) -> int:
        """Blocks of channels."""
        return -(-self.channels // self.CB)

    @property
    def rows(self) -> int:
        """Tiles of positions."""
        return -(-self.positions // self.P)

    @property
    def groups(self) -> int:
        """Partial sums of each channel."""
        return min(self.rows, max(_PROGRAMS // self.columns, -(-self.rows // _MOST_TILES)))

    def laid_out(self, tensor: Tensor) -> Tensor:
        """[T, B, C, H, W] as [T * B, C, H, W] in the layout of z; a copy only where it has another."""
        return tensor.flatten(0, 1).contiguous(memory_format=self.layout)

    def shared(self, spec: UnitSpec, on_cuda: bool) -> dict[str, Any]:
        """Arguments that all kernels over tiles take."""
        dynamics = spec.dynamics
        leak, tau = "none", 0.0
        if spec.dynamics.tau is not None:
            # torch divides by a number on CUDA by multiplying with its rounded inverse, and on the CPU it divides.
            leak = "factor" if on_cuda else "division"
            tau = float(np.float32(1) / np.float32(dynamics.tau)) if on_cuda else float(spec.dynamics.tau)
        return {
            "position_count": self.positions,
            "channel_count": self.channels,
            "plane": self.plane,
            "slab": self.slab,
            "threshold": float(dynamics.v_threshold),
            "rest": float(dynamics.rest),
            "tau": tau,
            "T": spec.timesteps,
            "REPEAT": spec.repeat,
            "CHANNELS_LAST": self.layout == torch.channels_last,
            "GATE": spec.gate or "none",
            "POST_ADD": spec.post_add,
            "LEAK": leak,
            "DECAY_INPUT": dynamics.decay_input,
            "SOFT": dynamics.v_reset is None,
            "P": self.P,
            "CB": self.CB,
            **_options(),
        }

    def backward(self, spec: UnitSpec) -> dict[str, Any]:
        """Arguments that the kernels of backward take as well."""
        function = spec.dynamics.surrogate_function
        return {
            "EXACT": spec.gate_gradient == "exact",
            "DETACHED": spec.dynamics.detach_reset,
            "SURROGATE": _SURROGATES[type(function)],
            "ALPHA": float(function.alpha),
        }


def _options() -> dict[str, Any]:
    # What the kernels call one multiply-add is one, and nothing else: the reference rounds each operation.
    return {"enable_fp_fusion": False, "num_warps": WARPS}


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
        tiling = _Tiling.of(z, spec)
        z = z.contiguous(memory_format=tiling.layout)
        mean, invstd = _statistics(z, spec)
        q = None if w is None else w.float().sigmoid()
        shortcut = None if shortcut is None else tiling.laid_out(shortcut)
        shape = (z.shape[0] * (spec.timesteps if spec.repeat else 1), *z.shape[1:])
        spikes = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=tiling.layout)
        arguments = tiling.shared(spec, z.is_cuda)
        if q is not None:
            arguments["LEAK"] = "learned"
        with _on_device_of(z):
            triton_forward.forward[(tiling.rows * tiling.columns,)](
                z, z if shortcut is None else shortcut, mean, invstd, gamma, beta, z if q is None else q, spikes,
                **arguments,
            )  # fmt: skip
        ctx.save_for_backward(z, gamma, beta, mean, invstd, shortcut if spec.saves_shortcut else None, w)
        ctx.spec = spec
        return spikes.unflatten(0, (spec.timesteps, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_spikes,) = grad_outputs
        z, gamma, beta, mean, invstd, shortcut, w = ctx.saved_tensors
        spec: UnitSpec = ctx.spec
        tiling = _Tiling.of(z, spec)
        grad = tiling.laid_out(grad_spikes)
        q = None if w is None else w.float().sigmoid()
        arguments = tiling.shared(spec, z.is_cuda) | tiling.backward(spec)
        if q is not None:
            arguments["LEAK"] = "learned"
        to_shortcut = shortcut is not None and ctx.needs_input_grad[3]
        grad_shortcut = torch.empty_like(shortcut) if to_shortcut else None
        groups, channels = tiling.groups, tiling.channels
        sums = torch.empty((2, groups, channels), dtype=torch.float64, device=z.device)
        q_sums = None if q is None else torch.empty((groups, channels), dtype=torch.float64, device=z.device)
        grad_gamma, grad_beta, centre, slope = torch.empty((4, channels), dtype=torch.float32, device=z.device).unbind()
        grad_z = torch.empty_like(z)
        read, parameters = (z, z if shortcut is None else shortcut, grad), (mean, invstd, gamma, beta)
        factor = z if q is None else q
        with _on_device_of(z):
            triton_backward.backward_sums[(groups * tiling.columns,)](
                *read, grad if grad_shortcut is None else grad_shortcut, *parameters, factor, sums,
                sums if q_sums is None else q_sums, groups=groups, LEARNS_Q=q is not None, TO_SHORTCUT=to_shortcut,
                **arguments,
            )  # fmt: skip
            triton_backward.finish_sums[(-(-channels // 8),)](
                sums, invstd, grad_gamma, grad_beta, centre, slope, z.numel() // channels, channels, groups,
                G=128, CB=8, **_options(),
            )  # fmt: skip
            triton_backward.backward_input[(tiling.rows * tiling.columns,)](
                *read, *parameters, factor, centre, slope, grad_z, **arguments
            )
        grad_w = None
        if q is not None and q_sums is not None:
            grad_w = (q_sums.sum() * q * (1 - q)).to(q.dtype)
        if grad_shortcut is not None:
            grad_shortcut = grad_shortcut.unflatten(0, (spec.timesteps, -1))
        if spec.gate == "add":
            grad_shortcut = grad_spikes
        return grad_z, grad_gamma, grad_beta, grad_shortcut, grad_w, None
