"""Membrane dynamics over T steps on buffers: the building blocks of every lean autograd Function of this package.

Charge, fire, reset (Zhang et al., Front. Neurosci. 2023, eqs 5, 6, 8, 9; the order of operations is SpikingJelly's,
so that spikes are bit-identical to its torch reference):

    IF     h[t] = v[t-1] + x[t]
    LIF    h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau          decay_input
           h[t] = v[t-1] - (v[t-1] - v_reset) / tau + x[t]            otherwise
    PLIF   LIF with 1/tau = q = sigmoid(w), w learned
    fire   s[t] = 1 if h[t] >= v_threshold else 0
    reset  v[t] = v_reset where s[t] else h[t]                        hard
           v[t] = h[t] - v_threshold * s[t]                           soft (v_reset is None)

The backward recomputes h from x, so a caller only has to save x. Callers pass tiles that fit the processor's
second-level cache, so that each line below is a pass over cached memory.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

TILE_ELEMENTS = 1 << 19
"""Elements of one tile: 2 MiB of fp32. Measured in models/README.md."""


def tiles(tensor: Tensor, axis: int) -> Iterator[slice]:
    """Yield slices of `axis` that cut `tensor` into tiles of about TILE_ELEMENTS; one slice on accelerators.

    An elementwise pass over a whole activation reads it from memory; over a tile it reads it from the cache. On
    accelerators a kernel launch costs more than a pass, so there the tile is the whole tensor.
    """
    length = tensor.shape[axis]
    step = length
    if tensor.device.type == "cpu":
        step = max(1, TILE_ELEMENTS * length // max(tensor.numel(), 1))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@dataclass(frozen=True)
class Dynamics:
    """Parameters of a neuron's step equations. `tau` is None for IF, and for PLIF, whose q is passed as a tensor."""

    v_threshold: float
    v_reset: float | None
    detach_reset: bool
    decay_input: bool
    tau: float | None
    surrogate_function: surrogate.SurrogateFunctionBase

    @property
    def rest(self) -> float:
        """Voltage of the reset state, towards which the leak decays."""
        return 0.0 if self.v_reset is None else self.v_reset


@dataclass(frozen=True)
class IntegerDynamics:
    """Parameters of I-LIF's step equations, which are in neurons.py."""

    bound: int
    leak: float
    input_scale: float


def membrane_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, or fp64 for fp64 input: a 16-bit membrane loses small currents."""
    return torch.promote_types(dtype, torch.float32)


def charge(dynamics: Dynamics, q: Tensor | None, v: Tensor | None, x: Tensor, out: Tensor) -> Tensor:
    """Compute h[t] from v[t-1] and x[t].

    Args:
        dynamics: of the neuron.
        q: 1 / tau of PLIF, a scalar tensor; None for the other kinds.
        v: v[t-1]; None is the reset state.
        x: x[t].
        out: buffer for the result; may be `v` or `x`.

    Returns:
        `out`, or `x` itself where h[t] equals x[t].
    """
    leaky = q is not None or dynamics.tau is not None
    if v is None:
        if leaky and dynamics.decay_input:
            x = _leak(dynamics, q, x, out)
        return torch.add(x, dynamics.rest, out=out) if dynamics.rest else x
    if not leaky:
        return torch.add(v, x, out=out)
    offset = v - dynamics.rest if dynamics.rest else v
    if dynamics.decay_input:
        leaked = x - offset
        return torch.add(v, _leak(dynamics, q, leaked, leaked), out=out)
    leaked = _leak(dynamics, q, offset, torch.empty_like(v))
    return torch.add(torch.sub(v, leaked, out=leaked), x, out=out)


def _leak(dynamics: Dynamics, q: Tensor | None, x: Tensor, out: Tensor) -> Tensor:
    if q is not None:
        return torch.mul(x, q, out=out)
    assert dynamics.tau is not None
    return torch.div(x, dynamics.tau, out=out)


def reset(dynamics: Dynamics, h: Tensor, spike: Tensor, out: Tensor) -> Tensor:
    """Compute v[t] from h[t] and s[t] into `out`, which may be `h`."""
    if dynamics.v_reset is None:
        return torch.sub(h, spike, alpha=dynamics.v_threshold, out=out)
    if dynamics.v_reset == 0.0:
        return torch.addcmul(h, h, spike, value=-1.0, out=out)
    return torch.lerp(h, h.new_full((), dynamics.v_reset), spike, out=out)


def forward_steps(
    dynamics: Dynamics,
    q: Tensor | None,
    x: Sequence[Tensor],
    spikes: Sequence[Tensor],
    v_init: Tensor | None = None,
    v_last: Tensor | None = None,
) -> None:
    """Write s[t] of every step into `spikes` (which may be `x`) and, if it is given, v[T] into `v_last`."""
    v, state = v_init, torch.empty_like(x[0])
    for t, (x_t, s_t) in enumerate(zip(x, spikes, strict=True)):
        h = charge(dynamics, q, v, x_t, out=state)
        if h.data_ptr() == s_t.data_ptr():
            h = state.copy_(h)
        torch.ge(h, dynamics.v_threshold, out=s_t)
        if t + 1 < len(x):
            v = reset(dynamics, h, s_t, out=state)
        elif v_last is not None:
            reset(dynamics, h, s_t, out=v_last)


def charge_steps(dynamics: Dynamics, q: Tensor | None, x: Sequence[Tensor], v: Tensor | None) -> None:
    """Replace x[t] by h[t] in place for every step."""
    state = torch.empty_like(x[0])
    for t, x_t in enumerate(x):
        h = charge(dynamics, q, v, x_t, out=x_t)
        if t + 1 < len(x):
            v = reset(dynamics, h, torch.ge(h, dynamics.v_threshold, out=torch.empty_like(h)), out=state)


def backward_steps(
    dynamics: Dynamics,
    q: Tensor | None,
    h: Sequence[Tensor],
    grad_spikes: Sequence[Tensor],
    grad_v: Tensor | None = None,
    v_init: Tensor | None = None,
    currents: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Replace h[t] by dL/dx[t] in place for every step.

    Args:
        dynamics: of the neuron.
        q: 1 / tau of PLIF; None for the other kinds.
        h: charged membranes h[t]; replaced.
        grad_spikes: dL/ds[t]; not changed.
        grad_v: dL/dv[T]; not changed.
        v_init: v[0]; None is the reset state.
        currents: x[t]; only PLIF needs them.

    Returns:
        (dL/dv_init, dL/dq); the latter is None without q.
    """
    below, base = torch.empty_like(h[0]), torch.empty_like(h[0])
    threshold = h[0].new_full((), dynamics.v_threshold)
    carry = grad_v
    grad_q = None if q is None else q.new_zeros(())
    for t in reversed(range(len(h))):
        torch.sub(threshold, h[t], out=below)
        grad_s, grad_h = grad_spikes[t], None
        if carry is not None:
            grad_h = carry
            if dynamics.v_reset is not None:
                grad_h = torch.ops.aten.threshold_backward.grad_input(carry, below, 0.0, grad_input=base)
            if not dynamics.detach_reset:
                to_spike = -dynamics.v_threshold if dynamics.v_reset is None else dynamics.v_reset - h[t]
                grad_s = grad_s + carry * to_spike
        _fire_backward(dynamics, below, grad_s, grad_h, out=h[t])
        if grad_q is not None:
            assert currents is not None
            offset = _voltage_before(dynamics, h, t, v_init).sub_(dynamics.rest)
            leaking = currents[t] - offset if dynamics.decay_input else offset.neg_()
            grad_q += torch.sum(leaking.mul_(h[t]))
        carry = _charge_backward(dynamics, q, h[t])
    assert carry is not None
    return carry, grad_q


def _fire_backward(dynamics: Dynamics, below: Tensor, grad_s: Tensor, grad_h: Tensor | None, out: Tensor) -> None:
    """Compute out = grad_s * surrogate'(-below) + grad_h; `below` = v_threshold - h is overwritten."""
    function = dynamics.surrogate_function
    if type(function) is surrogate.ATan:
        # a / (1 + (pi a d)^2) with a = alpha / 2, as one denominator: 1/a + pi^2 a d^2
        a = function.alpha / 2
        torch.addcmul(below.new_full((), 1 / a), below, below, value=math.pi**2 * a, out=below)
        if grad_h is None:
            torch.div(grad_s, below, out=out)
        else:
            torch.addcdiv(grad_h, grad_s, below, out=out)
        return
    gradient = function.backward(grad_s, below.neg_(), function.alpha)
    if grad_h is None:
        out.copy_(gradient)
    else:
        torch.add(grad_h, gradient, out=out)


def _charge_backward(dynamics: Dynamics, q: Tensor | None, grad: Tensor) -> Tensor:
    """Replace dL/dh[t] by dL/dx[t] in place; return dL/dv[t-1]."""
    if q is None and dynamics.tau is None:
        return grad
    leak = _leak(dynamics, q, grad, torch.empty_like(grad))
    carry = grad - leak
    if dynamics.decay_input:
        grad.copy_(leak)
    return carry


def _voltage_before(dynamics: Dynamics, h: Sequence[Tensor], t: int, v_init: Tensor | None) -> Tensor:
    if t:
        spike = torch.ge(h[t - 1], dynamics.v_threshold, out=torch.empty_like(h[0]))
        return reset(dynamics, h[t - 1], spike, out=spike)
    return torch.full_like(h[0], dynamics.rest) if v_init is None else v_init.clone()
